"""Cached connections and throttle places: who gives way to whom, when, and who takes over connection and place at once.

A block of the configuration stands for any throttle. At no time are more sockets open than places allow.
"""

from __future__ import annotations

import contextlib
import threading

import gevent
import pytest

from proxy.egress.clock import clock_ns
from proxy.errors import Throttled
from proxy.model import Discard
from proxy.policy.limits import Limits
from tests.loopback import leftovers
from tests.loopback.houses import block, key_of, limits, until
from tests.mx import Mx, close, late, mute


@contextlib.contextmanager
def being_cleaned(make):
    """The only place is held by a connection that nobody uses any more, and that is cleaned once the gate is open.

    Yields:
        House, receiver's server, the connection, gate.
    """
    gate = threading.Event()
    with Mx(lambda number: {"rset": late(gate)} if number == 0 else {}) as mx:
        house = make(None, block("one"))
        connection = house.open(key_of(mx))
        house.give(connection)
        yield house, mx, connection, gate


def waiting(house, mx, owner, tenant=""):
    """Somebody who asks for a connection, and has to wait."""
    before = house.waits()
    greenlet = gevent.spawn(house.open, key_of(mx, tenant=tenant), owner)
    until(lambda: house.waits() > before)
    return greenlet


def test_a_cached_connection_counts_and_gives_way_to_another_key(make, mx):
    house = make(None, block("one"))
    house.cache(mx)
    with Mx() as other:
        house.open(key_of(other), owner="b", seconds=0.5)
        until(lambda: mx.sessions[0].ended)
        assert mx.sessions[0].ended == "quit"
        assert house.discarded() == {Discard.YIELDED: 1}


def test_without_another_in_the_way_it_stays(make, mx):
    """Waiting under a throttle that a cached connection has no place in moves nothing."""
    house = make(None, block("here", "127.0.0.1/32"), block("there", "127.0.0.2/32"))
    house.cache(mx)
    with Mx(host="127.0.0.2") as there:
        house.open(key_of(there))
        with pytest.raises(Throttled):
            house.open(key_of(there), owner="b", seconds=0.1)
        assert len(house.keeper.pool) == 1


def test_it_gives_way_when_it_is_clean_to_one_who_came_meanwhile(make):
    """Until then it has the place."""
    with being_cleaned(make) as (house, _, _, gate), Mx() as other:
        waiter = waiting(house, other, "b")
        gate.set()
        waiter.get(timeout=30)
        assert house.discarded() == {Discard.YIELDED: 1}


def test_it_gives_way_while_the_answer_to_quit_is_awaited(make):
    with Mx({"quit": mute}) as mx, Mx() as other:
        house = make(limits(connections=False), block("one"))
        house.give(house.open(key_of(mx)))
        until(lambda: b"QUIT" in mx.sessions[0].commands)
        assert house.keeper.cached == 1
        house.open(key_of(other), owner="b", seconds=0.5)
        assert house.keeper.cached == 0
        assert house.discarded() == {Discard.DISABLED: 1}
        leftovers.end_work_of_crews()  # it waits on for the answer, though the connection is closed


def test_who_waits_for_just_this_connection_gets_it_with_its_place(make):
    with being_cleaned(make) as (house, mx, first, gate):
        waiter = waiting(house, mx, "b")
        gate.set()
        assert waiter.get(timeout=30) is first
        assert (mx.connects, first.place.owner, first.place.open) == (1, "b", True)
        assert house.discarded() == {}


def test_whose_turn_it_is_decides_who_gets_it(make):
    """Another key came first: it gets the place, and the one who wanted the connection waits on."""
    with being_cleaned(make) as (house, mx, _, gate), Mx() as other:
        stranger = waiting(house, other, "b")
        heir = waiting(house, mx, "c")
        gate.set()
        taken = stranger.get(timeout=30)
        assert not heir.ready()
        assert house.discarded() == {Discard.YIELDED: 1}
        house.give(taken)
        heir.get(timeout=30)
        assert (mx.connects, other.connects) == (2, 1)


def test_who_gets_the_place_and_not_the_connection_waits_until_the_receiver_has_closed(make):
    """One who came first asks for something else, at the same receiver: there, too, they are never open at once."""
    quit_seen, gate = threading.Event(), threading.Event()

    def stay(session, reply):
        quit_seen.set()
        session.wait_for_gate(gate)

    clean = threading.Event()
    with Mx(lambda number: {"rset": late(clean), "quit": stay} if number == 0 else {}) as mx:
        settings = limits()
        settings.throttle_close_timeout = 3600.0
        house = make(settings, block("one"))
        house.give(house.open(key_of(mx)))
        stranger = waiting(house, mx, "b", tenant="another key")
        heir = waiting(house, mx, "c")
        clean.set()
        until(quit_seen.is_set)
        assert (mx.connects, stranger.ready(), heir.ready()) == (1, False, False)
        stranger.kill()  # its turn is nobody's before the receiver has closed, either
        gevent.sleep(0)
        assert (mx.connects, heir.ready()) == (1, False)
        gate.set()
        heir.get(timeout=30)
        assert mx.connects == 2


class Between:
    """An office that has something done in the place of `pass_on`."""

    def __init__(self, office, pass_on):
        self._office = office
        self.pass_on = pass_on

    def __getattr__(self, name):
        return getattr(self._office, name)


def test_nobody_comes_between_an_heir_and_its_connection(make, monkeypatch):
    """Place and connection are promised; before the heir has its turn, another asks for the same, and has to wait."""
    with being_cleaned(make) as (house, mx, first, gate):
        heir = waiting(house, mx, "b")
        others = []
        pass_on = house.admission.pass_on

        def and_another_comes(places, key):
            monkeypatch.undo()
            # It starts before the heir is woken.
            others.append(gevent.spawn(house.open, key_of(mx), "c"))
            others.append(gevent.spawn(house.open, key_of(mx, tenant="another key"), "d"))
            return pass_on(places, key)

        monkeypatch.setattr(house.keeper, "_office", Between(house.admission, and_another_comes))
        gate.set()
        assert heir.get(timeout=30) is first
        assert len(others) == 2
        assert not any(each.ready() for each in others)
        assert (mx.connects, house.discarded()) == (1, {})
        house.give(first)
        for each in others:
            house.give(each.get(timeout=30))


def test_an_heir_that_goes_away_leaves_no_connection_without_a_place(make, monkeypatch):
    """It was given place and connection, and died before it had its turn."""
    with being_cleaned(make) as (house, mx, _, gate):
        heir = waiting(house, mx, "b")
        passed = []
        pass_on = house.admission.pass_on

        def and_die(places, key):
            heir.kill(block=False)  # comes before the good news
            passed.append(pass_on(places, key))
            return passed[-1]

        monkeypatch.setattr(house.keeper, "_office", Between(house.admission, and_die))
        gate.set()
        until(lambda: passed and heir.ready() and not house.keeper.cached)
        assert passed == [True]
        assert house.discarded() == {Discard.YIELDED: 1}


def test_a_lower_limit_makes_room_for_one_who_waits(make, mx):
    """Two are cached under a limit that is one by now: both must go for one to get in."""
    house = make(None, block("two", connections=2))
    house.cache(mx, tenant="a")
    house.cache(mx, tenant="b")
    house.manager.reload(False, Limits((block("two", connections=1),)), clock_ns())
    house.open(key_of(mx, tenant="c"), owner="b", seconds=0.5)
    assert house.discarded() == {Discard.YIELDED: 2}


def test_it_gives_way_to_one_who_comes_from_another_throttles_line(make, mx):
    """A request waits under one throttle; when its turn has come, a cached connection is in its way at the next."""
    house = make(None, block("near", "127.0.0.2/32"), block("all", connections=2))
    with Mx(host="127.0.0.2") as near:
        busy = house.open(key_of(near), owner="x")
        waiter = waiting(house, near, "b", tenant="w")
        house.cache(mx)  # the second place of `all`
        mine = house.open(key_of(mx))  # and it is in use
        third = waiting(house, mx, "c", tenant="third")
        house.give(mine)
        house.give(busy)
        waiter.get(timeout=30)
        third.get(timeout=30)


def test_a_connection_that_its_new_path_has_no_place_for_stays_cached(make, mx, monkeypatch):
    house = make(None, block("one", connections=1))
    cached = house.cache(mx)
    since = next(iter(house.keeper.pool._idle)).idle_since
    assert house.keeper.take(key_of(mx), lambda kept: False) is None
    assert (len(house.keeper.pool), house.keeper.pool.hits, house.discarded()) == (1, 0, {})
    assert next(iter(house.keeper.pool._idle)).idle_since == since
    mx.sessions[0].act(close)  # and it is watched as before
    until(lambda: not house.keeper.cached)
    assert house.discarded() == {Discard.PEER_CLOSED: 1}
    assert not cached.place.open
