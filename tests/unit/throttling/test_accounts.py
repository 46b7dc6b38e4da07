"""Accounts of permits: which of them a MAIL uses up, which come back, which are too old; who is accused, how often."""

from __future__ import annotations

import pytest

from proxy.throttling.audit import LATE, LONGEST_SLACK, NOTICE_EVERY, Account, Audit, Notice, Spent, Verdict
from proxy.throttling.flows import Flow, Path, Receiver, Run, Throttle
from proxy.throttling.session import Session
from proxy.throttling.throttle import AHEAD, SECOND, Key, Limit
from tests.unit.throttling.benches import SOURCE

SLACK = 100


def flow(limited: bool = True, name: str = "a") -> Flow:
    """A flow of its own."""
    throttle = Throttle(Key(SOURCE, "yahoo"))
    if limited:
        throttle.limit_to((Limit(10, 1),), 0, 0)
    return Flow(Receiver(name, 1.0), 0, Path((throttle,)))


def account(*runs: Run) -> Account:
    made = Account()
    for run in runs:
        made.granted(run, SLACK)
    return made


def records_of(one: Account) -> int:
    """How many there are, once they are looked at."""
    one._take_in()
    return len(one._holdings)


def spend(one: Account, *moments: int) -> list[tuple[int, int] | None]:
    return [one.spend(now) for now in moments]


MINE, OTHER = flow(), flow()


@pytest.mark.parametrize(
    ("runs", "records"),
    [
        ([(0, 0), (1, 10), (2, 20)], 1),
        ([(0, 5), (1, 5), (2, 5)], 1),  # a burst
        ([(0, 0), (1, 10), (2, 21)], 2),  # at another pace
        ([(0, 5), (1, 4)], 2),  # before
        ([(0, 0), (2, 10)], 2),  # one between them went elsewhere
        ([(0, 0), (1, 10), (2, 20), (3, 35), (4, 50)], 2),
    ],
)
def test_single_permits_at_one_pace_are_one_record(runs: list[tuple[int, int]], records: int) -> None:
    one = account(*[Run(MINE, serial, first) for serial, first in runs])
    assert records_of(one) == records
    slots = sorted(first for _, first in runs)
    assert spend(one, *[99] * len(runs)) == [(slot, slot + SLACK) for slot in slots]
    assert spend(one, 99) == [None]


def test_what_is_another_flows_or_has_another_slack_is_a_record_of_its_own() -> None:
    one = account(Run(MINE, 0, 0))
    one.granted(Run(OTHER, 1, 10), SLACK)
    assert records_of(one) == 2
    one.granted(Run(OTHER, 2, 20), SLACK + 1)
    assert records_of(one) == 3
    one.granted(Run(OTHER, 3, 30, n=2, step=10), SLACK + 1)
    assert records_of(one) == 4


def test_a_permit_is_used_from_its_slot_on_and_the_one_that_ends_first() -> None:
    one = Account()
    one.granted(Run(MINE, 0, 10, n=2, step=10), 100)
    one.granted(Run(MINE, 2, 12), 5)
    assert spend(one, 9, 10, 12, 19, 20, 20) == [None, (10, 110), (12, 17), None, (20, 120), None]
    assert spend(account(Run(MINE, 0, 0), Run(MINE, 1, 0)), SLACK, SLACK + 1) == [(0, SLACK), None]


@pytest.mark.parametrize(
    ("start", "end", "found", "left"),
    [
        (5, 9, [(5, 4)], []),
        (0, 99, [(5, 4)], []),
        (5, 7, [(5, 2)], [20, 30]),
        (7, 9, [(7, 2)], [0, 10]),
        (6, 8, [(6, 2)], [0, 30]),
        (0, 5, [], [0, 10, 20, 30]),
        (9, 12, [], [0, 10, 20, 30]),
    ],
)
def test_what_comes_back_is_what_was_neither_used_nor_lost(
    start: int, end: int, found: list[tuple[int, int]], left: list[int]
) -> None:
    one = account(Run(MINE, 5, 0, n=4, step=10), Run(OTHER, 5, 40, n=4, step=0))
    assert one.returned(MINE, start, end) == found
    assert spend(one, *[39] * len(left)) == [(slot, slot + SLACK) for slot in left]
    assert spend(one, 39) == [None]
    assert spend(one, 40) == [(40, 40 + SLACK)]
    assert one.returned(OTHER, 0, 99) == [(6, 3)]


def test_permits_that_are_too_old_are_known_for_a_while() -> None:
    one = account(Run(MINE, 0, 0, n=4, step=10), Run(MINE, 4, 0, n=3))
    one.lapse(100)
    assert one.lapsed == 0
    one.lapse(111)
    assert one.lapsed == 3 + 2
    assert one.lapsed_until == 111 + LATE
    assert spend(one, 111, 111, 111) == [(20, 120), (30, 130), None]
    assert [one.spend_lapsed(110 + LATE) for _ in range(6)] == [True] * 5 + [False]
    assert one.lapsed == 0


def test_what_lapsed_long_ago_is_forgotten() -> None:
    one = account(Run(MINE, 0, 0, n=4))
    one.lapse(101)
    assert not one.spend_lapsed(101 + LATE)
    assert one.spend_lapsed(100 + LATE)
    one.lapse(100 + LATE)
    assert one.lapsed == 3
    one.lapse(101 + LATE)
    assert one.lapsed == 0


def test_a_mail_in_vain_gives_back_what_it_used() -> None:
    one = Account()
    one.restore(Spent(("a", ()), 0, None), 7)
    assert (one.lapsed, one.lapsed_until) == (1, 7 + LATE)
    one.restore(Spent(("a", ()), 5, 105), 7)
    assert one.returned(MINE, 0, 99) == [], "it is nobody's to return"
    assert spend(one, 4, 5, 5) == [None, (5, 105), None]


def test_what_nothing_limits_may_be_used_until_its_time() -> None:
    one = account(Run(flow(limited=False), 0, 50, n=9, free=True))
    assert (one.free_until, records_of(one)) == (50 + SLACK, 0)
    assert (one.over_at(149), one.over_at(150)) == (150, None)


def test_when_nothing_is_left() -> None:
    one = account(Run(MINE, 0, 0, n=3, step=10), Run(MINE, 3, 5))
    assert one.over_at(0) == 20 + SLACK + 1
    assert one.over_at(121) == 121 + LATE, "what lapsed is remembered"
    assert one.over_at(121 + LATE) is None
    assert Account().over_at(0) is None


# --- all accounts ---


KNOWN = 1000 + LONGEST_SLACK + AHEAD


def test_nobody_is_accused_for_what_a_predecessor_granted() -> None:
    audit, one = Audit(1000), flow()
    assert audit.mail(one, KNOWN - 1) == (Verdict.PERMITTED, None)
    assert audit.mail(one, KNOWN) == (Verdict.UNPERMITTED, None)
    assert audit.mail(flow(limited=False), KNOWN) == (Verdict.PERMITTED, None)


def test_a_mail_uses_a_permit_or_one_that_lapsed_and_gives_it_back_in_vain() -> None:
    audit, one = Audit(1000), flow()
    audit.granted(Run(one, 0, KNOWN), SLACK)
    verdict, spent = audit.mail(one, KNOWN)
    assert (verdict, spent) == (Verdict.PERMITTED, Spent(("a", one.path.throttles), KNOWN, KNOWN + SLACK))
    assert audit.mail(one, KNOWN)[0] is Verdict.UNPERMITTED
    assert spent is not None
    audit.in_vain(spent, KNOWN)
    verdict, spent = audit.mail(one, KNOWN + SLACK + 1)
    assert (verdict, spent) == (Verdict.LATE, Spent(("a", one.path.throttles), 0, None))
    assert audit.mail(flow(name="b"), KNOWN + SLACK + 1)[0] is Verdict.UNPERMITTED


def test_what_nothing_limited_when_it_was_granted_is_permitted_to_the_last_moment() -> None:
    audit, one = Audit(1000), flow()
    windows, one.path.throttles[0].windows = one.path.throttles[0].windows, ()
    audit.granted(Run(one, 0, KNOWN, free=True), SLACK)
    one.path.throttles[0].windows = windows
    assert audit.mail(one, KNOWN + SLACK) == (Verdict.PERMITTED, None)
    assert audit.mail(one, KNOWN + SLACK + 1) == (Verdict.UNPERMITTED, None)


def test_an_account_is_forgotten_when_nothing_is_left_of_it() -> None:
    """It is looked at when the last permit of its first run has lapsed, and then when that is forgotten."""
    audit, one = Audit(1000), flow()
    audit.granted(Run(one, 0, KNOWN, n=3, step=SECOND), SLACK)
    last = KNOWN + 2 * SECOND + SLACK
    assert audit.wheel.next_wakeup() == -(-(last + 1) // SECOND) * SECOND
    audit.expire(looked := -(-(last + 1) // SECOND) * SECOND, 10)
    assert audit.wheel.next_wakeup() == -(-(looked + LATE) // SECOND) * SECOND
    audit.expire(looked + LATE + SECOND, 10)
    assert audit.wheel.next_wakeup() is None
    assert audit.mail(one, looked + LATE + SECOND) == (Verdict.UNPERMITTED, None)


def test_remarks_are_made_once_a_minute_of_each_instance_and_kind() -> None:
    audit, one, other = Audit(0), flow(), flow(name="b")
    session = Session("a", b"1" * 16, "192.0.2.1", 1.0, 0)
    session.unpermitted = 4
    audit.tell_unpermitted(one, session, 0)
    audit.tell_unpermitted(one, session, NOTICE_EVERY - 1)
    audit.tell_unpermitted(other, None, 5)
    audit.tell_late(one, 5)
    audit.tell_unpermitted(one, session, NOTICE_EVERY)
    assert [(each.notice, each.instance) for each in audit.remarks] == [
        (Notice.UNPERMITTED, "a"),
        (Notice.UNPERMITTED, "b"),
        (Notice.LATE, "a"),
        (Notice.UNPERMITTED, "a"),
    ]
    assert [each.detail for each in audit.remarks][::3] == [f"messages without a permit: {n} so far" for n in (5, 7)]
    assert audit.remarks[1].detail == "messages without a permit: 1 so far"
    assert "1 such messages" in audit.remarks[2].detail
    assert (audit.unpermitted, audit.late) == (4, 1)
    audit.tell_late(other, 9 * NOTICE_EVERY)
    assert list(audit._told) == [("b", Notice.LATE)], "what was told long ago is forgotten"


@pytest.mark.parametrize(
    ("now", "lapsed", "left"),
    [(110, 0, [(0, 1), (5, 2)]), (111, 1, [(5, 2)]), (120, 1, [(5, 2)]), (130, 2, [(6, 1)]), (131, 3, [])],
)
def test_of_what_was_never_looked_at_only_what_is_alive_comes_back(
    now: int, lapsed: int, left: list[tuple[int, int]]
) -> None:
    one = account(Run(MINE, 0, 10), Run(OTHER, 5, 20, n=2, step=10))
    assert one.over_at(now) == (now + LATE if lapsed else 131)
    assert one.lapsed == lapsed
    assert one.returned(MINE, 0, 9) + one.returned(OTHER, 5, 9) == left
