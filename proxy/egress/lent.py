"""Places of the master's that are held in this process: under which throttles, and which of these are wanted by others.

They are named by their number; their throttles are names here, and nothing more, each known for as long as a place
under it is held.
"""

from __future__ import annotations

from proxy.protocols import seam
from proxy.protocols.seam import ThrottleName
from proxy.throttling.flows import Places, Throttle
from proxy.throttling.throttle import Key


class Lent(Places):
    """Places of another process; `number` is their name there."""

    __slots__ = ()


class Loans:
    """All of them."""

    def __init__(self) -> None:
        self._throttles: dict[ThrottleName, Throttle] = {}
        self._held: dict[Throttle, int] = {}  # how many
        self._wanted: set[Throttle] = set()

    def take(self, record: seam.Placed | seam.Swapped, owner: str, weight: float) -> Places | None:
        """What the master has given; None: none are needed."""
        if not record.number:
            return None
        held = self._held
        throttles = tuple([self._throttle(name) for name in record.throttles])
        for throttle in throttles:
            held[throttle] = held.get(throttle, 0) + 1
        for index in record.wanted:
            self._wanted.add(throttles[index])
        return Lent(record.number, owner, weight, throttles, ())

    def drop(self, places: Places) -> None:
        """They are not held here any more."""
        places.open = False
        for throttle in places.throttles:
            left = self._held[throttle] - 1
            if left:
                self._held[throttle] = left
            else:
                del self._held[throttle]
                del self._throttles[name_of(throttle)]
                self._wanted.discard(throttle)

    def under(self, name: ThrottleName) -> Throttle | None:
        """The throttle, if any are held under it."""
        return self._throttles.get(name)

    def wanted(self, places: Places) -> bool:
        """Whether somebody waits for one of them."""
        return not self._wanted.isdisjoint(places.throttles)

    def is_wanted(self, name: ThrottleName, wanted: bool) -> None:
        """Whether anybody waits under this throttle."""
        throttle = self._throttles.get(name)
        if throttle is None:
            return
        if wanted:
            self._wanted.add(throttle)
        else:
            self._wanted.discard(throttle)

    def nobody_waits(self) -> None:
        self._wanted.clear()

    def _throttle(self, name: ThrottleName) -> Throttle:
        throttle = self._throttles.get(name)
        if throttle is None:
            throttle = self._throttles[name] = Throttle(Key(*name))
        return throttle


def name_of(throttle: Throttle) -> ThrottleName:
    """As it is told to a worker."""
    key = throttle.key
    return key.source, key.name, key.receiver
