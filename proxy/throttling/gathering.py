"""What a frozen manager leaves to the one that goes on in its place: see `handover`, which calls this.

Reads only, some at a time. What sessions have registered is not left, since instances come back and say it again; but
what they were granted, what they owe, and their part in the limits is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from proxy.throttling import estate
from proxy.throttling.audit import Account, Holder
from proxy.throttling.backoff import Rule, Slowdown
from proxy.throttling.core import Core
from proxy.throttling.desk import Clerk
from proxy.throttling.estate import Gcra, Rate, Record, Slowing, Strictness
from proxy.throttling.flows import Flow, Path, Places, Run, Throttle
from proxy.throttling.leasing import Leased
from proxy.throttling.limits import BackoffRule, Part
from proxy.throttling.many import Pieces
from proxy.throttling.session import LEASE, Session
from proxy.throttling.throttle import Limit, Window

#: Things that are looked at before others have their turn.
STEP = 500
#: Slots, or times, in one record.
_MANY = 1_000


class Gathering:
    """One manager's estate.

    Args:
        sessions: those of the manager. breathe: called now and then; lets others have their turn.
    """

    def __init__(self, core: Core, sessions: Iterable[Session], now: int, breathe: Callable[[], None]) -> None:
        self._core = core
        self._sessions = list(sessions)
        self._now = now
        self._breathe = breathe
        self._looked_at = 0
        self._parts: dict[Part, int] = {}
        self._throttles: Pieces[Throttle, int] = Pieces()
        self._number = 0  # of throttles
        self._paths: Pieces[tuple[Throttle, ...], int] = Pieces()
        self._path = 0
        self._lines = self._accounts = 0

    def chunks(self) -> Iterator[bytes]:
        writer = estate.Writer()
        for record in self._records():
            writer.add(record)
            if writer.ready:
                yield writer.take()
        yield from writer.end()

    def _records(self) -> Iterator[Record]:
        yield self._head()
        yield from self._all_throttles()
        yield from self._slots_to_give_again()
        yield from self._all_accounts()
        yield from self._all_fines()
        yield from self._all_slowdowns()
        for number, override in self._core.overrides.items():
            limits = [Rate(*limit) for limit in override.limits]
            yield estate.OverrideOf(number, *override[:4], limits, override.until, override.because)
        for name, source in self._core._registry.unseen():
            yield estate.LookAtOf(name, source)
        for piece in self._core._book.open.pieces:
            for places in list(piece.values()):
                yield from self._places(places)

    def _look(self) -> None:
        self._looked_at += 1
        if self._looked_at >= STEP:
            self._looked_at = 0
            self._breathe()

    def _head(self) -> Record:
        core = self._core
        audit, backoffs = core._audit, core.blocks.backoffs
        return estate.Head(
            estate.MAGIC,
            estate.MAJOR,
            estate.MINOR,
            self._now,
            core.incarnation,
            core._registry.start,
            audit.known_from,
            audit.unpermitted,
            audit.late,
            backoffs.begun,
            core.blocks.day,
            core.overrides.next_number,
        )

    # --- throttles ---

    def _all_throttles(self) -> Iterator[Record]:
        for piece in self._core._registry.throttles.pieces:
            for throttle in list(piece.values()):
                yield from self._throttle(throttle)
        for throttle in self._core.blocks.throttles():
            yield from self._throttle(throttle)

    def _throttle(self, throttle: Throttle) -> Iterator[Record]:
        self._look()
        number = self._throttles[throttle] = self._number
        self._number += 1
        terms, shadow, carried = throttle.terms, throttle.shadow, throttle.carried
        backoff = terms.backoff if terms is not None else None
        yield estate.ThrottleOf(
            throttle.kind,
            *throttle.key,
            [_gcra(window) for window in throttle.windows],
            [_gcra(window) for window in throttle.dormant],
            throttle.slack,
            throttle.opens,
            throttle.taken,
            throttle.cap,
            throttle.closed_until,
            throttle.closed_by,
            terms is not None and terms.mixed,
            _slowing(backoff.rule) if backoff is not None else None,
            backoff.until if backoff is not None else 0,
            (terms.total, terms.bad, terms.period_end) if terms is not None else (0, 0, 0),
            (shadow.patience, shadow.waited, shadow.refused) if shadow is not None else None,
            (carried.accepted, carried.deferred, carried.rejected) if carried is not None else None,
            isinstance(throttle, Leased),
        )
        if terms is not None and terms.stakes:
            yield from self._stakes(throttle, number)
        yield from self._turns(throttle, number)
        yield from self._line(throttle, number)

    def _stakes(self, throttle: Throttle, number: int) -> Iterator[Record]:
        assert throttle.terms is not None
        for stake in throttle.terms.stakes:
            self._look()
            known = self._parts.get(stake.part)
            if known is None:
                known = self._parts[stake.part] = len(self._parts)
                yield _part(stake.part)
            until = self._core._registry.leases.due((throttle, stake.name)) if not len(stake) else None
            yield estate.StakeOf(number, stake.name, known, self._now + LEASE if until is None else until)

    def _turns(self, throttle: Throttle, number: int) -> Iterator[Record]:
        slots = throttle.slots
        former = self._core._dispenser.former.get(throttle)
        clock, times = (slots.clock, slots.times) if slots is not None else former or (0, {})
        for name, time in times.items():
            self._look()
            yield estate.TurnOf(number, clock, name, time)

    def _line(self, throttle: Throttle, number: int) -> Iterator[Record]:
        line = throttle.line or self._core._book.former.get(throttle)
        if line is None:
            return
        began, passed, owners = line.leave()
        yield estate.LineOf(number, began, passed)
        for owner, due in owners:
            self._look()
            yield estate.StandingOf(self._lines, owner, due)
        self._lines += 1

    # --- what was granted ---

    def _path_of(self, throttles: tuple[Throttle, ...]) -> tuple[int | None, Iterable[Record]]:
        """Its number, and the record that has to be written before it is used; None: it has throttles that are
        forgotten."""
        known = self._paths.get(throttles)
        if known is not None:
            return known, ()
        numbers = [self._throttles.get(throttle) for throttle in throttles]
        there = [number for number in numbers if number is not None]
        if len(there) != len(throttles):
            return None, ()
        known = self._paths[throttles] = self._path
        self._path += 1
        return known, (estate.PathOf(there),)

    def _slots_to_give_again(self) -> Iterator[Record]:
        """What came back, what had not left yet, and what is kept for messages whose time has not come."""
        for path in self._core._registry.paths():
            self._look()
            if path.returned:
                yield from self._returned(path, path.returned)
        for session in self._sessions:
            for run in list(session.runs):
                self._look()
                if not run.free:
                    yield from self._returned(run.flow.path, _slots(run))
        for clerk in list(self._core._desk.clerks.values()):
            self._look()
            path, slots = clerk.flow.path, _kept(clerk)
            if slots:
                yield from self._returned(path, slots)

    def _returned(self, path: Path, slots: list[int]) -> Iterator[Record]:
        number, first = self._path_of(path.throttles)
        if number is not None:
            yield from first
            for begin in range(0, len(slots), _MANY):
                yield estate.ReturnedOf(number, slots[begin : begin + _MANY])

    def _all_accounts(self) -> Iterator[Record]:
        gathered = self._core._audit.gathered
        assert gathered is not None
        for number, piece in enumerate(self._core._audit.accounts.pieces):
            gathered.begin(number, piece)
            for holder in list(piece):
                self._look()
                gathered.told(holder)
                yield from self._account(holder, piece[holder])

    def _account(self, holder: Holder, account: Account) -> Iterator[Record]:
        # What it has is taken before the first of these leaves: a MAIL may come in between, and is told by itself.
        owner, throttles = holder
        if account.over_at(self._now) is None:
            return
        path, first = self._path_of(throttles)
        if path is None:
            return
        of = estate.AccountOf(owner, path, account.free_until, account.lapsed, account.lapsed_until)
        holdings = [(each.slot, each.last, each.n, each.step) for each in account.holdings()]
        number = self._accounts
        self._accounts += 1
        yield from first
        yield of
        for holding in holdings:
            self._look()
            yield estate.HoldingOf(number, *holding)

    def _all_fines(self) -> Iterator[Record]:
        for (owner, throttles), messages in list(self._core._registry.fines.items()):
            yield from self._fine(owner, throttles, messages)
        for flow in self._flows() if self._core.enforce else ():
            self._look()
            if flow.fine:
                yield from self._fine(flow.receiver.name, flow.path.throttles, flow.fine)

    def _fine(self, owner: str, throttles: tuple[Throttle, ...], messages: int) -> Iterator[Record]:
        number, first = self._path_of(throttles)
        if number is not None:
            yield from first
            yield estate.FineOf(owner, number, messages)

    def _flows(self) -> Iterator[Flow]:
        for session in self._sessions:
            yield from list(session.flows.values())

    # --- replies ---

    def _all_slowdowns(self) -> Iterator[Record]:
        for number, (key, slowdown) in enumerate(self._core.blocks.backoffs.everything()):
            self._look()
            yield estate.SlowdownOf(*key, slowdown.ended)
            yield from _slowdown(slowdown, number)

    # --- places ---

    def _places(self, places: Places) -> Iterator[Record]:
        self._look()
        # (One that was forgotten before its connection came counts for nobody else.)
        throttles = tuple([each for each in places.throttles if each in self._throttles])
        number, first = self._path_of(throttles) if throttles else (-1, ())
        assert number is not None
        yield from first
        flows = []
        for flow in places.flows:
            own, first = self._path_of(flow.path.throttles)
            yield from first
            if own is not None:
                flows.append(estate.FlowOf(flow.receiver.name, flow.receiver.weight, flow.id, own))
        yield estate.PlacesOf(places.number, places.owner, places.weight, number, flows)


def _gcra(window: Window) -> Gcra:
    return Gcra(Rate(*window.limit), window.slack, window.interval, window.tat, window.filled_at)


def _rate(limit: Limit | None) -> Rate | None:
    return None if limit is None else Rate(*limit)


def _slowing(rule: BackoffRule) -> Slowing:
    return Slowing(rule.percent, _rate(rule.rate), rule.return_after, rule.threshold)


def _part(part: Part) -> Record:
    backoff = _slowing(part.backoff) if part.backoff is not None else None
    return estate.PartOf([Rate(*limit) for limit in part.limits], part.places, part.mode.value, part.paused, backoff)


def _slots(run: Run) -> list[int]:
    return [run.first + run.step * number for number in range(run.n)]


def _kept(clerk: Clerk) -> list[int]:
    """Not those from before the slack has grown."""
    slack = clerk.flow.path.slack
    return [slot for slot, last in clerk.slots if last - slot == slack]


def _slowdown(slowdown: Slowdown, number: int) -> Iterator[Record]:
    for cause in slowdown.causes:
        yield estate.CauseOf(number, _strictness(cause.rule), cause.backoff.until, cause.reply, cause.instance)
    for rule, times in slowdown.struck:
        for begin in range(0, len(times), _MANY):
            yield estate.StruckOf(number, _strictness(rule), times[begin : begin + _MANY])


def _strictness(rule: Rule) -> Strictness:
    over = Rate(rule.over.amount, rule.over.seconds) if rule.over is not None else None
    rate = Rate(rule.rate.amount, rule.rate.seconds) if rule.rate is not None else None
    return Strictness(over, rule.percent, rate, rule.pause, rule.return_after, list(rule.on))
