"""Limits that change while they are used: no change lets a slot through that the old terms and the new ones would not.

Judged in slots: those within W + d of each other may all be used within W.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.throttling.throttle import AHEAD, MICROSECOND, SECOND, Key, Limit, Meter, Window, interval, slack_range
from tests.unit.throttling.oracle import Rule, Terms, check_windows

START = 1_000 * SECOND
#: Long after the start: nothing is owed for what a predecessor may have done.
LATER = 100_000 * SECOND
MINUTE = 60 * SECOND


def meter(*limits: Limit, now: int = LATER - 7200 * SECOND, start: int = START) -> Meter:
    made = Meter(Key("192.0.2.1", "yahoo"))
    made.limit_to(limits, start, now)
    return made


def spend(one: Meter, begin: int, end: int, most: int = 10**9) -> list[int]:
    """Take `most` of the slots that may be given out from `begin` to `end`; who asks looks each 25 ms."""
    slots: list[int] = []
    for now in range(begin, end, 25_000_000):
        while len(slots) < most and (slot := one.earliest(now)) <= now + AHEAD:
            one.take_slot(slot)
            slots.append(slot)
    return slots


def fullest(slots: list[int], span: int) -> int:
    """The most slots within a half-open `span`."""
    slots = sorted(slots)
    return max(sum(first <= slot < first + span for slot in slots[i:]) for i, first in enumerate(slots))


def uses_within(slots: list[int], seconds: int) -> int:
    """The most uses that a window can see."""
    return fullest(slots, seconds * SECOND + slack_range(seconds)[0])


@pytest.mark.parametrize(
    ("floor", "debt", "filled"),
    [
        (LATER - SECOND, 0, 4),
        (LATER, 0, 4),
        (LATER + SECOND, 1, 3),  # a slot may be owed, and all but one of the burst is not there yet
        (LATER + 4 * SECOND, 4, 0),
        (LATER + 9 * SECOND, 9, 0),
    ],
)
def test_a_new_window_begins_with_an_empty_burst_or_what_a_predecessor_may_owe(
    floor: int, debt: int, filled: int
) -> None:
    window = Window(Limit(10, 10, 5), 0, floor, LATER - 1)
    assert window.filled_at == LATER + filled * SECOND
    assert window.tat - window.filled_at == debt * SECOND
    assert window.owes == (debt > 0)


def owed(one: Meter, now: int) -> list[float]:
    """What each window owes, in its slots."""
    return [round((window.tat - max(now, window.filled_at)) / window.interval, 2) for window in one.windows]


def after_a_slot(*limits: Limit) -> tuple[Meter, int]:
    """Of a minute's one slot half is paid."""
    one = meter(*limits)
    one.take_slot(one.earliest(LATER))
    return one, LATER + 30 * SECOND


def test_a_window_that_stays_inherits_from_one_that_changes_and_from_no_other() -> None:
    minute, hour = Limit(1, 60), Limit(3600, 3600)
    one, now = after_a_slot(minute, hour)
    one.limit_to((Limit(60, 60), hour), START, now)
    assert owed(one, now) == [0.5, 0.5]
    one, now = after_a_slot(minute, hour)
    one.limit_to((Limit(50, 10), minute, hour), START, now)
    assert owed(one, now)[:2] == [0.5, 0.5]  # a new one inherits from all
    assert one.windows[2].tat == LATER + one.windows[2].interval
    one, now = after_a_slot(hour, minute)
    one.limit_to((Limit(1800, 3600), minute), START, now)
    assert owed(one, now)[1] == 0.5
    assert one.windows[0].tat == now  # it owes nothing, and what the minute owes was known


def test_what_is_owed_to_nobody_stays_so_to_the_microsecond() -> None:
    one = meter(Limit(100, 60))
    for limit in (Limit(50, 60), Limit(100, 60)):
        one.limit_to((limit,), START, LATER - 1)
        (window,) = one.windows
        assert window.tat == window.filled_at == one.opens == LATER
    one.limit_to((Limit(100, 60), Limit(5, 1)), START, LATER - 1)
    assert [window.tat for window in one.windows] == [LATER, LATER]


def test_an_heir_has_no_more_of_its_burst_than_either() -> None:
    """What it owes begins when the later of the two has its burst."""
    limit = Limit(10, 10, 5)
    for own, other in ((LATER, LATER + SECOND), (LATER + SECOND, LATER)):
        heir, past = Window(limit, 0, 0, own), Window(limit, 0, 0, other).past()
        heir.inherit(past, LATER)
        assert heir.filled_at == heir.tat == LATER + 5 * SECOND
    heir.inherit(Window(limit, 0, 0, LATER).past(), LATER + 6 * SECOND - 1)
    assert heir.filled_at == heir.tat == LATER + 6 * SECOND


def test_slots_of_less_slack_come_when_those_of_more_are_used() -> None:
    """10 minutes' permits live for 2 s, a second's for 0.1: the debt begins 1.9 s after the last one."""
    ten, later = Limit(100, 600, 5), 1_900_000_000
    one = meter(ten)
    for _ in range(2):
        one.take_slot(one.earliest(LATER))
    one.limit_to((Limit(10, 1, 5),), START, LATER)
    assert one.earliest(LATER) == one.opens == LATER + AHEAD + later
    assert owed(one, one.opens) == [pytest.approx(2, abs=0.01)]
    one = meter(ten)
    one.take_slot(one.earliest(LATER))
    one.limit_to((Limit(10, 1),), START, LATER + SECOND)
    assert one.opens == LATER + later
    one = meter(ten)
    one.take_slot(one.earliest(LATER))
    one.limit_to((Limit(10, 1),), START, LATER + 5 * SECOND)
    assert one.opens == LATER + 5 * SECOND


def test_limits_change_after_the_last_slot_that_was_given_out() -> None:
    """It is where the window says that owes least: a burst is given out at once, and counts for later."""
    one = meter(Limit(10, 1, 5), Limit(20, 10, 15))
    for _ in range(5):
        one.take_slot(one.earliest(LATER))
    now = LATER + SECOND * 39 // 100
    one.limit_to((Limit(10, 1, 5), Limit(10, 10, 5)), START, now)
    assert one.opens == LATER + SECOND * 4 // 10


def test_a_burst_that_grows_begins_empty() -> None:
    """100 a minute, burst 1 → 50, as when the one instance that said 1 leaves: it was 149."""
    one = meter(Limit(100, 60))
    slots = spend(one, LATER, LATER + MINUTE)
    one.limit_to((Limit(100, 60, 50),), START, LATER + MINUTE)
    slots += spend(one, LATER + MINUTE, LATER + 3 * MINUTE)
    assert uses_within(slots, 60) <= 100


def test_a_burst_that_grew_is_there_in_time() -> None:
    one = meter(Limit(100, 60))
    one.limit_to((Limit(100, 60, 50),), START, LATER)
    full = 49 * interval(Limit(100, 60, 50), SECOND // 4)
    assert len(spend(one, LATER + full + AHEAD, LATER + full + AHEAD + 1)) == 50


def test_a_burst_that_falls_keeps_what_is_owed() -> None:
    one = meter(Limit(100, 60, 50))
    slots = spend(one, LATER, LATER + 1)
    assert len(slots) == 50
    one.limit_to((Limit(100, 60),), START, LATER + SECOND)
    slots += spend(one, LATER + SECOND, LATER + 3 * MINUTE)
    assert uses_within(slots, 60) <= 100


def test_a_window_of_another_length_inherits_the_debt() -> None:
    """60 s → 61 s with burst 50: it was 125."""
    one = meter(Limit(100, 60, 50))
    slots = spend(one, LATER, LATER + 30 * SECOND)
    one.limit_to((Limit(100, 61, 50),), START, LATER + 30 * SECOND)
    slots += spend(one, LATER + 30 * SECOND, LATER + 3 * MINUTE)
    assert uses_within(slots, 60) <= 100
    assert uses_within(slots, 61) <= 102  # what 100 in 60 s alone would let through


def test_a_length_that_is_changed_again_and_again_gains_nothing() -> None:
    """4 a minute, twelve other lengths in a minute: it was 13."""
    one, slots, now = meter(Limit(4, 60)), [], LATER
    for step in range(12):
        slots += spend(one, now, now + 5 * SECOND)
        now += 5 * SECOND
        one.limit_to((Limit(4, 60 + step % 3 if step % 2 else 70 + step),), START, now)
    assert uses_within(slots, 60) <= 4


def test_a_length_that_comes_back_owes_what_was_sent_meanwhile() -> None:
    one = meter(Limit(100, 60, 50))
    slots = spend(one, LATER, LATER + 1)
    for seconds in (61, 60, 61, 60):
        one.limit_to((Limit(100, seconds, 50),), START, LATER + SECOND)
        slots += spend(one, LATER + SECOND, LATER + 2 * SECOND)
    assert len(slots) <= 50 + 4


def test_a_length_beside_another_begins_with_its_debt() -> None:
    """And so goes on when the other one leaves in the next step."""
    one = meter(Limit(100, 60, 50))
    slots = spend(one, LATER, LATER + 1)
    one.limit_to((Limit(100, 60, 50), Limit(100, 61, 50)), START, LATER + SECOND)
    one.limit_to((Limit(100, 61, 50),), START, LATER + SECOND)
    slots += spend(one, LATER + SECOND, LATER + 2 * MINUTE)
    assert uses_within(slots, 60) <= 100


def test_what_is_remembered_of_other_lengths_is_bounded() -> None:
    """And the last one owes what the first did."""
    one = meter(Limit(2, 3600))
    (slot,) = spend(one, LATER, LATER + 1)
    for seconds in range(3601, 3700):
        one.limit_to((Limit(2, seconds),), START, LATER + SECOND)
    assert len(one.dormant) <= 4
    assert one.earliest(LATER + SECOND) >= slot + 1800 * SECOND


def test_smaller_slack_waits_for_permits_of_a_larger_one() -> None:
    """A permit of an hour's limit is used up to 2 s late; a minute's slots are spaced for 0.25 s."""
    one = meter(Limit(36000, 3600, 50))
    last = spend(one, LATER, LATER + SECOND)[-1]
    one.limit_to((Limit(600, 60),), START, LATER + SECOND)
    assert one.earliest(LATER + SECOND) >= last + 2 * SECOND - SECOND // 4


def test_no_slot_lies_before_those_that_were_given_out_ahead() -> None:
    """1000 a second, and one slot 30 ms ahead, as for a path that another throttle holds up."""
    one = meter(Limit(1000, 1, 5))
    one.take_slot(LATER + AHEAD)
    one.limit_to((Limit(1, 1),), START, LATER)
    assert one.earliest(LATER) >= LATER + AHEAD


@pytest.mark.parametrize("seconds", [59, 60, 599, 600, 3600])
def test_forgotten_only_when_its_last_permit_is_as_old_as_slack_allows(seconds: int) -> None:
    """Made anew, its slots are spaced for the smallest slack again."""
    one = meter(Limit(2, seconds))
    one.stretch(2 * SECOND, START, LATER)
    one.take_slot(one.earliest(LATER))
    smallest, largest = slack_range(seconds)
    assert one.debt_until() == one.windows[0].tat + largest - smallest


# --- restarts ---


def test_a_restart_with_the_same_limit_passes_nothing_more_whatever_the_slack_was() -> None:
    """10,000 a minute, used late by 0.5 s until the manager dies; the new one begins at once, with 0.25 s."""
    limit = Limit(10_000, 60)
    old = meter(limit)
    old.stretch(SECOND // 2, START, LATER - MINUTE)
    uses = [slot + SECOND // 2 for slot in spend(old, LATER - 5 * SECOND, LATER)]
    new = meter(limit, now=LATER, start=LATER)
    uses += spend(new, LATER, LATER + 62 * SECOND)
    uses.sort()
    check_windows(uses, MINUTE, 10_000)


def test_a_restart_with_a_smaller_burst_passes_the_larger_one_once_more() -> None:
    """The document says so: nothing is stored, and a limit that began as late as any burst might ask for waited W."""
    old = meter(Limit(100, 60, 50))
    slots = spend(old, LATER, LATER + 1)
    new = meter(Limit(100, 60), now=LATER + SECOND, start=LATER + SECOND)
    slots += spend(new, LATER + SECOND, LATER + 2 * MINUTE)
    assert 100 < uses_within(slots, 60) <= 100 + 49


# --- any changes ---

BURSTS = st.sampled_from((1, 2, 5, 20, 60))
SECONDS = st.sampled_from((60, 61, 75, 120, 1, 30))


@st.composite
def limits(draw: st.DrawFn) -> tuple[Limit, ...]:
    lengths = draw(st.lists(SECONDS, min_size=1, max_size=2, unique=True))
    amounts = [draw(st.sampled_from((1, 4, 30, 100))) for _ in lengths]
    return tuple(
        Limit(amount, seconds, min(draw(BURSTS), max(1, amount - 1)))
        for amount, seconds in zip(amounts, sorted(lengths), strict=True)
    )


def rules(terms: tuple[Limit, ...]) -> list[Rule]:
    return [Rule(each.amount, each.seconds, each.burst, slack_range(each.seconds)[0]) for each in terms]


Change = tuple[tuple[Limit, ...], int, int, bool]
CHANGES = st.lists(
    st.tuples(limits(), st.sampled_from((0, MICROSECOND, SECOND, 20 * SECOND)), st.integers(0, 110), st.booleans()),
    min_size=2,
    max_size=9,
)


def history(changes: list[Change]) -> tuple[list[int], Terms]:
    """The slots of a throttle whose limits change, and what was in force when; some are taken ahead of their time."""
    one, now, slots, terms = meter(), LATER, [], Terms()
    for limit, pause, takes, ahead in changes:
        one.limit_to(limit, START, now)
        terms.change(now, rules(limit))
        slots += spend(one, now, now + pause + 1, takes)
        now += pause
        slot = max(one.earliest(now), now + AHEAD)
        if ahead and slot <= now + AHEAD:
            one.take_slot(slot)
            slots.append(slot)
    return slots, terms


@given(CHANGES)
def test_no_change_passes_more_than_the_most_generous_terms_alone(changes: list[Change]) -> None:
    slots, terms = history(changes)
    late = max(slack_range(limit.seconds)[0] for limits, *_ in changes for limit in limits)
    terms.check(sorted(slots), terms.sizes, late, AHEAD)


@given(st.lists(st.tuples(st.sampled_from((10, 40, 100)), BURSTS, st.integers(0, 20), st.integers(0, 60)), max_size=9))
def test_of_one_length_a_window_holds_the_mean_of_the_limits_in_its_time(
    changes: list[tuple[int, int, int, int]],
) -> None:
    """Sharper than the highest of them: each counts for the part of the window in which it was in force."""
    one, now, slots = meter(Limit(100, 60)), LATER, []
    begins, amounts = [0], [100]
    for amount, burst, pause, takes in changes:
        one.limit_to((Limit(amount, 60, min(burst, amount - 1)),), START, now)
        begins.append(max(one.opens, now))
        amounts.append(amount)
        slots += spend(one, now, now + pause * SECOND + 1, takes)
        now += pause * SECOND + AHEAD
    slots.sort()
    span = 60 * SECOND + SECOND // 4
    for i, first in enumerate(slots):
        inside = [slot for slot in slots[i:] if slot < first + span]
        ends = [min(end, inside[-1]) for end in [*begins[1:], 10**18]]
        parts = [max(0, end - max(begin, first)) for begin, end in zip(begins, ends, strict=True)]
        # The rest of the window, after its last slot, counts as what is in force there.
        rest, last = span - sum(parts), max(a for a, b in zip(amounts, begins, strict=True) if b <= inside[-1])
        allowed = sum(part * amount for part, amount in zip(parts, amounts, strict=True)) + rest * last
        assert (len(inside) - 1) * span < allowed


def test_a_burst_that_falls_soon_after_a_start_is_owed_for_the_predecessor() -> None:
    """The one before may have given out its burst of 50 just now: together with what comes it is 100 in a minute."""
    begin = START + SECOND
    one = meter(Limit(100, 60, 50), now=begin)
    assert one.earliest(begin) - begin <= interval(Limit(100, 60, 50), SECOND // 2)
    one.limit_to((Limit(100, 60),), START, begin)
    slots = spend(one, begin, begin + 2 * MINUTE)
    assert 28 * SECOND <= slots[0] - begin <= 30 * SECOND
    assert uses_within([START] * 50 + slots, 60) <= 100


def test_equal_terms_again_change_nothing() -> None:
    one = meter(Limit(100, 60, 50))
    slots = spend(one, LATER, LATER + 1)
    assert not one.limit_to((Limit(100, 60, 50),), START, LATER + SECOND)
    assert all(b - a >= 0 for a, b in pairwise(slots))
