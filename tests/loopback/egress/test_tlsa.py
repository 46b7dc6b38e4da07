"""TLSA records asked of a real server: once for all who want them, again at their TTL, and no failure for long."""

from types import SimpleNamespace

import gevent
import pytest

from proxy.egress.tlsa import FAILED, TlsaLookUps
from proxy.policy.certificates import Tlsa
from tests.dns_server import SILENT, DnsServer

HOST, NAME = "mx.example.net", "_25._tcp.mx.example.net."
DIGEST = "cd" * 32
RECORD = Tlsa(3, 1, 1, bytes.fromhex(DIGEST))


@pytest.fixture
def server():
    records = {"mx.example.net.": {"A": ["192.0.2.1"]}, NAME: {"TLSA": [f"3 1 1 {DIGEST}"]}}
    with DnsServer(records) as server:
        server.secure |= set(records)
        server.ttl = 60
        yield server


class House:
    def __init__(self, server, patience=5.0):
        self.now = 0.0
        self.it = TlsaLookUps(lambda: self.now, patience)
        self.it.use(server.endpoint)

    def get(self, seconds=20.0, host=HOST):
        return self.it.get(host, 25, seconds)


def test_the_records_and_when_they_are_asked_for_again(server):
    house = House(server)
    assert (house.get().records, house.get().base) == ((RECORD,), HOST)
    house.now = 59.9
    house.get()
    assert server.asked[NAME, "TLSA"] == 1
    house.now = 60.0
    house.get()
    assert server.asked[NAME, "TLSA"] == 2


def test_all_who_want_the_same_wait_for_one_look_up(server):
    house = House(server)
    together = [gevent.spawn(house.get) for _ in range(20)]
    gevent.joinall(together, raise_error=True)
    assert {each.value.records for each in together} == {(RECORD,)}
    assert server.asked[NAME, "TLSA"] == 1


def test_without_the_ad_bit_there_are_none(server):
    server.secure.discard(NAME)
    assert (House(server).get().records, House(server).get().failure) == ((), "")
    server.secure.clear()
    assert "not signed" in House(server).get().why


def test_a_failure_is_told_and_tried_again_soon(server):
    server.codes[NAME] = 2
    house = House(server)
    assert "SERVFAIL" in house.get().failure
    asked = server.asked[NAME, "TLSA"]
    house.get()
    assert server.asked[NAME, "TLSA"] == asked
    del server.codes[NAME]
    house.now = FAILED
    assert house.get().records == (RECORD,)


def test_who_has_no_time_left_is_told_so_and_the_answer_is_for_the_next(server):
    server.codes[NAME] = SILENT
    house = House(server, patience=0.2)
    assert "no answer in time" in house.get(0.001).failure
    assert "no answer in time" in house.get().failure


def test_another_server_says_other_things(server):
    house = House(server)
    house.get()
    with DnsServer({"mx.example.net.": {"A": ["192.0.2.1"]}}) as other:
        house.it.use(other.endpoint)
        assert house.get().records == ()
        assert len(house.it) == 1


def test_an_alias(server):
    server.records["alias.example.net."] = {"CNAME": ["mx.example.net."]}
    server.secure.add("alias.example.net.")
    assert House(server).get(host="alias.example.net").base == HOST


def test_a_look_up_that_no_thread_can_be_had_for_is_a_failure_and_not_for_ever(server, monkeypatch):
    house = House(server)

    def none(*_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(house.it._apart, "_pool", SimpleNamespace(spawn=none))
        assert "can't start new thread" in house.get().failure
    house.now = FAILED
    assert house.get().records == (RECORD,)
