"""A run of the tests is for one form of the program (`tests.forms`): it is that one, here and in what is started."""

from __future__ import annotations

import re
import subprocess
import sys

from proxy.net import relay
from tests import forms
from tests.peers import missing
from tests.program import ROOT


def test_the_form_that_this_run_is_for() -> None:
    """A build that failed is no reason to test Python code twice."""
    command = [sys.executable, str(ROOT / "greenarrow_proxy.py"), "--version"]
    done = subprocess.run(command, env=forms.environ(), capture_output=True, text=True, timeout=60, check=True)
    said = set(re.findall(r": (\w+)", done.stdout))
    assert said == {relay.engine_name()}
    if forms.pure():
        assert said == {"python"}
    elif said != {"compiled"}:
        missing("the compiled form was not built")
