"""PROXY protocol, both versions. Section numbers are those of HAProxy's doc/proxy-protocol.txt."""

from __future__ import annotations

import errno
import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import (
    ClientNotAllowed,
    DestinationNotAllowed,
    Draining,
    HandshakeTimeout,
    Overloaded,
    PeerError,
    ProxyError,
    SourceNotAllowed,
    Step,
    Throttled,
    UpstreamError,
)
from proxy.model import Accepted, Connect, Endpoint, HealthCheck, Route
from proxy.protocols.proxy_protocol import ProxyProtocol
from tests.unit.feeding import PAYLOAD, Outcome, feed, run, split

# Section 2.2: "\x0D \x0A \x0D \x0A \x00 \x0D \x0A \x51 \x55 \x49 \x54 \x0A"
SIGNATURE = bytes.fromhex("0D0A0D0A000D0A515549540A")
SOURCE4, DESTINATION4 = bytes((192, 0, 2, 9)), bytes((198, 51, 100, 7))
SOURCE6 = bytes.fromhex("20010db8000000000000000000000009")
DESTINATION6 = bytes.fromhex("20010db8000100000000000000000025")


def make() -> ProxyProtocol:
    return ProxyProtocol("proxy.example")


def v2(command: int, family: int, addresses: bytes, length: int | None = None) -> bytes:
    """Section 2.2: sig[12], ver_cmd, fam, len, addresses."""
    return SIGNATURE + struct.pack("!BBH", command, family, len(addresses) if length is None else length) + addresses


def v2_tcp4(tlvs: bytes = b"") -> bytes:
    """Section 2.2: source address, destination address, source port, destination port."""
    return v2(0x21, 0x11, SOURCE4 + DESTINATION4 + bytes.fromhex("0000 0019") + tlvs)


def v2_tcp6(tlvs: bytes = b"") -> bytes:
    return v2(0x21, 0x21, SOURCE6 + DESTINATION6 + bytes.fromhex("0000 0019") + tlvs)


def asked(outcome: Outcome) -> Route:
    assert outcome.error is None
    (event,) = outcome.events
    assert isinstance(event, Connect)
    # Nothing is ever said on success: the receiver's greeting comes first.
    assert outcome.sent == [b""]
    return event.route


def refused(outcome: Outcome) -> str:
    """The words of a header that was refused; every refusal is a 421 line."""
    assert type(outcome.error) is PeerError
    assert outcome.events == []
    (line,) = outcome.sent
    assert line == b"421 4.5.0 proxy.example " + str(outcome.error).encode() + b"\r\n"
    return str(outcome.error)


ROUTE4 = Route("192.0.2.9", Endpoint("198.51.100.7", 25))
ROUTE6 = Route("2001:db8::9", Endpoint("2001:db8:1::25", 25))


@pytest.mark.parametrize(
    ("header", "route"),
    [
        # What GreenArrow sends, and HAProxy with `set-src-port int(0)`: section 2.1.
        (b"PROXY TCP4 192.0.2.9 198.51.100.7 49152 25\r\n", ROUTE4),
        (b"PROXY TCP4 192.0.2.9 198.51.100.7 0 25\r\n", ROUTE4),
        # The longest lines that section 2.1 gives.
        (
            b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
            Route("255.255.255.255", Endpoint("255.255.255.255", 65535)),
        ),
        (
            b"PROXY TCP6 " + b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff " * 2 + b"65535 65535\r\n",
            Route(
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", Endpoint("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)
            ),
        ),
        (b"PROXY TCP4 0.0.0.0 198.51.100.7 0 0\r\n", Route("0.0.0.0", Endpoint("198.51.100.7", 0))),
        # Section 2.1: upper or lower case, with or without "::"; RFC 5952 is the one form that leaves here.
        (b"PROXY TCP6 2001:DB8:0:0:0:0:0:9 2001:0db8:0001::0025 0 25\r\n", ROUTE6),
        (b"PROXY TCP6 2001:db8::9 2001:db8:1::25 0 25\r\n", ROUTE6),
        # inet_ntop writes an IPv4-mapped address with dots (RFC 4291 section 2.2); it leaves here as the IPv4 address.
        (b"PROXY TCP6 ::ffff:192.0.2.9 ::ffff:c633:6407 0 25\r\n", ROUTE4),
        # KumoMTA: 28 or 52 bytes, source port 0, no TLVs.
        (v2_tcp4(), ROUTE4),
        (v2_tcp6(), ROUTE6),
        (
            v2(0x21, 0x21, bytes(10) + b"\xff\xff" + SOURCE4 + bytes(10) + b"\xff\xff" + DESTINATION4 + b"\0\0\0\x19"),
            ROUTE4,
        ),
        # Section 2.2: what follows the addresses within the length is skipped: a TLV, or what looks like half of one.
        (v2_tcp4(bytes.fromhex("04 0003 000000")), ROUTE4),
        (v2_tcp6(b"\x04\xff"), ROUTE6),
        (v2_tcp4(bytes(4096 - 28)), ROUTE4),
    ],
)
def test_asks_to_connect(header: bytes, route: Route) -> None:
    assert asked(feed(make, header)) == route


def test_kumomta_header_sizes() -> None:
    assert (len(v2_tcp4()), len(v2_tcp6())) == (28, 52)


@pytest.mark.parametrize("header", [b"PROXY TCP4 192.0.2.9 198.51.100.7 0 25\r\n", v2_tcp4()])
def test_payload_behind_the_header_is_not_lost(header: bytes) -> None:
    handshake = make()
    handshake.receive(header + PAYLOAD)
    assert isinstance(handshake.next_event(), Connect)
    assert handshake.next_event() is not None, "the event stays until it is answered"
    assert handshake.send(Accepted(Endpoint("192.0.2.9", 40000))) == b""
    assert handshake.trailing == PAYLOAD
    handshake.receive(b"more")
    assert handshake.trailing == PAYLOAD + b"more"
    assert handshake.next_event() is None


@pytest.mark.parametrize(
    "header",
    [
        # Section 2.2: LOCAL is accepted whatever family it names, and its block is skipped, length zero or not.
        v2(0x20, 0x00, b""),
        v2(0x20, 0x11, SOURCE4 + DESTINATION4 + bytes(4)),
        v2(0x20, 0x12, b""),
        v2(0x20, 0xFF, bytes(100)),
    ],
)
def test_local_is_a_health_check(header: bytes) -> None:
    outcome = feed(make, header)
    assert outcome.error is None
    assert [type(event) for event in outcome.events] == [HealthCheck]
    assert outcome.sent == [b""]


V4 = b"PROXY TCP4 %b 198.51.100.7 0 25\r\n"


@pytest.mark.parametrize(
    "line",
    [
        V4 % b"192.0.2.09",
        V4 % b"192.0.2.256",
        V4 % b"192.0.2",
        V4 % b"192.0.2.9.9",
        V4 % b"0xc0.0.2.9",
        V4 % b"2001:db8::9",
        V4 % b"",
        V4 % b" 192.0.2.9",
        V4 % "١٩٢.0.2.9".encode(),
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 025\r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 00 25\r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 +25\r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 -1\r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 100000\r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 25 \r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 25 x\r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 25\r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0\t25\r\n",
        b"PROXY  TCP4 192.0.2.9 198.51.100.7 0 25\r\n",
        b"PROXY tcp4 192.0.2.9 198.51.100.7 0 25\r\n",
        b"PROXY UDP4 192.0.2.9 198.51.100.7 0 25\r\n",
        b"PROXY TCP5 192.0.2.9 198.51.100.7 0 25\r\n",
        b"PROXY \r\n",
        b"PROXY UNKNOWNX\r\n",
        # Section 2.1: "must not tolerate a single CR or LF".
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 25\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 25\r\r\n",
        b"PROXY TCP4 192.0.2.9\n198.51.100.7 0 25\r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 2\r5\r\n",
        b"PROXY TCP4 192.0.2.9 198.51.100.7 0 25\0\r\n",
        b"PROXY UNKNOWN\n",
    ],
)
def test_malformed_line(line: bytes) -> None:
    assert refused(feed(make, line)) == "malformed PROXY header, version 1"


@pytest.mark.parametrize("ports", [b"0 65536", b"65536 25", b"99999 99999"])
def test_port_out_of_range(ports: bytes) -> None:
    assert (
        refused(feed(make, b"PROXY TCP4 192.0.2.9 198.51.100.7 " + ports + b"\r\n"))
        == "a port above 65535 in the PROXY header"
    )


@pytest.mark.parametrize(
    "address", [b"1:2:3", b"::1::", b"12345::", b"::ffff:192.0.2.256", b"192.0.2.9", b":", b"1:2:3:4:5:6:7:8:9"]
)
def test_malformed_ipv6_address(address: bytes) -> None:
    assert (
        refused(feed(make, b"PROXY TCP6 " + address + b" 2001:db8::25 0 25\r\n"))
        == "malformed IPv6 address in the PROXY header"
    )


def test_zone_is_malformed() -> None:
    assert refused(feed(make, b"PROXY TCP6 fe80::1%eth0 2001:db8::25 0 25\r\n")) == "malformed PROXY header, version 1"


@pytest.mark.parametrize(
    "header",
    [
        b"PROXY UNKNOWN\r\n",
        # Section 2.1, "worst case": 107 bytes.
        b"PROXY UNKNOWN " + b"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff " * 2 + b"65535 65535\r\n",
        v2(0x21, 0x00, b""),
        v2(0x21, 0x00, bytes(12)),
        v2(0x21, 0x10, bytes(12)),
        v2(0x21, 0x01, bytes(12)),
    ],
)
def test_without_addresses_there_is_nothing_to_connect_to(header: bytes) -> None:
    assert refused(feed(make, header)) == "a PROXY header without addresses (UNKNOWN or UNSPEC)"


def test_line_of_107_bytes_is_the_longest() -> None:
    line = b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n"
    assert len(line) == 107
    assert "without addresses" in refused(feed(make, line))
    longer = b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n"
    assert refused(feed(make, longer)) == "no CRLF in the first 107 bytes of the PROXY header"


def test_no_crlf_is_told_at_107_bytes_not_later() -> None:
    assert run(make(), [b"PROXY " + b"x" * 100]).error is None
    assert "no CRLF" in refused(run(make(), [b"PROXY " + b"x" * 101]))


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\n",
        b"\x05\x01\x00",
        b"\x16\x03\x01",
        b"proxy TCP4",
        b"PROXY\t",
        b"\r\n\r\n\r\n",
        b"\0",
        b"EHLO x\r\n",
    ],
)
def test_not_a_header(first: bytes) -> None:
    assert refused(feed(make, first)) == "the connection does not begin with a PROXY protocol header"


def test_wrong_byte_is_told_as_soon_as_it_is_seen() -> None:
    assert run(make(), [b"PROX"]).error is None
    assert run(make(), [b"PROX", b"X"]).error is not None
    assert run(make(), [SIGNATURE[:-1]]).error is None
    assert run(make(), [SIGNATURE[:-1], b"\r"]).error is not None


@pytest.mark.parametrize("version_and_command", [0x11, 0x31, 0x01, 0xF1, 0x10, 0x22, 0x2F])
def test_unknown_version_or_command(version_and_command: int) -> None:
    header = v2(version_and_command, 0x11, SOURCE4 + DESTINATION4 + bytes(4))
    assert refused(feed(make, header)) == "unknown version or command in a PROXY header, version 2"


@pytest.mark.parametrize("family", [0x12, 0x22, 0x31, 0x32, 0x13, 0x41, 0xF1, 0xFF])
def test_only_tcp_over_ip(family: int) -> None:
    assert (
        refused(feed(make, v2(0x21, family, bytes(216))))
        == "a PROXY header for something else than TCP over IPv4 or IPv6"
    )


@pytest.mark.parametrize(
    "header", [v2(0x21, 0x11, bytes(11)), v2(0x21, 0x11, b""), v2(0x21, 0x21, bytes(35)), v2(0x21, 0x21, bytes(12))]
)
def test_too_short_for_its_addresses(header: bytes) -> None:
    assert refused(feed(make, header)) == "a PROXY header, version 2, that is too short for its addresses"


@pytest.mark.parametrize("command", [0x20, 0x21])
def test_more_than_4096_bytes_is_refused_before_they_are_read(command: int) -> None:
    assert (
        refused(run(make(), [v2(command, 0x11, b"", length=4096 - 16 + 1)])) == "a PROXY header of more than 4096 bytes"
    )
    assert run(make(), [v2(command, 0x11, b"", length=4096 - 16)]).error is None


@pytest.mark.parametrize(
    "header", [b"PROXY TCP4 192.0.2.9 198.51.100.7 0 25\r\n", v2_tcp4(b"\x04\0\1\0"), v2_tcp6(), v2(0x20, 0, b"\0")]
)
def test_waits_for_the_whole_header(header: bytes) -> None:
    for end in range(len(header)):
        outcome = run(make(), [header[:end]])
        assert (outcome.events, outcome.error, outcome.sent) == ([], None, [])


def said(error: ProxyError, host: str = "proxy.example") -> bytes:
    handshake = ProxyProtocol(host)
    handshake.receive(v2_tcp4())
    assert handshake.next_event() is not None
    return handshake.send(error)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        # Codes: RFC 3463 sections 3.4 to 3.8; always class 4, so that mail is deferred.
        (
            UpstreamError("bind 192.0.2.9: not an address of this machine", Step.BIND, errno.EADDRNOTAVAIL),
            b"421 4.4.1 proxy.example bind 192.0.2.9: not an address of this machine\r\n",
        ),
        (
            UpstreamError("connect: timed out", Step.CONNECT, errno.ETIMEDOUT),
            b"421 4.4.1 proxy.example connect: timed out\r\n",
        ),
        (
            SourceNotAllowed("source 192.0.2.9 is not in source_ip"),
            b"421 4.7.1 proxy.example source 192.0.2.9 is not in source_ip\r\n",
        ),
        (DestinationNotAllowed("no"), b"421 4.7.1 proxy.example no\r\n"),
        (ClientNotAllowed("no"), b"421 4.7.1 proxy.example no\r\n"),
        (Throttled("wait", "yahoo", 3.0), b"421 4.4.5 proxy.example wait\r\n"),
        (Overloaded("full"), b"421 4.3.2 proxy.example full\r\n"),
        (Draining("bye"), b"421 4.3.2 proxy.example bye\r\n"),
        (HandshakeTimeout("too slow"), b"421 4.4.2 proxy.example too slow\r\n"),
        (PeerError("bad"), b"421 4.5.0 proxy.example bad\r\n"),
    ],
)
def test_failure_is_a_421_greeting(error: ProxyError, line: bytes) -> None:
    assert said(error) == line


def test_greeting_is_one_printable_line() -> None:
    line = said(UpstreamError("554 go\r\n250 away\x1b[2J\0 caf\xe9 \u2028 \ud800 \U0001f4a9", Step.GREETING))
    assert line == (
        b"421 4.4.1 proxy.example 554 go\\r\\n250 away\\x1b[2J\\x00 caf\\xe9 \\u2028 \\ud800 \\U0001f4a9\r\n"
    )


def test_greeting_is_cut_to_512_bytes() -> None:
    # RFC 5321 section 4.5.3.1.5: 512 octets including the reply code and the CRLF.
    line = said(PeerError("x" * 10_000))
    assert len(line) == 512
    assert line.endswith(b"x\r\n")


@given(st.text(), st.text())
def test_no_words_break_the_greeting(host: str, words: str) -> None:
    line = said(Overloaded(words), host)
    assert line.startswith(b"421 4.3.2 ")
    assert line.endswith(b"\r\n")
    assert len(line) <= 512
    assert all(0x20 <= byte < 0x7F for byte in line[:-2])


def test_error_before_any_byte_is_said() -> None:
    handshake = make()
    assert handshake.send(Overloaded("full")) == b"421 4.3.2 proxy.example full\r\n"
    handshake.receive(v2_tcp4())
    assert handshake.next_event() is None


addresses = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)), st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6))
)
ports = st.integers(0, 65535)


def plain(address: IPv4Address | IPv6Address) -> str:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


@given(addresses, ports, ports, st.lists(st.integers(0, 200), max_size=4), st.booleans(), st.binary(max_size=40))
def test_round_trip(pair: tuple, source_port: int, port: int, cuts: list[int], text: bool, tlvs: bytes) -> None:
    source, destination = pair
    if text:
        header = f"PROXY TCP{source.version} {source} {destination} {source_port} {port}\r\n".encode()
    else:
        block = source.packed + destination.packed + struct.pack("!HH", source_port, port)
        header = v2(0x21, 0x11 if source.version == 4 else 0x21, block + tlvs)
    outcome = run(make(), split(header + PAYLOAD, cuts))
    assert asked(outcome) == Route(plain(source), Endpoint(plain(destination), port))
    assert outcome.trailing == PAYLOAD


nearly_a_header = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=300).map(lambda rest: b"PROXY TCP4 " + rest),
    st.text("0123456789abcdef:. \r\n", max_size=120).map(lambda rest: b"PROXY TCP6 " + rest.encode() + b"\r\n"),
    st.text("0123456789. ", max_size=60).map(lambda rest: b"PROXY TCP4 " + rest.encode() + b"\r\n"),
    st.binary(max_size=300).map(lambda rest: SIGNATURE + rest),
    st.builds(
        v2,
        st.integers(0x1F, 0x23),
        st.sampled_from([0, 0x11, 0x12, 0x21, 0x31]),
        st.binary(max_size=60),
        st.integers(0, 60),
    ),
)


@given(nearly_a_header, st.lists(st.integers(0, 400), max_size=6))
def test_any_bytes_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    """Nothing but PeerError comes out (run() lets everything else through), and pieces make no difference."""
    assert run(make(), split(data, cuts)).key == run(make(), [data]).key
