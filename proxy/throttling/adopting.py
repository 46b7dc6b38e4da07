"""Puts into a new manager what another process has left: see `handover`, which calls this.

The new one stands where the other was when it was frozen: each throttle has its debts and what was given out ahead, and
each socket that the other process still has its places. Instances come back with new sessions; until then their parts
in the limits stay, and who waited finds its virtual time and its place in the order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from proxy import settings
from proxy.throttling import estate
from proxy.throttling.audit import Account
from proxy.throttling.backoff import Cause, Slowdown, terms_of
from proxy.throttling.core import Core
from proxy.throttling.estate import Gcra, Rate, Record, Slowing, Strictness
from proxy.throttling.flows import Flow, Path, Places, Receiver, Throttle, Ticket
from proxy.throttling.leasing import Leased
from proxy.throttling.limits import Backoff, BackoffRule, Mode, Part
from proxy.throttling.line import Line
from proxy.throttling.overrides import Override
from proxy.throttling.throttle import Carried, Key, Limit, Past, Shadow, Window

#: Records that are taken in before others have their turn.
STEP = 200

#: Throttles and paths of which something is remembered that is of no use once everybody is back.
Former = Throttle | Path


class Adopting:
    """One estate, on its way into a new manager: `begin`, `take` piece by piece, `finish`.

    Args:
        former: told of each of these. breathe: called now and then; lets others have their turn.

    Attributes:
        held: the places of sockets that the other process has, by its numbers.
    """

    def __init__(self, core: Core, former: Callable[[Former], None], now: int, breathe: Callable[[], None]) -> None:
        self.held: dict[int, Places] = {}
        self._core = core
        self._remember = former
        self._now = now
        self._breathe = breathe
        self._throttles: list[Throttle] = []
        self._parts: list[Part] = []
        self._paths: list[tuple[Throttle, ...]] = []
        self._accounts: list[Account] = []
        self._slowdowns: list[tuple[Key, Slowdown]] = []
        self._lines: list[Line[Ticket]] = []
        self._overrides: list[tuple[int, Override]] = []
        self._unseen: list[tuple[str, str]] = []
        self._flows: dict[tuple[str, int, int], Flow] = {}
        self._next_override = 1
        self._done = 0
        self._takers: dict[type[Record], Callable[[Any], None]] = {
            estate.ThrottleOf: self._throttle,
            estate.StakeOf: self._stake,
            estate.PartOf: self._part,
            estate.TurnOf: self._turn,
            estate.LineOf: self._line,
            estate.StandingOf: self._standing,
            estate.PathOf: self._path,
            estate.AccountOf: self._account,
            estate.HoldingOf: self._holding,
            estate.ReturnedOf: self._returned,
            estate.FineOf: self._fine,
            estate.SlowdownOf: self._slowdown,
            estate.CauseOf: self._cause,
            estate.StruckOf: self._struck,
            estate.OverrideOf: self._override,
            estate.LookAtOf: self._look_at,
            estate.PlacesOf: self._places,
        }

    def begin(self, head: estate.Head) -> None:
        """
        Raises:
            Unreadable: it is of another machine, or of before its start.
        """
        if head.at > self._now:
            raise estate.Unreadable("it was written later than now by this machine's clock: it is another machine's")
        core, audit = self._core, self._core._audit
        core.incarnation = head.incarnation
        core._registry.adopt(head.start)
        core.blocks.adopt(head.start, head.day)
        core.blocks.backoffs.begun = head.begun
        audit.known_from, audit.unpermitted, audit.late = head.known_from, head.unpermitted, head.late
        self._next_override = head.next_override

    def take(self, records: list[Record]) -> None:
        """These, in the order in which they were written."""
        for record in records:
            taker = self._takers.get(type(record))
            if taker is not None:  # what happens meanwhile is none of these
                taker(record)
            self._turn_of_others()

    def finish(self) -> None:
        """That was all."""
        self._core.overrides.adopt(self._overrides, self._next_override)
        for name, source in self._unseen:
            self._core._registry.overridden(Override(name, source, False, 0, (), 0))
        for key, slowdown in self._slowdowns:
            self._core.blocks.adopt_slowdown(key, slowdown, self._now)
            self._turn_of_others()
        for throttle in self._throttles:
            self._watch(throttle)
            self._turn_of_others()
        self._takers.clear()  # no circle is left behind

    def _turn_of_others(self) -> None:
        self._done += 1
        if self._done % STEP == 0:
            self._breathe()

    def _stake(self, record: estate.StakeOf) -> None:
        throttle, part = self._throttles[record.throttle], self._parts[record.part]
        self._core._registry.adopt_stake(throttle, record.name, part, record.until)

    def _part(self, record: estate.PartOf) -> None:
        limits = tuple([_limit(rate) for rate in record.limits])
        backoff = _slowing(record.backoff) if record.backoff is not None else None
        self._parts.append(Part(limits, record.places, Mode(record.mode), record.paused, backoff))

    def _turn(self, record: estate.TurnOf) -> None:
        throttle = self._throttles[record.throttle]
        _, times = self._core._dispenser.former.setdefault(throttle, (record.clock, {}))
        times[record.name] = record.time
        self._remember(throttle)

    def _line(self, record: estate.LineOf) -> None:
        throttle = self._throttles[record.throttle]
        self._lines.append(self._core._book.former_line(throttle, record.began, record.passed))
        self._remember(throttle)

    def _standing(self, record: estate.StandingOf) -> None:
        self._lines[record.line].expect(record.owner, record.due)

    def _path(self, record: estate.PathOf) -> None:
        self._paths.append(tuple([self._throttles[number] for number in record.throttles]))

    def _account(self, record: estate.AccountOf) -> None:
        holder = record.owner, self._paths[record.path]
        account = self._core._audit.adopt(holder, record.free_until, record.lapsed, record.lapsed_until, self._now)
        self._accounts.append(account)

    def _holding(self, record: estate.HoldingOf) -> None:
        self._accounts[record.account].hold(record.slot, record.last, record.n, record.step)

    def _returned(self, record: estate.ReturnedOf) -> None:
        self._remember(self._core._registry.adopt_slots(self._paths[record.path], record.slots))

    def _fine(self, record: estate.FineOf) -> None:
        self._core._registry.adopt_fine(record.owner, self._paths[record.path], record.messages)

    def _slowdown(self, record: estate.SlowdownOf) -> None:
        slowdown = Slowdown()
        slowdown.ended = record.ended
        self._slowdowns.append((Key(record.source, record.name, record.receiver), slowdown))

    def _cause(self, record: estate.CauseOf) -> None:
        rule = _strictness(record.rule)
        backoff = Backoff(terms_of(rule), 0)
        backoff.until = record.until
        self._slowdowns[record.slowdown][1].adopt(Cause(rule, backoff, record.reply, record.instance))

    def _struck(self, record: estate.StruckOf) -> None:
        self._slowdowns[record.slowdown][1].adopt_struck(_strictness(record.rule), record.times)

    def _override(self, record: estate.OverrideOf) -> None:
        limits = tuple([_limit(rate) for rate in record.limits])
        what = record.name, record.source, record.pause, record.places
        self._overrides.append((record.number, Override(*what, limits, record.until, record.because)))

    def _look_at(self, record: estate.LookAtOf) -> None:
        self._unseen.append((record.name, record.source))

    def _throttle(self, record: estate.ThrottleOf) -> None:
        key = Key(record.source, record.name, record.receiver)
        blocks, registry = self._core.blocks, self._core._registry
        if record.kind:
            throttle = blocks.adopted(key, record.kind == 2, self._now)
        else:
            throttle = registry.throttle(key, record.leased, self._now)
        self._throttles.append(throttle)
        throttle.taken = record.taken
        if isinstance(throttle, Leased):  # what it may give out is known to the store
            throttle.adopt_places(record.cap)
        else:
            throttle.windows = tuple([self._window(each) for each in record.windows])
            throttle.dormant = tuple([self._window(each) for each in record.dormant])
            throttle.slack, throttle.opens, throttle.cap = record.slack, record.opens, record.cap
        throttle.closed_until, throttle.closed_by = record.closed_until, record.closed_by
        if record.shadow is not None:
            shadow = throttle.shadow = Shadow()
            shadow.patience, shadow.waited, shadow.refused = record.shadow
        if record.carried is not None:
            carried = throttle.carried = Carried()
            carried.accepted, carried.deferred, carried.rejected = record.carried
        terms = throttle.terms
        if terms is None:
            return
        terms.mixed = record.mixed
        terms.total, terms.bad, terms.period_end = record.outcomes
        if record.backoff is not None:
            terms.backoff = Backoff(_slowing(record.backoff), 0)
            terms.backoff.until = record.backoff_until
            registry.backoffs.arm(throttle, terms.backoff.next_change(self._now))

    def _window(self, gcra: Gcra) -> Window:
        past = Past(_limit(gcra.rate), gcra.slack, gcra.interval, gcra.tat, gcra.filled_at)
        return Window.handed_over(past, self._now)

    def _places(self, record: estate.PlacesOf) -> None:
        throttles = self._paths[record.path] if record.path >= 0 else ()
        flows = tuple([self._flow(each) for each in record.flows])
        self.held[record.number] = self._core._book.adopt(record.owner, record.weight, throttles, flows)

    def _flow(self, record: estate.FlowOf) -> Flow:
        """What stands for the flow of a session that is over; equal ones are one."""
        name = record.owner, record.id, record.path
        flow = self._flows.get(name)
        if flow is None:
            receiver = Receiver(record.owner, record.weight)
            flow = self._flows[name] = Flow(receiver, record.id, Path(self._paths[record.path]))
        return flow

    def _watch(self, throttle: Throttle) -> None:
        """It is looked at when nothing is owed any more."""
        core, now = self._core, self._now
        if throttle.busy(now):
            core._active.add(throttle)
            if not throttle.in_use():
                core._debts.arm(throttle, throttle.debt_until())
        if throttle.terms is not None:
            core._registry.forget(throttle, now)


def _limit(rate: Rate) -> Limit:
    return Limit(rate.amount, rate.seconds, rate.burst)


def _slowing(slowing: Slowing) -> BackoffRule:
    rate = _limit(slowing.rate) if slowing.rate is not None else None
    return BackoffRule(slowing.percent, rate, slowing.return_after, slowing.threshold)


def _strictness(rule: Strictness) -> settings.BackoffSettings:
    """Equal to the rule of the configuration, if that has not changed."""
    return settings.BackoffSettings(
        on=tuple(rule.on),
        over=_set_rate(rule.over),
        percent=rule.percent,
        rate=_set_rate(rule.rate),
        pause=rule.pause,
        return_after=rule.return_after,
    )


def _set_rate(rate: Rate | None) -> settings.Rate | None:
    return None if rate is None else settings.Rate(rate.amount, rate.seconds)
