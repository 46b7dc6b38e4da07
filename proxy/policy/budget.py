"""How often an address may fail to prove who it is: a budget that refills, and what follows when it is used up.

Pure: the clock is an argument. Doors ask `exhausted` before they listen to an address, and again before they answer a
failure. Whether there is a good client at an address, too, is known to the caller: behind one NAT address there may be
a good instance beside a bad one, so such an address is slowed but never shut out.
"""

from __future__ import annotations

from collections import OrderedDict

#: Failures that an address may make at once, and seconds until one of them is forgiven.
BUDGET = 10
REFILL_SECONDS = 6.0
#: Seconds that the answer to a failure is held back once the budget is used up.
SLOW_ANSWER = 2.0
_MAX_ADDRESSES = 10_000


class FailureBudget:
    """A leaky bucket of failures for each address; forgets the addresses that failed least recently."""

    def __init__(self) -> None:
        #: Address → (level of the bucket, when it was computed).
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def failed(self, address: str, now: float) -> None:
        """Count one failure; `now` in seconds of a monotonic clock."""
        self._levels[address] = min(self._level(address, now), BUDGET) + 1.0, now
        self._levels.move_to_end(address)
        if len(self._levels) > _MAX_ADDRESSES:
            self._levels.popitem(last=False)

    def exhausted(self, address: str, now: float) -> bool:
        """Whether the address has failed so often that it should not be listened to for the moment."""
        if address not in self._levels:
            return False
        level = self._level(address, now)
        if level <= 0.0:
            del self._levels[address]
        return level > BUDGET - 1

    def retry_after(self, address: str, now: float) -> float:
        """Seconds until the address is listened to again."""
        return max(0.0, (self._level(address, now) - (BUDGET - 1)) * REFILL_SECONDS)

    def _level(self, address: str, now: float) -> float:
        level, at = self._levels.get(address, (0.0, now))
        return max(0.0, level - (now - at) / REFILL_SECONDS)
