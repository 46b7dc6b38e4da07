"""Who is alone at the throttles of a path is served without a queue: that is the same decision, only sooner made.

Two managers hear the same, one of which lets everybody queue; what they send and when they want to be woken is equal.
"""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.throttling.session import GrantRecord, Session
from proxy.throttling.throttle import Key, Limit
from tests.unit.throttling.benches import ALL, MS, OTHER, SOURCE, Bench, part

FAST = Limit(1_000_000, 1)
#: One throttle: evenly spaced, with a burst, slow, strict, none; several windows; several throttles.
PATHS = (
    [(Key(SOURCE, "fast"), part(FAST))],
    [(Key(SOURCE, "burst"), part(Limit(1000, 1, 20)))],
    [(Key(SOURCE, "slow"), part(Limit(30, 1)))],
    [(Key(SOURCE, "strict"), part(Limit(60_000, 60, 5)))],
    [(Key(SOURCE, "free"), part())],
    [(Key(SOURCE, "both"), part(Limit(2000, 1), Limit(60_000, 60)))],
    [(OTHER, part(Limit(5000, 1))), (ALL, part(Limit(3000, 1)))],
    [(Key(SOURCE, "fast"), part(FAST)), (ALL, part(Limit(3000, 1)))],
)
NAMES = ("a", "b")

Step = tuple[str, int, int, int]


def steps_on(paths: list[int]) -> st.SearchStrategy[list[Step]]:
    who, path, none = st.integers(0, len(NAMES) - 1), st.sampled_from(paths), st.just(0)
    return st.lists(
        st.one_of(
            st.tuples(st.just("want"), who, path, st.integers(0, 60)),
            st.tuples(st.just("wait"), none, none, st.integers(0, 60)),
            st.tuples(st.just("late"), none, none, st.integers(0, 60)),
            st.tuples(st.just("collect"), none, none, none),
            st.tuples(st.just("back"), who, path, st.integers(1, 5)),
            st.tuples(st.just("stop"), who, none, none),
            st.tuples(st.just("go"), who, none, none),
            st.tuples(st.just("owe"), who, path, st.integers(1, 2)),
        ),
        max_size=40,
    )


class Hearer(Bench):
    """A manager and its sessions, each on all paths; takes steps."""

    def __init__(self, queues_always: bool) -> None:
        super().__init__()
        self.manager._dispenser.queues_always = queues_always
        self.sessions: list[Session] = [self.session(name) for name in NAMES]
        for session in self.sessions:
            for id, parts in enumerate(PATHS):
                self.register(session, *parts, id=id)
        self.collect()

    def step(self, what: str, who: int, path: int, number: int) -> dict[str, list[GrantRecord]]:
        session = self.sessions[who]
        flow = session.flows[path]
        if what == "want":
            self.manager.demand(session, path, number, flow.granted, 0, 0, 0, self.now)
        elif what == "wait":
            return self.run(number * MS)
        elif what == "back":
            self.manager.give_back(session, path, max(0, flow.granted - number), number, self.now)
        elif what in ("stop", "go"):
            self.manager.congest(session, what == "stop", self.now)
        elif what == "late":  # nobody has looked at the clock
            self.now += number * MS
        elif what == "owe":
            for _ in range(number):
                self.manager._make_pay(flow, self.now)
        else:
            return self.collect()
        return {}

    def state(self) -> object:
        """What the next decisions follow from."""
        throttles = [each for piece in self.manager._registry.throttles.pieces for each in piece.values()]
        return (
            sorted((each.key, each.taken, each.earliest(self.now), each.slots is not None) for each in throttles),
            [(flow.want, flow.granted, flow.fine) for session in self.sessions for flow in session.flows.values()],
            self.manager.next_wakeup(),
        )


@example([("want", 0, 0, 1), ("want", 0, 0, 1), ("want", 0, 0, 3), ("collect", 0, 0, 0)])  # a run that may grow
@example([("want", 0, 1, 5), ("collect", 0, 0, 0), ("want", 0, 1, 30), ("wait", 0, 0, 9), ("want", 0, 1, 2)])  # a burst
@example([("want", 0, 1, 20), ("collect", 0, 0, 0), ("want", 0, 1, 4), ("collect", 0, 0, 0), ("want", 0, 1, 1)])
@example([("want", 0, 5, 9), ("want", 0, 5, 60), ("collect", 0, 0, 0)])  # two windows
@example([("want", 0, 2, 3), ("late", 0, 0, 10), ("want", 1, 2, 1), ("collect", 0, 0, 0)])  # somebody waits
@example([("owe", 0, 0, 2), ("want", 0, 0, 5), ("collect", 0, 0, 0)])
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, len(PATHS) - 1), min_size=1, max_size=2, unique=True).flatmap(steps_on))
def test_to_queue_or_not_comes_to_the_same(steps: list[Step]) -> None:
    short, long = Hearer(queues_always=False), Hearer(queues_always=True)
    for step in steps:
        assert short.step(*step) == long.step(*step), step
        assert short.state() == long.state(), step
    assert short.run(100 * MS) == long.run(100 * MS)


@pytest.mark.parametrize("want", [1, 16, 2000])
def test_slots_in_a_row_are_one_run_and_no_queue_is_made(want: int) -> None:
    bench = Hearer(queues_always=False)
    bench.step("want", 0, 0, want)
    assert bench.sessions[0].flows[0].path.throttles[0].slots is None
    step = 0 if want == 1 else 10
    assert bench.collect()["a"] == [GrantRecord(0, want, 0, step, 100_000)]
    assert bench.manager.throttles[Key(SOURCE, "fast")].taken == want


def test_more_than_is_near_waits_in_the_queue() -> None:
    bench = Hearer(queues_always=False)
    bench.step("want", 0, 0, 4000)
    slots = bench.sessions[0].flows[0].path.throttles[0].slots
    assert slots is not None
    assert slots.waiting == 1
    assert sum(record.n for record in bench.collect()["a"]) == 3001
