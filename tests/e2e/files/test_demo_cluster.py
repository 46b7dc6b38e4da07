"""`make demo-cluster` tells the truth: it succeeds with the program, and fails without it or if something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from demo.cluster import A_MINUTE, SLACK, excess_of

pytestmark = pytest.mark.either_form("what the demonstration says; what it shows is tested elsewhere")

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = ROOT / "greenarrow_proxy.py"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo.cluster", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=ROOT, check=False)


def test_the_demonstration_works() -> None:
    done = demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.findall(r"^(\d)\. ", done.stdout, re.M) == list("12345")
    assert len(re.findall(r"^  proxy-[12] has logged:  .*WARNING store: .* does not answer", done.stdout, re.M)) == 2
    assert len(re.findall(r"^  proxy-[12] has logged:  .*store: .* answers again", done.stdout, re.M)) == 2
    assert re.search(r"^    store_degraded .* this proxy goes on with 1/2 of each limit", done.stdout, re.M)
    assert re.search(r"^  In no window of time, long or short, were there more than 600 a minute", done.stdout, re.M)
    assert "All right" in done.stdout


def test_it_fails_when_the_program_does_not_start() -> None:
    done = demo("--program", "false")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "All right" not in done.stdout


@pytest.mark.parametrize("where", [0, 17, 199])
def test_it_fails_when_the_limit_is_not_kept(where: int) -> None:
    interval = 60 / A_MINUTE
    fine = [number * interval for number in range(200)]
    assert excess_of(fine) is None
    burst = [fine[where]] * (int(SLACK / interval) + 2)
    assert "are more than 600 a minute" in (excess_of(sorted(fine + burst)) or "")
