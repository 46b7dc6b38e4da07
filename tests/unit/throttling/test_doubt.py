"""Permits that lapse: who gets fewer for it, how few, and how it comes back. In the network: `test_world`."""

from __future__ import annotations

import itertools

import pytest

from proxy.throttling.doubt import STEP, WHOLE, Doubt, lapsed_too_many, since
from proxy.throttling.manager import Manager
from proxy.throttling.session import Session
from proxy.throttling.throttle import SECOND, Limit
from tests.unit.throttling.benches import KEY, OTHER, Bench, count, part

LIMIT = Limit(100, 1)


class Watched(Bench):
    """Two sessions that want more than there is; each second they ping, and one says what lapsed of what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.ill = self.session("good"), self.session("ill")
        self.lapsed = 0
        for session in (self.good, self.ill):
            self.register(session, (KEY, part(LIMIT)))
            self.want(session, 10**6)
        self.collect()

    def seconds(self, n: int, lapsing: float) -> dict[str, int]:
        """Permits of each in `n` seconds, when such a part of the ill one's lapses."""
        total = {"good": 0, "ill": 0}
        for _ in range(n):
            got = count(self.run(SECOND))
            for name, permits in got.items():
                total[name] += permits
            self.lapsed += round(got.get("ill", 0) * lapsing)
            for session in (self.good, self.ill):
                self.manager.ping(session, self.now // 1000, self.now)
            self.say(10**6)
        return total

    def say(self, want: int) -> None:
        self.manager.demand(self.ill, 0, want, self.got.get(self.ill, 0), 0, 0, 0, self.now, self.lapsed % 2**32)

    @property
    def doubt(self) -> Doubt | None:
        return self.ill.doubted.get(self.ill.flows[0])


@pytest.fixture
def bench() -> Watched:
    return Watched()


def test_all_is_equal_without_lapses(bench: Watched) -> None:
    got = bench.seconds(10, 0.0)
    assert abs(got["good"] - got["ill"]) <= 2
    assert bench.doubt is None


def test_an_eighth_may_lapse(bench: Watched) -> None:
    bench.seconds(10, 0.125)
    assert bench.doubt is None


@pytest.mark.parametrize("lapsing", [1.0, 0.5])
def test_who_lets_permits_lapse_gets_fewer_and_the_others_more(bench: Watched, lapsing: float) -> None:
    bench.seconds(20, lapsing)
    assert bench.doubt is not None
    assert bench.doubt.part <= 2
    got = bench.seconds(20, lapsing)
    assert got["good"] >= 0.95 * 20 * LIMIT.amount
    assert got["ill"] > 0  # or it could never show that it is well again


def test_it_comes_back_step_by_step(bench: Watched) -> None:
    bench.seconds(20, 1.0)
    parts = []
    for _ in range(80):
        bench.seconds(1, 0.0)
        parts.append(bench.doubt.part if bench.doubt is not None else WHOLE)
    assert parts == sorted(parts)
    assert {b - a for a, b in itertools.pairwise(parts)} <= {0, 1, STEP}
    assert bench.doubt is None
    got = bench.seconds(10, 0.0)
    assert abs(got["good"] - got["ill"]) <= 2


def test_one_round_halves_once(bench: Watched) -> None:
    """What was granted before the last halving tells nothing about what came of it."""
    bench.seconds(2, 0.0)
    bench.lapsed += 60
    bench.say(10**6)
    assert bench.doubt is not None
    first = bench.doubt.part
    bench.lapsed += 60
    bench.say(10**6)
    assert (first, bench.doubt.part) == (WHOLE // 2, WHOLE // 2)


def test_alone_it_has_all(bench: Watched) -> None:
    """Nobody could use what it cannot."""
    bench.seconds(20, 1.0)
    bench.want(bench.good, 0)
    bench.seconds(2, 1.0)
    assert bench.seconds(5, 1.0)["ill"] >= 0.95 * 5 * LIMIT.amount


def test_too_far_away_needs_no_word_of_its_own(bench: Watched) -> None:
    """A client that does not say what lapsed, with round trips longer than its permits live."""
    far(bench.manager, bench.ill, bench.now)
    bench.quiet.add(bench.ill)
    for _ in range(10):
        bench.run(SECOND)
        far(bench.manager, bench.ill, bench.now)
        bench.manager.ping(bench.good, bench.now // 1000, bench.now)
        bench.manager.ping(bench.ill, bench.now // 1000, bench.now)
        bench.say(10**6)
    assert bench.doubt is not None
    assert bench.doubt.part == 1
    assert any("round trip" in record.warning and "fewer" in record.warning for record in limits(bench))


def far(manager: Manager, session: Session, now: int) -> None:
    manager.pong(session, (now - 800_000_000) // 1000, 0, now)


def limits(bench: Watched) -> list:
    bench.manager.register(bench.ill, 0, [(KEY, part(LIMIT))], bench.now)
    return bench.output(bench.ill).limits


def test_no_limit_no_doubt() -> None:
    bench = Bench()
    session = bench.session("a")
    bench.register(session, (KEY, part()))
    bench.want(session, 100)
    bench.collect()
    bench.manager.demand(session, 0, 100, 100, 0, 0, 0, bench.now, 100)
    assert not session.doubted


def test_an_id_that_is_bound_anew_begins_anew(bench: Watched) -> None:
    bench.seconds(5, 1.0)
    bench.register(bench.ill, (OTHER, part(LIMIT)))
    bench.lapsed = 0
    bench.manager.ping(bench.ill, bench.now // 1000, bench.now)
    assert not bench.ill.doubted
    assert not bench.ill.lapses


@pytest.mark.parametrize(
    ("lapsed", "received", "too_many"),
    [(0, 0, False), (0, 100, False), (24, 100, False), (25, 100, True), (100, 100, True), (1, 0, True), (99, 0, False)],
)
def test_too_many(lapsed: int, received: int, too_many: bool) -> None:
    assert lapsed_too_many(lapsed, received) == too_many


def test_counts_go_round() -> None:
    assert since(2**32 - 2, 3) == 5
    assert since(100, 3) == 0  # a count that began anew
