"""Which of several proxies the library uses, in a world of numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenarrow_proxy_client.choice import GRACE, LONGEST_PAUSE, Choice

PAUSE = 5.0


class World:
    """A choice, its clock, and luck that is always the same."""

    def __init__(self, count: int = 2, luck: float = 0.0) -> None:
        self.now = 1000.0
        self.luck = luck
        self.choice = Choice(count, PAUSE, self.now)

    def came(self, which: int) -> int | None:
        self.choice.came(which, self.now, self.luck)
        return self.choice.decide(self.now)

    def went(self, which: int) -> int | None:
        self.choice.went(which, self.now)
        return self.choice.decide(self.now)

    def leaves(self, which: int) -> int | None:
        self.choice.leaves(which, self.now)
        return self.choice.decide(self.now)

    def after(self, seconds: float) -> int | None:
        self.now += seconds
        return self.choice.decide(self.now)

    def rest(self) -> float:
        """Seconds until the better one is used again, from now."""
        at = self.choice.look_again(self.now)
        assert at is not None
        return at - self.now


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def at_first(world: World) -> World:
    """Both are up, and the preferred one is used."""
    world.came(0)
    world.came(1)
    assert world.choice.current == 0
    return world


def test_the_first_that_answers_is_used(world):
    assert world.choice.decide(world.now) is None
    assert world.came(0) == 0
    assert world.came(1) == 0
    assert world.choice.look_again(world.now) is None


def test_at_the_beginning_the_second_waits_for_the_first_to_fail(world):
    assert world.came(1) is None
    assert world.went(0) == 1


def test_but_not_longer_than_a_moment(world):
    assert world.came(1) is None
    assert world.rest() == GRACE
    assert world.after(GRACE) == 1


def test_a_preferred_one_that_is_a_moment_late_is_used(world):
    assert world.came(1) is None
    assert world.came(0) == 0


def test_the_next_is_used_at_once_when_one_is_lost(at_first):
    assert at_first.went(0) == 1


def test_the_next_is_used_at_once_when_one_says_not_now_and_the_other_comes_later_if_there_is_none(at_first):
    assert at_first.leaves(0) == 1
    assert at_first.leaves(1) == 1, "nobody else is there"
    at_first.went(0)
    assert at_first.came(0) == 0, "better than one that does not want us, rested or not"


def test_one_that_says_it_leaves_stays_in_use_until_another_is_up(world):
    world.came(0)
    assert world.leaves(0) == 0
    assert world.came(1) == 1


def test_the_preferred_one_is_used_again_after_a_rest(at_first):
    at_first.went(0)
    assert at_first.came(0) == 1
    rest = at_first.rest()
    assert at_first.after(rest - 0.001) == 1
    assert at_first.after(0.001) == 0


def test_a_rest_begins_anew_with_each_loss(at_first):
    at_first.went(0)
    at_first.came(0)
    at_first.after(at_first.rest() - 0.001)
    at_first.went(0)
    assert at_first.came(0) == 1
    assert at_first.after(1) == 1


def test_no_rest_keeps_the_only_one_from_being_used(at_first):
    at_first.went(0)
    at_first.came(0)
    assert at_first.went(1) == 0


@pytest.mark.parametrize("luck", [0.0, 0.5, 0.999])
def test_the_pause_doubles_with_each_loss_soon_after_up_to_the_longest(luck):
    world = World(luck=luck)
    world.came(0)
    world.came(1)
    rests = []
    for _ in range(9):
        world.went(0)
        world.came(0)
        rests.append(world.rest())
        assert world.after(rests[-1]) == 0
    pauses = [rest / (1 + luck) for rest in rests]
    assert pauses == pytest.approx([10, 20, 40, 80, 160, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE])


def test_one_that_was_good_for_long_begins_with_the_shortest_pause_again(at_first):
    for _ in range(4):
        at_first.went(0)
        at_first.came(0)
        at_first.after(at_first.rest())
    at_first.after(LONGEST_PAUSE)
    at_first.went(0)
    at_first.came(0)
    assert at_first.rest() == pytest.approx(PAUSE)


def test_luck_spreads_those_who_come_back():
    """A thousand MTAs lose the proxy in one moment, and it is back in one moment."""
    rests = []
    for number in range(1000):
        world = World(luck=number / 1000)
        world.came(0)
        world.came(1)
        world.went(0)
        world.came(0)
        rests.append(world.rest())
    busiest = max(sum(begin <= rest < begin + 1 for rest in rests) for begin in range(60))
    assert busiest <= 101, "ten seconds of them, a tenth in each"


def test_many_complaints_about_one_count_as_one(at_first):
    at_first.leaves(0)
    for _ in range(10):
        at_first.leaves(0)
    at_first.went(0)
    at_first.came(0)
    assert at_first.rest() == pytest.approx(2 * PAUSE)


def test_a_standby_that_comes_and_goes_changes_nothing(at_first):
    for _ in range(5):
        assert at_first.went(1) == 0
        assert at_first.came(1) == 0


def test_of_three_the_best_is_used():
    world = World(3)
    for which in (2, 1, 0):
        world.came(which)
    world.after(60)
    assert world.went(0) == 1
    assert world.went(1) == 2
    world.came(1)
    world.came(0)
    assert world.after(2 * PAUSE) in (0, 1)
    assert world.after(60) == 0


def test_one_that_stood_by_is_better_than_one_that_has_just_come_back():
    world = World(3)
    for which in (0, 1, 2):
        world.came(which)
    world.after(60)
    world.went(0)
    assert world.came(0) == 1
    assert world.went(1) == 2
    assert world.after(60) == 0


EVENTS = st.lists(
    st.tuples(st.sampled_from(["came", "went", "leaves"]), st.integers(0, 2), st.floats(0, 400)), max_size=40
)


@given(EVENTS)
def test_what_is_used_is_up_and_nobody_is_without_one_for_long(events):
    world = World(3, luck=0.3)
    up: set[int] = set()
    leaving: set[int] = set()
    for name, which, seconds in events:
        if name == "leaves" and which not in up:
            continue  # who is not there says nothing
        used = getattr(world, name)(which)
        if name == "came":
            up.add(which)
            leaving.discard(which)
        elif name == "went":
            up.discard(which)
            leaving.discard(which)
        else:
            leaving.add(which)
        assert used is None or used in up
        used = world.after(max(seconds, GRACE))
        assert used is None or used in up
        assert used is not None or not up - leaving
        assert used not in leaving or not up - leaving
    world.after(2 * LONGEST_PAUSE)
    assert not up - leaving or world.choice.current == min(up - leaving)
