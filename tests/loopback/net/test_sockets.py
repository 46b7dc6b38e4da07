"""Sockets of a set-up, in Python and in C: the same of both."""

from __future__ import annotations

import errno
import gc
import os
import socket
import warnings
from typing import Any

import pytest

from proxy.model import Endpoint
from proxy.net import sockets
from proxy.net.relay import RawSocket
from tests.loopback.net.relays import until

try:
    from proxy.net import _fastsockets
except ImportError:
    FORMS = [(sockets.python_accept, sockets.python_outgoing)]
else:
    FORMS = [(sockets.python_accept, sockets.python_outgoing), (_fastsockets.accept, _fastsockets.outgoing)]

Form = tuple[sockets.Accept, sockets.Outgoing]
HOSTS = ["127.0.0.1", "::1"]


@pytest.fixture(params=FORMS, ids=["python", "compiled"][: len(FORMS)])
def form(request: pytest.FixtureRequest) -> Form:
    chosen: Form = request.param
    return chosen


@pytest.fixture
def accept(form: Form) -> sockets.Accept:
    return form[0]


@pytest.fixture
def outgoing(form: Form) -> sockets.Outgoing:
    return form[1]


def listening(host: str) -> socket.socket:
    listener = socket.socket(sockets.family_of(host))
    listener.setblocking(False)
    listener.bind((host, 0))
    listener.listen()
    return listener


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def pair(form: Form, host: str = "127.0.0.1") -> tuple[RawSocket, RawSocket]:
    """Both ends of a connection: of who connects, of who lets it in."""
    accept, outgoing = form
    with listening(host) as listener:
        ours = outgoing(sockets.family_of(host))
        assert ours.connect_ex(listener.getsockname()[:2]) in (0, errno.EINPROGRESS)
        found = []

        def came() -> bool:
            try:
                found.append(accept(listener))
            except BlockingIOError:
                return False
            return True

        until(came, what="somebody has come")
        theirs, address = found[0]
        assert address == ours.getsockname()[:2]
        return ours, theirs


def test_which_form_is_used() -> None:
    assert (sockets.accept, sockets.outgoing) == FORMS[-1]


@pytest.mark.parametrize("host", HOSTS)
def test_neither_waits_nor_is_inherited(form: Form, host: str) -> None:
    both = pair(form, host)
    for sock in both:
        assert os.get_blocking(sock.fileno()) is False
        assert os.get_inheritable(sock.fileno()) is False
        with pytest.raises(BlockingIOError):
            sock.recv(10)
        assert (sock.family, sock.type, sock.proto) == (sockets.family_of(host), socket.SOCK_STREAM, 0)
    for sock in both:
        sock.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.10.200.255", "127.0.100.9", "::1"])
def test_addresses_are_those_that_the_system_tells(form: Form, host: str) -> None:
    """An address as text is made by hand in C."""
    accept, outgoing = form
    with listening("::1" if ":" in host else "127.0.0.1") as listener:
        ours = outgoing(sockets.family_of(host))
        ours.bind((host, 0))
        ours.connect_ex(listener.getsockname()[:2])
        until(lambda: ours.getpeername(), what="connected")
        theirs, (said, port) = accept(listener)
        assert said == host
        assert (said, port) == theirs.getpeername()[:2] == ours.getsockname()[:2]
        ours.close()
        theirs.close()


def test_nobody_has_come(accept: sockets.Accept) -> None:
    with listening("127.0.0.1") as listener, pytest.raises(BlockingIOError):
        accept(listener)


def test_who_is_let_in_inherits_the_listeners_options(form: Form) -> None:
    """Nothing is asked for twice."""
    accept, outgoing = form
    with listening("127.0.0.1") as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ours = outgoing(socket.AF_INET)
        ours.connect_ex(listener.getsockname())
        theirs, _ = accept(listener)
        assert theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        ours.close()
        theirs.close()


@pytest.mark.parametrize("host", HOSTS)
def test_options_of_who_connects(outgoing: sockets.Outgoing, host: str) -> None:
    sock = outgoing(sockets.family_of(host))
    for level, name in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        (socket.SOL_SOCKET, socket.SO_OOBINLINE),
        (socket.IPPROTO_IP, sockets._IP_BIND_ADDRESS_NO_PORT),
    ):
        assert sock.getsockopt(level, name) == 1
    sock.bind((host, 0))
    assert sock.getsockname()[:2] == (host, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    sock.close()


def test_bytes(form: Form) -> None:
    ours, theirs = pair(form)
    assert ours.send(b"hello") == 5
    assert theirs.recv(1, socket.MSG_PEEK) == b"h"
    assert theirs.recv(3) == b"hel"
    assert theirs.recv(100_000) == b"lo"
    with pytest.raises(BlockingIOError):
        theirs.recv(100_000)
    with pytest.raises(ValueError, match="negative"):
        theirs.recv(-1)
    much = os.urandom(40_000)
    assert ours.send(much) == len(much)
    found = b""
    while len(found) < len(much):
        found += theirs.recv(30_000)
    assert found == much
    ours.send(bytes(1000))
    assert theirs.recv(20_000) == bytes(1000)
    assert ours.send(memoryview(bytearray(b"again")), socket.MSG_MORE) == 5
    assert ours.send(b"") == 0
    ours.shutdown(socket.SHUT_WR)
    room = bytearray(8)
    assert theirs.recv_into(room) == 5
    assert bytes(room) == b"again\0\0\0"
    assert theirs.recv(10) == theirs.recv(0) == b""
    assert theirs.recv_into(room) == 0
    ours.close()
    theirs.close()


def test_a_send_takes_what_there_is_room_for(form: Form) -> None:
    ours, theirs = pair(form)
    data = bytes(1 << 22)
    assert 0 < ours.send(data) < len(data)

    def more() -> None:
        while True:
            ours.send(data)

    with pytest.raises(BlockingIOError):
        more()
    ours.close()
    theirs.close()


def test_after_a_reset(form: Form) -> None:
    """An OSError of the class that Python has for it; a SIGPIPE would end the program."""
    ours, theirs = pair(form)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    theirs.close()
    with pytest.raises(ConnectionResetError):
        ours.recv(10)
    with pytest.raises(BrokenPipeError):
        ours.send(b"hello")
    ours.close()


@pytest.mark.parametrize("number", range(9))
def test_a_closed_one_does_nothing_to_others(form: Form, number: int) -> None:
    """Its number is another's by then."""
    sock, theirs = pair(form)
    sock.close()
    sock.close()
    theirs.close()
    assert (sock.fileno(), sock.detach()) == (-1, -1)
    calls = (
        lambda: sock.recv(1),
        lambda: sock.recv_into(bytearray(1)),
        lambda: sock.send(b"x"),
        lambda: sock.shutdown(socket.SHUT_WR),
        lambda: sock.bind(("127.0.0.1", 0)),
        lambda: sock.getsockname(),
        lambda: sock.getpeername(),
        lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
        lambda: sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    )
    with pytest.raises(OSError, match="descriptor") as caught:
        calls[number]()
    assert caught.value.errno == errno.EBADF


def test_a_connect_on_a_closed_one(outgoing: sockets.Outgoing) -> None:
    sock = outgoing(socket.AF_INET)
    sock.close()
    assert sock.connect_ex(("127.0.0.1", 9)) == errno.EBADF


def test_what_connect_says_is_its_result(outgoing: sockets.Outgoing) -> None:
    with listening("127.0.0.1") as listener:
        taken = Endpoint(*listener.getsockname())  # as the program names it
        first = outgoing(socket.AF_INET)
        assert first.connect_ex(taken) == errno.EINPROGRESS
        until(lambda: first.connect_ex(taken) == errno.EISCONN, what="connected")
        first.close()
    refused = outgoing(socket.AF_INET)
    number = refused.connect_ex(taken)
    assert number in (errno.EINPROGRESS, errno.ECONNREFUSED)
    refused.close()


@pytest.mark.parametrize(
    "address", [("::1", 9), ("127.0.0.1",), ("127.0.0.1", 70_000), ("127.0.0.1", "25"), (b"a", None)]
)
def test_what_is_no_address_of_its_family_is_refused(outgoing: sockets.Outgoing, address: Any) -> None:
    """As a Python socket refuses it, without a look-up of names that would hold up everybody (these are none)."""
    sock = outgoing(socket.AF_INET)
    for call in (sock.bind, sock.connect_ex):
        with pytest.raises((OSError, TypeError, OverflowError)):
            call(address)
    sock.close()


def test_an_address_that_is_not_here(outgoing: sockets.Outgoing) -> None:
    sock = outgoing(socket.AF_INET)
    with pytest.raises(OSError, match="assign") as caught:
        sock.bind(("192.0.2.1", 0))
    assert caught.value.errno == errno.EADDRNOTAVAIL
    sock.close()


def test_an_address_with_a_zone(outgoing: sockets.Outgoing) -> None:
    """More than C reads: a Python socket is lent the descriptor."""
    sock = outgoing(socket.AF_INET6)
    sock.bind(("::1", 0, 0, 1))
    assert sock.getsockname()[0] == "::1"
    sock.close()


def test_a_family_that_there_is_not(outgoing: sockets.Outgoing) -> None:
    before = open_descriptors()
    with pytest.raises(OSError, match=r"."):
        outgoing(12345)
    assert open_descriptors() == before


def test_an_option_that_is_refused_leaves_nothing_open(outgoing: sockets.Outgoing) -> None:
    """A socket of another family has none of TCP's options."""
    before = open_descriptors()
    with pytest.raises(OSError, match=r"."):
        outgoing(socket.AF_UNIX)
    assert open_descriptors() == before


def test_one_that_is_forgotten_is_closed_and_told_of(outgoing: sockets.Outgoing) -> None:
    before = open_descriptors()
    sock = outgoing(socket.AF_INET)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del sock
        gc.collect()
    assert [warning.category for warning in told] == [ResourceWarning]
    assert open_descriptors() == before


def test_one_that_is_given_away_stays_open(form: Form) -> None:
    ours, theirs = pair(form)
    fd = ours.detach()
    del ours
    other = RawSocket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
    assert other.send(b"x") == 1
    other.close()
    theirs.close()
