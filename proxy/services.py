"""What a connection needs to be served, in one frozen bundle.

A reload makes a new bundle and leaves the old one to the connections that began with it. The parts that live as long as
the program (engine, counters, gauges, crew) are the same object in each; those that follow from the settings are new.
"""

from __future__ import annotations

import contextlib
import itertools
from _socket import SHUT_RDWR
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from proxy.access import Access
from proxy.crew import Crew
from proxy.relay import Engine, RawSocket
from proxy.settings import Settings
from proxy.stats import Counters


class Gauges:
    """What goes up and down. `outgoing`: sockets towards receivers that serve a client, or are set up for one."""

    __slots__ = ("outgoing",)

    def __init__(self) -> None:
        self.outgoing = 0


#: Numbers connections and SMTP sessions in the log.
numbers: Iterator[int] = itertools.count(1)


class Newcomers:
    """Connections that have not said yet who they are, oldest first; beyond the limit the oldest is cut off.

    Who floods us with silent connections pushes out its own. Only those that must be waited for are entered.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.dropped = 0
        self._sockets: OrderedDict[object, RawSocket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sockets)

    def enter(self, who: object, sock: RawSocket) -> None:
        """Whoever waits for this socket sees the end of the file when it is cut off."""
        self._sockets[who] = sock
        if len(self._sockets) > self.limit:
            _, oldest = self._sockets.popitem(last=False)
            self.dropped += 1
            with contextlib.suppress(OSError):
                oldest.shutdown(SHUT_RDWR)

    def leave(self, who: object) -> None:
        """Is known now, or gone; also after it was cut off."""
        self._sockets.pop(who, None)


@dataclass(frozen=True, slots=True)
class Services:
    """Wired by `server`, read by everything that serves a connection.

    Args:
        host_name: this proxy's name in what it says as an SMTP server.
    """

    settings: Settings
    access: Access
    engine: Engine
    counters: Counters
    gauges: Gauges
    crew: Crew
    newcomers: Newcomers
    host_name: str
