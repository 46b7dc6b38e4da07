"""The PROXY protocol, versions 1 and 2, received in the outbound sense: leave from "source", connect to "destination".

The rules are those of HAProxy's doc/proxy-protocol.txt, whose sections are cited below. The source port is no more than
a hint and is ignored. The protocol knows no reply: success says nothing, and the receiver's SMTP greeting follows; a
failure is said as an SMTP server would say it, by a `421` greeting, on which every MTA defers and none bounces.

What does not belong here: who may connect, leave from where or go where (`access`), and sockets.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import AddressValueError, IPv6Address
from struct import Struct
from typing import Final, NoReturn

from proxy.errors import PeerError
from proxy.model import Accepted, Connect, Endpoint, Event, HealthCheck, Reply, Route, ip_from_bytes
from proxy.protocols.smtp.refusal import refusal

_V1_START: Final = b"PROXY "
#: Section 2.1: the longest line, CRLF included.
_V1_MAX: Final = 107
_V2_SIGNATURE: Final = b"\r\n\r\n\x00\r\nQUIT\n"
_V2_HEAD: Final = 16
#: Ours, not the specification's (which allows 65,551): room for every TLV in use, and a bound on what we keep.
_V2_MAX: Final = 4096
_V2_LOCAL: Final = 0
_V2_PROXY: Final = 1
_V2_TCP4: Final = Struct("!16x4s4s2xH")
_V2_TCP6: Final = Struct("!16x16s16s2xH")
_TCP4: Final = 0x11
_TCP6: Final = 0x21

_OCTET: Final = rb"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4: Final = rb"(" + _OCTET + rb"(?:\." + _OCTET + rb"){3})"
_PORT: Final = rb"(0|[1-9][0-9]{0,4})"
_V1_TCP4: Final = re.compile(rb"PROXY TCP4 " + _IPV4 + b" " + _IPV4 + b" " + _PORT + b" " + _PORT + rb"\r\n")
_V1_TCP6: Final = re.compile(rb"PROXY TCP6 ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) " + _PORT + b" " + _PORT + rb"\r\n")
_V1_UNKNOWN: Final = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*)?\r\n")


class ProxyProtocol:
    """One client's header: yields one `Connect` or one `HealthCheck`.

    Args:
        host_name: this proxy's name in its 421 greetings.
    """

    __slots__ = ("_buffer", "_bytes_used", "_done", "_event", "_host_name")

    protocol = "proxy_protocol"
    tells_local = False

    def __init__(self, host_name: str) -> None:
        self._host_name = host_name
        self._buffer = b""
        self._bytes_used = 0
        self._event: Event | None = None
        self._done = False

    def receive(self, data: bytes) -> None:
        """Take what the client sent. At most one header (4096 bytes) and `data` are kept."""
        self._buffer = self._buffer + data if self._buffer else data

    @property
    def trailing(self) -> bytes:
        """The bytes behind the header: the beginning of the payload."""
        return self._buffer[self._bytes_used :]

    def next_event(self) -> Event | None:
        """What the header asks for, or None when more bytes are needed or the handshake is over.

        Raises:
            PeerError: not a PROXY header, or one that cannot be served; `send` of it gives the greeting that says so.
        """
        if self._event is None and self._buffer and not self._done:
            self._event = self._read_header()
        return self._event

    def send(self, reply: Reply) -> bytes:
        """Nothing for `Accepted`; for an error a 421 greeting of at most 512 bytes. Either ends the handshake."""
        self._event = None
        self._done = True
        return b"" if isinstance(reply, Accepted) else refusal(self._host_name, reply)

    def requested(self) -> bytes:
        """See `Handshake`."""
        return self.trailing

    def go_on(self, requested: bytes, asked: Connect) -> None:
        """See `Handshake`."""
        self._buffer, self._bytes_used, self._event = requested, 0, asked

    def _read_header(self) -> Event | None:
        buffer = self._buffer
        if buffer.startswith(_V2_SIGNATURE):
            return self._read_v2()
        if buffer.startswith(_V1_START):
            return self._read_v1()
        if _V1_START.startswith(buffer) or _V2_SIGNATURE.startswith(buffer):
            return None
        raise PeerError("the connection does not begin with a PROXY protocol header")

    def _read_v1(self) -> Event | None:
        """Section 2.1: `PROXY TCP4 source destination source-port destination-port` and CRLF."""
        buffer = self._buffer
        end = buffer.find(b"\n", 0, _V1_MAX) + 1
        if not end:
            if len(buffer) < _V1_MAX:
                return None
            raise PeerError("no CRLF in the first 107 bytes of the PROXY header")
        self._bytes_used = end
        match = _V1_TCP4.fullmatch(buffer, 0, end)
        if match is not None:
            # The expression admits canonical text only: nothing to convert.
            source, destination, source_port, port = match.groups()
            return _connect(source.decode(), destination.decode(), _port(port, source_port))
        match = _V1_TCP6.fullmatch(buffer, 0, end)
        if match is not None:
            source, destination, source_port, port = match.groups()
            return _connect(_ipv6(source), _ipv6(destination), _port(port, source_port))
        if _V1_UNKNOWN.fullmatch(buffer, 0, end):
            _refuse_unknown()
        raise PeerError("malformed PROXY header, version 1")

    def _read_v2(self) -> Event | None:
        """Section 2.2: signature, version and command, family, length, addresses, TLVs (which are skipped)."""
        buffer = self._buffer
        if len(buffer) < _V2_HEAD:
            return None
        version, command = buffer[12] >> 4, buffer[12] & 0x0F
        if version != 2 or command > _V2_PROXY:
            raise PeerError("unknown version or command in a PROXY header, version 2")
        length = buffer[14] << 8 | buffer[15]
        end = _V2_HEAD + length
        if end > _V2_MAX:
            raise PeerError(f"a PROXY header of more than {_V2_MAX} bytes")
        if len(buffer) < end:
            return None
        self._bytes_used = end
        if command == _V2_LOCAL:
            return HealthCheck()
        family = buffer[13]
        layout = _V2_TCP4 if family == _TCP4 else _V2_TCP6 if family == _TCP6 else _refuse_family(family)
        if end < layout.size:
            raise PeerError("a PROXY header, version 2, that is too short for its addresses")
        source, destination, port = layout.unpack_from(buffer)
        return _connect_packed(source, destination, port)


def _connect(source: str, destination: str, port: int) -> Connect:
    return Connect(Route(source, Endpoint(destination, port)))


@lru_cache(maxsize=4096)
def _connect_packed(source: bytes, destination: bytes, port: int) -> Connect:
    """Remembered, since a proxy has few sources and an MTA comes back to an MX; open relays share one object, too."""
    return _connect(ip_from_bytes(source), ip_from_bytes(destination), port)


def _port(destination: bytes, source: bytes) -> int:
    """The destination port; the source port must be one, too, though nobody uses it."""
    port = int(destination)
    if port > 0xFFFF or int(source) > 0xFFFF:
        raise PeerError("a port above 65535 in the PROXY header")
    return port


@lru_cache(maxsize=4096)
def _ipv6(text: bytes) -> str:
    try:
        return ip_from_bytes(IPv6Address(text.decode()).packed)
    except AddressValueError:
        raise PeerError("malformed IPv6 address in the PROXY header") from None


def _refuse_family(family: int) -> NoReturn:
    if family & 0xF0 == 0 or family & 0x0F == 0:
        _refuse_unknown()
    raise PeerError("a PROXY header for something else than TCP over IPv4 or IPv6")


def _refuse_unknown() -> NoReturn:
    raise PeerError("a PROXY header without addresses (UNKNOWN or UNSPEC)")
