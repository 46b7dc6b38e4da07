"""Permits that lapse: who gets fewer for it, how few, and how it comes back. In the network: `test_world`."""

from __future__ import annotations

import itertools

import pytest

from proxy.throttling.doubt import STEP, WHOLE, Doubt, lapsed_too_many, since
from proxy.throttling.flows import Flow, Path, Receiver, Slots, Throttle
from proxy.throttling.manager import Manager
from proxy.throttling.session import Session
from proxy.throttling.throttle import SECOND, Key, Limit, Window
from tests.unit.throttling.benches import KEY, OTHER, SOURCE, Bench, count, part

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


# --- the arithmetic ---


def doubted(*intervals: int, waiting: tuple[int, ...] = (2,), queued: bool = True, slack: int = 0) -> Flow:
    """A flow that had 100 permits, whose throttles have these intervals, and so many wait at each of them."""
    throttles = [Throttle(Key(SOURCE, f"t{number}")) for number in range(len(intervals) + len(waiting))]
    path = Path(tuple(throttles))
    for throttle, interval in zip(throttles, intervals, strict=False):
        throttle.windows = (Window(Limit(1, 1), 0, 0, 0),)
        throttle.windows[0].interval = interval
    for throttle, number in zip(throttles[len(intervals) :], waiting, strict=True):
        throttle.slots = Slots(path)
        throttle.slots.waiting = number
    for throttle in throttles:
        throttle.slack = slack
    made = Flow(Receiver("a", 1.0), 0, path)
    made.granted = 100
    made.queued = throttles[0] if queued else None
    return made


def in_doubt(flow: Flow) -> Doubt:
    doubt = Doubt(flow, 0)
    doubt.halve(flow, 0)
    assert doubt.part == WHOLE // 2
    return doubt


TENTH = SECOND // 10


def test_half_a_part_is_half_of_the_slots_and_half_a_second_of_them_is_kept() -> None:
    flow = doubted(TENTH, TENTH // 2)
    doubt = in_doubt(flow)
    assert (doubt.held, doubt.hold(flow, 9), doubt.held) == (0, 0, 9)
    doubt.refresh(flow, 6 * TENTH, 0)
    assert (doubt.hold(flow, 9), doubt.held) == (3, 6)
    assert (doubt.hold(flow, 3), doubt.held) == (3, 0)
    assert (doubt.hold(flow, 2), doubt.held) == (2, 0)
    flow.granted += 2
    doubt.refresh(flow, 8 * TENTH, 0)
    assert doubt.hold(flow, 9) == 2
    doubt.refresh(flow, 100 * TENTH, 0)
    assert doubt.hold(flow, 9) == 5
    flow.granted += 7  # more than it was to have: it pays for them
    doubt.refresh(flow, 100 * TENTH, 0)
    assert doubt.hold(flow, 9) == 0
    doubt.refresh(flow, 106 * TENTH, 0)
    assert doubt.hold(flow, 9) == 1


def test_a_slot_that_takes_longer_than_is_kept_comes_all_the_same() -> None:
    flow = doubted(3 * SECOND)
    doubt = in_doubt(flow)
    doubt.refresh(flow, 6 * SECOND - 2, 0)
    assert doubt.hold(flow, 9) == 0
    doubt.refresh(flow, 60 * SECOND, 0)
    assert doubt.hold(flow, 9) == 1


@pytest.mark.parametrize(
    ("waiting", "queued", "alone"),
    [
        ((1,), True, True),
        ((2,), True, False),
        ((0,), False, True),
        ((1,), False, False),
        ((1, 2), True, False),
        ((), True, True),
    ],
)
def test_who_is_alone_has_all_that_there_is(waiting: tuple[int, ...], queued: bool, alone: bool) -> None:
    flow = doubted(TENTH, waiting=waiting, queued=queued)
    assert in_doubt(flow).hold(flow, 9) == (9 if alone else 0)


def test_without_a_rate_a_permit_costs_next_to_nothing() -> None:
    flow = doubted()
    doubt = in_doubt(flow)
    doubt.refresh(flow, 14, 0)
    assert doubt.hold(flow, 9) == 7


def test_permits_from_before_the_last_time_do_not_count_again() -> None:
    flow = doubted(TENTH)
    doubt = in_doubt(flow)
    doubt.halve(flow, 100)
    assert doubt.part == WHOLE // 2
    doubt.halve(flow, 101)
    assert doubt.part == WHOLE // 4
    flow.granted = 150
    doubt.halve(flow, 140)
    for received in (141, 150):
        doubt.halve(flow, received)
        assert doubt.part == WHOLE // 8, "all that it has had by then is judged"
    for _ in range(9):
        doubt.halve(flow, 10**6)
    assert doubt.part == 1


def test_a_part_comes_back_when_permits_have_had_their_time_without_a_lapse() -> None:
    """Their slack, a round trip and two seconds for the report; and again only for later ones."""
    flow = doubted(TENTH, slack=3)
    doubt = in_doubt(flow)
    due = 1000 + 3 + 5 + 2 * SECOND
    doubt.refresh(flow, 500, 5)  # nothing was granted since
    flow.granted += 1
    for now in (1000, due - 1):
        assert not doubt.refresh(flow, now, 5)
        assert doubt.part == WHOLE // 2
    doubt.refresh(flow, due, 5)
    assert doubt.part == WHOLE // 2 + STEP
    for now in (due + 1, 9 * due):
        doubt.refresh(flow, now, 5)
    assert doubt.part == WHOLE // 2 + STEP
    flow.granted += 1
    doubt.refresh(flow, 10 * due, 5)
    doubt.halve(flow, flow.granted)
    doubt.refresh(flow, 20 * due, 5)
    assert doubt.part == (WHOLE // 2 + STEP) // 2, "one that lapses begins it anew"


def test_all_of_it_is_no_doubt() -> None:
    flow = doubted(TENTH)
    doubt = in_doubt(flow)
    now, rounds = 0, 0
    while True:
        flow.granted += 1
        doubt.refresh(flow, now, 0)
        now += 2 * SECOND
        rounds += 1
        if doubt.refresh(flow, now, 0):
            break
        now += 1
    assert (rounds, doubt.part) == (WHOLE // 2 // STEP, WHOLE)


@pytest.mark.parametrize(
    ("lapsed", "received", "too_many"),
    [(0, 0, False), (1, 0, True), (1, 4, True), (1, 5, False), (5, 1, True), (6, 1, False)],
)
def test_one_in_four_is_too_many_and_more_than_can_be_is_not_believed(
    lapsed: int, received: int, too_many: bool
) -> None:
    assert lapsed_too_many(lapsed, received) is too_many


@pytest.mark.parametrize(
    ("last", "count", "gone"), [(5, 7, 2), (7, 5, 0), (2**32 - 1, 1, 2), (0, 2**31 - 1, 2**31 - 1), (0, 2**31, 0)]
)
def test_counts_go_on_over_the_end_of_the_word(last: int, count: int, gone: int) -> None:
    assert since(last, count) == gone
