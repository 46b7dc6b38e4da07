"""What a set-up costs in calls of Python functions, counted: the same on every machine, and it grows only when more is
done than was.

No time is measured here (`bench/` does that). Who adds a call on purpose raises the bound, and says why. Compiled
functions are not seen by a profiler, so this holds for the interpreted form.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import gevent
import gevent.server
import pytest

import proxy
from proxy.doors import front
from tests import clients
from tests.loopback.doors.test_front import SOURCE, House, opened
from tests.loopback.net.relays import tcp_pair, until

PROGRAM = str(Path(proxy.__file__).parent) + os.sep
#: Where it is not compiled it has calls of its own.
ENGINE = "net/relay.py:"
WAIT = ENGINE + "Engine.wait"
pytestmark = pytest.mark.only_python("compiled functions are not counted")

#: From the accepted socket to the hand-over to the relay: 63 and 93 where the client's words have to be waited for, 2
#: for wake-ups for nothing. SOCKS5 has four requests, a password and a BIND.
BOUND = {"proxy_protocol": 65, "socks5": 95}
#: The same where they are there already: 52 and 93, since SOCKS5 does more than connect.
AT_HAND = {"proxy_protocol": 54, "socks5": 95}


@pytest.fixture
def mx() -> Iterator[Any]:
    """A receiver that says nothing; its endpoint."""
    server = gevent.server.StreamServer(("127.0.0.2", 0), _wait_for_the_end)
    server.start()
    yield server.address
    server.stop()


def _wait_for_the_end(sock: Any, _address: Any) -> None:
    with contextlib.suppress(OSError):
        sock.recv(1)


def request(protocol: str, mx: Any) -> bytes:
    if protocol == "proxy_protocol":
        return clients.v2(SOURCE, mx)
    return clients.WITH_PASSWORD + clients.login() + clients.bind_request(SOURCE) + clients.connect_request(mx)


def calls_of_a_session(house: House, protocol: str, mx: Any, with_its_words: bool = False) -> Counter[str]:
    """The program's functions that are called in the greenlet of one client, by name, up to the relay.

    Args:
        with_its_words: the client's request is there when it is let in.
    """
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PROGRAM):
            counted[f"{file.removeprefix(PROGRAM)}:{frame.f_code.co_qualname}"] += 1

    def serve(*arguments: Any) -> None:
        sys.setprofile(count)
        try:
            front.serve(*arguments)
        finally:
            sys.setprofile(None)

    client, ours = tcp_pair()
    if with_its_words:
        client.sendall(request(protocol, mx))
        until(lambda: ours.recv(1000, socket.MSG_PEEK) == request(protocol, mx), what="it is there")
    house.services.crew.run(serve, house.services, house.doors[protocol], ours, ("127.0.0.1", 9))
    if not with_its_words:
        until(lambda: house.services.newcomers, what="it is waited for")
        client.sendall(request(protocol, mx))
    until(lambda: house.services.engine.pairs == 1, what="it is relayed")
    client.close()
    house.wait_empty()
    return counted


@pytest.mark.parametrize("protocol", BOUND)
def test_calls_of_a_set_up(protocol: str, mx: Any) -> None:
    with opened() as house:
        calls_of_a_session(house, protocol, mx)  # what is remembered is asked for once
        # The one with the fewest: a busy machine wakes it for nothing more often.
        counted = min((calls_of_a_session(house, protocol, mx) for _ in range(5)), key=Counter.total)
    counted = Counter({name: calls for name, calls in counted.items() if not name.startswith(ENGINE)})
    total = counted.total()
    print(f"\n{protocol}: {total} calls, {counted.most_common()}")
    assert 0 < total <= BOUND[protocol], counted.most_common()


@pytest.mark.parametrize("protocol", BOUND)
def test_a_request_that_is_there_already_is_not_waited_for(protocol: str, mx: Any) -> None:
    """Neither in a switch of greenlets, nor with an alarm, nor among the newcomers: only the connect is."""
    with opened() as house:
        late = min((calls_of_a_session(house, protocol, mx) for _ in range(5)), key=lambda counted: counted[WAIT])
        at_hand = calls_of_a_session(house, protocol, mx, with_its_words=True)
    if house.services.engine.name == "python":  # else its calls are not seen
        assert (late[WAIT], at_hand[WAIT]) == (2, 1), (late, at_hand)
    total = sum(calls for name, calls in at_hand.items() if not name.startswith(ENGINE))
    print(f"\n{protocol}: {total} calls")
    assert 0 < total <= AT_HAND[protocol], at_hand.most_common()
