"""One throttle: when its next slots are (GCRA over one or several windows) and how many connection places are taken.

A *slot* is a point in time that one message may use once, within [slot, slot + slack]. `Window` does the arithmetic
of docs/throttling.md for one "L per W"; `Meter` joins windows and places; a `Throttle` (in `flows`) is a
meter and those who use it. Who gets a slot or a place, and when limits change, is decided in `dispenser`, `places` and
`manager`.

All times are integers in nanoseconds of one monotonic clock. Slots and intervals are whole microseconds, the unit of
the wire, so that a run of slots travels without rounding.
"""

from __future__ import annotations

from typing import NamedTuple

SECOND = 1_000_000_000
MICROSECOND = 1_000
MILLISECOND = 1_000_000
#: The wheel's tick.
TICK = 25_000_000
#: H of the design: slots are given out this far ahead, a tick and what the wheel may be late. With a tick alone, each
#: lateness longer than the one before left slots in the past, for nobody: up to 1 % of them at 3,500 a second.
AHEAD = TICK + 5_000_000
#: Windows at least this long are strict by default: exactly L in any window. Shorter ones are nominal.
STRICT_FROM_SECONDS = 60
#: No limit gives more than 100,000 slots a second: one that did could keep the proxy busy with nothing else.
SHORTEST_INTERVAL = 10 * MICROSECOND
#: Slack of a permit that no rate limits.
FREE_SLACK = 2 * SECOND


class Limit(NamedTuple):
    """At most `amount` (at least 1) in any `seconds` seconds, `burst` (at least 1) of them at once."""

    amount: int
    seconds: int
    burst: int = 1


class Key(NamedTuple):
    """What a throttle is for: a source address and the name of a rule."""

    source: str
    name: str


def check(limit: Limit) -> None:
    """Refuse a limit that would not hold.

    Raises:
        ValueError: a figure below 1, or a burst as large as the amount: up to 2·amount - 1 would pass in one window.
    """
    if limit.amount < 1 or limit.seconds < 1 or limit.burst < 1:
        raise ValueError(f"amount, seconds and burst are at least 1, not {tuple(limit)}")
    if limit.burst >= limit.amount > 1:
        raise ValueError(f"burst {limit.burst} must be smaller than the amount {limit.amount}")


def slack_range(seconds: int) -> tuple[int, int]:
    """Smallest and largest slack d, in nanoseconds, of a window: d is paid for with d/W of the throughput."""
    if seconds >= 600:
        return 2 * SECOND, 2 * SECOND
    if seconds >= 30:
        return SECOND // 4, SECOND // 2
    return SECOND // 10, SECOND // 2


def interval(limit: Limit, slack: int) -> int:
    """I: nanoseconds between two slots, rounded up to a microsecond.

    Strict: (W+d)/(L-B+1), so that no window of W ever holds more than L. Nominal: W/L.
    """
    window = limit.seconds * SECOND
    if limit.seconds >= STRICT_FROM_SECONDS:
        window += slack
        divisor = limit.amount - limit.burst + 1
    else:
        divisor = limit.amount
    return max(SHORTEST_INTERVAL, -(-window // (divisor * MICROSECOND)) * MICROSECOND)


class Window:
    """GCRA state of one limit. `tat` is the theoretical arrival time; the next slot is at `tat - tau` or later.

    Args:
        slack: d in nanoseconds.
        floor: the first `tat`. What came before the manager's start is unknown, so a window begins as a predecessor may
            have left it (see `Meter.floor`).
    """

    __slots__ = ("interval", "limit", "slack", "tat", "tau")

    def __init__(self, limit: Limit, slack: int, floor: int) -> None:
        self.limit = limit
        self.slack = slack
        self.interval = interval(limit, slack)
        self.tau = (limit.burst - 1) * self.interval
        self.tat = floor

    def change(self, limit: Limit, slack: int, floor: int, now: int, lead: int) -> None:
        """Take other terms from now on; slots already given out keep theirs.

        The debt is scaled by I_new/I_old, but only what lies beyond the slots that are given out ahead (up to
        now + lead): scaled up, those would turn 30 ms of a fast limit into hours, scaled down they would be forgotten.
        So a limit that falls and rises again gains nothing. A next slot that is still to come does not come sooner when
        the interval grows, though the burst's share of the debt grows with it. And what a manager does not know about
        the time before its start holds for the new terms too: `floor` is theirs.
        """
        next_slot, burst = self.tat - self.tau, self.limit.burst
        old, self.limit, self.slack = self.interval, limit, slack
        self.interval = interval(limit, slack)
        self.tau = (limit.burst - 1) * self.interval
        ahead = now + lead
        if self.tat > ahead:
            scaled = -(-(self.tat - ahead) * self.interval // (old * MICROSECOND)) * MICROSECOND
            self.tat = -(-ahead // MICROSECOND) * MICROSECOND + scaled
        if self.interval > old and limit.burst <= burst and next_slot > now:
            self.tat = max(self.tat, next_slot + self.tau)
        self.tat = max(self.tat, floor)


class Meter:
    """Rate windows and connection places of one key: the figures of a throttle.

    Attributes:
        windows: the limits in force; empty: no rate limit.
        dormant: windows of limits that are gone while their debt is not: a limit that comes back finds it.
        cap: places there are, 0: unlimited. used: places taken. held: places by owner, None when nobody holds one.
        taken: slots given out so far. counts: a place also takes a slot (the proxy's own throttles count connections).
    """

    __slots__ = ("cap", "counts", "dormant", "held", "key", "taken", "used", "windows")

    def __init__(self, key: Key, counts: bool = False) -> None:
        self.key = key
        self.counts = counts
        self.windows: tuple[Window, ...] = ()
        self.dormant: tuple[Window, ...] = ()
        self.cap = 0
        self.taken = 0
        self.used = 0
        self.held: dict[str, int] | None = None

    # --- rate ---

    @property
    def lead(self) -> int:
        """How far ahead slots are given out: a place's slot is used in the same call."""
        return 0 if self.counts else AHEAD

    def earliest(self, now: int) -> int:
        """The next slot: `now`, rounded up to a microsecond, or later."""
        slot = -(-now // MICROSECOND) * MICROSECOND
        for window in self.windows:
            free = window.tat - window.tau
            if free > slot:
                slot = free
        return slot

    def take_slot(self, slot: int) -> None:
        """Use up `slot`, which is not before `earliest`; never undone."""
        self.taken += 1
        for window in self.windows:
            tat = window.tat
            window.tat = (tat if tat > slot else slot) + window.interval

    @property
    def slack(self) -> int:
        """d: how long after its time a slot of this throttle may be used."""
        return min([window.slack for window in self.windows], default=FREE_SLACK)

    def debt_until(self) -> int:
        """When the last debt is paid; what must not be forgotten before."""
        return max([window.tat for window in self.windows + self.dormant], default=0)

    def _slack_range(self, limit: Limit) -> tuple[int, int]:
        return (0, 0) if self.counts else slack_range(limit.seconds)

    def floor(self, limit: Limit, start: int) -> int:
        """The latest `tat` that a manager which died at `start` can have left: H + tau + I later.

        With the interval of the largest slack, since nobody knows which one was in force.
        """
        return start + self.lead + limit.burst * interval(limit, self._slack_range(limit)[1])

    def limit_to(self, limits: tuple[Limit, ...], start: int, now: int) -> bool:
        """Put `limits` (one per window length) in force; `start`: when this manager began.

        Returns:
            whether anything changed.
        """
        if tuple(window.limit for window in self.windows) == limits:
            return False
        known = {window.limit.seconds: window for window in self.windows + self.dormant}
        active = []
        for limit in limits:
            window = known.pop(limit.seconds, None)
            if window is None:
                window = Window(limit, self._slack_range(limit)[0], self.floor(limit, start))
            elif window.limit != limit:
                window.change(limit, window.slack, self.floor(limit, start), now, self.lead)
            active.append(window)
        self.windows = tuple(active)
        self.dormant = tuple(window for window in known.values() if window.tat > now)
        return True

    def stretch(self, need: int, start: int, now: int) -> bool:
        """Give permits at least `need` nanoseconds of slack where the window's range allows.

        Slack only grows while a throttle is remembered: a window that saw late uses of the past must not be filled
        with the closer slots of a smaller one.

        Returns:
            whether the slack grew; slots given out before must then not be given out again.
        """
        grew = False
        for window in self.windows:
            slack = min(need, self._slack_range(window.limit)[1])
            if slack > window.slack:
                window.change(window.limit, slack, self.floor(window.limit, start), now, self.lead)
                grew = True
        return grew

    # --- places ---

    def full(self) -> bool:
        return 0 < self.cap <= self.used

    def holds(self, owner: str) -> int:
        return self.held.get(owner, 0) if self.held else 0

    def take_place(self, owner: str) -> None:
        self.used += 1
        if self.held is None:
            self.held = {}
        self.held[owner] = self.held.get(owner, 0) + 1

    def free_place(self, owner: str) -> None:
        self.used -= 1
        held = self.held or {}
        if held[owner] > 1:
            held[owner] -= 1
        else:
            del held[owner]
            if not held:
                self.held = None
