"""Sessions, frame by frame: what an instance that does odd things gets, and that others do not notice."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import threading
import time

import pytest

from greenarrow_proxy_client import Limits, ProxyRefused, Session
from greenarrow_proxy_client.throttle import ThrottleRejected
from tests.independent_client import (
    CERT,
    ERROR,
    GOAWAY,
    PING,
    PONG,
    Peer,
    Told,
    error_from,
    error_of,
    frame,
    pack,
    session,
)
from tests.mta import SECOND, Use, check_uses, clock
from tests.program import SECRET, Proxy
from tests.sinks import Sink
from tests.waiting import wait_for

REG, DEMAND, RETURN, OUTCOME, BYE, GRANT, CAP, LIMIT, LIST, CACHED = range(0x23, 0x2D)
SOURCE = "127.0.0.5"
PLAIN = "listen_tls no\n"


@pytest.fixture(scope="module")
def proxy():
    with Proxy(PLAIN) as it:
        yield it


class Instance(Peer):
    """A session that answers pings; `heard`: all other frames so far."""

    def __init__(self, proxy, name, run_id=None):
        super().__init__(proxy.native, tls=False)
        self.hello(1, name, run_id or os.urandom(16))
        self.incarnation = self.prove(SECRET)[1]
        self.heard = []
        self.pongs = []

    def tell(self, kind, *fields):
        self.say(kind, self.incarnation, *fields)

    def ping(self):
        self.tell(PING, clock() // 1000)

    def register(self, *paths):
        """(id, name, (amount, seconds, burst) …) each."""
        self.tell(REG, [[id, SOURCE, [[name, [list(rate) for rate in rates]]]] for id, name, *rates in paths])

    def want(self, id, want, got=0):
        self.tell(DEMAND, [[id, want, got, want]])

    def next(self, *kinds):
        """The next frame of these kinds: type, fields, when it came."""
        while True:
            kind, fields = self.hear()
            at = clock()
            if kind == PING:
                self.tell(PONG, fields[1], 0)
            elif kind == PONG:
                self.pongs.append((at // 1000 - fields[1] - fields[2]) / 1e6)
            else:
                self.heard.append((kind, fields))
            if kind in kinds:
                return kind, fields, at

    def limit(self):
        """The first record of the next LIMIT: id, throttles, slack …"""
        return self.next(LIMIT)[1][1][0]


@contextlib.contextmanager
def instance(proxy, name="a", **more):
    with Instance(proxy, name, **more) as peer:
        yield peer


def test_a_permit_for_a_message(proxy):
    with instance(proxy) as a:
        a.ping()
        a.register((7, "one", (100, 1, 1)))
        assert a.limit()[:3] == [7, [[[[100, 1, 1]], 0]], 100_000]
        a.want(7, 1)
        _, (_, ping_t, hold, records), at = a.next(GRANT)
        ((id, n, offset, _, use_by),) = records
        assert (id, n) == (7, 1)
        assert ping_t + hold <= at // 1000
        assert use_by == ping_t + hold + offset + 100_000
        assert offset <= 30_000  # no slot is given out earlier before its time


def test_demands_in_one_segment_in_pieces_and_of_any_length_are_all_heard(proxy):
    """What the hub acts upon, what it leaves to the session's greenlet, and what is not whole yet."""
    with instance(proxy) as a:
        a.ping()
        ids = range(151)
        a.register(*((id, f"piece {id}", (100_000, 1, 1)) for id in ids))
        while sum(len(fields[1]) for kind, fields in a.heard if kind == LIMIT) < len(ids):
            a.limit()

        def demand(*ids, got):
            return frame(DEMAND, pack([a.incarnation, [[id, 1, got, 1] for id in ids]]))

        many = b"".join(demand(id, got=0) for id in ids[:40])
        long = demand(*ids[40:150], got=0)
        assert len(long) > 512
        a.sock.sendall(many + long + demand(150, got=0))
        granted = []
        while len(granted) < len(ids):
            granted += [id for id, n, *_ in a.next(GRANT)[1][3] for _ in range(n)]
        assert sorted(granted) == list(ids)
        for at in demand(1, got=1):
            a.sock.sendall(bytes((at,)))
        assert [record[:2] for record in a.next(GRANT)[1][3]] == [[1, 1]]


def test_without_a_ping_there_are_no_permits_and_without_pongs_no_session(proxy):
    with instance(proxy) as a:
        a.register((1, "unpinged", (100, 1, 1)))
        a.limit()
        a.want(1, 10)
        for _ in range(3):
            a.next(PING)
        assert GRANT not in [kind for kind, _ in a.heard]
        a.ping()
        a.next(GRANT)
        kinds = []
        with pytest.raises(Told) as told:  # from here on it answers nothing
            kinds.extend(kind for kind, _ in iter(a.hear, None))
        assert told.value.args[::2] == ("no_pong", True)
        assert kinds.count(PING) in (4, 5, 6)
    proxy.wait_line(r"session is over.*reason=silent")


def test_limits_that_do_not_hold_are_refused_path_by_path(proxy):
    with instance(proxy) as a:
        bad = [(number, f"{number:03}" + "n" * 252, (10, 60, 10)) for number in range(500)]
        for at in range(0, 500, 100):
            a.register(*bad[at : at + 100])
        a.register((900, "good", (10, 60, 1)), (901, "twice", (10, 60, 1), (20, 60, 1)))
        a.tell(REG, [[902, "192.0.2.1", [["not ours", []]]]])
        answers = {}
        while len(answers) < 503:
            for id, throttles, *more in a.next(LIMIT)[1][1]:
                answers[id] = throttles, more[-1] if more else ""
        assert [id for id, (throttles, _) in answers.items() if throttles] == [900]
        assert "burst 10 must be smaller" in answers[0][1]
        assert "two rates" in answers[901][1]
        assert "192.0.2.1" in answers[902][1]


def test_more_windows_than_a_limit_can_tell(proxy):
    with instance(proxy, "a") as a, instance(proxy, "b") as b:
        a.register((1, "many", *((1000 * seconds, seconds, 1) for seconds in (1, 2, 3, 4))))
        a.limit()
        b.register((1, "many", *((1000 * seconds, seconds, 1) for seconds in (5, 6, 7)), (1, 8, 1)))
        (rates, _) = b.limit()[1][0]
        assert len(rates) == 4
        assert [1, 8, 1] in rates


def test_who_does_not_read_is_not_listened_to_and_nobody_else_notices(proxy):
    with instance(proxy, "deaf") as deaf, Session(proxy.native, SECRET, "b", tls=False) as other:
        throttle = other.throttle(SOURCE, Limits("others", ((200, 1),)))
        throttle.wait_until_registered(30)
        # Limits that do not hold: each is answered with a sentence.
        paths = [[id, SOURCE, [["x" * 250, [[10, 60, 10]]]]] for id in range(200)]
        storm = frame(REG, pack([deaf.incarnation, paths])) * 1000
        deaf.sock.settimeout(0.05)
        # Little room in the kernel: it is stuck before it is given up for answering no PING, on a slow machine too.
        deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        stuck = re.compile(r"forward\(in=16/16 .*back\(in=0/16 out=16/16 buf=\d+\)")
        left = memoryview(storm)

        def fed():
            """However slow the machine is, it is stuck in the end."""
            nonlocal left
            with contextlib.suppress(TimeoutError):
                while left:
                    left = left[deaf.sock.send(left) :]
            return stuck.search(next(line for line in proxy.status() if "session(deaf)" in line))

        wait_for(fed, 30, "both queues are full")
        assert left
        for _ in range(5):
            throttle.acquire(30)


def test_a_storm_of_registrations_leaves_pings_alone(proxy):
    _storm(proxy, 10_000)


@pytest.mark.slow
def test_a_storm_of_100_000_registrations_leaves_pings_alone(proxy):
    _storm(proxy, 100_000)


def _storm(proxy, count):
    """All paths, twice, a thousand unanswered at a time. While another session's ping is answered the proxy works for
    less than 0.2 s, and its own are answered before the next thousand."""
    with instance(proxy, "storm") as a, instance(proxy, "other") as other:
        most, pings = 0.0, 0
        for _ in range(2):
            for first in range(0, count, 1000):
                for at in range(first, first + 1000, 500):
                    a.register(*((id, f"rule-{id}", (1000, 3600, 1)) for id in range(at, at + 500)))
                a.ping()
                pings += 1
                before = proxy.worked()
                other.ping()
                other.next(PONG)
                most = max(most, proxy.worked() - before)
                answered = 0
                while answered < 1000:
                    answered += len(a.next(LIMIT)[1][1])
                assert len(a.pongs) >= pings - 1
        while len(a.pongs) < pings:
            a.next(PONG)
        assert most < 0.2, "a thousand of them are 10 to 30 ms in all"
        a.tell(BYE)


@pytest.mark.slow
def test_a_session_that_names_too_many_throttles_is_told_and_goes_on(proxy):
    with Session(proxy.native, SECRET, "hoarder", tls=False) as session:
        limits = [[Limits(f"rule-{path}-{number}", [(1000, 1)]) for number in range(8)] for path in range(25_001)]
        *throttles, last = [session.throttle(SOURCE, *each) for each in limits[:-1]]
        assert last.wait_until_registered(120)
        one_more = session.throttle(SOURCE, *limits[-1])
        with pytest.raises(ThrottleRejected, match=r"more than 200000 throttles, .*: register fewer"):
            one_more.wait_until_registered(30)
        with pytest.raises(ThrottleRejected):
            one_more.acquire(30)
        for throttle in (throttles[0], last):
            assert throttle.acquire(30).usable
        session.change_limits(last, *(dataclasses.replace(each, rates=[(500, 1)]) for each in limits[-2]))
        wait_for(lambda: last.effective[7] == ([(500, 1)], 0), what="the new limits")


def test_coming_and_going_wins_nothing(proxy):
    """An MTA that reconnects all the time, with ever new runs or the same, gets no more than the limit."""
    uses = []
    paths = {"p": [("flapping", 50, 1, 1)]}

    def visit(run_id):
        with instance(proxy, f"flap-{run_id}", run_id=bytes([run_id]) * 16) as a:
            a.ping()
            a.register((1, "flapping", (50, 1, 1)))
            slack = a.limit()[2]
            a.want(1, 1000)
            _, (_, ping_t, hold, records), at = a.next(GRANT)
            for _, n, offset, step, _ in records:
                for number in range(n):
                    use_by = (ping_t + hold + offset + number * step + slack) * 1000
                    latest = at + (offset + number * step) * 1000
                    uses.append(Use("p", latest, use_by - slack * 1000, latest, use_by))

    for number in range(40):
        visit(number % 3)
    assert len(uses) >= 40
    check_uses([use for use in uses if use.at <= use.use_by], paths)


def test_a_return_goes_to_who_waits_and_only_once(proxy):
    """Two instances, 4 a second: what one returns the other gets before its time is over."""
    with instance(proxy, "a") as a, instance(proxy, "b") as b:
        for each in (a, b):
            each.ping()
            each.register((1, "returned", (4, 1, 1)))
            each.limit()
        a.want(1, 1)
        _, (_, _, _, ((_, _, offset, *_),)), at = a.next(GRANT)
        slot = at + offset * 1000
        b.want(1, 5)
        a.tell(RETURN, [[1, 0, 1]])
        a.tell(RETURN, [[1, 0, 1]])  # nobody holds it
        _, (_, _, _, ((_, _, offset, *_),)), at = b.next(GRANT)
        assert abs(at + offset * 1000 - slot) < SECOND // 8, "the same slot, not the next, which is 250 ms later"
        _, (_, _, _, ((_, n, offset, *_),)), at = b.next(GRANT)
        assert n == 1
        assert at + offset * 1000 - slot > SECOND // 5


def test_frames_of_another_incarnation_are_dropped(proxy):
    with instance(proxy) as a:
        a.say(REG, a.incarnation ^ 1, [[1, SOURCE, [["ghost", []]]]])
        a.say(BYE, a.incarnation ^ 1)
        a.register((2, "real", (10, 1, 1)))
        assert a.limit()[0] == 2


def test_what_is_no_frame_of_a_session_ends_it(proxy):
    for kind, payload in ((0x10, b"\x90"), (DEMAND, b"\x91\x01"), (GRANT, pack([1, 0, 0, []])), (0x7F, b"")):
        with instance(proxy) as a:
            a.sock.sendall(frame(kind, payload))
            assert error_of(a) == "bad_protocol"


def test_goaway_ends_the_permits_at_a_stop():
    with Proxy(PLAIN + "drain_timeout 3s\n") as proxy, instance(proxy) as a:
        a.ping()
        a.register((1, "t", (20, 1, 1)))
        a.want(1, 1000)
        a.next(GRANT)
        with socket.create_connection(proxy.socks5):  # something to wait for
            proxy.term()
            a.next(GOAWAY)
            a.heard.clear()
            with pytest.raises(Told, match="draining"):
                a.next(ERROR)
        assert GRANT not in [kind for kind, _ in a.heard[1:]]


def test_a_name_that_two_machines_fight_for(proxy):
    """Two clones that do not give up: one of them has the name all the time."""
    runs = [os.urandom(16), os.urandom(16)]
    won = [0, 0]
    stop = time.monotonic() + 1.5

    def fight(number):
        while time.monotonic() < stop:
            with (
                contextlib.suppress(Exception),
                session(proxy.native, instance="clone", run_id=runs[number], tls=False) as peer,
            ):
                won[number] += 1
                while time.monotonic() < stop:
                    kind, fields = peer.hear()
                    if kind == PING:
                        peer.say(PONG, fields[0], fields[1], 0)

    threads = [threading.Thread(target=fight, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(won) == [1, 1], "the first has it once and never again"


def test_list_and_certificates_are_answered(proxy):
    with Proxy() as tls, session(tls.native) as peer:
        assert peer.expect(CERT)[1] == [peer.certificate]
    with instance(proxy) as a:
        a.tell(LIST, None)
        assert a.next(CACHED)[1][1:] == [[], False]


def test_a_session_that_is_replaced_is_told(proxy):
    run_id = os.urandom(16)
    with instance(proxy, "again", run_id=run_id) as old, instance(proxy, "again", run_id=run_id) as new:
        assert error_from(old)[::2] == ("replaced", False)
        new.ping()
        new.next(PONG)


def test_a_burst_is_one_record(proxy):
    """100,000 a second with the largest burst: it had been a record for each permit, and a freeze for all others."""
    with instance(proxy, "burst") as a, instance(proxy, "slow") as b:
        for each in (a, b):
            each.ping()
        a.register((1, "bursty", (100_000, 1, 10_001)))
        assert "at most 10000" in a.limit()[5]
        a.register((1, "bursty", (100_000, 1, 10_000)))
        b.register((1, "other", (50, 1, 1)))
        a.limit()
        b.limit()
        over = clock() + SECOND // 5  # the burst begins empty
        wait_for(lambda: clock() > over)
        a.want(1, 50_000)
        at_once = records = 0
        while at_once < 8_000:
            for _, n, _, step, _ in a.next(GRANT)[1][3]:
                records += 1
                at_once += n if step == 0 else 0
        assert records < 100
        b.want(1, 1)
        b.next(GRANT)


def test_bye_is_answered_by_closing(proxy):
    with instance(proxy, "leaves") as a:
        a.tell(BYE)
        assert a.closed()
    proxy.wait_line(r"session is over.*instance=leaves.*reason=bye")
    wait_for(lambda: not any("session(leaves)" in line for line in proxy.status()))


def test_a_source_that_a_reload_takes_away_takes_its_paths_along():
    """Else they would have half of all slots, for connections that are refused; the other one gets everything now."""
    both = "source_ip 127.0.0.0/8\n"
    with Proxy(PLAIN + both) as proxy, instance(proxy, "a") as a, instance(proxy, "b") as b:
        for peer in (a, b):
            peer.ping()
            peer.register((1, "r", (10, 1, 1)))
            assert peer.limit()[1]
        proxy.hup(PLAIN + "source_ip 127.0.0.0/8\ninstance a {\n    source_ip 127.0.0.6\n}\n")
        id, throttles, *_, warning = a.limit()
        assert (id, throttles) == (1, [])
        assert f"source {SOURCE} is not in source_ip" in warning
        a.want(1, 1000)
        b.want(1, 5)
        granted = 0
        while granted < 5:
            granted += sum(record[1] for record in b.next(GRANT)[1][3])
        assert not [kind for kind, _ in a.heard if kind == GRANT]
        # It can be bound again, to an address that is left.
        a.tell(REG, [[1, "127.0.0.6", [["r", [[10, 1, 1]]]]]])
        assert a.limit()[1]


NAMED = """\
source vmta* {
    ip 127.0.7.1-127.0.7.9
}
source pair {
    ip 127.0.8.1, 127.0.8.2
}
throttle narrow {
    mx *.yahoodns.example
    max_concurrent_connections 1
    wait 0s
}
"""


@pytest.fixture
def named():
    """A proxy with names for sources and a block by MX, and a receiver."""
    with Proxy(PLAIN + NAMED) as proxy, Sink() as mx:
        yield proxy, mx


def test_a_path_by_the_names_of_its_source_and_its_receivers(named):
    """OPENs on it say neither: they leave from there, and the proxy's own limits by MX hold for them."""
    proxy, mx = named
    limits = Limits("yahoo", max_connections=2)
    plainly = {"tls": "none", "reuse": False}
    with Session(proxy.native, SECRET, "a", tls=False) as a, Session(proxy.native, SECRET, "b", tls=False) as b:
        by_name = a.throttle(None, limits, source="vmta7", mx="mta5.yahoodns.example")
        by_address = b.throttle("127.0.7.7", limits)
        with a.smtp([mx.endpoint], "a.example", throttles=[by_name], **plainly) as one:
            assert one.opened.local.host == "127.0.7.7"
            with pytest.raises(ProxyRefused, match=r"throttle narrow for 127\.0\.7\.7") as refused:
                a.smtp([mx.endpoint], "a.example", throttles=[by_name], **plainly)
            assert refused.value.throttle == "narrow"
            # The other instance's path says no names: the block is not for it. Both have one throttle, though.
            with b.smtp([mx.endpoint], "b.example", throttles=[by_address], **plainly):
                with pytest.raises(ProxyRefused) as refused:
                    b.smtp([mx.endpoint], "b.example", throttles=[by_address], deadline=0.2, **plainly)
                assert refused.value.throttle == "yahoo"
        with pytest.raises(ThrottleRejected, match="source typo is not known"):
            a.throttle(None, Limits("yahoo"), source="typo").wait_until_registered(30)
        with pytest.raises(ThrottleRejected, match="mx"):
            a.throttle("127.0.7.7", Limits("yahoo"), mx="no host name").wait_until_registered(30)


def test_a_path_by_names_frame_by_frame(named):
    """As docs/protocol.md has it: nil and a name; what cannot be bound is told, and the session goes on."""
    proxy, _ = named
    with instance(proxy, "raw") as raw:
        raw.ping()
        rule = [["r", [[10, 1, 1]]]]
        raw.tell(REG, [[1, None, rule, "vmta7", "mta5.yahoodns.example", "yahoo.example"]])
        id, throttles, *_, warning = raw.limit()
        assert (id, len(throttles)) == (1, 1)
        assert "known" not in warning, "no word on the names; on a slow round trip there may be one"
        for fields, why in (
            ((None, rule, "typo"), "source typo is not known"),
            (("127.0.7.7", rule, None, "no host name"), "mx no host name"),
            (("127.0.7.7", rule, None, None, "a domain"), "domain a domain"),
        ):
            raw.tell(REG, [[2, *fields]])
            id, throttles, *_, warning = raw.limit()
            assert (id, throttles) == (2, [])
            assert warning.startswith(why)
        raw.want(1, 1)
        assert raw.next(GRANT)[1][3][0][:2] == [1, 1]
        raw.tell(REG, [[3, "127.0.7.7", rule, "vmta7"]])  # both: no form of this message
        assert error_of(raw) == "bad_protocol"


def test_a_path_by_the_name_of_several_addresses_counts_them_together(named):
    proxy, mx = named
    plainly = {"tls": "none", "reuse": False}
    with Session(proxy.native, SECRET, "a", tls=False) as a:
        pair = a.throttle(None, Limits("yahoo", max_connections=2), source="pair")
        one, two = (a.smtp([mx.endpoint], "a", throttles=[pair], **plainly) for _ in range(2))
        with one, two:
            assert {one.opened.local.host, two.opened.local.host} == {"127.0.8.1", "127.0.8.2"}
            with pytest.raises(ProxyRefused) as refused:
                a.smtp([mx.endpoint], "a", throttles=[pair], deadline=0.2, **plainly)
            assert refused.value.throttle == "yahoo"
            with pytest.raises(ProxyRefused) as refused:
                a.smtp([mx.endpoint], "a", source_ip="127.0.7.1", throttles=[pair], **plainly)
            assert refused.value.code == "unknown_path"
        proxy.hup(PLAIN)
        wait_for(lambda: "source pair is not known" in pair.warning)
        with pytest.raises(ThrottleRejected):
            a.smtp([mx.endpoint], "a", throttles=[pair], **plainly)


def test_list_names_an_address_or_nothing(proxy):
    with instance(proxy) as a:
        a.tell(LIST, "x")
        assert error_of(a) == "bad_protocol"
