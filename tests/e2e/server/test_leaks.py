"""Thousands of connections: how much memory each takes, and that nothing of them stays behind."""

import itertools
import socket

import pytest

from tests.clients import WITH_PASSWORD, bind_request, connect_request, exactly, login, v1, v2
from tests.load import Load, Receiver, Session, descriptors
from tests.peers import missing
from tests.program import Proxy
from tests.sinks import closed_port

KIND_COUNT = 12
#: The same for 20,000 and for 100,000 sessions: caches fill up, and then it is enough.
MAX_GROWTH = 2 * 1024 * 1024
SOCKS_REPLIES = 2 + 2 + 10 + 10 + 8
GREETING_SIZE = 8


def kinds(proxy, destination, closed):
    """Sessions of every kind, good and bad ones, without end, from fifty sources."""
    socks, pp, native = proxy.socks5, proxy.proxy_protocol, proxy.native
    for number in itertools.count():
        source = f"127.0.4.{number % 50 + 1}"
        hello = WITH_PASSWORD + login(f"mta-{number % 20}") + bind_request(source)
        yield Session(socks, hello + connect_request(destination), SOCKS_REPLIES, "close")
        yield Session(pp, v1(source, destination), GREETING_SIZE, "close")
        yield Session(pp, v2(source, destination), GREETING_SIZE, "close")
        yield Session(pp, v2(source, destination), GREETING_SIZE, "reset")
        yield Session(socks, hello + connect_request(destination), SOCKS_REPLIES, "reset")
        yield Session(pp, v1(source, destination) + b"EHLO me\r\n", GREETING_SIZE + 9, "close")
        yield Session(socks, hello + connect_request(closed), 0, "read")  # refused by the receiver
        yield Session(pp, v1("192.0.2.8", destination), 0, "read")  # refused by us
        yield Session(pp, v2(source, destination), 0, "reset")  # gone while we connect
        yield Session(socks, WITH_PASSWORD, 2, "reset")  # gone in the middle
        yield Session(pp, b"GET / HTTP/1.0\r\n\r\n", 0, "read")
        yield Session(native, b"", 0, "close")


def sessions_leave_nothing(count):
    with closed_port() as closed, Receiver() as receiver, Proxy("drain_timeout 10s\n") as proxy:
        endless = kinds(proxy, receiver.endpoint, closed)

        def run(number):
            Load(itertools.islice(endless, number), at_once=100).run()
            proxy.wait_idle(30)
            return proxy.fds(), proxy.rss()

        run(2_400)  # what is made once: pools, memory that the allocator keeps, verdicts remembered
        fds, rss = run(2_400)
        before = proxy.cpu()
        fds_after, rss_after = run(count)
        cost = (proxy.cpu() - before) / count
    figures = f"{cost * 1e6:.0f} us of CPU each, RSS {(rss_after - rss) / 1024:+.0f} KB, {fds} descriptors"
    print(f"\n{count} sessions: {figures}")
    assert fds_after == fds
    assert rss_after - rss < MAX_GROWTH
    good = len(proxy.matching("^connection "))
    assert good >= (count + 4_800) // KIND_COUNT * 6


def test_nothing_is_left_of_twenty_thousand_sessions():
    sessions_leave_nothing(20_000)


@pytest.mark.slow
def test_nothing_is_left_of_a_hundred_thousand_sessions():
    sessions_leave_nothing(100_000)


def relays_at_once(count):
    """Hold so many relays at once, use each, and let them go. Returns bytes of memory a relay."""
    if not descriptors(2 * count + 1000):
        missing(f"{count} relays need a limit of {2 * count + 1000} descriptors")
    text = f"max_connections {count + 10}\nauth_timeout 60s\n"
    with Receiver() as receiver, Proxy(text) as proxy:
        pp, destination = proxy.proxy_protocol, receiver.endpoint

        def sessions(number):
            return (Session(pp, v2(f"127.0.4.{n % 50 + 1}", destination), GREETING_SIZE, "stay") for n in range(number))

        warm = Load(sessions(200), at_once=100)
        warm.run()
        for sock in warm.stayed:
            sock.close()
        proxy.wait_idle(30)
        fds, rss = proxy.fds(), proxy.rss()
        load = Load(sessions(count), at_once=100)
        load.run()
        assert proxy.status()[-1] == f"direct_remote_smtp: connections={count}(active={count} cached=0)"
        assert proxy.fds() == fds + 2 * count
        each = (proxy.rss() - rss) / count
        for sock in load.stayed:
            sock.setblocking(True)
            sock.settimeout(30)
            sock.sendall(b"?")
        assert all(exactly(sock, 1) == b"?" for sock in load.stayed)
        for sock in load.stayed[::2]:
            sock.shutdown(socket.SHUT_WR)
            assert exactly(sock, 1) == b""
        for sock in load.stayed:
            sock.close()
        proxy.wait_idle(30)
        assert proxy.fds() == fds
    print(f"\n{count} relays at once: {each / 1024:.2f} KB each")
    return each


def test_a_thousand_relays_at_once():
    assert relays_at_once(1_000) < 4096


def test_five_thousand_relays_at_once():
    assert relays_at_once(5_000) < 4096
