# shellcheck shell=sh disable=SC2034
# Read by the build scripts beside it, which stand in the checkout's root: a place to work, the source in it, the tools.

# prepare DIRECTORY: sets out (where the result goes), work (removed at the end) and source, whose files are those that git
# knows, and nothing that lies about here; of an unpacked source distribution, all.
prepare() {
    mkdir -p "$1"
    out=$(cd "$1" && pwd)
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    source=$work/greenarrow-proxy
    mkdir "$source"
    if git rev-parse --git-dir >/dev/null 2>&1; then
        git ls-files -z --cached --others --exclude-standard | tar -c --null --ignore-failed-read -T - 2>/dev/null
        : "${SOURCE_DATE_EPOCH:=$(git log -1 --format=%ct)}"
    else
        tar -c --exclude=./dist --exclude=./.venv .
        : "${SOURCE_DATE_EPOCH:=$(stat -c %Y CHANGES.md)}"
    fi >"$work/source.tar"
    tar -x -C "$source" -f "$work/source.tar"
    export SOURCE_DATE_EPOCH
    version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$source/proxy/__init__.py")
}

# An environment with what the program is built with, and what makes packages of it; the versions are those that are locked.
tools() {
    "${PYTHON:-python3}" -m venv "$work/env"
    for file in build-requirements tools; do
        "$work/env/bin/python" -m pip --quiet --disable-pip-version-check install --require-hashes -r "packaging/$file.txt"
    done
}
