"""A throttle that several proxies share: its slots come from a throttle store, in runs that are leased ahead.

To the dispenser and the place book it is a `Throttle` like any other. Where that reckons when its next slot is, this
one has slots that the store has granted: each may be given out from `opens` to `closes`, and then lives as long as any
(`slack`). While the store does not answer, it reckons for itself again, with this proxy's share of each limit. It has
as many connection places as the store says (`cap`). When what is asked for, and what a reply means, is `cluster`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from proxy.throttling.flows import Flow, Path, Throttle
from proxy.throttling.membership import hold, least_burst, reserve, share
from proxy.throttling.throttle import LATENESS, MILLISECOND, SECOND, Key, Limit, Meter, Window, interval, slack_range

#: How far ahead the store gives out slots: some calls, so that each proxy comes in time for its own.
LEASED_AHEAD = 250 * MILLISECOND
#: Without a slot, the next one is looked for again so soon; one that comes is served at once.
_LOOK_AGAIN = 100 * MILLISECOND
#: No more is asked for in one call.
MOST_SLOTS = 1_000
#: Whose place it is where the store has given none: see `Leased.set_places`.
_NOBODY = ""


class Slot(NamedTuple):
    """May be given out from `opens` to `closes`, nanoseconds of our clock."""

    opens: int
    closes: int


class House(Protocol):
    """Who asks the store: `cluster.Cluster`."""

    hungry: dict[Leased, None]
    moved: dict[Leased, None]

    def relimited(self, throttle: Leased, now: int) -> None: ...


class Share(Meter):
    """What this proxy has of a limit while the store does not answer; spaced like what others have of it meanwhile."""

    __slots__ = ()

    def _slack_range(self, limit: Limit) -> tuple[int, int]:
        slack = (LATENESS if self.counts else slack_range(limit.seconds)[1]) + reserve(limit)
        return slack, slack


class Leased(Throttle):
    """The meter of one key over all proxies.

    Attributes:
        limits, places: of all proxies together.
        alone: this proxy's share, while the store does not answer; None: it does.
        barred: this proxy has no share, or none yet: nothing goes.
        pace: slots given out since the last call, evened out. expected: when there may be another slot.
        alone_until: the last slot of a share that was given out; alone_since: since when the share is reckoned.
        granted, lapsed: slots from the store, and those of them that nobody took in time.
        users: other proxies that wait for its slots, as the store said last.
    """

    __slots__ = (
        *(
            "_house",
            "_slots",
            "alone",
            "alone_since",
            "alone_until",
            "barred",
            "cap_here",
            "expected",
            "granted",
            "lapsed",
        ),
        *("limits", "pace", "places", "reserved", "spent", "users"),
    )

    def __init__(self, key: Key, counts: bool, house: House) -> None:
        super().__init__(key, counts)
        self._house = house
        self.limits: tuple[Limit, ...] = ()
        self.places = 0
        self.cap_here = 0
        self.reserved = False  # `_NOBODY` has a place
        self.alone: Share | None = None
        self.alone_since = 0
        self.alone_until: int | None = None
        self.barred = False
        self._slots: deque[Slot] = deque()
        self.pace = 0
        self.spent = 0
        self.expected = 0
        self.granted = 0
        self.lapsed = 0
        self.users = 0

    # --- slots ---

    @property
    def in_hand(self) -> int:
        return len(self._slots)

    def lease(self, slots: Iterable[Slot]) -> None:
        """The store has granted these."""
        before = len(self._slots)
        self._slots.extend(slots)
        self.granted += len(self._slots) - before

    def earliest(self, now: int) -> int:
        if self.closed_until > now or not self.limits:
            return super().earliest(now)
        if self.alone is not None:
            return self.alone.earliest(now) if not self.barred else now + SECOND
        moment = -(-now // 1_000) * 1_000
        slots = self._slots
        while slots and slots[0].closes < now:
            slots.popleft()
            self.lapsed += 1
        for slot in slots:
            if slot.closes >= moment:
                return max(slot.opens, moment)
        self._house.hungry[self] = None
        return max(self.expected, moment + _LOOK_AGAIN)

    def row(self, slot: int) -> int:
        """The store's slots are as they come."""
        return 0

    def fits(self, moment: int) -> int | None:
        """The first time from `moment` on, which may be to come, at which there is a slot; None: not known."""
        if self.barred:
            return None
        if self.alone is not None or self.closed_until > moment:
            return self.earliest(moment)
        for slot in self._slots:
            if slot.closes >= moment:
                return max(slot.opens, moment)
        self._house.hungry[self] = None
        return None

    def after(self, slot: int) -> int:
        if self.alone is not None:
            return self.alone.after(slot)
        following = [each for each in self._slots if each.closes >= slot][1:2]
        if following:
            return max(slot, following[0].opens)
        return slot + max([window.interval for window in self.windows], default=0)

    def take_slot(self, slot: int) -> None:
        self.taken += 1
        if not self.limits:
            return
        self.spent += 1
        self._house.hungry[self] = None
        if self.alone is not None:
            self.alone.take_slot(slot)
            self.alone_until = max(slot, self.alone_until or slot)
            return
        for number, each in enumerate(self._slots):
            if each.opens <= slot <= each.closes:
                del self._slots[number]
                return
        raise AssertionError(f"no slot of {self.key} is for {slot}")

    def put_off(self, slot: int, late: int) -> None:
        raise AssertionError("may_put_off says no")

    def may_put_off(self, late: int) -> bool:
        """What others give out meanwhile cannot be put off."""
        return not self.windows or late <= 0

    def debt_until(self) -> int:
        own = self.alone.debt_until() if self.alone is not None else self.alone_until or 0
        return max([own, *[slot.closes for slot in self._slots]])

    def _slack_range(self, limit: Limit) -> tuple[int, int]:
        return (LATENESS, LATENESS) if self.counts else slack_range(limit.seconds)

    def adopt_places(self, cap: int) -> None:
        """So many were ours in the process before this one, whose sockets go on."""
        self.cap_here = cap

    def limit_to(self, limits: tuple[Limit, ...], start: int, now: int) -> bool:
        """As of any throttle; what was leased before counted under the old terms, and is gone."""
        if self.limits == limits:
            return False
        self.limits = limits
        self.windows = tuple([Window(limit, self._slack_range(limit)[1], 0, now) for limit in limits])
        self.slack = self._least_slack()
        self.lapsed += len(self._slots)
        self._slots.clear()
        self.expected = now
        self._house.relimited(self, now)
        return True

    def stretch(self, need: int, start: int, now: int) -> bool:
        """It has the largest slack from the beginning."""
        return False

    def spacing(self, limit: Limit, told: int, amount: int) -> tuple[int, int]:
        """Interval in nanoseconds and burst, if those who call may have `amount` (at least 1) of a limit now."""
        burst = min(least_burst(limit, told), max(1, amount - 1))
        slack = self._slack_range(limit)[1] + reserve(limit)
        return interval(Limit(amount, limit.seconds, burst), slack), burst

    # --- alone ---

    def go_alone(self, told: int, since: int, now: int) -> None:
        """The store does not answer: from `since` on, which may be to come, this is for itself and has its share.

        The bucket is as empty as at a start. One that goes on before what it did last time has been forgotten by the
        others is the same as before.
        """
        limits = []
        for limit in self.limits:
            amount = share(limit.amount, told)
            limits.append(Limit(max(1, amount), limit.seconds, least_burst(limit, told)))
        barred = not all(share(limit.amount, told) for limit in self.limits)
        if self.alone is None:
            self.lapsed += len(self._slots)
            self._slots.clear()
        if self.alone is None or self.alone_since != since:
            self.alone = Share(self.key, self.counts)
        self.alone.limit_to(tuple(limits), since, now)
        self.alone_since, self.barred = since, barred

    def come_together(self, now: int) -> None:
        """The store answers again."""
        self.alone = None
        self.barred = False
        self.expected = now

    def longest_hold(self, told: int) -> int:
        """How long the others keep this proxy's share after its last slot."""
        return max([hold(limit, share(limit.amount, told), told) for limit in self.limits], default=0)

    # --- places ---

    @property
    def all_places(self) -> int:
        return self.places

    def limit_places(self, places: int, now: int) -> None:
        if places != self.places:
            self.places = places
            self.set_places(min(self.cap_here, places))
            self._house.moved[self] = None
            self._house.relimited(self, now)

    def full(self) -> bool:
        if not super().full():
            return False
        self._house.moved[self] = None  # whoever asks waits
        return True

    def take_place(self, owner: str) -> None:
        super().take_place(owner)
        self._house.moved[self] = None

    def free_place(self, owner: str) -> None:
        super().free_place(owner)
        self._house.moved[self] = None

    def set_places(self, places: int) -> None:
        """So many of all are this proxy's. Where it is none at all, `_NOBODY` has one, since a cap of 0 is no limit."""
        if not self.places:
            self.cap = 0
        else:
            self.cap = max(1, places)
        self.cap_here = places
        wanted = self.places > 0 and places < 1
        if wanted != self.reserved:
            self.reserved = wanted
            (self.take_place if wanted else self.free_place)(_NOBODY)

    @property
    def used_here(self) -> int:
        """Places that sockets of this proxy have."""
        return self.used - self.reserved

    def in_use(self) -> bool:
        return bool(self.used_here or self.slots or self.line)

    # --- what is wanted ---

    def wanted(self) -> int:
        """Slots that are waited for, besides those in hand; and as many as went lately, since one who asks for each of
        his messages by itself would wait for a call each time."""
        if not self.limits or self.alone is not None or self.closed_until:
            return 0
        soon = LEASED_AHEAD // max([window.interval for window in self.windows])
        return min(MOST_SLOTS, max(self._waiting(), min(self.pace, soon))) - len(self._slots)

    def waited_for(self) -> bool:
        return self.slots is not None or (self.counts and self.line is not None)

    def _waiting(self) -> int:
        count = self.line.size if self.counts and self.line is not None else 0
        slots = self.slots
        if slots is None:
            return count
        here: set[Flow] = set()
        for _, _, flow in slots.queue:
            if flow.queued is self and flow not in here:
                here.add(flow)
                count += flow.want
                if count >= MOST_SLOTS:
                    return count
        return count + max(0, slots.waiting - len(here))  # who waits elsewhere comes for one at a time

    def called(self) -> None:
        """A call goes out: what went since the last one is the pace."""
        self.pace = max(self.spent, self.pace // 2)
        self.spent = 0


class LeasedPath(Path):
    """A path with throttles that are leased: their slots are not for any time."""

    __slots__ = ("leased",)

    def __init__(self, throttles: tuple[Throttle, ...]) -> None:
        super().__init__(throttles)
        self.leased = tuple([each for each in throttles if isinstance(each, Leased)])

    def earliest(self, now: int) -> tuple[int, Throttle | None]:
        slot, decider = super().earliest(now)
        if len(self.throttles) == 1 or decider is None:
            return slot, decider
        settled = False
        while not settled:
            settled = True
            for throttle in self.leased:
                if not throttle.windows:
                    continue
                own = throttle.fits(slot)
                if own is None:
                    return max(slot, throttle.expected, now + _LOOK_AGAIN), throttle
                if own > slot:
                    slot, decider, settled = own, throttle, False
        return slot, decider


def make_path(throttles: tuple[Throttle, ...]) -> Path:
    """The kind that these need."""
    return (LeasedPath if any(isinstance(each, Leased) for each in throttles) else Path)(throttles)
