"""The keepalive pool's doing: cleans connections that are given back, watches them while they are idle, hands them out.

What may be kept, for whom and how long is `pool`'s decision; what a clean session is, `smtp`'s. Here are the sockets:
RSET before an idle life, an eye on the socket during it, QUIT at its end. One greenlet sweeps; cleaning and parting
run in pooled ones. An idle connection has no greenlet and no timer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from time import monotonic

from gevent import Timeout
from gevent.event import Event

from proxy.conversation import receive, send_all
from proxy.crew import Crew
from proxy.model import Discard
from proxy.pool import Discarded, Entry, Pool, PoolKey, PoolSettings
from proxy.receiver import Receiver
from proxy.relay import Engine
from proxy.smtp import Quit, Rset
from proxy.stats import Counters
from proxy.throttle import Throttle

#: Seconds for the 250 to RSET, and for the 221 to QUIT.
_RSET_SECONDS = 10.0
_QUIT_SECONDS = 5.0
_READ_SIZE = 4096

#: Reasons after which the receiver is alive and in a known state: it is told QUIT. After all others there is no point.
_POLITE = frozenset(
    {
        Discard.DISABLED,
        Discard.MAX_AGE,
        Discard.MAX_IDLE,
        Discard.MAX_MESSAGES,
        Discard.PEER_LIMIT,
        Discard.MAX_CACHED,
        Discard.MAX_CACHED_PER_DESTINATION,
        Discard.DRAINING,
        Discard.OVERLOADED,
    }
)


class Keeper:
    """All connections to receivers that no client uses at the moment: being cleaned, idle, or being parted from.

    Args:
        closed: is told each connection of ours whose socket is closed, so that its throttle places come back.
    """

    def __init__(
        self, engine: Engine, crew: Crew, counters: Counters, settings: PoolSettings, closed: Callable[[Receiver], None]
    ) -> None:
        self._engine = engine
        self._crew = crew
        self._counters = counters
        self._closed = closed
        self._pool = Pool(settings)
        self._busy = 0  # being cleaned or parted from
        self._changed = Event()

    @property
    def cached(self) -> int:
        """Connections held here, in whatever state."""
        return len(self._pool) + self._busy

    @property
    def pool(self) -> Pool:
        """The index, for the status."""
        return self._pool

    # ---------------------------------------------------------------- for channels

    def take(self, key: PoolKey) -> Receiver | None:
        """A live connection of this key, the caller's now; None: there is none."""
        while True:
            entry, discarded = self._pool.take(key, monotonic())
            self._part(discarded)
            if entry is None:
                return None
            receiver = _receiver(entry)
            self._engine.watch(receiver.stream.socket.fileno(), None)
            reason = _look(receiver)
            if reason is None:
                return receiver
            self._part([self._pool.reject(entry, reason)])

    def give(self, receiver: Receiver, key: PoolKey) -> None:
        """Take a connection back; whether it is fit to be kept turns out behind the caller's back."""
        entry = Entry(receiver, key, receiver.opened_at, receiver.messages, receiver.mailmax)
        if receiver.place is not None:
            entry.limits = receiver.place.throttles
        self._busy += 1
        self._crew.run(self._clean, entry)

    def part(self, receiver: Receiver, reason: Discard) -> None:
        """Close a connection that was taken and cannot be used, for a reason that is not its own."""
        self._counters.discarded.count(reason)
        self._say_quit(receiver)

    def make_way(self, throttle: Throttle) -> None:
        """Somebody waits under this throttle: a cached connection that holds a place there gives it up at once."""
        discarded = self._pool.yield_for(throttle)
        if discarded is not None:
            receiver = _receiver(discarded.entry)
            self._counters.discarded.count(discarded.reason)
            self._engine.watch(receiver.stream.socket.fileno(), None)
            self._say_goodbye(receiver)

    def decline(self, reason: Discard) -> None:
        """Count a connection that was offered and is not fit."""
        self._pool.decline(reason)
        self._counters.discarded.count(reason)

    # ---------------------------------------------------------------- housekeeping

    def run(self) -> None:
        """Give up what has come to its age; for a greenlet of its own."""
        while True:
            due = self._pool.next_expiry()
            self._changed.clear()
            self._changed.wait(None if due is None else max(0.0, due - monotonic()))
            self._part(self._pool.expire(monotonic()))

    def apply(self, settings: PoolSettings) -> None:
        """New settings hold for what is held already, too."""
        self._part(self._pool.apply(settings, monotonic()))
        self._changed.set()

    def shed(self, count: int) -> None:
        """Descriptors are short: give up `count` connections."""
        self._part(self._pool.shed(count))

    def drain(self) -> None:
        """Say QUIT to all; nothing is kept from now on. `cached` falls to zero."""
        self._part(self._pool.drain())

    # ---------------------------------------------------------------- inside

    def _clean(self, entry: Entry) -> None:
        """RSET, and the connection is idle; or it is closed."""
        receiver = _receiver(entry)
        reason = self._reset(receiver)
        self._busy -= 1
        if reason is not None:
            self.decline(reason)
            self._close(receiver)
            return
        self._engine.watch(receiver.stream.socket.fileno(), partial(self._idle_event, receiver))
        self._part(self._pool.offer(entry, monotonic()))
        self._idle_event(receiver, 0)  # an edge may have come before we watched
        self._changed.set()

    def _reset(self, receiver: Receiver) -> Discard | None:
        """Why the session cannot be kept, or None."""
        rset = Rset()
        timer = Timeout.start_new(_RSET_SECONDS)
        try:
            send_all(self._engine, receiver.stream, rset.command)
            while rset.reason is None:
                data = receive(self._engine, receiver.stream, _READ_SIZE)
                if not data:
                    return Discard.PEER_CLOSED
                if rset.receive(data):
                    return _look(receiver)
            return rset.reason
        except OSError:
            return Discard.PEER_CLOSED
        except Timeout as fired:
            if fired is not timer:
                raise
            return Discard.TIMED_OUT
        finally:
            timer.close()

    def _idle_event(self, receiver: Receiver, _events: int) -> None:
        """An idle receiver has nothing to say: TLS's own messages are read, anything else is the end."""
        reason = _look(receiver)
        if reason is not None and (discarded := self._pool.remove(receiver, reason)) is not None:
            self._part([discarded])

    def _part(self, discarded: list[Discarded]) -> None:
        """Count, and close politely or at once."""
        for entry, reason in discarded:
            self._counters.discarded.count(reason)
            receiver = _receiver(entry)
            if reason in _POLITE:
                self._say_quit(receiver)
            else:
                self._close(receiver)

    def _say_quit(self, receiver: Receiver) -> None:
        self._busy += 1
        self._crew.run(self._quit, receiver)

    def _say_goodbye(self, receiver: Receiver) -> None:
        """QUIT without waiting for the answer: the place is wanted now."""
        with contextlib.suppress(OSError):
            receiver.stream.send(Quit.command)
        self._close(receiver)

    def _quit(self, receiver: Receiver) -> None:
        engine, stream, farewell = self._engine, receiver.stream, Quit()
        engine.watch(stream.socket.fileno(), None)
        timer = Timeout.start_new(_QUIT_SECONDS)
        try:
            send_all(engine, stream, farewell.command)
            while data := receive(engine, stream, _READ_SIZE):
                if farewell.receive(data):
                    break
        except OSError:
            pass
        except Timeout as fired:
            if fired is not timer:
                raise
        finally:
            timer.close()
            self._busy -= 1
            self._close(receiver)

    def _close(self, receiver: Receiver) -> None:
        self._engine.close(receiver.stream.socket)
        self._closed(receiver)


def _receiver(entry: Entry) -> Receiver:
    assert isinstance(entry.connection, Receiver)
    return entry.connection


def _look(receiver: Receiver) -> Discard | None:
    """What speaks against an idle connection, without waiting: None if there is nothing to read."""
    try:
        data = receiver.stream.recv(_READ_SIZE)
    except BlockingIOError:
        return None
    except OSError:
        return Discard.PEER_CLOSED
    return Discard.PEER_SPOKE if data else Discard.PEER_CLOSED
