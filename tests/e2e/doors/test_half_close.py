"""A client that gave up on a receiver that does not answer, at each door: `half_close_timeout` frees its place."""

from __future__ import annotations

import contextlib
import socket

import pytest

from tests import independent_client as mta
from tests.clients import DOORS, exactly, proxied, read_all
from tests.e2e.doors.test_through import agent
from tests.e2e.smtp.test_mode import SMTP
from tests.independent_client import channel
from tests.mx import Mx, close, mute, stall
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


@pytest.mark.parametrize("behaviour", [stall, mute])
def test_a_client_of_mode_smtp_that_gave_up_keeps_no_place(behaviour) -> None:
    with Mx({"mail": behaviour}) as mx, Proxy(SHORT + SMTP + ONE) as proxy:
        gone = proxied(proxy.proxy_protocol, mx.endpoint, "127.0.0.5")
        with gone, gone.makefile("rb") as replies:
            assert replies.readline().startswith(b"220")
            gone.sendall(b"EHLO client.example\r\n")
            while replies.readline()[3:4] == b"-":
                pass
            gone.sendall(b"MAIL FROM:<a@example.com>\r\n")
            wait_for(lambda: b"MAIL FROM:<a@example.com>" in mx.sessions[0].commands)
            gone.shutdown(socket.SHUT_WR)
            proxy.wait_line(r"^connection .*outcome=half_close_timeout")
            wait_for(lambda: "active=0" in proxy.status()[-1], what="the place is free")


def test_a_client_of_an_agent_that_gave_up_is_let_go_by_both() -> None:
    """The agent is as patient as any proxy; here it is the one that is in a hurry."""
    with (
        Mx({"noop": stall}) as mx,
        Proxy("idle_timeout 1h\nhalf_close_timeout 1h\n") as proxy,
        agent(proxy.native, more=SHORT) as front,
        proxied(front.proxy_protocol, mx.endpoint, "127.0.0.5") as gone,
    ):
        assert exactly(gone, 3) == b"220"
        gone.sendall(b"NOOP\r\n")
        wait_for(lambda: b"NOOP" in mx.sessions[0].commands)
        gone.shutdown(socket.SHUT_WR)
        front.wait_line(r"^connection .*outcome=half_close_timeout")
        proxy.wait_line(r"^connection .*protocol=native .*outcome=client_reset")


def test_an_eof_on_a_channel_is_the_same() -> None:
    with Mx({"noop": stall}) as mx, Proxy(SHORT) as proxy, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name="mta.example.com")
        peer.data(b"NOOP\r\n")
        peer.say(mta.EOF)
        proxy.wait_line(r"^connection .*outcome=half_close_timeout")
        with pytest.raises(mta.Told, match="idle_timeout"):
            peer.hear()
        assert peer.closed()


def test_a_channel_whose_receiver_has_closed_is_the_same() -> None:
    """The client is to answer EOF with END."""
    with Mx({"noop": close}) as mx, Proxy(SHORT) as proxy, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name="mta.example.com")
        peer.data(b"NOOP\r\n")
        assert peer.hear()[0] in (mta.EOF, mta.ABORTED)
        proxy.wait_line(r"^connection .*outcome=half_close_timeout")
        with pytest.raises(mta.Told, match="idle_timeout"):
            peer.hear()
        assert peer.closed()
