"""The status room by itself: its deadline, its bounds, mistakes of ours, and a view that lets others run."""

from __future__ import annotations

import contextlib
import json
import socket as stdlib
from datetime import UTC, datetime
from time import monotonic
from types import SimpleNamespace

import gevent
import pytest
from gevent import socket

from proxy.egress.pool import Pool
from proxy.log import lines as log
from proxy.model import Endpoint
from proxy.net.addresses import own_addresses
from proxy.net.crew import Crew
from proxy.net.newcomers import Newcomers
from proxy.net.relay import RawSocket
from proxy.policy.trouble import Troubles
from proxy.services import Door
from proxy.spans import SPANS
from proxy.stats import Counters
from proxy.status import host as status_host
from proxy.status import http
from proxy.status.gather import Gauged, counted
from proxy.status.http import House, InForce, StatusDoor
from proxy.status.throttles import STEP
from proxy.throttling.limits import Part
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import SECOND, Key, Limit
from tests.loopback.net.relays import open_descriptors, until

PART = Part((Limit(100, 3600),))
GET = b"GET %s HTTP/1.1\r\nHost: 127.0.0.1:809\r\n\r\n"


class Room:
    """A status room whose connections are socket pairs; `said` is what it logged as mistakes."""

    def __init__(self):
        self.said = []
        self.spared = 0
        self.draining = False
        self.allowed = True
        self.door = Door("status", Endpoint("127.0.0.1", 809))
        self.counters = Counters()
        self.manager = Manager(7, 0)
        self.services = SimpleNamespace(
            access=SimpleNamespace(
                client_allowed=lambda host, door: self.allowed and door == "status", name_of_source=lambda address: ""
            ),
            admission=SimpleNamespace(manager=self.manager),
            counters=self.counters,
            crew=Crew(),
            host_name="mta1",
            incarnation=7,
            instances=SimpleNamespace(channels={}, connections={}, dialogues={}),
            keeper=SimpleNamespace(pool=Pool(None)),
            newcomers=Newcomers(10),
            settings=SimpleNamespace(throttle_enforce=False, throttle=(), listen_status_name=()),
            troubles=Troubles(),
        )
        self.room = StatusDoor(
            House(
                services=lambda: self.services,
                part=self.part,
                total=self.part,
                manager=lambda: None,
                limit=lambda: 100,
                draining=lambda: self.draining,
                in_force=lambda: InForce("0" * 12, datetime.now(UTC)),
                reload_failure=lambda: None,
                spare=self.spare,
            )
        )

    def part(self):
        return counted(self.counters, SPANS, self.services.keeper.pool, Gauged())

    @contextlib.contextmanager
    def spare(self):
        self.spared += 1
        yield

    def connect(self):
        ours, theirs = stdlib.socketpair()
        raw = RawSocket(ours.family, ours.type, ours.proto, ours.detach())
        raw.setblocking(False)
        self.room.admit(self.door, raw, ("127.0.0.1", 4321))
        return socket.socket(theirs.family, theirs.type, theirs.proto, fileno=theirs.detach())

    def ask(self, data):
        with self.connect() as sock:
            sock.sendall(data)
            return everything(sock)


def everything(sock):
    answer = b""
    with contextlib.suppress(ConnectionError), gevent.Timeout(20):
        while chunk := sock.recv(65536):
            answer += chunk
    return answer


@pytest.fixture
def room(monkeypatch):
    it = Room()
    monkeypatch.setattr(log, "internal_error", lambda message, error: it.said.append((message, error)))
    own_addresses()  # opens descriptors of its own, once
    before = open_descriptors()
    yield it
    until(lambda: it.door.open_connections == 0 and open_descriptors() <= before, what="everything is closed")


def test_a_silent_client_and_one_that_trickles_have_one_deadline(room, monkeypatch):
    monkeypatch.setattr(http, "_SECONDS", 0.2)
    with room.connect() as silent, room.connect() as slow:
        trickling = True

        def trickle():
            with contextlib.suppress(OSError):
                while trickling:
                    slow.sendall(b"G")
                    gevent.sleep(0.01)

        greenlet = gevent.spawn(trickle)
        assert everything(silent) == everything(slow) == b""
        trickling = False
        greenlet.join()
    assert room.said == []


def test_a_client_that_does_not_read_its_answer(room, monkeypatch):
    monkeypatch.setattr(http, "_SECONDS", 0.2)
    session = room.manager.hello("a", b"1", "x", 1.0, SECOND)
    for number in range(600):
        room.manager.register(session, number, [(Key("192.0.2.1", "x" * 200 + str(number)), PART)], SECOND)
    with room.connect() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(GET % b"/")
        until(lambda: room.door.open_connections == 1, what="it is served")
        until(lambda: room.door.open_connections == 0, what="it is given up")
    assert room.said == []


def test_of_too_many_the_oldest_is_cut_off(room, monkeypatch):
    monkeypatch.setattr(room.room, "_open", Newcomers(3))
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(room.connect()) for _ in range(5)]
        until(lambda: room.door.open_connections == 3, what="two are gone")
        assert [everything(sock) for sock in socks[:2]] == [b"", b""]
        assert room.ask(GET % b"/healthz").endswith(b"ok\n")


@pytest.mark.parametrize("path", [b"/", b"/status.json", b"/metrics"])
def test_a_mistake_of_ours_is_one_line_and_500(room, path):
    def broken():
        raise RuntimeError("secret")

    room.room._house = room.room._house._replace(part=broken)
    answer = room.ask(GET % path)
    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"secret" not in answer
    assert b"Traceback" not in answer
    assert [(message, type(error)) for message, error in room.said] == [("status request", RuntimeError)]
    assert room.ask(GET % b"/healthz").startswith(b"HTTP/1.1 200 ")


def test_who_is_not_allowed_hears_nothing(room, monkeypatch):
    monkeypatch.setattr(log, "refused", lambda *fields: room.said.append(fields))
    room.allowed = False
    assert room.ask(GET % b"/healthz") == b""
    assert room.counters.refused == {"client_not_allowed": 1}
    assert room.said[0][2:4] == ("status", Endpoint("127.0.0.1", 4321))


OURS = ["127.0.0.1", "192.0.2.1:809", "[::1]", "[fe80::1%eth0]:809", "localhost:809", "LocalHost.", "mta1", "MTA1:809"]
FOREIGN = [
    *(
        "evil.example",
        "evil.example:809",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "mta1.evil.example",
        "mta",
    ),
    *("[::1]:809,evil.example", "127.0.0.1,evil.example", "evil.example,127.0.0.1", "[localhost]:x", ":809", "."),
    *("127.0.0.1@evil.example", "2130706433", "mta1:809:1", "\xe9", "x" * 5000),
]


def under(name):
    return b"GET /status.json HTTP/1.1\r\nHost: " + name.encode("latin-1") + b"\r\n\r\n"


@pytest.mark.parametrize("name", [*OURS, "mta1.example.com:809", "mta1.Example.Com."])
def test_addresses_and_this_machines_names_are_answered(room, monkeypatch, name):
    monkeypatch.setattr(status_host.check, "__defaults__", ({"mta1": "mta1.example.com."}.__getitem__, ()))
    assert room.ask(under(name)).startswith(b"HTTP/1.1 200 ")


def test_who_names_no_host_is_answered(room):
    for request in (b"GET /healthz HTTP/1.0\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost:\r\n\r\n"):
        assert room.ask(request).endswith(b"ok\n")


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_that_somebody_else_may_own_reads_nothing(room, monkeypatch, name):
    monkeypatch.setattr(status_host.check, "__defaults__", ({"mta1": "mta1.example.com"}.__getitem__, ()))
    monkeypatch.setattr(log, "refused", lambda *fields: room.said.append(fields))
    answer = room.ask(under(name))
    assert answer.startswith(b"HTTP/1.1 421 Misdirected Request\r\n")
    assert b"use one of them in the URL" in answer
    assert len(answer) < 1000
    assert room.counters.refused == {"host_not_allowed": 1}
    assert room.said[0][2:4] == ("status", Endpoint("127.0.0.1", 4321))


def test_all_pages_are_kept_from_other_names(room):
    for path in (b"/", b"/status.json", b"/metrics", b"/nothing"):
        answer = room.ask(b"GET %s HTTP/1.1\r\nHost: evil.example\r\n\r\n" % path)
        assert answer.startswith(b"HTTP/1.1 421 ")
    assert room.ask(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n").startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("header", [":80", "."])
def test_no_name_is_not_the_name_of_a_machine_without_one(header):
    with pytest.raises(status_host.HostNotAllowed):
        status_host.check(header, "", lambda machine: "")


def test_a_machine_whose_full_name_is_not_known_has_none():
    assert status_host.full_name("no-such-host.invalid") == ""
    assert status_host.full_name("x" * 300) == ""
    assert status_host.full_name("localhost")


def test_descriptors_that_were_lent_are_taken_back_after_each(room):
    room.ask(GET % b"/healthz")
    until(lambda: room.spared == 1, what="taken back")


def test_a_request_that_is_too_long_is_not_read_to_its_end(room):
    head = b"GET /healthz HTTP/1.1\r\n"
    assert room.ask(head + b"X: y\r\n" * 50 + b"\r\n").startswith(b"HTTP/1.1 200 ")
    for fill in (b"X: y\r\n" * 3000, b"X: " + b"y" * 20_000 + b"\r\n"):
        assert room.ask(head + fill + b"\r\n").startswith(b"HTTP/1.1 400 ")
    post = b"POST /healthz HTTP/1.1\r\nContent-Length: 40000\r\n\r\n"
    assert room.ask(post + b"x" * 40_000).startswith(b"HTTP/1.1 405 ")
    assert room.said == []


def test_those_who_are_served_are_forgotten(room):
    for _ in range(3):
        room.ask(GET % b"/healthz")
    until(lambda: len(room.room._open) == 0, what="nobody is held")


def test_draining(room):
    room.draining = True
    assert room.ask(GET % b"/healthz").startswith(b"HTTP/1.1 503 ")


def test_others_run_while_the_view_is_built_and_it_is_built_once_for_all(room, monkeypatch):
    session = room.manager.hello("a", b"1", "x", 1.0, SECOND)
    for number in range(20_000):
        room.manager.register(session, number, [(Key("192.0.2.1", f"rule-{number}"), PART)], SECOND)
    turns, built = 0, []
    survey = http.survey

    def counted(*arguments):
        before = turns
        view = yield from survey(*arguments)
        built.append(turns - before)
        return view

    monkeypatch.setattr(http, "survey", counted)
    monkeypatch.setattr(http, "_FRESH", 60.0)
    answers = [gevent.spawn(room.ask, GET % b"/status.json") for _ in range(5)]
    while not all(answer.ready() for answer in answers):
        gevent.sleep(0)
        turns += 1
    bodies = {answer.value.partition(b"\r\n\r\n")[2] for answer in answers}
    assert len(bodies) == len(built) == 1
    view = json.loads(bodies.pop())
    assert (len(view["throttles"]), view["throttles_left_out"]) == (500, 19_500)
    assert built[0] >= 20_000 / STEP


def test_a_health_check_does_not_wait_for_a_view(room):
    session = room.manager.hello("a", b"1", "x", 1.0, SECOND)
    for number in range(20_000):
        room.manager.register(session, number, [(Key("192.0.2.1", f"rule-{number}"), PART)], SECOND)
    slow = gevent.spawn(room.ask, GET % b"/status.json")
    gevent.sleep(0)
    assert room.ask(GET % b"/healthz").endswith(b"ok\n")
    assert not slow.ready()
    slow.join()


def test_the_last_hour_is_kept_while_nobody_looks(room, monkeypatch):
    began = monotonic()
    room.counters.ended.count("client_closed", 5)
    for minute in (1, 2):
        monkeypatch.setattr(http, "monotonic", lambda now=began + 61.0 * minute: now)
        room.room.tick()
        room.counters.failed.count("connect", 61)
    ended, failed = ([getattr(row, name) for row in room.room.view().minutes] for name in ("ended", "failed"))
    assert [round(value * 61) for value in ended] == [5, 0]
    assert [round(value) for value in failed] == [0, 1]
