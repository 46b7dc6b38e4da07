"""`front.serve` in this process: what a connection leaves behind whatever happens to it, and that it harms no other."""

import contextlib
import errno
import gc
import socket
from unittest import mock

import gevent
import gevent.server
import pytest

from proxy.config import load
from proxy.doors import front, route
from proxy.egress import upstream
from proxy.errors import Overloaded, ProxyError
from proxy.log import lines as log
from proxy.model import Endpoint, hold_breath
from proxy.net import conversation
from proxy.net.newcomers import Newcomers
from proxy.net.peer import has_gone
from proxy.server.server import Server
from proxy.services import Door
from tests import clients, program
from tests.loopback.egress.test_upstream import deaf
from tests.loopback.net.relays import close_peers, open_descriptors, read_all, reset, tcp_pair, until

SOURCE = "127.0.0.5"


class House:
    """All that `front` needs, wired by the product itself, without listeners and signals."""

    def __init__(self, more: str = "") -> None:
        text = program.config(more)
        loaded = load.load(["--config-filename=f"], {}, lambda path: text)
        self.server = Server(lambda *_: loaded, loaded)
        self.services = self.server._wiring.prepare(loaded, (), hold_breath).services
        self.doors = {name: Door(name, Endpoint("127.0.1.2", 1)) for name in ("socks5", "proxy_protocol")}

    def dial(self, protocol: str, refusal: ProxyError | None = None):
        """A client whose connection is being served."""
        client, ours = tcp_pair()
        self.services.crew.run(front.serve, self.services, self.doors[protocol], ours, ("127.0.0.1", 9), refusal)
        gevent.sleep(0)  # it begins in the next turn; until then the house would look empty
        return client

    def is_empty(self) -> bool:
        services = self.services
        open_connections = sum(door.open_connections for door in self.doors.values())
        return not (
            services.crew.busy
            or services.gauges.outgoing
            or services.engine.pairs
            or len(services.newcomers)
            or open_connections
        )

    def wait_empty(self) -> None:
        until(self.is_empty, what="nothing is left of any connection")

    def close(self) -> None:
        self.server.close()
        self.services.engine.stop()


@pytest.fixture
def house():
    with opened() as house:
        yield house


@contextlib.contextmanager
def opened(more: str = ""):
    with mock.patch.object(log, "note"):
        house = House(more)
        try:
            yield house
            house.wait_empty()
            assert house.services.engine.faults == 0
        finally:
            house.close()
            close_peers()


@pytest.fixture
def mx():
    """A cooperative server that greets and echoes; its endpoint."""
    server = gevent.server.StreamServer(("127.0.0.2", 0), _greet_and_echo)
    server.start()
    yield server.address
    server.stop()


def _greet_and_echo(sock, address):
    sock.sendall(b"220 mx\r\n")
    with contextlib.suppress(OSError):
        while data := sock.recv(4096):
            sock.sendall(data)


REQUESTS = {
    "socks5": lambda mx: clients.WITH_PASSWORD + clients.login() + clients.connect_request(mx),
    "proxy_protocol": lambda mx: clients.v2(SOURCE, mx),
}


def talk(client, protocol, mx):
    """One whole session."""
    client.sendall(REQUESTS[protocol](mx))
    size = 2 + 2 + 10 + 8 if protocol == "socks5" else 8
    answer = clients.exactly(client, size)
    assert answer.startswith(b"\x05\x02\x01\x00\x05\x00\x00\x01" if protocol == "socks5" else b"220 mx\r\n")
    assert answer.endswith(b"220 mx\r\n")
    client.close()


@pytest.mark.parametrize("protocol", REQUESTS)
def test_a_session_is_counted_and_leaves_nothing(house, mx, protocol):
    talk(house.dial(protocol), protocol, mx)
    house.wait_empty()
    counters = house.services.counters
    assert dict(counters.accepted) == {protocol: 1}
    assert sum(counters.ended.values()) == counters.fresh == 1
    assert (dict(counters.refused), dict(counters.failed), counters.internal_errors) == ({}, {}, 0)


def serve_what_was_said(house, protocol, words):
    """A client whose words are there before anybody looks."""
    client, ours = tcp_pair()
    client.sendall(words)
    until(lambda: ours.recv(len(words), socket.MSG_PEEK) == words, what="they are there")
    house.services.crew.run(front.serve, house.services, house.doors[protocol], ours, ("127.0.0.1", 9))
    return client


@pytest.mark.parametrize("protocol", REQUESTS)
def test_a_request_that_is_there_already(house, mx, protocol):
    """With what the client says next behind it, in one piece or cut anywhere."""
    request = REQUESTS[protocol](mx)
    whole = serve_what_was_said(house, protocol, request + b"EHLO early\r\n")
    said = clients.exactly(whole, (22 if protocol == "socks5" else 8) + 12)
    assert said.endswith(b"220 mx\r\nEHLO early\r\n")
    whole.close()
    for cut in (1, len(request) // 2, len(request) - 1):
        client = serve_what_was_said(house, protocol, request[:cut])
        until(lambda: house.services.newcomers, what="the rest is waited for")
        talk_on(client, protocol, request[cut:])
    house.wait_empty()
    assert dict(house.services.counters.refused) == {}


def talk_on(client, protocol, rest):
    client.sendall(rest)
    assert clients.exactly(client, 22 if protocol == "socks5" else 8).endswith(b"220 mx\r\n")
    client.close()


def test_the_wrong_protocol_that_is_there_already_is_named(house):
    client = serve_what_was_said(house, "proxy_protocol", clients.WITH_PASSWORD)
    assert b"; it looks like " in read_all(client)
    client.close()


def test_gone_before_it_was_looked_at(house):
    client, ours = tcp_pair()
    client.close()
    until(lambda: has_gone(ours), what="the end is there")
    house.services.crew.run(front.serve, house.services, house.doors["proxy_protocol"], ours, ("127.0.0.1", 9))
    until(lambda: house.services.counters.probes == 1, what="a probe")
    house.wait_empty()


@pytest.mark.parametrize("protocol", REQUESTS)
def test_a_mistake_of_ours_costs_one_connection(house, mx, protocol):
    other = house.dial(protocol)
    gc.collect()
    before = open_descriptors()
    with mock.patch.object(upstream, "outgoing", side_effect=ZeroDivisionError("a bug")):
        client = house.dial(protocol)
        client.sendall(REQUESTS[protocol](mx))
        with contextlib.suppress(ConnectionResetError):
            read_all(client)
        until(lambda: house.services.counters.internal_errors == 1, what="it is counted")
        client.close()
    until(lambda: house.services.crew.busy == 1, what="only the other one is served")
    assert open_descriptors() <= before
    talk(other, protocol, mx)


#: Ways to leave; with its request, or when the connect has begun.
LEAVES = {
    "reset": reset,
    "close": lambda client: client.close(),
    "half-close": lambda client: client.shutdown(socket.SHUT_WR),
}


@pytest.mark.parametrize("protocol", REQUESTS)
@pytest.mark.parametrize("how", LEAVES)
@pytest.mark.parametrize("when", ["with its request", "while we connect"])
def test_a_client_that_goes_while_we_connect_gives_everything_back(protocol, how, when):
    """Long before `connect_timeout`: its place under the throttles, the sockets, the greenlet."""
    block = "throttle one {\n  destination 127.0.0.0/8\n  max_concurrent_connections 1\n}\n"
    with opened(f"connect_timeout 600s\n{block}") as house, deaf() as destination:
        client = house.dial(protocol)
        client.sendall(REQUESTS[protocol](destination))
        if when == "while we connect":
            until(lambda: house.services.gauges.outgoing == 1, what="it connects")
        LEAVES[how](client)
        until(lambda: sum(house.services.counters.refused.values()) == 1, what="it is known to be gone")
        house.wait_empty()
        assert not any(throttle.used for throttle in house.services.admission.manager.blocks.throttles())


@pytest.mark.parametrize("protocol", REQUESTS)
def test_a_client_that_has_said_all_and_closed_its_side_is_served(house, mx, protocol):
    """Half-closed is not gone, as far as there is a receiver to answer, or more to be said to it."""
    client = house.dial(protocol)
    client.sendall(REQUESTS[protocol](mx))
    client.shutdown(socket.SHUT_WR)
    assert read_all(client).endswith(b"220 mx\r\n")


def test_a_client_that_has_said_more_may_wait_for_its_receiver_half_closed(monkeypatch):
    monkeypatch.setattr(route, "HALF_CLOSED", 0.02)
    for behind in (b"", b"EHLO blind\r\n"):
        with opened("connect_timeout 300ms\n") as house, deaf() as destination:
            client = house.dial("proxy_protocol")
            client.sendall(clients.v2(SOURCE, destination) + behind)
            until(lambda house=house: house.services.gauges.outgoing == 1, what="it connects")
            client.shutdown(socket.SHUT_WR)
            read_all(client)
            house.wait_empty()
            counters = house.services.counters
            assert (sum(counters.refused.values()), sum(counters.failed.values())) == ((0, 1) if behind else (1, 0))


@pytest.mark.only_python("a slow connect put in the place of the real one")
@pytest.mark.parametrize("protocol", REQUESTS)
def test_what_a_client_says_while_we_connect_is_not_lost(house, mx, protocol):
    """The edge comes while nobody looks at that socket."""
    real = upstream.connect

    def slow(*arguments):
        client.sendall(b"HELLO\r\n")
        gevent.sleep(0.02)  # lets the loop see the edge
        return real(*arguments)

    client = house.dial(protocol)
    gevent.sleep(0)  # it waits for its first byte, so that it is registered
    with mock.patch.object(upstream, "connect", slow):
        client.sendall(REQUESTS[protocol](mx))
        said = b""
        while not said.endswith(b"HELLO\r\n"):
            more = client.recv(100)
            assert more
            said += more
    client.close()


def test_a_greenlet_is_not_disturbed_in_its_next_life():
    """Its last waiter was a connect that timed out; the next connection's handshake is waited for in peace."""
    with opened("connect_timeout 50ms\nauth_timeout 60s\n") as house, deaf() as destination:
        for _ in range(3):
            first = house.dial("socks5")
            first.sendall(REQUESTS["socks5"](destination))
            assert read_all(first)[:6] == b"\x05\x02\x01\x00\x05\x06"
            first.close()
            until(lambda: house.services.crew.busy == 0, what="the greenlet is free")
            second = house.dial("socks5")
            for byte in clients.WITH_PASSWORD:
                second.sendall(bytes((byte,)))
                gevent.sleep(0.001)
            assert clients.exactly(second, 2) == b"\x05\x02"
            second.close()
            house.wait_empty()


def test_auth_timeout_is_one_deadline():
    """A byte now and then does not prolong it."""
    with opened("auth_timeout 150ms\n") as house:
        client = house.dial("proxy_protocol")
        with contextlib.suppress(OSError):
            for byte in b"PROXY TCP4 127.0.0.5 127.0.0.2 " + b"1" * 60:
                client.sendall(bytes((byte,)))
                gevent.sleep(0.01)
        assert read_all(client).startswith(b"421 4.4.2 ")
        assert house.services.counters.refused["handshake_timeout"] == 1
        client.close()


@pytest.mark.parametrize("protocol", REQUESTS)
def test_a_refusal_is_said_and_nothing_is_connected(house, mx, protocol):
    client = house.dial(protocol, Overloaded("full"))
    with mock.patch.object(upstream, "outgoing") as way_out:
        client.sendall(REQUESTS[protocol](mx))
        said = read_all(client)
    assert said[4:6] == b"\x05\x02" if protocol == "socks5" else said.startswith(b"421 4.3.2 ")
    assert not way_out.called
    client.close()


def test_a_client_that_never_stops_talking_after_its_refusal(house):
    """The last word's wait is bounded by bytes and by time."""
    client = house.dial("proxy_protocol")
    client.settimeout(30)
    with contextlib.suppress(OSError):
        client.sendall(b"nonsense" * 100_000)
    house.wait_empty()
    client.close()


def test_a_client_that_never_closes_after_its_refusal():
    with mock.patch.object(conversation, "FAREWELL_SECONDS", 0.1), opened() as house:
        client = house.dial("proxy_protocol")
        client.sendall(b"nonsense")
        assert read_all(client).startswith(b"421 4.5.0 ")
        house.wait_empty()
        client.close()


@pytest.mark.only_python("a method of the keeper put in the place of its own")
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS])
@pytest.mark.parametrize("protocol", REQUESTS)
def test_no_socket_for_the_way_out(house, mx, number, protocol):
    """At the bind, or at the look for the system's choice: told as an overload, and what is cached is given up."""
    client = house.dial(protocol)
    none = mock.Mock(side_effect=OSError(number, "mocked"))
    with (
        mock.patch.multiple(upstream, RawSocket=none, outgoing=none),
        mock.patch.object(house.services.keeper, "shed") as shed,
    ):
        client.sendall(REQUESTS[protocol](mx))
        said = read_all(client)
    assert said[4:6] == b"\x05\x02" if protocol == "socks5" else said.startswith(b"421 4.3.2 ")
    assert shed.called
    assert house.services.counters.refused["overloaded"] == 1
    client.close()


# -- newcomers


class FakeSocket:
    def __init__(self):
        self.cut = False

    def shutdown(self, how):
        self.cut = True


HERE, THERE = "192.0.2.1", "192.0.2.2"


def test_newcomers_beyond_the_limit_push_out_those_of_the_address_that_has_most():
    newcomers = Newcomers(3)
    socks = [FakeSocket() for _ in range(6)]
    newcomers.enter(0, socks[0], THERE)
    for number, sock in enumerate(socks[1:5], 1):
        newcomers.enter(number, sock, HERE)
    assert [sock.cut for sock in socks] == [False, True, True, False, False, False]
    newcomers.leave(3)
    newcomers.leave(1)  # it was cut off already
    newcomers.enter(5, socks[5], THERE)
    assert [sock.cut for sock in socks] == [False, True, True, False, False, False]
    assert (len(newcomers), newcomers.dropped) == (3, 2)
    assert [number in newcomers for number in range(6)] == [True, False, False, False, True, True]


def test_way_is_made_only_at_the_cost_of_an_address_that_has_many():
    newcomers = Newcomers(100)
    socks = [FakeSocket() for _ in range(17)]
    for number, sock in enumerate(socks[:16]):
        newcomers.enter(number, sock, HERE)
    assert not newcomers.make_way(THERE), "these are few"
    newcomers.enter(16, socks[16], HERE)
    assert not newcomers.make_way(HERE), "its own"
    assert newcomers.make_way(THERE)
    assert [number for number, sock in enumerate(socks) if sock.cut] == [0]
    assert not newcomers.make_way(THERE)


def test_a_newcomer_that_is_gone_already():
    newcomers = Newcomers(1)
    gone = socket.socket()
    gone.close()
    newcomers.enter(1, gone, HERE)
    newcomers.enter(2, FakeSocket(), HERE)
    assert newcomers.dropped == 1
