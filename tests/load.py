"""Many sessions at once, cheaply: one epoll loop for the clients, and a receiver in a process of its own.

    with Receiver() as receiver:
        Load([Session(proxy.socks5, request, reply_size, end)] * 1000, at_once=100).run()

For tests of leaks and of memory; what the bytes mean is in `clients`.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.program import ROOT

Address = tuple[str, int]
_LINGER_RESET = struct.pack("ii", 1, 0)


class Receiver:
    """Greets with `220 mx`, echoes, and closes when the client does; on `host`, in a process of its own."""

    def __init__(self, host: str = "127.0.0.2") -> None:
        self._host = host

    def __enter__(self) -> Receiver:
        command = [sys.executable, "-m", "tests.load", self._host]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.endpoint: Address = (self._host, int(self._process.stdout.readline()))
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Session(NamedTuple):
    """What one client does: dial, send it all, read so many bytes (or to the end), and leave.

    end: `close`, `reset`, `read` (to the end of the file, then close), or `stay` (the caller's from then on).
    """

    door: Address
    request: bytes
    reply_size: int
    end: str


class Load:
    """Runs sessions, `at_once` of them at a time. Attributes: `stayed`, the sockets of those that stay; `done`."""

    def __init__(self, sessions: Iterable[Session], at_once: int) -> None:
        self.stayed: list[socket.socket] = []
        self.done = 0
        self._sessions: Iterator[Session] = iter(sessions)
        self._at_once = at_once
        self._epoll = select.epoll()
        self._open: dict[int, tuple[socket.socket, Session]] = {}
        self._got: dict[int, int] = {}

    def run(self, timeout: float = 120.0) -> None:
        """Until all are done; AssertionError when one goes wrong or they take too long."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                while len(self._open) < self._at_once and (session := next(self._sessions, None)) is not None:
                    self._begin(session)
                if not self._open:
                    return
                assert time.monotonic() < deadline, f"{self.done} done, {len(self._open)} hang"
                for fd, _ in self._epoll.poll(1.0, 256):
                    self._go_on(fd)
        finally:
            self._epoll.close()
            for sock, _ in self._open.values():
                sock.close()

    def _begin(self, session: Session) -> None:
        sock = socket.socket()
        sock.setblocking(False)
        assert sock.connect_ex(session.door) == errno.EINPROGRESS
        self._open[sock.fileno()] = sock, session
        self._epoll.register(sock.fileno(), select.EPOLLOUT)

    def _go_on(self, fd: int) -> None:
        sock, session = self._open[fd]
        got = self._got.get(fd)
        if got is None:
            if session.request:
                assert sock.send(session.request) == len(session.request)
            self._epoll.modify(fd, select.EPOLLIN)
            self._got[fd] = 0
            if session.reply_size == 0 and session.end != "read":
                self._finish(fd, sock, session)
            return
        try:
            data = sock.recv(4096)
        except ConnectionResetError:
            data = b""
        self._got[fd] = got + len(data)
        if session.end == "read":
            if not data:
                self._finish(fd, sock, session)
        elif not data:
            raise AssertionError(f"{session} ended after {got} bytes")
        elif self._got[fd] >= session.reply_size:
            self._finish(fd, sock, session)

    def _finish(self, fd: int, sock: socket.socket, session: Session) -> None:
        self._epoll.unregister(fd)
        del self._open[fd], self._got[fd]
        self.done += 1
        if session.end == "stay":
            self.stayed.append(sock)
            return
        if session.end == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        sock.close()


def descriptors(wanted: int) -> bool:
    """Raise our own limit to `wanted` descriptors; whether that is possible."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < wanted:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    return True


def _receive(host: str) -> None:
    """The receiver's process."""
    descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    listener = socket.create_server((host, 0), backlog=4096)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    socks: dict[int, socket.socket] = {}
    while True:
        for fd, _ in epoll.poll(-1, 256):
            if fd == listener.fileno():
                with contextlib.suppress(BlockingIOError):
                    for _ in range(64):
                        sock, _ = listener.accept()
                        sock.setblocking(False)
                        socks[sock.fileno()] = sock
                        epoll.register(sock, select.EPOLLIN)
                        with contextlib.suppress(OSError):
                            sock.send(b"220 mx\r\n")
                continue
            try:
                data = socks[fd].recv(4096)
                if data:
                    socks[fd].send(data)
            except OSError:
                data = b""
            if not data:
                socks.pop(fd).close()


if __name__ == "__main__":
    _receive(sys.argv[1])
