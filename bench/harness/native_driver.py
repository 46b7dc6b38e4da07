"""Workloads of the native protocol, driven by the project's client library in threads: channels, sharing, throttles.

The library's own cost is not counted, only the proxy's. Each row of such a workload is our proxy with another variant
of the driver, so that the ratios compare ways to use it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from harness import smtp_driver
from harness.candidates import SECRET
from harness.machine import ROOT
from harness.measure import Bench, Running

sys.path.insert(0, str(ROOT))

from greenarrow_proxy_client import Limits, ProxiedSMTP, Session

_EHLO = "mta1.sender.example.com"
_SENDER, _RECIPIENT = "bounce-1234567@sender.example.com", ["recipient@example.net"]
_BODY = smtp_driver.MESSAGE[: -len(b".\r\n")]
_A_WHILE = 120.0


def session_with(running: Running, **options: Any) -> Session:
    """A session that is up: its channels authenticate in one flight."""
    candidate = running.candidate
    session = Session(
        ("127.0.0.1", candidate.door_port("native")),
        SECRET,
        f"bench-{candidate.variant}-{os.getpid()}",
        tls=candidate.settings["TLS"] == "yes",
        **options,
    )
    if not session.wait_until_up(10):
        session.close()
        raise OSError(f"no session with {candidate.name}: {session.rejected}")
    return session


def channels(bench: Bench, running: Running) -> dict[str, Any]:
    """An SMTP session of one message, the dialogue left to the client: on a fresh channel each, or on a warm one."""
    assert running.pid is not None
    idle = 0 if running.candidate.variant == "fresh" else 100
    with session_with(running, max_idle_channels=idle) as session:
        return smtp_driver.drive_sessions(
            running.pid,
            bench.quick,
            lambda: session.connect([smtp_driver.sink_address()], source_ip=smtp_driver.SOURCE),
        )


def sharing(bench: Bench, running: Running) -> dict[str, Any]:
    """One message each, brought up by the proxy, in clear or with STARTTLS; fresh connections or shared ones."""
    assert running.pid is not None
    variant = running.candidate.variant
    destination = smtp_driver.sink_address()
    tls = "none"
    if variant.startswith("tls"):
        destination, tls = bench.tls_sink(), "required"
    with session_with(running) as session:
        work = sender(session, destination, tls, keep=variant.endswith("kept"))
        return smtp_driver.drive(running.pid, bench.quick, work, destination)


def sharing_beside_kept(bench: Bench, running: Running) -> dict[str, Any]:
    """Messages on shared connections, beside many that are kept and that nobody wants."""
    assert running.pid is not None
    count = int(running.candidate.variant)
    with session_with(running) as session:
        if not running.beside:
            running.beside.append(contextlib.ExitStack())  # done, though nothing is to be closed
            opened = [_open(session, smtp_driver.sink_address(), "none", "127.0.2.2") for _ in range(count)]
            for smtp in opened:
                smtp.release(wait=True)
        work = sender(session, smtp_driver.sink_address(), "none", keep=True)
        return smtp_driver.drive(running.pid, bench.quick, work)


def sender(session: Session, destination: tuple[str, int], tls: str, keep: bool) -> Callable[[], None]:
    """Sends one message; `keep`: over a shared connection if there is one, and offers it again."""

    def work() -> None:
        smtp = _open(session, destination, tls, smtp_driver.SOURCE, keep)
        smtp.sendmail(_SENDER, _RECIPIENT, _BODY)
        smtp.release() if keep else smtp.quit()

    return work


def _open(session: Session, destination: tuple[str, int], tls: str, source: str, reuse: bool = True) -> ProxiedSMTP:
    return session.smtp([destination], _EHLO, source_ip=source, tls=tls, reuse=reuse)


@contextlib.contextmanager
def throttles(_bench: Bench, running: Running) -> Iterator[None]:
    """Has an instance with so many throttles stay connected, as long as the proxy runs."""
    count = int(running.candidate.variant)
    if count and not running.beside:
        session = session_with(running)
        running.beside.append(session)
        made = [
            session.throttle(smtp_driver.SOURCE, Limits(f"throttle-{number}", rates=[(1_000_000, 1)]))
            for number in range(count)
        ]
        ends_at = time.monotonic() + _A_WHILE
        for throttle in made:
            if not throttle.wait_until_registered(max(0.0, ends_at - time.monotonic())):
                raise OSError(f"not all of {count} throttles were registered within {_A_WHILE:.0f} s")
    yield
