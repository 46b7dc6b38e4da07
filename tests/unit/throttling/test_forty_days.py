"""Forty days under one block that warms up and backs off: three instances always have mail, and a receiver refuses.

The judge shares no arithmetic with the program: it knows the calendar, the times of the refusals and what the document
says that they lead to, and counts what went in every window.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from proxy.policy.limits import Limits
from proxy.settings import BackoffSettings, Rate, ThrottleSettings, WarmupSettings
from proxy.throttling.flows import Places
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import SECOND

DAY = 86_400
FIRST_DAY = 20_000
#: When the simulation begins: at noon, two days before the first of the warm-up.
NOON = (FIRST_DAY - 2) * DAY + DAY // 2
DAYS = 40
FIGURES = (50, 100, 100, 200, 300, 500, 500, 700)
HOURLY = 40
RETURN_AFTER = 7200
PERCENT = 25
OWNERS = ("a", "b", "c")


class World:
    """The clock is that of the wall, in seconds; the manager's is the same in nanoseconds."""

    def __init__(self, seed: int) -> None:
        block = ThrottleSettings(
            name="yahoo",
            source=(),
            destination=(),
            max_concurrent_connections=0,
            max_delivery_rate=(Rate(HOURLY, 3600),),
            wait=None,
            warmup=WarmupSettings(figures=FIGURES, first_day=FIRST_DAY),
            backoff=(BackoffSettings(on=("421",), percent=PERCENT, return_after=float(RETURN_AFTER)),),
        )
        self.random = random.Random(seed)
        self.now = NOON * SECOND
        self.manager = Manager(1, self.now, blocks=Limits([block]))
        places = self.manager.admit("a", 1.0, "192.0.2.1", "198.51.100.1", (), self.now, False)
        assert isinstance(places, Places)
        self.places = places
        self.sent: list[float] = []
        self.by_owner: Counter[str] = Counter()
        self.refusals: list[float] = []

    def run(self) -> None:
        for owner in OWNERS:
            self.ask(owner)
        self.turn_day()
        end = self.now + DAYS * DAY * SECOND
        refusal, midnight = self.next_refusal(), self.next_midnight()
        while self.now < end:
            due = self.manager.next_wakeup()
            self.now = max(self.now, min(refusal, midnight, due if due is not None else end))
            if self.now >= midnight:
                self.turn_day()
                midnight = self.next_midnight()
            if self.now >= refusal:
                self.manager.replied(self.places, "421 4.7.0 slow down", self.now)
                self.refusals.append(self.now / SECOND)
                refusal = self.next_refusal()
            self.manager.advance(self.now)
            self.collect()

    def turn_day(self) -> None:
        self.manager.turn_day(self.now // (DAY * SECOND), self.now)

    def next_midnight(self) -> int:
        return (self.now // (DAY * SECOND) + 1) * DAY * SECOND

    def next_refusal(self) -> int:
        """Every other day or so, and some of them soon after another."""
        hours = self.random.choice((1, 1, 20, 50, 90)) * self.random.random()
        return self.now + int((60 + hours * 3600) * SECOND)

    def ask(self, owner: str) -> None:
        self.manager.ask_message(owner, 1.0, "192.0.2.1", "198.51.100.1", (), self.now)

    def collect(self) -> None:
        for ticket in self.manager.take_granted():
            self.sent.append(self.now / SECOND)
            self.by_owner[ticket.clerk.name] += 1
            self.ask(ticket.clerk.name)


def part(refusals: list[float], at: float) -> float:
    """What is left of each limit, as docs/throttling.md has it."""
    number = bisect_left(refusals, at)
    if number == 0:
        return 1.0
    minutes = (at - refusals[number - 1] - RETURN_AFTER) // 60
    return min(1.0, PERCENT / 100 + (max(0, minutes) * 0.1))


def figure(at: float) -> float | None:
    number = max(0, int(at // DAY) - FIRST_DAY)
    return FIGURES[number] if number < len(FIGURES) else None


def borders(refusals: list[float], begin: float, end: float) -> list[float]:
    """All moments at which a limit changes."""
    steps = [at + RETURN_AFTER + 60 * step for at in refusals for step in range(12)]
    midnights = [day * DAY for day in range(int(begin // DAY), int(end // DAY) + 2)]
    return sorted({begin, end, *(at for at in [*refusals, *steps, *midnights] if begin < at < end)})


class Integral:
    """Of a limit over time, in messages times seconds."""

    def __init__(self, limit: Callable[[float], float], moments: list[float]) -> None:
        self.moments = moments
        self.limits = [limit((a + b) / 2) for a, b in pairwise(moments)]
        self.sums = [0.0]
        for (a, b), value in zip(pairwise(moments), self.limits, strict=True):
            self.sums.append(self.sums[-1] + (b - a) * value)

    def until(self, at: float) -> float:
        number = min(max(0, bisect_left(self.moments, at) - 1), len(self.limits) - 1)
        return self.sums[number] + (min(at, self.moments[-1]) - self.moments[number]) * self.limits[number]

    def mean(self, begin: float, end: float) -> float:
        return (self.until(end) - self.until(begin)) / (end - begin)


def check(times: list[float], window: int, mean: Callable[[float, float], float]) -> None:
    """No window of this length sees more than the mean of the limits that held in it, plus one."""
    last = 0
    for first, begin in enumerate(times):
        while last < len(times) and times[last] < begin + window:
            last += 1
        allowed = mean(begin, begin + window) + 1
        assert last - first <= allowed + 1e-6, (begin, last - first, allowed)


@pytest.mark.parametrize("seed", [1, 2])
def test_forty_days(seed: int) -> None:
    world = World(seed)
    world.run()
    times, refusals = world.sent, world.refusals
    begin, end = float(NOON), float(NOON + DAYS * DAY + DAY)
    moments = borders(refusals, begin, end)
    assert len(refusals) > DAYS / 3
    hourly = Integral(lambda at: max(1.0, HOURLY * part(refusals, at)), moments)
    check(times, 3600, hourly.mean)
    warm_until = float((FIRST_DAY + len(FIGURES)) * DAY)
    warm = [at for at in times if at < warm_until]
    daily = Integral(
        lambda at: max(1.0, (figure(at) or 0.0) * part(refusals, at)), [at for at in moments if at <= warm_until]
    )
    check([at for at in warm if at <= warm_until - DAY], DAY, daily.mean)
    # And what may go goes: without a back-off that does not end, or a limit that stays behind.
    least = Integral(
        lambda at: min(HOURLY / 3600, (figure(at) or 1e9) / DAY) * part(refusals, at), borders(refusals, begin, end)
    )
    possible = least.until(world.now / SECOND) - least.until(begin)
    assert 0.93 * possible <= len(times) <= 1.01 * possible + 2
    assert max(world.by_owner.values()) - min(world.by_owner.values()) <= 3
    for number, most in enumerate(FIGURES):
        midnight = (FIRST_DAY + number) * DAY
        assert bisect_left(times, midnight + DAY) - bisect_left(times, midnight) <= most


def test_the_judge_sees_one_message_too_many() -> None:
    steady = Integral(lambda at: 24.0, [0.0, 10.0 * DAY])
    times = [number * 3600.0 for number in range(24 * 9)]
    check(times, DAY, steady.mean)
    with pytest.raises(AssertionError):
        check(sorted([*times, 100.0, 200.0]), DAY, steady.mean)
