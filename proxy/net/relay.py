"""The relay engine: one edge-triggered epoll for every socket of the data path, itself one watcher of gevent's loop.

Two kinds of customers share it. A greenlet that sets a connection up waits here for its sockets (`wait`). A connection
that is set up is handed over (`join`) as a `Pair` of two `Half`s, and from then on has no greenlet, no timer and no
buffer: an event on either socket moves its bytes, and when both directions are done the pair's owner is told.

Rules that keep it right (each was broken once, each has a test in tests/loopback/net/test_relay.py or tests/fuzz):

- Each socket is registered once, for everything, edge-triggered. An edge is only a hint: whoever is woken tries the
  system call and waits again on EAGAIN, so a spurious wake-up is harmless everywhere, and a missed edge is the one
  thing to fear. After a read that filled the buffer, or with a peer that has closed, we read on; when the budget is
  used up, the half is queued to go on (`_again`), since no new edge will come for what is already there.
- A read stops at the mark of urgent data, and a splice does not get past it at all: with a FIN behind the mark it even
  says 0. So a short read is not the last one after EPOLLPRI, and where a splice finds nothing a read has to confirm it.
- A direction with bytes that the kernel did not take (`pending`, `in_pipe`) reads nothing: that is the back-pressure,
  and it is what keeps a queued continuation from overwriting those bytes.
- A descriptor is closed at the end of the batch, so that no event of this batch meets a successor with its number.
- Nothing escapes `_drain`, not even a `gevent.Timeout` that a dying greenlet lets out: an exception would stop the one
  watcher, and with it every relay. `sweep` restarts a watcher that died all the same.

`_fastrelay`, if it was built, has an `Engine` that does the same with its inner loop in C; `make_engine` chooses.
Rules, limits and tests are the same for both: whoever changes one changes the other.

Bytes that go from raw socket to raw socket in bulk are spliced through a pipe and never seen. What the connection is
for, what it may cost and what its end means is not known here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import select
import struct
import sys
import termios
from _socket import (
    IPPROTO_TCP,
    MSG_MORE,
    SHUT_WR,
    SO_KEEPALIVE,
    SO_LINGER,
    SOL_SOCKET,
    TCP_KEEPCNT,
    TCP_KEEPIDLE,
    TCP_KEEPINTVL,
    TCP_NODELAY,
    TCP_USER_TIMEOUT,
)
from _socket import socket as RawSocket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from gevent import get_hub, getcurrent

from proxy.model import Ending
from proxy.net.alarm import Alarms
from proxy.net.peer import has_gone

__all__ = [
    "ANY",
    "GONE",
    "HEARD",
    "IPPROTO_TCP",
    "TCP_NODELAY",
    "UNSURE",
    "Engine",
    "Owner",
    "Pair",
    "RawSocket",
    "Shortcut",
    "engine_name",
    "make_engine",
]

_IN, _OUT, _ERR, _HUP, _RDHUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLERR, select.EPOLLHUP, select.EPOLLRDHUP
_URGENT = select.EPOLLPRI
_REGISTERED = _IN | _OUT | _RDHUP | _URGENT | select.EPOLLET
_READABLE = _IN | _RDHUP | _HUP | _ERR
_CLOSING = _RDHUP | _HUP | _ERR
_DEAD = _HUP | _ERR
#: Events of a peer that has closed, at least its sending side, or is gone.
GONE = _CLOSING
#: Events after which a short read need not be the last one: a peer's end comes without another edge, and a read stops
#: at the mark of urgent data, wherever that is (tcp(7); SO_OOBINLINE keeps the urgent byte itself in its place).
UNSURE = _CLOSING | _URGENT
#: Events after which there may be something to read; without any of them there is only room for more to be sent.
HEARD = _IN | UNSURE
#: For `Engine.wait`.
ANY = 0xFFFFFFFF

_LINGER_RESET = struct.pack("ii", 1, 0)
_CLOSED = b""  # as `Half.pending`: not None, so nothing is read any more; empty, so nothing is written

_KEEPALIVE_IDLE, _KEEPALIVE_INTERVAL, _KEEPALIVE_PROBES = 60, 15, 4
_MOST_MILLISECONDS = (1 << 31) - 1

BUFFER_SIZE = 65536
_BUFFER = bytearray(BUFFER_SIZE)  # one for the whole process: it is empty again whenever we switch
_VIEW = memoryview(_BUFFER)

_EVENTS_A_BATCH = 256
_REPLY_CODE = 4  # bytes: three digits, and what tells whether more lines follow (RFC 5321 4.2)
_HEARD = 256  # the most that an owner is shown of the first bytes
_READS_A_TURN = 16  # the budget of one half before others get their turn
_FULL_READS_TO_SPLICE = 4
_PIPE_SIZE = 1 << 20
_MAX_PIPES = 32  # an unprivileged process gets 64 descriptors of this size, then only small ones
_CALM_SPLICE = 16384  # a splice that moved less than this gives its pipe back
_SPLICES_A_TURN = 8
_SPLICE_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


def keep_alive(sock: RawSocket, idle_timeout: float) -> None:
    """TCP's own watch over a dead peer; accepted sockets inherit it from their listener.

    TCP_USER_TIMEOUT equals the idle timeout (seconds): a shorter one would kill a live peer whose window is closed.
    """
    set_option = sock.setsockopt
    set_option(SOL_SOCKET, SO_KEEPALIVE, 1)
    set_option(IPPROTO_TCP, TCP_KEEPIDLE, _KEEPALIVE_IDLE)
    set_option(IPPROTO_TCP, TCP_KEEPINTVL, _KEEPALIVE_INTERVAL)
    set_option(IPPROTO_TCP, TCP_KEEPCNT, _KEEPALIVE_PROBES)
    set_option(IPPROTO_TCP, TCP_USER_TIMEOUT, int(min(idle_timeout * 1000, _MOST_MILLISECONDS)))


class Owner(Protocol):
    """Whoever joined a pair; is told once, from the hub or from within `join`, when it has ended, with the bytes
    delivered up (to upstream) and down (to the client). Must not block; raising costs nobody else anything."""

    def ended(self, ending: Ending, up: int, down: int) -> None: ...

    def heard(self, data: bytes) -> None:
        """Upstream's first bytes, a copy, when they may be a refusal in SMTP: they begin with 4 or 5. Called again
        while fewer than a reply code have come. The same rules as for `ended`; must not call the engine."""


class Shortcut(Protocol):
    """The usual event of a session on a native channel, where the engine is compiled: see `_fastframes`."""

    #: Bytes that came and went of which `Transfer` has not been told.
    moved: int

    def begin(self, client_event: Callable[[int], None], receiver_event: Callable[[int], None]) -> None:
        """A wait begins; these are called for what is not usual."""

    def look(self) -> bool:
        """Events may have gone by: read both sides. Whether there was anything that is not usual, which is then the
        caller's, who need not wait for it. Raises what a step raises."""

    def end(self) -> None:
        """It is over."""

    def client_event(self, events: int) -> None:
        """For `Engine.watch`."""

    def receiver_event(self, events: int) -> None:
        """For `Engine.watch`."""


class Half:
    """One direction of a pair: from `source` to `target`."""

    __slots__ = (
        *("source", "target", "recv_into", "send", "pair", "peer"),
        *("pending", "pipe", "in_pipe", "moved", "full_reads", "unsure", "done", "queued"),
    )

    def __init__(self, source: RawSocket, target: RawSocket, pair: Pair) -> None:
        self.source = source
        self.target = target
        self.recv_into = source.recv_into
        self.send = target.send
        self.pair = pair
        self.peer: Half = self
        self.pending: bytes | None = None  # received, not yet taken by the kernel
        self.pipe: tuple[int, int] | None = None  # (read end, write end) while splicing
        self.in_pipe = 0  # bytes in that pipe
        self.moved = 0  # bytes received
        self.full_reads = 0  # reads running that filled the buffer
        self.unsure = False  # there may be a mark of urgent data ahead, at which a splice finds nothing
        self.done = False  # the source has said FIN and the target was told
        self.queued = False  # in the engine's `_again`

    @property
    def delivered(self) -> int:
        """Bytes that the kernel has taken for the target."""
        return self.moved - self.in_pipe - len(self.pending or b"")

    @property
    def closed(self) -> bool:
        """Whether the source has said FIN; it may stand unread behind bytes that the target does not take."""
        return self.done or ((self.pending is not None or self.in_pipe > 0) and has_gone(self.source))


_NO_HALF = Half.__new__(Half)  # in the place of those of a pair that has ended


class Pair:
    """A client's socket and an upstream socket that are joined until both directions are done."""

    __slots__ = ("_idle_since", "_moved_before", "down", "first_done", "half_closed", "idle_timeout", "owner", "up")

    def __init__(self, client: RawSocket, upstream: RawSocket, owner: Owner, idle_timeout: float) -> None:
        self.owner = owner
        self.idle_timeout = idle_timeout
        self.up = Half(client, upstream, self)
        self.down = Half(upstream, client, self)
        self.up.peer = self.down
        self.down.peer = self.up
        self.first_done: Half | None = None
        self.half_closed = False  # one side has closed, and the other has not, when it was last looked at
        self._moved_before = -1
        self._idle_since = 0.0

    def idle_for(self, now: float) -> float:
        """Seconds (at the sweep's granularity) since a byte was delivered, or a side closed; called by the sweep."""
        self.half_closed = self.up.closed or self.down.closed
        moved = self.up.delivered + self.down.delivered + self.half_closed
        if self._moved_before < 0:  # most are gone before a sweep sees them, and never need this
            keep_alive(self.down.source, self.idle_timeout)
        if moved != self._moved_before:
            self._moved_before = moved
            self._idle_since = now
        return now - self._idle_since


class Engine:
    """One epoll descriptor, its watcher, and all that is registered there. Lives in the hub's thread only."""

    name = "python"

    def __init__(self) -> None:
        hub = get_hub()
        self._loop: Any = hub.loop
        self._hub_switch: Callable[[], Any] = hub.switch
        self._epoll = select.epoll()
        self._table: list[Any] = []  # descriptor → Half, or callable(events), or None
        self._pairs: dict[Pair, None] = {}
        self._again: deque[Half] = deque()
        self._again_scheduled = False
        self._in_batch = False
        self._graveyard: list[RawSocket] = []
        self._free_pipes: list[tuple[int, int]] = []
        self.pipes = 0  # that exist, free or not
        self.max_pipes = _MAX_PIPES
        self.pipe_size = _PIPE_SIZE
        self.reads_a_turn = _READS_A_TURN
        self.splices_a_turn = _SPLICES_A_TURN
        self.half_close_timeout = (
            math.inf
        )  # of a pair of which one side has closed; its own idle timeout if that is less
        self.faults = 0  # exceptions that are bugs of ours; each cost at most its pair
        self.rearmed = 0  # times that the watcher was found dead
        self.alarms = Alarms(self._loop)
        self._watcher = self._loop.io(self._epoll.fileno(), 1)
        self._watcher.start(self._drain)

    # ---------------------------------------------------------------- for greenlets that set up a connection

    def register(self, fd: int) -> None:
        """Register a socket, once in its life. If it is ready now, the next batch brings an event for it."""
        table = self._table
        if fd >= len(table):
            table.extend([None] * (fd + 64 - len(table)))
        self._epoll.register(fd, _REGISTERED)

    def wait(self, fd: int, wanted: int = ANY) -> int:
        """Let others run until an event comes for a registered `fd`.

        Args:
            wanted: events; one with none of these is passed over.

        Returns:
            The epoll events; perhaps spurious, so try, then wait, in a loop.

        Raises:
            OSError: EBADF; the socket was closed (its number is -1).
        """
        if fd < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        table = self._table
        switch = table[fd] = getcurrent().switch
        try:
            while True:
                events = self._hub_switch()
                if events.__class__ is not int:
                    return 0
                if events & wanted:
                    return events
        finally:
            if table[fd] is switch:  # else the socket was closed meanwhile, and the number may be another's
                table[fd] = None

    def watch(self, fd: int, callback: Callable[[int], object] | None) -> None:
        """Call `callback(events)` from the hub for each event of `fd`, until something else is set; None: ignore.
        A closed socket (its number is -1) has no events: nothing happens."""
        if fd >= 0:
            self._table[fd] = callback

    def forget(self, sock: RawSocket) -> None:
        """Close our descriptor of a registered socket that another process has, too: it has no events here any more."""
        fd = sock.fileno()
        self._table[fd] = None
        self._epoll.unregister(fd)
        sock.close()

    def close(self, sock: RawSocket, reset: bool = False) -> None:
        """Close a socket that is or was registered; with `reset` the peer sees RST instead of FIN."""
        fd = sock.fileno()
        if fd < 0:
            return
        if fd < len(self._table):
            self._table[fd] = None
        if reset:
            with contextlib.suppress(OSError):
                sock.setsockopt(SOL_SOCKET, SO_LINGER, _LINGER_RESET)
        if self._in_batch:
            self._graveyard.append(sock)
        else:
            self._bury(sock)

    def shortcut(self, transfer: Any, link: Any) -> Shortcut | None:
        """For a session on a native channel (`doors/native/transfer`); None: its events are handled in Python."""
        return None

    # ---------------------------------------------------------------- pairs

    def join(
        self,
        client: RawSocket,
        upstream: RawSocket,
        owner: Owner,
        idle_timeout: float,
        early: bytes,
        client_registered: bool,
        client_readable: bool,
        upstream_events: int,
    ) -> None:
        """Hand both sockets over. `owner.ended` is called when the pair is closed, perhaps before this returns.

        Args:
            early: bytes that the client sent behind its handshake; they go upstream first.
            client_registered: whether `register` was called for the client's socket (upstream is always registered).
            client_readable: whether an edge may have been seen there and not acted upon.
            upstream_events: epoll events that were seen there and not acted upon; GONE if any may have been.
        """
        pair = Pair(client, upstream, owner, idle_timeout)
        self._pairs[pair] = None
        up = pair.up
        up.unsure = client_readable
        pair.down.unsure = bool(upstream_events & UNSURE)
        table = self._table
        table[upstream.fileno()] = pair.down
        if not client_registered:
            try:
                self.register(client.fileno())  # brings an event if there is something to read
            except OSError:  # no memory, or too many watches (epoll_ctl(2))
                self._fault(up)
                return
        table[client.fileno()] = up
        if early:
            up.moved = len(early)
            up.pending = early
            self._guarded(self._flush, up)  # and reads on
        elif client_readable:
            self._guarded(self._pump, up)
        if upstream_events and pair in self._pairs and pair.down.pending is None:
            self._guarded(self._pump, pair.down, upstream_events)

    @property
    def pairs(self) -> int:
        """How many pairs are being relayed."""
        return len(self._pairs)

    @property
    def free_pipes(self) -> int:
        """How many pipes no transfer uses."""
        return len(self._free_pipes)

    def abort_all(self, ending: Ending) -> None:
        """Reset every pair."""
        for pair in list(self._pairs):
            self._abort(pair, ending)

    def abort(self, owner: Owner, ending: Ending) -> bool:
        """Reset the pair of this owner; False: it has none."""
        found = [pair for pair in self._pairs if pair.owner is owner]
        for pair in found:
            self._abort(pair, ending)
        return bool(found)

    def sweep(self, now: float) -> Iterator[None]:
        """Reset pairs that moved no byte for their idle timeout, or of which one side has closed and that moved none
        for `half_close_timeout`; yields now and then so that others can run."""
        if not self._watcher.active:  # never seen; would freeze every relay
            self.rearmed += 1
            self._watcher.start(self._drain)
        for number, pair in enumerate(list(self._pairs), 1):
            if pair in self._pairs:
                self._push_on(pair)
            if pair in self._pairs:
                idle = pair.idle_for(now)
                if idle >= pair.idle_timeout:
                    self._abort(pair, Ending.IDLE_TIMEOUT)
                elif pair.half_closed and idle >= self.half_close_timeout:
                    self._abort(pair, Ending.HALF_CLOSE_TIMEOUT)
                elif idle:
                    self._take_idle_pipes(pair)
            if number % 256 == 0:
                yield

    # ---------------------------------------------------------------- the hot path

    def _drain(self) -> None:
        """Act on one batch of events."""
        table = self._table
        view = _VIEW
        self._in_batch = True
        try:
            for fd, events in self._epoll.poll(0, _EVENTS_A_BATCH):
                half = table[fd]
                if half.__class__ is not Half:
                    if half is not None:
                        try:
                            half(events)
                        except BaseException:
                            self._fault()
                    continue
                try:
                    if events & _OUT:
                        peer = half.peer
                        if peer.pending is not None or peer.in_pipe:
                            self._writable(peer)
                    if not events & _READABLE:
                        continue
                    if half.pending is not None or half.pipe is not None:
                        self._readable(half, events)
                        continue
                    if events & UNSURE:
                        self._last_words(half, events)
                        continue
                    count = half.recv_into(_BUFFER)
                    if not count:
                        self._end_of_file(half)
                        continue
                    if half.moved < _REPLY_CODE:
                        self._hear(half, count)
                    try:
                        sent = half.send(view[:count])
                    except BlockingIOError:
                        sent = 0
                    half.moved += count
                    if sent != count:
                        half.pending = bytes(view[sent:count])
                    elif count == BUFFER_SIZE:
                        self._pump(half)
                except BlockingIOError:
                    pass
                except OSError:
                    self._broken(half)
                except BaseException:
                    self._fault(half)
        finally:
            self._in_batch = False
            graveyard, self._graveyard = self._graveyard, []
            for sock in graveyard:
                self._bury(sock)

    def _bury(self, sock: RawSocket) -> None:
        """Close for good. Some errors of close(2) are those of older writes, and nobody can act on them any more: the
        descriptor is gone all the same."""
        with contextlib.suppress(OSError):
            sock.close()

    def _readable(self, half: Half, events: int) -> None:
        """The source of a direction that holds bytes back, or splices, has something to say."""
        if events & _URGENT:
            half.unsure = True
        if half.pending is not None or half.in_pipe:
            if events & _ERR:  # it was reset; must not wait until the other side reads again
                self._abort(half.pair, self._reset_ending(half))
        else:
            self._splice(half)

    def _last_words(self, half: Half, events: int) -> None:
        """The source has closed, or is gone, or has said something urgent."""
        if events & _URGENT:
            half.unsure = True
        if half.done:
            if events & _DEAD:  # it said FIN before and is gone altogether now
                self._abort(half.pair, self._reset_ending(half))
            return
        self._pump(half, events)

    def _pump(self, half: Half, events: int = GONE) -> None:
        """Read until there is nothing more, within the budget; then queue the half to go on.

        Args:
            events: what the source has told. UNSURE: a short read is not known to be the last one. A FIN that
                is read next leaves in one segment with what was said before it: hence MSG_MORE (send(2)).
        """
        recv_into = half.recv_into
        send = half.send
        unsure = events & UNSURE
        more = MSG_MORE if unsure == _RDHUP else 0
        for _ in range(self.reads_a_turn):
            count = recv_into(_BUFFER)
            if not count:
                self._end_of_file(half, events)
                return
            if half.moved < _REPLY_CODE:
                self._hear(half, count)
            try:
                sent = send(_VIEW[:count], more if count < BUFFER_SIZE else 0)
            except BlockingIOError:
                sent = 0
            half.moved += count
            if sent != count:
                half.pending = bytes(_VIEW[sent:count])
                return
            if count == BUFFER_SIZE:
                half.full_reads += 1
                if half.full_reads >= _FULL_READS_TO_SPLICE and self._take_pipe(half):
                    self._splice(half)
                    return
            else:
                half.full_reads = 0
                if not unsure:
                    return
        self._go_on_later(half)

    def _hear(self, half: Half, count: int) -> None:
        """So many bytes are in the buffer, the first ones of this direction."""
        if half is half.pair.down and (half.moved or _BUFFER[0] in b"45"):
            half.pair.owner.heard(bytes(_VIEW[: min(count, _HEARD)]))

    def _splice(self, half: Half) -> None:
        """Move bytes through the kernel's pipe until there is nothing more, within the budget."""
        assert half.pipe is not None
        read_end, write_end = half.pipe
        source, target, size = half.source.fileno(), half.target.fileno(), self.pipe_size
        for _ in range(self.splices_a_turn):
            try:
                count = os.splice(source, write_end, size, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                if not half.unsure:
                    raise
                count = 0
            if not count:  # the end, or the mark of urgent data: only a read tells
                half.unsure = False
                self._give_pipe(half)
                self._pump(half)
                return
            half.moved += count
            half.in_pipe = count
            self._empty_pipe(half, read_end, target)
            if half.in_pipe:
                return
            if count < _CALM_SPLICE:
                self._give_pipe(half)
                break
        self._go_on_later(half)

    def _empty_pipe(self, half: Half, read_end: int, target: int) -> None:
        while half.in_pipe:
            try:
                half.in_pipe -= os.splice(read_end, target, half.in_pipe, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                return

    def _writable(self, half: Half) -> None:
        """The target of a direction that holds bytes back can take some."""
        if half.in_pipe:
            assert half.pipe is not None
            self._empty_pipe(half, half.pipe[0], half.target.fileno())
            if not half.in_pipe:
                self._read_on(half)
        else:
            self._flush(half)

    def _flush(self, half: Half) -> None:
        pending = half.pending
        if not pending:
            return  # already closed
        try:
            sent = half.send(pending)
        except BlockingIOError:
            return
        if sent < len(pending):
            half.pending = pending[sent:]
            return
        half.pending = None
        self._read_on(half)

    def _read_on(self, half: Half) -> None:
        """What was held back is gone: its source may have had edges meanwhile."""
        with contextlib.suppress(BlockingIOError):
            if half.pipe is not None:
                self._splice(half)
            else:
                self._pump(half)

    def _push_on(self, pair: Pair) -> None:
        """Try bytes that are held back once more. The kernel refuses some for want of memory while nothing is in flight
        to that target, and then no edge tells that it would take them again."""
        for half in (pair.up, pair.down):
            if (half.pending or half.in_pipe) and not _in_flight(half.target):
                self._guarded(self._writable, half)

    def _go_on_later(self, half: Half) -> None:
        if half.queued:  # an event came first and used up a budget of its own
            return
        half.queued = True
        self._again.append(half)
        if not self._again_scheduled:
            self._again_scheduled = True
            self._loop.run_callback(self._go_on)

    def _go_on(self) -> None:
        """Continue the halves whose budget was used up; those that hold bytes back by now go on when these are gone."""
        self._again_scheduled = False
        for _ in range(len(self._again)):
            half = self._again.popleft()
            half.queued = False
            if half.pending is None and not half.in_pipe and not half.done:
                self._guarded(self._read_on, half)

    def _guarded(self, step: Callable[..., None], half: Half, *arguments: int) -> None:
        """Run one step of a half outside a batch, with the same safety net."""
        try:
            step(half, *arguments)
        except BlockingIOError:
            pass
        except OSError:
            self._broken(half)
        except BaseException:
            self._fault(half)

    # ---------------------------------------------------------------- ends

    def _end_of_file(self, half: Half, events: int = 0) -> None:
        """The source said FIN: so do we, to the target; or both have. A reset right behind the FIN is told by these
        events only."""
        if half.done:
            return
        half.done = True
        pair = half.pair
        if half.peer.done:
            self._finish(
                pair, Ending.CLIENT_CLOSED if pair.first_done is pair.up else Ending.UPSTREAM_CLOSED, reset=False
            )
            return
        if events & _DEAD and not _has_peer(half.source):
            self._abort(pair, self._reset_ending(half))
            return
        pair.first_done = half
        half.target.shutdown(SHUT_WR)

    def _broken(self, half: Half) -> None:
        """A system call on this half failed: find out which side it was, and pass it on as RST."""
        pair = half.pair
        if pair not in self._pairs:
            return
        # A socket that was reset has no peer any more; so has one that was closed both ways, but that is no reset.
        culprit = half
        if (half.peer.done or _has_peer(half.source)) and not _has_peer(half.target):
            culprit = half.peer
        self._abort(pair, self._reset_ending(culprit))

    def _reset_ending(self, half: Half) -> Ending:
        return Ending.CLIENT_RESET if half is half.pair.up else Ending.UPSTREAM_RESET

    def _fault(self, half: Half | None = None) -> None:
        """An exception that is a bug of ours: told by the loop's error handler, and it costs this pair only."""
        self.faults += 1
        with contextlib.suppress(Exception):  # standard error may be gone
            self._loop.handle_error(self, *sys.exc_info())
        if half is not None:
            self._abort(half.pair, Ending.INTERNAL_ERROR)

    def _abort(self, pair: Pair, ending: Ending) -> None:
        if pair in self._pairs:
            self._finish(pair, ending, reset=True)

    def _finish(self, pair: Pair, ending: Ending, reset: bool) -> None:
        """The one way out of `_pairs`."""
        del self._pairs[pair]
        up, down = pair.up, pair.down
        self.close(up.source, reset)
        self.close(down.source, reset)
        up_bytes, down_bytes = up.delivered, down.delivered
        for half in (up, down):
            if half.pipe is not None:
                self._give_pipe(half)
            half.pending = _CLOSED
            half.done = True
        # Nothing of it refers to itself any more: it is freed now, and not by a run of the garbage collector.
        pair.up = pair.down = up.peer = down.peer = _NO_HALF
        pair.first_done = None
        try:
            pair.owner.ended(ending, up_bytes, down_bytes)
        except BaseException:
            self._fault()

    # ---------------------------------------------------------------- pipes

    def _take_pipe(self, half: Half) -> bool:
        if self._free_pipes:
            half.pipe = self._free_pipes.pop()
            return True
        half.full_reads = 0  # ask again only after as many full reads
        if self.pipes >= self.max_pipes:
            return False
        try:
            pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.fcntl(pipe[0], fcntl.F_SETPIPE_SZ, self.pipe_size)
        except OSError:  # the user's allowance of big pipes is used up
            os.close(pipe[0])
            os.close(pipe[1])
            self.max_pipes = self.pipes
            return False
        self.pipes += 1
        half.pipe = pipe
        return True

    def _give_pipe(self, half: Half) -> None:
        assert half.pipe is not None
        if half.in_pipe:  # it holds a dead connection's bytes
            os.close(half.pipe[0])
            os.close(half.pipe[1])
            self.pipes -= 1
            half.in_pipe = 0
        else:
            self._free_pipes.append(half.pipe)
        half.pipe = None
        half.full_reads = 0

    def _take_idle_pipes(self, pair: Pair) -> None:
        """A transfer that stopped in the middle must not keep others from splicing."""
        for half in (pair.up, pair.down):
            if half.pipe is not None and not half.in_pipe:
                self._give_pipe(half)

    def stop(self) -> None:
        """Give everything up; for tests and the end of the program."""
        self.abort_all(Ending.DRAIN_TIMEOUT)
        self.alarms.stop()
        self._watcher.stop()
        self._watcher.close()
        self._epoll.close()
        for pipe in self._free_pipes:
            os.close(pipe[0])
            os.close(pipe[1])
        self.pipes -= len(self._free_pipes)
        self._free_pipes.clear()


def _in_flight(sock: RawSocket) -> int:
    """Bytes that were taken and are not acknowledged: as long as there are some, an edge will come."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _has_peer(sock: RawSocket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _engine_class() -> type[Engine]:
    with contextlib.suppress(ImportError):
        from proxy.net import _fastrelay

        return _fastrelay.Engine
    return Engine


def make_engine() -> Engine:
    """The compiled engine if it was built and is not left out (`proxy.form`), else this module's."""
    return _engine_class()()


def engine_name() -> str:
    """Which engine `make_engine` makes: `compiled` or `python`; for --version."""
    return _engine_class().name
