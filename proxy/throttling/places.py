"""Connection places: who may open a connection now, and who is next.

A place belongs to a socket of the proxy: connecting, open, being cleaned, cached and draining ones all hold theirs, and
give them back when the socket is closed. `admit` decides and takes in one call, all throttles of a request or none.

Who does not get in holds a ticket, which stands in the line of one throttle that is in its way and takes nothing
anywhere. When a place comes free, it is the turn of the owner who has fewest with one more, relative to its weight;
among equals of the one served longest ago, so that fewer places than owners go round. A ticket whose turn it is goes on
to the next throttle that is in its way, and keeps the turns that it has had. When it has had them all, the next place
that comes free at each of its throttles is kept for it: for whoever came first, where two want the same, so that no two
wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Protocol

from proxy.throttling.flows import Flow, Places, Throttle, Ticket
from proxy.throttling.line import Line
from proxy.throttling.many import MASK, Pieces
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
        open: all places that are taken, by number.
        former: lines that there were when another process left what it had (see `handover`): who stands there is back
            soon.
    """

    def __init__(self, shut: Gate) -> None:
        self.admitted: list[Ticket] = []
        self.blocked: dict[Throttle, None] = {}
        self.crowded: dict[Throttle, None] = {}
        self.idle: set[Throttle] = set()
        self.wheel: Wheel[Throttle] = Wheel(MILLISECOND)
        self.open: Pieces[int, Places] = Pieces()
        self.former: dict[Throttle, Line[Ticket]] = {}
        self._shut = shut
        self._numbers = count(1)
        self._freed: list[Throttle] = []  # where something else than a place that came back may let somebody go on

    def admit(
        self,
        owner: str,
        weight: float,
        throttles: tuple[Throttle, ...],
        flows: tuple[Flow, ...],
        now: int,
        rated: bool = True,
    ) -> Places | Ticket:
        """Places under every one of `throttles`, or a ticket; nothing in between.

        Args:
            throttles: each once.
            rated: it takes a slot of those that count connections, too. One that does not is not held up by those who
                wait for slots only; but once it waits for a place, it stands in the same line.
        """
        if self._free(throttles, flows):
            return self._seat(owner, weight, throttles, flows)
        ticket = self.ticket(owner, weight, throttles, flows, rated)
        self._try(ticket, now)
        if self._freed:
            self._pump([], now)
        return ticket.places or ticket

    def ticket(
        self, owner: str, weight: float, throttles: tuple[Throttle, ...], flows: tuple[Flow, ...], rated: bool
    ) -> Ticket:
        """One that has not asked yet: see `ask`."""
        ticket = Ticket(owner, weight, throttles, flows, rated)
        ticket.number = next(self._numbers)
        return ticket

    def ask(self, ticket: Ticket, now: int) -> None:
        """Places for this ticket, or it waits; as `admit`, but it is told by `admitted` in any case."""
        if ticket.waiting:
            self._try(ticket, now)
            if ticket.places is not None:  # (one that did not wait is not told by that)
                self.admitted.append(ticket)
            self._pump([], now)

    def swap(
        self,
        old: Places,
        owner: str,
        weight: float,
        throttles: tuple[Throttle, ...],
        flows: tuple[Flow, ...],
        now: int,
        rated: bool = True,
    ) -> Places | None:
        """A cached connection changes hands: the places of its old path for those of the new one, in one step.

        Throttles on both paths keep their place, which only changes its owner. None: a throttle that is new to it is
        full, somebody waits there, or the flow is shut; then nothing changed.
        """
        fresh = [throttle for throttle in throttles if throttle not in old.throttles]
        if not old.open or any(self._shut(flow) for flow in flows):
            return None
        if any(self._busy(each, now, rated) for each in fresh if not each.connections):
            return None
        old.open = False
        self._leave(old)
        paced = [throttle for throttle in fresh if not throttle.connections]  # it is no new connection
        new = self._enter(Ticket(owner, weight, throttles, flows, rated), paced, now)
        self._pump([throttle for throttle in old.throttles[::-1] if throttle not in throttles], now)
        return new

    def release(self, places: Places, now: int) -> None:
        """The socket is closed. A second time does nothing."""
        if not places.open:
            return
        places.open = False
        lines = self._leave(places)
        if lines or self._freed:
            lines.reverse()
            self._pump(lines, now)

    def heir(self, places: Places, now: int) -> Ticket | None:
        """Who would be the first to get in if these came free; None: nobody, or only doing it would tell.

        Changes nothing. A connection that is open still may change hands with its places; see `egress.keeper`.
        """
        if not places.open:
            return None
        _hold(places, -1)
        try:
            for throttle in places.throttles:
                ticket = self._next_under(throttle, now)
                if ticket is not None:
                    return ticket if self._would_enter(ticket, throttle, now) else None
            return None
        finally:
            _hold(places, +1)

    def cancel(self, ticket: Ticket, now: int) -> None:
        """Nobody waits for `ticket` any more; places that it got meanwhile are given back."""
        if ticket.places is not None:
            self.release(ticket.places, now)
        elif ticket.waiting:
            self._unline(ticket)
            self._unclaim(ticket)
            self._pump([], now)
        ticket.waiting = False

    def former_line(self, throttle: Throttle, began: int, passed: int) -> Line[Ticket]:
        """A line that another process had, for who stood there to come back to."""
        line = self.former[throttle] = Line(began)
        line.follow(passed)
        return line

    def adopt(self, owner: str, weight: float, throttles: tuple[Throttle, ...], flows: tuple[Flow, ...]) -> Places:
        """Those of a socket that another process holds, whether there is room or not."""
        return self._seat(owner, weight, throttles, flows)

    def pump(self, throttle: Throttle, now: int) -> None:
        """Let in who can get in under `throttle` now, whose limits may have changed."""
        self._filled(throttle)
        self._pump([throttle], now)

    def shut(self, flow: Flow, now: int) -> None:
        """`flow` keeps its connections waiting from now on: what was kept for them is free for others."""
        for throttle in flow.path.throttles:
            claim = throttle.line.claim if throttle.line is not None else None
            if claim is not None and flow in claim.flows:
                self._unclaim(claim)
        self._pump([], now)

    def retry(self, flow: Flow, now: int) -> None:
        """`flow` is open again: its tickets go on to the throttles."""
        tickets, flow.gated = flow.gated or [], None
        for ticket in tickets:
            self._moved(ticket, -1)
            self._try(ticket, now)
        self._pump([], now)

    # --- steps ---

    def _pump(self, throttles: list[Throttle], now: int) -> None:
        """Let in who can get in under these, and where others may go on by it."""
        while throttles or self._freed:
            throttle = (throttles or self._freed).pop()
            while (line := throttle.line) is not None and not throttle.full():  # (full: nobody is looked for)
                claim = line.claim
                if claim is not None and not any(self._full(each, now, claim, claim.rated) for each in claim.throttles):
                    self._unline(claim)
                    self._try(claim, now)
                elif (first := line.peek(throttle)) and not (
                    (claim is not None or throttle.counts) and self._full(throttle, now, None, first.rated)
                ):
                    self._next_in_line(throttle, line, first, now)
                else:
                    break
            if throttle.line is not None:
                self.crowded[throttle] = None

    def _next_under(self, throttle: Throttle, now: int) -> Ticket | None:
        """Whom `_pump` would turn to first."""
        line = throttle.line
        if line is None or throttle.full():
            return None
        claim = line.claim
        if claim is not None and not any(self._full(each, now, claim, claim.rated) for each in claim.throttles):
            return claim
        first = line.peek(throttle)
        return None if first is None or self._full(throttle, now, None, first.rated) else first

    def _would_enter(self, ticket: Ticket, passed: Throttle, now: int) -> bool:
        """Whether `_try` would find all places for it."""
        if any(map(self._shut, ticket.flows)):
            return False
        for throttle in ticket.throttles:
            line = None if throttle is passed or throttle in ticket.turns else throttle.line
            if line is not None and not self._comes_first(ticket, throttle, line):
                return False
        return not any(self._full(throttle, now, ticket, ticket.rated) for throttle in ticket.throttles)

    def _next_in_line(self, throttle: Throttle, line: Line[Ticket], ticket: Ticket, now: int) -> None:
        """It is the turn of `ticket`, the first in this line."""
        line.served(ticket)
        if not line.size:
            self._drop_empty(throttle)
        if len(ticket.throttles) > 1:  # (with one it gets in now)
            ticket.turns |= {throttle}
        self._try(ticket, now, throttle)
        if ticket.places is None:  # or it has been done by entering
            line.rank(ticket.owner, throttle)
        self._moved(ticket, -1)  # last, so that its flows are not taken for idle in between

    def _free(self, throttles: tuple[Throttle, ...], flows: tuple[Flow, ...]) -> bool:
        """Whether there is nothing to be asked: nobody waits, and nothing is full or takes slots."""
        for throttle in throttles:
            if (
                throttle.line is not None
                or throttle.counts
                or 0 < throttle.cap <= throttle.used
                or throttle.shadow is not None
            ):
                return False
        return not any(map(self._shut, flows))

    def _try(self, ticket: Ticket, now: int, passed: Throttle | None = None) -> None:
        """Take all places for `ticket`, or put it where it has to wait; `passed`: its turn in that line has come."""
        for flow in ticket.flows:
            if self._shut(flow):
                ticket.blocker = flow
                if flow.gated is None:
                    flow.gated = []
                flow.gated.append(ticket)
                self._moved(ticket, +1)
                self._unclaim(ticket)
                ticket.turns = frozenset()
                return
        for throttle in ticket.throttles:
            if throttle.line is None or throttle is passed or throttle in ticket.turns:
                continue
            if not self._comes_first(ticket, throttle, throttle.line):
                self._stand(ticket, throttle, now)
                return
        for throttle in ticket.throttles:
            # (Where its turn has come there is a place for it: nothing has happened since `_pump` looked.)
            if throttle is not passed and self._full(throttle, now, ticket, ticket.rated):
                earlier = self._claim(ticket, now) if ticket.turns else None
                self._stand(ticket, earlier or throttle, now)
                return
        if ticket.turns:
            self._unclaim(ticket)
        ticket.places = self._enter(ticket, ticket.throttles, now)
        if ticket.blocker is not None:
            self.admitted.append(ticket)
        ticket.waiting, ticket.blocker = False, None

    def _comes_first(self, ticket: Ticket, throttle: Throttle, line: Line[Ticket]) -> bool:
        """Whether nobody who stands in line at `throttle` goes before `ticket`, which may have had turns elsewhere."""
        if not line.size or (throttle.counts and not throttle.takes(ticket.rated)):
            return True
        return bool(ticket.turns) and line.goes_before(ticket, throttle)

    def _stand(self, ticket: Ticket, throttle: Throttle, now: int) -> None:
        """`ticket` stands in line at `throttle`."""
        ticket.blocker = throttle
        if throttle.line is None:
            throttle.line = self._new_line(throttle, now)
        throttle.line.add(ticket, throttle)
        self._moved(ticket, +1)
        self.crowded[throttle] = None
        if throttle.full():
            self.blocked[throttle] = None

    def _claim(self, ticket: Ticket, now: int) -> Throttle | None:
        """It is the turn of `ticket` everywhere: have the next free place kept for it at each of its throttles.

        Who came first goes first: one that came later loses all that was kept for it, and stands in line here.

        Returns:
            where it has to stand for somebody who came earlier, if anywhere; then nothing is kept for it: who has
            something kept has it at all of its throttles.
        """
        ticket.turns = frozenset(ticket.throttles)
        others = [(each, each.line.claim) for each in ticket.throttles if each.line is not None]
        for throttle, claim in others:
            if claim is not None and claim.number < ticket.number:
                return throttle if self._full(throttle, now, ticket, ticket.rated) else None
        for throttle, claim in others:
            if claim is not None and claim is not ticket:
                self._unline(claim)
                self._unclaim(claim)
                self._stand(claim, throttle, now)
        for throttle in ticket.throttles:
            if throttle.line is None:
                throttle.line = self._new_line(throttle, now)
            throttle.line.claim = ticket
            if throttle.full():
                self.blocked[throttle] = None
        return None

    def _new_line(self, throttle: Throttle, now: int) -> Line[Ticket]:
        return self.former.pop(throttle, None) or Line(now)

    def _unclaim(self, ticket: Ticket) -> None:
        """Nothing is kept for `ticket` any more."""
        for throttle in ticket.throttles:
            line = throttle.line
            if line is not None and line.claim is ticket:
                line.claim = None
                self._freed.append(throttle)
                self._drop_empty(throttle)

    def _filled(self, throttle: Throttle) -> None:
        """If `throttle` is full now, its claim cannot use what is kept for it elsewhere: others may (see `_full`)."""
        claim = throttle.line.claim if throttle.line is not None else None
        if claim is not None and throttle.full():
            self._freed += [each for each in claim.throttles if each is not throttle]

    def _full(self, throttle: Throttle, now: int, ticket: Ticket | None, rated: bool) -> bool:
        """Whether `throttle` has no place or slot for `ticket`, or for those who stand in line (None)."""
        if throttle.shadow is not None:
            return False
        if throttle.full():
            return True
        line = throttle.line
        claim = line.claim if line is not None else None
        kept = claim is not None and claim is not ticket and not any(map(self._shut, claim.flows))
        if kept and 0 < throttle.cap <= throttle.used + 1 and not (claim and _comes_free(throttle, claim)):
            return True
        if throttle.takes(rated):
            if (slot := throttle.earliest(now)) > now + 999:
                self.wheel.arm(throttle, slot)
                return True
            # A slot is kept only for somebody who waits for slots: a place may take its time.
            return (
                kept
                and claim is not None
                and throttle.takes(claim.rated)
                and not any(each.full() for each in claim.throttles)
            )
        return False

    def _busy(self, throttle: Throttle, now: int, rated: bool) -> bool:
        """Full, or others came first."""
        others_first = (
            throttle.line is not None and throttle.line.size > 0 and (throttle.takes(rated) or not throttle.counts)
        )
        return others_first or self._full(throttle, now, None, rated)

    def _enter(self, ticket: Ticket, fresh: Iterable[Throttle], now: int) -> Places:
        for throttle in fresh:
            if throttle.shadow is not None:
                throttle.shadow_place()
        places = self._seat(ticket.owner, ticket.weight, ticket.throttles, ticket.flows)
        for throttle in ticket.throttles:
            line = throttle.line
            if line is not None:
                line.got_in(ticket)
                line.rank(ticket.owner, throttle)
                if line.claim is not None:
                    self._filled(throttle)
                if throttle.counts:
                    self._freed.append(throttle)  # another may be first there now, who needs no slot
        for throttle in fresh:
            if not throttle.counts or not throttle.takes(ticket.rated):
                continue
            if throttle.shadow is not None:
                throttle.shadow_slot(now)
            else:
                throttle.take_slot(throttle.earliest(now))
        return places

    def _seat(self, owner: str, weight: float, throttles: tuple[Throttle, ...], flows: tuple[Flow, ...]) -> Places:
        for throttle in throttles:
            along = throttle.along
            if not throttle.used:
                throttle.along = throttles
            elif along != throttles:
                throttle.along = tuple([each for each in along if each in throttles])
            throttle.take_place(owner)
        for flow in flows:
            flow.places += 1
            if not flow.listed:  # (it looks itself)
                _list(flow)
        number = next(self._numbers)
        places = self.open.pieces[number & MASK][number] = Places(number, owner, weight, throttles, flows)
        return places

    def _leave(self, places: Places) -> list[Throttle]:
        """Give them back; those of their throttles where somebody waits."""
        owner, number = places.owner, places.number
        del self.open.pieces[number & MASK][number]
        lines = []
        for throttle in places.throttles:
            throttle.free_place(owner)
            if not throttle.used:
                throttle.along = ()
                self.idle.add(throttle)
            line, terms = throttle.line, throttle.terms
            if line is not None:
                line.rank(owner, throttle)
                lines.append(throttle)
            if terms is not None and terms.advice is not None:
                self.crowded[throttle] = None
        for flow in places.flows:
            flow.places -= 1
            if not flow.places:  # (it looks itself)
                _list(flow)
        return lines

    def _moved(self, ticket: Ticket, by: int) -> None:
        for flow in ticket.flows:
            flow.waiting_places += by
            if flow.listed != (flow.waiting_places > 0 or flow.places > 0):  # (it looks itself)
                _list(flow)

    def _unline(self, ticket: Ticket) -> None:
        blocker = ticket.blocker
        self._moved(ticket, -1)
        if isinstance(blocker, Flow):
            if blocker.gated is not None:
                blocker.gated.remove(ticket)
        elif blocker is not None and blocker.line is not None:
            blocker.line.remove(ticket, blocker)
            self._freed.append(blocker)  # the next one there may need less
            self.crowded[blocker] = None
            self._drop_empty(blocker)

    def _drop_empty(self, throttle: Throttle) -> None:
        if throttle.line is not None and throttle.line.size == 0 and throttle.line.claim is None:
            throttle.line = None
            self.idle.add(throttle)
            self.crowded[throttle] = None


def _comes_free(throttle: Throttle, ticket: Ticket) -> bool:
    """Whether `ticket` waits for a place elsewhere that only comes free together with one of `throttle`."""
    return any(throttle in each.along and each.full() for each in ticket.throttles if each is not throttle)


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


def _hold(places: Places, by: int) -> None:
    """Its throttles hold them (+1), or do not (-1), for a look at who would come next."""
    for throttle in places.throttles:
        (throttle.take_place if by > 0 else throttle.free_place)(places.owner)
        if throttle.line is not None:
            throttle.line.rank(places.owner, throttle)
