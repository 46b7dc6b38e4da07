"""The timing wheel: never early, at most a tick late, each item once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.throttling.wheel import _LOOKS, _PIECE, Wheel

TICK = 25


def test_an_item_fires_at_the_end_of_its_bucket() -> None:
    wheel: Wheel[str] = Wheel(TICK)
    wheel.arm("a", 26)
    assert wheel.next_wakeup() == 50
    assert wheel.expire(49) == []
    assert wheel.expire(50) == ["a"]
    assert wheel.expire(10**9) == []
    assert wheel.next_wakeup() is None


def test_due_exactly_at_a_bucket() -> None:
    wheel: Wheel[str] = Wheel(TICK)
    wheel.arm("a", 50)
    assert wheel.expire(50) == ["a"]


def test_arming_again_moves() -> None:
    wheel: Wheel[str] = Wheel(TICK)
    wheel.arm("a", 10)
    wheel.arm("a", 100)
    assert wheel.expire(50) == []
    assert wheel.expire(100) == ["a"]
    wheel.arm_earlier("a", 200)
    wheel.arm_earlier("a", 300)
    assert wheel.next_wakeup() == 200
    wheel.arm_earlier("a", 150)
    assert wheel.next_wakeup() == 150
    wheel.disarm("a")
    assert "a" not in wheel
    assert wheel.next_wakeup() is None


def test_moved_there_and_back_fires_once() -> None:
    wheel: Wheel[str] = Wheel(TICK)
    for due in (50, 100, 50):
        wheel.arm("a", due)
    assert wheel.expire(1000) == ["a"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 500), st.booleans()), max_size=60))
def test_like_a_plain_dict(steps: list[tuple[int, int, bool]]) -> None:
    wheel: Wheel[int] = Wheel(TICK)
    model: dict[int, int] = {}
    now = 0
    for item, number, arms in steps:
        if arms:
            wheel.arm(item, now + number)
            model[item] = -(-(now + number) // TICK) * TICK
        else:
            now += number
            due = sorted(wheel.expire(now))
            assert due == sorted(item for item, at in model.items() if at <= now)
            model = {item: at for item, at in model.items() if at > now}
        assert len(wheel) == len(model)
        assert wheel.next_wakeup() == min(model.values(), default=None)


def test_many_of_one_bucket_lie_in_pieces() -> None:
    """A list of 100,000 would be copied when it grows."""
    wheel: Wheel[int] = Wheel(TICK)
    for item in range(2 * _PIECE + 5):
        wheel.arm(item, TICK)
    (bucket,) = wheel._buckets.values()
    assert [len(piece) for piece in bucket] == [_PIECE, _PIECE, 5]
    assert sorted(wheel.expire(TICK)) == list(range(2 * _PIECE + 5))
    assert (len(wheel), wheel.next_wakeup()) == (0, None)


def test_armed_again_for_the_same_time_it_stands_there_once() -> None:
    wheel: Wheel[str] = Wheel(TICK)
    for _ in range(100):
        wheel.arm("a", TICK)
    assert wheel._buckets == {1: [["a"]]}
    assert "a" in wheel


def test_some_at_a_time_and_the_others_stay_due() -> None:
    wheel: Wheel[int] = Wheel(TICK)
    for item in range(5):
        wheel.arm(item, TICK)
    taken = [wheel.expire(10 * TICK, most=2)]
    assert wheel.next_wakeup() == TICK
    taken += [wheel.expire(10 * TICK, most=2) for _ in range(2)]
    assert [len(each) for each in taken] == [2, 2, 1]
    assert wheel.next_wakeup() is None


def test_who_takes_some_looks_at_few_that_have_moved() -> None:
    """Eight looks for each that is wanted."""
    wheel: Wheel[int] = Wheel(TICK)
    for item in range(100):
        wheel.arm(item, TICK)
    for item in range(1, 100):
        wheel.arm(item, 5 * TICK)
    calls = [wheel.expire(TICK, most=1) for _ in range(100 // _LOOKS + 1)]
    assert calls == [[]] * (100 // _LOOKS) + [[0]]


def test_a_bucket_from_which_all_have_gone_does_not_wake() -> None:
    wheel: Wheel[str] = Wheel(TICK)
    for item in "abcd":
        wheel.arm(item, TICK)
    assert len(wheel.expire(TICK, most=2)) == 2
    for item in "abcd":
        wheel.disarm(item)
    assert wheel.next_wakeup() is None
