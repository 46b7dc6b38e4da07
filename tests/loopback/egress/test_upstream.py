"""Outgoing sockets against the real kernel: the address they leave from, their options, and each errno's outcome."""

import contextlib
import errno
import gc
import os
import socket
from unittest import mock

import pytest
from gevent import Timeout

from proxy.egress import upstream
from proxy.errors import DestinationNotAllowed, Overloaded, Step, UpstreamError
from proxy.model import Endpoint
from proxy.net.relay import Engine, RawSocket
from proxy.policy.access import Access
from tests.loopback.net.relays import open_descriptors, run
from tests.unit.feeding import settings


@pytest.fixture
def engine():
    engine = Engine()
    yield engine
    engine.stop()


@contextlib.contextmanager
def listening(host="127.0.0.2", backlog=10):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family, backlog=backlog) as server:
        yield server, Endpoint(*server.getsockname()[:2])


@contextlib.contextmanager
def deaf():
    """A destination that answers no SYN: its accept queue is full."""
    with contextlib.ExitStack() as stack:
        _, endpoint = stack.enter_context(listening(backlog=0))
        for _ in range(10):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                sock.connect(endpoint)
                continue
            break
        yield endpoint


@contextlib.contextmanager
def bound(source="127.0.0.5"):
    sock = upstream.bind(source)
    try:
        yield sock
    finally:
        sock.close()


def connect(engine, sock, source, destination, timeout=10.0):
    """As the product does it: in a greenlet."""
    (result,) = run(lambda: upstream.connect(engine, sock, source, destination, timeout))
    return result


# -- bind


@pytest.mark.parametrize(("source", "host"), [("127.0.0.5", "127.0.0.2"), ("::1", "::1")])
def test_it_leaves_from_the_bound_address(engine, source, host):
    with listening(host) as (server, destination), bound(source) as sock:
        connect(engine, sock, source, destination)
        peer, address = server.accept()
        assert address[0] == source
        assert upstream.local_endpoint(sock) == Endpoint(*address[:2])
        peer.close()
        engine.close(sock)


def test_its_options():
    with bound() as sock:
        assert os.get_blocking(sock.fileno()) is False
        assert os.get_inheritable(sock.fileno()) is False
        for level, name, value in (
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0),  # comes with the first sweep: test_relay
        ):
            assert sock.getsockopt(level, name) == value


@pytest.mark.parametrize("source", ["127.0.0.5", "::1"])
def test_binding_takes_no_port(source):
    """IP_BIND_ADDRESS_NO_PORT: the port is chosen at connect, for the pair of addresses."""
    with bound(source) as sock:
        assert sock.getsockname()[1] == 0


def failure(call, *arguments):
    with pytest.raises(UpstreamError) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize("source", ["192.0.2.9", "2001:db8::9"])
def test_an_address_that_is_not_ours(source):
    gc.collect()
    before = open_descriptors()
    error = failure(upstream.bind, source)
    assert str(error) == f"bind {source}: not an address of this machine"
    assert (error.step, error.errno, error.socks_reply) == (Step.BIND, errno.EADDRNOTAVAIL, 1)
    assert open_descriptors() == before


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_no_descriptor_is_an_overload(number):
    none = mock.Mock(side_effect=OSError(number, "mocked"))
    with mock.patch.multiple(upstream, RawSocket=none, outgoing=none):
        for call in (
            lambda: upstream.bind("127.0.0.5"),
            lambda: upstream.system_source(Endpoint("127.0.0.2", 25)),
        ):
            with pytest.raises(Overloaded, match=os.strerror(number)):
                call()


def test_a_family_that_the_kernel_lacks():
    with mock.patch.object(upstream, "outgoing", side_effect=OSError(errno.EAFNOSUPPORT, "mocked")):
        assert failure(upstream.bind, "::1").step is Step.BIND


# -- connect


def refused_port(host):
    with listening(host) as (_, endpoint):
        return endpoint


@pytest.mark.parametrize(("source", "host"), [("127.0.0.5", "127.0.0.2"), ("::1", "::1")])
def test_connection_refused(engine, source, host):
    destination = refused_port(host)
    with bound(source) as sock:
        error = failure(connect, engine, sock, source, destination)
        assert str(error) == f"connect {source} -> {destination}: Connection refused"
        assert (error.step, error.errno, error.socks_reply) == (Step.CONNECT, errno.ECONNREFUSED, 5)
        engine.close(sock)


def test_the_deadline(engine):
    with deaf() as destination, bound() as sock:
        error = failure(connect, engine, sock, "127.0.0.5", destination, 0.05)
        assert (error.step, error.errno, error.socks_reply) == (Step.CONNECT, errno.ETIMEDOUT, 6)
        engine.close(sock)


def test_another_ones_timeout_is_not_ours(engine):
    """A Timeout of the caller's passes through; it must not be told as a failed connect."""

    def job():
        with pytest.raises(Timeout) as caught, Timeout(0.05) as outer:
            upstream.connect(engine, sock, "127.0.0.5", destination, 30.0)
        assert caught.value is outer

    with deaf() as destination, bound() as sock:
        run(job)
        engine.close(sock)


@pytest.mark.parametrize(
    ("number", "reply"),
    [
        (errno.ENETUNREACH, 3),
        (errno.ENETDOWN, 3),
        (errno.EHOSTUNREACH, 4),
        (errno.EHOSTDOWN, 4),
        (errno.ECONNREFUSED, 5),
        (errno.ETIMEDOUT, 6),
        (errno.EACCES, 2),
        (errno.EPERM, 2),
        (errno.ECONNRESET, 1),
        (errno.EADDRNOTAVAIL, 1),
        (errno.EINVAL, 1),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_each_errno_has_its_reply(engine, number, reply, late):
    """At once, or after EINPROGRESS when the second connect tells it."""

    class Failing:
        def __init__(self, sock):
            self.answers = [errno.EINPROGRESS, number] if late else [number]
            self.fileno = sock.fileno

        def connect_ex(self, destination):
            if len(self.answers) == 1:
                return self.answers[0]
            return self.answers.pop(0)

    with bound() as sock:
        error = failure(connect, engine, Failing(sock), "127.0.0.5", Endpoint("127.0.0.2", 25))
        assert (error.step, error.errno, error.socks_reply) == (Step.CONNECT, number, reply)
        expected = "no free local port" if number == errno.EADDRNOTAVAIL else os.strerror(number)
        assert expected in str(error)
        engine.close(sock)


def test_no_free_port(engine):
    """Told apart from an address that is not ours: the source's own port is taken towards this destination."""
    with listening() as (_, destination), socket.socket() as first, socket.socket() as second:
        for sock in (first, second):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind(("127.0.0.5", 0))
        second.bind(first.getsockname())
        first.connect(destination)
        raw = RawSocket(socket.AF_INET, socket.SOCK_STREAM, 0, second.detach())
        raw.setblocking(False)
        error = failure(connect, engine, raw, "127.0.0.5", destination)
        assert error.errno == errno.EADDRNOTAVAIL
        assert "no free local port for this source and destination" in str(error)
        engine.close(raw)


# -- choosing


def test_the_systems_choice_sends_nothing():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.2", 0))
        listener.setblocking(False)
        assert upstream.system_source(Endpoint(*listener.getsockname())) == "127.0.0.1"
        with pytest.raises(BlockingIOError):
            listener.recv(1)
    assert upstream.system_source(Endpoint("::1", 25)) == "::1"


def test_no_route():
    with mock.patch.object(upstream, "RawSocket") as fake:
        fake.return_value.connect.side_effect = OSError(errno.ENETUNREACH, "mocked")
        error = failure(upstream.system_source, Endpoint("2001:db8::1", 25))
    assert (error.step, error.socks_reply) == (Step.CONNECT, 3)
    assert fake.return_value.close.called


def test_a_denied_destination_is_asked_no_route_for():
    """fe80::1 without a zone is EINVAL to the system, a general failure, where policy says no."""
    access = Access(settings(), ())
    with listening() as (server, _):
        for host in ("fe80::1", "ff02::1"):
            assert isinstance(failure(upstream.system_source, Endpoint(host, 25)), UpstreamError)
            with pytest.raises(DestinationNotAllowed):
                upstream.source_for(access, "", server, None, Endpoint(host, 25))


@pytest.mark.only_python("answers of the test's own in the place of the system's")
def test_the_systems_choice_is_asked_for_once_a_second_and_a_failure_each_time():
    access = mock.Mock(default_source=mock.Mock(return_value=None))
    answers = ["127.0.0.7", UpstreamError("no route", Step.CONNECT, errno.ENETUNREACH), "127.0.0.8"]
    with (
        listening() as (server, _),
        mock.patch.object(upstream, "monotonic", side_effect=[1e9, 1e9, 1e9 + 1, 1e9 + 1]),
        mock.patch.object(upstream, "system_source", side_effect=answers) as asked,
    ):

        def source(host):
            return upstream.source_for(access, "", server, None, Endpoint(host, 25))

        assert [source("192.0.2.1"), source("192.0.2.1")] == ["127.0.0.7"] * 2
        assert asked.call_count == 1
        with pytest.raises(UpstreamError):
            source("192.0.2.1")
        assert source("192.0.2.1") == "127.0.0.8"
        assert asked.call_count == 3
