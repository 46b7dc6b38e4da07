#!/bin/sh
# Unpacks Postfix's smtp-sink into .cache/postfix, as an MX for the tests. It is not installed: Debian's postfix and exim4
# exclude each other, and the tests need both. Where it cannot be had, the tests that want it are skipped; with CI=true
# that is an error.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
target="$here/.cache/postfix"
sink="$target/usr/sbin/smtp-sink"

usable() {
    [ -x "$sink" ] && ! LD_LIBRARY_PATH="$target/usr/lib/postfix" ldd "$sink" | grep "not found"
}

give_up() {
    echo "smtp-sink: $1" >&2
    if [ "${CI:-}" = true ]; then exit 1; fi
    exit 0
}

if usable; then exit 0; fi
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    give_up "no apt-get here; its tests will be skipped"
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd "$work" && apt-get download -qq postfix >"$work/log" 2>&1) ||
    give_up "cannot download postfix ($(tail -n 1 "$work/log")); its tests will be skipped"
mkdir -p "$target"
dpkg -x "$work"/postfix_*.deb "$target"
usable || give_up "unpacked, but libraries are missing; its tests will be skipped"
