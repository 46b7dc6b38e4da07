#!/bin/sh
# Builds both packages as an index like PyPI takes them, sdists and wheels, and has twine judge them: `make wheels`.
# A compiled wheel gets the tag that says on which systems it runs (auditwheel); needs a compiler, pip's index, no root.
#
#   packaging/build_wheels.sh [DIRECTORY]      where they go (dist); PYTHON: for which interpreter (python3)
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=packaging/common.sh
. packaging/common.sh
prepare "${1:-dist}"
tools

for project in "$source" "$source/client"; do
    "$work/env/bin/pip" --quiet wheel --no-deps --no-build-isolation --wheel-dir "$work/wheels" "$project"
    (cd "$project" && "$work/env/bin/python" setup.py --quiet sdist --dist-dir "$work/sdists" >"$work/log" 2>&1) ||
        { tail -n 20 "$work/log" >&2; exit 1; }
done
mkdir "$work/result"
for wheel in "$work"/wheels/*.whl; do
    case $wheel in
        *-any.whl) cp "$wheel" "$work/result/" ;;
        *) PATH="$work/env/bin:$PATH" "$work/env/bin/auditwheel" repair --wheel-dir "$work/result" "$wheel" >"$work/log" 2>&1 ||
            { tail -n 20 "$work/log" >&2; exit 1; } ;;
    esac
done
cp "$work"/sdists/*.tar.gz "$work/result/"
"$work/env/bin/twine" check --strict "$work"/result/*
mv "$work"/result/* "$out/"
