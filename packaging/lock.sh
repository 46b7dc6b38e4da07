#!/bin/sh
# Writes packaging/requirements.txt and the two beside it: the one version of each package that .deb, pex
# and image are made with, and the digests of its files. Run it to take newer ones; the difference is to be read.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check pip-tools

lock() {
    "$work/env/bin/pip-compile" --quiet --upgrade --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --output-file "$work/out" "$1"
    { echo "# Made by make lock; see packaging/lock.sh."; cat "$work/out"; } >"$2"
}

"$work/env/bin/python" - >"$work/program.in" <<END
import ast, pathlib
tree = ast.parse(pathlib.Path("setup.py").read_text())
(value,) = [word.value for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords if word.arg == "install_requires"]
print(*ast.literal_eval(value), sep="\n")
END
lock "$work/program.in" packaging/requirements.txt
lock packaging/build-requirements.in packaging/build-requirements.txt
lock packaging/tools.in packaging/tools.txt
