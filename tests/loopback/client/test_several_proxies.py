"""Several proxies that are played by threads: what is said to which of them, and what of it counts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from greenarrow_proxy_client import Limits, ProxyRejected, ProxyUnavailable, Session
from greenarrow_proxy_client.choice import Choice
from proxy.errors import Draining, Overloaded
from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from tests.loopback.client.fake_proxy import DESTINATION, INCARNATION, SECRET, FakeProxy
from tests.waiting import wait_for

SOON = 0.05


@pytest.fixture
def pair() -> Iterator[list[FakeProxy]]:
    with FakeProxy() as first, FakeProxy() as second:
        yield [first, second]


@contextlib.contextmanager
def session_of(pair: list[FakeProxy], **options: object) -> Iterator[Session]:
    with Session([proxy.address for proxy in pair], SECRET, "server-a", **options) as session:  # type: ignore[arg-type]
        wait_for(lambda: all(it.up for it in session.proxies))
        yield session


def in_use(session: Session) -> list[bool]:
    return [it.in_use for it in session.proxies]


def said(proxy: FakeProxy, kind: type[m.Message]) -> list[m.Message]:
    return [message for message in proxy.session_messages if isinstance(message, kind)]


def test_one_address_in_each_form() -> None:
    for none in ([], ()):
        with pytest.raises(ValueError, match="needs the address"):
            Session(none, SECRET, "server-a")
    with pytest.raises(ValueError, match="twice"):
        Session([("10.0.0.1", 807), ("10.0.0.1", 807)], SECRET, "server-a")
    with FakeProxy() as proxy:
        for address in (proxy.address, list(proxy.address), [proxy.address], (proxy.address,)):
            with Session(address, SECRET, "server-a") as session:  # type: ignore[arg-type]
                session.connect([DESTINATION]).close()
                assert [it.address for it in session.proxies] == [proxy.address]


def test_throttles_are_told_to_the_one_in_use_and_anew_where_it_moves(pair) -> None:
    first, second = pair
    with session_of(pair, return_after=SOON) as session:
        session.throttle("192.0.2.1", Limits("yahoo", [(60, 60)]))
        wait_for(lambda: said(first, s.Reg))
        assert said(second, s.Reg) == []
        for conn in first.sessions:
            conn.close()
        wait_for(lambda: said(second, s.Reg))
        wait_for(lambda: in_use(session) == [True, False], what="the better one again")
        wait_for(lambda: len(said(first, s.Reg)) == 2)
        wait_for(lambda: said(second, s.Bye), what="BYE to the one that was left")
        wait_for(lambda: all(it.up for it in session.proxies), what="which is a standby again")


def test_what_a_proxy_says_that_is_not_in_use_counts_for_nothing(pair) -> None:
    """A limit of another manager for the same path, from a standby and from one that was left."""
    first, second = pair

    def limit(connections: int) -> bytes:
        path = s.PathLimit(throttle.id, [s.Effective([s.Rate(1, 1, 1)], connections)], 100_000)
        return native.encode(s.Limit(INCARNATION, [path]))

    def pinged(proxy: FakeProxy) -> None:
        """All that was sent to the library before is read: it has answered what came last."""
        before = len(said(proxy, s.Pong))
        proxy.sessions[-1].send(native.encode(s.Ping(INCARNATION, 1)))
        wait_for(lambda: len(said(proxy, s.Pong)) > before)

    with session_of(pair, return_after=300.0) as session:
        throttle = session.throttle("192.0.2.1", Limits("yahoo", [(60, 60)]))
        wait_for(lambda: said(first, s.Reg))
        second.sessions[-1].send(limit(6))
        pinged(second)
        assert throttle.effective == []
        first.sessions[-1].send(limit(7))
        assert throttle.wait_until_registered(30)
        stale = first.sessions[-1]
        stale.send(native.encode(m.Goaway(60_000, "drain")))
        wait_for(lambda: said(second, s.Reg))
        with contextlib.suppress(OSError):
            stale.send(limit(8))
        second.sessions[-1].send(limit(9))
        assert throttle.wait_until_registered(30)
        assert throttle.effective == [([(1, 1)], 9)]


def test_channels_are_opened_where_the_session_is_and_idle_ones_elsewhere_are_closed(pair) -> None:
    first, second = pair
    with session_of(pair, return_after=300.0) as session:
        session.connect([DESTINATION]).release(wait=True)
        assert (len(first.opens), len(second.opens)) == (1, 0)
        first.sessions[-1].send(native.encode(m.Goaway(60_000, "drain")))
        wait_for(lambda: in_use(session) == [False, True])
        assert session._proxies.all[0].channels._idle == []
        session.connect([DESTINATION]).close()
        assert (len(first.opens), len(second.opens)) == (1, 1)


@pytest.mark.parametrize(
    "answer",
    [
        lambda request: None,  # closed without a word
        lambda request: native.encode(m.Error("overloaded", "full", True, 1000)),
        m.Failed(None, "draining", "going", retry=True),
        m.Failed(None, "overloaded", "full", retry=True),
    ],
)
def test_what_is_no_answer_is_asked_elsewhere_in_the_time_that_is_left(pair, answer) -> None:
    first, second = pair
    with session_of(pair, return_after=300.0) as session:
        first.answers += [answer] * 2
        session.connect([DESTINATION], deadline=20.0).close()
        assert in_use(session) == [False, True]
        (request,) = second.opens
        assert 0 < request.deadline_ms <= 20_000


def test_a_path_that_is_not_known_where_we_were_is_asked_where_we_are(pair) -> None:
    """The session moved after the throttle was known and before the OPEN came."""
    first, second = pair
    with session_of(pair, return_after=300.0) as session:

        def move(request: m.Open) -> bytes:
            first.sessions[-1].send(native.encode(m.Goaway(60_000, "drain")))
            wait_for(lambda: in_use(session) == [False, True])
            return native.encode(m.Failed(None, "unknown_path", "unknown", retry=True))

        first.answers.append(move)
        session.connect([DESTINATION]).close()
        assert len(second.opens) == 1


def test_who_refuses_everybody_is_passed_over_until_it_does_not(pair) -> None:
    first, second = pair
    first.refuse = Draining("shutting down")
    with Session([first.address, second.address], SECRET, "server-a", return_after=SOON) as session:
        session.connect([DESTINATION]).close()
        assert in_use(session) == [False, True]
        assert session.rejected is None
        first.refuse = None
        wait_for(lambda: in_use(session) == [True, False], 30)


def test_the_word_of_all_is_told_when_none_takes_us(pair) -> None:
    for proxy in pair:
        proxy.refuse = Overloaded("full")
    with Session([proxy.address for proxy in pair], SECRET, "server-a") as session:
        with pytest.raises(ProxyRejected, match="full") as caught:
            session.connect([DESTINATION])
        assert caught.value.retry
        assert wait_for(lambda: session.rejected).code == "overloaded"
        for proxy in pair:
            proxy.refuse = None
        assert session.wait_until_up(30)
        session.connect([DESTINATION]).close()


def test_of_two_addresses_of_one_proxy_one_is_used(pair) -> None:
    """It ends the older session of a run with "replaced", and would end the other one in turn."""
    first = pair[0]
    with session_of(pair, return_after=SOON) as session:
        first.sessions[-1].send(native.encode(m.Error("replaced", "a newer session of this run", False)))
        wait_for(lambda: in_use(session) == [False, True])
        left = session._proxies.all[0]
        wait_for(lambda: left.again_at is not None and left.again_at > time.monotonic() + 600, what="it is left alone")
        assert "newer session" in session.proxies[0].failure


def test_each_draws_its_own_luck(pair, monkeypatch) -> None:
    """So that not all who were moved in one moment come back in one moment."""
    lucks: list[float] = []
    came = Choice.came

    def note(choice: Choice, which: int, now: float, luck: float) -> None:
        lucks.append(luck)
        came(choice, which, now, luck)

    monkeypatch.setattr(Choice, "came", note)
    for _ in range(3):
        with session_of(pair):
            pass
    assert len(set(lucks)) == len(lucks) == 6
    assert all(0 <= luck < 1 for luck in lucks)


def test_close_takes_leave_of_all(pair) -> None:
    with session_of(pair) as session:
        stream = session.connect([DESTINATION])
    for proxy in pair:
        wait_for(lambda proxy=proxy: said(proxy, s.Bye))
    stream.sendall(b"NOOP\r\n")
    assert stream.recv(100) == b"250 ok\r\n"
    stream.close()
    with pytest.raises(ProxyUnavailable, match="session is closed"):
        session.connect([DESTINATION])
    assert not session.wait_until_up(5)
