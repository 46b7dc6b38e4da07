"""A run of the tests is for one form of the program (`tests.forms`): it is that one, here and in what is started."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest

from proxy import form
from proxy.net import relay
from tests import forms
from tests.peers import missing
from tests.program import ROOT


def test_the_form_that_this_run_is_for() -> None:
    """A build that failed is no reason to test Python code twice."""
    wanted = "python" if forms.pure() else "compiled"
    command = [sys.executable, str(ROOT / "greenarrow_proxy.py"), "--version"]
    done = subprocess.run(command, env=forms.environ(), capture_output=True, text=True, timeout=60, check=True)
    there = dict(re.findall(r"(\w+): (\w+)", done.stdout))
    assert there == {"relay": relay.engine_name(), "core": form.core_name()}
    if wanted == "compiled" and "python" in there.values():
        missing(f"the compiled form was not built: {done.stdout}")
    assert set(there.values()) == {wanted}


@pytest.mark.parametrize(
    "name", ["proxy.throttling.throttle", "proxy.policy.access", "proxy.doors.front", "proxy.net.tls"]
)
def test_a_module_of_the_core_is_of_that_form(name: str) -> None:
    file = importlib.import_module(name).__file__ or ""
    if not forms.pure() and file.endswith(".py"):
        missing("the compiled form was not built")
    assert file.endswith((".py",) if forms.pure() else tuple(EXTENSION_SUFFIXES))
