"""What the relay's tests share: peers on real sockets, an owner that remembers, and the engines there are."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import socket
import struct
import sys
import termios
from collections.abc import Callable
from functools import partial
from typing import Any

import gevent
from gevent import socket as gsocket

from proxy.model import Ending
from proxy.net import relay
from proxy.net.relay import RawSocket
from tests.waiting import wait_for

try:
    from proxy.net import _fastrelay
except ImportError:
    ENGINES: list[type[relay.Engine]] = [relay.Engine]
else:
    ENGINES = [relay.Engine, _fastrelay.Engine]

LINGER_RESET = struct.pack("ii", 1, 0)
until = partial(wait_for, pause=gevent.sleep)
_peers: list[gsocket.socket] = []  # to be closed after the test


class Owner:
    """Remembers each time it was told."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.told: list[tuple[Ending, int, int]] = []
        self.first = b""
        self.error = error

    def heard(self, data: bytes) -> None:
        self.first += data

    def ended(self, ending: Ending, up: int, down: int) -> None:
        self.told.append((ending, up, down))
        if self.error is not None:
            raise self.error

    def ending(self) -> tuple[Ending, int, int]:
        """What it was told, once it was."""
        until(lambda: self.told, what="the owner is told")
        assert len(self.told) == 1
        return self.told[0]


def tcp_pair(host: str = "127.0.0.1", buffers: int | None = None) -> tuple[gsocket.socket, RawSocket]:
    """A connected pair: the peer's end (cooperative), and the proxy's (raw). `buffers`: bytes, of all four."""
    with socket.socket() as listener:
        if buffers:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        listener.bind((host, 0))
        listener.listen()
        peer = socket.socket()
        if buffers:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffers)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffers)
        peer.connect(listener.getsockname())
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd, _ = listener._accept()
    ours = RawSocket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
    ours.setblocking(False)
    ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    cooperative = gsocket.socket(fileno=peer.detach())
    cooperative.settimeout(30)
    _peers.append(cooperative)
    return cooperative, ours


def close_peers() -> None:
    while _peers:
        _peers.pop().close()


class Relayed:
    """A client and an upstream peer with the relay between them."""

    def __init__(
        self,
        engine: relay.Engine,
        early: bytes = b"",
        idle_timeout: float = 1e9,
        buffers: int | None = None,
        owner: Owner | None = None,
        before: Callable[[Relayed], object] = lambda relayed: None,
        client_registered: bool = False,
    ) -> None:
        self.owner = owner or Owner()
        self.client, ours = tcp_pair("127.0.0.1", buffers)
        self.upstream, theirs = tcp_pair("127.0.0.2", buffers)
        self.fds = ours.fileno(), theirs.fileno()
        engine.register(theirs.fileno())
        if client_registered:
            engine.register(ours.fileno())
        before(self)
        engine.join(ours, theirs, self.owner, idle_timeout, early, client_registered, client_registered, relay.GONE)

    def close(self) -> None:
        self.client.close()
        self.upstream.close()

    def check(self) -> None:
        """A byte goes through both ways."""
        for source, target in ((self.client, self.upstream), (self.upstream, self.client)):
            source.sendall(b"?")
            assert target.recv(10) == b"?"


def reset(sock: gsocket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    sock.close()


def was_reset(sock: gsocket.socket) -> bool:
    """Whether the peer's stream ends with RST; reads all that comes before."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def read_all(sock: gsocket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def fill(sock: gsocket.socket, most: int = 1 << 30) -> int:
    """Send until nothing more is taken, although the loop runs; the number of bytes taken."""
    data = bytes(65536)
    sent = refused = 0
    sock.settimeout(0)
    while refused < 20 and sent < most:
        try:
            sent += sock.send(data)
            refused = 0
        except BlockingIOError:
            refused += 1
            gevent.sleep(0.001)
    sock.settimeout(30)
    return sent


def chunks(seed: int, total: int, largest: int) -> list[bytes]:
    """Random bytes, cut at random."""
    rng = random.Random(seed)
    data = rng.randbytes(total)
    cut: list[bytes] = []
    at = 0
    while at < total:
        size = rng.randint(1, rng.choice((3, 600, largest)))
        cut.append(data[at : at + size])
        at += size
    return cut


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def unread(fd: int) -> int:
    """Bytes that have arrived at a socket and were not read."""
    size = fcntl.ioctl(fd, termios.FIONREAD, bytes(4))
    return int.from_bytes(size, sys.byteorder)


class _Mallinfo(ctypes.Structure):
    """mallinfo(3): ten counters; the eighth is the bytes that are allocated."""

    _fields_ = tuple((f"field{number}", ctypes.c_size_t) for number in range(10))


def malloced() -> int:
    """Bytes that malloc has given out."""
    call = ctypes.CDLL(None).mallinfo2
    call.restype = _Mallinfo
    return int(call().field7)


def run(*jobs: Callable[[], Any], timeout: float = 30.0) -> list[Any]:
    """Run jobs at once; what they return. Their exceptions are raised."""
    greenlets = [gevent.spawn(job) for job in jobs]
    with gevent.Timeout(timeout):
        gevent.joinall(greenlets, raise_error=True)
    return [greenlet.value for greenlet in greenlets]
