"""What the program makes of strangers' bytes is the same whether it runs compiled or as Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers import missing

pytestmark = pytest.mark.either_form("it starts both")
_SCRIPT = Path(__file__).with_name("forms.py")


def run(*arguments: str, pure: bool) -> list[str]:
    environ = os.environ | {"GREENARROW_PROXY_PURE": "1" if pure else ""}
    done = subprocess.run([sys.executable, _SCRIPT, *arguments], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def check(*arguments: str) -> None:
    compiled, python = run(*arguments, pure=False), run(*arguments, pure=True)
    assert python[0] == "compiled:"
    if "proxy.protocols.smtp.tracker" not in compiled[0]:
        missing("the core was not compiled")
    assert len(compiled) == len(python) > 1000
    for one, other in zip(compiled[1:], python[1:], strict=True):
        assert one == other


def test_both_forms_make_the_same_of_any_bytes() -> None:
    check("--cases", "400")


def test_the_seed_decides() -> None:
    assert run("--cases", "50", pure=True)[1:] == run("--cases", "50", pure=True)[1:]
    assert run("--cases", "50", pure=True) != run("--cases", "50", "--seed", "2", pure=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 30))
def test_many_of_them(seed: int) -> None:
    check("--cases", "5000", "--seed", str(seed))
