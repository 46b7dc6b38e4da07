"""What the operating system may refuse at any time, at the real program and with each engine that was built."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from tests import clients
from tests import independent_client as mta
from tests.clients import Refused, connect_request, dial, exactly, login, proxied, read_all, socks5, v1
from tests.faults import Faults
from tests.program import Proxy
from tests.sinks import Raw, echo
from tests.waiting import wait_for

try:
    from proxy.net import _fastrelay  # noqa: F401
except ImportError:
    ENGINES = ["python"]
else:
    ENGINES = ["python", "compiled"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"GREENARROW_PROXY_PURE": "1" if request.param == "python" else ""}


@pytest.fixture
def faults() -> Iterator[Faults]:
    with Faults() as faults:
        yield faults


@pytest.fixture
def receiver() -> Iterator[Raw]:
    with Raw(echo) as receiver:
        yield receiver


def check(sock: socket.socket) -> None:
    """A byte goes to the receiver and comes back."""
    sock.sendall(b"?")
    assert exactly(sock, 1) == b"?"


# -- accept(2)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ECONNABORTED, errno.EPROTO])
def test_an_accept_that_always_fails_stops_nobody(faults: Faults, receiver: Raw, number: int) -> None:
    """Such an error is one connection's, and the next accept is tried at once; but not for ever."""
    with Proxy(environ=faults.environ) as proxy, proxied(proxy.proxy_protocol, receiver.endpoint) as inside:
        check(inside)
        with faults.failing("accept4", number):
            late = dial(proxy.socks5)
            proxy.wait_line(r"^ERROR accept: .*trying again soon")
            check(inside)
            assert proxy.status()
        with late:
            late.sendall(clients.WITH_PASSWORD)
            assert exactly(late, 2) == b"\x05\x02"


# -- epoll_ctl(2)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_no_watch_for_a_client(engine: dict[str, str], faults: Faults, receiver: Raw, number: int) -> None:
    with Proxy(environ=engine | faults.environ) as proxy:
        with faults.failing("epoll_ctl", number):
            with dial(proxy.socks5) as sock:
                assert read_all(sock) == b""
            proxy.wait_line(r"^refused .*protocol=socks5 .*reason=overloaded .*no socket more can be watched")
            with dial(proxy.native) as sock:
                assert read_all(sock) == b""
            proxy.wait_line(r"^refused .*protocol=native .*reason=overloaded .*no socket more can be watched")
        with proxied(proxy.proxy_protocol, receiver.endpoint) as sock:
            check(sock)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_no_watch_for_the_outgoing_connection(
    engine: dict[str, str], faults: Faults, receiver: Raw, number: int
) -> None:
    with Proxy(environ=engine | faults.environ) as proxy, mta.channel(proxy.native) as peer:
        with dial(proxy.socks5) as sock, dial(proxy.proxy_protocol) as other:
            sock.sendall(clients.WITH_PASSWORD)
            assert exactly(sock, 2) == b"\x05\x02"
            other.sendall(b"PROXY ")
            wait_for(lambda: proxy.open_connections("proxy_protocol") == 1)
            with faults.failing("epoll_ctl", number):
                with pytest.raises(Refused) as refused:
                    _go_on(sock, receiver.endpoint)
                assert refused.value.args[0][1] == 0x01 or refused.value.args[0][1] == 0x02
                other.sendall(v1("127.0.0.5", receiver.endpoint)[len(b"PROXY ") :])
                assert read_all(other).startswith(b"421 ")
                fields = peer.open(receiver.endpoint)
                assert fields[0] == mta.FAILED
                assert "overloaded" in fields
        wait_for(lambda: len(proxy.matching("reason=overloaded .*no socket more can be watched")) == 3)
        assert not proxy.matching("client_gone")


def _go_on(sock: socket.socket, destination: tuple[str, int]) -> None:
    """From the login on."""
    sock.sendall(login())
    assert exactly(sock, 2) == b"\x01\x00"
    sock.sendall(connect_request(destination))
    reply = exactly(sock, 10)
    if reply[:2] != b"\x05\x00":
        raise Refused(reply)


# -- close(2), send(2)


def test_a_close_that_fails_stops_nobody(engine: dict[str, str], faults: Faults, receiver: Raw) -> None:
    with (
        Proxy(environ=engine | faults.environ) as proxy,
        proxied(proxy.proxy_protocol, receiver.endpoint) as inside,
    ):
        check(inside)
        with faults.failing("close", errno.EIO):
            for _ in range(3):
                with dial(proxy.socks5) as sock:
                    sock.sendall(b"GET ")
                    read_all(sock)
            faults.wait_hit()
            check(inside)


@pytest.mark.parametrize("size", [1, 1 << 16])
def test_bytes_refused_for_want_of_memory_are_tried_again(
    engine: dict[str, str], faults: Faults, receiver: Raw, size: int
) -> None:
    """With nothing in flight no edge ever tells that the target takes bytes again: the sweep does."""
    with (
        Proxy("idle_timeout 4s\n", environ=engine | faults.environ) as proxy,
        proxied(proxy.proxy_protocol, receiver.endpoint) as sock,
    ):
        check(sock)
        with faults.failing("send", errno.EAGAIN):
            sock.sendall(bytes(size))
            faults.wait_hit()
        assert len(exactly(sock, size)) == size


def test_the_same_on_a_channel(engine: dict[str, str], faults: Faults, receiver: Raw) -> None:
    with Proxy("idle_timeout 4s\n", environ=engine | faults.environ) as proxy, mta.channel(proxy.native) as peer:
        peer.opened(receiver.endpoint)
        peer.data(b"?")
        assert peer.hear_until(b"?") == b"?"
        with faults.failing("send", errno.EAGAIN):
            peer.data(b"more\n")
            faults.wait_hit()
        assert peer.hear_until(b"\n") == b"more\n"


# -- urgent data

URGENT = [
    pytest.param([(b"a", True)], id="nothing else"),
    pytest.param([(b"abc", True), (b"def", False)], id="bytes behind"),
    pytest.param([(b"abc", False), (b"d", True), (b"e" * 50_000, False)], id="in the middle"),
    pytest.param([(b"12345", True)] * 50, id="many"),
]
IN_BULK = [
    pytest.param([(b"x" * 3_000_000, False), (b"yz", True), (b"z" * 3_000_000, False)], id="one"),
    pytest.param([(b"x" * 200_000, True)] * 20, id="many"),
]


@contextlib.contextmanager
def relayed(engine: dict[str, str], up: bool) -> Iterator[tuple[Proxy, socket.socket, socket.socket]]:
    """A connection through the program, and which of its ends sends and which reads; closed in the end, and told."""
    with (
        Proxy(environ=engine) as proxy,
        socket.create_server(("127.0.0.9", 0)) as listener,
        socks5(proxy.socks5, listener.getsockname()) as client,
        listener.accept()[0] as upstream,
    ):
        source, target = (client, upstream) if up else (upstream, client)
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        target.settimeout(30)
        yield proxy, source, target
        client.close()
        upstream.close()
        proxy.wait_line(r"^connection .*outcome=(client|upstream)_closed")


def send_pieces(source: socket.socket, pieces: list[tuple[bytes, bool]]) -> None:
    """Each whole, the last byte of some as urgent data."""
    for data, urgent in pieces:
        source.sendall(data[:-1])
        source.send(data[-1:], socket.MSG_OOB if urgent else 0)


@pytest.mark.parametrize("pieces", URGENT)
@pytest.mark.parametrize("fin", [False, True], ids=["goes on", "ends"])
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_urgent_data_are_bytes_like_others(
    engine: dict[str, str], pieces: list[tuple[bytes, bool]], fin: bool, up: bool
) -> None:
    """In their place, none lost, and none stuck though all of it, and perhaps the end, was there in one event."""
    sent = b"".join(data for data, _ in pieces)
    with relayed(engine, up) as (proxy, source, target):
        proxy.signal(signal.SIGSTOP)
        send_pieces(source, pieces)
        if fin:
            source.shutdown(socket.SHUT_WR)
        proxy.signal(signal.SIGCONT)
        assert exactly(target, len(sent)) == sent
        if not fin:
            source.shutdown(socket.SHUT_WR)
        assert read_all(target) == b""


@pytest.mark.parametrize("pieces", IN_BULK)
@pytest.mark.parametrize("fin", [False, True], ids=["goes on", "ends"])
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_urgent_data_in_bulk(engine: dict[str, str], pieces: list[tuple[bytes, bool]], fin: bool, up: bool) -> None:
    """A splice stops at the mark, and takes it for the end when a FIN is behind it."""
    sent = b"".join(data for data, _ in pieces)
    with relayed(engine, up) as (_, source, target):

        def send() -> None:
            send_pieces(source, pieces)
            if fin:
                source.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        received = exactly(target, len(sent))
        sender.join()
        assert len(received) == len(sent)
        assert received == sent
        if not fin:
            source.shutdown(socket.SHUT_WR)
        assert read_all(target) == b""
