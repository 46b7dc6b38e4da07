"""Connections, places and rates over several processes, as a receiver and the kernel's stamps have it."""

from __future__ import annotations

import select
import threading
from contextlib import ExitStack

import pytest

from tests import clients
from tests.clients import Smtp, dial, exactly, socks5
from tests.e2e.workers.processes import Workers
from tests.e2e.workers.test_deaths import owner
from tests.mx import Mx
from tests.sharing import cached
from tests.unit.throttling.oracle import SECOND, Rule
from tests.witness import MARGIN, Witness

SMTP = "mode smtp\nsource here {\n    ip 127.0.0.5\n    ehlo client.example\n}\n"
SOURCE = "127.0.0.5"


def mail(sock, sender="a", messages=1):
    smtp = Smtp(sock)
    assert smtp.greeting[0] == 220, smtp.greeting
    for _ in range(messages):
        smtp.sendmail(f"{sender}@example.com", ["b@example.net"], b"Subject: x\r\n\r\nx\r\n")
    smtp.quit()
    sock.close()


def test_a_connection_is_found_whichever_worker_the_client_came_to():
    """One after the other, over every door's socket: one connection for all."""
    with Workers(SMTP) as proxy, Mx() as mx:
        for _ in range(12):
            mail(socks5(proxy.socks5, mx.endpoint, SOURCE))
            cached(proxy, 1, mx)
        assert mx.connects == 1
        assert len(mx.messages) == 12
        workers = {line.split("id=")[1].split()[0][-1] for line in proxy.matching("^connection ")}
        assert workers == {"1", "2"}, "all came to the same one"


@pytest.mark.parametrize("mode", ["mode tcp\n", SMTP], ids=["tcp", "smtp"])
def test_places_and_rates_are_of_all_workers_together(mode):
    """By the receiver's own count, and the kernel's times."""
    rate = "    max_delivery_rate 25/s\n" if mode == SMTP else ""  # in mode tcp nobody sees a message
    block = "throttle all {\n    max_concurrent_connections 3\n%s    wait 50s\n}\n"
    witness = Witness()
    with Workers(mode + block % rate) as proxy, Mx(witness.script) as mx:
        threads = [threading.Thread(target=_send, args=(proxy, mx, 6)) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        assert len(mx.messages) == 60
        assert witness.most <= 3
        if rate:
            assert witness.busiest(1.0) <= Rule(25, 1).most(SECOND + MARGIN)
        owners = {line.split("id=")[1].split()[0][-1] for line in proxy.matching("^connection ")}
        assert owners == {"1", "2"}, "all came to the same one"


def _send(proxy, mx, count):
    for _ in range(count):
        mail(socks5(proxy.socks5, mx.endpoint, SOURCE))


def test_places_are_shared_fairly_among_instances_not_among_workers(mx):
    """One instance waits with many at one worker, another one with a single client, at either: the second place that
    becomes free is the other instance's at the latest."""
    with Workers("throttle one {\n    max_concurrent_connections 1\n    wait 50s\n}\n") as proxy, ExitStack() as stack:
        holder = stack.enter_context(socks5(proxy.socks5, mx.endpoint, user="many"))
        assert exactly(holder, 8)
        crowd = [_asks(stack, proxy, mx, "many") for _ in range(12)]
        other = _asks(stack, proxy, mx, "few")
        assert len({owner(proxy, sock) for sock in (*crowd, other)}) == 2
        holder.close()
        for place in range(2):
            who = _first([*crowd, other])
            if who is other:
                break
            crowd.remove(who)
            who.close()
            assert place == 0, "the crowd was served twice before the other one"


def _asks(stack, proxy, mx, user):
    sock = stack.enter_context(dial(proxy.socks5))
    sock.sendall(clients.WITH_PASSWORD + clients.login(user) + clients.connect_request(mx.endpoint))
    assert exactly(sock, 4) == b"\x05\x02\x01\x00"
    proxy.status()  # it has asked by then: what workers say, they say in order
    return sock


def _first(socks):
    ready, _, _ = select.select(socks, [], [], clients.TIMEOUT)
    return ready[0]
