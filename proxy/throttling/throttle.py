"""One throttle: when its next slots are (GCRA over one or several windows) and how many connection places are taken.

A *slot* is a point in time that one message may use once, within [slot, slot + slack]. `Window` does the arithmetic
of docs/throttling.md for one "L per W"; `Meter` joins windows and places; a `Throttle` (in `flows`) is a
meter and those who use it. Who gets a slot or a place, and when limits change, is decided in `dispenser`, `places` and
`manager`.

All times are integers in nanoseconds of one monotonic clock. Slots and intervals are whole microseconds, the unit of
the wire, so that a run of slots travels without rounding.
"""

from __future__ import annotations

from typing import Final, NamedTuple

SECOND: Final = 1_000_000_000
MICROSECOND: Final = 1_000
MILLISECOND: Final = 1_000_000
#: The wheel's tick.
TICK: Final = 25_000_000
#: H of the design: slots are given out this far ahead, a tick and what the wheel may be late. With a tick alone, each
#: lateness longer than the one before left slots in the past, for nobody: up to 1 % of them at 3,500 a second.
AHEAD: Final = TICK + 5_000_000
#: Windows at least this long are strict by default: exactly L in any window. Shorter ones are nominal.
STRICT_FROM_SECONDS: Final = 60
#: No limit gives more than 100,000 slots a second: one that did could keep the proxy busy with nothing else.
SHORTEST_INTERVAL: Final = 10 * MICROSECOND
#: Permits for more messages at once lapse before any MTA has used them: they live 0.1 to 2 s (see `slack_range`).
LARGEST_BURST: Final = 10_000
#: Windows of limits that are gone are remembered for their debt, this many; a later one owes what they did.
MAX_DORMANT: Final = 4
#: A connection's slot is used in the call that takes it, which comes as late as the hub is busy: so late may it be.
LATENESS: Final = 10_000_000
#: Slack of a permit that no rate limits.
FREE_SLACK: Final = 2 * SECOND


class Limit(NamedTuple):
    """At most `amount` (at least 1) in any `seconds` seconds, `burst` (at least 1) of them at once."""

    amount: int
    seconds: int
    burst: int = 1


class Key(NamedTuple):
    """What a throttle is for: a source address, the name of a rule, and a receiver.

    Of the proxy's own throttles, source and receiver are "" where they do not count by themselves; an instance's rules
    know no receivers.
    """

    source: str
    name: str
    receiver: str = ""

    def __str__(self) -> str:
        """`yahoo for 192.0.2.1 to mx1.example.net`"""
        source = f" for {self.source}" if self.source else ""
        return f"{self.name}{source}" + (f" to {self.receiver}" if self.receiver else "")


class Shadow:
    """What a throttle that holds nothing would have held back.

    Attributes:
        patience: nanoseconds that a request would have waited at most.
        waited, refused: requests that would have waited, and that would not have been served within `patience`.
    """

    __slots__ = ("patience", "refused", "waited")

    def __init__(self) -> None:
        self.patience = 0
        self.waited = 0
        self.refused = 0


class Carried:
    """What became of the messages on connections that have had a place; counted when a connection's use is over."""

    __slots__ = ("accepted", "deferred", "rejected")

    def __init__(self) -> None:
        self.accepted = 0
        self.deferred = 0
        self.rejected = 0


def check(limit: Limit) -> None:
    """Refuse a limit that would not hold.

    Raises:
        ValueError: a figure below 1; a burst as large as the amount: up to 2·amount - 1 would pass in one window;
            or one that nobody could use.
    """
    if limit.amount < 1 or limit.seconds < 1 or limit.burst < 1:
        raise ValueError(f"amount, seconds and burst are at least 1, not {tuple(limit)}")
    if limit.burst >= limit.amount > 1:
        raise ValueError(f"burst {limit.burst} must be smaller than the amount {limit.amount}")
    if limit.burst > LARGEST_BURST:
        raise ValueError(
            f"burst {limit.burst} must be at most {LARGEST_BURST}: permits for more at once lapse before they are used"
        )


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


class Past(NamedTuple):
    """What a window owed at the end of its terms; see `Window`."""

    limit: Limit
    slack: int
    interval: int
    tat: int
    filled_at: int

    def late_until(self, slack: int, now: int) -> int:
        """When permits with this slack may follow: those of a larger one are used that much later."""
        return min(now, self.tat - self.interval) + self.slack - slack  # each slot so far is before its `tat` by I


class Window:
    """GCRA state of one limit. `tat` is the theoretical arrival time; the next slot is at `tat - tau` or later.

    What `tat` lies ahead of a moment is the *debt* and the *fill*: slots that were taken, and the part of the burst
    that is not there yet. Up to `filled_at` time goes into the fill, from then on into the debt. Both are kept when the
    terms change, counted in slots and not in time; docs/throttling.md has the proof.

    Args:
        slack: d in nanoseconds.
        floor: the first `tat`, as far as a predecessor may have left one (see `Meter.floor`).
        now: the burst begins empty: what came before is unknown, or has been forgotten.
    """

    __slots__ = ("filled_at", "interval", "limit", "slack", "tat", "tau")

    def __init__(self, limit: Limit, slack: int, floor: int, now: int) -> None:
        self._agree(limit, slack)
        begin, floor = _whole(now), _whole(floor)
        self.tat = max(floor, begin + self.tau)
        self.filled_at = max(begin, begin + self.tau - max(0, floor - begin))

    def _agree(self, limit: Limit, slack: int) -> None:
        self.limit = limit
        self.slack = slack
        self.interval = interval(limit, slack)
        self.tau = (limit.burst - 1) * self.interval

    def change(self, limit: Limit, slack: int, floor: int, now: int) -> None:
        """Take other terms from `now` on, which is not before any slot that was given out, nor after any to come.

        A burst that grows begins empty, and one that falls is less at once; what is owed stays owed, in slots. So no
        change lets a slot through that the old terms and the new ones would not, and a limit that falls and rises again
        gains nothing. What a manager does not know about the time before its start holds for the new terms too: `floor`
        is theirs.
        """
        past = self.past()
        self._agree(limit, slack)
        self.filled_at, debt = self._carry(past, now)
        self.tat = max(self.filled_at + debt, _whole(floor))

    def inherit(self, past: Past, now: int) -> None:
        """From `now` on this stands for another window too: it owes what that owed, and has no more of its burst."""
        filled_at = max(self.filled_at, _whole(now))
        debt = max(0, self.tat - filled_at)
        other, owed = self._carry(past, now)
        self.filled_at = max(filled_at, other)
        self.tat = self.filled_at + max(debt, owed)

    @classmethod
    def handed_over(cls, past: Past, now: int) -> Window:
        """As another process had it; whose intervals for these terms may have been others, then it is a change."""
        window = cls(past.limit, past.slack, past.tat, now)
        window.tat, window.filled_at = past.tat, past.filled_at
        if past.interval != window.interval:
            window.filled_at, debt = window._carry(past, now)
            window.tat = window.filled_at + debt
        return window

    def past(self) -> Past:
        return Past(self.limit, self.slack, self.interval, self.tat, self.filled_at)

    def _carry(self, past: Past, now: int) -> tuple[int, int]:
        """`filled_at` and debt of `past` at `now`, in these terms."""
        begin = _whole(now)
        fill = max(0, past.filled_at - begin)
        debt = max(0, past.tat - begin - fill)
        fill = _scaled(fill, self.interval, past.interval) + (self.limit.burst - past.limit.burst) * self.interval
        begin = max(begin, past.late_until(self.slack, begin))
        return begin + max(0, fill), _scaled(debt, self.interval, past.interval)

    @property
    def owes(self) -> bool:
        """Whether slots were taken that are not paid, at `tat` at the latest."""
        return self.tat > self.filled_at


def _whole(moment: int) -> int:
    """Rounded up to a microsecond."""
    return -(-moment // MICROSECOND) * MICROSECOND


def _scaled(span: int, new: int, old: int) -> int:
    """`span` in intervals of `old`, in those of `new`; rounded up to a microsecond."""
    return -(-span * new // (old * MICROSECOND)) * MICROSECOND


class Meter:
    """Rate windows and connection places of one key: the figures of a throttle.

    Attributes:
        windows: the limits in force; empty: no rate limit.
        dormant: windows of limits that are gone while their debt is not, the last first: a limit that comes back finds
            it.
        slack: d, how long after its time a slot of this throttle may be used: the least of its windows.
        opens: no slot is before it: slots were given out ahead up to then, when the limits changed.
        cap: places there are, 0: unlimited. used: places taken. held: places by owner, None when nobody holds one.
        taken: slots given out so far. counts: a place also takes a slot (the proxy's own throttles count connections),
            if it is rated, or if `connections`: a place always does, and messages do not.
        closed_until: no place and no slot before it, a pause; 0: there is none. closed_by: what paused it, in words.
        shadow: holds nothing back, and counts what it would have; None: it holds.
        carried: None: nothing yet, or nobody has looked into the dialogues.
    """

    __slots__ = (
        *("cap", "carried", "closed_by", "closed_until", "connections", "counts", "dormant", "held", "key"),
        *("opens", "shadow", "slack", "taken", "used", "windows"),
    )

    def __init__(self, key: Key, counts: bool = False) -> None:
        self.key = key
        self.counts = counts
        self.windows: tuple[Window, ...] = ()
        self.dormant: tuple[Window, ...] = ()
        self.slack = FREE_SLACK
        self.opens = 0
        self.cap = 0
        self.taken = 0
        self.used = 0
        self.held: dict[str, int] | None = None
        self.connections = False
        self.closed_until = 0
        self.closed_by = ""
        self.shadow: Shadow | None = None
        self.carried: Carried | None = None

    # --- shadow ---

    def shadow_slot(self, now: int) -> None:
        """What holding would have come to: the slot is taken if it had been waited for."""
        shadow = self.shadow
        assert shadow is not None
        slot = self.earliest(now)
        if slot - now > max(shadow.patience, MICROSECOND):
            shadow.refused += 1
            return
        shadow.waited += slot > now + MICROSECOND - 1
        self.take_slot(slot)

    def shadow_place(self) -> None:
        """The same for a place, which is about to be taken."""
        shadow = self.shadow
        assert shadow is not None
        shadow.waited += self._out_of_places()

    # --- rate ---

    @property
    def lead(self) -> int:
        """How far ahead slots are given out: a place's slot is used in the same call."""
        return 0 if self.counts else AHEAD

    def earliest(self, now: int) -> int:
        """The next slot: `now`, rounded up to a microsecond, or later; of connections, up to LATENESS ago."""
        if self.counts:
            now -= LATENESS
        if self.closed_until > now:
            now = self.closed_until
        slot = -(-now // MICROSECOND) * MICROSECOND
        if slot < self.opens:
            slot = self.opens
        for window in self.windows:
            free = window.tat - window.tau
            if free > slot:
                slot = free
        return slot

    def after(self, slot: int) -> int:
        """The slot that comes after `slot`, if that is taken."""
        if len(self.windows) == 1:  # nearly always, and asked for each slot: the same, without a list
            window = self.windows[0]
            return (window.tat if window.tat > slot else slot) + window.interval - window.tau
        return max(
            [(window.tat if window.tat > slot else slot) + window.interval - window.tau for window in self.windows],
            default=slot,
        )

    def take_slot(self, slot: int) -> None:
        """Use up `slot`, which is not before `earliest`; never undone."""
        self.taken += 1
        for window in self.windows:
            tat = window.tat
            window.tat = (tat if tat > slot else slot) + window.interval

    def row(self, slot: int) -> int:
        """Nanoseconds from each slot to the next, if those from `slot` on, which is `earliest`, are evenly spaced.

        0: they are not, or nobody knows: part of a burst is left, several windows take turns.
        """
        if len(self.windows) != 1:
            return 0
        window = self.windows[0]
        return window.interval if not window.tau or slot == window.tat - window.tau else 0

    def take_row(self, slot: int, n: int) -> None:
        """As `take_slot` for each of the `n` slots of a row."""
        self.taken += n
        window = self.windows[0]
        window.tat = (window.tat if window.tat > slot else slot) + n * window.interval

    def put_off(self, slot: int, late: int) -> None:
        """A slot that was given out is used as if it were the later `slot`, by `late`: those to come are put off.

        By as much, so that they are as far from it as they were; never by more than taking another slot would.
        docs/throttling.md has the proof, which holds while `late` is less than half of a window (`may_put_off`).
        """
        late = _whole(late)
        for window in self.windows:
            window.tat = min(window.tat + late, max(window.tat, _whole(slot)) + window.interval)

    def may_put_off(self, late: int) -> bool:
        """Whether `put_off` keeps the bound."""
        return all(2 * late < window.limit.seconds * SECOND for window in self.windows)

    def debt_until(self) -> int:
        """When the last debt is paid; what must not be forgotten before."""
        return max([self._paid_at(window) for window in self.windows + self.dormant], default=0)

    def _paid_at(self, window: Window) -> int:
        """Made anew, a window has the smallest slack: where permits had more, their last use is that much later."""
        return window.tat + window.slack - self._slack_range(window.limit)[0] if window.owes else 0

    def _slack_range(self, limit: Limit) -> tuple[int, int]:
        return (LATENESS, LATENESS) if self.counts else slack_range(limit.seconds)

    def floor(self, limit: Limit, start: int) -> int:
        """The latest `tat` that a manager which died at `start`, with the same limit, can have left: H + tau + I later.

        With the interval of the largest slack, and later by what that is more than the smallest, since nobody knows
        which one was in force.
        """
        smallest, largest = self._slack_range(limit)
        return start + self.lead + largest - smallest + limit.burst * interval(limit, largest)

    def limit_to(self, limits: tuple[Limit, ...], start: int, now: int) -> bool:
        """Put `limits` (one per window length) in force; `start`: when this manager began.

        Returns:
            whether anything changed.
        """
        if tuple(window.limit for window in self.windows) == limits:
            return False
        begin = self._changeover(now)
        former = {window.limit.seconds: window.past() for window in self.windows}
        wanted = {limit.seconds: limit for limit in limits}
        gone = [past for seconds, past in former.items() if past.limit != wanted.get(seconds)]
        known = {window.limit.seconds: window for window in self.windows + self.dormant}
        dormant = [window.past() for window in self.dormant]
        active = []
        for limit in limits:
            window, floor = known.pop(limit.seconds, None), self.floor(limit, start)
            if window is None:
                window = Window(limit, self._slack_range(limit)[0], floor, begin)
            elif window.limit != limit:
                window.change(limit, window.slack, floor, begin)
            # In its time it was perhaps another one that let the fewest through, or this one was not asked.
            for past in gone if limit.seconds in former else [*former.values(), *dormant]:
                if past.limit.seconds != limit.seconds:
                    window.inherit(past, begin)
            active.append(window)
        rest = [window for window in known.values() if self._paid_at(window) > now]
        self.windows, self.dormant = tuple(active), tuple(rest[:MAX_DORMANT])
        self.slack = self._least_slack()
        self.opens = max([begin, *[past.late_until(self.slack, begin) for past in former.values()]])
        return True

    def _changeover(self, now: int) -> int:
        """A moment when limits may change: no slot that was given out is after it, and none to come shall be before."""
        latest = min([window.tat - window.interval for window in self.windows], default=now)
        return _whole(max(now, self.opens, min(now + self.lead, latest)))

    def stretch(self, need: int, start: int, now: int) -> bool:
        """Give permits at least `need` nanoseconds of slack where the window's range allows.

        Slack only grows while a throttle is remembered: a window that saw late uses of the past must not be filled
        with the closer slots of a smaller one.

        Returns:
            whether the slack grew; slots given out before must then not be given out again.
        """
        begin, grew = self._changeover(now), False
        for window in self.windows:
            slack = min(need, self._slack_range(window.limit)[1])
            if slack > window.slack:
                window.change(window.limit, slack, self.floor(window.limit, start), begin)
                grew = True
        if grew:
            self.slack = self._least_slack()
            self.opens = begin
        return grew

    def _least_slack(self) -> int:
        return min([window.slack for window in self.windows], default=FREE_SLACK)

    # --- places ---

    @property
    def all_places(self) -> int:
        """As configured; 0: unlimited."""
        return self.cap

    def limit_places(self, places: int, now: int) -> None:
        """So many from now on; 0: unlimited."""
        self.cap = places

    def full(self) -> bool:
        # (As `_out_of_places`: asked several times for each connection, and a call is most of what it costs.)
        return self.shadow is None and (0 < self.cap <= self.used or self.closed_until > 0)

    def _out_of_places(self) -> bool:
        return 0 < self.cap <= self.used or self.closed_until > 0

    def takes(self, rated: bool) -> bool:
        """Whether a place takes a slot here, too."""
        return self.counts and (rated or self.connections)

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
