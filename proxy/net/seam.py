"""A link between two processes of one proxy: records both ways over a Unix SEQPACKET socket, and descriptors with them.

Whatever is said in one turn of the hub leaves in one datagram. Nobody waits for the other end: what it does not take is
kept up to a bound, and an end that lets it come to that has hung, and is given up. A record that is too long for a
datagram travels in a file of memory whose descriptor is passed. The records are `protocols.seam`'s.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gevent import get_hub

from proxy.errors import PeerError
from proxy.log import lines as log
from proxy.protocols import seam
from proxy.protocols.seam import Record

#: Bytes that may wait for the other end.
MOST_WAITING = 32 * 1024 * 1024
#: Bytes of a record in a file of memory; a configuration of 100,000 blocks is far below.
_LONGEST = 512 * 1024 * 1024
#: Descriptors that one datagram may bring (SCM_MAX_FD is 253).
MOST_FDS = 250
#: Datagrams that are read before others have their turn.
_READS_A_TURN = 16
_SEND_BUFFER = 1 << 20
#: Seconds that a record which may wait does at the most.
_LATE = 0.002
#: Where what is read arrives, from whichever link: all of it is decoded before the next is read.
_arrived = bytearray(2 * seam.DATAGRAM)
_view = memoryview(_arrived)
_ROOM_FOR_FDS = socket.CMSG_SPACE(MOST_FDS * 4)

#: Takes what the other end has said, and the descriptors that came with it, which are the taker's then; fewer than were
#: sent, if this process has none left for them. Must not wait.
Take = Callable[[Sequence[Any], list[int]], object]


class _Outgoing(NamedTuple):
    data: bytes  # b"": it is in the first of the files
    fds: tuple[int, ...]  # to be closed when it is gone
    size: int


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a new link."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Seam:
    """One end.

    Args:
        sock: the end's; it is closed with this.
        is_master: which of the two languages it speaks.
        take: see `Take`.
        lost: called once, when the other end is gone, says what is no language of ours, or has hung.
    """

    def __init__(self, sock: socket.socket, is_master: bool, take: Take, lost: Callable[[], object]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        self._sock = sock
        self._is_master = is_master
        self._take = take
        self._lost = lost
        self._said: list[Record] = []
        self._waiting: deque[_Outgoing] = deque()
        self._waits = 0  # bytes
        self._flushing = False
        self.closed = False
        loop = get_hub().loop
        self._loop: Any = loop
        self._readable: Any = loop.io(sock.fileno(), 1)
        self._writable: Any = loop.io(sock.fileno(), 2)
        self._late: Any = loop.timer(_LATE, _LATE)
        self._readable.start(self._read)

    # ---------------------------------------------------------------- saying

    def say(self, record: Record) -> None:
        """Send it at the end of this turn."""
        if self.closed:
            return
        self._said.append(record)
        if not self._flushing:
            self._flushing = True
            self._loop.run_callback(self._flush)

    def say_late(self, record: Record) -> None:
        """Send it with what is said next, in the same order, or in two milliseconds: no datagram of its own, and no
        turn of the other process, where there is much to say."""
        if self.closed:
            return
        self._said.append(record)
        if not self._flushing and not self._late.active:
            self._late.again(self._flush_late, update=False)

    def say_with(self, record: Record, fds: Sequence[int]) -> None:
        """Send it now, with copies of these descriptors, which stay the caller's.

        Raises:
            OSError: there is no descriptor left for a copy.
        """
        if self.closed:
            return
        self._queue_said()
        copies: list[int] = []
        data = next(seam.encode([record]))
        size = len(data)
        try:
            if size > seam.DATAGRAM:
                copies.append(_in_memory(data))
                data = b""
            for fd in fds:
                copies.append(os.dup(fd))  # noqa: PERF401 - those before one that fails are to be closed
        except OSError:
            _close(copies)
            raise
        self._queue(_Outgoing(data, tuple(copies), size))
        self._write()

    @property
    def waits(self) -> int:
        """Bytes that the other end has not taken yet."""
        return self._waits

    def _flush(self) -> None:
        self._flushing = False
        if self.closed:
            return
        if not self._waiting and self._send_at_once():
            return
        self._queue_said()
        self._write()

    def _flush_late(self) -> None:
        self._late.stop()
        self._flush()

    def _send_at_once(self) -> bool:
        """What is said nearly always: one datagram, and room for it."""
        said = self._said
        if not said:
            return True
        data = seam.encode_one(said)
        if data is None:
            return False
        try:
            self._sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:  # (see `_write`)
            return False
        said.clear()
        return True

    def _queue_said(self) -> None:
        said, self._said = self._said, []
        if not said:
            return
        for data in seam.encode(said):
            size = len(data)
            if size <= seam.DATAGRAM:
                self._queue(_Outgoing(data, (), size))
                continue
            try:
                fd = _in_memory(data)
            except OSError as error:  # what comes behind it cannot be said without it
                self._give_up(f"a record of {size} bytes: {os.strerror(error.errno or 0)}")
                return
            self._queue(_Outgoing(b"", (fd,), size))

    def _queue(self, outgoing: _Outgoing) -> None:
        self._waiting.append(outgoing)
        self._waits += outgoing.size

    def _write(self) -> None:
        while self._waiting:
            data, fds, size = self._waiting[0]
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                self._sock.sendmsg([data or b"\0"], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait_for_room()
                return
            except OSError as error:
                self._give_up(os.strerror(error.errno or 0))
                return
            self._waiting.popleft()
            self._waits -= size
            _close(fds)
        if not self.closed:
            self._writable.stop()

    def _wait_for_room(self) -> None:
        if self._waits > MOST_WAITING:
            self._give_up("it does not read what it is told")
        elif not self._writable.active:
            self._writable.start(self._write)

    # ---------------------------------------------------------------- hearing

    def _read(self) -> None:
        for _ in range(_READS_A_TURN):
            if self.closed:
                return
            try:
                data, fds = self._receive()
            except BlockingIOError:
                return
            except ConnectionResetError:  # it is gone, and has not read all that we said
                self._give_up("")
                return
            except (OSError, PeerError) as error:
                self._give_up(str(error))
                return
            size = len(data)
            if not size:
                self._give_up("")
                return
            try:
                in_memory = size == 1 and data[0] == 0
                records = seam.decode(_from_memory(fds) if in_memory else data, self._is_master)
            except (OSError, PeerError) as error:
                _close(fds)
                self._give_up(str(error))
                return
            small = size < seam.DATAGRAM // 2 and not fds
            self._take(records, fds)
            if small:  # the other end says one a turn; if there is more, the loop comes again
                return

    def _receive(self) -> tuple[memoryview, list[int]]:
        """One datagram, for as long as nothing else is read."""
        size, ancillary, flags, _ = self._sock.recvmsg_into([_arrived], _ROOM_FOR_FDS, socket.MSG_CMSG_CLOEXEC)
        if not ancillary and not flags & socket.MSG_TRUNC:
            return _view[:size], []
        fds = array.array("i")
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if flags & socket.MSG_TRUNC:
            _close(list(fds))
            raise PeerError("a record of another process of the proxy was cut")
        return _view[:size], list(fds)  # MSG_CTRUNC: for some there was no descriptor left; the taker misses them

    # ---------------------------------------------------------------- the end

    def close(self) -> None:
        """What was said and has not left is lost, but for what the kernel takes now."""
        if self.closed:
            return
        self.closed = True
        self._queue_said()
        for data, fds, _ in self._waiting:
            with contextlib.suppress(OSError):
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                self._sock.sendmsg([data or b"\0"], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            _close(fds)
        self._waiting.clear()
        for watcher in (self._readable, self._writable, self._late):
            watcher.stop()
            watcher.close()
        self._sock.close()

    def _give_up(self, why: str) -> None:
        if self.closed:
            return
        if why:
            log.note(log.Event.WORKER, log.WARNING, f"the link to another process of the proxy: {why}")
        self.close()
        self._lost()


def _in_memory(data: bytes) -> int:
    fd = os.memfd_create("greenarrow_proxy", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        sent = os.write(fd, view)
        view = view[sent:]
    return fd


def _from_memory(fds: list[int]) -> bytes:
    """
    Raises:
        PeerError: it is not there, or too long.
    """
    if not fds:
        raise PeerError("a record of another process of the proxy came without its file")
    fd = fds.pop(0)
    try:
        size = os.fstat(fd).st_size
        if size > _LONGEST:
            raise PeerError(f"a record of another process of the proxy has {size} bytes")
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
