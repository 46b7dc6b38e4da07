"""Waiting reads: who knows that an event will tell of what comes does not look first, and loses nothing by it."""

from __future__ import annotations

import select
from collections.abc import Iterator
from typing import Any

import gevent
import pytest

from proxy.net.conversation import may_wait, receive
from proxy.net.relay import Engine, RawSocket
from proxy.net.tls import PlainStream
from tests.loopback.net.relays import ENGINES, close_peers, tcp_pair


class Counting(RawSocket):
    reads = 0

    def recv(self, *args: int) -> bytes:
        self.reads += 1
        return super().recv(*args)


class Side:
    """Our end of a connection, which nobody has looked at yet, and the other one."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.peer, ours = tcp_pair()
        self.ours = Counting(fileno=ours.detach())
        self.stream = PlainStream(self.ours)
        engine.register(self.ours.fileno())

    def hear(self, look: bool = True) -> bytes:
        with gevent.Timeout(30):
            return receive(self.engine, self.stream, 100, look)


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def side(request: pytest.FixtureRequest) -> Iterator[Side]:
    engine = request.param()
    side = Side(engine)
    yield side
    engine.close(side.ours)
    engine.stop()
    close_peers()


class Events:
    """An engine with which bytes come when they are waited for, and nothing else does."""

    def __init__(self, side: Side, *pieces: bytes) -> None:
        self._side = side
        self._pieces = list(pieces)

    def wait(self, fd: int) -> int:
        self._side.peer.sendall(self._pieces.pop(0))
        select.select([fd], [], [], 30)
        return select.EPOLLIN


def test_a_read_that_would_find_nothing_is_saved(side: Side) -> None:
    events: Any = Events(side, b"one", b"two")
    assert receive(events, side.stream, 100, look=False) == b"one"
    assert may_wait(side.stream)
    assert receive(events, side.stream, 100, look=False) == b"two"
    assert side.ours.reads == 2


def test_what_has_come_in_the_meantime_makes_an_event(side: Side) -> None:
    side.peer.sendall(b"one")
    assert side.hear(look=False) == b"one"


def test_an_end_that_came_with_the_bytes_is_looked_for(side: Side) -> None:
    """One event tells of both, and there will be no other."""
    side.peer.sendall(b"last words")
    side.peer.shutdown(1)
    assert side.hear(look=False) == b"last words"
    assert not may_wait(side.stream)
    assert side.hear(look=not may_wait(side.stream)) == b""


def test_more_than_was_asked_for_is_looked_for(side: Side) -> None:
    side.peer.sendall(b"x" * 150)
    assert side.hear(look=False) == b"x" * 100
    assert not may_wait(side.stream)
    assert side.hear(look=not may_wait(side.stream)) == b"x" * 50
