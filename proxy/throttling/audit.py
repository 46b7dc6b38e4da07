"""Messages against permits: does an instance send more than it was allowed, or later?

The proxy sees MAIL commands where it tracks the dialogue. An `Account` has what one instance holds on one path, in
whatever session it was granted, and each MAIL spends the permit that ends first. A permit is of use until its end and
not longer: so each MAIL that passes has a slot of its own, not older than d, and the bound holds where the proxy writes
the MAIL. One that comes when its permit has lapsed on the way is late and has to wait for another slot (`desk`); one
for which there was none is counted, and with `throttle_enforce` paid with a slot of the instance's own share before its
next connection.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

from proxy.throttling.flows import WORD, Flow, Run, Throttle
from proxy.throttling.many import MASK, Pieces
from proxy.throttling.registry import Notice, Remark
from proxy.throttling.returns import LONGEST_SLACK
from proxy.throttling.session import Session
from proxy.throttling.throttle import AHEAD, SECOND
from proxy.throttling.wheel import Wheel

#: An instance is told of in the log this often.
NOTICE_EVERY: Final = 60 * SECOND
#: A MAIL may be under way for so long (RFC 5321 4.5.3.2.2: a client waits five minutes for the answer to MAIL).
LATE: Final = 300 * SECOND


class Verdict(enum.Enum):
    """What a MAIL had."""

    PERMITTED = enum.auto()
    LATE = enum.auto()
    UNPERMITTED = enum.auto()


#: An instance, and the throttles of a path.
Holder = tuple[str, tuple[Throttle, ...]]


class Spent(NamedTuple):
    """What a MAIL has used up: a permit's slot and its last moment; one that had lapsed has no last moment any more."""

    holder: Holder
    slot: int
    last: int | None


class Mail(NamedTuple):
    """One MAIL: the paths on which it must wait for another slot, and what it has used up."""

    late: tuple[Flow, ...]
    spent: tuple[Spent, ...]


class Holding:
    """`n` permits of a flow from the `serial`th on; the first is usable within [slot, last], each next `step` later."""

    __slots__ = ("flow", "last", "n", "serial", "slot", "step")

    def __init__(self, flow: Flow | None, serial: int, slot: int, last: int, n: int = 1, step: int = 0) -> None:
        self.flow = flow
        self.serial = serial
        self.slot = slot
        self.last = last
        self.n = n
        self.step = step

    def skip(self, n: int) -> None:
        self.serial += n
        self.slot += n * self.step
        self.last += n * self.step
        self.n -= n

    def grow(self, run: Run, slack: int) -> bool:
        """One permit more, if it follows these at their pace; whether it did."""
        if run.flow is not self.flow or run.serial != self.serial + self.n or self.last - self.slot != slack:
            return False
        step = run.first - self.slot - self.step * (self.n - 1)
        if step < 0 or (self.n > 1 and step != self.step):
            return False
        self.step = step
        self.n += 1
        return True

    def cut(self, low: int, high: int) -> list[Holding]:
        """What is left without the permits [low, high) of it."""
        left = []
        if low > 0:
            left.append(Holding(self.flow, self.serial, self.slot, self.last, low, self.step))
        if high < self.n:
            self.skip(high)
            left.append(self)
        return left


class Account:
    """The permits of one instance on one path that were neither used nor returned.

    Attributes:
        free_until: until then all may be used that were granted when nothing limited the path.
        lapsed: how many of them are too old; forgotten at `lapsed_until`.
    """

    __slots__ = ("_fresh", "_holdings", "free_until", "lapsed", "lapsed_until")

    def __init__(self) -> None:
        self._fresh: list[
            tuple[Run, int]
        ] = []  # with its slack: nothing is made of most, which lapse before a MAIL comes
        self._holdings: list[Holding] = []
        self.free_until = 0
        self.lapsed = 0
        self.lapsed_until = 0

    def granted(self, run: Run, slack: int) -> None:
        if run.free and not run.flow.path.limited:
            self.free_until = run.first + slack
        else:
            self._fresh.append((run, slack))

    def _take_in(self) -> None:
        """What was granted of late is looked at like the rest from now on."""
        for run, slack in self._fresh:
            if not (self._holdings and run.n == 1 and self._holdings[-1].grow(run, slack)):
                self._holdings.append(Holding(run.flow, run.serial, run.first, run.first + slack, run.n, run.step))
        self._fresh.clear()

    def returned(self, flow: Flow, start: int, end: int) -> list[tuple[int, int]]:
        """The flow's permits [start, end) come back: those of them that no MAIL has spent, as (first, n)."""
        self._take_in()
        found: list[tuple[int, int]] = []
        left: list[Holding] = []
        for holding in self._holdings:
            low, high = max(start, holding.serial) - holding.serial, min(end - holding.serial, holding.n)
            if holding.flow is flow and low < high:
                found.append((holding.serial + low, high - low))
                left += holding.cut(low, high)
            else:
                left.append(holding)
        self._holdings[:] = left
        return found

    def spend(self, now: int) -> tuple[int, int] | None:
        """A permit that may be used now, the one that ends first: its slot and its last moment."""
        self.lapse(now)
        best = min([each for each in self._holdings if each.slot <= now], key=_last, default=None)
        if best is None:
            return None
        spent = best.slot, best.last
        best.skip(1)
        if not best.n:
            self._holdings.remove(best)
        return spent

    def spend_this(self, spent: Spent) -> None:
        if spent.last is None:
            self.lapsed = max(0, self.lapsed - 1)
            return
        for holding in self.holdings():
            if holding.slot == spent.slot and holding.last == spent.last:
                holding.skip(1)
                if not holding.n:
                    self._holdings.remove(holding)
                return

    def holdings(self) -> list[Holding]:
        """What was neither used nor returned."""
        self._take_in()
        return self._holdings

    def hold(self, slot: int, last: int, n: int, step: int) -> None:
        """Permits that another manager has granted; its sessions are over, so they cannot come back."""
        self._holdings.append(Holding(None, 0, slot, last, n, step))

    def spend_lapsed(self, now: int) -> bool:
        if not self.lapsed or now >= self.lapsed_until:
            return False
        self.lapsed -= 1
        return True

    def restore(self, spent: Spent, now: int) -> None:
        if spent.last is None:
            self.lapsed += 1
            self.lapsed_until = now + LATE
        else:
            self._holdings.append(Holding(None, 0, spent.slot, spent.last))

    def lapse(self, now: int) -> None:
        """Permits that are too old from `now` on are no permits any more."""
        if now >= self.lapsed_until:
            self.lapsed = 0
        if self._fresh:
            self._lapse_fresh(now)
        empty = False
        for holding in self._holdings:
            if holding.last < now:
                old = min(holding.n, -(-(now - holding.last) // holding.step)) if holding.step else holding.n
                holding.skip(old)
                self.lapsed += old
                self.lapsed_until = now + LATE
                empty = empty or not holding.n
        if empty:  # in the same list: 100,000 made anew are looked at by the next collection
            self._holdings[:] = [holding for holding in self._holdings if holding.n]

    def _lapse_fresh(self, now: int) -> None:
        old = 0
        for run, slack in self._fresh:
            if run.first + run.step * (run.n - 1) + slack >= now:
                break
            self.lapsed += run.n
            self.lapsed_until = now + LATE
            old += 1
        del self._fresh[:old]
        self._take_in()

    def over_at(self, now: int) -> int | None:
        """When to look again; None: there is nothing left."""
        self.lapse(now)
        ends = [each.last + each.step * (each.n - 1) + 1 for each in self._holdings]
        end = max([*ends, self.free_until, self.lapsed_until if self.lapsed else 0])
        return end if end > now else None


class Gathered:
    """Which accounts another manager has been told of, as they go through piece by piece. What happens to one of these
    has to be told by itself; what happens to the others will be seen."""

    def __init__(self) -> None:
        self._pieces = 0
        self._left: dict[Holder, None] = {}

    def begin(self, number: int, piece: dict[Holder, Account]) -> None:
        """All of the pieces before have been told."""
        self._left = dict.fromkeys(piece)
        self._pieces = number + 1

    def told(self, holder: Holder) -> None:
        self._left.pop(holder, None)

    def __contains__(self, holder: Holder) -> bool:
        return hash(holder) & MASK < self._pieces and holder not in self._left


class Audit:
    """All accounts.

    Args:
        start: when the manager began: what its predecessor granted is unknown, and nobody is accused for it.

    Attributes:
        known_from: until then nobody is accused. gathered: accounts that another manager has been told of, while this
            one is frozen (see `handover`).
        unpermitted, late: MAIL commands so far that had no permit, or came too late for it.
        remarks: for the log. wheel: accounts by the time at which nothing will be left of them.
    """

    def __init__(self, start: int) -> None:
        self.unpermitted = 0
        self.late = 0
        self.remarks: list[Remark] = []
        self.wheel: Wheel[Holder] = Wheel(SECOND)
        self.known_from = start + LONGEST_SLACK + AHEAD
        self.accounts: Pieces[Holder, Account] = Pieces()
        self.gathered: Gathered | None = None
        self._told: dict[tuple[str, Notice], int] = {}

    def granted(self, run: Run, slack: int) -> None:
        """Permits have left for their instance, each usable for `slack`."""
        flow = run.flow
        holder = flow.receiver.name, flow.path.throttles
        account = self.accounts.pieces[hash(holder) & MASK].get(holder)
        if account is None:
            account = self._account(holder, run.first + run.step * (run.n - 1) + slack)
        account.granted(run, slack)

    def _account(self, holder: Holder, until: int) -> Account:
        account = self.accounts.get(holder)
        if account is None:
            account = self.accounts[holder] = Account()
            self.wheel.arm(holder, until + 1)
        return account

    def adopt(self, holder: Holder, free_until: int, lapsed: int, lapsed_until: int, now: int) -> Account:
        """An account that another manager had; what it holds is to be put into it."""
        account = self._account(holder, now)
        account.free_until, account.lapsed, account.lapsed_until = free_until, lapsed, lapsed_until
        return account

    def spent_elsewhere(self, spent: Spent, back: bool, now: int) -> None:
        """Another manager saw a MAIL that used up this permit, or (`back`) one that was in vain."""
        if back:
            self.in_vain(spent, now)
        elif (account := self.accounts.get(spent.holder)) is not None:
            account.spend_this(spent)

    def returned(self, flow: Flow, first: int, n: int) -> list[tuple[int, int]]:
        """The flow's permits from the `first`th on (modulo 2**32) come back; those that nobody used, as (first, n)."""
        account = self.accounts.get((flow.receiver.name, flow.path.throttles))
        if account is None:
            return []
        start = flow.granted - (flow.granted - first) % WORD
        return account.returned(flow, start, start + n)

    def mail(self, flow: Flow, now: int) -> tuple[Verdict, Spent | None]:
        """A MAIL was begun on a connection of `flow`, whose session may be over: what it had."""
        holder = flow.receiver.name, flow.path.throttles
        account = self.accounts.get(holder)
        if not flow.path.limited or (account is not None and now <= account.free_until):
            return Verdict.PERMITTED, None
        permit = account.spend(now) if account is not None else None
        if permit is not None:
            return Verdict.PERMITTED, Spent(holder, *permit)
        if now < self.known_from:
            return Verdict.PERMITTED, None
        if account is not None and account.spend_lapsed(now):
            return Verdict.LATE, Spent(holder, 0, None)
        return Verdict.UNPERMITTED, None

    def in_vain(self, spent: Spent, now: int) -> None:
        """The MAIL will be said again."""
        self._account(spent.holder, now).restore(spent, now)

    def tell_late(self, flow: Flow, now: int) -> None:
        self.late += 1
        throttle = flow.path.throttles[0].key.name
        detail = (
            f"a message under {throttle} came later than its permit allows and waits for another slot: "
            f"a slow link or machine; {self.late} such messages of all instances so far"
        )
        self._tell(Notice.LATE, flow.receiver.name, detail, now)

    def tell_unpermitted(self, flow: Flow, session: Session | None, now: int) -> None:
        self.unpermitted += 1
        messages = 1
        if session is not None:
            session.unpermitted += 1
            messages = session.unpermitted
        self._tell(Notice.UNPERMITTED, flow.receiver.name, f"messages without a permit: {messages} so far", now)

    def expire(self, now: int, most: int) -> None:
        """Forget accounts of which nothing is left."""
        for key in self.wheel.expire(now, most):
            again = self.accounts[key].over_at(now)
            if again is None:
                del self.accounts[key]
            else:
                self.wheel.arm(key, again)

    def _tell(self, notice: Notice, name: str, detail: str, now: int) -> None:
        """At most once a minute of each instance."""
        last = self._told.get((name, notice))
        if last is None or now - last >= NOTICE_EVERY:
            self._told = {each: at for each, at in self._told.items() if now - at < NOTICE_EVERY}
            self._told[name, notice] = now
            self.remarks.append(Remark(notice, name, detail))


def _last(holding: Holding) -> int:
    return holding.last
