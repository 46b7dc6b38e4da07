"""The client's throttles against a proxy that says just what a test wants."""

from __future__ import annotations

import threading

import pytest

from greenarrow_proxy_client import Limits, PermitExpired, ProxyUnavailable, Session, ThrottleRejected, ThrottleTimeout
from greenarrow_proxy_client.control import clock_us
from greenarrow_proxy_client.throttle import clock_ns
from proxy.protocols.native import frames
from proxy.protocols.native import session_messages as s
from tests.loopback.client.fake_proxy import INCARNATION, SECRET, FakeProxy
from tests.waiting import wait_for

SOURCE = "192.0.2.1"
YAHOO = Limits("yahoo", ((1000, 3600),), 20)


@pytest.fixture
def proxy():
    with FakeProxy(tls=False) as it:
        yield it


@pytest.fixture
def session(proxy):
    with Session(proxy.address, SECRET, "mta-1", tls=False) as it:
        yield it


def said(proxy, kind):
    return [message for message in list(proxy.session_messages) if isinstance(message, kind)]


def paths(proxy):
    return [path for message in said(proxy, s.Reg) for path in message.paths]


def tell(proxy, *messages):
    proxy.sessions[-1].send(*(frames.encode(message) for message in messages))


def bind(proxy, throttle, slack_ms=60_000, **fields):
    """The proxy answers the registration. A permit may be late by much: a busy machine wakes us late."""
    wait_for(lambda: any(path.id == throttle.id for path in paths(proxy)))
    limit = s.PathLimit(throttle.id, [s.Effective([s.Rate(1000, 3600, 1)], 20)], slack_ms * 1000, **fields)
    tell(proxy, s.Limit(INCARNATION, [limit]))
    assert throttle.wait_until_registered(30)


def grant(proxy, throttle, n=1, offset_us=0, step_us=0, age_ms=0):
    """`age_ms`: for how long it was under way."""
    tell(proxy, s.Grant(INCARNATION, clock_us() - age_ms * 1000, 0, [s.SlotGrant(throttle.id, n, offset_us, step_us)]))


def wants(proxy, throttle):
    return [want for message in said(proxy, s.Demand) for want in message.records if want.id == throttle.id]


def test_what_is_registered_and_what_is_in_force(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO, Limits("all", mode="sum", paused=True))
    bind(proxy, throttle, paused=True, warning="slow")
    (path,) = paths(proxy)
    assert path.source_ip == SOURCE
    assert [(each.name, each.max_connections, each.paused) for each in path.throttles] == [
        ("yahoo", 20, False),
        ("all", 0, True),
    ]
    assert (throttle.effective, throttle.paused, throttle.warning) == ([([(1000, 3600)], 20)], True, "slow")


def test_a_waiting_sender_is_the_demand(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    bind(proxy, throttle)
    got = []
    thread = threading.Thread(target=lambda: got.append(throttle.acquire(30)))
    thread.start()
    wait_for(lambda: [(want.want, want.got_cum) for want in wants(proxy, throttle)] == [(1, 0)])
    grant(proxy, throttle)
    thread.join(30)
    assert got[0].usable
    throttle.backlog(ram=2)
    wait_for(lambda: [(w.want, w.got_cum) for w in wants(proxy, throttle)] == [(1, 0), (2, 1)])


def test_a_backlog_is_demand_ahead_and_what_is_left_over_goes_back(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    bind(proxy, throttle)
    throttle.backlog(ram=5, bounce=2, disk=1)
    wait_for(lambda: [(w.want, w.ram, w.bounce, w.disk) for w in wants(proxy, throttle)] == [(8, 5, 2, 1)])
    grant(proxy, throttle, n=4)
    for _ in range(3):
        throttle.acquire(30)
    throttle.backlog()
    (returned,) = wait_for(lambda: said(proxy, s.Return))
    assert [(run.id, run.first, run.n) for run in returned.records] == [(throttle.id, 3, 1)]


def test_time_is_up(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    with pytest.raises(ThrottleTimeout):
        throttle.acquire(0.05)


def test_a_permit_is_not_used_before_its_time(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    bind(proxy, throttle)
    grant(proxy, throttle, offset_us=300_000)
    received = clock_us()
    assert throttle.acquire(30)._slot.not_before <= clock_us() * 1000
    assert clock_us() - received >= 290_000


def test_a_grant_that_was_under_way_too_long_is_void(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    bind(proxy, throttle)
    grant(proxy, throttle, age_ms=60_001)
    grant(proxy, throttle, age_ms=100)
    assert throttle.acquire(30).usable
    with pytest.raises(ThrottleTimeout):
        throttle.acquire(0.1)
    assert throttle._lease.voided == 1


def test_a_permit_that_is_held_too_long_cannot_be_used(proxy, session, monkeypatch):
    throttle = session.throttle(SOURCE, YAHOO)
    bind(proxy, throttle)
    throttle.backlog(ram=1)
    grant(proxy, throttle)
    permit = throttle.acquire(30)
    permit.check()
    later = clock_ns() + 61 * 10**9
    monkeypatch.setattr("greenarrow_proxy_client.throttle.clock_ns", lambda: later)
    assert not permit.usable
    with pytest.raises(PermitExpired):
        permit.check()


def test_limits_that_the_proxy_does_not_accept(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    wait_for(lambda: paths(proxy))
    tell(proxy, s.Limit(INCARNATION, [s.PathLimit(throttle.id, [], warning="burst 9 must be smaller")]))
    with pytest.raises(ThrottleRejected, match="burst 9"):
        throttle.acquire(30)
    session.change_limits(throttle, Limits("yahoo", ((2000, 3600),)))
    wait_for(lambda: len(paths(proxy)) == 2)
    bind(proxy, throttle)
    grant(proxy, throttle)
    assert throttle.acquire(30)


@pytest.mark.parametrize("wrong", [Limits(""), Limits("n", ((1, 0),)), Limits("n", mode="lots"), Limits("n" * 256)])
def test_what_the_protocol_does_not_allow_is_found_at_once(session, wrong):
    with pytest.raises(ValueError):  # noqa: PT011
        session.throttle(SOURCE, wrong)


def test_advice_and_its_end(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    bind(proxy, throttle)
    throttle.count(3)
    tell(proxy, s.Cap(INCARNATION, [s.Share(throttle.id, 2), s.Share(999, 1)]))
    wait_for(lambda: throttle.cap == 2 and throttle.over_cap)
    tell(proxy, s.Cap(INCARNATION, [s.Share(throttle.id, 2**32 - 1)]))
    wait_for(lambda: throttle.cap is None and not throttle.over_cap)


def test_outcomes_are_added_up_and_reported_once_a_second(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    bind(proxy, throttle)
    throttle.report(ok=1)
    wait_for(lambda: len(said(proxy, s.Outcome)) == 1)
    for _ in range(5):
        throttle.report(ok=2, deferred=1, failed=1)
    throttle.report(backoff=True)
    wait_for(lambda: len(said(proxy, s.Outcome)) == 2)
    (tally,) = said(proxy, s.Outcome)[1].records
    assert (tally.ok, tally.deferred, tally.failed, tally.backoff) == (10, 5, 5, True)


def test_after_a_reconnect_all_is_said_again_and_permits_at_hand_stay_good(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    bind(proxy, throttle)
    throttle.backlog(ram=3)
    grant(proxy, throttle, n=2)
    throttle.acquire(30)
    proxy.drop_all()
    assert throttle.acquire(30).usable, "from the old session"
    wait_for(lambda: len(paths(proxy)) == 2)
    proxy.session_messages.clear()
    tell(
        proxy,
        s.Limit(INCARNATION, [s.PathLimit(throttle.id, [s.Effective([s.Rate(1, 1, 1)], 0)], 2_000_000)]),
    )
    wait_for(lambda: [(w.want, w.got_cum) for w in wants(proxy, throttle)] == [(1, 0)])
    throttle.backlog()
    wait_for(lambda: wants(proxy, throttle)[-1].want == 0)
    assert not said(proxy, s.Return), "what is from another session is not returned"


def test_nobody_waits_for_ever_on_a_session_that_is_closed(proxy, session):
    throttle = session.throttle(SOURCE, YAHOO)
    bind(proxy, throttle)
    caught = []

    def wait():
        try:
            throttle.acquire()
        except ProxyUnavailable as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(lambda: wants(proxy, throttle))
    session.close()
    thread.join(30)
    assert "closed" in str(caught[0])
    assert said(proxy, s.Bye)


def test_permits_at_hand_are_given_back_at_the_end(proxy, session):
    throttles = [session.throttle(SOURCE, Limits(f"t{number}")) for number in range(3)]
    for throttle in throttles:
        bind(proxy, throttle)
        throttle.backlog(ram=9)
        grant(proxy, throttle, n=2)
    wait_for(lambda: all(len(throttle._lease) == 2 for throttle in throttles))
    session.close()
    records = [record for message in said(proxy, s.Return) for record in message.records]
    assert sorted((r.id, r.first, r.n) for r in records) == [(throttle.id, 0, 2) for throttle in throttles]


def test_registrations_wait_for_their_answers(proxy, session):
    """1,000 at a time, so that a ping never stands behind 100,000; long names are split over frames."""
    throttles = [session.throttle(SOURCE, Limits(f"{number}-" + "n" * 240, ((1, 60),))) for number in range(1500)]
    wait_for(lambda: len(paths(proxy)) == 1000)
    assert len(said(proxy, s.Reg)) > 3
    first = [path.id for path in paths(proxy)]
    for at in range(0, 1000, 500):
        records = [s.PathLimit(id, [s.Effective([], 0)], 1) for id in first[at : at + 500]]
        tell(proxy, s.Limit(INCARNATION, records))
    wait_for(lambda: len(paths(proxy)) == 1500)
    assert sorted(path.id for path in paths(proxy)) == [throttle.id for throttle in throttles]
