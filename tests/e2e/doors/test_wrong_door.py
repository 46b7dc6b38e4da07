"""Who knocks at the wrong door is told to the operator as what it is, at each door alike; so is one who is silent."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest

from tests.clients import dial, read_all
from tests.program import Proxy

VISITORS = {
    "HTTP": (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "it looks like HTTP, which only listen_status speaks"),
    "TLS": (
        b"\x16\x03\x01\x02\x00\x01",
        "it looks like TLS, with which listen, listen_socks5_tls and listen_proxy_protocol_tls begin",
    ),
    "SMTP": (b"EHLO mta.example\r\n", "it looks like SMTP: this is no mail server"),
    "proxy_protocol": (
        b"PROXY TCP4 127.0.0.5 127.0.0.2 0 25\r\n",
        "it looks like a PROXY protocol header, which belongs to listen_proxy_protocol",
    ),
    "socks5": (b"\x05\x02\x00\x02", "it looks like SOCKS5, which belongs to listen_socks5"),
    "SOCKS4": (b"\x04\x01\x00\x19\x7f\x00\x00\x02\x00", "it looks like SOCKS4, which this proxy does not speak"),
}
OWN = {"socks5": "socks5", "proxy_protocol": "proxy_protocol", "native": "TLS", "status": "HTTP"}


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy("listen_status 127.0.0.1:0\n") as it:
        yield it


def knock(proxy: Proxy, door: str, data: bytes, source: str) -> bytes:
    with dial(proxy.door(door), source) as sock:
        sock.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            return read_all(sock)
    return b""


@pytest.mark.parametrize("door", OWN)
@pytest.mark.parametrize("visitor", VISITORS)
def test_a_visitor_at_the_wrong_door(proxy: Proxy, door: str, visitor: str) -> None:
    if OWN[door] == visitor:
        return
    data, words = VISITORS[visitor]
    source = f"127.0.3.{1 + list(OWN).index(door) * 10 + list(VISITORS).index(visitor)}"  # lines are limited by address
    answer = knock(proxy, door, data, source)
    line = proxy.wait_line(rf"refused id=\d+ instance=- protocol={door} client={source}:.* reason=bad_protocol .*")[0]
    assert words in line
    if door == "status":
        assert re.match(rb"HTTP/1\.1 400 Bad Request\r\n", answer)
        assert words.encode() in answer
    elif door == "proxy_protocol":
        assert answer.startswith(b"421 4.5.0 ")
    elif door == "socks5":
        assert answer == b""


def test_the_native_door_without_tls_knows_them_too() -> None:
    with Proxy("listen_tls no\n") as proxy:
        for number, (visitor, (data, words)) in enumerate(VISITORS.items()):
            source = f"127.0.4.{1 + number}"
            assert words.encode() in knock(proxy, "native", data, source) or visitor == "TLS"
            line = proxy.wait_line(rf"refused id=.* client={source}:.*")[0]
            assert words in line or "the client speaks TLS, this listener does not (listen_tls no)" in line


@pytest.mark.parametrize("door", ["socks5", "proxy_protocol", "native"])
def test_silence_is_told_as_that(door: str) -> None:
    """A client of SMTP waits for a greeting, and would blame the network."""
    with Proxy("auth_timeout 300ms\n") as proxy, dial(proxy.door(door)) as sock:
        read_all(sock)
        line = proxy.wait_line(rf"refused id=.* protocol={door} .* reason=handshake_timeout .*")[0]
        assert "said nothing within auth_timeout; one that waits for a greeting, as SMTP does, is wrong here" in line
