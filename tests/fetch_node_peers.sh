#!/bin/sh
# Installs what lives in npm into .cache/node: the senders Nodemailer with SOCKS and Haraka, and axe, which judges the
# status page. Where there is no npm, the tests that want them are skipped; with CI=true that is an error.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
target="$here/.cache/node"
# Haraka 3.1.1 is the last one for Node.js 20.
packages="nodemailer@7.0.9 socks@2.8.7 Haraka@3.1.1 axe-core@4.10.3"

give_up() {
    echo "npm: $1" >&2
    if [ "${CI:-}" = true ]; then exit 1; fi
    exit 0
}

if [ -f "$target/packages" ] && [ "$(cat "$target/packages")" = "$packages" ]; then exit 0; fi
command -v npm >/dev/null || give_up "not here; the tests of Nodemailer, Haraka and the status page in a browser will be skipped"
mkdir -p "$target"
# shellcheck disable=SC2086 # a list of words
npm install --prefix "$target" --no-audit --no-fund --omit=dev --omit=optional --loglevel=error $packages \
    >"$target/log" 2>&1 || give_up "cannot install $packages: $(tail -n 1 "$target/log")"
echo "$packages" >"$target/packages"
