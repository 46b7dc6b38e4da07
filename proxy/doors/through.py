"""A standard door's connection that goes on through another proxy: what this program does as an agent (`via`).

`front` has read the request. Here the other proxy is asked for the receiver, the client is answered, and a greenlet
carries the bytes, in frames on one side. Limits, source addresses and shared connections are the other proxy's; the
access rules of this one hold as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.doors.carriage import Carriage
from proxy.doors.presence import Presence
from proxy.egress.via import CalledOff, Channel, Via
from proxy.model import Ending, Route
from proxy.net.relay import RawSocket
from proxy.net.tls import Stream
from proxy.protocols.native import messages as m
from proxy.services import Services

#: Seconds: the longest deadline that an OPEN can have.
_LONGEST: Final = 600.0
_CLEAN: Final = frozenset({Ending.CLIENT_CLOSED, Ending.UPSTREAM_CLOSED})


class Through(Carriage):
    """One connection.

    Args:
        client: its socket, registered, past its handshake.
        instance: the client's name, or "".
        source: the address to leave from; None: the other proxy's choice.
        dialogue: whether the other proxy is to take part in the SMTP dialogue.
        within: seconds in which the client must have its answer; the other proxy is told.
    """

    def __init__(
        self,
        services: Services,
        via: Via,
        client: RawSocket,
        instance: str,
        route: Route,
        source: str | None,
        dialogue: bool,
        within: float,
    ) -> None:
        super().__init__(services, instance)
        self._via = via
        self._client = client
        self._request = m.Open(
            source,
            [m.Address(*route.destination)],
            deadline_ms=max(1, int(min(within, _LONGEST) * 1000)),
            dialogue=dialogue,
        )

    def open(self, early: bytes, more: Callable[[], bool] | None = None) -> tuple[Channel, m.Opened]:
        """Ask the other proxy; a client that goes away meanwhile calls it off.

        Args:
            early: what the client sent behind its handshake. more: see `Presence`.

        Raises:
            ProxyError: no. OSError: the client is gone.
        """
        try:
            with Presence(self._services.engine, self._client, early, thrown=CalledOff, more=more):
                return self._via.open(self._request)
        except CalledOff:
            raise ConnectionResetError from None

    def carry(self, channel: Channel, client: Stream, first: bytes, answered: Callable[[], None]) -> Ending:
        """Bytes both ways until the end, which the other proxy is told; the channel is given back or closed.

        Args:
            first, answered: see `Carriage.run`.
        """
        ending = Ending.CLIENT_RESET
        try:
            ending = self.run(client, channel.stream, first, answered)
        finally:
            if ending in _CLEAN and channel.end():
                self._via.give(channel)
            else:
                self._via.close(channel)
        return ending
