"""`throttle NAME { … }`: the proxy's own limits, for clients that know nothing of throttles."""

from __future__ import annotations

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.clients import DOORS, Refused, connect_request, dial, exactly, login, read_all, reset, socks5, v1
from tests.mx import Mx, usual
from tests.program import Proxy
from tests.waiting import wait_for
from tests.witness import Witness

SOURCE = "127.0.0.5"


def block(connections=0, rate="", wait="10s", more=""):
    lines = [f"    max_concurrent_connections {connections}"] if connections else []
    lines += [f"    max_delivery_rate {rate}"] if rate else []
    return "\n".join(["throttle narrow {", *lines, f"    wait {wait}", more, "}", ""])


@pytest.fixture
def mx():
    with Mx() as it:
        yield it


def greeted(sock):
    """The receiver has spoken: the connection is through."""
    return exactly(sock, 3) == b"220"


def asks(proxy, mx, user):
    """A SOCKS5 client whose request is on its way, in the given order; it reads no answer yet."""
    sock = dial(proxy.socks5)
    sock.sendall(b"\x05\x01\x02" + login(user) + connect_request(mx.endpoint))
    assert exactly(sock, 4) == b"\x05\x02\x01\x00"
    return sock


def waits(proxy, count):
    """Until so many clients of the SOCKS5 door are connected; those beyond the places wait."""
    wait_for(lambda: proxy.open_connections("socks5") == count)


@pytest.mark.parametrize("door", DOORS)
def test_who_waited_in_vain_is_told_why_and_when_to_come_back(mx, door):
    with Proxy(block(1, wait="100ms")) as proxy:
        held = DOORS[door](proxy, mx.endpoint, SOURCE)
        assert greeted(held)
        if door == "socks5":
            with pytest.raises(Refused):
                DOORS[door](proxy, mx.endpoint, SOURCE)
        else:
            with DOORS[door](proxy, mx.endpoint, SOURCE) as second:
                assert re.match(rb"421 .*throttle narrow for .*; try again in 10 s", said := second.recv(1000)), said
        line = proxy.wait_line(r"reason=throttled").string
        assert re.search(
            r"throttle narrow for 127\.0\.0\.\d+: 1 of 1 connections are in use; try again in 10 s", line
        ), line
        held.close()
        wait_for(lambda: mx.running == 0)
        with DOORS[door](proxy, mx.endpoint, SOURCE) as third:
            assert greeted(third)
        assert mx.connects == 2


def test_without_a_wait_an_instance_waits_while_there_is_time_for_its_answer(mx):
    """By SOCKS that would be 40 s, and this test would end before."""
    text = "throttle narrow {\n    max_concurrent_connections 1\n}\ninstance hasty {\n    answer_within 100ms\n}\n"
    with Proxy(text) as proxy, socks5(proxy.socks5, mx.endpoint) as held:
        assert greeted(held)
        with asks(proxy, mx, "hasty") as hasty:
            assert exactly(hasty, 2)[1] != 0
        proxy.wait_line(r"instance=hasty .*reason=throttled|reason=throttled.*instance=hasty")


def test_wait_0s_means_no_waiting(mx):
    with Proxy(block(1, wait="0s")) as proxy, socks5(proxy.socks5, mx.endpoint) as held:
        assert greeted(held)
        with pytest.raises(Refused):
            socks5(proxy.socks5, mx.endpoint)


def test_a_rate_counts_connections_and_the_refusal_says_when(mx):
    with Proxy(block(rate="2/min", wait="100ms")) as proxy:
        with pytest.raises(Refused):  # what a predecessor let through is not known
            socks5(proxy.socks5, mx.endpoint)
        seconds = float(proxy.wait_line(r"next connection in ([\d.]+) s")[1])
        assert 20 < seconds <= 30.3
        proxy.hup(block(rate="20/s", wait="10s"))
        for _ in range(5):
            with socks5(proxy.socks5, mx.endpoint) as sock:
                assert greeted(sock)


def test_the_line_is_fair_among_instances(mx):
    """a asked three times before b did; b is served second all the same, since a has had a turn by then."""
    with Proxy(block(1)) as proxy, socks5(proxy.socks5, mx.endpoint, user="c") as held:
        assert greeted(held)
        socks = {}
        for number, user in enumerate(("a", "a", "a", "b")):
            socks[number] = asks(proxy, mx, user), user
            waits(proxy, number + 2)
        held.close()
        order = []
        while socks:
            ready = wait_for(lambda: [number for number, (sock, _) in socks.items() if _readable(sock)])
            assert len(ready) == 1, "one place"
            sock, user = socks.pop(ready[0])
            order.append(user)
            sock.close()
        assert order == ["a", "b", "a", "a"]


def _readable(sock):
    sock.setblocking(False)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        sock.setblocking(True)


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["fin", "rst"])
@pytest.mark.parametrize("slow", [False, True], ids=["at-once", "byte-by-byte"])
def test_who_goes_away_gives_up_its_turn(mx, leave, slow):
    with Proxy(block(1)) as proxy, socks5(proxy.socks5, mx.endpoint, user="c") as held:
        assert greeted(held)
        if slow:  # its socket has been waited for, so edges of it have gone by
            leaver = dial(proxy.socks5)
            for byte in b"\x05\x01\x02" + login("a") + connect_request(mx.endpoint):
                leaver.sendall(bytes((byte,)))
            exactly(leaver, 4)
        else:
            leaver = asks(proxy, mx, "a")
        waits(proxy, 2)
        patient = asks(proxy, mx, "b")
        waits(proxy, 3)
        leave(leaver)
        waits(proxy, 2)
        held.close()
        assert exactly(patient, 10)[:2] == b"\x05\x00"
        assert greeted(patient)  # before that the MX may not have counted it yet
        patient.close()
        proxy.wait_idle()
        assert mx.connects == 2


@pytest.mark.parametrize("door", ["socks5", "proxy_v1"])
def test_who_goes_away_with_its_request_gives_up_its_turn_too(mx, door):
    """The FIN is there before it begins to wait; nobody connects for the dead."""
    with Proxy(block(1)) as proxy, socks5(proxy.socks5, mx.endpoint, user="c") as held:
        assert greeted(held)
        address = proxy.socks5 if door == "socks5" else proxy.proxy_protocol
        said = b"\x05\x01\x02" + login("a") + connect_request(mx.endpoint)
        with dial(address) as leaver:
            leaver.sendall(said if door == "socks5" else v1("127.0.0.1", mx.endpoint))
            leaver.shutdown(socket.SHUT_WR)
            assert read_all(leaver) == (b"\x05\x02\x01\x00" if door == "socks5" else b""), (
                "not told, as nobody is there"
            )
        assert proxy.open_connections() == 1
        held.close()
        proxy.wait_idle()
        assert mx.connects == 1


@pytest.mark.parametrize("door", ["socks5", "proxy_v1"])
def test_who_need_not_wait_may_end_with_its_request(mx, door):
    """A FIN is no reason to be refused: it is passed on."""
    with Proxy(block(1)) as proxy:
        address = proxy.socks5 if door == "socks5" else proxy.proxy_protocol
        said = b"\x05\x01\x02" + login("a") + connect_request(mx.endpoint)
        with dial(address) as client:
            client.sendall((said if door == "socks5" else v1(SOURCE, mx.endpoint)) + b"QUIT\r\n")
            client.shutdown(socket.SHUT_WR)
            assert b"\r\n221" in read_all(client)
        proxy.wait_idle()


def test_a_reload_lets_in_who_waits_and_changes_nothing_for_who_is_in(mx):
    with Proxy(block(1)) as proxy, socks5(proxy.socks5, mx.endpoint) as held:
        assert greeted(held)
        waiting = asks(proxy, mx, "a")
        waits(proxy, 2)
        proxy.hup(block(2))
        assert exactly(waiting, 2) == b"\x05\x00"
        third = asks(proxy, mx, "b")
        waits(proxy, 3)
        proxy.hup(block(1))
        held.close()
        wait_for(lambda: proxy.open_connections("socks5") == 2)
        assert not _readable(third), "one is in, and one may be"
        waiting.close()
        assert exactly(third, 2) == b"\x05\x00"
        third.close()


def test_each_source_counts_by_itself_and_others_are_free(mx):
    only = block(1, wait="100ms", more="    source 127.0.0.5, 127.0.0.6")
    with Proxy(only) as proxy:
        held = [socks5(proxy.socks5, mx.endpoint, source) for source in ("127.0.0.5", "127.0.0.6")]
        free = [socks5(proxy.socks5, mx.endpoint, "127.0.0.7") for _ in range(3)]
        assert all(map(greeted, held + free))
        for source in ("127.0.0.5", "127.0.0.6"):
            with pytest.raises(Refused):
                socks5(proxy.socks5, mx.endpoint, source)
        for sock in held + free:
            sock.close()


def linger(session, reply):
    """A receiver whose end is 20 ms behind its answer to QUIT; until then it counts the connection."""
    usual(session, reply)
    time.sleep(0.02)


def test_many_over_few_places_all_come_through():
    """100 clients of both doors, 5 places, never more than 5 connections by the count of a receiver that is slow."""
    witness = Witness(quit=linger)
    with Mx(witness.script) as mx, Proxy(block(5, wait="60s")) as proxy:

        def visit(number):
            door = DOORS["proxy_v1" if number % 2 else "socks5"]
            with door(proxy, mx.endpoint, SOURCE) as sock:
                sock.sendall(b"QUIT\r\n")
                said = b""
                while not re.search(rb"^221 ", said, re.MULTILINE):
                    said += sock.recv(1000)

        with ThreadPoolExecutor(100) as pool:
            assert list(pool.map(visit, range(100))) == [None] * 100
        proxy.wait_idle()
    assert (mx.connects, witness.most) == (100, 5)
