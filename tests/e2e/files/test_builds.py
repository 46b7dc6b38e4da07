"""What a build says of itself: of which moment the sources are that it has compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forms
from tests.peers import ROOT, program

pytestmark = pytest.mark.either_form("the build, with stand-ins for what compiles")

SOURCE = Path("proxy", "net", "peer.py")
#: Somebody saves a file while it is built.
_MEANWHILE = f"echo '# changed' >> {SOURCE}\n"

#: In mypyc's place: what it makes of one module.
_MYPYC = f"""
from pathlib import Path
from setuptools import Extension
def mypycify(paths, **options):
    assert "{SOURCE}" in paths
    Path("peer.c").write_text("int nothing;")
    return [Extension("proxy.net.peer", ["peer.c"])]
"""


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nset -e\n{text}")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a build looks at first, and one source."""
    for name in (Path("Makefile"), Path("setup.py"), Path("pyproject.toml"), Path("proxy", "__init__.py"), SOURCE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_what_changes_while_it_is_compiled_is_newer_than_what_was_compiled(checkout: Path) -> None:
    """As `forms.stale` looks at it."""
    stand_ins = checkout / "stand-ins"
    for package, text in (("mypyc", ""), ("Cython", "raise ImportError")):
        (stand_ins / package).mkdir(parents=True)
        (stand_ins / package / "__init__.py").write_text(text)
    (stand_ins / "mypyc" / "build.py").write_text(_MYPYC)
    script(checkout / "cc", f'{_MEANWHILE}exec {program("gcc")} "$@"\n')
    environ = forms.build_environ(PYTHONPATH=str(stand_ins), CC=str(checkout / "cc"))
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=checkout, env=environ, check=True, timeout=120, capture_output=True)
    (library,) = checkout.glob("proxy/net/peer.*.so")
    assert (checkout / SOURCE).stat().st_mtime > library.stat().st_mtime
    assert library.stat().st_mtime > (checkout / "cc").stat().st_mtime, "of this build, and not of an earlier one"


@pytest.mark.parametrize("ready", [False, True], ids=["the first build", "another build"])
def test_what_changes_while_it_is_built_is_built_once_more(checkout: Path, ready: bool) -> None:
    def make(*words: str) -> int:
        command = [program("make"), "--silent", *words, ".venv/built"]
        return subprocess.run(command, cwd=checkout, timeout=60, env=environ, capture_output=True).returncode

    environ = {name: value for name, value in os.environ.items() if name != forms.PURE}
    python = checkout / ".venv" / "bin" / "python"
    if ready:
        script(python, "true\n")
        assert make() == 0
        os.utime(checkout / SOURCE)
        assert make("--question") == 1
    script(python, _MEANWHILE)
    assert make() == 0
    assert make("--question") == 1, "what was changed meanwhile is taken as built"
    script(python, "true\n")
    assert make() == 0
    assert make("--question") == 0
