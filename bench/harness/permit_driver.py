"""A fleet of sessions in one thread, speaking frames: fast enough to load the proxy's throttle manager with permits.

It keeps the session alive (pings both ways), counts what comes, and holds a permit as used when it may be: nothing is
sent to a receiver. What is asked for, and what the figures mean, is the caller's.
"""

from __future__ import annotations

import os
import selectors
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from harness.machine import ROOT

sys.path.insert(0, str(ROOT))

from greenarrow_proxy_client.link import tls_context
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from proxy.protocols.native.auth import NO_CERTIFICATE, ClientHandshake, certificate_hash

SOURCE = "127.0.2.1"
_READ = 65536
_TIMEOUT = 20.0
#: Paths registered at a time; the proxy answers each.
_PATHS = 500
#: DEMAND of one record, in forms of fixed length.
_DEMAND = struct.Struct(">IBBBIBBBIBIBI")


def now_us() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


class Member:
    """One session. `granted` counts permits; `on_grant(member, n, offset_us)` is called for each record."""

    def __init__(self, address: tuple[str, int], secret: bytes, name: str, tls: bool) -> None:
        self.name = name
        self.granted = self.frames_in = self.bytes_in = self.frames_out = self.bytes_out = 0
        self.answered = 0
        self.asked_at = 0.0
        self.waiting = 0
        self.on_grant: Callable[[Member, int, int], None] = lambda *_: None
        self.sock: Any = socket.create_connection(address, _TIMEOUT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        certificate = NO_CERTIFICATE
        if tls:
            self.sock = tls_context().wrap_socket(self.sock)
            certificate = certificate_hash(self.sock.getpeercert(binary_form=True) or b"")
        handshake = ClientHandshake(
            m.Kind.SESSION, name, secret, run_id=os.urandom(16), nonce=os.urandom(32), certificate=certificate
        )
        out = handshake.start()
        while handshake.welcome is None:
            self.sock.sendall(out)
            out = handshake.receive(self.sock.recv(_READ))
        self.incarnation = handshake.welcome.incarnation
        self.decoder = handshake.decoder
        self.ping()

    def send(self, data: bytes) -> None:
        self.frames_out += 1
        self.bytes_out += len(data)
        self.sock.setblocking(True)
        self.sock.sendall(data)
        self.sock.setblocking(False)

    def ping(self) -> None:
        self.send(frames.encode(s.Ping(self.incarnation, now_us())))

    def register(self, throttles: Iterable[tuple[int, str, int, int]]) -> None:
        """(id, name, messages, seconds) each."""
        paths = [
            s.Path(id, SOURCE, [s.Throttle(name, [s.Rate(amount, seconds)])]) for id, name, amount, seconds in throttles
        ]
        self.send(frames.encode(s.Reg(self.incarnation, paths)))

    def demand(self, want: int, id: int = 0) -> None:
        body = _DEMAND.pack(
            _DEMAND.size - 5,
            0x24,
            0x92,
            0xCE,
            self.incarnation,
            0x91,
            0x93,
            0xCE,
            id,
            0xCE,
            want,
            0xCE,
            self.granted,
        )
        self.waiting, self.asked_at = want, time.perf_counter()
        self.send(body)

    def read(self) -> None:
        """All that is there."""
        while True:
            try:
                data = self.sock.recv(_READ)
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            if not data:
                raise ConnectionError(f"the proxy has closed the session {self.name}")
            self.bytes_in += len(data)
            self.decoder.receive(data)
            while (frame := self.decoder.next_frame()) is not None:
                self.frames_in += 1
                self._take(frames.decode(frame, frames.SESSION_FROM_PROXY))
            if len(data) < _READ and not isinstance(self.sock, ssl.SSLSocket):
                return

    def _take(self, message: Any) -> None:
        if isinstance(message, s.Grant):
            for record in message.records:
                self.granted += record.n
                self.waiting -= record.n
                self.on_grant(self, record.n, record.first_offset_us)
        elif isinstance(message, s.Ping):
            self.send(frames.encode(s.Pong(message.incarnation, message.t, 0)))
        elif isinstance(message, s.Limit):
            self.answered += len(message.records)
        elif isinstance(message, m.Error):
            raise ConnectionError(f"{self.name}: {message.message}")

    def close(self) -> None:
        self.sock.close()


class Fleet:
    """Several members; a context manager."""

    def __init__(self, address: tuple[str, int], secret: str, names: Iterable[str], tls: bool = False) -> None:
        self._selector = selectors.EpollSelector()
        self.members = [Member(address, secret.encode(), name, tls) for name in names]
        for member in self.members:
            self._selector.register(member.sock, selectors.EVENT_READ, member)
        self._ping_at = time.monotonic() + 1

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.close()
        self._selector.close()

    def turn(self, timeout: float) -> None:
        """Take in what comes within the timeout, or what is there."""
        if time.monotonic() >= self._ping_at:
            self._ping_at = time.monotonic() + 1
            for member in self.members:
                member.ping()
        for key, _ in self._selector.select(timeout):
            key.data.read()

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.turn(min(left, 0.05))

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + _TIMEOUT
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError("the proxy does not answer")
            self.turn(0.05)

    def register(self, member: Member, throttles: list[tuple[int, str, int, int]]) -> None:
        """Wait for the answer to each some hundred."""
        for at in range(0, len(throttles), _PATHS):
            part = throttles[at : at + _PATHS]
            wanted = member.answered + len(part)
            member.register(part)
            self.until(lambda wanted=wanted: member.answered >= wanted)  # type: ignore[misc]


def closed_loop(fleet: Fleet, seconds: float, depth: int) -> tuple[int, float, list[float]]:
    """Each member asks for `depth` permits, and for the next when it has them; permits, seconds, and times of each."""
    times: list[float] = []

    def again(member: Member, _n: int, _offset: int) -> None:
        if member.waiting <= 0:
            times.append(time.perf_counter() - member.asked_at)
            member.demand(depth)

    for number, member in enumerate(fleet.members):
        fleet.register(member, [(0, f"own-{number}", 1_000_000, 1)])
        member.on_grant = again
    fleet.run(0.2)
    for member in fleet.members:
        member.demand(depth)
    fleet.run(0.5)
    times.clear()
    before, begin = sum(member.granted for member in fleet.members), time.perf_counter()
    fleet.run(seconds)
    spent = time.perf_counter() - begin
    granted = sum(member.granted for member in fleet.members) - before
    for member in fleet.members:
        member.on_grant = lambda *_: None
    return granted, spent, times
