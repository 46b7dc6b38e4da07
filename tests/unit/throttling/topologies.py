"""Worlds drawn at random for fairness: throttles, sessions with weights, and paths through some of the throttles.

`draw` makes one, `Saturated` lets everybody want more than there is and counts what each gets, and `fair_shares` says
what each should get: progressive filling in exact fractions, which shares no code with the program. `judge` compares.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

from proxy.throttling.throttle import SECOND, Limit
from tests.unit.throttling.benches import MS, SOURCE, Bench, Key, part

#: Slots of two throttles that do not coincide cost up to one more interval each: this part of a share is the rule, and
#: this is what nobody gets less than, in any topology.
RULE, PROMISED = Fraction(1, 2), Fraction(1, 5)


class Unfair(AssertionError):
    """A session got less than it was promised, or nobody uses what there is."""


class Line(NamedTuple):
    """One session's path: through which throttles its messages go."""

    session: str
    throttles: tuple[str, ...]


class Topology(NamedTuple):
    limits: dict[str, Limit]
    lines: list[Line]
    weights: dict[str, float]

    def rate(self, throttle: str) -> Fraction:
        limit = self.limits[throttle]
        return Fraction(limit.amount, limit.seconds)


def draw(seed: int, amounts: tuple[int, ...], seconds: int, several: bool = False) -> Topology:
    """1 to 6 throttles, 1 to 8 sessions.

    Args:
        amounts: a throttle allows one of these per `seconds`. several: sessions have up to three paths each.
    """
    rng = random.Random(seed)
    names = [f"t{index}" for index in range(rng.randint(1, 6))]
    limits = {name: Limit(rng.choice(amounts), seconds) for name in names}
    lines = []
    for index in range(rng.randint(1, 8)):
        for _ in range(rng.randint(1, 3) if several else 1):
            some = rng.sample(names, rng.randint(1, min(len(names), rng.choice((2, 2, 3, 6)))))
            line = Line(f"s{index}", tuple(sorted(some)))
            if line not in lines:
                lines.append(line)
    weights = {line.session: rng.choice((0.5, 1.0, 1.0, 2.0, 4.0)) for line in lines}
    return Topology(limits, lines, weights)


def fair_shares(topology: Topology) -> dict[Line, Fraction]:
    """Weighted max-min by progressive filling: all shares grow together until a throttle is full, then the others'."""
    shares: dict[Line, Fraction] = {}
    while len(shares) < len(topology.lines):
        levels = []
        for name in topology.limits:
            growing = [line for line in topology.lines if name in line.throttles and line not in shares]
            if growing:
                taken = sum((share for line, share in shares.items() if name in line.throttles), Fraction(0))
                weight = sum(Fraction(topology.weights[line.session]) for line in growing)
                levels.append(((topology.rate(name) - taken) / weight, growing))
        level, full = min(levels, key=lambda found: found[0])
        for line in full:
            shares[line] = level * Fraction(topology.weights[line.session])
    return shares


def least_shares(topology: Topology) -> dict[Line, Fraction]:
    """What a session may count on: the least of its shares of the throttles of its path, which its own paths divide."""

    def share(line: Line, name: str) -> Fraction:
        there = [other for other in topology.lines if name in other.throttles]
        weights = {other.session: Fraction(topology.weights[other.session]) for other in there}
        own = sum(other.session == line.session for other in there)
        return topology.rate(name) * weights[line.session] / sum(weights.values()) / own

    return {line: min(share(line, name) for name in line.throttles) for line in topology.lines}


class Saturated:
    """The sessions of a topology, each with more mail for each of its paths than will ever be sent."""

    def __init__(self, topology: Topology, seed: int) -> None:
        self.bench = Bench()
        self.topology = topology
        rng = random.Random(seed)
        self._sessions = {name: self.bench.session(name, weight) for name, weight in topology.weights.items()}
        for id, line in rng.sample(list(enumerate(topology.lines)), len(topology.lines)):
            self.bench.run(rng.randrange(40 * MS))
            self.want(id, line)

    def want(self, id: int, line: Line) -> None:
        session = self._sessions[line.session]
        parts = [(Key(SOURCE, name), part(self.topology.limits[name])) for name in line.throttles]
        self.bench.register(session, *parts, id=id)
        self.bench.want(session, 2**31, got=0, id=id)

    def run(self, span: int) -> dict[Line, int]:
        """What each got within `span`."""
        got = dict.fromkeys(self.topology.lines, 0)
        for grants in self.bench.run(span).values():
            for grant in grants:
                got[self.topology.lines[grant.id]] += grant.n
        return got


def judge(got: dict[Line, int], promised: dict[Line, Fraction], seconds: int) -> None:
    """Whether each got what was promised, but for two slots at the edges of the time.

    Raises:
        Unfair: says who did not.
    """
    for line, share in promised.items():
        if got[line] + 2 < share * seconds:
            raise Unfair(f"{line} got {got[line]} in {seconds} s, promised were {float(share * seconds):.1f}: {got}")


def parts_of(shares: dict[Line, Fraction], part: Fraction) -> dict[Line, Fraction]:
    return {line: share * part for line, share in shares.items()}


def measured(topology: Topology, seed: int, warm: int, seconds: int) -> dict[Line, int]:
    world = Saturated(topology, seed)
    world.run(warm * SECOND)
    return world.run(seconds * SECOND)


def check(seeds: Iterable[int], amounts: tuple[int, ...], seconds: int, span: int, part: Fraction = RULE) -> None:
    """Topologies with one path a session, and others with several: everybody gets this part of its share.

    Raises:
        Unfair: one was not.
    """
    for seed in seeds:
        single = draw(seed, amounts, seconds)
        judge(measured(single, seed, span // 4, span), parts_of(fair_shares(single), part), span)
        several = draw(seed, amounts, seconds, several=True)
        judge(measured(several, seed, span // 4, span), parts_of(least_shares(several), part), span)
