"""Places of connections that we have closed: they are free when the receiver has closed, too, or will not."""

from __future__ import annotations

import socket
import threading

import gevent
import pytest

from proxy.egress.leaving import Leaving
from proxy.net.relay import RawSocket
from proxy.net.tls import PlainStream
from tests.loopback.houses import block, key_of, places, throttle, until
from tests.mx import Mx


class Office:
    """Counts what comes back."""

    def __init__(self):
        self.back = []

    def leave(self, places):
        self.back.append(places)


@pytest.fixture
def pair(house):
    """Our end, registered, and the receiver's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    raw = RawSocket(ours.family, ours.type, 0, ours.detach())
    house.engine.register(raw.fileno())
    yield PlainStream(raw), theirs
    theirs.close()


def test_a_place_is_held_until_the_receivers_fin(house, pair):
    stream, theirs = pair
    office = Office()
    leaving = Leaving(house.engine, office, 3600.0)
    wanted = throttle()
    held = places(wanted)
    leaving.close(stream, held)
    gevent.sleep(0.2)  # several looks at the clock
    assert (office.back, len(leaving), leaving.under(wanted)) == ([], 1, 1)
    assert theirs.recv(10) == b""  # our FIN is there
    theirs.sendall(b"221 bye\r\n")
    theirs.close()
    until(lambda: office.back == [held])
    assert (len(leaving), leaving.under(wanted), stream.socket.fileno()) == (0, 0, -1)


def test_a_receiver_that_does_not_close_keeps_it_for_so_long_only(house, pair):
    office = Office()
    leaving = Leaving(house.engine, office, 0.05)
    leaving.close(pair[0], places(throttle()))
    until(lambda: office.back)
    assert pair[0].socket.fileno() == -1


def test_a_receiver_that_goes_on_talking_is_not_listened_to(house, pair):
    stream, theirs = pair
    office = Office()
    leaving = Leaving(house.engine, office, 3600.0)
    leaving.close(stream, places(throttle()))
    theirs.setblocking(True)

    def talk():
        try:
            while True:
                theirs.sendall(b"x" * 65536)
        except OSError:
            pass

    thread = threading.Thread(target=talk)
    thread.start()
    until(lambda: office.back)
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.parametrize("case", ["reset", "no places", "switched off", "closed before", "broken"])
def test_what_is_not_waited_for(house, pair, case):
    stream, theirs = pair
    office = Office()
    leaving = Leaving(house.engine, office, 0.0 if case == "switched off" else 3600.0)
    if case in ("closed before", "broken"):
        theirs.close()
    held = None if case == "no places" else places(throttle())
    leaving.close(stream, held, case == "reset")
    assert office.back == [held]
    assert len(leaving) == 0
    assert stream.socket.fileno() == -1


def test_when_descriptors_are_short_nobody_is_waited_for(house, pair):
    office = Office()
    leaving = Leaving(house.engine, office, 3600.0)
    leaving.close(pair[0], places(throttle()))
    assert (leaving.hurry(5), len(office.back)) == (1, 1)
    assert leaving.hurry(5) == 0


def test_the_next_connection_waits_for_the_receiver_and_one_way_is_made_for_one_who_waits(make):
    """Two cached connections under a limit of two, one who waits: one of them goes, not both, and he comes in when the
    receiver has closed it."""
    gate = threading.Event()

    def quit_late(session, reply):
        session.send(reply)
        session.wait_for_gate(gate)

    house = make(None, block("two", connections=2))
    house.keeper._leaving.seconds = 3600.0
    with Mx({"quit": quit_late}) as mx, Mx() as other:
        first, second = house.open(key_of(mx)), house.open(key_of(mx))
        house.give(first)
        house.give(second)
        until(lambda: len(house.keeper.pool) == 2)
        waiting = gevent.spawn(house.open, key_of(other), "b", 30.0)
        until(lambda: len(house.keeper._leaving) == 1)
        gevent.sleep(0.1)
        assert not waiting.ready()
        assert len(house.keeper.pool) == 1
        gate.set()
        receiver = waiting.get(timeout=30)
        house.give(receiver)
        until(lambda: receiver in house.keeper.pool)
        assert mx.connects == 2
