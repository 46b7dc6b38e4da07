"""The line at one throttle: requests for places by owner, and whose turn is next.

The owner that would have the fewest places there, relative to its weight, with one more; among equals the one served
longest ago. But an owner without any place waits at most for so many turns as its weight is a part of all weights in
the line: the next whole place may be more than a small weight ever gets. Only the order: who stands in which line, and
who gets in, is decided in `places`.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import Generic, TypeVar

from proxy.throttling.throttle import Meter

Waiting = TypeVar("Waiting", bound="Request")


class Request:
    """Somebody's wish for a place. `owner`: fairness is among owners."""

    __slots__ = ("owner", "weight")

    def __init__(self, owner: str, weight: float) -> None:
        self.owner = owner
        self.weight = weight


class Line(Generic[Waiting]):
    """Requests at one throttle by owner, and whose turn is next.

    Args:
        now: when the first one comes.

    Attributes:
        size: how many stand here. claim: for whom the next place is kept, wherever it stands.
    """

    __slots__ = (
        *("_began", "_clock", "_due", "_heap", "_owners", "_passed", "_poor", "_served", "_turn", "_weight"),
        *("_weights", "claim", "size"),
    )

    def __init__(self, now: int) -> None:
        self._began = now
        self._passed = 0
        self._owners: dict[str, deque[Waiting]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._served: dict[str, int] = {}
        self._turn = 0
        self._weights: dict[str, float] = {}
        self._weight = 0.0  # of all owners in the line
        self._clock = 0.0  # grows with each turn by its part of all weights, so by 1/w while w of them pass
        self._due: dict[str, float] = {}  # when it is the turn of an owner who has no place
        self._poor: list[tuple[float, str]] = []  # a heap of those
        self.size = 0
        self.claim: Waiting | None = None

    def add(self, ticket: Waiting, meter: Meter) -> None:
        owner = self._owners.get(ticket.owner)
        if owner is None:
            owner = self._owners[ticket.owner] = deque()
            self._weights[ticket.owner] = ticket.weight
            self._weight += ticket.weight
            if ticket.owner not in self._served:  # a newcomer comes after those who wait
                self._turn += 1
                self._served[ticket.owner] = self._turn
                self._due[ticket.owner] = self._clock + 1 / ticket.weight
        owner.append(ticket)
        self.size += 1
        self.rank(ticket.owner, meter)

    def rank(self, owner: str, meter: Meter) -> None:
        """Note the owner's order anew: it joined, or its number of places changed."""
        if owner in self._owners:
            heappush(self._heap, self._key(owner, meter))
            if not meter.holds(owner):
                heappush(self._poor, (self._due[owner], owner))
            if len(self._heap) > 64 + 4 * len(self._owners):
                self._compact(meter)

    def _compact(self, meter: Meter) -> None:
        """Drop the entries that are out of date, and the turns of owners who do not wait."""
        self._served = {owner: turn for owner, turn in self._served.items() if owner in self._owners}
        self._due = {owner: due for owner, due in self._due.items() if owner in self._owners}
        self._heap = sorted(self._key(owner, meter) for owner in self._owners)
        self._poor = sorted((self._due[owner], owner) for owner in self._owners if not meter.holds(owner))

    def _key(self, owner: str, meter: Meter) -> tuple[float, int, str]:
        return _with_one_more(owner, self._owners[owner][0].weight, meter), self._served.get(owner, 0), owner

    def _first(self, meter: Meter) -> str | None:
        """Whose turn it is. Entries of the heaps that are out of date are dropped: newer ones say it better."""
        owner = self._overdue(meter)
        if owner is not None:
            return owner
        while self._heap:
            owner = self._heap[0][2]
            if owner in self._owners and self._heap[0] == self._key(owner, meter):
                return owner
            heappop(self._heap)
        return None

    def _overdue(self, meter: Meter) -> str | None:
        """An owner without a place that has waited for as many turns as it should at most."""
        while self._poor and self._poor[0][0] <= self._clock:
            due, owner = self._poor[0]
            if owner in self._owners and due == self._due[owner] and not meter.holds(owner):
                return owner
            heappop(self._poor)
        return None

    def goes_before(self, ticket: Waiting, meter: Meter) -> bool:
        """Whether it would be the turn of `ticket` here, which stands in another line."""
        first = self._first(meter)
        if first is None or first == self._overdue(meter):
            return first is None or first == ticket.owner
        own = _with_one_more(ticket.owner, ticket.weight, meter)
        return own <= _with_one_more(first, self._owners[first][0].weight, meter)

    def next(self, meter: Meter) -> Waiting | None:
        """The ticket whose turn it is; it leaves the line."""
        owner = self._first(meter)
        if owner is None:
            return None
        ticket = self._owners[owner].popleft()
        self._turn += 1
        self._served[owner] = self._turn
        self._left(owner)
        self.rank(owner, meter)
        return ticket

    def got_in(self, ticket: Waiting) -> None:
        """`ticket` gets a place here, wherever it stood."""
        self._passed += 1
        if self._owners:
            self._clock += 1 / self._weight
        if ticket.owner in self._due:
            self._due[ticket.owner] = max(self._clock, self._due[ticket.owner]) + 1 / ticket.weight

    def remove(self, ticket: Waiting, meter: Meter) -> None:
        self._owners[ticket.owner].remove(ticket)
        self._left(ticket.owner)
        self.rank(ticket.owner, meter)

    def _left(self, owner: str) -> None:
        self.size -= 1
        if not self._owners[owner]:
            del self._owners[owner]
            self._weight -= self._weights.pop(owner)

    def outlook(self, now: int) -> int | None:
        """How long it takes until all who stand here got in, at the pace so far; None: nobody did yet."""
        return (now - self._began) * self.size // self._passed if self._passed else None

    def waiting(self) -> dict[str, tuple[int, float]]:
        """Owner → number of its tickets, and its weight."""
        return {owner: (len(tickets), tickets[0].weight) for owner, tickets in self._owners.items()}


def _with_one_more(owner: str, weight: float, meter: Meter) -> float:
    """The owner's places after the next one, relative to its weight."""
    return (meter.holds(owner) + 1) / weight
