"""`Opener` in this process: how an OPEN's time is spent on several receivers, and what becomes of TLS that breaks."""

from __future__ import annotations

import contextlib
from time import monotonic

import gevent
import pytest

from proxy.config import load
from proxy.doors.native import open as room
from proxy.doors.native.open import Opener
from proxy.egress import bring_up
from proxy.errors import BadServerName, SourceNotAllowed, Step, Throttled, UpstreamError
from proxy.model import Endpoint, TlsMode, hold_breath
from proxy.net.tls import PlainStream
from proxy.protocols.native import messages as m
from proxy.protocols.native.auth import Peer
from proxy.server.server import Server
from tests import program
from tests.loopback.doors.native import ends
from tests.loopback.net.relays import tcp_pair
from tests.mx import Mx, close, garbage, mute, say, stall
from tests.sinks import closed_port
from tests.waiting import wait_for

SOURCE = "127.0.0.5"
PEER = Peer(m.Kind.CHANNEL, "mta-1", bytes(16), 1, one_flight=False)


class House:
    """The product's own services, and OPENs that are served as a channel would."""

    def __init__(self, more: str = "") -> None:
        text = program.config(more)
        loaded = load.load(["--config-filename=f"], {}, lambda path: text)
        self.server = Server(lambda *_: loaded, loaded)
        self.services = self.server._wiring.prepare(loaded, (), hold_breath).services
        self.client, ours = tcp_pair()
        self.guest = ends.guest(PlainStream(ours))
        self.told: list[tuple[str, Endpoint, UpstreamError]] = []
        self.taken: list[room.Taken] = []

    def open(self, *destinations, attempts=None, **more):
        """OPEN; what it came to."""
        fields = {"ehlo_name": "mta.example.org", "deadline_ms": 10_000} | more
        request = m.Open(None if "source" in more else SOURCE, [m.Address(*each) for each in destinations], **fields)
        tell = lambda *failure: self.told.append(failure)  # noqa: E731
        taken = Opener(self.services, self.guest, PEER, request, tell).run([] if attempts is None else attempts)
        self.taken.append(taken)
        return taken

    def keep(self, taken):
        """END{keep}: it is cached when this returns."""
        self.taken.remove(taken)
        self.services.gauges.outgoing -= 1
        self.services.keeper.give(taken.receiver, taken.key)
        wait_for(lambda: taken.receiver in self.services.keeper.pool, pause=gevent.sleep)

    def limits(self):
        """Throttles under which somebody waits, or has a place."""
        return [throttle for throttle in self.services.admission.manager.blocks.throttles() if throttle.in_use()]

    def close(self, taken):
        self.taken.remove(taken)
        self.services.gauges.outgoing -= 1
        self.services.engine.close(taken.receiver.stream.socket)
        self.services.admission.leave(taken.receiver.place)

    def end(self):
        for taken in list(self.taken):
            self.close(taken)
        self.services.keeper.drain()
        wait_for(lambda: not self.services.keeper.cached, pause=gevent.sleep)
        assert self.services.gauges.outgoing == 0
        left = self.limits()
        self.guest.stream.socket.close()
        self.client.close()
        self.server.close()
        self.services.engine.stop()
        assert not left, "places are left behind"


@pytest.fixture
def make():
    with contextlib.ExitStack() as stack:

        def new(more=""):
            house = House(more)
            stack.callback(house.end)
            return house

        yield new


@pytest.fixture
def house(make):
    return make()


# -- the deadline ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deadline", "left", "connect", "session"),
    [
        (50.0, 1, 30.0, 50.0),  # connect_timeout; all of it
        (10.0, 1, 10.0, 10.0),
        (50.0, 2, 10.0, 25.0),  # the even part
        (50.0, 8, 6.25, 15.0),  # more than the even part: a greeting after 8 s is heard
        (50.0, 32, 1.5625, 15.0),
        (20.0, 8, 2.5, 10.0),  # no more than half, so that others are tried
        (1.0, 4, 0.25, 0.5),
    ],
)
def test_how_the_time_is_spent(house, monkeypatch, deadline, left, connect, session):
    now = [100.0]
    monkeypatch.setattr(room, "monotonic", lambda: now[0])
    request = m.Open(SOURCE, [m.Address("127.0.0.2", 25)], deadline_ms=int(deadline * 1000))
    opener = Opener(house.services, house.guest, PEER, request, print)
    limits = opener._limits(left)
    assert (limits.connect, limits.session) == pytest.approx((connect, session))
    assert limits.ends_at == pytest.approx(100.0 + (deadline if left == 1 else connect + session))


def test_silent_receivers_leave_time_for_the_last(house):
    """Each takes half of what is left at the most."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(Mx({"greeting": mute})) for _ in range(3)]
        good = stack.enter_context(Mx())
        attempts = []
        taken = house.open(*(mx.endpoint for mx in silent), good.endpoint, attempts=attempts, deadline_ms=2000)
        assert taken.receiver.destination == good.endpoint
        assert [error.step for _, error in attempts] == [Step.GREETING] * 3


def test_a_late_greeting_is_heard_although_there_are_many_others(house, monkeypatch):
    """Its even part of the time is 125 ms: it gets the half."""
    real = bring_up.Timeout.start_new
    timers = []
    monkeypatch.setattr(
        bring_up.Timeout, "start_new", lambda seconds, *rest: timers.append(seconds) or real(seconds, *rest)
    )
    with contextlib.ExitStack() as stack:
        receivers = [stack.enter_context(Mx()) for _ in range(8)]
        house.open(*(mx.endpoint for mx in receivers), deadline_ms=10_000)
        assert timers == [pytest.approx(5.0, abs=1.0)]
        assert [mx.connects for mx in receivers] == [1] + [0] * 7


# -- what failed before another worked ---------------------------------------------------------------------------------


def test_each_failure_is_told_as_it_happens(house):
    with closed_port() as dead, Mx({"greeting": say(b"421 4.3.2 busy\r\n", close)}) as busy, Mx() as good:
        attempts = []
        house.open(dead, busy.endpoint, good.endpoint, attempts=attempts)
        assert [(source, to, error.step) for source, to, error in house.told] == [
            (SOURCE, Endpoint(*dead), Step.CONNECT),
            (SOURCE, Endpoint(*busy.endpoint), Step.GREETING),
        ]
        assert [error for _, error in attempts] == [error for _, _, error in house.told]


def test_the_last_failure_is_told_like_the_others(house):
    with closed_port() as dead, Mx({"greeting": say(b"554 no\r\n")}) as no, Mx() as unused:
        with pytest.raises(UpstreamError):
            house.open(dead, no.endpoint, unused.endpoint)
        assert [error.step for _, _, error in house.told] == [Step.CONNECT, Step.GREETING]


# -- TLS that breaks ---------------------------------------------------------------------------------------------------


def no_tls(session, reply):
    """An answer to the client's first record that is none."""
    session.receive()
    garbage(session, reply)


OPPORTUNISTIC = {"tls": TlsMode.OPPORTUNISTIC, "reuse": True}
BLOCK = "throttle narrow {\n    max_concurrent_connections 1\n    wait 5s\n}\n"


@pytest.mark.parametrize(
    ("script", "step"),
    [
        ({"tls": no_tls}, Step.TLS),
        ({"tls": close}, Step.TLS),
        ({"tls": stall}, Step.TLS),
        ({"starttls": mute}, Step.STARTTLS),
    ],
    ids=["no TLS", "closed", "hangs", "never answered"],
)
def test_the_connection_in_clear_takes_its_own_turn(make, monkeypatch, script, step):
    """What hangs is no other: it is given up in time. The first connection's place is free by then."""
    monkeypatch.setattr(bring_up, "_HANDSHAKE_SECONDS", 0.3)
    house = make(BLOCK)
    with Mx(script, starttls=True) as mx:
        taken = house.open(mx.endpoint, **OPPORTUNISTIC)
        assert taken.receiver.place.number == 4, "a request and its places, twice"
        assert [throttle.used for throttle in house.limits()] == [1]
        assert (taken.receiver.tls, taken.in_clear.cause) == (None, "handshake")
        assert (mx.connects, mx.running <= 2) == (2, True)
        assert [error.step for _, _, error in house.told] == [step]
        assert house.services.counters.in_clear == {"handshake": 1}
        assert house.services.counters.fresh == 1


def test_no_turn_in_time_is_no_connection(make, monkeypatch):
    """Another, who stood behind the first, has the place; and there is no time to wait for it."""
    house = make(BLOCK)
    late = 0.0
    monkeypatch.setattr(room, "monotonic", lambda: monotonic() + late)

    def somebody_waits():
        return house.services.admission.waiters.for_places == 1

    def no_tls_when_it_is_late(session, reply):
        wait_for(somebody_waits)
        nonlocal late
        late = 9.9
        no_tls(session, reply)

    with Mx({"tls": no_tls_when_it_is_late}, starttls=True) as mx, Mx() as other:
        first = gevent.spawn(house.open, mx.endpoint, **OPPORTUNISTIC)
        wait_for(lambda: mx.connects, pause=gevent.sleep)
        rival = gevent.spawn(house.open, other.endpoint, ehlo_name=None)
        with pytest.raises(Throttled):
            first.get(timeout=30)
        late = 0.0
        assert (mx.connects, [throttle.used for throttle in house.limits()]) == (1, [1])
        house.close(rival.get(timeout=30))
        house.close(house.open(mx.endpoint, ehlo_name=None))  # nobody else has the place


def test_a_place_that_is_left_behind_is_seen():
    """What `House.end` is for."""
    house = House(BLOCK)
    with Mx() as mx:
        taken = house.open(mx.endpoint)
        place, taken.receiver.place = taken.receiver.place, None
        with pytest.raises(AssertionError, match="places are left behind"):
            house.end()
        house.services.admission.leave(place)
        assert not house.limits()


def test_a_session_in_clear_is_not_shared_with_who_wants_tls(house):
    with Mx(lambda number: {"tls": no_tls} if number == 0 else {}, starttls=True) as mx:
        house.keep(house.open(mx.endpoint, **OPPORTUNISTIC))
        again = house.open(mx.endpoint, **OPPORTUNISTIC)
        assert (again.reused, again.receiver.tls is not None) == (False, True), "TLS is tried anew"
        plain = house.open(mx.endpoint, reuse=True)
        assert (plain.reused, plain.in_clear) == (True, None), "who wants none may have it"
        assert mx.connects == 3


def test_a_starttls_that_is_refused_for_now_is_the_same(house):
    with Mx({"starttls": say(b"454 4.7.0 not now\r\n")}, starttls=True) as mx:
        first = house.open(mx.endpoint, **OPPORTUNISTIC)
        why = "STARTTLS refused: 454 4.7.0 not now"
        assert first.in_clear == ("starttls", why, "starttls-not-supported")
        house.keep(first)
        second = house.open(mx.endpoint, **OPPORTUNISTIC)
        assert (second.reused, mx.connects) == (False, 2)
        assert house.services.counters.in_clear == {"starttls": 2}


def test_after_two_failures_running_it_is_not_tried(house):
    with Mx({"tls": no_tls}, starttls=True) as mx:
        for _ in range(2):
            house.keep(house.open(mx.endpoint, **OPPORTUNISTIC, fresh=True))
        assert mx.connects == 4
        third = house.open(mx.endpoint, **OPPORTUNISTIC)
        assert (third.reused, third.in_clear.cause, mx.connects) == (True, "remembered", 4)
        assert "for it has failed before: TLS handshake failed" in third.in_clear.why
        with pytest.raises(UpstreamError):
            house.open(mx.endpoint, tls=TlsMode.REQUIRED)
        with pytest.raises(UpstreamError):
            house.open(mx.endpoint, tls=TlsMode.OPPORTUNISTIC, tls_verify=True)
        assert mx.connects == 6, "who must have TLS never falls back, and always tries"
        assert house.services.counters.in_clear == {"handshake": 2, "remembered": 1}


def test_a_handshake_that_works_clears_the_memory(house):
    def without_sessions(context):
        context.num_tickets = 0  # else one goes on, and breaks, before TLS is given up

    def script(number):
        return {"tls": no_tls} if number in (0, 3) else {}

    with Mx(script, starttls=True, prepare=without_sessions) as mx:
        causes = []
        for _ in range(3):
            taken = house.open(mx.endpoint, **OPPORTUNISTIC, fresh=True)
            causes.append(taken.in_clear.cause if taken.in_clear else "")
        assert (causes, mx.connects) == (["handshake", "", "handshake"], 5)
        assert house.services.broken_tls.why(Endpoint(*mx.endpoint), monotonic()) == ""


NAMED = "throttle by-name {\n    mx *.example.net\n    max_concurrent_connections 1\n    wait 0\n}\n"


def test_names_of_the_receiver_bring_its_limits(make):
    """A block by MX name holds for who tells the name, in any spelling, and for nobody else here."""
    house = make(NAMED)
    with Mx() as mx:
        house.open(mx.endpoint, mx="MX1.example.NET.", domain="example.com")
        house.open(mx.endpoint, mx="mx1.example.org")
        house.open(mx.endpoint)
        with pytest.raises(Throttled, match="throttle by-name for"):
            house.open(mx.endpoint, mx="mx2.example.net")
        with pytest.raises(BadServerName, match="domain"):
            house.open(mx.endpoint, domain="no domain")


def test_a_source_by_its_name(make):
    house = make("source vmta* {\n    ip 127.0.7.0/29\n}\n")
    with Mx() as mx:
        assert house.open(mx.endpoint, source="vmta3").receiver.local.host == "127.0.7.3"
        with pytest.raises(SourceNotAllowed, match="source vmta9 is not known"):
            house.open(mx.endpoint, source="vmta9")
