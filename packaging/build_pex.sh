#!/bin/sh
# Builds the program as one file for one Python, at no particular path: `make pex`. Needs a compiler (else the relay in it is
# Python code), pip's index, no root.
#
#   packaging/build_pex.sh [DIRECTORY]      where it goes (dist); PYTHON: for which interpreter (python3)
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=packaging/common.sh
. packaging/common.sh
prepare "${1:-dist}"
tools

pip="$work/env/bin/python -m pip --quiet --disable-pip-version-check"
$pip download --only-binary :all: --require-hashes --dest "$work/wheels" -r packaging/requirements.txt
$pip wheel --no-deps --no-build-isolation --wheel-dir "$work/wheels" "$source"
series=$("$work/env/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
file="greenarrow_proxy-$version-py$(echo "$series" | tr -d .).pex"
# In the mode venv it unpacks itself once, and starts as quickly as an installed program from then on.
PEX_ROOT="$work/pex" "$work/env/bin/pex" "greenarrow-proxy==$version" --no-index --find-links "$work/wheels" \
    --console-script greenarrow_proxy --venv --python-shebang '/usr/bin/env python3' \
    --interpreter-constraint "CPython==$series.*" --output-file "$work/$file"
mv "$work/$file" "$out/"
ls "$out/$file"
