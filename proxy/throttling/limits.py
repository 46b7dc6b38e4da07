"""What the instances say about one throttle, and what follows for all of them together.

`reconcile` makes one set of limits from those of all live instances; `Backoff` is the slowing down after bad replies
and the slow return. `Terms` (in `flows`) keeps both for one throttle. How a limit is enforced is `throttle`'s job.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Final, NamedTuple

from proxy.throttling.throttle import SECOND, Limit

#: After a backoff the limit rises by a tenth of the full one each minute.
RISE_EVERY: Final = 60 * SECOND
RISE_STEPS: Final = 10
#: No limit is higher: it must fit its field of the wire.
MOST: Final = 2**32 - 1


class Mode(enum.StrEnum):
    """How the limits of several instances become one."""

    SUM = "sum"
    AVERAGE = "average"


class BackoffRule(NamedTuple):
    """Slow down to `percent` of each limit, or to `rate`, for `return_after` nanoseconds.

    `threshold`: percent of bad outcomes that starts it; 0: only an instance's word does.
    """

    percent: int = 50
    rate: Limit | None = None
    return_after: int = 300 * SECOND
    threshold: int = 0


class Part(NamedTuple):
    """What one instance has configured for a throttle. No limit for a length of window, or 0 places: unlimited.

    `cluster`: for all proxies together that use one throttle store, and not for this one alone.
    """

    limits: tuple[Limit, ...] = ()
    places: int = 0
    mode: Mode = Mode.AVERAGE
    paused: bool = False
    backoff: BackoffRule | None = None
    cluster: bool = False


class Effective(NamedTuple):
    """What is in force: limits by length of window, places (0: unlimited), and whether the modes contradict."""

    limits: tuple[Limit, ...] = ()
    places: int = 0
    mixed: bool = False


def reconcile(parts: Iterable[Part]) -> Effective:
    """One set of limits from those of all instances; a paused part counts for nothing.

    `sum`: the parts added, unlimited if one is. `average`: the mean of those that are set, rounded down, at least 1.
    Mixed: the sum over the parts that say sum, the mean over those that say average, and the lower of the two.
    """
    active = [part for part in parts if not part.paused]
    if len(active) == 1:
        return Effective(tuple(sorted(active[0].limits, key=_seconds)), active[0].places)
    sums = [part for part in active if part.mode is Mode.SUM]
    averages = [part for part in active if part.mode is Mode.AVERAGE]
    limits = []
    for seconds in sorted({limit.seconds for part in active for limit in part.limits}):
        amount = _lower(_sum(_amounts(sums, seconds)), _mean(_amounts(averages, seconds)))
        if amount:
            burst = min(limit.burst for part in active for limit in part.limits if limit.seconds == seconds)
            limits.append(Limit(amount, seconds, min(burst, max(1, amount - 1))))
    places = _lower(_sum([part.places for part in sums]), _mean([part.places for part in averages]))
    return Effective(tuple(limits), places, bool(sums and averages))


def _seconds(limit: Limit) -> int:
    return limit.seconds


def _amounts(parts: list[Part], seconds: int) -> list[int]:
    return [next((limit.amount for limit in part.limits if limit.seconds == seconds), 0) for part in parts]


def _sum(amounts: list[int]) -> int:
    return min(sum(amounts), MOST) if all(amounts) else 0


def _mean(amounts: list[int]) -> int:
    known = [amount for amount in amounts if amount]
    return max(1, sum(known) // len(known)) if known else 0


def _lower(one: int, other: int) -> int:
    """The lower of two limits where 0 is unlimited."""
    return min(one, other) if one and other else one or other


class Backoff:
    """A throttle that is slowed down, for everybody.

    Args:
        now: when it began.
    """

    __slots__ = ("rule", "until")

    def __init__(self, rule: BackoffRule, now: int) -> None:
        self.rule = rule
        self.until = now + rule.return_after

    def steps(self, now: int) -> int:
        """How many tenths of the full limit have come back by `now`."""
        return 0 if now < self.until else min(RISE_STEPS, (now - self.until) // RISE_EVERY)

    def over(self, now: int) -> bool:
        steps = self.steps(now)
        return steps == RISE_STEPS or (steps > 0 and self.rule.rate is None and self.slowed(100, now) == 100)

    def next_change(self, now: int) -> int:
        """When the limit changes next."""
        return self.until if now < self.until else self.until + (self.steps(now) + 1) * RISE_EVERY

    def slowed(self, amount: int, now: int) -> int:
        """`amount` of the full limit as it is now: at least 1, at most what it was."""
        return max(1, min(amount, amount * self.rule.percent // 100 + amount * self.steps(now) // RISE_STEPS))

    def apply(self, full: Effective, now: int) -> Effective:
        """The limits during the backoff. A `rate` stands in for the limit of its window, also where there was none."""
        rate = self.rule.rate
        limits = {limit.seconds: self._slow_limit(limit, now) for limit in full.limits}
        if rate is not None and rate.seconds not in limits:
            limits[rate.seconds] = rate._replace(amount=min(MOST, rate.amount * (1 + self.steps(now))))
        places = self.slowed(full.places, now) if full.places else 0
        return Effective(tuple(limits[seconds] for seconds in sorted(limits)), places, full.mixed)

    def _slow_limit(self, limit: Limit, now: int) -> Limit:
        rate = self.rule.rate
        if rate is None:
            amount = self.slowed(limit.amount, now)
        elif rate.seconds == limit.seconds:
            amount = min(limit.amount, rate.amount + limit.amount * self.steps(now) // RISE_STEPS)
        else:
            return limit
        return limit._replace(amount=amount, burst=min(limit.burst, max(1, amount - 1)))
