"""`make demo` tells the truth: it succeeds with the program, and fails without it or when something is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from demo import queues
from demo.receiver import Arrival, Mailbox

pytestmark = pytest.mark.either_form("what the demonstration says; what it shows is tested elsewhere")

ROOT = Path(__file__).resolve().parents[3]
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
    rows = re.findall(r"^  queued\d@(server-[def])\.example +127\.0\.0\.14 .* identical$", done.stdout, re.M)
    assert sorted(rows) == sorted(["server-d", "server-e", "server-f"] * 8)
    assert re.search(r"^  connection A: one TLS handshake, \d+ messages: server-\w -> server-", done.stdout, re.M)
    assert "for all together: 2 at a time, by the MX's own count" in done.stdout
    assert re.search(r"600 a minute for all together: 24 messages in", done.stdout)
    rows = re.findall(
        r"^  mixed\d@(server-[gh])\.example +(\w+) +left from 127\.0\.0\.15:\d+, TLS: yes$", done.stdout, re.M
    )
    assert rows == [("server-g", "socks5"), ("server-h", "native")] * 2
    assert "all over one connection and one TLS handshake" in done.stdout
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
    assert "no connection was shared" in done.stdout


def test_it_fails_when_there_are_too_many_connections() -> None:
    mailbox = Mailbox()
    for port in range(3):
        mailbox.opened((queues.SOURCE, port))
    arrived = {f"queued{n}@{name}.example": Arrival(queues.SOURCE, 1, True, b"") for n, name in enumerate(queues.NAMES)}
    assert queues._connections(arrived, mailbox) == ["3 connections at a time instead of 2"]


def test_it_fails_when_the_limit_is_not_kept() -> None:
    def mta(name: str, *moments: float) -> queues.Mta:
        return queues.Mta(name, Path(), log=[{"event": "attempt", "at": at} for at in moments])

    fine = [at / 10 for at in range(20)]
    assert queues._limit([mta("a", *fine[:10]), mta("b", *fine[10:])]) == []
    burst = [1.95 + at / 100 for at in range(8)]
    assert queues._limit([mta("a", *fine), mta("b", *burst)]) != []
