"""Bursts: many slots at one moment. One record, one turn's work at a time, and no larger than can be of use."""

from __future__ import annotations

import pytest

from proxy.throttling.giving import SLOTS_IN_A_TURN
from proxy.throttling.session import GrantRecord
from proxy.throttling.throttle import LARGEST_BURST, SECOND, Limit, check
from tests.unit.throttling.benches import KEY, MS, OTHER, Bench, count, part

FAST = Limit(100_000, 1, LARGEST_BURST)


def filled(bench: Bench, limit: Limit) -> None:
    """A session whose burst is there, and who wants more than that."""
    session = bench.session("a")
    bench.register(session, (KEY, part(limit)))
    wait(bench)
    bench.want(session, 10**6)


def wait(bench: Bench) -> None:
    """Until all bursts are there."""
    bench.now += 10 * SECOND
    for session in bench.manager.sessions.values():
        bench.manager.ping(session, bench.now // 1000, bench.now)
        bench.manager.pong(session, bench.now // 1000, 0, bench.now)
    bench.collect()


def test_slots_of_one_moment_are_one_record() -> None:
    """They were a record each: 99,999 of them, all void before the last had been written."""
    bench = Bench()
    filled(bench, Limit(1_000, 1, 300))
    (at_once, later) = bench.collect()["a"]
    assert at_once == GrantRecord(0, 300, 0, 0, 100_000)
    assert (later.first_offset_us, later.step_us) == (1_000, 1_000)


def test_a_large_burst_is_given_out_in_turns() -> None:
    """Each turn has a bounded number of slots, asks to be woken at once, and no slot is lost or doubled in between."""
    bench = Bench()
    filled(bench, FAST)
    manager, records = bench.manager, list(bench.collect()["a"])
    turns = [sum(record.n for record in records)]
    while (wake := manager.next_wakeup()) is not None and wake <= bench.now:
        manager.advance(bench.now)
        given = bench.collect().get("a", [])
        records += given
        turns.append(sum(record.n for record in given))
    assert max(turns) <= SLOTS_IN_A_TURN
    assert sum(record.n for record in records if record.step_us == 0) == LARGEST_BURST
    assert sum(turns) == LARGEST_BURST + 3_000  # and those of the next 30 ms, one each 10 us
    assert len(records) <= len(turns) + 1


def test_others_have_their_turn_meanwhile() -> None:
    """A burst that is not given out yet does not hold up who waits at another throttle for longer than a turn."""
    bench = Bench()
    slow = bench.session("b")
    bench.register(slow, (OTHER, part(Limit(10, 1))))
    filled(bench, FAST)
    bench.want(slow, 5)
    assert "b" not in bench.collect(), "this turn is over"
    bench.manager.advance(bench.now)
    assert count(bench.collect())["b"] == 1


def test_many_small_bursts_are_one_turns_work_together() -> None:
    """What is bounded is the work between two turns, not that of one throttle."""
    bench = Bench()
    session = bench.session("a")
    for id in range(10):
        bench.register(session, (KEY._replace(name=f"t{id}"), part(Limit(2_000, 1, 1_500))), id=id)
    wait(bench)
    for id in range(10):
        bench.manager.demand(session, id, 1_500, 0, 0, 0, 0, bench.now)
    assert count(bench.collect()) == {"a": SLOTS_IN_A_TURN}
    assert count(bench.run(MS)) == {"a": 15_000 - SLOTS_IN_A_TURN}


def test_permits_of_one_moment_come_back_one_by_one() -> None:
    """RETURN of a part of them: exactly these are given out again."""
    bench = Bench()
    filled(bench, Limit(1_000, 1, 300))
    bench.collect()
    session = bench.manager.sessions["a"]
    bench.manager.give_back(session, 0, 100, 50, bench.now)
    bench.manager.give_back(session, 0, 120, 10, bench.now)  # again: nothing
    assert bench.collect()["a"][0] == GrantRecord(0, 50, 0, 0, 100_000)


@pytest.mark.parametrize(("burst", "valid"), [(LARGEST_BURST, True), (LARGEST_BURST + 1, False), (99_999, False)])
def test_a_burst_that_nobody_can_use_is_refused(burst: int, valid: bool) -> None:
    limit = Limit(1_000_000, 60, burst)
    if valid:
        check(limit)
    else:
        with pytest.raises(ValueError, match="at most 10000"):
            check(limit)
