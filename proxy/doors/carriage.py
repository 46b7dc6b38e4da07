"""A standard door's connection whose bytes a greenlet carries, since one of its sides is more than a raw socket.

What is TLS on the client's side, and what goes on through another proxy in frames. Raw sockets are the relay's.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.model import Ending
from proxy.net.conversation import send_all
from proxy.net.pump import AnyStream, Pump
from proxy.policy.idleness import Idleness
from proxy.services import Services


class Carriage:
    """One connection. Housekeeping knows it as it knows a channel (`services.HostedChannel`).

    Args:
        instance: the client's name, or "".

    Attributes:
        up, down: bytes towards the receiver, and towards the client.
        delivered: when it is over: all that the receiver said, and its end, was handed to the client.
    """

    def __init__(self, services: Services, instance: str) -> None:
        self.instance = instance
        self.run_id = b""
        self.up = 0
        self.down = 0
        self.delivered = False
        self._services = services
        self._pump: Pump | None = None
        self._idleness = Idleness()

    def run(
        self,
        client: AnyStream,
        receiver: AnyStream,
        first: bytes,
        answered: Callable[[], object],
        heard: Callable[[bytes], None] | None = None,
    ) -> Ending:
        """Bytes both ways until the end. Closes nothing; what else is thrown in: the program wants it to end.

        Args:
            client, receiver: set up, their sockets registered with the engine.
            first: what the client sent behind its handshake.
            answered: is called before anything is carried, to tell the client that it is connected.
            heard: is told the receiver's first bytes.
        """
        channels = self._services.instances.channels
        pump = self._pump = Pump(self._services.engine, client, receiver, heard)
        channels[self] = None
        ending = Ending.CLIENT_RESET
        try:
            answered()
            send_all(self._services.engine, receiver, first)
            ending = pump.run()
        except OSError:
            pass  # the client could not be answered
        finally:
            del channels[self]
            self.delivered = pump.delivered
            self.up, self.down = pump.up + len(first), pump.down
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
