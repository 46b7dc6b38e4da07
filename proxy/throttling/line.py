"""The line at one throttle: requests for places by owner, and whose turn is next.

The owner that would have the fewest places there, relative to its weight, with one more; among equals the one served
longest ago. But an owner without any place waits at most for so many turns as its weight is a part of all weights in
the line: the next whole place may be more than a small weight ever gets. Only the order: who stands in which line, and
who gets in, is decided in `places`.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush, heapreplace
from typing import Generic, TypeVar

from proxy.throttling.throttle import Meter

Waiting = TypeVar("Waiting", bound="Request")


class Request:
    """Somebody's wish for a place. `owner`: fairness is among owners. `number`: who came first has the smaller one."""

    __slots__ = ("number", "owner", "weight")

    def __init__(self, owner: str, weight: float) -> None:
        self.owner = owner
        self.weight = weight
        self.number = 0


class Line(Generic[Waiting]):
    """Requests at one throttle by owner, and whose turn is next.

    Args:
        now: when the first one comes.

    Attributes:
        size: how many stand here. claim: for whom the next place is kept, wherever it stands.
    """

    __slots__ = (
        *("_began", "_clock", "_due", "_heap", "_keys", "_owners", "_passed", "_poor", "_served", "_turn", "_weight"),
        *("_away", "_weights", "claim", "size"),
    )

    def __init__(self, now: int) -> None:
        self._began = now
        self._passed = 0
        self._owners: dict[str, deque[Waiting]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._keys: dict[str, tuple[float, int, str]] = {}  # of each owner its last entry in the heap
        self._served: dict[str, int] = {}
        self._turn = 0
        self._weights: dict[str, float] = {}
        self._weight = 0.0  # of all owners in the line
        self._clock = 0.0  # grows with each turn by its part of all weights, so by 1/w while w of them pass
        self._due: dict[str, float] = {}  # when it is the turn of an owner who has no place
        self._poor: list[tuple[float, str]] = []  # a heap of all who may be such, each once
        self._away: dict[str, float] = {}  # turns until it is that of an owner who has yet to come back
        self.size = 0
        self.claim: Waiting | None = None

    def add(self, ticket: Waiting, meter: Meter) -> None:
        self.size += 1
        owner = ticket.owner
        tickets = self._owners.get(owner)
        if tickets is not None:
            tickets.append(ticket)
            return
        weight = ticket.weight
        self._owners[owner] = deque((ticket,))
        self._weights[owner] = weight
        self._weight += weight
        if owner not in self._served:  # a newcomer comes after those who wait
            self._turn += 1
            self._served[owner] = self._turn
        if owner not in self._due:
            due = self._due[owner] = self._clock + self._away.pop(owner, 1 / weight)
            heappush(self._poor, (due, owner))
        self.rank(owner, meter)

    def rank(self, owner: str, meter: Meter) -> None:
        """Note the owner's order anew: it joined, it was served, or its number of places changed."""
        tickets = self._owners.get(owner)
        if tickets is None:
            return
        held, heap = meter.held, self._heap
        places = held.get(owner, 0) + 1 if held else 1
        key = self._keys[owner] = (places / tickets[0].weight, self._served[owner], owner)
        heappush(heap, key)
        if len(heap) > 64 + 4 * len(self._owners):
            self._compact()

    def _compact(self) -> None:
        """Drop the entries that are out of date, and the turns of owners who do not wait."""
        self._served = {owner: turn for owner, turn in self._served.items() if owner in self._owners}
        self._heap = sorted(self._keys.values())

    def _first(self, meter: Meter) -> str | None:
        """Whose turn it is. Entries of the heap that are out of date are dropped: newer ones say it better."""
        poor = self._poor
        if poor and poor[0][0] <= self._clock and (overdue := self._overdue(meter)) is not None:
            return overdue
        heap, keys = self._heap, self._keys
        while heap:
            first = heap[0]
            owner = first[2]
            if keys.get(owner) == first:
                return owner
            heappop(heap)
        return None

    def _overdue(self, meter: Meter) -> str | None:
        """An owner without a place that has waited for as many turns as it should at most."""
        poor = self._poor
        while poor and poor[0][0] <= self._clock:
            due, owner = poor[0]
            if owner not in self._owners:
                heappop(poor)
                del self._due[owner]
            elif self._due[owner] > due:
                heapreplace(poor, (self._due[owner], owner))
            elif meter.holds(owner):
                self._due[owner] = self._clock + 1 / self._weights[owner]
            else:
                return owner
        return None

    def goes_before(self, ticket: Waiting, meter: Meter) -> bool:
        """Whether it would be the turn of `ticket` here, which stands in another line.

        Before others of its owner it goes only if it came before them: they may want another path.
        """
        first = self._first(meter)
        if first is None:
            return True
        if first == ticket.owner:
            return ticket.number < self._owners[first][0].number
        if first == self._overdue(meter):
            return False
        return (meter.holds(ticket.owner) + 1) / ticket.weight <= self._keys[first][0]

    def peek(self, meter: Meter) -> Waiting | None:
        """The ticket whose turn it is; it stays."""
        owner = self._first(meter)
        return None if owner is None else self._owners[owner][0]

    def served(self, ticket: Waiting) -> None:
        """`ticket`, whose turn it is (see `peek`), leaves the line; its owner is to be ranked anew."""
        owner = ticket.owner
        self._owners[owner].popleft()
        self._turn += 1
        self._served[owner] = self._turn
        self._left(owner)

    def got_in(self, ticket: Waiting) -> None:
        """`ticket` gets a place here, wherever it stood."""
        self._passed += 1
        if self._owners:
            self._clock += 1 / self._weight
        due = self._due.get(ticket.owner)
        if due is not None:
            clock = self._clock
            self._due[ticket.owner] = (clock if clock > due else due) + 1 / ticket.weight

    def remove(self, ticket: Waiting, meter: Meter) -> None:
        self._owners[ticket.owner].remove(ticket)
        self._left(ticket.owner)
        self.rank(ticket.owner, meter)

    def _left(self, owner: str) -> None:
        self.size -= 1
        self._keys.pop(owner, None)  # it is to be ranked anew
        if not self._owners[owner]:
            del self._owners[owner]
            self._weight -= self._weights.pop(owner)

    def leave(self) -> tuple[int, int, list[tuple[str, float | None]]]:
        """What another line at this throttle needs to go on: since when it stands, how many got in, and the owners in
        the order in which they were served, with the turns until each must be (None: it has places)."""
        dues = {owner: max(0.0, due - self._clock) for owner, due in self._due.items()} | self._away
        owners = sorted(self._served, key=self._served.__getitem__)
        return self._began, self._passed, [(owner, dues.get(owner)) for owner in owners]

    def follow(self, passed: int) -> None:
        """Go on where another line was (see `leave`); who stood there is to join."""
        self._passed = passed

    def expect(self, owner: str, due: float | None) -> None:
        """One of those, in their order."""
        self._turn += 1
        self._served[owner] = self._turn
        if due is not None:
            self._away[owner] = due

    def outlook(self, now: int) -> int | None:
        """How long it takes until all who stand here got in, at the pace so far; None: nobody did yet."""
        return (now - self._began) * self.size // self._passed if self._passed else None

    def waiting(self) -> dict[str, tuple[int, float]]:
        """Owner → number of its tickets, and its weight."""
        return {owner: (len(tickets), tickets[0].weight) for owner, tickets in self._owners.items()}
