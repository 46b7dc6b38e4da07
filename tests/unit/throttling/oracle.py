"""Judges what a throttle let through, slot by slot, from the outside. Shares no arithmetic with the program.

Told of every slot that was granted (with the true time), every return of a holder, and every use. A count of uses per
window is blind to broken recycling, so the oracle looks at slots: minted ones must follow GCRA, also over restarts of
the manager; a slot given out again must be one that came back, each time once; each is used at most once and within
[slot, slot + slack]. At the end the uses are also counted in windows of W, W/10 and 10 W.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from copy import copy
from fractions import Fraction
from math import ceil, inf

SECOND = 1_000_000_000


class Violation(AssertionError):
    """The throttle broke its word."""


class Rule:
    """One limit as the design states it: L per W with burst B; strict from a minute on.

    `slack` is the d that the interval is made for, `latest` the largest d that permits may get for far sessions.
    """

    def __init__(self, amount: int, seconds: int, burst: int = 1, slack: int = 0, latest: int = 0) -> None:
        self.amount, self.seconds, self.burst, self.latest = amount, seconds, burst, max(slack, latest)
        window = seconds * SECOND
        if seconds >= 60:
            self.interval = Fraction(window + slack, amount - burst + 1)
        else:
            self.interval = Fraction(window, amount)

    def later(self, margin: int) -> Rule:
        """The same for whoever sees each use so much later at most."""
        rule = copy(self)
        rule.latest += margin
        return rule

    def most(self, window: int) -> int:
        """Uses that any half-open window of this many nanoseconds may hold."""
        return ceil(Fraction(window + self.latest) / self.interval) + self.burst - 1


def check_slots(slots: list[int], rule: Rule) -> None:
    """`slots` (sorted) follow GCRA: k of them span at least (k - burst) intervals.

    Sorted, because a path that waits for another throttle takes slots that lie a little ahead of the next path's. For
    sorted slots, and only for them, the running check below says the same as that inequality for every pair.
    """
    tat = Fraction(-(10**30))
    for slot in slots:
        if slot < tat - (rule.burst - 1) * rule.interval:
            raise Violation(f"slot {slot} is not allowed before {float(tat)} (burst {rule.burst})")
        tat = max(tat, slot) + rule.interval


def check_uses(uses: list[int], rule: Rule) -> None:
    """Every window at once, of whatever length: k of these times (sorted) span at least (k - burst) intervals, less
    `rule.latest`, since each is the use of a slot of its own, which is not later and at most so much earlier."""
    earliest, begin = Fraction(-(10**30)), 0
    for number, at in enumerate(uses):
        place = at - number * rule.interval
        if place < earliest + (1 - rule.burst) * rule.interval - rule.latest:
            count, spread = number - begin + 1, (at - uses[begin]) / SECOND
            raise Violation(
                f"{count} uses within {spread} s from {uses[begin]} are more than {rule.amount} in {rule.seconds} s"
            )
        if place > earliest:
            earliest, begin = place, number


class Terms:
    """Which limits a throttle had when, and what a window across their changes may hold.

    The design's word: no more than the most generous terms of the window's time would have let through by themselves.
    Across a restart, of which the new manager knows nothing, the largest burst comes once more on top of the rate; with
    equal limits that is the same.
    """

    def __init__(self) -> None:
        self.sizes: set[int] = set()
        self._periods: list[tuple[int, list[Rule], bool]] = []

    def change(self, now: int, rules: list[Rule]) -> None:
        """From `now` on these hold; none: nothing limits the rate."""
        self._periods.append((now, rules, False))
        self.sizes |= {rule.seconds * SECOND for rule in rules}

    def restart(self, now: int) -> None:
        """A new manager; nobody gets a slot before it has heard of limits."""
        if self._periods:
            self._periods.append((now, self._periods[-1][1], True))

    def most(self, begin: int, end: int, span: int) -> float:
        """Uses within a window of `span` whose slots were given out in [begin, end)."""
        first = max(0, bisect_left(self._periods, begin, key=lambda period: period[0]) - 1)
        periods = [period for period in self._periods[first:] if period[0] < end]
        if any(restart for began, _, restart in periods if began >= begin):
            bursts = [max(rule.burst for rule in rules) for _, rules, _ in periods if rules]
            return max((_alone(rules, span, 1) for _, rules, _ in periods), default=inf) + max(bursts, default=1) - 1
        return max((_alone(rules, span) for _, rules, _ in periods), default=inf)

    def check(self, uses: list[int], sizes: Iterable[int], late: int, ahead: int) -> None:
        """Every window of these sizes; slots are given out `ahead` of their time and used up to `late` after it."""
        for size in sizes:
            for index, start in enumerate(uses):
                held = bisect_left(uses, start + size) - index
                most = self.most(start - late - ahead, start + size, size)
                if held > most:
                    raise Violation(f"{held} uses within {size / SECOND} s from {start}, allowed are {most}")


def _alone(rules: list[Rule], span: int, burst: int = 0) -> float:
    """Uses in a window of `span` if these rules had always held; with `burst` instead of theirs, if given."""
    return min((rule.most(span) + ((burst - rule.burst) if burst else 0) for rule in rules), default=inf)


class Oracle:
    """Everything that was given out, by path, and used.

    Args:
        rules: throttle name → its limits. paths: path name → the throttles it passes.
        slack: path name → d of its permits, in nanoseconds.
        terms: throttle name → its limits, where they change.
        horizon: slots are given out so far ahead.
    """

    def __init__(
        self,
        rules: dict[str, list[Rule]],
        paths: dict[str, tuple[str, ...]],
        slack: dict[str, int],
        terms: dict[str, Terms] | None = None,
        horizon: int = 0,
    ) -> None:
        self.rules = rules
        self.terms = terms or {}
        self.horizon = horizon
        self.paths = paths
        self.slack = slack
        self.minted: dict[str, list[int]] = {name: [] for name in [*rules, *self.terms]}
        self.came_back: dict[str, Counter[int]] = {path: Counter() for path in paths}
        self.granted: list[tuple[str, int]] = []
        self.uses: list[tuple[str, int, int]] = []
        self._spent: set[int] = set()

    def grant(self, path: str, slot: int, now: int, horizon: int) -> int:
        """A slot is given out; its number, for `use` and `give_back`."""
        if slot > now + horizon:
            raise Violation(f"slot {slot} is given out {slot - now} ns ahead")
        if self.came_back[path][slot]:
            self.came_back[path][slot] -= 1
        else:
            for name in self.paths[path]:
                self.minted[name].append(slot)
        self.granted.append((path, slot))
        return len(self.granted) - 1

    def give_back(self, number: int) -> None:
        """The holder returns it instead of using it."""
        if number in self._spent:
            raise Violation("a spent slot came back")
        self._spent.add(number)
        path, slot = self.granted[number]
        self.came_back[path][slot] += 1

    def restarted(self, now: int) -> None:
        """A new manager: it knows of nothing that came back, and must not break what its predecessor gave out."""
        for counter in self.came_back.values():
            counter.clear()
        for terms in self.terms.values():
            terms.restart(now)

    def use(self, number: int, now: int) -> None:
        path, slot = self.granted[number]
        if number in self._spent:
            raise Violation(f"slot {slot} is used twice")
        self._spent.add(number)
        if not slot <= now <= slot + self.slack[path]:
            raise Violation(f"slot {slot} is used at {now}, {now - slot} ns after it (slack {self.slack[path]})")
        self.uses.append((path, slot, now))

    def finish(self) -> None:
        """The slots conform, those given out and those used, and no window held too many uses."""
        for name, rules in self.rules.items():
            self.minted[name].sort()
            used = [(slot, at) for path, slot, at in self.uses if name in self.paths[path]]
            times = sorted(at for _, at in used)
            for rule in rules:
                check_slots(self.minted[name], rule)
                check_slots(sorted(slot for slot, _ in used), rule)
                window = rule.seconds * SECOND
                for size in (window, window // 10, window * 10):
                    check_windows(times, size, rule.most(size))
                if rule.seconds >= 60:
                    check_windows(times, window, rule.amount)
        for name, terms in self.terms.items():
            times = sorted(at for path, _, at in self.uses if name in self.paths[path])
            terms.check(times, terms.sizes, max(self.slack.values()), self.horizon)


def check_windows(uses: list[int], window: int, most: int) -> None:
    """No half-open window [t, t + window) holds more than `most` of `uses` (sorted); the worst begin at a use."""
    for index, start in enumerate(uses):
        held = bisect_left(uses, start + window) - index
        if held > most:
            raise Violation(f"{held} uses within {window / SECOND} s from {start}, allowed are {most}")
