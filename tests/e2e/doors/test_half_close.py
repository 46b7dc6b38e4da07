"""A client that gave up on a receiver that does not answer, at each door: `half_close_timeout` frees its place."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests import independent_client as mta
from tests.clients import DOORS, exactly, read_all
from tests.independent_client import channel
from tests.mx import Mx, close, stall
from tests.program import Proxy
from tests.waiting import wait_for

SHORT = "half_close_timeout 400ms\nidle_timeout 1h\n"
ONE = "throttle one {\n    max_concurrent_connections 1\n    wait 30s\n}\n"


@pytest.mark.parametrize("door", DOORS)
def test_a_client_that_gave_up_keeps_no_place(door: str) -> None:
    with Mx({"noop": stall}) as mx, Proxy(SHORT + ONE) as proxy, DOORS[door](proxy, mx.endpoint, "127.0.0.5") as gone:
        assert exactly(gone, 3) == b"220"
        gone.sendall(b"NOOP\r\n")
        wait_for(lambda: b"NOOP" in mx.sessions[0].commands)
        gone.shutdown(socket.SHUT_WR)
        with DOORS[door](proxy, mx.endpoint, "127.0.0.5") as waiting:
            assert exactly(waiting, 3) == b"220", "the place is free"
        proxy.wait_line(r"^connection .*outcome=half_close_timeout")
        with contextlib.suppress(ConnectionResetError):
            read_all(gone)


def test_an_eof_on_a_channel_is_the_same() -> None:
    with Mx({"noop": stall}) as mx, Proxy(SHORT) as proxy, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name="mta.example.com")
        peer.data(b"NOOP\r\n")
        peer.say(mta.EOF)
        proxy.wait_line(r"^connection .*outcome=half_close_timeout")
        assert peer.closed()


def test_a_channel_whose_receiver_has_closed_is_the_same() -> None:
    """The client is to answer EOF with END."""
    with Mx({"noop": close}) as mx, Proxy(SHORT) as proxy, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name="mta.example.com")
        peer.data(b"NOOP\r\n")
        assert peer.hear()[0] in (mta.EOF, mta.ABORTED)
        proxy.wait_line(r"^connection .*outcome=half_close_timeout")
        assert peer.closed()
