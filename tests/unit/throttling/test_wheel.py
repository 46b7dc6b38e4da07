"""The timing wheel: never early, at most a tick late, each item once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.throttling.wheel import Wheel

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
