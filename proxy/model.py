"""The frozen vocabulary that all rooms share: endpoints, routes, what a handshake asks and what it is answered.

Three front doors speak three protocols, and `front` must not know which one it holds. So each protocol is a *handshake*
object (see `Handshake`) that turns bytes into the events below and replies into bytes. It never touches a socket.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import NamedTuple, Protocol

from proxy.errors import ProxyError


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
    """The canonical text form of an IP address.

    Raises:
        ValueError: not an IP address, or one with a zone.
    """
    address = ip_address(text)
    if getattr(address, "scope_id", None):
        raise ValueError(f"{text!r} has a zone")
    return str(address)


class Route(NamedTuple):
    """What a client asks for: leave from `source` (None: the proxy chooses) to `destination`."""

    source: str | None
    destination: Endpoint


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


Event = Login | BindSource | Connect | HealthCheck


class Accepted(NamedTuple):
    """The request is granted; `local` is the real address of the outgoing socket (port 0: not yet connected)."""

    local: Endpoint | None = None


Reply = Accepted | ProxyError


class Handshake(Protocol):
    """The one shape of every front door's protocol. Pure: bytes in, events out; replies in, bytes out.

    Use: `receive` what came, then `next_event` until it returns None (more bytes are needed), answering each event with
    `send` before asking for the next. `next_event` raises `PeerError` for bytes that the protocol does not allow; `send`
    of that error gives what the protocol can say about it, perhaps nothing. After `Connect` was accepted, `trailing`
    holds the bytes that came behind the handshake: they go upstream first.
    """

    protocol: str

    def receive(self, data: bytes) -> None: ...

    def next_event(self) -> Event | None: ...

    def send(self, reply: Reply) -> bytes: ...

    @property
    def trailing(self) -> bytes: ...
