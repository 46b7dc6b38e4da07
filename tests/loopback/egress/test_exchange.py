"""One command to a receiver and its answer, step by step, where sockets of this machine do not go: the kernel takes a
short command whole or not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from proxy.egress.exchange import Exchange
from proxy.model import Discard
from proxy.net.relay import UNSURE, make_engine

pytestmark = pytest.mark.only_python("a stream of the test's own")


class Slow:
    """A stream that takes a byte in each event, and then says what it is told to."""

    unsent = False
    drained = True

    def __init__(self) -> None:
        self.socket = SimpleNamespace(fileno=lambda: -1)
        self.taken = b""
        self.room = 0
        self.answers: list[bytes] = []

    def send(self, data: bytes) -> int:
        if not self.room:
            raise BlockingIOError
        self.room -= 1
        self.taken += data[:1]
        return 1

    def recv(self, _size: int) -> bytes:
        if not self.answers:
            raise BlockingIOError
        return self.answers.pop(0)


@pytest.mark.parametrize("look", [True, False])
def test_a_command_that_is_taken_byte_by_byte_is_said_once_and_whole(look: bool) -> None:
    engine, stream = make_engine(), Slow()
    heard: list[bytes] = []
    over: list[Discard | None] = []
    given: Any = stream
    exchange = Exchange(engine, given, b"RSET\r\n", lambda data: heard.append(data) is None, over.append)
    try:
        exchange.begin(60.0, look)
        for size in range(1, 7):
            stream.room = 1
            exchange._event(0)
            assert (stream.taken, over) == (b"RSET\r\n"[:size], [])
        stream.answers = [b"250 ok\r\n"]
        exchange._event(UNSURE)
        assert (stream.taken, heard, over) == (b"RSET\r\n", [b"250 ok\r\n"], [None])
    finally:
        engine.stop()
