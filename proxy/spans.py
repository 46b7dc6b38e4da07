"""How long things take, and how large they are: histograms for `/metrics`, one set for the process.

Plain lists that the path adds to directly; nobody waits, and nothing is ever taken away. Which there are is a closed
list, and their bounds are those of a chart: a factor of two or so from one to the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_TURNS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_CALLS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_BYTES = (1e3, 4e3, 1.6e4, 6.4e4, 2.56e5, 1e6, 4e6, 1.6e7, 6.4e7)
_COUNTS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 1000.0)


class Histogram:
    """Observations by size.

    Args:
        bounds: upper ends of the classes, in order; what is larger than all has a class of its own.

    Attributes:
        counts: of each class, one more than bounds. total: the sum of all observations. first: the lowest bound.
    """

    __slots__ = ("bounds", "counts", "first", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.first = self.bounds[0]
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


#: What there is in `Spans`.
OBSERVED = ("bytes", "connect", "messages", "place", "session", "slot", "store", "tls", "turn")


class Spans:
    """All of them.

    Attributes:
        connect: seconds until a receiver was connected. tls: seconds of a TLS handshake with one. place: seconds of
            waiting for a place under the throttles, slot: for a message's slot, where the proxy sees messages; both
            with those that did not have to wait. session: seconds from the client's request to the end. turn: seconds
            of work between two looks at the sockets, in which nobody else is served. bytes: from client to receiver in
            a session; messages: of a session whose dialogue is seen. store: seconds of a call to the throttle store.
    """

    __slots__ = OBSERVED

    def __init__(self) -> None:
        self.connect = Histogram(_SECONDS)
        self.tls = Histogram(_SECONDS)
        self.place = Histogram(_LONG)
        self.slot = Histogram(_LONG)
        self.session = Histogram(_LONG)
        self.turn = Histogram(_TURNS)
        self.bytes = Histogram(_BYTES)
        self.messages = Histogram(_COUNTS)
        self.store = Histogram(_CALLS)


#: Of this process.
SPANS: Final = Spans()
