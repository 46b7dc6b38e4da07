"""Clients that leave before their connection to a receiver is up: at every door, all that they held is given back.

Place, descriptors and gauges; the receivers here would keep them for ever, and `connect_timeout` for ten minutes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.clients import connect_request, dial, exactly, login, reset, v1
from tests.independent_client import channel
from tests.mx import Mx, Over, mute
from tests.mx import Session as Connection
from tests.program import Proxy
from tests.sinks import deaf_port
from tests.waiting import wait_for

Address = tuple[str, int]
SOURCE = "127.0.0.5"
NAME = "mta.example.com"
MANY = 3
FEW = f"""\
listen_tls no
listen_status 127.0.0.1:0
connect_timeout 600s
throttle few {{
    max_concurrent_connections {MANY}
    wait 600s
}}
"""
SMTP = f"""\
mode smtp
smtp_tls required
source here {{
    ip {SOURCE}
    ehlo {NAME}
}}
"""


def deaf(session: Connection, reply: bytes) -> None:
    """No answer to the first words of TLS, until the end."""
    while session.receive():
        pass
    raise Over("eof")


# -- stages: a receiver that gets so far, and whether it has come to that ----------------------------------------------


@contextmanager
def connecting(proxy: Proxy) -> Iterator[tuple[Address, Callable[[], object]]]:
    with deaf_port() as address:
        yield address, lambda: proxy.page()["connections"]["active"] == MANY


@contextmanager
def greeting(proxy: Proxy) -> Iterator[tuple[Address, Callable[[], object]]]:
    with Mx({"greeting": mute}) as mx:
        yield mx.endpoint, lambda: mx.running == MANY
        wait_for(lambda: mx.running == 0)


@contextmanager
def tls(proxy: Proxy) -> Iterator[tuple[Address, Callable[[], object]]]:
    with Mx({"tls": deaf}, starttls=True) as mx:
        yield mx.endpoint, lambda: [session.commands[-1:] for session in mx.sessions] == [[b"STARTTLS"]] * MANY
        wait_for(lambda: mx.running == 0)


# -- doors: who has asked for a connection -----------------------------------------------------------------------------


def socks5(proxy: Proxy, receiver: Address, stage: Any) -> socket.socket:
    sock = dial(proxy.socks5)
    sock.sendall(b"\x05\x01\x02" + login("a") + b"\x05\x02\x00" + connect_request((SOURCE, 0))[3:])
    sock.sendall(connect_request(receiver))
    return talk(sock, proxy, stage, 24)


def proxy_protocol(proxy: Proxy, receiver: Address, stage: Any) -> socket.socket:
    sock = dial(proxy.proxy_protocol)
    sock.sendall(v1(SOURCE, receiver))
    return talk(sock, proxy, stage, 0)


def talk(sock: socket.socket, proxy: Proxy, stage: Any, answers: int) -> socket.socket:
    """In mode smtp the client's EHLO begins the session with the receiver; `answers`: bytes before the greeting."""
    if stage is tls:
        exactly(sock, answers)
        assert read_line(sock).startswith(b"220 ")
        sock.sendall(b"EHLO client.example\r\n")
    return sock


def read_line(sock: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += exactly(sock, 1)
    return line


def native(proxy: Proxy, receiver: Address, stage: Any) -> socket.socket:
    peer = channel(proxy.native, tls=False)
    words = {"ehlo_name": NAME, "tls": "required"} if stage is not connecting else {}
    peer.say_open(receiver, source=SOURCE, deadline_ms=600_000, **words)
    return peer.sock


@pytest.fixture(scope="module")
def tcp() -> Iterator[Proxy]:
    with Proxy(FEW) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def smtp() -> Iterator[Proxy]:
    with Proxy(FEW + SMTP) as proxy:
        yield proxy


CASES = [
    *(("tcp", door, connecting) for door in (socks5, proxy_protocol, native)),
    *(("tcp", native, stage) for stage in (greeting, tls)),
    *(("smtp", door, stage) for door in (socks5, proxy_protocol) for stage in (connecting, greeting, tls)),
]


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["fin", "rst"])
@pytest.mark.parametrize(("mode", "door", "stage"), CASES)
def test_who_leaves_gives_everything_back(
    request: pytest.FixtureRequest, mode: str, door: Any, stage: Any, leave: Callable[[socket.socket], None]
) -> None:
    proxy: Proxy = request.getfixturevalue(mode)
    before, fds = held(proxy), proxy.fds()
    with ExitStack() as stack:
        receiver, there = stack.enter_context(stage(proxy))
        clients = [door(proxy, receiver, stage) for _ in range(MANY)]
        wait_for(lambda: there() and held(proxy)[0] == MANY)
        for client in clients:
            leave(client)
        wait_for(lambda: held(proxy) == before, what=f"as it was: {before}")
        # One that comes and goes is the status page's.
        wait_for(lambda: proxy.fds() <= fds + 1, what="its descriptors are closed")


def held(proxy: Proxy) -> tuple[int, object]:
    """Places that are taken, and connections."""
    page = proxy.page()
    return sum(row["used"] for row in page["throttles"]), page["connections"]
