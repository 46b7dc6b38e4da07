"""The line at one throttle: requests for places by owner, and whose turn is next.

The owner with the fewest places there relative to its weight; among equals the one served longest ago. Only the order:
who stands in which line, and who gets in, is decided in `places`.
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
    """

    __slots__ = ("_began", "_heap", "_owners", "_passed", "_served", "_turn", "size")

    def __init__(self, now: int) -> None:
        self._began = now
        self._passed = 0
        self._owners: dict[str, deque[Waiting]] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._served: dict[str, int] = {}
        self._turn = 0
        self.size = 0

    def add(self, ticket: Waiting, meter: Meter) -> None:
        owner = self._owners.get(ticket.owner)
        if owner is None:
            owner = self._owners[ticket.owner] = deque()
            if ticket.owner not in self._served:  # a newcomer comes after those who wait
                self._turn += 1
                self._served[ticket.owner] = self._turn
        owner.append(ticket)
        self.size += 1
        self.rank(ticket.owner, meter)

    def rank(self, owner: str, meter: Meter) -> None:
        """Note the owner's order anew: it joined, or its number of places changed."""
        if owner in self._owners:
            heappush(self._heap, self._key(owner, meter))
            if len(self._heap) > 64 + 4 * len(self._owners):
                self._compact(meter)

    def _compact(self, meter: Meter) -> None:
        """Drop the entries that are out of date, and the turns of owners who do not wait."""
        self._served = {owner: turn for owner, turn in self._served.items() if owner in self._owners}
        self._heap = sorted(self._key(owner, meter) for owner in self._owners)

    def _key(self, owner: str, meter: Meter) -> tuple[float, int, str]:
        return meter.holds(owner) / self._owners[owner][0].weight, self._served.get(owner, 0), owner

    def next(self, meter: Meter) -> Waiting | None:
        """The ticket whose turn it is; it leaves the line."""
        while self._heap:
            owner = self._heap[0][2]
            tickets = self._owners.get(owner)
            if tickets is None or self._heap[0] != self._key(owner, meter):
                heappop(self._heap)  # out of date: a newer entry says it better
                continue
            ticket = tickets.popleft()
            self._left(owner)
            self._turn += 1
            self._passed += 1
            self._served[owner] = self._turn
            self.rank(owner, meter)
            return ticket
        return None

    def remove(self, ticket: Waiting, meter: Meter) -> None:
        self._owners[ticket.owner].remove(ticket)
        self._left(ticket.owner)
        self.rank(ticket.owner, meter)

    def _left(self, owner: str) -> None:
        self.size -= 1
        if not self._owners[owner]:
            del self._owners[owner]

    def outlook(self, now: int) -> int | None:
        """How long it takes until all who stand here had a turn, at the pace so far; None: nobody had one yet."""
        return (now - self._began) * self.size // self._passed if self._passed else None

    def waiting(self) -> dict[str, tuple[int, float]]:
        """Owner → number of its tickets, and its weight."""
        return {owner: (len(tickets), tickets[0].weight) for owner, tickets in self._owners.items()}
