"""`domain` and `mx` of throttle blocks, for clients that name an address only: DNS says whose it is."""

from __future__ import annotations

import json
import urllib.request

import dns.rcode
import pytest

from tests.clients import Refused, exactly, socks5
from tests.dns_server import DnsServer
from tests.mx import Mx
from tests.program import Proxy
from tests.waiting import wait_for

BLOCK = """\
dns_server {server}
listen_status 127.0.1.9:0
throttle narrow {{
    {what}
    max_concurrent_connections 1
    wait 0s
}}
throttle other {{
    domain yahoo.example
    max_concurrent_connections 100
}}
"""


@pytest.fixture
def mx():
    with Mx() as it:
        yield it


@pytest.fixture
def names(mx):
    with DnsServer(
        {
            "yahoo.example.": {"MX": ["10 mta5.yahoodns.example."]},
            "mta5.yahoodns.example.": {"A": [mx.endpoint[0]]},
        }
    ) as it:
        it.ttl = 1
        yield it


def greeted(sock):
    return exactly(sock, 3) == b"220"


@pytest.mark.parametrize("what", ["domain yahoo.example", "mx *.yahoodns.example", "mx mta5.yahoodns.example"])
def test_a_block_by_name_holds_for_who_gives_an_address(mx, names, what):
    with Proxy(BLOCK.format(server=names.endpoint, what=what)) as proxy:
        wait_for(lambda: names.asked["mta5.yahoodns.example.", "AAAA"])
        wait_for(lambda: _refused(proxy, mx))


def _refused(proxy, mx):
    """Whether a second connection beside a first is; the answer may not have come yet."""
    with socks5(proxy.socks5, mx.endpoint) as first:
        assert greeted(first)
        try:
            with socks5(proxy.socks5, mx.endpoint) as second:
                return not greeted(second)
        except Refused:
            return bool(proxy.wait_line(r"throttle narrow for "))


def test_a_start_does_not_wait_for_dns_and_a_failure_is_told(mx, names):
    names.codes["yahoo.example."] = dns.rcode.SERVFAIL
    with Proxy(BLOCK.format(server=names.endpoint, what="domain yahoo.example")) as proxy:
        proxy.wait_line(r"dns: .*domain=yahoo\.example .*SERVFAIL")
        with socks5(proxy.socks5, mx.endpoint) as one, socks5(proxy.socks5, mx.endpoint) as two:
            assert greeted(one)
            assert greeted(two)


def _status(proxy):
    host, port = proxy.door("status")
    with urllib.request.urlopen(f"http://{host}:{port}/status.json") as answer:
        return json.load(answer)


def _row(proxy):
    return _status(proxy)["blocks"][0]


def test_the_status_says_what_a_block_means_and_what_cannot_be_looked_up(mx, names):
    names.codes["down.example."] = dns.rcode.SERVFAIL
    what = "domain yahoo.example, down.example"
    with Proxy(BLOCK.format(server=names.endpoint, what=what)) as proxy:
        row = wait_for(lambda: (found := _row(proxy))["failures"] and not found["asking"] and found)
        assert row["addresses"] == [mx.endpoint[0]]
        assert (row["name"], row["hosts"], row["failures"]) == ("narrow", 1, ["MX of down.example: SERVFAIL"])
        status = _status(proxy)
        assert [row["kind"] for row in status["trouble"] if row["kind"] == "dns"] == ["dns"]
        page = urllib.request.urlopen("http://{}:{}/".format(*proxy.door("status"))).read().decode()
        assert "MX of down.example: SERVFAIL" in page
        assert f">{mx.endpoint[0]}<" in page


def test_an_answer_that_changes_while_a_connection_is_open(mx, names):
    """A reload asks another server, so nothing waits for a TTL; what is open keeps its place, newcomers are judged."""

    def text(server):
        return BLOCK.format(server=server, what="domain yahoo.example")

    moved = {"yahoo.example.": {"MX": ["10 new.example."]}, "new.example.": {"A": ["127.0.9.9"]}}
    with DnsServer(moved) as other, Proxy(text(names.endpoint)) as proxy:
        wait_for(lambda: _row(proxy)["addresses"] == [mx.endpoint[0]])
        with socks5(proxy.socks5, mx.endpoint) as first:
            assert greeted(first)
            with pytest.raises(Refused):
                socks5(proxy.socks5, mx.endpoint)
            proxy.hup(text(other.endpoint))
            wait_for(lambda: _row(proxy)["addresses"] == ["127.0.9.9"])
            with socks5(proxy.socks5, mx.endpoint) as second:
                assert greeted(second)
            first.sendall(b"NOOP\r\n")
            assert first.recv(1000)
            used = [row["used"] for row in _status(proxy)["throttles"] if row["name"] == "narrow"]
            assert used == [1]
