"""SOCKS5. Expected bytes: RFC 1928 ("section"), RFC 1929 where said, and what KumoMTA, Exim and curl send and read."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import (
    AddressTypeNotSupported,
    BadCredentials,
    CommandNotSupported,
    DestinationNotAllowed,
    FamilyMismatch,
    HandshakeTimeout,
    Overloaded,
    PeerError,
    ProxyError,
    SourceNotAllowed,
    Step,
    Throttled,
    UpstreamError,
)
from proxy.model import Accepted, BindSource, Connect, Endpoint, Event, Login, Negotiation, Reply, Route
from proxy.protocols.socks5 import Socks5
from tests.unit.feeding import PAYLOAD, Outcome, accept, feed, run, split

# Section 3: VER NMETHODS METHODS. 00 no authentication, 02 username/password.
NO_LOGIN = bytes.fromhex("05 01 00")
PASSWORD = bytes.fromhex("05 01 02")
EITHER = bytes.fromhex("05 02 00 02")
# RFC 1929 section 2: VER ULEN UNAME PLEN PASSWD.
LOGIN = b"\x01\x08server-a\x06secret"
# Section 4: VER CMD RSV ATYP DST.ADDR DST.PORT.
BIND4 = bytes.fromhex("05 02 00 01 c0000209 0000")
BIND6 = bytes.fromhex("05 02 00 04 20010db8000000000000000000000009 0000")
CONNECT4 = bytes.fromhex("05 01 00 01 c6336407 0019")
CONNECT6 = bytes.fromhex("05 01 00 04 20010db8000100000000000000000025 0019")
CONNECT_NAME = bytes.fromhex("05 01 00 03") + b"\x0amx.example" + bytes.fromhex("0019")
UDP4 = bytes.fromhex("05 03 00 01 00000000 0000")

TO4 = Endpoint("198.51.100.7", 25)
TO6 = Endpoint("2001:db8:1::25", 25)
LOCAL4 = Endpoint("192.0.2.9", 0x9C40)
LOCAL6 = Endpoint("2001:db8::9", 0x9C40)


def required() -> Socks5:
    return Socks5(require_auth=True)


def open_to_all() -> Socks5:
    return Socks5(require_auth=False)


def grant(event: Event) -> Reply:
    """Everything is allowed, with the addresses of a real machine."""
    if isinstance(event, BindSource):
        return Accepted(Endpoint(event.source, 0))
    if isinstance(event, Connect):
        return Accepted(LOCAL6 if event.route.destination.is_ipv6 else LOCAL4)
    return Accepted()


def refuse_at(kind: type, error: ProxyError):
    return lambda event: error if isinstance(event, kind) else grant(event)


def kinds(outcome: Outcome) -> list[type]:
    return [type(event) for event in outcome.events]


def hexes(outcome: Outcome) -> list[str]:
    return [sent.hex() for sent in outcome.sent]


def test_kumomta_with_credentials_and_bind() -> None:
    outcome = feed(required, EITHER + LOGIN + BIND4 + CONNECT4, grant)
    assert outcome.events == [
        Negotiation(),
        Login("server-a", b"secret"),
        BindSource("192.0.2.9"),
        Connect(Route("192.0.2.9", TO4)),
    ]
    assert hexes(outcome) == ["0502", "0100", "05000001c00002090000", "05000001c00002099c40"]
    assert outcome.trailing == b""


def test_kumomta_over_ipv6_without_credentials() -> None:
    outcome = feed(open_to_all, NO_LOGIN + BIND6 + CONNECT6, grant)
    assert outcome.events == [Negotiation(), BindSource("2001:db8::9"), Connect(Route("2001:db8::9", TO6))]
    assert hexes(outcome) == [
        "0500",
        "0500000420010db80000000000000000000000090000",
        "0500000420010db80000000000000000000000099c40",
    ]


@pytest.mark.parametrize(("request_", "length"), [(CONNECT4, 10), (CONNECT6, 22)])
def test_exim_reads_a_reply_as_long_as_its_request(request_: bytes, length: int) -> None:
    assert len(request_) == length
    granted = feed(required, PASSWORD + LOGIN + request_, grant)
    assert kinds(granted) == [Negotiation, Login, Connect]
    assert granted.events[-1].route.source is None
    refused = feed(required, PASSWORD + LOGIN + request_, refuse_at(Connect, DestinationNotAllowed("no")))
    for reply in (granted.sent[-1], refused.sent[-1]):
        assert len(reply) == length
        assert reply[3] == request_[3]


def test_payload_behind_the_handshake_is_not_lost() -> None:
    handshake = required()
    handshake.receive(EITHER + LOGIN + CONNECT4 + PAYLOAD)
    for _ in range(3):
        event = handshake.next_event()
        assert event is not None
        assert handshake.next_event() is event, "the event stays until it is answered"
        handshake.send(grant(event))
    assert handshake.next_event() is None
    assert handshake.trailing == PAYLOAD
    handshake.receive(b"more")
    assert handshake.trailing == PAYLOAD + b"more"


@pytest.mark.parametrize(
    ("require", "methods", "answer"),
    [
        # 02 whenever it is offered: a KumoMTA that is answered 00 silently skips its login.
        (True, "05 01 02", "0502"),
        (True, "05 02 00 02", "0502"),
        (True, "05 02 02 00", "0502"),
        (True, "05 03 00 01 02", "0502"),
        (False, "05 01 02", "0502"),
        (False, "05 02 00 02", "0502"),
        (False, "05 01 00", "0500"),
        (False, "05 02 01 00", "0500"),
        # Section 3: "If the selected METHOD is X'FF', none of the methods listed by the client are acceptable".
        (True, "05 01 00", "05ff"),
        (True, "05 01 01", "05ff"),
        (True, "05 00", "05ff"),
        (True, "05 02 ff 80", "05ff"),
        (False, "05 01 01", "05ff"),
        (False, "05 00", "05ff"),
    ],
)
def test_method(require: bool, methods: str, answer: str) -> None:
    outcome = feed(lambda: Socks5(require), bytes.fromhex(methods))
    assert hexes(outcome) == [answer]
    assert (outcome.error is None) == (answer != "05ff")


def test_all_methods_that_fit() -> None:
    assert hexes(feed(required, b"\x05\xff" + bytes(range(255)))) == ["0502"]


@pytest.mark.parametrize(
    "first",
    [b"\x04\x01\x00\x19\xc6\x33\x64\x07\x00", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", b"\x00", b"PROXY TCP4 "],
)
def test_not_socks5_gets_no_answer(first: bytes) -> None:
    outcome = feed(required, first)
    assert type(outcome.error) is PeerError
    assert outcome.sent == [b""]


def test_login_is_answered_before_the_request_is_read() -> None:
    outcome = feed(required, EITHER + LOGIN + CONNECT4, refuse_at(Login, BadCredentials("wrong")))
    assert kinds(outcome) == [Negotiation, Login]
    # RFC 1929 section 2: a status other than 00 is a failure, and the server must close.
    assert outcome.sent[0] == b"\x05\x02"
    assert (outcome.sent[1][0], outcome.sent[1][1] != 0, len(outcome.sent[1])) == (1, True, 2)


@pytest.mark.parametrize(
    ("login", "event"),
    [
        (b"\x01\x01a\x00", Login("a", b"")),
        (b"\x01\xff" + b"n" * 255 + b"\xff" + bytes(range(255)), Login("n" * 255, bytes(range(255)))),
        (b"\x01\x03k\xc3\xb6\x02\x00\xff", Login("kö", b"\x00\xff")),
    ],
)
def test_login(login: bytes, event: Login) -> None:
    outcome = feed(required, PASSWORD + login)
    assert outcome.events[1] == event
    assert hexes(outcome) == ["0502", "0100"]


@pytest.mark.parametrize(
    "login",
    [
        b"\x05\x01a\x01b",
        b"\x01\x00\x01b",
        b"\x01\x01\xff\x01b",
        b"\x01\x02a\n\x01b",
        b"\x01\x02a\0\x01b",
        b"\x01\x04a\x1b[2\x01b",
    ],
)
def test_malformed_login(login: bytes) -> None:
    outcome = feed(required, PASSWORD + login)
    assert type(outcome.error) is PeerError
    assert hexes(outcome) == ["0502", "0101"]


@pytest.mark.parametrize(
    ("request_", "error", "reply"),
    [
        # Section 6: 07 command not supported, 08 address type not supported, 01 general failure.
        (UDP4, CommandNotSupported, "05070001000000000000"),
        (b"\x05\x03\x00\x04" + bytes(18), CommandNotSupported, "05070004" + "00" * 18),
        (b"\x05\x03\x00\x03\x01a\x00\x00", CommandNotSupported, "05070001000000000000"),
        (bytes.fromhex("05 00 00 01 c6336407 0019"), CommandNotSupported, "05070001000000000000"),
        (bytes.fromhex("05 f0 00 01 c6336407 0019"), CommandNotSupported, "05070001000000000000"),
        (bytes.fromhex("05 09 00 07"), CommandNotSupported, "05070001000000000000"),
        # We resolve no names; the reply then has ATYP 01 and 0.0.0.0:0, for ATYP 03 in a reply breaks clients.
        (CONNECT_NAME, AddressTypeNotSupported, "05080001000000000000"),
        (b"\x05\x02\x00\x03\x0bsrc.example\x00\x00", AddressTypeNotSupported, "05080001000000000000"),
        (b"\x05\x01\x00\x03\x00\x00\x19", AddressTypeNotSupported, "05080001000000000000"),
        (b"\x05\x01\x00\x03\xff" + b"x" * 255 + b"\x00\x19", AddressTypeNotSupported, "05080001000000000000"),
        (bytes.fromhex("05 01 00 00"), AddressTypeNotSupported, "05080001000000000000"),
        (bytes.fromhex("05 01 00 02"), AddressTypeNotSupported, "05080001000000000000"),
        (bytes.fromhex("05 02 00 ff"), AddressTypeNotSupported, "05080001000000000000"),
        # Section 4: VER is 05, RSV is 00.
        (bytes.fromhex("04 01 00 01 c6336407 0019"), PeerError, "05010001000000000000"),
        (bytes.fromhex("05 01 01 01 c6336407 0019"), PeerError, "05010001000000000000"),
        (b"EHLO x\r\n", PeerError, "05010001000000000000"),
    ],
)
def test_request_that_cannot_be_served(request_: bytes, error: type, reply: str) -> None:
    outcome = feed(open_to_all, NO_LOGIN + request_, grant)
    assert type(outcome.error) is error
    assert kinds(outcome) == [Negotiation]
    assert hexes(outcome) == ["0500", reply]


def named(command: int, name: bytes, port: int) -> bytes:
    """A request with ATYP 03 (section 5): a length byte and the name."""
    return bytes((5, command, 0, 3, len(name))) + name + port.to_bytes(2, "big")


@pytest.mark.parametrize(
    ("bind", "connect", "source", "to", "replies"),
    [
        # As msmtp, Nodemailer and others send every host. The reply has the address's own type, never ATYP 03.
        (b"192.0.2.9", b"198.51.100.7", "192.0.2.9", TO4, ["05000001c00002090000", "05000001c00002099c40"]),
        (
            b"2001:DB8:0::9",
            b"2001:db8:1:0:0:0:0:25",
            "2001:db8::9",
            TO6,
            ["0500000420010db80000000000000000000000090000", "0500000420010db80000000000000000000000099c40"],
        ),
        (
            b"::ffff:192.0.2.9",
            b"::ffff:198.51.100.7",
            "192.0.2.9",
            TO4,
            ["05000001c00002090000", "05000001c00002099c40"],
        ),
    ],
)
def test_a_name_that_is_an_address(bind: bytes, connect: bytes, source: str, to: Endpoint, replies: list[str]) -> None:
    outcome = feed(open_to_all, NO_LOGIN + named(2, bind, 0) + named(1, connect, 25), grant)
    assert outcome.events == [Negotiation(), BindSource(source), Connect(Route(source, to))]
    assert hexes(outcome) == ["0500", *replies]


@pytest.mark.parametrize(
    "name",
    # No guessing: forms that only inet_aton knows, zones, brackets, names of digits, and bytes that are no ASCII.
    [
        b"127.1",
        b"0x7f000001",
        b"2130706433",
        b"192.0.2.09",
        b"fe80::1%eth0",
        b"[::1]",
        b"192.0.2.1.",
        b" 192.0.2.1",
        b"\xb9",
    ],
)
def test_a_name_that_is_only_like_an_address(name: bytes) -> None:
    outcome = feed(open_to_all, NO_LOGIN + named(1, name, 25), grant)
    assert type(outcome.error) is AddressTypeNotSupported
    assert hexes(outcome) == ["0500", "05080001000000000000"]


def test_udp_for_an_address_as_a_name() -> None:
    outcome = feed(open_to_all, NO_LOGIN + named(3, b"2001:db8::9", 0), grant)
    assert type(outcome.error) is CommandNotSupported
    assert outcome.sent[-1].hex() == "05070004" + "00" * 18


@pytest.mark.parametrize(
    ("first", "second", "reply"), [(BIND4, BIND4, "05010001" + "00" * 6), (BIND4, BIND6, "05010004" + "00" * 18)]
)
def test_second_bind(first: bytes, second: bytes, reply: str) -> None:
    outcome = feed(open_to_all, NO_LOGIN + first + second + CONNECT4, grant)
    assert type(outcome.error) is PeerError
    assert kinds(outcome) == [Negotiation, BindSource]
    assert outcome.sent[-1].hex() == reply


def test_name_after_bind() -> None:
    outcome = feed(open_to_all, NO_LOGIN + BIND6 + CONNECT_NAME, grant)
    assert type(outcome.error) is AddressTypeNotSupported
    assert outcome.sent[-1].hex() == "05080001000000000000"


def test_bind_names_an_address_whatever_port_stands_there() -> None:
    outcome = feed(open_to_all, NO_LOGIN + BIND4[:-2] + b"\x30\x39" + CONNECT4, grant)
    assert outcome.events[1:] == [BindSource("192.0.2.9"), Connect(Route("192.0.2.9", TO4))]
    assert outcome.sent[1].hex() == "05000001c00002090000"


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        # Section 6, and which outcome KumoMTA must read out of it.
        (SourceNotAllowed("no"), 0x02),
        (UpstreamError("not on this machine", Step.BIND, errno.EADDRNOTAVAIL), 0x01),
        (Overloaded("full"), 0x02),
    ],
)
@pytest.mark.parametrize(("bind", "rest"), [(BIND4, "0001" + "00" * 6), (BIND6, "0004" + "00" * 18)])
def test_bind_refused(bind: bytes, rest: str, error: ProxyError, reply: int) -> None:
    outcome = feed(open_to_all, NO_LOGIN + bind + CONNECT4, refuse_at(BindSource, error))
    assert kinds(outcome) == [Negotiation, BindSource]
    assert outcome.sent[-1].hex() == f"05{reply:02x}{rest}"


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (DestinationNotAllowed("no"), 0x02),
        (Throttled("later", "yahoo", 1.0), 0x02),
        (Overloaded("full"), 0x02),
        (FamilyMismatch("4 and 6"), 0x08),
        (UpstreamError("", Step.CONNECT, errno.ENETUNREACH), 0x03),
        (UpstreamError("", Step.CONNECT, errno.EHOSTUNREACH), 0x04),
        (UpstreamError("", Step.CONNECT, errno.ECONNREFUSED), 0x05),
        (UpstreamError("", Step.CONNECT, errno.ETIMEDOUT), 0x06),
        (UpstreamError("", Step.CONNECT, errno.EADDRNOTAVAIL), 0x01),
        (UpstreamError("", Step.CONNECT, errno.ECONNRESET), 0x01),
    ],
)
@pytest.mark.parametrize(("connect", "rest"), [(CONNECT4, "0001" + "00" * 6), (CONNECT6, "0004" + "00" * 18)])
def test_connect_refused(connect: bytes, rest: str, error: ProxyError, reply: int) -> None:
    outcome = run(open_to_all(), [NO_LOGIN, BIND4, connect], refuse_at(Connect, error))
    assert outcome.sent[-1].hex() == f"05{reply:02x}{rest}"


@pytest.mark.parametrize(
    ("connect", "local", "reply"),
    [
        # The address type asked with, always: a mapped form one way (RFC 4291 section 2.5.5.2), no address the other.
        (CONNECT6, LOCAL4, "05000004" + "00" * 10 + "ffffc00002099c40"),
        (CONNECT4, LOCAL6, "05000001000000009c40"),
        (CONNECT4, None, "05000001000000000000"),
        (CONNECT6, None, "05000004" + "00" * 18),
    ],
)
def test_local_address_of_another_family_or_none(connect: bytes, local: Endpoint | None, reply: str) -> None:
    outcome = feed(open_to_all, NO_LOGIN + connect, lambda event: Accepted(local))
    assert outcome.sent[-1].hex() == reply


def test_mapped_addresses_are_ipv4_addresses_but_for_the_reply() -> None:
    mapped = bytes(10) + b"\xff\xff"
    bind = b"\x05\x02\x00\x04" + mapped + bytes((192, 0, 2, 9)) + b"\0\0"
    connect = b"\x05\x01\x00\x04" + mapped + bytes((198, 51, 100, 7)) + b"\0\x19"
    outcome = feed(open_to_all, NO_LOGIN + bind + connect, grant)
    assert outcome.events[1:] == [BindSource("192.0.2.9"), Connect(Route("192.0.2.9", TO4))]
    assert outcome.sent[1].hex() == "05000004" + "00" * 10 + "ffffc00002090000"
    assert outcome.sent[2].hex() == "05000004" + "00" * 10 + "ffffc00002099c40"


@pytest.mark.parametrize(
    ("sent_before", "said"),
    [
        ([], b""),
        ([b"\x16"], b""),
        ([b"\x05"], b"\x05\xff"),
        ([PASSWORD], b"\x01\x01"),
        ([PASSWORD, LOGIN[:5]], b"\x01\x01"),
        ([PASSWORD, LOGIN], b"\x05\x01\x00\x01" + bytes(6)),
        ([PASSWORD, LOGIN, CONNECT6[:9]], b"\x05\x01\x00\x04" + bytes(18)),
    ],
)
def test_timeout_says_what_the_protocol_allows_at_that_point(sent_before: list[bytes], said: bytes) -> None:
    handshake = required()
    for chunk in sent_before:
        handshake.receive(chunk)
        try:
            event = handshake.next_event()
        except PeerError:
            break
        if event is not None:
            handshake.send(accept(event))
    assert handshake.send(HandshakeTimeout("too slow")) == said
    handshake.receive(CONNECT4)
    assert handshake.next_event() is None
    assert handshake.send(HandshakeTimeout("too slow")) == b"", "an end is said once"


@pytest.mark.parametrize(
    "messages", [[EITHER, LOGIN, BIND4, CONNECT4], [NO_LOGIN, BIND6, CONNECT6], [NO_LOGIN, CONNECT_NAME]]
)
def test_waits_for_each_whole_message(messages: list[bytes]) -> None:
    whole = b"".join(messages)
    edges = [len(b"".join(messages[: index + 1])) for index in range(len(messages))]
    for end in range(len(whole)):
        outcome = run(open_to_all(), [whole[:end]], grant)
        assert outcome.error is None
        assert len(outcome.sent) == sum(edge <= end for edge in edges)


addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6).filter(lambda address: address.ipv4_mapped is None))
ports = st.integers(0, 65535)
names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=60)


@given(
    names, st.binary(max_size=255), st.none() | addresses, addresses, ports, st.lists(st.integers(0, 600), max_size=5)
)
def test_round_trip(name: str, secret: bytes, source: object, destination: object, port: int, cuts: list[int]) -> None:
    raw = name.encode()
    data = EITHER + bytes((1, len(raw))) + raw + bytes((len(secret),)) + secret
    events: list[Event] = [Negotiation(), Login(name, secret)]
    if source is not None:
        data += bytes((5, 2, 0, 1 if source.version == 4 else 4)) + source.packed + bytes(2)
        events.append(BindSource(str(source)))
    data += bytes((5, 1, 0, 1 if destination.version == 4 else 4)) + destination.packed + port.to_bytes(2, "big")
    events.append(Connect(Route(None if source is None else str(source), Endpoint(str(destination), port))))
    outcome = run(required(), split(data + PAYLOAD, cuts), lambda event: Accepted(Endpoint(str(destination), port)))
    assert outcome.error is None
    assert outcome.events == events
    assert outcome.trailing == PAYLOAD
    assert outcome.sent[-1] == b"\x05\x00" + data[-len(destination.packed) - 4 :][:2] + destination.packed + data[-2:]


pieces = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([NO_LOGIN, PASSWORD, EITHER, LOGIN, BIND4, BIND6, CONNECT4, CONNECT6, CONNECT_NAME, UDP4]),
)


@given(st.booleans(), st.lists(pieces, max_size=6).map(b"".join), st.lists(st.integers(0, 400), max_size=6))
def test_any_bytes_in_any_pieces(require: bool, data: bytes, cuts: list[int]) -> None:
    """Nothing but PeerError comes out (run() lets everything else through), and pieces make no difference."""
    whole = run(Socks5(require), [data], grant)
    assert run(Socks5(require), split(data, cuts), grant).key == whole.key
    for reply in whole.sent[1:]:
        assert len(reply) == 2 or reply[:1] + reply[2:3] == b"\x05\x00"
        assert len(reply) == {1: 10, 4: 22}[reply[3]] if len(reply) > 2 else True


@pytest.mark.parametrize("count", [1, 2, 5])
def test_replies_are_single_objects(count: int) -> None:
    """One write for each reply: however the request came, its answer is one bytes object."""
    data = EITHER + LOGIN + BIND4 + CONNECT4
    outcome = run(required(), split(data, list(range(0, len(data), count))), grant)
    assert [len(sent) for sent in outcome.sent] == [2, 2, 10, 10]
