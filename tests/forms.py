"""The two forms of the program, compiled and as Python code, and which of them a run of the tests is for.

`make test` runs all tests on the compiled form, and then on Python code (GREENARROW_PROXY_PURE=1) most of those that
depend on the form at all: not what is marked `either_form`. The programs that tests start are of the form of the run.
"""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
PURE = "GREENARROW_PROXY_PURE"
#: For builds that are asked whether they run and what is in them, not how fast they are: see setup.py.
UNOPTIMISED = {"GREENARROW_PROXY_OPTIMISE": "0"}
#: For packages that are asked how they are made and installed: of the core some modules, among them the one that
#: --version asks for its form. Each build of all of it is more than a minute of a processor, so few are.
A_FEW = {
    **UNOPTIMISED,
    "GREENARROW_PROXY_CORE": "proxy/numbering.py proxy/policy/limits.py proxy/spans.py",
}


def environ() -> dict[str, str]:
    """For a program under test: our own, without the program's settings, with what chooses its form."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith("GREENARROW_PROXY_") or name == PURE
    }


def build_environ(**more: str) -> dict[str, str]:
    """For a build: our own, compiling all and optimising nothing, whichever form this run is for."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GREENARROW_PROXY_")}
    return ours | UNOPTIMISED | more


def pure() -> bool:
    """Whether this run is for Python code."""
    return os.environ.get(PURE) == "1"


def stale() -> list[str]:
    """Sources in the checkout that have changed since they were compiled: what runs is not what stands there."""
    folders = {path.parent for path in (ROOT / "proxy").rglob("*.so")}
    compiled = {path.with_name(path.name.partition(".")[0]): path for each in folders for path in each.glob("*.so")}
    sources = ((path.with_suffix(ending), built) for path, built in compiled.items() for ending in (".py", ".pyx"))
    return [
        source.relative_to(ROOT).as_posix()
        for source, built in sources
        if source.exists() and source.stat().st_mtime > built.stat().st_mtime
    ]
