"""The keeper's steps one by one: who makes way, when the sweeper wakes, whose bytes are whose, what timers are left."""

from __future__ import annotations

import select
from _socket import socketpair
from types import SimpleNamespace

import pytest
from gevent import Timeout

from proxy.egress import keeper as keeper_room
from proxy.egress.leaving import Leaving
from proxy.egress.pool import Entry
from proxy.egress.receiver import Receiver
from proxy.model import Discard, Endpoint
from proxy.net.tls import PlainStream
from proxy.net.turns import TurnOver
from tests.loopback.houses import SOURCE, key_of, limits, places, throttle, until
from tests.mx import Mx, close, mute, say, stall

HERE = Endpoint(SOURCE, 25)


@pytest.fixture
def holding(house):
    """Makes connections with places under these throttles; with none: without any."""
    made = []

    def make(*throttles):
        ours, theirs = socketpair()
        ours.setblocking(False)
        house.engine.register(ours.fileno())
        made.append((ours, theirs))
        place = places(*throttles) if throttles else None
        return Receiver(PlainStream(ours), SOURCE, HERE, HERE, 0.0, 60.0, place=place)

    yield make
    for ours, theirs in made:
        if ours.fileno() >= 0:
            house.engine.close(ours)
        theirs.close()


@pytest.fixture
def given_up(house, monkeypatch):
    """Places of connections that the keeper has closed; no manager hears of them."""
    left = []
    monkeypatch.setattr(house.keeper, "_leaving", Leaving(house.engine, SimpleNamespace(leave=left.append), 0.0))
    return left


class Noting:
    """An engine whose deadlines are noted."""

    def __init__(self, engine, started):
        self.engine = engine
        self.alarms = SimpleNamespace(start=self.start)
        self.started = started

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def start(self, seconds, whose=None):
        self.started.append((seconds, self.engine.alarms.start(seconds, whose)))
        return self.started[-1][1]


@pytest.fixture
def timers(house, monkeypatch):
    """All that the keeper starts, with their seconds."""
    started = []
    monkeypatch.setattr(house.keeper, "_engine", Noting(house.engine, started))
    return started


# -- who makes way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaving", "missing", "closes"), [(0, 1, True), (1, 1, False), (1, 2, True), (2, 2, False), (2, 1, False)]
)
def test_as_many_are_closed_as_are_missing_and_no_more(house, holding, given_up, leaving, missing, closes):
    wanted = throttle()
    house.keeper._leaving._under[wanted] = leaving
    parting = holding(wanted)
    house.keeper._parting[parting] = None
    assert house.keeper.make_way(wanted, missing) is closes
    assert given_up == [parting.place] * closes
    assert (parting in house.keeper._parting, parting.stream.socket.fileno() < 0) == (not closes, closes)
    house.keeper._parting.clear()


def test_who_holds_no_place_there_makes_no_way(house, holding, given_up):
    house.keeper._parting.update(dict.fromkeys([holding(), holding(throttle())]))
    assert not house.keeper.make_way(throttle(), 1)
    assert (given_up, len(house.keeper._parting)) == ([], 2)
    house.keeper._parting.clear()


def test_an_idle_client_is_told_once_that_its_place_is_wanted(house, holding):
    """Of those who have one there, the one idle longest; who goes on meanwhile is told nothing."""
    wanted, told = throttle(), []
    for name, connection in (
        ("none", holding()),
        ("elsewhere", holding(throttle())),
        ("first", holding(wanted)),
        ("busy", busy := holding(wanted)),
        ("second", holding(wanted)),
    ):
        house.keeper.lend(connection, lambda name=name: told.append(name))
    house.keeper.keep(busy)
    house.keeper.keep(busy)
    for expected in (["first"], ["first", "second"], ["first", "second"]):
        assert not house.keeper.make_way(wanted, 1), "its place is free when it is clean"
        assert told == expected


def test_a_place_that_another_key_wants_stays_taken_until_the_receiver_has_closed(house, mx, given_up):
    """Unless who waits may have wanted just this connection."""
    receiver = house.cache(mx)
    receiver.place = place = places(throttle())
    house.keeper._pass_on(receiver, key_of(mx))
    assert given_up == [place], "by the way on which it stays"


def test_short_of_descriptors_those_that_leave_anyway_count(house, mx, holding, given_up):
    cached = [house.cache(mx, tenant=tenant) for tenant in "abc"]
    house.keeper._leaving.seconds = 3600.0
    house.keeper.close(holding(throttle()))
    assert (given_up, len(house.keeper._leaving)) == ([], 1)
    house.keeper.shed(2)
    assert len(house.keeper._leaving) == 0
    assert [each.stream.socket.fileno() < 0 for each in cached] == [True, False, False]


def test_a_reload_holds_for_how_long_places_are_kept(house):
    changed = limits()
    changed.throttle_close_timeout = 0.25
    house.keeper.apply(changed)
    assert house.keeper._leaving.seconds == 0.25


def test_what_is_no_longer_cached_gives_no_place_away(house, mx, monkeypatch):
    """It was given up when it was offered: its place comes free when it is closed."""
    receiver = house.open(key_of(mx))
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(house.keeper, "_office", SimpleNamespace(wanted=asked.append))
        house.keeper._give_way(Entry(receiver, key_of(mx), receiver.opened_at))
    assert asked == []


# -- the sweeper -------------------------------------------------------------------------------------------------------


class Over(BaseException):
    """Ends the sweeper."""


@pytest.mark.only_python("a pool of the test's own")
def test_the_sweeper_sleeps_until_the_next_is_due_or_it_is_told(house, monkeypatch):
    dues, notes = iter([None, 99.5, 100.0, 103.0]), []

    def wait(seconds):
        notes.append((house.keeper._armed, seconds))
        if len(notes) % 5 == 4:
            notes.append("swept")
            raise Over

    monkeypatch.setattr(keeper_room, "monotonic", lambda: 100.0)
    monkeypatch.setattr(house.keeper._pool, "next_expiry", lambda: next(dues))
    monkeypatch.setattr(house.keeper._pool, "expire", lambda now: [])
    bell = SimpleNamespace(set=lambda: None, clear=lambda: cleared.append(len(notes)), wait=wait)
    cleared = []
    monkeypatch.setattr(house.keeper, "_changed", bell)
    with pytest.raises(Over):
        house.keeper.run()
    assert notes[:4] == [(None, None), (99.5, 0.0), (100.0, 0.0), (103.0, 3.0)]
    assert cleared == [0, 1, 2, 3], "before each wait"


def test_the_sweeper_is_not_woken_for_what_is_due_later(house, mx, monkeypatch):
    house.cache(mx)
    until(lambda: house.keeper._armed is not None)
    wakes = []
    monkeypatch.setattr(house.keeper, "_changed", SimpleNamespace(set=lambda: wakes.append(1)))
    house.cache(mx, tenant="later")
    assert wakes == []


# -- whose bytes are whose ---------------------------------------------------------------------------------------------


def test_what_a_receiver_says_after_the_hand_over_is_its_users(house, mx):
    """The keeper looks at it no more: it would eat it."""
    house.cache(mx)
    taken = house.take(key_of(mx))
    mx.sessions[0].send(b"250 for its user\r\n")
    until(lambda: select.select([taken.stream.socket.fileno()], [], [], 0)[0])
    house.cache(mx, tenant="another")  # meanwhile events come, and whoever wants to look, may
    assert taken.stream.recv(100) == b"250 for its user\r\n"


def test_the_answer_to_quit_is_the_end_though_the_receiver_does_not_close(house, monkeypatch):
    """Nobody waits for its time-out, and nobody else has read the answer."""
    monkeypatch.setattr(keeper_room, "_QUIT_SECONDS", 1e6)
    with Mx({"quit": say(b"221-2.0.0 a\r\n", say(b"221 2.0.0 bye\r\n", stall))}) as mx:
        house.cache(mx)
        house.keeper.drain()
        until(lambda: not house.keeper.cached)


@pytest.mark.only_python("alarms that are noted, in the place of the engine's")
def test_one_that_was_closed_before_its_quit_is_left_alone(house, mx, timers):
    """Its place was wanted while the answer to its QUIT was awaited: it is closed once, and nothing is begun anew."""
    receiver = house.cache(mx)
    house.keeper.drain()
    house.keeper._parted(receiver)
    assert receiver.stream.socket.fileno() < 0
    del timers[:]
    house.keeper._quit(receiver, True)
    house.keeper._parted(receiver)
    assert timers == [], "nothing is begun"
    until(lambda: mx.sessions[0].ended)
    assert not house.keeper.cached


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (BlockingIOError(), None),
        (TurnOver(), Discard.PEER_SPOKE),
        (ConnectionResetError(), Discard.PEER_CLOSED),
        (b"", Discard.PEER_CLOSED),
        (b"x", Discard.PEER_SPOKE),
    ],
)
def test_what_speaks_against_an_idle_connection(answer, reason):
    def recv(size):
        if isinstance(answer, bytes):
            return answer
        raise answer

    assert keeper_room._look(Receiver(PlainStream(SimpleNamespace(recv=recv)), SOURCE, HERE, HERE, 0.0, 60.0)) is reason


# -- timers ------------------------------------------------------------------------------------------------------------


@pytest.mark.only_python("alarms that are noted, in the place of the engine's")
def test_no_timer_outlives_what_it_was_for(house, mx, timers):
    """Else it would go off in whatever its greenlet does next."""
    house.cache(mx)
    house.keeper.drain()
    until(lambda: not house.keeper.cached)
    assert len(timers) == 2
    assert not any(timer.pending for _, timer in timers)


def long_idle(monkeypatch):
    monkeypatch.setattr(keeper_room, "_PROBE_AFTER", -1.0)


@pytest.mark.only_python("alarms that are noted, in the place of the engine's")
def test_who_has_less_time_waits_for_less(house, timers, monkeypatch):
    with Mx({"rset": [lambda session, reply: session.send(reply), mute]}) as mx:
        house.cache(mx)
        long_idle(monkeypatch)
        assert house.keeper.take(key_of(mx), lambda kept: True, seconds=0.01) is None
        assert timers[-1][0] == 0.01
        assert house.discarded() == {Discard.TIMED_OUT: 1}


def test_a_deadline_of_the_caller_is_the_callers(house, monkeypatch):
    with Mx({"rset": [lambda session, reply: session.send(reply), mute]}) as mx:
        house.cache(mx)
        long_idle(monkeypatch)
        with pytest.raises(Timeout) as raised, Timeout.start_new(0.01) as mine:
            house.take(key_of(mx))
        assert raised.value is mine
        assert house.discarded() == {Discard.OUTSTANDING: 1}


def test_a_receiver_that_closes_instead_of_answering_is_not_kept_for_a_moment(house):
    with Mx({"rset": close}) as mx:
        receiver = house.open(key_of(mx))
        assert house.keeper._reset(receiver, 5.0) is Discard.PEER_CLOSED
