"""Connection places: who may open a connection now, and who is next.

A place belongs to a socket of the proxy: connecting, open, being cleaned, cached and draining ones all hold theirs, and
give them back when the socket is closed. `admit` decides and takes in one call, all throttles of a request or none.
Who does not get in holds a ticket, which stands in the line of the first throttle that is in its way and takes nothing
anywhere. When a place comes free, the owner with the fewest places relative to its weight is served; among equals the
one served longest ago, so that fewer places than owners go round.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from proxy.throttling.flows import Flow, Places, Throttle, Ticket
from proxy.throttling.line import Line
from proxy.throttling.throttle import MILLISECOND
from proxy.throttling.wheel import Wheel


class Gate(Protocol):
    """Whether a flow itself keeps connections waiting (paused, or a debt to pay)."""

    def __call__(self, flow: Flow) -> bool: ...


class PlaceBook:
    """Takes and frees places.

    Attributes:
        admitted: tickets that got in and were not yet collected.
        blocked: full throttles that a ticket began to wait under.
        crowded: throttles whose line or occupancy changed while somebody waits.
        idle: throttles where nobody waits or holds a place any more.
        wheel: throttles that count connections and whose next slot is what tickets wait for.
    """

    def __init__(self, shut: Gate) -> None:
        self.admitted: list[Ticket] = []
        self.blocked: dict[Throttle, None] = {}
        self.crowded: dict[Throttle, None] = {}
        self.idle: dict[Throttle, None] = {}
        self.wheel: Wheel[Throttle] = Wheel(MILLISECOND)
        self._shut = shut

    def admit(
        self,
        owner: str,
        weight: float,
        throttles: Iterable[Throttle],
        flows: tuple[Flow, ...],
        now: int,
        rated: bool = True,
    ) -> Places | Ticket:
        """Places under every one of `throttles`, or a ticket; nothing in between.

        Args:
            rated: it takes a slot of those that count connections, too. One that does not is not held up by those who
                wait for slots only; but once it waits for a place, it stands in the same line.
        """
        ticket = Ticket(owner, weight, tuple(dict.fromkeys(throttles)), flows, rated)
        self._try(ticket, now)
        return ticket.places or ticket

    def swap(
        self,
        old: Places,
        owner: str,
        weight: float,
        throttles: Sequence[Throttle],
        flows: tuple[Flow, ...],
        now: int,
        rated: bool = True,
    ) -> Places | None:
        """A cached connection changes hands: the places of its old path for those of the new one, in one step.

        Throttles on both paths keep their place, which only changes its owner. None: a throttle that is new to it is
        full, somebody waits there, or the flow is shut; then nothing changed.
        """
        wanted = tuple(dict.fromkeys(throttles))
        fresh = [throttle for throttle in wanted if throttle not in old.throttles]
        if not old.open or any(self._shut(flow) for flow in flows):
            return None
        if any(self._busy(each, now, rated) for each in fresh):
            return None
        old.open = False
        self._leave(old)
        new = self._enter(Ticket(owner, weight, wanted, flows, rated), frozenset(fresh), now)
        for throttle in old.throttles:
            if throttle not in wanted:
                self.pump(throttle, now)
        return new

    def release(self, places: Places, now: int) -> None:
        """The socket is closed. A second time does nothing."""
        if not places.open:
            return
        places.open = False
        self._leave(places)
        for throttle in places.throttles:
            self.pump(throttle, now)

    def cancel(self, ticket: Ticket, now: int) -> None:
        """Nobody waits for `ticket` any more; places that it got meanwhile are given back."""
        if ticket.places is not None:
            self.release(ticket.places, now)
        elif ticket.waiting:
            self._unline(ticket)
        ticket.waiting = False

    def pump(self, throttle: Throttle, now: int) -> None:
        """Let in who can get in under `throttle` now."""
        while (line := throttle.line) is not None and not self._full(throttle, now):
            ticket = line.next(throttle)
            self._drop_empty(throttle)
            if ticket is None:
                return
            self._moved(ticket, -1)
            if self._try(ticket, now, passed=throttle):
                self.admitted.append(ticket)
        if throttle.line is not None:
            self.crowded[throttle] = None

    def retry(self, flow: Flow, now: int) -> None:
        """`flow` is open again: its tickets go on to the throttles."""
        tickets, flow.gated = flow.gated or [], None
        for ticket in tickets:
            self._moved(ticket, -1)
            if self._try(ticket, now):
                self.admitted.append(ticket)

    # --- steps ---

    def _try(self, ticket: Ticket, now: int, passed: Throttle | None = None) -> bool:
        """Take all places for `ticket`, or put it where it has to wait; `passed`: its turn in that line has come."""
        for flow in ticket.flows:
            if self._shut(flow):
                ticket.blocker = flow
                if flow.gated is None:
                    flow.gated = []
                flow.gated.append(ticket)
                self._moved(ticket, +1)
                return False
        for throttle in ticket.throttles:
            passes = throttle is passed
            if self._full(throttle, now, ticket.rated) if passes else self._busy(throttle, now, ticket.rated):
                ticket.blocker = throttle
                if throttle.line is None:
                    throttle.line = Line(now)
                throttle.line.add(ticket, throttle)
                self._moved(ticket, +1)
                self.crowded[throttle] = None
                if throttle.full():
                    self.blocked[throttle] = None
                return False
        ticket.places = self._enter(ticket, ticket.throttles, now)
        ticket.waiting, ticket.blocker = False, None
        return True

    def _full(self, throttle: Throttle, now: int, rated: bool = True) -> bool:
        if throttle.full():
            return True
        if rated and throttle.counts and (slot := throttle.earliest(now)) > now + 999:
            self.wheel.arm(throttle, slot)
            return True
        return False

    def _busy(self, throttle: Throttle, now: int, rated: bool = True) -> bool:
        """Full, or others came first."""
        others_first = throttle.line is not None and (rated or not throttle.counts)
        return others_first or self._full(throttle, now, rated)

    def _enter(self, ticket: Ticket, fresh: Iterable[Throttle], now: int) -> Places:
        for throttle in ticket.throttles:
            throttle.take_place(ticket.owner)
            self._ranked(throttle, ticket.owner)
        for throttle in fresh:
            if ticket.rated and throttle.counts:
                throttle.take_slot(throttle.earliest(now))
        for flow in ticket.flows:
            flow.places += 1
            _list(flow)
        return Places(ticket.owner, ticket.weight, ticket.throttles, ticket.flows)

    def _leave(self, places: Places) -> None:
        for throttle in places.throttles:
            throttle.free_place(places.owner)
            if not throttle.used:
                self.idle[throttle] = None
            self._ranked(throttle, places.owner)
            if throttle.terms is not None and throttle.terms.advice is not None:
                self.crowded[throttle] = None
        for flow in places.flows:
            flow.places -= 1
            _list(flow)

    def _ranked(self, throttle: Throttle, owner: str) -> None:
        if throttle.line is not None:
            throttle.line.rank(owner, throttle)

    def _moved(self, ticket: Ticket, by: int) -> None:
        for flow in ticket.flows:
            flow.waiting_places += by
            _list(flow)

    def _unline(self, ticket: Ticket) -> None:
        blocker = ticket.blocker
        self._moved(ticket, -1)
        if isinstance(blocker, Flow):
            if blocker.gated is not None:
                blocker.gated.remove(ticket)
        elif blocker is not None and blocker.line is not None:
            blocker.line.remove(ticket, blocker)
            self.crowded[blocker] = None
            self._drop_empty(blocker)

    def _drop_empty(self, throttle: Throttle) -> None:
        if throttle.line is not None and throttle.line.size == 0:
            throttle.line = None
            self.idle[throttle] = None
            self.crowded[throttle] = None


def _list(flow: Flow) -> None:
    """Keep the throttles' lists of flows with connections, open or waiting, as they are."""
    uses = bool(flow.places or flow.waiting_places)
    if uses == flow.listed:
        return
    flow.listed = uses
    for throttle in flow.path.throttles:
        terms = throttle.terms
        if terms is None:
            continue
        if uses:
            if terms.users is None:
                terms.users = {}
            terms.users[flow] = None
        elif terms.users is not None:
            terms.users.pop(flow, None)
