"""A connection that the kernel redirected to us: it says nothing of its own, its first bytes are a receiver's greeting.

Where it was meant for is known before its first byte (`net.redirect`), so this handshake yields its request at once. A
failure is said as an SMTP server would say it, as on the PROXY protocol's door.
"""

from __future__ import annotations

from proxy.errors import PeerError
from proxy.model import Accepted, Connect, Endpoint, Event, Reply, Route
from proxy.protocols.smtp.refusal import refusal


class Redirected:
    """One redirected client: yields one `Connect`.

    Args:
        host_name: this proxy's name in its 421 greetings.
        destination: where the client meant to connect to; None: the kernel knows of no redirection.
        source: the address that the client is bound to, if it is one to leave from; else None.
    """

    __slots__ = ("_destination", "_done", "_host_name", "_source")

    protocol = "redirect"
    tells_local = False
    trailing = b""

    def __init__(self, host_name: str, destination: Endpoint | None, source: str | None) -> None:
        self._host_name = host_name
        self._destination = destination
        self._source = source
        self._done = False

    def receive(self, data: bytes) -> None:
        """Nothing is read: the client waits for a greeting, or its bytes are the receiver's."""
        raise AssertionError("a redirected connection has no handshake of its own")

    def next_event(self) -> Event | None:
        """The request.

        Raises:
            PeerError: nobody redirected this connection; it was made to the listener itself.
        """
        if self._done:
            return None
        if self._destination is None:
            raise PeerError("this connection was not redirected: clients do not connect to listen_redirect themselves")
        return Connect(Route(self._source, self._destination))

    def send(self, reply: Reply) -> bytes:
        """Nothing for `Accepted`; for an error a 421 greeting."""
        self._done = True
        return b"" if isinstance(reply, Accepted) else refusal(self._host_name, reply)

    def requested(self) -> bytes:
        """See `Handshake`."""
        return b""

    def go_on(self, requested: bytes, asked: Connect) -> None:
        """See `Handshake`. It knows nothing else anyway."""
