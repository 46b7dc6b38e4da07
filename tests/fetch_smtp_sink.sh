#!/bin/sh
# Unpacks Postfix (its smtp-sink is an MX for the tests) into .cache/postfix, and OpenSMTPD into .cache/opensmtpd. They are
# not installed: in Debian they and exim4 exclude each other, and the tests need all of them. Where one cannot be had, the
# tests that want it are skipped; with CI=true that is an error.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
failed=no

# PACKAGE PROGRAM LIBRARIES, the last two beneath the directory that it is unpacked to
usable() {
    [ -x "$here/.cache/$1/$2" ] && ! LD_LIBRARY_PATH="$here/.cache/$1/$3" ldd "$here/.cache/$1/$2" | grep "not found"
}

give_up() {
    echo "$1: $2; its tests will be skipped" >&2
    failed=yes
}

unpack() {
    if usable "$@"; then return; fi
    if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
        give_up "$1" "no apt-get here"
    elif ! (cd "$work" && apt-get download -qq "$1" >"$work/log" 2>&1); then
        give_up "$1" "cannot be downloaded ($(tail -n 1 "$work/log"))"
    else
        mkdir -p "$here/.cache/$1"
        dpkg -x "$work/$1"_*.deb "$here/.cache/$1"
        usable "$@" || give_up "$1" "unpacked, but libraries are missing"
    fi
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unpack postfix usr/sbin/smtp-sink usr/lib/postfix
unpack opensmtpd usr/sbin/smtpd ""
if [ "$failed" = yes ] && [ "${CI:-}" = true ]; then exit 1; fi
