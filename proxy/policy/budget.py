"""How often an address may fail to prove who it is: a budget that refills, and what follows when it is used up.

Pure: the clock is an argument. Doors ask `exhausted` before they answer a failure, never before they look at a proof:
behind one NAT address there may be a good instance beside a bad one. An address is what `model.owner_of` makes of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

#: Failures that an address may make at once, and seconds until one of them is forgiven.
BUDGET = 10
REFILL_SECONDS = 6.0
#: Seconds that the answer to a failure is held back once the budget is used up.
SLOW_ANSWER = 2.0
_MAX_ADDRESSES = 10_000


class FailureBudget:
    """A leaky bucket of failures for each address; forgets the addresses that failed least recently.

    Attributes:
        tell: other processes of the proxy, of each failure: to all of them together an address has one budget.
    """

    def __init__(self) -> None:
        self.tell: Callable[[str], object] | None = None
        #: Address → (level of the bucket, when it was computed).
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def failed(self, address: str, now: float) -> None:
        """Count one failure; `now` in seconds of a monotonic clock."""
        self.failed_elsewhere(address, now)
        if self.tell is not None:
            self.tell(address)

    def failed_elsewhere(self, address: str, now: float) -> None:
        """Count one that another process tells of."""
        self._levels[address] = min(self._level(address, now), BUDGET) + 1.0, now
        self._levels.move_to_end(address)
        if len(self._levels) > _MAX_ADDRESSES:
            self._levels.popitem(last=False)

    def exhausted(self, address: str, now: float) -> bool:
        """Whether the address has failed so often that its next failure is answered late."""
        if address not in self._levels:
            return False
        level = self._level(address, now)
        if level <= 0.0:
            del self._levels[address]
        return level > BUDGET - 1

    def _level(self, address: str, now: float) -> float:
        level, at = self._levels.get(address, (0.0, now))
        return max(0.0, level - (now - at) / REFILL_SECONDS)
