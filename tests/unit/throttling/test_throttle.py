"""One throttle: slots over windows, changing limits, what a restart costs, places."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.throttling.flows import Path, Slots, Throttle
from proxy.throttling.line import Line
from proxy.throttling.throttle import (
    AHEAD,
    FREE_SLACK,
    LATENESS,
    MICROSECOND,
    SECOND,
    TICK,
    Key,
    Limit,
    Shadow,
    check,
    interval,
    slack_range,
)
from tests.unit.throttling.oracle import Rule, check_slots, check_windows

KEY = Key("192.0.2.1", "yahoo")
START = 1_000 * SECOND


def throttle(*limits: Limit, now: int = START) -> Throttle:
    made = Throttle(KEY)
    made.limit_to(limits, now, now)
    return made


def drain(one: Throttle, begin: int, end: int, step: int = TICK) -> list[int]:
    """Take every slot that may be given out from `begin` to `end`, looking each `step`."""
    slots = []
    for now in range(begin, end, step):
        while (slot := one.earliest(now)) <= now + AHEAD:
            one.take_slot(slot)
            slots.append(slot)
    return slots


@pytest.mark.parametrize(
    ("limit", "valid"),
    [
        (Limit(1, 3600), True),
        (Limit(2, 60, 1), True),
        (Limit(2, 60, 2), False),
        (Limit(100, 60, 100), False),
        (Limit(0, 60), False),
        (Limit(5, 0), False),
        (Limit(5, 60, 0), False),
        (Limit(1, 1), True),
        (Limit(20_000, 60, 10_000), True),
        (Limit(20_000, 60, 10_001), False),
    ],
)
def test_burst_as_large_as_the_limit_is_refused(limit: Limit, valid: bool) -> None:
    if valid:
        check(limit)
    else:
        with pytest.raises(ValueError, match=r"at least 1|smaller than|at most"):
            check(limit)


@pytest.mark.parametrize(
    ("limit", "slack", "expected"),
    [
        (Limit(350, 3600), 2 * SECOND, 10_291_429 * MICROSECOND),  # (3600+2)/350 s, rounded up
        (Limit(350, 3600, 51), 2 * SECOND, 12_006_666_667),  # (3600+2)/300
        (Limit(10, 1), SECOND // 10, SECOND // 10),  # nominal
        (Limit(3, 1), SECOND // 10, 333_334 * MICROSECOND),
        (Limit(1, 60), SECOND // 2, 60_500_000 * MICROSECOND),
        (Limit(10**9, 1), SECOND // 10, 10 * MICROSECOND),  # the most that is given out
    ],
)
def test_interval(limit: Limit, slack: int, expected: int) -> None:
    assert interval(limit, slack) == -(-expected // MICROSECOND) * MICROSECOND


def test_strict_ceiling_of_the_design() -> None:
    """350/h with d = 2 s: 99.94 %."""
    per_hour = 3600 * SECOND / interval(Limit(350, 3600), 2 * SECOND)
    assert per_hour / 350 == pytest.approx(0.9994, abs=5e-5)


@given(
    st.sampled_from((1, 60, 3600)),
    st.integers(1, 400),
    st.integers(1, 30),
    st.lists(st.integers(0, 5 * SECOND), max_size=60),
)
def test_slots_conform_whenever_somebody_looks(seconds: int, amount: int, burst: int, pauses: list[int]) -> None:
    limit = Limit(amount, seconds, min(burst, max(1, amount - 1)))
    slack = slack_range(seconds)[0]
    one = throttle(limit)
    now, slots = START + 2 * 3600 * SECOND, []
    for pause in pauses:
        now += pause
        for _ in range(3):
            slot = one.earliest(now)
            if slot <= now + AHEAD:
                one.take_slot(slot)
                slots.append(slot)
    rule = Rule(limit.amount, seconds, limit.burst, slack)
    check_slots(slots, rule)
    # The worst uses: each slot as late as it may be used, or as early.
    for uses in (slots, [slot + slack for slot in slots], [s + slack * (i % 2 == 0) for i, s in enumerate(slots)]):
        check_windows(sorted(uses), seconds * SECOND, rule.most(seconds * SECOND))


def test_one_an_hour() -> None:
    """L = 1, and the interval is far larger than the slack."""
    one = throttle(Limit(1, 3600))
    slots = drain(one, START, START + 4 * 3600 * SECOND, SECOND)
    assert len(slots) == 3  # an hour after the start, and each hour and two seconds
    assert slots[0] >= START + 3602 * SECOND
    assert all(b - a == 3602 * SECOND for a, b in pairwise(slots))


@pytest.mark.parametrize(
    ("seconds", "smallest", "largest"),
    [(1, 100, 500), (29, 100, 500), (30, 250, 500), (60, 250, 500), (599, 250, 500), (600, 2000, 2000)],
)
def test_slack_by_length_of_window(seconds: int, smallest: int, largest: int) -> None:
    assert slack_range(seconds) == (smallest * SECOND // 1000, largest * SECOND // 1000)
    one = throttle(Limit(5, seconds))
    assert one.slack == smallest * SECOND // 1000
    one.stretch(9 * SECOND, START, START)
    assert one.slack == largest * SECOND // 1000


def test_connections_have_the_slack_of_the_call_that_takes_them() -> None:
    """A minute and an hour alike; it does not stretch, and the interval pays for it."""
    one = Throttle(KEY, counts=True)
    one.limit_to((Limit(6, 60), Limit(100, 3600)), START, START)
    assert one.slack == LATENESS
    assert not one.stretch(SECOND, START, START)
    assert [window.interval for window in one.windows] == [
        -(-(60 * SECOND + LATENESS) // 6000) * MICROSECOND,
        -(-(3600 * SECOND + LATENESS) // 100_000) * MICROSECOND,
    ]


def test_tau_follows_a_burst_that_changes() -> None:
    one = throttle(Limit(100, 60, 5))
    for burst in (20, 1, 50):
        one.limit_to((Limit(100, 60, burst),), START, START)
        (window,) = one.windows
        assert (window.tau, window.interval) == ((burst - 1) * window.interval, interval(window.limit, window.slack))


@pytest.mark.parametrize(
    ("limit", "slack", "most"),
    [
        (Limit(5, 1), SECOND // 10, 6),  # nominal: README.md and docs/throttling.md give these figures
        (Limit(5, 1), SECOND // 2, 8),
        (Limit(100, 59), SECOND // 4, 101),
        (Limit(100, 60), SECOND // 4, 100),  # strict
        (Limit(100, 60), SECOND // 2, 100),
        (Limit(100, 60, 20), SECOND // 2, 100),
        (Limit(350, 3600), 2 * SECOND, 350),
    ],
)
def test_the_most_that_a_window_sees(limit: Limit, slack: int, most: int) -> None:
    """Used as late as may be, and then as early: a minute and longer hold exactly, shorter windows on average."""
    one = throttle(limit, now=START - 86400 * SECOND)
    one.stretch(slack, START - 86400 * SECOND, START)
    slots = drain(one, START, START + 2 * limit.seconds * SECOND + slack)
    window = limit.seconds * SECOND
    held = []
    for first in slots[: len(slots) // 2]:
        begin = first + slack  # what came before is used no later than then
        held.append(sum(max(slot, min(begin, slot + slack)) - begin in range(window) for slot in slots))
    assert max(held) == most


def test_several_windows_hold_together() -> None:
    limits = (Limit(5, 1), Limit(20, 60))
    one = throttle(*limits)
    slots = drain(one, START, START + 180 * SECOND)
    check_slots(slots, Rule(5, 1, 1, SECOND // 10))
    check_slots(slots, Rule(20, 60, 1, SECOND // 4))
    assert one.slack == SECOND // 10


@pytest.mark.parametrize("limits", [(), (Limit(50, 1, 3),), (Limit(50, 1, 3), Limit(60, 60, 9)), (Limit(9, 60),)])
def test_the_slot_after_one_is_what_comes_when_that_is_taken(limits: tuple[Limit, ...]) -> None:
    one = Throttle(KEY)
    one.limit_to(limits, 0, START)
    slot = START + SECOND
    for count in range(1, 12):
        after = one.after(slot)
        one.take_slot(slot)
        assert max(slot, after) == one.earliest(slot)
        assert after == max([window.tat - window.tau for window in one.windows], default=slot)
        assert one.taken == count
        slot = one.earliest(slot)


def test_slots_are_put_off_by_whole_microseconds_and_by_less_than_half_a_window() -> None:
    one = throttle(Limit(10, 1), Limit(60, 60))
    before = [window.tat for window in one.windows]
    one.put_off(before[0], 1)
    assert [window.tat for window in one.windows] == [tat + MICROSECOND for tat in before]
    assert one.may_put_off(SECOND // 2 - 1)
    assert not one.may_put_off(SECOND // 2)


def test_debts_end_when_the_last_is_paid() -> None:
    """A burst that is not there yet is none."""
    one = Throttle(KEY)
    assert one.debt_until() == 0
    one.limit_to((Limit(10, 1, 5), Limit(60, 60, 5)), 0, START)
    assert one.debt_until() == 0
    one.take_slot(one.earliest(START))
    assert one.debt_until() == one.windows[1].tat > one.windows[0].tat


@pytest.mark.parametrize(
    ("early", "waited", "refused"),
    [(0, 0, 0), (999, 0, 0), (1_000, 1, 0), (SECOND, 1, 0), (SECOND + MICROSECOND, 0, 1)],
)
def test_a_shadow_counts_who_would_have_waited_and_who_would_not_have_been_served(
    early: int, waited: int, refused: int
) -> None:
    one = throttle(Limit(1, 10))
    one.shadow = Shadow()
    assert one.shadow.patience == 0
    one.shadow.patience = SECOND
    slot = one.earliest(START)
    one.shadow_slot(slot - early)
    assert (one.shadow.waited, one.shadow.refused, one.taken) == (waited, refused, 1 - refused)


@pytest.mark.parametrize(("cap", "used", "waited"), [(0, 5, 0), (1, 0, 0), (2, 1, 0), (2, 2, 1), (2, 3, 1)])
def test_a_shadow_counts_who_would_have_waited_for_a_place(cap: int, used: int, waited: int) -> None:
    one = Throttle(KEY)
    one.shadow, one.cap, one.used = Shadow(), cap, used
    one.shadow_place()
    assert (one.shadow.waited, one.full()) == (waited, False)


def test_without_limits_a_slot_is_now() -> None:
    one = Throttle(KEY)
    assert one.earliest(START + 1) == START + MICROSECOND
    assert one.slack == FREE_SLACK
    assert not one.busy(START)


@pytest.mark.parametrize("limit", [Limit(1, 3600), Limit(100, 60, 20), Limit(50, 1, 3)])
@pytest.mark.parametrize("down", [0, SECOND, 10**6 * SECOND])
def test_a_restart_spends_nothing_twice(limit: Limit, down: int) -> None:
    """The dead manager gave out all it could; the new one, which knows nothing, goes on as if it knew."""
    old = throttle(limit)
    died = START + 7200 * SECOND
    slots = drain(old, died - 60 * SECOND, died)
    assert old.debt_until() <= old.floor(limit, died)
    new = throttle(limit, now=died + down)
    slots += drain(new, died + down, died + down + 3 * 3600 * SECOND, SECOND)
    check_slots(sorted(slots), Rule(limit.amount, limit.seconds, limit.burst, slack_range(limit.seconds)[0]))


def test_a_restart_counts_for_limits_that_come_later() -> None:
    """Minutes after the start an instance brings a lower limit: it may have been in force before."""
    one = throttle(Limit(1000, 3600))
    now = START + 300 * SECOND
    one.limit_to((Limit(1, 3600),), START, now)
    assert one.earliest(now) >= START + 3602 * SECOND


def test_dead_time_of_a_restart() -> None:
    """H + I, not more."""
    one = throttle(Limit(360, 3600))
    assert one.earliest(START) == START + AHEAD + interval(Limit(360, 3600), 2 * SECOND)


# --- limits that change ---


def used_up(limit: Limit, now: int) -> Throttle:
    one = throttle(limit, now=now - 10_000 * SECOND)
    while one.earliest(now) <= now + AHEAD:
        one.take_slot(one.earliest(now))
    return one


def test_a_higher_limit_shortens_the_wait() -> None:
    now = START * 100
    one = used_up(Limit(1, 3600), now)
    one.limit_to((Limit(3600, 3600),), START, now)
    assert now + SECOND <= one.earliest(now) <= now + 2 * SECOND


def test_a_lower_limit_holds_at_once_and_scales_the_debt() -> None:
    now = START * 100
    one = used_up(Limit(3600, 3600), now)
    before = one.debt_until() - now
    one.limit_to((Limit(360, 3600),), START, now)
    assert one.debt_until() - now == pytest.approx(before * 10, rel=1e-5)


def test_a_slot_given_out_ahead_does_not_become_hours() -> None:
    """A debt of milliseconds at 1000/s, scaled to 1/h, would be days."""
    now = START * 100
    one = used_up(Limit(1000, 1), now)
    one.limit_to((Limit(1, 1),), START, now)
    assert one.earliest(now) <= now + AHEAD + SECOND


LIMITS = st.sampled_from((Limit(1, 60), Limit(7, 60), Limit(60, 60, 9), Limit(600, 60, 50), Limit(100, 60)))


@given(st.lists(st.tuples(LIMITS, st.integers(0, 20 * SECOND), st.integers(0, 8)), min_size=1, max_size=20))
def test_changing_limits_never_pass_more_than_the_highest(changes: list[tuple[Limit, int, int]]) -> None:
    """And the debt stays within what a restart reckons with."""
    one = throttle(changes[0][0], now=START - 3600 * SECOND)
    now, slots = START, []
    for limit, pause, takes in changes:
        now += pause
        one.limit_to((limit,), START - 3600 * SECOND, now)
        for _ in range(takes):
            slot = one.earliest(now)
            if slot <= now + AHEAD:
                one.take_slot(slot)
                slots.append(slot)
        if len({limit.burst for limit, _, _ in changes}) == 1:  # else the debt of the larger burst is paid first
            assert one.debt_until() <= one.floor(limit, now)
    widest = max((limit for limit, _, _ in changes), key=lambda limit: limit.amount)
    burst = max(limit.burst for limit, _, _ in changes)
    smallest = min(interval(limit, SECOND // 4) for limit, _, _ in changes)
    slots.sort()
    for i, first in enumerate(slots):
        for j in range(i, len(slots)):
            assert (j - i + 1 - burst) * smallest <= slots[j] - first, widest


def test_a_limit_that_goes_and_comes_finds_its_debt() -> None:
    now = START * 100
    one = used_up(Limit(1, 3600), now)
    owed = one.debt_until()
    one.limit_to((), START, now)
    assert one.earliest(now) == now
    assert one.debt_until() == owed
    assert one.busy(now)
    one.limit_to((Limit(1, 3600),), START, now + SECOND)
    assert one.earliest(now) == owed


def test_the_next_slot_of_a_burst_does_not_come_sooner_when_slack_grows() -> None:
    now = START * 100
    one = used_up(Limit(600, 60, 20), now)
    coming = one.earliest(now)
    assert now < coming < now + AHEAD * 8
    for lateness in range(0, coming - now, MICROSECOND * 1000):
        again = used_up(Limit(600, 60, 20), now)
        assert again.stretch(SECOND // 2, START, now + lateness)
        assert again.earliest(now + lateness) >= coming


def test_a_burst_that_comes_and_goes_leaves_no_debt() -> None:
    """An instance brings a larger burst and a lower rate, and leaves, and nobody sent anything."""
    now = START * 100
    one = used_up(Limit(1100, 3600), now)
    coming = one.earliest(now)
    one.limit_to((Limit(100, 3600, 50),), START, now)
    one.limit_to((Limit(1100, 3600),), START, now + MICROSECOND)
    assert coming <= one.earliest(now) <= coming + AHEAD + 2 * MICROSECOND


def test_slack_grows_within_its_range_and_never_shrinks() -> None:
    one = throttle(Limit(60, 60))
    assert one.slack == SECOND // 4
    assert one.stretch(SECOND * 4 // 10, START, START)
    assert one.slack == SECOND * 4 // 10
    assert not one.stretch(SECOND // 4, START, START)
    assert one.stretch(9 * SECOND, START, START)
    assert one.slack == SECOND // 2
    assert not one.stretch(9 * SECOND, START, START)
    assert one.windows[0].interval == interval(Limit(60, 60), SECOND // 2)


# --- places ---


def test_no_cap_is_no_limit_of_places() -> None:
    one = Throttle(KEY)
    assert not one.full()
    for _ in range(100):
        one.take_place("a")
    assert not one.full()
    one.cap = 100
    assert one.full()
    one.cap = 101
    assert not one.full()


def test_in_use_while_somebody_waits_or_holds_a_place() -> None:
    one = Throttle(KEY)
    assert not one.in_use()
    one.take_place("a")
    assert one.in_use()
    assert one.busy(START)
    one.free_place("a")
    assert not one.in_use()
    one.line = Line(START)
    assert one.in_use()
    one.line = None
    one.slots = Slots(Path((one,)))
    assert one.in_use()
    one.slots = None
    one.limit_to((Limit(1, 60),), START, START)
    one.take_slot(one.earliest(START))
    assert not one.in_use()
    assert one.busy(START)  # in debt
    assert not one.busy(START + 200 * SECOND)


def test_places_by_owner() -> None:
    one = Throttle(KEY)
    one.cap = 2
    assert one.holds("a") == 0
    one.take_place("a")
    one.take_place("a")
    assert (one.full(), one.holds("a"), one.holds("b")) == (True, 2, 0)
    one.free_place("a")
    assert (one.full(), one.holds("a")) == (False, 1)
    one.free_place("a")
    assert (one.used, one.held) == (0, None)
    with pytest.raises(KeyError):
        one.free_place("a")
