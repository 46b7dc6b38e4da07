"""The listening socket: errors name a remedy, accepting survives every error, accepted sockets have their options."""

import contextlib
import errno
import gc
import socket
from unittest import mock

import gevent
import pytest

from proxy.model import Endpoint
from proxy.server.listener import Listener, ListenError, endpoint_of, open_socket, open_sockets
from proxy.services import Door
from tests.loopback.net.relays import open_descriptors, until

ANY = Endpoint("127.0.0.1", 0)


class Opened:
    """A running listener that remembers what it accepted and what failed."""

    def __init__(self, endpoint=ANY):
        sock = open_socket(endpoint)
        self.endpoint = endpoint_of(sock)
        self.accepted = []
        self.errors = []
        self.memory = True
        self.listener = Listener(sock, Door("socks5", self.endpoint), self._admit, self._failed)
        self.listener.set_options(60.0)
        self.listener.start_accepting()

    def _admit(self, listener, sock, address):
        assert listener is self.listener
        self.accepted.append((sock, address))
        return self.memory

    def _failed(self, listener, error):
        assert listener is self.listener
        self.errors.append(error.errno)

    def close(self):
        self.listener.close()
        for sock, _ in self.accepted:
            sock.close()


@pytest.fixture
def opened():
    opened = Opened()
    yield opened
    opened.close()


def dial(opened):
    return socket.create_connection(opened.endpoint, 30)


def test_accepted_sockets_are_raw_non_blocking_and_inherit_their_options(opened):
    with dial(opened) as client:
        until(lambda: opened.accepted, what="accepted")
        sock, address = opened.accepted[0]
        assert address == client.getsockname()
        with pytest.raises(BlockingIOError):
            sock.recv(1)
        options = [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 60_000),
        ]
        assert [sock.getsockopt(level, name) for level, name, _ in options] == [value for _, _, value in options]


def test_a_burst_is_accepted_completely(opened):
    clients = [dial(opened) for _ in range(300)]
    until(lambda: len(opened.accepted) == 300, what="300 accepted")
    for client in clients:
        client.close()


class Counting:
    """In the place of `sockets.accept`: counts how often it was asked, and how often in vain."""

    def __init__(self, real):
        self._real = real
        self.asked = self.in_vain = 0

    def __call__(self, sock):
        self.asked += 1
        try:
            return self._real(sock)
        except BlockingIOError:
            self.in_vain += 1
            raise


def test_who_comes_alone_costs_one_accept_and_a_burst_few_in_vain(opened):
    counting = opened.listener.take = Counting(opened.listener.take)
    clients = []
    for count in range(1, 9):
        clients.append(dial(opened))
        until(lambda count=count: len(opened.accepted) == count, what="accepted")
    assert (counting.asked, counting.in_vain) == (8, 0)
    opened.listener.stop_accepting()
    clients += [dial(opened) for _ in range(300)]
    turn = gevent.get_hub().loop.iteration
    opened.listener.start_accepting()
    until(lambda: len(opened.accepted) == 308, what="300 accepted")
    assert gevent.get_hub().loop.iteration - turn < 40, "it takes more and more in a turn"
    assert counting.in_vain <= 1
    for client in clients:
        client.close()


def test_ipv6_listeners_do_not_serve_ipv4():
    six = Opened(Endpoint("::", 0))
    try:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", six.endpoint.port), 30)
        with socket.create_connection(("::1", six.endpoint.port), 30):
            until(lambda: six.accepted, what="accepted")
    finally:
        six.close()


# -- what cannot be listened on


def test_a_taken_address(opened):
    with pytest.raises(ListenError, match=f"cannot listen on {opened.endpoint}: Address already in use; 'ss -ltnp"):
        open_socket(opened.endpoint)


@pytest.mark.parametrize("host", ["198.51.100.1", "2001:db8::1"])
def test_an_address_that_comes_later(host):
    """At boot, or where it moves between machines: a start that fails for it would fail for good."""
    sock = open_socket(Endpoint(host, 0))
    assert sock.getsockname()[0] == host
    sock.close()


def test_errors_leave_no_descriptor_behind(opened):
    gc.collect()
    before = open_descriptors()
    for endpoint in (opened.endpoint, opened.endpoint._replace(host="0.0.0.0")):
        with pytest.raises(ListenError):
            open_socket(endpoint)
    assert open_descriptors() == before


# -- accept errors


class Failing:
    """In the place of `sockets.accept`: raises these errors first."""

    def __init__(self, real, errors):
        self._real = real
        self.errors = list(errors)

    def __call__(self, sock):
        if self.errors:
            raise OSError(self.errors.pop(0), "mocked")
        return self._real(sock)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENETDOWN, errno.EIO])
def test_it_backs_off_and_goes_on(opened, number, capfd):
    opened.listener.take = Failing(opened.listener.take, [number] * 3)
    with dial(opened):
        until(lambda: opened.accepted, what="accepted in the end")
    assert opened.errors == [number] * 3
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM])
def test_an_error_of_one_connection_costs_nobody_a_moment(opened, number):
    opened.listener.take = Failing(opened.listener.take, [number] * 3)
    with dial(opened):
        until(lambda: opened.accepted, what="accepted")
    assert opened.errors == []


def test_each_pause_is_longer_until_an_accept_succeeds(opened):
    """Constant short pauses would write a hundred error lines a second."""
    pauses = []
    loop = opened.listener.loop

    def timer(after, *more):
        pauses.append(round(after, 3))
        return loop.timer(0.0, *more)

    opened.listener.take = Failing(opened.listener.take, [errno.EMFILE] * 9)
    opened.listener.loop = mock.Mock(wraps=loop, timer=timer, iteration=0)
    try:
        with dial(opened):
            until(lambda: opened.accepted, what="accepted")
        assert pauses == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1]
        opened.listener.take.errors.append(errno.EMFILE)
        with dial(opened):
            until(lambda: len(opened.accepted) == 2, what="accepted")
        assert pauses[9:] == [0.01]
    finally:
        opened.listener.loop = loop


def test_closed_while_it_backs_off(opened):
    """The timer must not open it again."""
    opened.listener.take = Failing(opened.listener.take, [errno.EMFILE] * 1000)
    with dial(opened):
        until(lambda: opened.errors, what="an error")
        opened.listener.close()
        count = len(opened.errors)
        gevent.sleep(0.05)
        assert len(opened.errors) == count
    assert opened.accepted == []


def test_without_memory_to_serve_it_backs_off(opened):
    """What was accepted is kept by whoever took it; the others wait in the kernel's queue."""
    opened.memory = False
    with dial(opened), dial(opened):
        until(lambda: opened.errors, what="it backs off")
        opened.memory = True
        until(lambda: len(opened.accepted) == 2, what="both accepted")
    assert set(opened.errors) == {errno.ENOMEM}


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR])
def test_an_error_of_one_connection_that_never_ends_is_the_listeners(opened, number):
    """So many tries a turn, then it backs off as after any other error."""
    opened.listener.take = Failing(opened.listener.take, [number] * 1000)
    assert opened.listener.accept() is None
    assert opened.errors == [number]
    assert len(opened.listener.take.errors) == 1000 - 64


def test_who_comes_before_anybody_accepts_is_like_everybody():
    """Workers begin to accept a while after the master has opened their sockets."""
    sockets = open_sockets(ANY, 2)
    clients = [socket.create_connection(sockets[0].getsockname()) for _ in range(8)]
    accepted = []
    for sock in sockets:
        with contextlib.suppress(BlockingIOError):
            while True:
                accepted.append(sock.accept()[0])
    assert len(accepted) == 8
    for sock in accepted:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    for sock in (*clients, *accepted, *sockets):
        sock.close()
