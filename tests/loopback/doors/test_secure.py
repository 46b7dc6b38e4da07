"""TLS with a client that has just connected: for whom its handshake stands in line, and what else it may be told."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.doors import secure
from proxy.errors import PeerError

pytestmark = pytest.mark.only_python("a handshake put in the place of the real one")

HELLO = b"\x16\x03\x01\x02\x00"


@pytest.fixture
def client() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


def begin(client: Any, first: bytes = HELLO) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    engine: Any = None
    return secure.begin_tls(engine, client, context, "192.0.2.9", first, "listen_socks5_tls")


def shaking(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[Any]:
    handed: list[Any] = []

    def shake_hands(_engine: object, stream: Any, apart: object) -> None:
        handed.append((stream.turn.key, apart))
        if error is not None:
            raise error

    monkeypatch.setattr(secure, "shake_hands", shake_hands)
    return handed


def test_handshakes_stand_in_line_by_the_address_that_they_come_from(
    client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = shaking(monkeypatch)
    begin(client)
    assert handed == [("192.0.2.9", secure.for_clients())]


def test_who_does_not_speak_tls_is_told_which_listener_this_is(
    client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed = shaking(monkeypatch)
    with pytest.raises(PeerError, match=r"does not speak TLS.*listen_socks5_tls"):
        begin(client, b"\x05\x01\x00")
    assert not handed


def test_a_handshake_that_fails_is_the_clients_fault_and_one_that_breaks_off_is_its_end(
    client: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    shaking(monkeypatch, ssl.SSLError(1, "no shared cipher"))
    with pytest.raises(PeerError, match="no TLS: no shared cipher"):
        begin(client)
    shaking(monkeypatch, ConnectionResetError())
    with pytest.raises(ConnectionResetError):
        begin(client)
