#!/bin/sh
# Builds the .deb for the Debian that it runs on: `make deb`. Needs Debian's debhelper, gcc, python3-dev and python3-venv,
# and pip's index. No root. Two builds of one commit give the same bytes, wherever they are made.
#
#   packaging/build_deb.sh [DIRECTORY]      where the package goes (dist)
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=packaging/common.sh
. packaging/common.sh
prepare "${1:-dist}"

cp -r "$source/packaging/debian" "$source/debian"
# shellcheck source=/dev/null
debian=$(. /etc/os-release && echo "$VERSION_ID")
cat >"$source/debian/changelog" <<END
greenarrow-proxy ($version-1~deb$debian) stable; urgency=medium

  * Version $version; what is new stands in changelog.gz.

 -- GreenArrow Proxy contributors <greenarrow-proxy@localhost>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
END

cd "$source"
# Not Debian's built-in ones (build-essential): there is no C++ here.
dpkg-checkbuilddeps -I
if ! dpkg-buildpackage --build=binary --no-sign --no-check-builddeps >"$work/log" 2>&1; then
    tail -n 60 "$work/log" >&2
    exit 1
fi
mv "$work"/greenarrow-proxy_*.deb "$out/"
ls "$out/greenarrow-proxy_$version-1~deb$debian"_*.deb
