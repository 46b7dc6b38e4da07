"""Fairness where paths cross: nobody starves in any topology (docs/throttling.md, "Fairness").

Topologies are drawn at random, and an oracle that works with exact fractions says what each session was promised. The
broken variants of the core at the end must be caught by the same oracle in the same topologies.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction

import pytest

from proxy.throttling.dispenser import Dispenser
from proxy.throttling.flows import Flow, Receiver, Throttle
from proxy.throttling.throttle import SECOND, Limit
from tests.unit.throttling.benches import MS, SOURCE, Bench, Key, part
from tests.unit.throttling.simulation import nobody_is_forgotten
from tests.unit.throttling.topologies import (
    PROMISED,
    RULE,
    Line,
    Saturated,
    Topology,
    Unfair,
    check,
    draw,
    fair_shares,
    judge,
    least_shares,
    measured,
    parts_of,
)

Patch = pytest.MonkeyPatch

FAST = (10, 20, 25, 30, 40, 60, 100, 200)
SLOW = (10, 15, 20, 23, 30, 50, 59)
UNLIKE = (12, 30, 59, 300, 3000)


def topology(limits: dict[str, Limit], *lines: tuple[str, str]) -> Topology:
    """Lines as (session, "throttle throttle")."""
    made = [Line(session, tuple(names.split())) for session, names in lines]
    return Topology(limits, made, dict.fromkeys((line.session for line in made), 1.0))


@pytest.mark.parametrize("seed", range(0, 24, 4))
def test_nobody_gets_less_than_half_of_its_fair_share(seed: int) -> None:
    """The rule: half of max-min, half of the least share where sessions have several paths."""
    check(range(seed, seed + 4), FAST, 1, 12)


@pytest.mark.parametrize("seed", range(0, 12, 4))
@pytest.mark.parametrize("amounts", [SLOW, UNLIKE], ids=["slow", "unlike"])
def test_slow_and_unlike_throttles_are_shared_fairly_too(seed: int, amounts: tuple[int, ...]) -> None:
    check(range(seed, seed + 4), amounts, 59, 900 if amounts is SLOW else 120)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_topologies() -> None:
    """Nobody starves in any, and the rule is broken in few: by throttles whose slots never coincide."""
    exceptions = 0
    for seeds, amounts, seconds, span in (
        (range(100, 400), FAST, 1, 30),
        (range(400, 500), SLOW, 59, 3000),
        (range(500, 600), UNLIKE, 59, 600),
    ):
        for seed in seeds:
            check([seed], amounts, seconds, span, PROMISED)
            try:
                check([seed], amounts, seconds, span)
            except Unfair:
                exceptions += 1
    assert exceptions <= 500 // 50


@pytest.mark.parametrize(("seed", "several"), [(302, True), (356, True), (375, False)])
def test_what_once_starved(seed: int, several: bool) -> None:
    """Two throttles by turns put a claim off for ever; and who stood at another throttle than the rest of its path
    passed them all."""
    drawn = draw(seed, FAST, 1, several)
    shares = least_shares(drawn) if several else fair_shares(drawn)
    judge(measured(drawn, seed, 3, 12), parts_of(shares, RULE), 12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [Limit(40, 1), Limit(30, 59), Limit(40, 3600)], ids=str)
def test_who_needs_two_throttles_gets_as_much_as_those_who_need_one(limit: Limit, seed: int) -> None:
    """a under one rule, b under another, z under both, whose slots do not coincide at first: a third of it each."""
    crossing = topology({"r1": limit, "r2": limit}, ("a", "r1"), ("b", "r2"), ("z", "r1 r2"))
    slots = 400
    got = measured(crossing, seed, 10 * limit.seconds // limit.amount, slots * limit.seconds // limit.amount)
    assert sum(got.values()) == pytest.approx(1.5 * slots, abs=6)
    assert max(got.values()) - min(got.values()) <= 3


@pytest.mark.parametrize("seed", range(3))
def test_a_rule_below_the_address_is_shared_by_session(seed: int) -> None:
    """Address 30/s, rule 20/s, a and z under both, b under the address: all of the address is used, nobody starves."""
    world = topology(
        {"addr": Limit(30, 1), "rule": Limit(20, 1)}, ("a", "rule addr"), ("z", "rule addr"), ("b", "addr")
    )
    got = measured(world, seed, 10, 60)
    a, z, b = got.values()
    assert abs(a - z) <= 2
    assert min(a, z) >= 7.4 * 60
    assert b <= 15.1 * 60
    assert a + z + b >= 0.85 * 30 * 60


@pytest.mark.parametrize("seed", range(3))
def test_four_sessions_that_meet_at_the_address(seed: int) -> None:
    """Two under y and the address, two under the address and t: nobody is at 0 (max-min: 7.5 each)."""
    limits = {"y": Limit(20, 1), "addr": Limit(30, 1), "t": Limit(25, 1)}
    world = topology(limits, ("a", "y addr"), ("b", "addr t"), ("c", "y addr"), ("d", "addr t"))
    got = measured(world, seed, 10, 60)
    assert min(got.values()) >= 0.95 * 7.5 * 60


def test_a_session_counts_once_however_many_paths_it_has() -> None:
    """Ten paths below one limit, beside a session with one path there: half of it each."""
    limits = {f"r{index}": Limit(100, 1) for index in range(10)} | {"addr": Limit(100, 1)}
    world = topology(limits, *[("many", f"r{index} addr") for index in range(10)], ("one", "addr"))
    got = measured(world, 1, 5, 20)
    one = got.pop(world.lines[-1])
    assert one == pytest.approx(1000, rel=0.03)
    assert sum(got.values()) == pytest.approx(1000, rel=0.03)
    assert max(got.values()) - min(got.values()) <= 3


def test_a_path_of_several_throttles_holds_its_own_beside_the_same_sessions_shorter_path() -> None:
    """Its turns at one throttle are not taken by the session's other path while it waits for its turn at the next."""
    limits = {"t0": Limit(20, 1), "t1": Limit(100, 1)}
    world = topology(limits, ("s", "t0"), ("s", "t0 t1"), ("other", "t0"), ("third", "t1"))
    got = measured(world, 1, 5, 60)
    short, both, other, _ = got.values()
    assert abs(short - both) <= 3
    assert other == pytest.approx(600, rel=0.03)


@pytest.mark.parametrize("seed", range(6))
def test_trouble_leaves_nobody_behind(seed: int) -> None:
    """Sessions pause, choke, return slots, leave and come back; afterwards all have their shares as before."""
    rng = random.Random(seed)
    drawn = draw(1000 + seed, FAST, 1, several=True)
    world = Saturated(drawn, seed)
    bench, manager = world.bench, world.bench.manager
    for _ in range(150):
        name = rng.choice(list(drawn.weights))
        session = manager.sessions[name]
        id = rng.choice([id for id, line in enumerate(drawn.lines) if line.session == name])
        what = rng.randrange(5)
        if what == 0:
            manager.congest(session, not session.congested, bench.now)
        elif what == 1 and id in session.flows:
            names = drawn.lines[id].throttles
            parts = [(Key(SOURCE, each), part(drawn.limits[each], paused=rng.random() < 0.5)) for each in names]
            manager.register(session, id, parts, bench.now)
        elif what == 2 and id in session.flows:
            manager.give_back(session, id, session.flows[id].granted - 3, 3, bench.now)
        elif what == 3 and id in session.flows:
            bench.want(session, rng.choice((0, 1, 5, 2**31)), got=session.flows[id].granted, id=id)
        elif what == 4:
            manager.bye(session, bench.now)
            world._sessions[name] = bench.session(name, drawn.weights[name])
        bench.run(rng.randrange(300 * MS))
        nobody_is_forgotten(manager, bench.now)
    for session in manager.sessions.values():
        manager.congest(session, False, bench.now)
    for id, line in enumerate(drawn.lines):
        world.want(id, line)
    world.run(5 * SECOND)
    judge(world.run(12 * SECOND), {line: share / 2 for line, share in least_shares(drawn).items()}, 12)


def test_nothing_is_kept_of_who_waited() -> None:
    """When all is sent no throttle knows of anybody, whichever queue they stood in."""
    bench = Bench()
    session = bench.session("a")
    for id, names in enumerate((("r1", "addr"), ("r2", "addr"), ("addr",))):
        bench.register(session, *[(Key(SOURCE, name), part(Limit(20, 1))) for name in names], id=id)
        bench.want(session, 10, got=0, id=id)
    bench.run(10 * SECOND)
    assert [throttle.key.name for throttle in bench.manager.throttles.values() if throttle.slots is not None] == []
    assert bench.manager.active_throttles(bench.now) == 0


# --- the oracle itself ---


def test_progressive_filling_by_hand() -> None:
    limits = {"addr": Limit(30, 1), "rule": Limit(8, 1)}
    world = topology(limits, ("a", "rule addr"), ("z", "rule addr"), ("b", "addr"))
    assert list(fair_shares(world).values()) == [4, 4, 22]
    assert list(least_shares(world).values()) == [4, 4, 10]
    weighted = world._replace(weights={"a": 1.0, "z": 3.0, "b": 1.0})
    assert list(fair_shares(weighted).values()) == [2, 6, 22]


def test_judgement() -> None:
    line = Line("a", ("t",))
    judge({line: 8}, {line: Fraction(1)}, 10)
    with pytest.raises(Unfair):
        judge({line: 7}, {line: Fraction(1)}, 10)


# --- broken variants of the core ---


def level_again_at_each_throttle(patch: Patch) -> None:
    """Seniority is lost at each hop."""
    enqueue = Dispenser._enqueue

    def level(self: Dispenser, flow: Flow, throttle: Throttle) -> None:
        slots = throttle.slots
        assert slots is not None
        flow.turns = 0
        slots.times[flow.receiver.name] = max(slots.clock, slots.times[flow.receiver.name])
        enqueue(self, flow, throttle)

    patch.setattr(Dispenser, "_enqueue", level)
    patch.setattr(Dispenser, "_claim", lambda self, flow: None)


def nothing_is_held(patch: Patch) -> None:
    """Others take what is not near yet for one whose turn it is."""
    patch.setattr(Dispenser, "_claim", lambda self, flow: None)


def claims_ignored(patch: Patch) -> None:
    """Nobody minds a claim."""
    patch.setattr(Dispenser, "_rival", lambda self, flow, slot, now: (None, []))


def charged_at_one_throttle(patch: Patch) -> None:
    give = Dispenser._give

    def give_once(self: Dispenser, flow: Flow, slot: int) -> None:
        others = [throttle.slots for throttle in flow.path.throttles[1:] if throttle.slots is not None]
        times = [slots.times[flow.receiver.name] for slots in others]
        give(self, flow, slot)
        for slots, time in zip(others, times, strict=True):
            slots.times[flow.receiver.name] = time

    patch.setattr(Dispenser, "_give", give_once)


def weights_ignored(patch: Patch) -> None:
    weigh = Receiver.weigh
    patch.setattr(Receiver, "weigh", lambda self, weight: weigh(self, 1.0))


MUTANTS = [
    level_again_at_each_throttle,
    nothing_is_held,
    claims_ignored,
    charged_at_one_throttle,
    weights_ignored,
]


def cross_and_check() -> None:
    """The topologies of the tests above, until one of them is unfair."""
    for limit in (Limit(40, 1), Limit(30, 59)):
        crossing = topology({"r1": limit, "r2": limit}, ("a", "r1"), ("b", "r2"), ("z", "r1 r2"))
        for seed in range(3):
            span = 100 * limit.seconds // limit.amount
            judge(
                measured(crossing, seed, span // 4, span),
                {line: share / 2 for line, share in fair_shares(crossing).items()},
                span,
            )
    check(range(8), FAST, 1, 12)
    check(range(4), SLOW, 59, 900)


@pytest.mark.only_python("defects put in the place of functions")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Unfair):
        cross_and_check()
