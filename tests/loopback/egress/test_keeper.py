"""The keeper on real sockets: receivers that misbehave while they are cleaned, idle, handed out or parted from.

After each test the books must balance, whatever happened: every connection that was offered was handed out, or was
discarded for one reason, and its socket is closed and its throttle places are given back.
"""

from __future__ import annotations

import contextlib
import re
import resource
import select
import socket
import subprocess
import threading
from _socket import socketpair
from time import monotonic
from types import SimpleNamespace

import gevent
import pytest

from proxy.egress import keeper as keeper_room
from proxy.egress.pool import PoolKey
from proxy.egress.receiver import Receiver
from proxy.model import Discard, Endpoint, TlsMode
from proxy.net.addresses import own_addresses
from proxy.net.conversation import receive
from proxy.net.tls import PlainStream
from tests.certificates import pem
from tests.loopback.houses import SOURCE, block, key_of, limits, until
from tests.mx import Mx, close, flood, garbage, half_close, late, mute, reset, say, stall, trickle, twice


def test_a_connection_goes_from_one_user_to_the_next(house):
    gate = threading.Event()
    with Mx({"rset": late(gate)}) as mx:
        first = house.open(key_of(mx))
        opened_at, local = first.opened_at, first.local
        house.give(first, messages=2)
        assert (house.keeper.cached, len(house.keeper.pool)) == (1, 0), "it counts while it is cleaned"
        gate.set()
        until(lambda: len(house.keeper.pool) == 1)
        second = house.open(key_of(mx))
        assert second is first
        assert (second.messages, second.opened_at, second.local) == (2, opened_at, local)
        assert (house.keeper.cached, mx.connects) == (0, 1)
        assert mx.sessions[0].commands == [b"EHLO mta.example.org", b"RSET"]
        assert house.discarded() == {}


def test_tcp_watches_over_what_is_kept(house, mx):
    """Not over a fresh one: most are over before a dead peer matters, and spare five system calls."""
    first = house.open(key_of(mx))
    alive = (socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert not first.stream.socket.getsockopt(*alive)
    house.give(first)
    until(lambda: len(house.keeper.pool) == 1)
    assert first.stream.socket.getsockopt(*alive)


def test_the_one_used_last_is_handed_out_first(house, mx):
    users = [house.open(key_of(mx)) for _ in range(3)]
    for count, user in enumerate(users, 1):
        house.give(user)
        until(lambda count=count: len(house.keeper.pool) == count)
    assert [house.open(key_of(mx)) for _ in range(3)] == users[::-1]


def test_one_whose_source_address_is_gone_is_not_handed_out(house, mx, monkeypatch):
    """No answer can come to it: its next user would wait for the whole of its own time-out."""
    house.cache(mx)
    monkeypatch.setattr(own_addresses(), "_interfaces", {})
    monkeypatch.setattr(own_addresses(), "_routed", lambda *_: False)
    assert house.take(key_of(mx)) is None
    assert house.discarded() == {Discard.SOURCE_GONE: 1}
    assert house.keeper.cached == 0


def test_one_that_is_found_too_old_when_it_is_asked_for_is_closed(house, mx, monkeypatch):
    """The sweeper may be late: whoever asks before it finds it, and parts from it."""
    house.cache(mx)
    monkeypatch.setattr(keeper_room, "monotonic", lambda: monotonic() + 86_400)
    assert house.take(key_of(mx)) is None
    assert sum(house.discarded().values()) == 1
    until(lambda: house.keeper.cached == 0 and mx.running == 0)


def test_what_leaves_from_an_address_that_goes_is_closed_at_once(house, mx):
    house.cache(mx)
    assert house.keeper.forsake("127.0.0.99") == 0
    assert house.keeper.cached == 1
    assert house.keeper.forsake(SOURCE) == 1
    assert house.keeper.cached == 0
    assert house.discarded() == {Discard.SOURCE_GONE: 1}


def test_another_key_does_not_get_it(house, mx):
    house.cache(mx)
    assert house.take(key_of(mx, tenant="somebody else")) is None
    assert house.take(key_of(mx)) is not None


# -- RSET --------------------------------------------------------------------------------------------------------------


def in_two_records(session, reply):
    """Two replies in two TLS records that come in one segment: the second has no edge of its own."""
    session.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    session.send(reply)
    session.send(reply)
    session.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


@pytest.mark.parametrize("tls", [TlsMode.NONE, TlsMode.REQUIRED])
def test_a_second_250_behind_the_first(make, tls):
    with Mx({"rset": in_two_records}, starttls=True) as mx:
        house = make()
        house.give(house.open(key_of(mx, tls)))
        until(lambda: house.keeper.pool.offered)
        reason = Discard.PEER_SPOKE if tls is TlsMode.REQUIRED else Discard.UNREAD
        assert (house.discarded(), house.keeper.cached) == ({reason: 1}, 0)


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (say(b"503 5.5.1 no\r\n"), Discard.RSET_REFUSED),
        (say(b"354 go on\r\n"), Discard.RSET_REFUSED),
        (say(b"421 4.3.2 bye\r\n", close), Discard.SAID_421),
        (close, Discard.PEER_CLOSED),
        (reset, Discard.PEER_CLOSED),
        (half_close, Discard.PEER_CLOSED),
        (say(b"250 ok\r\n", close), Discard.PEER_CLOSED),
        (twice, Discard.UNREAD),
        (say(b"250 ok\r\n25"), Discard.UNREAD),
        (say(b"250 ok\n"), Discard.PROTOCOL_ERROR),
        (garbage, Discard.PROTOCOL_ERROR),
        (flood, Discard.PROTOCOL_ERROR),
        (mute, Discard.TIMED_OUT),
        (stall, Discard.TIMED_OUT),
        (trickle, None),
        (say(b"250-two\r\n250 lines\r\n"), None),
    ],
)
@pytest.mark.parametrize("tls", [TlsMode.NONE, TlsMode.REQUIRED])
def test_only_one_250_to_rset_makes_a_connection_cached(make, monkeypatch, behaviour, reason, tls):
    if reason is Discard.TIMED_OUT:
        monkeypatch.setattr(keeper_room, "_RSET_SECONDS", 0.1)
    with Mx({"rset": behaviour}, starttls=True) as mx:
        house = make()
        house.give(house.open(key_of(mx, tls)))
        # What closes right after its 250 may be cached for a moment.
        until(lambda: house.keeper.cached == (reason is None) and house.keeper.pool.offered)
        assert house.discarded() == ({reason: 1} if reason else {})
        assert (house.take(key_of(mx, tls)) is None) == (reason is not None)


def test_a_late_250_keeps_nobody_waiting(house):
    gate = threading.Event()
    with Mx({"rset": late(gate)}) as mx:
        first = house.open(key_of(mx))
        house.give(first)
        second = house.open(key_of(mx))
        assert (second is first, mx.connects) == (False, 2)
        gate.set()
        until(lambda: len(house.keeper.pool) == 1)
        assert house.open(key_of(mx)) is first


# -- idle --------------------------------------------------------------------------------------------------------------


def close_notify(session, reply):
    """TLS ends, and TCP does not."""
    session.sock.setblocking(False)
    with contextlib.suppress(OSError):  # does not wait for ours
        session.sock.unwrap()
    session.sock.setblocking(True)


IDLE = [
    (say(b"421 4.4.2 idle too long\r\n", close), {Discard.PEER_SPOKE, Discard.PEER_CLOSED}),
    (say(b"421 4.4.2 idle too long\r\n"), {Discard.PEER_SPOKE}),
    (say(b"250 late\r\n"), {Discard.PEER_SPOKE}),
    (say(b"2"), {Discard.PEER_SPOKE}),
    (close, {Discard.PEER_CLOSED}),
    (reset, {Discard.PEER_CLOSED}),
    (half_close, {Discard.PEER_CLOSED}),
]


@pytest.mark.parametrize(("behaviour", "reasons"), IDLE)
@pytest.mark.parametrize("tls", [TlsMode.NONE, TlsMode.REQUIRED])
def test_an_idle_connection_that_closes_or_speaks_is_dropped_at_once(make, behaviour, reasons, tls):
    with Mx(starttls=True) as mx:
        house = make()
        house.cache(mx, tls=tls)
        mx.sessions[0].act(behaviour)
        until(lambda: not house.keeper.cached)
        assert set(house.discarded()) <= reasons
        assert house.take(key_of(mx, tls)) is None
        assert b"QUIT" not in mx.sessions[0].commands


def test_close_notify_is_an_end(make):
    with Mx(starttls=True) as mx:
        house = make()
        house.cache(mx, tls=TlsMode.REQUIRED)
        mx.sessions[0].act(close_notify)
        until(lambda: not house.keeper.cached)
        assert house.discarded() == {Discard.PEER_CLOSED: 1}


@pytest.mark.parametrize(("behaviour", "reasons"), IDLE)
def test_what_died_unnoticed_is_not_handed_out(house, mx, behaviour, reasons):
    """The event is there, but the loop has had no turn: the look before the hand-over finds it."""
    idle = house.cache(mx)
    poll = select.poll()
    poll.register(idle.stream.socket.fileno(), select.POLLIN)
    mx.sessions[0].act(behaviour)
    assert poll.poll(5000)
    assert house.take(key_of(mx)) is None
    assert set(house.discarded()) <= reasons
    assert (house.keeper.pool.hits, house.keeper.cached) == (0, 0)


def test_tls_tickets_and_key_updates_are_no_end(house, tmp_path):
    """OpenSSL's own server: tickets come after the handshake, key updates when it reads a line `k`, or `K`, which asks
    for ours in return (it goes out with the next bytes that we send)."""
    certificate = tmp_path / "certificate.pem"
    certificate.write_bytes(pem("valid"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = free.getsockname()
    command = ["openssl", "s_server", "-accept", "{}:{}".format(*endpoint), "-cert", certificate, "-crlf", "-msg"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        said = bytearray()

        def read():
            while part := server.stdout.read1(65536):
                said.extend(part)

        def answer(heard, line):
            until(lambda: heard in said, what=str(heard))
            server.stdin.write(line)
            server.stdin.flush()

        reader = threading.Thread(target=read)
        reader.start()
        try:
            until(lambda: b"ACCEPT" in said)
            key = key_of(SimpleNamespace(endpoint=endpoint), TlsMode.IMPLICIT)
            user = gevent.spawn(house.open, key)
            answer(b"CIPHER is", b"220 openssl\n")
            answer(b"EHLO mta", b"250 openssl\n")
            receiver = user.get(timeout=30)
            house.give(receiver)
            answer(b"RSET", b"250 clean\n")
            until(lambda: len(house.keeper.pool) == 1)
            assert b"NewSessionTicket" in said
            for line in (b"k\n", b"K\n"):
                before = receiver.stream._silent
                answer(b"", line)
                until(lambda before=before: receiver.stream._silent > before, what="it looked")
            assert house.discarded() == {}
            assert house.take(key) is receiver
            receiver.stream.send(b"NOOP\r\n")
            answer(b"NOOP", b"250 alive\n")
            assert receive(house.engine, receiver.stream) == b"250 alive\r\n"
            assert len(re.findall(rb">>> .*KeyUpdate", said)) == 2
            until(lambda: re.search(rb"<<< .*KeyUpdate", said))
        finally:
            server.kill()
            reader.join(30)


# -- asked again before the hand-over ----------------------------------------------------------------------------------


@pytest.fixture
def later(monkeypatch):
    """Lets the keeper's clock jump ahead: so many seconds have gone by."""
    ahead, real = [0.0], keeper_room.monotonic
    monkeypatch.setattr(keeper_room, "monotonic", lambda: real() + ahead[0])

    def jump(seconds):
        ahead[0] += seconds

    return jump


@pytest.mark.parametrize("tls", [TlsMode.NONE, TlsMode.REQUIRED])
def test_who_has_been_idle_for_long_is_asked_once_more(make, later, tls):
    with Mx(starttls=True) as mx:
        house = make()
        idle = house.cache(mx, tls=tls)
        later(4.0)
        house.give(house.open(key_of(mx, tls)))
        until(lambda: len(house.keeper.pool) == 1)
        assert mx.sessions[0].commands.count(b"RSET") == 2, "one for each user, none for the hand-over"
        later(6.0)
        assert house.open(key_of(mx, tls)) is idle
        assert (mx.sessions[0].commands.count(b"RSET"), house.discarded(), mx.connects) == (3, {}, 1)


def test_a_receiver_that_vanished_holds_nobody_up(house, later, monkeypatch):
    """Nor do its other connections: one that was idle longer is as dead, on whatever key; a fresher one may live."""
    monkeypatch.setattr(keeper_room, "_PROBE_SECONDS", 0.05)
    with Mx({"rset": [lambda session, reply: session.send(reply), mute]}) as mx:
        older = [house.cache(mx, tenant=tenant) for tenant in ("", "b")]
        later(1.0)
        first = house.cache(mx, tenant="c")
        later(1.0)
        fresher = house.cache(mx, tenant="d")
        later(6.0)
        assert house.take(key_of(mx, tenant="c")) is None
        assert not any(each in house.keeper.pool for each in (*older, first))
        assert fresher in house.keeper.pool
        assert house.discarded() == {Discard.TIMED_OUT: 3}
        assert house.open(key_of(mx, tenant="c")) is not first
        assert [b"QUIT" in session.commands for session in mx.sessions] == [False] * 5


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        (say(b"421 4.3.2 bye\r\n", close), Discard.SAID_421),
        (say(b"503 5.5.1 no\r\n"), Discard.RSET_REFUSED),
        (reset, Discard.PEER_CLOSED),
        (twice, Discard.UNREAD),
    ],
)
def test_whose_answer_is_wrong_is_passed_over_for_the_next(house, later, behaviour, reason):
    script = {"rset": [lambda session, reply: session.send(reply), behaviour]}
    with Mx(lambda number: script if number == 1 else {}) as mx:
        users = [house.open(key_of(mx)) for _ in range(2)]
        for count, user in enumerate(users, 1):
            house.give(user)
            until(lambda count=count: len(house.keeper.pool) == count)
        later(6.0)
        assert house.open(key_of(mx)) is users[0]
        assert house.discarded() == {reason: 1}


def test_who_goes_away_meanwhile_leaves_nothing_behind(make, later):
    house = make(limits(), block("one"))
    with Mx({"rset": [lambda session, reply: session.send(reply), mute]}) as mx:
        house.cache(mx)
        later(6.0)
        user = gevent.spawn(house.open, key_of(mx))
        until(lambda: mx.sessions[0].commands.count(b"RSET") == 2)
        assert house.keeper.cached == 1, "it counts while it is asked"
        user.kill()
        until(lambda: mx.sessions[0].ended)
        assert (house.keeper.cached, house.discarded()) == (0, {Discard.OUTSTANDING: 1})
        assert house.open(key_of(mx)), "its place is free"


def test_what_may_not_be_had_after_all_stays_watched_and_is_not_asked_again(house, mx, later):
    idle = house.cache(mx)
    later(6.0)
    for _ in range(2):
        assert house.keeper.take(key_of(mx), lambda kept: False) is None
    assert idle in house.keeper.pool
    assert mx.sessions[0].commands.count(b"RSET") == 2
    mx.sessions[0].act(close)
    until(lambda: not house.keeper.cached)
    assert house.discarded() == {Discard.PEER_CLOSED: 1}


def test_a_stop_while_it_is_asked(make, later):
    gate = threading.Event()
    house = make()
    with Mx({"rset": [lambda session, reply: session.send(reply), late(gate)]}) as mx:
        house.cache(mx)
        later(6.0)
        user = gevent.spawn(house.take, key_of(mx))
        until(lambda: mx.sessions[0].commands.count(b"RSET") == 2)
        house.keeper.drain()
        gate.set()
        assert user.get(timeout=30) is None
        until(lambda: mx.sessions[0].ended == "quit")
        until(lambda: not house.keeper.cached)
        assert house.discarded() == {Discard.DRAINING: 1}


def test_who_began_to_wait_for_its_place_while_it_was_asked(make, later):
    """It cannot give way in that moment, so it does when it is back."""
    gate = threading.Event()
    house = make(limits(), block("one"))
    with Mx({"rset": [lambda session, reply: session.send(reply), late(gate)]}) as mx, Mx() as other:
        house.cache(mx)
        later(6.0)
        asked = gevent.spawn(house.keeper.take, key_of(mx), lambda kept: False)
        until(lambda: mx.sessions[0].commands.count(b"RSET") == 2)
        waiting = gevent.spawn(house.open, key_of(other), "b")
        until(house.waits)
        gate.set()
        assert asked.get(timeout=30) is None
        assert waiting.get(timeout=30).destination == other.endpoint
        assert house.discarded() == {Discard.YIELDED: 1}


# -- the pool's rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (limits(connections=False), Discard.DISABLED),
        (limits(messages=1), Discard.MAX_MESSAGES),
        (limits(age=0.0), Discard.MAX_AGE),
        (limits(cached=0), Discard.MAX_CACHED),
        (limits(cached_per_destination=0), Discard.MAX_CACHED_PER_DESTINATION),
    ],
)
def test_what_is_not_kept_hears_quit(make, mx, settings, reason):
    house = make(settings)
    house.give(house.open(key_of(mx)))
    until(lambda: mx.sessions and mx.sessions[0].ended)
    until(lambda: not house.keeper.cached)
    assert (mx.sessions[0].ended, house.discarded()) == ("quit", {reason: 1})


def test_the_limit_that_the_receiver_announces_is_kept_to(house):
    with Mx(extensions=("LIMITS MAILMAX=2",)) as mx:
        house.cache(mx)  # one message
        house.give(house.open(key_of(mx)))  # the second
        until(lambda: mx.sessions[0].ended)
        until(lambda: not house.keeper.cached)
        until(lambda: mx.sessions[0].ended == "quit")
        assert house.discarded() == {Discard.PEER_LIMIT: 1}


def test_over_the_cap_the_one_idle_longest_hears_quit(make, mx):
    house = make(limits(cached_per_destination=2))
    users = [house.open(key_of(mx)) for _ in range(3)]
    for user in users:
        house.give(user)
        until(lambda: not house.keeper._cleaning)
    until(lambda: mx.sessions[0].ended == "quit")
    until(lambda: house.keeper.cached == 2)
    assert house.discarded() == {Discard.MAX_CACHED_PER_DESTINATION: 1}


@pytest.mark.parametrize("tls", [TlsMode.NONE, TlsMode.REQUIRED])
@pytest.mark.parametrize(
    ("settings", "reason"), [(limits(idle=0.2), Discard.MAX_IDLE), (limits(age=0.3), Discard.MAX_AGE)]
)
def test_age_ends_with_quit(make, settings, reason, tls):
    with Mx(starttls=True) as mx:
        house = make(settings)
        house.cache(mx, tls=tls)
        until(lambda: not house.keeper.cached)
        until(lambda: mx.sessions[0].ended == "quit")
        assert house.discarded() == {reason: 1}


def test_the_sweeper_wakes_for_what_comes_due_earlier(make, mx):
    """It sleeps until the first one's end; the second was connected long ago."""
    house = make()
    house.cache(mx)
    old = house.open(key_of(mx, tenant="old"))
    old.opened_at -= 299.5
    house.give(old)
    until(lambda: mx.sessions[1].ended == "quit")
    until(lambda: house.discarded() == {Discard.MAX_AGE: 1})
    assert len(house.keeper.pool) == 1


def test_a_thousand_are_swept_in_one_pass(make, monkeypatch):
    """Hand-made receivers: what each is told, and answers, is done by one thread."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    now = [1000.0]
    monkeypatch.setattr(keeper_room, "monotonic", lambda: now[0])
    house = make()
    ends, heard, poll = {}, {}, select.poll()
    for number in range(1000):
        ours, peer = socketpair()
        ours.setblocking(False)
        house.engine.register(ours.fileno())
        end = socket.socket(fileno=peer.detach())
        ends[end.fileno()] = end
        heard[end] = b""
        poll.register(end, select.POLLIN)
        destination = Endpoint("127.0.0.1", 1 + number)
        receiver = Receiver(PlainStream(ours), SOURCE, destination, destination, now[0], 60.0)
        house.out[receiver] = PoolKey(SOURCE, destination, "mta.example.org", TlsMode.NONE)
    stopping = threading.Event()

    def answer():
        while not stopping.is_set():
            for fd, _ in poll.poll(20):
                data = ends[fd].recv(4096)
                heard[ends[fd]] += data
                if data:
                    ends[fd].sendall(b"250 ok\r\n" if data == b"RSET\r\n" else b"221 bye\r\n")
                else:
                    poll.unregister(fd)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        for receiver in list(house.out):
            house.give(receiver)
        until(lambda: len(house.keeper.pool) == 1000)
        idle = {1000}
        now[0] += 30.0
        house.keeper._changed.set()  # the real clock would take 30 s for that
        until(lambda: idle.add(len(house.keeper.pool)) or not house.keeper.cached, timeout=30)
        assert idle == {1000, 0}, "nobody has seen a part of it"
        assert house.discarded() == {Discard.MAX_IDLE: 1000}
        until(lambda: all(said == b"RSET\r\nQUIT\r\n" for said in heard.values()))
    finally:
        stopping.set()
        thread.join(30)
        for end in ends.values():
            end.close()


def test_a_reload_holds_for_what_is_held(house, mx):
    for tenant in "abc":
        house.cache(mx, tenant=tenant)
    house.keeper.apply(limits(cached=1))
    until(lambda: house.keeper.cached == 1)
    assert house.discarded() == {Discard.MAX_CACHED: 2}
    house.keeper.apply(limits(connections=False))
    until(lambda: not house.keeper.cached)
    assert house.discarded() == {Discard.MAX_CACHED: 2, Discard.DISABLED: 1}
    until(lambda: [session.ended for session in mx.sessions] == ["quit"] * 3)


def test_a_shorter_age_wakes_the_sweeper(house, mx):
    house.cache(mx)
    house.keeper.apply(limits(idle=0.2))
    until(lambda: not house.keeper.cached)
    assert house.discarded() == {Discard.MAX_IDLE: 1}


def test_a_drain_says_quit_to_all_even_to_what_is_being_cleaned(house):
    gate = threading.Event()
    with Mx(lambda number: {"quit": late(gate)} | ({"rset": late(gate)} if number == 2 else {})) as mx:
        for tenant in "ab":
            house.cache(mx, tenant=tenant)
        house.give(house.open(key_of(mx, tenant="c")))
        house.keeper.drain()
        assert house.keeper.cached == 3
        gate.set()
        until(lambda: not house.keeper.cached)
        until(lambda: [session.ended for session in mx.sessions] == ["quit"] * 3)
        assert house.discarded() == {Discard.DRAINING: 3}


@pytest.mark.parametrize("behaviour", [mute, stall, garbage, close, reset, half_close, flood, trickle, twice])
def test_whatever_quit_is_answered_the_connection_is_closed(house, monkeypatch, behaviour):
    monkeypatch.setattr(keeper_room, "_QUIT_SECONDS", 0.1)
    with Mx({"quit": behaviour}) as mx:
        house.cache(mx)
        house.keeper.drain()
        until(lambda: not house.keeper.cached)
        assert house.discarded() == {Discard.DRAINING: 1}


def test_short_of_descriptors_they_are_closed_in_the_same_call(house, mx):
    cached = [house.cache(mx, tenant=tenant) for tenant in "abc"]
    house.keeper.shed(2)
    assert [each.stream.socket.fileno() < 0 for each in cached] == [True, True, False]
    assert house.keeper.cached == 1
    assert house.discarded() == {Discard.OVERLOADED: 2}
    until(lambda: [session.ended for session in mx.sessions[:2]] == ["quit"] * 2)
