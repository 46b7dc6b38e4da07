"""What strangers begin with, each as its specification or its best-known client sends it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocols.recognise import protocol_of, wrong_door

BEGINNINGS = [
    (b"GET / HTTP/1.1\r\nHost: proxy\r\n\r\n", "HTTP"),
    (b"CONNECT mx.example:25 HTTP/1.1\r\n\r\n", "HTTP"),  # curl --proxy http://
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP"),  # RFC 9113 section 3.4
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "TLS"),  # RFC 8446 section 4.1.2 in a record of 5.1
    (b"EHLO mta.example\r\n", "SMTP"),
    (b"helo mta.example\r\n", "SMTP"),  # RFC 5321 section 2.4: verbs in any case
    (b"PROXY TCP4 192.0.2.1 198.51.100.7 0 25\r\n", "proxy_protocol"),
    (b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c", "proxy_protocol"),
    (b"\x05\x01\x00", "socks5"),  # RFC 1928 section 3
    (b"\x05\x02\x00\x02", "socks5"),
    (b"\x04\x01\x00\x19\xc6\x33\x64\x07\x00", "SOCKS4"),
]


@pytest.mark.parametrize(("first", "protocol"), BEGINNINGS)
def test_a_beginning_is_recognised(first: bytes, protocol: str) -> None:
    assert protocol_of(first) == protocol
    assert wrong_door(first, protocol) == "", "it is at the right door: something else is wrong with it"
    assert wrong_door(first, "another").startswith("; it looks like ")


@pytest.mark.parametrize(
    "first",
    [b"", b"G", b"\x16", b"\x05", b"PROXY", b"\x05\x01", b"\x00\x00\x00\x41\x01", b"GETAWAY", b"220 mx ESMTP\r\n"],
)
def test_nothing_is_said_about_what_is_not_known(first: bytes) -> None:
    assert (protocol_of(first), wrong_door(first, "socks5")) == ("", "")


@given(st.binary(max_size=40))
def test_any_bytes(first: bytes) -> None:
    assert wrong_door(first, "socks5").isprintable()
