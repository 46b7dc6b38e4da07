"""Several MTAs of mode smtp under one limit, judged by the receiver's own count."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left

import pytest

from tests import clients
from tests.mx import Mx
from tests.program import Proxy

NAME = "client.example"
SOURCE = "127.0.0.5"
RATE = 600  # a minute
PLACES = 2
SETTINGS = f"""\
mode smtp
source here {{
    ip {SOURCE}
    ehlo {NAME}
}}
throttle t {{
    max_concurrent_connections {PLACES}
    max_delivery_rate {RATE}/min
    wait 40s
}}
"""
MTAS = ("a", "b", "c")
GROUPS = "".join(f"instance {name} {{\n    share_with x\n}}\n" for name in MTAS)


def deliver(proxy: Proxy, mx: Mx, name: str, messages: int, failures: list[object]) -> None:
    """Connections of up to five messages each, as an MTA's queue makes them."""
    sent = 0
    while sent < messages:
        smtp = clients.Smtp(clients.socks5(proxy.socks5, mx.endpoint, SOURCE, user=name))
        with smtp:
            smtp.ehlo()
            for _ in range(min(5, messages - sent)):
                refused = smtp.sendmail(f"{sent}@{name}.example", ["to@example.net"], b"Subject: x\r\n\r\nx\r\n")
                failures += [refused] if refused else []
                sent += 1


def judge(messages: int) -> None:
    times: list[float] = []

    def noted(session, reply):
        times.append(time.monotonic())
        session.send(reply)

    with Mx({"mail": noted}, starttls=True) as mx, Proxy(SETTINGS + GROUPS) as proxy:
        failures: list[object] = []
        each = messages // len(MTAS)
        threads = [threading.Thread(target=deliver, args=(proxy, mx, name, each, failures)) for name in MTAS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        senders = sorted(bytes(message.mail) for message in mx.messages if message.accepted)
        expected = sorted(b"mail FROM:<%d@%s.example>" % (n, name.encode()) for name in MTAS for n in range(each))
        assert [sender[: sender.find(b">") + 1] for sender in senders] == expected, "every message once"
        # One carries 100 messages at most (reuse_connections_max_messages).
        assert mx.handshakes == mx.connects <= 2 * PLACES + messages // 50
        times.sort()
        # A slot is used when there is a connection for it, which may be a little later, and the receiver's clock adds
        # its own delays: seen here, the border of a window is not sharp to the last message.
        busiest = max(bisect_left(times, at + 60) - number for number, at in enumerate(times))
        assert busiest <= RATE * 1.01
        assert (len(times) - 1) / (times[-1] - times[0]) < RATE / 60 * 1.2, "evenly, not in one burst"


def test_three_mtas_share_two_connections_and_a_rate():
    judge(30)


@pytest.mark.slow
def test_a_thousand_messages_of_three_mtas():
    judge(999)
