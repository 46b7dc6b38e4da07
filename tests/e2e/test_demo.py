"""`make demo` tells the truth: it succeeds with the program, and fails without it or when something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "greenarrow_proxy.py"


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)


def test_the_demonstration_works() -> None:
    done = demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    rows = re.findall(
        r"^  \d+@(server-[abc])\.example .* (127\.0\.0\.\d+) +[\d.]+ ms  [\d,]+ bytes, identical$", done.stdout, re.M
    )
    expected = {("server-a", "127.0.0.11"), ("server-b", "127.0.0.12"), ("server-c", "127.0.0.13")}
    assert sorted(rows) == sorted([*expected] * 3)
    assert re.search(r"server-e: took over a connection with TLSv1\.3, and sent", done.stdout)
    assert re.search(r"600 a minute for both together: 3[01] messages", done.stdout)
    assert "All right" in done.stdout


def test_it_fails_when_the_program_does_not_start() -> None:
    done = demo("--program", "false")
    assert done.returncode == 1
    assert "FAILED" in done.stdout
    assert "All right" not in done.stdout


def test_it_fails_when_mail_leaves_from_the_wrong_address() -> None:
    """A proxy that ignores the configured default source: the demonstration must notice."""
    wrong = f"{sys.executable} {PROGRAM} --default-source-ip=127.0.0.11"
    done = demo("--program", wrong)
    assert done.returncode == 1
    assert "2000@server-c.example left from 127.0.0.11 instead of 127.0.0.13" in done.stdout


def test_it_fails_when_the_proxy_refuses_nothing() -> None:
    done = demo("--program", f"{sys.executable} {PROGRAM} --source-ip=127.0.0.0/8")
    assert done.returncode == 1
    assert "leaving from 127.0.0.66 was answered with 0" in done.stdout


def test_it_fails_when_connections_are_not_shared() -> None:
    done = demo("--program", f"{sys.executable} {PROGRAM} --reuse-connections=no")
    assert done.returncode == 1
    assert "the proxy never held 1 connection open" in done.stdout
