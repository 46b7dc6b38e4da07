"""A block's fast rate is reached, though the proxy wakes up late for slots that are two milliseconds apart."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from greenarrow_proxy_client import Session
from tests.e2e.throttling.senders import NAME, SOURCE
from tests.mx import Mx
from tests.program import SECRET, Proxy
from tests.unit.throttling.oracle import Rule
from tests.waiting import wait_for
from tests.witness import Witness

#: How long a block's slot may be used after its time (`throttling.throttle.LATENESS`).
LATE = 10_000_000


def ask(smtp, over: threading.Event) -> None:
    """MAIL without end, with its RSET behind it in one write."""
    while not over.is_set():
        smtp.sock.sendall(b"MAIL FROM:<a@example.com>\r\nRSET\r\n")
        for _ in range(2):
            assert smtp.getreply()[0] == 250


@pytest.mark.parametrize("rate", [100, 500])
def test_a_fast_rate_is_reached_and_kept(rate: int) -> None:
    """In some half second, since the machine may have no time for us in others; never more in any."""
    witness = Witness()
    block = f"listen_tls no\nthrottle fast {{\n    max_delivery_rate {rate}/s\n}}\n"
    over = threading.Event()
    with Mx(witness.script) as mx, Proxy(block) as proxy, ExitStack() as stack:
        session = stack.enter_context(Session(proxy.native, SECRET, "a", tls=False))
        threads = []
        for _ in range(8):
            smtp = session.smtp([mx.endpoint], NAME, source_ip=SOURCE, reuse=False, tls="none")
            stack.callback(smtp.close)
            threads.append(threading.Thread(target=ask, args=(smtp, over)))
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: witness.busiest(0.5) >= 0.95 * rate / 2, 60)
        finally:
            over.set()
            for thread in threads:
                thread.join(30)
    witness.check(Rule(rate, 1, latest=LATE))
