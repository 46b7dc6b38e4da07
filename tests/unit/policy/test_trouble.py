"""What goes wrong with receivers and sources: counted, forgotten in time, bounded."""

from __future__ import annotations

import errno
import random

import pytest

from proxy.errors import BadCredentials, SourceMissing, Step, UpstreamError
from proxy.model import Endpoint
from proxy.policy.trouble import LATELY, Recent, Troubles

MX = Endpoint("198.51.100.7", 25)
OTHER = Endpoint("198.51.100.8", 25)
SOURCE = "192.0.2.1"
REFUSED = UpstreamError("connect: refused", Step.CONNECT, errno.ECONNREFUSED)


def test_recent_is_the_sum_of_the_last_five_minutes() -> None:
    """Against a list of all that happened; to half a minute."""
    rng = random.Random(7)
    recent, now, happened = Recent(), 1000.0, []
    for _ in range(3000):
        now += rng.choice((0.0, 0.4, 3.0, 29.9, 31.0, rng.uniform(0, 700)))
        if rng.random() < 0.7:
            count = rng.randint(1, 5)
            recent.add(now, count)
            happened.append((now, count))
        exact = sum(count for at, count in happened if at // 30 > now // 30 - LATELY / 30)
        assert recent.total(now) == exact


def test_a_receiver_is_failing_until_something_goes_well() -> None:
    troubles = Troubles()
    troubles.over(SOURCE, MX, "", True, 5.0)
    assert len(troubles.receivers) + len(troubles.sources) == 0, "what goes well has no record"
    troubles.failed(SOURCE, MX, REFUSED, 10.0)
    troubles.over(SOURCE, MX, "421 4.7.0 no", False, 20.0)
    record = troubles.receivers[MX]
    assert (record.failing_since, record.last, record.last_at) == (10.0, "421 4.7.0 no", 20.0)
    assert record.in_a_row == 2
    assert (record.failed, record.deferred, record.rejected, record.opened) == ({"connect": 1}, 1, 0, 1)
    assert troubles.sources[SOURCE].recent.total(20.0) == 2
    troubles.over(SOURCE, MX, "", True, 30.0)
    assert (record.failing_since, record.opened) == (None, 2)
    troubles.over(SOURCE, MX, "550 unknown", True, 40.0, 0, 3)
    assert (record.failing_since, record.rejected, record.recent.total(40.0)) == (None, 3, 5), "it took others"


def test_a_reply_that_failed_a_step_is_told_with_its_last_line() -> None:
    troubles = Troubles()
    error = UpstreamError("greeting", Step.GREETING, smtp_reply="554-go\n554 away")
    troubles.failed(SOURCE, MX, error, 1.0)
    assert troubles.receivers[MX].last == "554 away"
    assert troubles.receivers[MX].rejected == 1


def test_who_is_to_blame() -> None:
    troubles = Troubles()
    troubles.failed("", MX, SourceMissing(SOURCE), 1.0)
    assert (list(troubles.sources), list(troubles.receivers)) == ([SOURCE], []), "a source that is not here"
    troubles.failed("192.0.2.2", MX, UpstreamError("no place", Step.THROTTLE), 1.0)
    assert (list(troubles.sources), list(troubles.receivers)) == ([SOURCE], []), "a throttle's no"


def test_tables_are_bounded_and_the_longest_quiet_goes_first() -> None:
    troubles = Troubles(most=3)
    for number in range(3):
        troubles.failed("", Endpoint("192.0.2.9", number + 1), REFUSED, float(number))
    troubles.failed("", Endpoint("192.0.2.9", 1), REFUSED, 3.0)
    troubles.failed("", OTHER, REFUSED, 4.0)
    assert list(troubles.receivers) == [Endpoint("192.0.2.9", 3), Endpoint("192.0.2.9", 1), OTHER]
    for number in range(10):
        troubles.source_gone(f"192.0.2.{number}", 1.0)
    assert len(troubles.gone) == 3
    troubles.source_came("192.0.2.9")
    troubles.source_came("192.0.2.77")
    assert "192.0.2.9" not in troubles.gone


def test_refusals_have_a_beginning_which_a_pause_ends() -> None:
    troubles = Troubles()
    for at in (0.0, 100.0, 350.0):
        troubles.refuse(BadCredentials("wrong secret of mta-1"), at)
    refusals = troubles.refused["bad_credentials"]
    assert (refusals.since, refusals.last, refusals.recent.total(350.0)) == (0.0, "wrong secret of mta-1", 2)
    troubles.refuse(BadCredentials("again"), 350.0 + LATELY)
    assert refusals.since == 350.0 + LATELY


@pytest.mark.parametrize(
    ("reply", "deferred", "rejected", "counted", "recent"),
    [
        ("421 4.7.0 no", 0, 0, (1, 0), 1),  # a greeting: counted by its own code
        ("554 5.7.1 no", 0, 0, (0, 1), 1),
        ("450 4.2.1 later", 2, 3, (2, 3), 5),
        ("450 4.2.1 later", 1, 0, (1, 0), 1),
        ("450 4.2.1 later", 2, 2, (2, 2), 4),
        ("550 5.1.1 who?", 0, 1, (0, 1), 1),
    ],
)
def test_replies_of_a_connection_that_is_over(
    reply: str, deferred: int, rejected: int, counted: tuple[int, int], recent: int
) -> None:
    troubles = Troubles()
    troubles.over(SOURCE, MX, reply, False, 10.0, deferred, rejected)
    for record in (troubles.receivers[MX], troubles.sources[SOURCE]):
        assert (record.deferred, record.rejected) == counted
        assert (record.recent.total(10.0), record.opened) == (recent, 1)
    troubles.over(SOURCE, MX, "", True, 20.0)
    for record in (troubles.receivers[MX], troubles.sources[SOURCE]):
        assert (record.deferred, record.rejected) == counted
        assert (record.opened, record.failing_since, record.in_a_row) == (2, None, 0)


def test_of_a_source_that_may_not_be_used_nothing_is_the_receivers() -> None:
    troubles = Troubles()
    troubles.failed(SOURCE, MX, UpstreamError("bind: no", Step.BIND, errno.EADDRNOTAVAIL), 1.0)
    troubles.failed(SOURCE, None, REFUSED, 1.0)
    assert (list(troubles.receivers), list(troubles.sources)) == ([], [SOURCE])


def test_what_goes_well_with_those_that_others_fail_with_is_known() -> None:
    troubles = Troubles(most=2)
    troubles.receivers.expect([MX, OTHER, Endpoint("198.51.100.9", 25)])
    assert list(troubles.receivers) == [MX, OTHER], "no more than there is room for"
    troubles.over(SOURCE, MX, "", True, 5.0)
    troubles.over(SOURCE, OTHER, "", False, 5.0)
    assert [(each.opened, each.good_at) for each in troubles.receivers.values()] == [(1, 5.0), (1, 0.0)]
    troubles.failed(SOURCE, MX, REFUSED, 10.0)
    record = troubles.receivers[MX]
    troubles.receivers.expect([MX])
    assert troubles.receivers[MX] is record
    assert (record.failing_since, record.good_at, record.in_a_row) == (10.0, 5.0, 1)


def test_a_fresh_refusal_begins_its_row() -> None:
    troubles = Troubles()
    troubles.refuse(BadCredentials("no"), 3.0)
    (refusals,) = troubles.refused.values()
    assert (refusals.since, refusals.last_at, refusals.recent.total(3.0)) == (3.0, 3.0, 1)


def test_accepts_that_fail_are_told_among_what_is_refused() -> None:
    troubles = Troubles()
    troubles.accept_failed("Too many open files", 3.0)
    refusals = troubles.refused["accept_errors"]
    assert (refusals.last, refusals.since, refusals.recent.total(3.0)) == ("Too many open files", 3.0, 1)
