"""The frozen vocabulary that all rooms share: endpoints, routes, what a handshake asks and what it is answered.

Three front doors speak three protocols, and `front` must not know which one it holds. So each protocol is a *handshake*
object (see `Handshake`) that turns bytes into the events below and replies into bytes. It never touches a socket.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, NamedTuple, Protocol

from proxy.errors import ProxyError

#: Called now and then in the middle of long work that must not keep others waiting: it may let them run.
Breathe = Callable[[], object]


def hold_breath() -> None:
    """The `Breathe` of work that nobody waits for."""


def let_go(things: list[Any], breathe: Breathe) -> None:
    """Empty a list that is the last to hold much: freed in one go, 20,000 blocks of a configuration take 20 ms."""
    while things:
        things.pop()
        breathe()


class Endpoint(NamedTuple):
    """An IP address in canonical text form (RFC 5952 for IPv6, no zone, no brackets) and a TCP port."""

    host: str
    port: int

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def canonical_ip(text: str) -> str:
    """The canonical text form of an IP address; an IPv4-mapped IPv6 address becomes its IPv4 address.

    One receiver must have one name: else `::ffff:192.0.2.1` slips past a rule or a throttle for 192.0.2.0/24.

    Raises:
        ValueError: not an IP address, or one with a zone.
    """
    return ip_from_bytes(packed_ip(text))


@lru_cache(maxsize=4096)
def owner_of(address: str) -> str:
    """What an address counts as: itself for IPv4, its /64 for IPv6; text that is no address stands for itself.

    An IPv4-mapped address is its IPv4 address, and a zone does not matter.
    """
    try:
        canonical = canonical_ip(address.partition("%")[0])
    except ValueError:
        return address
    return canonical if ip_address(canonical).version == 4 else str(ip_network((canonical, 64), strict=False))


def packed_ip(text: str) -> bytes:
    """The same as 4 or 16 bytes in network order.

    Raises:
        ValueError: as `canonical_ip`.
    """
    address = ip_address(text)
    if getattr(address, "scope_id", None):
        raise ValueError(f"{text!r} has a zone")
    packed = address.packed
    return packed[12:] if packed[:12] == _MAPPED_PREFIX else packed


@lru_cache(maxsize=4096)
def ip_from_bytes(packed: bytes) -> str:
    """The canonical text form of 4 or 16 bytes in network order, with the folding of `canonical_ip`.

    Raises:
        ValueError: neither 4 nor 16 bytes.
    """
    if packed[:12] == _MAPPED_PREFIX:
        packed = packed[12:]
    if len(packed) == 4:
        return ".".join(map(str, packed))
    return str(IPv6Address(packed))


@lru_cache(maxsize=4096)
def ip_to_bytes(host: str) -> bytes:
    """The 4 or 16 bytes of an IP address in text form, in network order.

    Raises:
        ValueError: not an IP address.
    """
    return ip_address(host).packed


#: RFC 4291 section 2.5.5.2: the first 12 bytes of an IPv4-mapped IPv6 address.
_MAPPED_PREFIX = bytes(10) + b"\xff\xff"


class Route(NamedTuple):
    """What a client asks for: leave from `source` (None: the proxy chooses) to `destination`."""

    source: str | None
    destination: Endpoint


class Names(NamedTuple):
    """What a client says of its receiver, as host names in canonical form; "": it does not.

    Args:
        mx: the MX host that the destination belongs to. domain: the recipient domain that it is an MX of.
    """

    mx: str = ""
    domain: str = ""


UNNAMED = Names()


class Negotiation(NamedTuple):
    """The client offers ways to log in (RFC 1928 methods). Nothing to decide: answer `Accepted()`."""


class Login(NamedTuple):
    """The client names itself and shows a secret in clear (RFC 1929)."""

    instance: str
    secret: bytes


class BindSource(NamedTuple):
    """KumoMTA's BIND: the address that the coming connection shall leave from; wants a verdict on it now."""

    source: str


class Connect(NamedTuple):
    """The last request of a handshake; after the reply to it only payload follows."""

    route: Route


class HealthCheck(NamedTuple):
    """A monitor's probe (PROXY LOCAL): close quietly."""


#: Events may be empty tuples, which are false: compare with `is None`, never by truth.
Event = Negotiation | Login | BindSource | Connect | HealthCheck


class Accepted(NamedTuple):
    """The request is granted; `local` is the real address of the outgoing socket (port 0: not yet connected)."""

    local: Endpoint | None = None


Reply = Accepted | ProxyError


class Handshake(Protocol):
    """The one shape of every front door's protocol. Pure: bytes in, events out; replies in, bytes out.

    Use: `receive` what came, then `next_event` until it returns None (more bytes are needed), answering each event with
    `send` before asking for the next. `next_event` raises `PeerError` for bytes that the protocol does not allow;
    `send` of that error gives what the protocol can say about it, perhaps nothing. After `Connect` was accepted,
    `trailing` holds the bytes that came behind the handshake: they go upstream first. `tells_local`: whether the reply
    to `Connect` tells the real local endpoint, which costs a system call to know.
    """

    protocol: str
    tells_local: bool

    def receive(self, data: bytes) -> None: ...

    def next_event(self) -> Event | None: ...

    def send(self, reply: Reply) -> bytes: ...

    @property
    def trailing(self) -> bytes: ...

    def requested(self) -> bytes:
        """After `Connect`, before its answer: what another one of this kind needs to answer in its place."""

    def go_on(self, requested: bytes, asked: Connect) -> None:
        """Answer `asked` in place of the one that gave `requested`, in another process."""


def is_meant(value: str, wanted: str) -> bool:
    """Whether an operator who asks for `wanted` means this value: an address without a port means all its ports."""
    if value == wanted:
        return True
    host, _, port = value.rpartition(":")
    if not port.isdigit() or (":" in host and not host.startswith("[")):
        return False  # no port: a name, or an IPv6 address by itself
    return host.strip("[]") == wanted.strip("[]")


class Ending(enum.StrEnum):
    """How a relayed connection ended: the closed vocabulary of `outcome=` in the closing line and of the metrics.

    Who closed is who said FIN first; `KEPT` is a connection that went back to the pool.
    """

    CLIENT_CLOSED = "client_closed"
    UPSTREAM_CLOSED = "upstream_closed"
    KEPT = "kept"
    GREETING_4XX = "greeting_4xx"
    GREETING_5XX = "greeting_5xx"
    CLIENT_RESET = "client_reset"
    UPSTREAM_RESET = "upstream_reset"
    IDLE_TIMEOUT = "idle_timeout"
    HALF_CLOSE_TIMEOUT = "half_close_timeout"
    DRAIN_TIMEOUT = "drain_timeout"
    NO_LONGER_ALLOWED = "no_longer_allowed"
    CLOSED_BY_OPERATOR = "closed_by_operator"
    PROTOCOL_ERROR = "protocol_error"
    INTERNAL_ERROR = "internal_error"

    def after(self, refusal: str) -> Ending:
        """The same with what the receiver greeted with, "" if that was no refusal: then it is told instead of who
        closed, for that is why."""
        if not refusal or self not in _BY_CLOSING:
            return self
        return Ending.GREETING_4XX if refusal[0] == "4" else Ending.GREETING_5XX

    @property
    def is_clean(self) -> bool:
        """Nothing went wrong: `log_connections errors` leaves these out."""
        return self in _CLEAN


_CLEAN = frozenset({Ending.CLIENT_CLOSED, Ending.UPSTREAM_CLOSED, Ending.KEPT})
_BY_CLOSING = _CLEAN | {Ending.CLIENT_RESET, Ending.UPSTREAM_RESET}


class TlsSeen(NamedTuple):
    """TLS with a receiver, as it is told on a closing line.

    Args:
        certificate: who has proven it (`authority`, `dane`); what is wrong with it, in a word of RFC 8460 section 4.3;
            or `trusted`: nothing, but there was no name to compare.
        key: `RSA 2048`. subject: as RFC 4514 writes it.
        resumed: an earlier session went on, whose certificate this is.
    """

    version: str
    cipher: str
    certificate: str
    key: str
    subject: str
    resumed: bool = False


class TlsMode(enum.StrEnum):
    """TLS towards the receiver (native protocol: OPEN.tls); `IMPLICIT` is RFC 8314's port 465, the others STARTTLS."""

    NONE = "none"
    OPPORTUNISTIC = "opportunistic"
    REQUIRED = "required"
    IMPLICIT = "implicit"


class Discard(enum.StrEnum):
    """Why an outgoing SMTP connection is not kept: the closed list of logs, metrics and ENDED.reason."""

    # The client did not want it, or may not want it.
    NOT_OFFERED = "not_offered"
    DISABLED = "disabled"
    # What the dialogue was seen to do.
    OUTSTANDING = "replies_outstanding"
    IN_DATA = "in_data"
    PROTOCOL_ERROR = "protocol_error"
    LONE_DOT = "lone_dot"
    SAID_421 = "said_421"
    QUIT = "quit_seen"
    HELLO = "hello_seen"
    AUTH = "auth_seen"
    STARTTLS = "starttls_seen"
    BDAT = "bdat_seen"
    XCLIENT = "xclient_seen"
    UNKNOWN_VERB = "unknown_verb_seen"
    # RSET, or the watch over an idle connection.
    RSET_REFUSED = "rset_refused"
    UNREAD = "unread_bytes"
    TIMED_OUT = "timed_out"
    PEER_CLOSED = "peer_closed"
    PEER_SPOKE = "peer_spoke"
    # The pool's own rules.
    MAX_AGE = "max_age"
    MAX_IDLE = "max_idle"
    MAX_MESSAGES = "max_messages"
    PEER_LIMIT = "peer_limit"
    MAX_ERRORS = "max_errors"
    MAX_CACHED = "max_cached"
    MAX_CACHED_PER_DESTINATION = "max_cached_per_destination"
    YIELDED = "yielded"
    OVERLOADED = "overloaded"
    SOURCE_GONE = "source_gone"
    DRAINING = "draining"
