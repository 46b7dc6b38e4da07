"""A standard door's connection that goes on through another proxy: what this program does as an agent (`via`).

`front` has read the request. Here the other proxy is asked for the receiver, the client is answered, and a greenlet
carries the bytes, in frames on one side. Limits, source addresses and shared connections are the other proxy's; the
access rules of this one hold as well.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.doors.presence import while_client_stays
from proxy.egress.via import CalledOff, Channel, Via
from proxy.model import Ending, Route
from proxy.net.conversation import send_all
from proxy.net.pump import Pump
from proxy.net.relay import RawSocket
from proxy.net.tls import PlainStream
from proxy.policy.idleness import Idleness
from proxy.protocols.native import messages as m
from proxy.services import Services

#: Seconds: the longest deadline that an OPEN can have.
_LONGEST = 600.0
_CLEAN = frozenset({Ending.CLIENT_CLOSED, Ending.UPSTREAM_CLOSED})


class Through:
    """One connection. Housekeeping knows it as it knows a channel (`services.HostedChannel`).

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
        self.instance = instance
        self.run_id = b""
        self.up = 0
        self.down = 0
        self._services = services
        self._via = via
        self._client = client
        self._request = m.Open(
            source,
            [m.Address(*route.destination)],
            deadline_ms=max(1, int(min(within, _LONGEST) * 1000)),
            dialogue=dialogue,
        )
        self._pump: Pump | None = None
        self._idleness = Idleness()

    def open(self, early: bytes) -> tuple[Channel, m.Opened]:
        """Ask the other proxy; a client that goes away meanwhile calls it off.

        Args:
            early: what the client sent behind its handshake.

        Raises:
            ProxyError: no. OSError: the client is gone.
        """
        try:
            with while_client_stays(self._services.engine, self._client, early, thrown=CalledOff):
                return self._via.open(self._request)
        except CalledOff:
            raise ConnectionResetError from None

    def carry(self, channel: Channel, first: bytes, answered: Callable[[], None]) -> Ending:
        """Bytes both ways until the end, which the other proxy is told; the channel is given back or closed.

        Args:
            first: what the client sent behind its handshake.
            answered: is called before anything is carried, to tell the client that it is connected.
        """
        channels = self._services.instances.channels
        client = PlainStream(self._client)
        pump = self._pump = Pump(self._services.engine, client, channel.stream)
        channels[self] = None
        ending = Ending.CLIENT_RESET
        try:
            answered()
            send_all(self._services.engine, channel.stream, first)
            ending = pump.run()
        except OSError:
            pass  # the client could not be answered
        finally:
            del channels[self]
            self.up, self.down = pump.up + len(first), pump.down
            if ending in _CLEAN and channel.end():
                self._via.give(channel)
            else:
                self._via.close(channel)
        return ending

    # ---------------------------------------------------------------- as a `services.HostedChannel`

    def goaway(self, seconds: float, reason: str, ending: Ending) -> None:
        """There is nobody to be told: the client's protocol has no such word. A drain cuts what is left."""

    def cut(self, ending: Ending) -> None:
        if self._pump is not None:
            self._pump.cut(ending)

    def sweep(self, now: float) -> None:
        """Byte progress, as the relay counts it."""
        pump = self._pump
        if pump is None:
            return
        ending = self._idleness.over(pump.up + pump.down, pump.half_closed, self._services.settings, now)
        if ending is not None:
            pump.cut(ending)
