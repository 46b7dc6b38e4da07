"""The MTA's side: when a permit may be used, what goes back, when demand is sent. Clocks of two machines never meet."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.throttling.lease import COALESCE, TELL_LAPSED, Demand, Lease, Permit

MS = 1_000_000
SLACK_US = 100_000


def lease() -> Lease:
    made = Lease()
    made.slack_us = SLACK_US
    return made


def grant(one: Lease, n: int = 1, first: int = 0, step: int = 0, pinged: int = 0, hold: int = 0, at: int = 0) -> None:
    """A grant record; `pinged`, `hold`, `first` and `step` in microseconds, `at` in nanoseconds."""
    one.granted(n, first, step, pinged, hold, at, at)


def test_not_before_counts_from_receipt_and_use_by_from_the_ping() -> None:
    one = lease()
    # Ping at 1.000 s, held for 20 ms by the manager, 5 ms on the way; the slot is 10 ms ahead.
    grant(one, first=10_000, pinged=1_000_000, hold=20_000, at=1_025 * MS)
    assert one.take(1_034 * MS) is None
    assert one.next_at(1_034 * MS) == 1_035 * MS
    assert one.take(1_035 * MS) == Permit(1_035 * MS, 1_130 * MS, 0)


@pytest.mark.parametrize("slack_us", [SLACK_US, 0])
def test_the_use_by_that_the_record_carries_is_the_same(slack_us: int) -> None:
    """And needs no LIMIT; a client that ignores the field reckons the same moment."""
    told, reckoned = Lease(), lease()
    told.slack_us = slack_us
    told.granted(2, 10_000, 500, 1_000_000, 20_000, 1_025 * MS, 1_025 * MS, 1_130_000)
    reckoned.granted(2, 10_000, 500, 1_000_000, 20_000, 1_025 * MS, 1_025 * MS)
    for now in (1_035 * MS, 1_036 * MS):
        assert told.take(now) == reckoned.take(now) is not None


def test_a_run_is_late_by_the_use_by_that_it_carries() -> None:
    one = lease()
    one.granted(3, 0, 0, 0, 0, 500 * MS, 500 * MS, 499_999)
    assert (len(one), one.voided) == (0, 3)


def test_use_by_exactly_at_the_limit() -> None:
    permit = Permit(5, 10, 0)
    assert [permit.usable(now) for now in (4, 5, 10, 11)] == [False, True, True, False]


@pytest.mark.parametrize(("now", "usable"), [(100 * MS, True), (100 * MS + 1, False)])
def test_a_permit_at_hand_expires_to_the_nanosecond(now: int, usable: bool) -> None:
    one = lease()
    grant(one)
    assert (one.take(now) is not None) == usable
    assert (one.voided, len(one)) == ((0, 0) if usable else (1, 0))


def test_a_late_grant_is_void_and_still_counted() -> None:
    """The link was stalled: what it releases then must not become a burst."""
    one = lease()
    grant(one, n=5, step=1000, at=500 * MS)
    assert (len(one), one.got, one.voided) == (0, 5, 5)
    assert one.take(500 * MS) is None


def test_a_run_that_came_too_late_is_void_with_its_later_permits() -> None:
    """They could be used only after their time, too. What comes at the last moment is good at that moment."""
    one = lease()
    grant(one, n=3, step=300_000, at=100 * MS + 1)
    assert (len(one), one.voided) == (0, 3)
    grant(one, at=100 * MS)
    assert one.take(100 * MS) == Permit(100 * MS, 100 * MS, 3)


def test_permits_lapse_whoever_looks() -> None:
    one = lease()
    assert (one.lapses_at(), one.next_at(0)) == (None, None)
    grant(one, first=5_000)
    assert one.lapses_at() == 105 * MS + 1
    grant(one, first=200_000, pinged=105_000, at=105 * MS + 1)
    assert (len(one), one.voided) == (1, 1)
    grant(one, first=100_000)
    assert one.next_at(200 * MS) == 200 * MS
    assert one.next_at(200 * MS + 1) == 305 * MS + 1


def test_a_run_that_came_late_leaves_little_time_for_each() -> None:
    one = lease()
    grant(one, n=10, step=10_000, at=95 * MS)
    assert one.take(105 * MS) == Permit(105 * MS, 110 * MS, 1)  # the first was good until 100 ms
    assert one.take(147 * MS) == Permit(145 * MS, 150 * MS, 5)
    assert (len(one), one.voided) == (4, 4)


def test_no_permit_without_a_known_slack() -> None:
    one = Lease()
    grant(one, n=3)
    assert (one.take(0), one.got, one.voided) == (None, 3, 3)


def test_permits_come_in_the_order_in_which_they_expire() -> None:
    one = lease()
    grant(one, n=2, first=20_000, step=10_000)
    grant(one, first=-5_000)  # a recycled slot, older than what is at hand
    serials = []
    for now in (0, 20 * MS, 30 * MS):
        permit = one.take(now)
        assert permit is not None
        serials.append(permit.serial)
    assert serials == [2, 0, 1]


def test_what_is_left_goes_back_once() -> None:
    one = lease()
    grant(one, n=4, step=10_000)
    grant(one, first=5_000)
    assert one.take(0) is not None
    assert one.give_back(0) == [(1, 3), (4, 1)]
    assert one.give_back(0) == []
    assert (len(one), one.take(90 * MS)) == (0, None)


def test_old_permits_do_not_go_back() -> None:
    one = lease()
    grant(one, n=3, step=50_000)
    assert one.give_back(120 * MS) == [(1, 2)]


def test_serials_wrap_on_the_wire() -> None:
    one = lease()
    one.got = 2**32 - 1
    grant(one, n=2, step=10)
    grant(one, n=1)
    assert one.give_back(0) == [(2**32 - 1, 2), (1, 1)]


def test_permits_of_a_lost_session_stay_good_but_cannot_be_returned() -> None:
    one = lease()
    grant(one, n=2, step=1000)
    one.reconnected()
    grant(one, n=1, first=1000)
    assert one.got == 1
    assert one.take(0) is not None
    assert one.give_back(0) == [(0, 1)]


def test_many_permits_cost_no_memory() -> None:
    one = lease()
    grant(one, n=2**32 - 1)
    assert one.take(0) is not None
    assert len(one) == 2**32 - 2


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-50_000, 50_000), st.integers(0, 20_000)), max_size=8))
def test_every_permit_is_taken_once_or_void(grants: list[tuple[int, int, int]]) -> None:
    one = lease()
    for n, first, step in grants:
        grant(one, n=n, first=first, step=step)
    seen = []
    for now in range(0, 400 * MS, 3 * MS):
        while permit := one.take(now):
            assert permit.usable(now)
            seen.append(permit.serial)
    assert len(set(seen)) == len(seen)
    assert len(seen) + one.voided == one.got
    assert len(one) == 0


# --- demand ---


def test_demand_goes_at_once_to_and_from_zero() -> None:
    one = Demand()
    assert one.due_at(0, 0, 5) is None
    assert one.due_at(7, 0, 5) == 5
    one.sent(7, 0, 5)
    assert one.due_at(7, 0, 6) is None
    assert one.due_at(0, 0, 6) == 6
    one.sent(0, 0, 6)
    assert one.due_at(0, 0, 6) is None


def test_demand_that_the_manager_knows_by_its_grants_is_not_sent() -> None:
    one = Demand()
    one.sent(100, 0, 0)
    for got in range(100):
        assert one.due_at(100 - got, got, 10**9) is None


def test_more_than_a_quarter_off_is_sent_but_not_too_often() -> None:
    one = Demand()
    one.sent(100, 0, 0)
    assert one.due_at(125, 0, 1) is None
    assert one.due_at(126, 0, 1) == COALESCE
    assert one.due_at(74, 0, COALESCE + 3) == COALESCE + 3
    assert one.due_at(76, 0, COALESCE) is None


def test_all_granted_and_more_ready() -> None:
    one = Demand()
    one.sent(3, 0, 0)
    assert one.due_at(2, 3, 1) == 1  # the manager believes in zero


def test_a_new_session_knows_nothing() -> None:
    one = Demand()
    one.sent(3, 10, 0)
    one.reconnected()
    assert one.due_at(3, 0, 1) == 1


def test_frames_stay_few_while_demand_grows() -> None:
    one, sent = Demand(), []
    for now in range(0, 1000 * MS, MS):
        due = one.due_at(now // MS, 0, now)
        if due is not None and due <= now:
            one.sent(now // MS, 0, now)
            sent.append(now)
    assert all(later - earlier >= COALESCE for earlier, later in pairwise(sent[1:]))
    assert len(sent) <= 30


def test_what_the_manager_believes_after_grants_that_crossed() -> None:
    """It wanted 10 when nothing had come; 4 arrive before the next look, and 6 are believed to be wanted."""
    one = Demand()
    one.sent(10, 0, 0)
    assert one.due_at(6, 4, COALESCE) is None
    assert one.due_at(8, 4, COALESCE) == COALESCE  # two more messages: a third off
    assert one.due_at(7, 4, COALESCE) is None
    one.sent(8, 4, COALESCE)
    assert one.due_at(4, 8, 2 * COALESCE) is None
    assert one.due_at(8, 12, 2 * COALESCE) == 2 * COALESCE  # all of it has come, and as much is wanted again
    one.sent(2, 12, 2 * COALESCE)
    assert one.due_at(0, 20, 3 * COALESCE) is None  # more than it wanted: nothing is believed to be, not less


def test_lapsed_permits_are_told_within_a_second() -> None:
    one = Demand()
    assert one.due_at(0, 5, 7, 5) is None  # nothing was ever said: nothing is wanted
    one.sent(100, 0, 7)
    assert one.due_at(95, 5, 8, 0) is None
    assert one.due_at(95, 5, 8, 5) == 7 + TELL_LAPSED
    assert one.due_at(95, 5, 9 + TELL_LAPSED, 5) == 9 + TELL_LAPSED
    assert one.due_at(0, 5, 8, 5) == 8  # at once, for another reason
    one.sent(95, 5, 8, 5)
    assert one.due_at(95, 5, 9, 5) is None
    one.reconnected()
    assert one.due_at(0, 0, 10, 0) is None
