"""A throttle that thousands of flows pass: what one call does is bounded, nobody is forgotten, no permit overtakes its
limits. Work is counted, in flows that are told; a test that takes the whole crowd at once fails here."""

from __future__ import annotations

import pytest

from proxy.throttling import registry, telling
from proxy.throttling.core import DELIVERY
from proxy.throttling.flows import Path
from proxy.throttling.limits import BackoffRule
from proxy.throttling.session import Session
from proxy.throttling.throttle import SECOND, Key, Limit
from tests.unit.throttling.benches import KEY, MS, SOURCE, Bench, part

CROWD = 2000
FULL = part(Limit(3600, 3600), backoff=BackoffRule(50, None, 300 * SECOND))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def own(id: int) -> Key:
    return Key(SOURCE, f"own-{id}")


def crowd(bench: Bench, name: str = "a", size: int = CROWD) -> Session:
    """A session with so many paths that all pass KEY, and that has heard of their limits."""
    session = bench.session(name)
    for id in range(size):
        bench.register(session, (KEY, FULL), (own(id), part()), id=id)
    hear(bench, session)
    assert not session.limits
    return session


def hear(bench: Bench, session: Session) -> dict[int, int]:
    """Everything that the session is sent until nothing is due: id → how often its limits were told; no call tells
    more than a step's worth."""
    told: dict[int, int] = {}
    while True:
        before = len(session.limits)
        bench.manager.advance(bench.now)
        assert len(session.limits) - before <= telling.STEP
        output = bench.manager.take(session, bench.now)
        assert len(output.limits) <= DELIVERY
        for record in output.limits:
            told[record.id] = told.get(record.id, 0) + 1
        due = bench.manager.next_wakeup()
        if not session.limits and (due is None or due > bench.now):
            return told


def test_one_outcome_tells_a_few_and_the_others_by_and_by(bench: Bench) -> None:
    session = crowd(bench)
    bench.manager.outcome(session, 0, 0, 50, 0, True, bench.now)
    assert len(session.limits) <= telling.AT_ONCE
    assert hear(bench, session) == dict.fromkeys(range(CROWD), 1)


def test_fifty_outcomes_in_a_row_are_told_once_or_twice(bench: Bench) -> None:
    session = crowd(bench)
    for id in range(50):
        bench.manager.outcome(session, id, 0, 50, 0, True, bench.now)
        assert len(session.limits) <= telling.AT_ONCE
    told = hear(bench, session)
    assert sorted(told) == list(range(CROWD))
    assert max(told.values()) <= 2


def test_other_rates_in_a_row(bench: Bench) -> None:
    session = crowd(bench)
    for id in range(50):
        bench.register(session, (KEY, part(Limit(3601 + id, 3600))), (own(id), part()), id=id)
        assert len(session.limits) <= telling.AT_ONCE + id + 1
    assert sorted(hear(bench, session)) == list(range(CROWD))


def test_what_changes_in_the_middle_is_told_to_those_who_were_told_before(bench: Bench) -> None:
    session = crowd(bench)
    bench.manager.outcome(session, 0, 0, 50, 0, True, bench.now)
    bench.manager.advance(bench.now)
    first = {flow.id for flow in session.limits}
    assert 0 < len(first) < CROWD
    bench.manager.take(session, bench.now)
    bench.register(session, (KEY, part(Limit(7200, 3600))), (own(9), part()), id=9)
    told = hear(bench, session)
    assert first <= set(told)
    assert sorted(told) == list(range(CROWD))


def test_a_permit_does_not_overtake_the_limits_of_its_path(bench: Bench) -> None:
    """While most of the crowd still waits for its LIMIT, the last of it gets a permit: its LIMIT comes first."""
    session, last = crowd(bench), CROWD - 1
    bench.manager.outcome(session, 0, 0, 50, 0, True, bench.now)
    bench.now += 3 * SECOND
    bench.manager.ping(session, bench.now // 1000, bench.now)
    session.pong_at = bench.now
    bench.want(session, 1, got=0, id=last)
    assert session.runs
    limits: list[int] = []
    grants: list[int] = []
    while not grants:
        output = bench.manager.take(session, bench.now)
        limits += [record.id for record in output.limits]
        grants += [record.id for record in output.grants]
        if not grants:
            assert session.parked_records
    assert grants == [last]
    assert last in limits
    assert len(limits) < CROWD  # it did not have to wait for all the others


def test_who_is_gone_is_told_nothing(bench: Bench) -> None:
    """An id that means another path by the time of its turn is told that path's limits, and no others after them."""
    session, last = crowd(bench), CROWD - 1
    bench.manager.outcome(session, 0, 0, 50, 0, True, bench.now)
    bench.register(session, (own(last), part(Limit(5, 60))), id=last)
    records = []
    while bench.manager.next_wakeup() == 0 or session.limits:
        bench.manager.advance(bench.now)
        records += bench.manager.take(session, bench.now).limits
    mine = [record for record in records if record.id == last]
    assert len(mine[-1].throttles) == 1


def test_a_session_that_ends_in_the_middle(bench: Bench) -> None:
    session, other = crowd(bench), crowd(bench, "b", 10)
    bench.manager.outcome(session, 0, 0, 50, 0, True, bench.now)
    bench.manager.advance(bench.now)
    bench.manager.bye(session, bench.now)
    assert sorted(hear(bench, other)) == list(range(10))


def test_a_slow_round_trip_stretches_a_few_paths_at_a_time(bench: Bench) -> None:
    session = crowd(bench)
    for id in range(CROWD):
        bench.want(session, 5, got=0, id=id)
    sent = bench.now
    bench.now += 400 * MS
    before = len(session.limits)
    bench.manager.pong(session, sent // 1000, 0, bench.now)
    assert len(session.limits) - before <= 100
    assert sorted(hear(bench, session)) == list(range(CROWD))


def test_a_throttle_has_so_many_flows_and_no_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_FLOWS", 3)
    a, b = bench.session("a"), bench.session("b")
    for id, session in enumerate((a, b, a)):
        bench.register(session, (KEY, part()), (own(id), part()), id=id)
    with pytest.raises(ValueError, match="3 ids name the throttle yahoo already"):
        bench.register(b, (KEY, part()), (own(9), part()), id=9)
    assert own(9) not in bench.manager.throttles
    assert sorted(b.flows) == [1]
    bench.register(a, (KEY, part(Limit(5, 60))), (own(0), part()), id=0)  # the same again
    bench.register(a, (own(2), part()), id=2)
    bench.register(b, (KEY, part()), (own(9), part()), id=9)


def test_a_path_has_so_many_flows_and_no_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_ON_A_PATH", 2)
    a, b = bench.session("a"), bench.session("b")
    bench.register(a, (KEY, part()), id=0)
    bench.register(b, (KEY, part()), id=0)
    with pytest.raises(ValueError, match="2 ids are bound to this path already"):
        bench.register(a, (KEY, part()), id=1)
    bench.register(a, (KEY, part()), (own(1), part()), id=1)
    bench.register(a, (KEY, part(Limit(5, 60))), id=0)


def test_many_slots_that_come_back_look_once_at_who_waits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not once for each slot."""
    fast = part(Limit(100_000, 1))
    giver, waiter = bench.session("a"), bench.session("b")
    for session in (giver, waiter):
        bench.register(session, (KEY, fast), id=0)
    bench.want(giver, 500)
    granted = bench.collect()["a"]
    assert sum(run.n for run in granted) >= 400
    looks: list[None] = []
    flows = Path.flows
    monkeypatch.setattr(Path, "flows", lambda self: looks.append(None) or flows(self))
    bench.manager.demand(waiter, 0, 10_000, 0, 0, 0, 0, bench.now)
    looks.clear()
    bench.manager.give_back(giver, 0, 0, 400, bench.now)
    assert len(looks) <= 1
