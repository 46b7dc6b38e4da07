"""SOCKS5 as a server: RFC 1928, the password method of RFC 1929, and KumoMTA's BIND-then-CONNECT.

Bytes in, events out; verdicts in, bytes out (see `model.Handshake`). In KumoMTA's dialect BIND names the address to
leave from and gets one reply instead of RFC 1928's two. Every reply is one bytes object of the address type that was
asked with, since Exim reads a reply with one `read` of its request's length (10 or 22 bytes). No reply ever carries a
domain name; a name is taken only if it is an IP address in text form.

What does not belong here: who may log in, leave from where or go where (`access`), and sockets.
"""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import Final, NoReturn

from proxy.errors import AddressTypeNotSupported, CommandNotSupported, PeerError
from proxy.model import (
    Accepted,
    BindSource,
    Connect,
    Endpoint,
    Event,
    Login,
    Negotiation,
    Reply,
    Route,
    ip_from_bytes,
    ip_to_bytes,
    packed_ip,
)

_VERSION: Final = 5
_LOGIN_VERSION: Final = 1
_NO_LOGIN: Final = 0x00
_PASSWORD: Final = 0x02
_CONNECT: Final = 1
_BIND: Final = 2
_IPV4: Final = 1
_DOMAIN: Final = 3
_IPV6: Final = 4
#: Length of a request with a literal address: 4 bytes of head, the address, 2 bytes of port.
_REQUEST_LENGTH: Final = {_IPV4: 10, _IPV6: 22}
_NOBODY: Final = {_IPV4: bytes(6), _IPV6: bytes(18)}
_SUCCESS: Final = {_IPV4: bytes((_VERSION, 0, 0, _IPV4)), _IPV6: bytes((_VERSION, 0, 0, _IPV6))}
_METHOD: Final = {_NO_LOGIN: bytes((_VERSION, _NO_LOGIN)), _PASSWORD: bytes((_VERSION, _PASSWORD))}
_NEGOTIATION: Final = Negotiation()
_NO_METHOD: Final = b"\x05\xff"
_LOGIN_ACCEPTED: Final = b"\x01\x00"
_LOGIN_REFUSED: Final = b"\x01\x01"
_MAPPED_PREFIX: Final = bytes(10) + b"\xff\xff"


class _State(enum.Enum):
    """What the client has to send next; a state ends when the event read in it is answered by `send`."""

    METHODS = enum.auto()
    LOGIN = enum.auto()
    REQUEST = enum.auto()
    DONE = enum.auto()


class Socks5:
    """One client's handshake.

    Events in order: `Negotiation`, `Login` (if the client offers a password), `BindSource` (at most one), `Connect`.
    After an error was sent the connection is over: `next_event` returns None for ever.

    Args:
        require_auth: refuse clients that offer no password (`socks5_auth required`). A password is chosen whenever it
            is offered, since a client that is answered "no login needed" would not name itself.
    """

    __slots__ = ("_address_type", "_buffer", "_bytes_used", "_event", "_method", "_require_auth", "_source", "_state")

    protocol = "socks5"
    tells_local = True

    def __init__(self, require_auth: bool) -> None:
        self._require_auth = require_auth
        self._buffer = b""
        self._state = _State.METHODS
        self._event: Event | None = None
        self._bytes_used = 0
        self._method = _NO_LOGIN
        self._address_type = _IPV4
        self._source: str | None = None

    def receive(self, data: bytes) -> None:
        """Take what the client sent. At most one message (513 bytes) and `data` are kept."""
        self._buffer = self._buffer + data if self._buffer else data

    @property
    def trailing(self) -> bytes:
        """The bytes behind what was understood so far; after `Connect`, the beginning of the payload."""
        return self._buffer[self._bytes_used :]

    def next_event(self) -> Event | None:
        """The next thing to decide, or None when more bytes are needed or the handshake is over.

        Raises:
            PeerError: the bytes are not allowed here; `send` of it gives the reply.
        """
        if self._event is None:
            state = self._state
            if state is _State.REQUEST:
                self._event = self._read_request()
            elif state is _State.METHODS:
                self._event = self._read_methods()
            elif state is _State.LOGIN:
                self._event = self._read_login()
        return self._event

    def send(self, reply: Reply) -> bytes:
        """The answer to the event given last, or to an error at any time; goes out in one write.

        Args:
            reply: `Accepted`, with the local endpoint for a BIND or CONNECT; any error ends the handshake.
        """
        if not isinstance(reply, Accepted):
            return self._refusal(reply.socks_reply)
        event, self._event = self._event, None
        self._buffer = self._buffer[self._bytes_used :]
        self._bytes_used = 0
        if isinstance(event, Connect):
            self._state = _State.DONE
        elif isinstance(event, BindSource):
            self._source = event.source
        elif isinstance(event, Login):
            self._state = _State.REQUEST
            return _LOGIN_ACCEPTED
        else:
            self._state = _State.LOGIN if self._method == _PASSWORD else _State.REQUEST
            return _METHOD[self._method]
        return self._success(reply.local)

    def requested(self) -> bytes:
        """See `Handshake`."""
        return bytes((self._address_type,)) + self.trailing

    def go_on(self, requested: bytes, asked: Connect) -> None:
        """See `Handshake`."""
        self._address_type, self._buffer, self._bytes_used = requested[0], requested[1:], 0
        self._state, self._event = _State.REQUEST, asked

    def _read_methods(self) -> Event | None:
        """VER NMETHODS METHODS… (RFC 1928 section 3)."""
        buffer = self._buffer
        if not buffer:
            return None
        if buffer[0] != _VERSION:
            raise PeerError("not a SOCKS5 client: the first byte is not 05")
        if len(buffer) < 2 or len(buffer) < 2 + buffer[1]:
            return None
        self._bytes_used = 2 + buffer[1]
        methods = buffer[2 : self._bytes_used]
        if _PASSWORD in methods:
            self._method = _PASSWORD
        elif self._require_auth or _NO_LOGIN not in methods:
            raise PeerError("the client offers no login method that this proxy accepts")
        return _NEGOTIATION

    def _read_login(self) -> Event | None:
        """VER ULEN UNAME PLEN PASSWD (RFC 1929 section 2)."""
        buffer = self._buffer
        if not buffer:
            return None
        if buffer[0] != _LOGIN_VERSION:
            raise PeerError("the version byte of the login is not 01")
        if len(buffer) < 2 or len(buffer) < 3 + buffer[1]:
            return None
        name_end = 2 + buffer[1]
        self._bytes_used = name_end + 1 + buffer[name_end]
        if len(buffer) < self._bytes_used:
            self._bytes_used = 0
            return None
        return Login(_instance_name(buffer[2:name_end]), buffer[name_end + 1 : self._bytes_used])

    def _read_request(self) -> Event | None:
        """VER CMD RSV ATYP DST.ADDR DST.PORT (RFC 1928 section 4)."""
        buffer = self._buffer
        if len(buffer) < 4:
            return None
        version, command, reserved, address_type = buffer[:4]
        if version != _VERSION or reserved:
            raise PeerError("malformed SOCKS5 request")
        length = _REQUEST_LENGTH.get(address_type)
        if length is None:
            return self._read_other_request(command, address_type)
        self._address_type = address_type
        if len(buffer) < length:
            return None
        return self._request(command, buffer[4:length], length)

    def _request(self, command: int, packed: bytes, length: int) -> Event:
        """A whole request of this length, for an address and a port in network order."""
        self._bytes_used = length
        if command == _CONNECT:
            return _connect(self._source, packed)
        if command != _BIND:
            _refuse_command()
        if self._source is not None:
            raise PeerError("a second BIND on one connection")
        return _bind_source(packed[:-2])

    def _read_other_request(self, command: int, address_type: int) -> Event | None:
        """A name, or what is none: wait for all of it. A name that is an IP address in text form is that address.

        Many libraries (msmtp, Nodemailer) send every host as a name. The reply then has the address's own type.
        """
        self._address_type = _IPV4
        if address_type != _DOMAIN:
            if command not in (_CONNECT, _BIND):
                _refuse_command()
            raise AddressTypeNotSupported("unknown SOCKS5 address type")
        buffer = self._buffer
        if len(buffer) < 5 or len(buffer) < 7 + buffer[4]:
            return None
        name_end = 5 + buffer[4]
        try:
            packed = packed_ip(buffer[5:name_end].decode("ascii"))
        except ValueError:
            if command not in (_CONNECT, _BIND):
                _refuse_command()
            raise AddressTypeNotSupported("this proxy does not resolve domain names: ask with an IP address") from None
        self._address_type = _IPV4 if len(packed) == 4 else _IPV6
        return self._request(command, packed + buffer[name_end : name_end + 2], name_end + 2)

    def _success(self, local: Endpoint | None) -> bytes:
        """REP 00 with the local endpoint, in the address type that was asked with.

        A client that asked with an IPv4-mapped address left over IPv4 and gets the mapped form back; IPv6 does not fit
        into an IPv4 reply, which then names 0.0.0.0.
        """
        address_type = self._address_type
        if local is None:
            return _SUCCESS[address_type] + _NOBODY[address_type]
        packed = ip_to_bytes(local.host)
        if address_type == _IPV6:
            packed = packed if len(packed) == 16 else _MAPPED_PREFIX + packed
        elif len(packed) == 16:
            packed = bytes(4)
        return _SUCCESS[address_type] + packed + local.port.to_bytes(2, "big")

    def _refusal(self, socks_reply: int) -> bytes:
        """What the protocol can say in this state; nothing to a peer that does not speak SOCKS5 or said nothing."""
        state, self._state = self._state, _State.DONE
        self._event = None
        if state is _State.REQUEST:
            return bytes((_VERSION, socks_reply, 0, self._address_type)) + _NOBODY[self._address_type]
        if state is _State.LOGIN:
            return _LOGIN_REFUSED
        return _NO_METHOD if state is _State.METHODS and self._buffer[:1] == b"\x05" else b""


@lru_cache(maxsize=4096)
def _connect(source: str | None, packed: bytes) -> Connect:
    """Remembered, since an MTA comes back to an MX; open relays share one object, too."""
    return Connect(Route(source, Endpoint(ip_from_bytes(packed[:-2]), packed[-2] << 8 | packed[-1])))


@lru_cache(maxsize=4096)
def _bind_source(packed: bytes) -> BindSource:
    return BindSource(ip_from_bytes(packed))


def _instance_name(raw: bytes) -> str:
    """The user name as text.

    Raises:
        PeerError: empty, not UTF-8, or with control characters.
    """
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        name = ""
    if not name or not name.isprintable():
        raise PeerError("the user name is empty or not printable text")
    return name


def _refuse_command() -> NoReturn:
    raise CommandNotSupported("a SOCKS5 command other than CONNECT and BIND")
