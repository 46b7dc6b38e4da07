#!/usr/bin/env python3
"""What sharing saves: the time for a message on a fresh connection beside a shared one, through the running program.

The receiver is that of the tests, on this machine. With `--distance` it answers each command so much later, as if it
were that far away: then round trips are what a message costs. Takes about a minute; prints one line for each case.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from greenarrow_proxy_client import Session
from tests.mx import Mx
from tests.program import SECRET, Proxy

STEPS = ("greeting", "ehlo", "starttls", "mail", "rcpt", "data", "dot", "rset", "quit")
MESSAGE = b"Subject: shared\r\n\r\n" + b"a line of the message\r\n" * 40


def farther(seconds: float) -> dict[str, Callable[..., None]]:
    def later(session: Any, reply: bytes) -> None:
        time.sleep(seconds)
        session.send(reply)

    return dict.fromkeys(STEPS, later) if seconds else {}


def one(session: Session, mx: Mx, tls: str, tenant: str | None, pause: float) -> tuple[float, bool]:
    """Seconds for one message, OPEN included, and whether its connection was shared. Then RSET gets its time."""
    began = time.perf_counter()
    smtp = session.smtp([mx.endpoint], "mta.example.com", tls=tls, tenant=tenant)
    smtp.sendmail("a@example.com", ["b@example.net"], MESSAGE)
    spent = time.perf_counter() - began
    smtp.release(wait=True)
    time.sleep(pause + 0.01)
    return spent, smtp.opened.reused


def measure(tls: str, distance: float, count: int) -> None:
    with contextlib.ExitStack() as stack:
        mx = stack.enter_context(Mx(farther(distance), starttls=True))
        proxy = stack.enter_context(Proxy())
        session = stack.enter_context(Session(proxy.native, SECRET, "bench"))
        session.wait_until_up(10)
        fresh = [one(session, mx, tls, str(number), distance)[0] for number in range(count)]
        one(session, mx, tls, None, distance)
        shared = [one(session, mx, tls, None, distance) for _ in range(count)]
        times = [spent for spent, reused in shared if reused]
    print(
        f"tls={tls:<8} distance={distance * 1000:3.0f} ms  fresh {statistics.median(fresh) * 1000:7.2f} ms  "
        f"shared {statistics.median(times) * 1000:7.2f} ms  ({len(times)} of {count} were shared, "
        f"{mx.connects} connects, {mx.handshakes} handshakes)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="messages of each kind")
    parser.add_argument("--distance", type=float, nargs="*", default=[0.0, 20.0], help="milliseconds")
    arguments = parser.parse_args()
    for distance in arguments.distance:
        for tls in ("none", "required"):
            measure(tls, distance / 1000, arguments.count)


if __name__ == "__main__":
    main()
