"""Turns: what is counted, when it is over, who comes next, and who must rest. No clock but the one in the calls."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.turns import MOST_A_ROUND, SECONDS, WORK, Line, Refusals, Turn


def test_a_new_turn_has_begun() -> None:
    turn = Turn("192.0.2.1")
    assert turn.key == "192.0.2.1"
    assert not turn.over
    assert turn.spend(1, 1e9)


@pytest.mark.parametrize("work", [1, 7, 50, WORK])
def test_a_turn_is_over_when_its_work_is_done(work: int) -> None:
    turn = Turn()
    turn.begin(10.0)
    times = 0
    while turn.spend(work, 10.0):
        times += 1
        assert not turn.over
    assert turn.over
    assert times == -(-WORK // work) - 1


def test_a_turn_is_over_when_its_time_is() -> None:
    turn = Turn()
    turn.begin(10.0)
    assert turn.spend(1, 10.0 + SECONDS * 0.99)
    assert not turn.spend(1, 10.0 + SECONDS)
    assert turn.over


def test_a_turn_that_was_ended_is_over_until_the_next_begins() -> None:
    turn = Turn()
    turn.end()
    assert turn.over
    assert not turn.spend(1, 0.0)
    turn.begin(0.0)
    assert not turn.over


def test_the_line_goes_round_by_key() -> None:
    line: Line[str] = Line()
    for item in ("a1", "a2", "a3", "b1", "c1", "c2"):
        line.add(item[0], item)
    assert [line.next() for _ in range(len(line))] == ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert not line


def test_one_that_comes_again_is_behind_all_others() -> None:
    line: Line[str] = Line()
    line.add("a", "a1")
    line.add("b", "b1")
    first = line.next()
    line.add("a", first)
    assert [line.next(), line.next()] == ["b1", "a1"]


def test_who_leaves_is_not_called_any_more() -> None:
    line: Line[str] = Line()
    for item in ("a1", "a2", "b1"):
        line.add(item[0], item)
    line.leave("a1")
    line.leave("b1")
    line.leave("nobody")
    assert "a1" not in line
    assert line.next() == "a2"
    assert not line


def test_nobody_waits() -> None:
    with pytest.raises(KeyError):
        Line().next()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), unique=True, min_size=1))
def test_no_key_waits_for_another_twice(items: list[tuple[int, int]]) -> None:
    """Between two turns of one key that waits all the time, no other key has more than one."""
    line: Line[tuple[int, int]] = Line()
    for item in items:
        line.add(item[0], item)
    served = [line.next() for _ in range(len(items))]
    assert sorted(served) == sorted(items)
    for key in {key for key, _ in items}:
        turns = [at for at, (other, _) in enumerate(served) if other == key]
        for before, after in pairwise(turns):
            between = [other for other, _ in served[before + 1 : after]]
            assert len(between) == len(set(between))


def test_a_flood_of_one_address_delays_another_by_one_turn() -> None:
    """What a queue of handshakes is for: a thousand of one address, and one of somebody else."""
    line: Line[int] = Line()
    for number in range(1000):
        line.add("198.51.100.9", number)
    line.add("192.0.2.1", -1)
    assert -1 in [line.next() for _ in range(2)]
    assert MOST_A_ROUND >= 2


def test_who_left_is_out_of_the_line_and_its_key_too() -> None:
    """A key that stayed would be the turn of nobody."""
    line: Line[int] = Line()
    line.add("192.0.2.1", 1)
    assert 1 in line
    assert 2 not in line
    line.leave(1)
    line.leave(1)
    assert 1 not in line
    line.add("192.0.2.2", 2)
    assert (line.next(), len(line)) == (2, 0)
    with pytest.raises(KeyError):
        line.next()


def test_refusals_cost_growing_pauses() -> None:
    refusals = Refusals()
    assert [refusals.refused() for _ in range(14)] == pytest.approx(
        [0, 0, 0, 0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1, 1]
    )
    for _ in range(2000):
        assert refusals.refused() == 1.0
    refusals.served()
    assert refusals.refused() == 0.0
