"""Domains of throttle blocks against a real server: what is asked again when, and what never stops the hub."""

from types import SimpleNamespace

import dns.rcode
import gevent
import pytest
from gevent.event import Event

from proxy.egress.look_ups import AT_ONCE, PATIENCE, LookUps
from proxy.model import Endpoint
from proxy.policy.directory import Book
from tests.dns_server import SILENT, DnsServer

MX = {
    "a.example.": {"MX": ["20 Mx2.a.example.", "10 mx1.a.example."]},
    "mx1.a.example.": {"A": ["192.0.2.1", "192.0.2.2"], "AAAA": ["2001:db8::1"]},
    "mx2.a.example.": {"A": ["192.0.2.3"]},
}
ALL = {"mx1.a.example": ("192.0.2.1", "192.0.2.2", "2001:db8::1"), "mx2.a.example": ("192.0.2.3",)}


class House:
    """A book that is kept true, under a clock that stands unless `pass_`."""

    def __init__(self, patience=PATIENCE):
        self.now, self.changes = 0.0, 0
        self.book = Book()
        self.look_ups = LookUps(self.book, self._changed, lambda: self.now, patience)

    def _changed(self):
        self.changes += 1

    def use(self, server, *domains):
        self.look_ups.use(domains or ("a.example",), server)

    def pass_(self, seconds):
        self.now += seconds
        self.look_ups.wake()

    def entry(self, domain="a.example"):
        return self.book.entries[domain]

    def settle(self, domain="a.example", due=None):
        """Until the domain's answer has come, and it is due again at `due` or at some time."""
        with gevent.Timeout(20):
            while self.entry(domain).due in (float("inf"), 0.0) or (due and self.entry(domain).due != due):
                gevent.sleep(0.005)
        return self.entry(domain)


@pytest.fixture
def house():
    house = House()
    yield house
    house.look_ups.stop()


@pytest.fixture
def hasty():
    house = House(0.5)
    yield house
    house.look_ups.stop()


@pytest.fixture
def server():
    with DnsServer({name: dict(kinds) for name, kinds in MX.items()}) as server:
        yield server


def test_hosts_and_addresses(house, server):
    house.use(server.endpoint)
    assert (house.settle().known, house.entry().doubt, house.changes) == (ALL, "", 1)
    assert list(house.entry().known) == ["mx1.a.example", "mx2.a.example"], "best first"


def test_renewed_at_its_ttl_and_not_before(house, server):
    server.ttl = 45
    house.use(server.endpoint)
    assert house.settle().due == 45
    house.pass_(44.9)
    gevent.sleep(0)
    server.records["mx2.a.example."] = {"A": ["192.0.2.9"]}
    assert server.asked["a.example.", "MX"] == 1
    house.pass_(0.1)
    assert house.settle(due=90).known == ALL | {"mx2.a.example": ("192.0.2.9",)}
    assert (server.asked["a.example.", "MX"], house.changes) == (2, 2)
    house.pass_(45)
    house.settle(due=135)
    assert house.changes == 2, "the same again"


@pytest.mark.parametrize("code", [dns.rcode.NXDOMAIN, dns.rcode.SERVFAIL, dns.rcode.REFUSED])
def test_a_failure_is_shown_and_the_last_good_answer_kept(house, server, code):
    house.use(server.endpoint)
    house.settle()
    server.codes["a.example."] = code
    house.pass_(300)
    entry = house.settle(due=330)
    assert (entry.known, entry.doubt) == (ALL, f"MX of a.example: {code.name}")
    server.codes.clear()
    house.pass_(30)
    assert house.settle(due=630).doubt == ""
    assert house.changes == 1


def test_one_host_that_fails(house, server):
    house.use(server.endpoint)
    house.settle()
    server.codes["mx1.a.example."] = dns.rcode.SERVFAIL
    server.records["mx2.a.example."] = {"A": ["192.0.2.8"]}
    house.pass_(300)
    entry = house.settle(due=330)
    assert entry.known == ALL | {"mx2.a.example": ("192.0.2.8",)}
    assert entry.doubt == "A of mx1.a.example: SERVFAIL"


def test_thirty_hosts_come_by_tcp_since_a_datagram_cannot_hold_them(house, server):
    hosts = [f"mx{n}.with-a-rather-long-name.example." for n in range(30)]
    server.records["a.example."] = {"MX": [f"10 {host}" for host in hosts]}
    server.records |= {host: {"A": [f"192.0.2.{n}"]} for n, host in enumerate(hosts)}
    house.use(server.endpoint)
    assert len(house.settle().known) == 30
    assert server.by_tcp == 1
    assert house.entry().doubt == ""
    assert all(house.book.domains(f"192.0.2.{n}") == ("a.example",) for n in range(30))


def test_aliases_are_followed(house, server):
    server.records["a.example."] = {"CNAME": ["b.example."]}
    server.records["b.example."] = {"CNAME": ["c.example."]}
    server.records["c.example."] = {"MX": ["10 alias.example."]}
    server.records["alias.example."] = {"CNAME": ["mx2.a.example."]}
    house.use(server.endpoint)
    assert house.settle().known == {"alias.example": ("192.0.2.3",)}


def test_aliases_in_a_circle_are_a_failure(house, server):
    server.records["a.example."] = {"CNAME": ["b.example."]}
    server.records["b.example."] = {"CNAME": ["a.example."]}
    house.use(server.endpoint)
    entry = house.settle()
    assert entry.known == {}
    assert entry.doubt.startswith("MX of a.example: ")


def test_without_mx_and_with_a_null_mx(house, server):
    server.records["b.example."] = {"A": ["192.0.2.7"]}
    server.records["c.example."] = {"MX": ["0 ."], "A": ["192.0.2.8"]}
    house.use(server.endpoint, "b.example", "c.example")
    assert house.settle("b.example").known == {"b.example": ("192.0.2.7",)}
    assert (house.settle("c.example").known, house.entry("c.example").doubt) == ({}, "")


def test_a_server_that_hangs_stops_nobody_and_nothing_waits_for_it(hasty, server):
    """All threads hang there, and the hub turns on."""
    names = [f"d{n}.example" for n in range(AT_ONCE)]
    server.codes |= {f"{name}.": SILENT for name in names}
    hasty.use(server.endpoint, *names)
    with gevent.Timeout(20):
        while sum(server.asked.values()) < AT_ONCE:
            gevent.sleep(0.001)
    for _ in range(1000):
        gevent.sleep(0)
    assert all(hasty.entry(name).due == float("inf") for name in names), "no answer has come meanwhile"
    for name in names:
        assert hasty.settle(name).doubt == f"MX of {name}: no answer in time"


def test_another_server_is_asked_anew_and_a_late_answer_of_the_old_one_is_dropped(house, server):
    with DnsServer({"a.example.": {"A": ["192.0.2.77"]}}) as other:
        house.use(server.endpoint)
        house.settle()
        house.use(other.endpoint)
        with gevent.Timeout(20):
            while house.entry().known != {"a.example": ("192.0.2.77",)}:
                gevent.sleep(0.005)


def test_nobody_there(hasty):
    hasty.use(Endpoint("127.0.0.1", 1))
    assert "MX of a.example: " in hasty.settle().doubt


def test_who_waits_for_the_first_answer_of_a_domain_goes_on_with_it_or_with_a_failure(house, server):
    server.codes["b.example."] = dns.rcode.SERVFAIL
    house.use(server.endpoint, "a.example", "b.example")
    house.look_ups.hear_of(frozenset({"a.example"}), 20.0)
    assert house.book.domains("192.0.2.1") == ("a.example",)
    house.look_ups.hear_of(frozenset({"a.example", "b.example", "c.example"}), 20.0)
    assert house.book.unheard == set()


def test_nobody_waits_for_longer_than_there_is_time(house, monkeypatch):
    never = SimpleNamespace(rawlink=lambda _: None, get=Event().wait)
    monkeypatch.setattr(house.look_ups._apart, "_pool", SimpleNamespace(spawn=lambda *_: never))
    house.use(None)
    waiting = gevent.spawn(house.look_ups.hear_of, frozenset({"a.example"}), 7.0)
    gevent.sleep(0)
    assert not waiting.ready()
    house.now = 7.0
    house.look_ups._heard.set()
    waiting.get(timeout=30)
    assert house.book.unheard == {"a.example"}


def test_a_look_up_that_no_thread_can_be_had_for_is_a_failure_and_not_for_ever(house, server, monkeypatch):
    def none(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(house.look_ups._apart, "_pool", SimpleNamespace(spawn=none))
        house.use(server.endpoint)
        assert house.settle().doubt == "can't start new thread"
    house.pass_(house.entry().due - house.now)
    with gevent.Timeout(20):
        while house.entry().doubt:
            gevent.sleep(0.005)
    assert house.entry().known == ALL
