"""The keepalive pool's doing: cleans connections that are given back, watches them while they are idle, hands them out.

What may be kept, for whom and how long is `pool`'s decision; what a clean session is, `smtp`'s. Here are the sockets:
RSET before an idle life, an eye on the socket during it, QUIT at its end. One greenlet sweeps; cleaning and parting
happen in the hub (`exchange`). An idle connection has no greenlet and no timer.

Each connection here holds its throttle places until its socket is closed. Nobody waits for a place that an idle
connection holds: it gives way at once, or goes, with its place, to the very client that waited.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any, Final

from gevent import get_hub
from gevent.event import Event

from proxy.egress.exchange import Exchange
from proxy.egress.leaving import Leaving
from proxy.egress.office import Office
from proxy.egress.pool import Discarded, Entry, Pool, PoolKey, PoolSettings
from proxy.egress.receiver import Receiver
from proxy.model import Discard
from proxy.net.addresses import own_addresses
from proxy.net.alarm import TimeIsUp
from proxy.net.conversation import may_wait, receive, send_all
from proxy.net.crew import Crew
from proxy.net.relay import Engine
from proxy.net.tls import Stream
from proxy.net.turns import TurnOver
from proxy.protocols.smtp.dialogue import Quit, Rset
from proxy.stats import Counters
from proxy.throttling.flows import Places, Throttle

#: Seconds for the 250 to the first RSET, and for the 221 to QUIT.
_RSET_SECONDS = 10.0
_QUIT_SECONDS = 5.0
#: Who has been idle for longer says RSET once more before it is handed out, and has this long to be answered: a
#: receiver may have vanished without a FIN, and the next user would wait for it as long as its own patience lasts.
_PROBE_AFTER = 5.0
_PROBE_SECONDS = 3.0
_READ_SIZE: Final = 4096

#: Reasons for which the receiver may be alive and waiting for a command, and nobody is in a hurry: QUIT is said and
#: answered.
_POLITE: Final = frozenset(
    {
        Discard.NOT_OFFERED,
        Discard.LONE_DOT,
        Discard.HELLO,
        Discard.AUTH,
        Discard.BDAT,
        Discard.XCLIENT,
        Discard.UNKNOWN_VERB,
        Discard.DISABLED,
        Discard.MAX_AGE,
        Discard.MAX_IDLE,
        Discard.MAX_MESSAGES,
        Discard.PEER_LIMIT,
        Discard.MAX_ERRORS,
        Discard.MAX_CACHED,
        Discard.MAX_CACHED_PER_DESTINATION,
        Discard.DRAINING,
    }
)
#: The same in a hurry: QUIT is said, and the socket is closed in the same call.
_PRESSED: Final = frozenset({Discard.YIELDED, Discard.OVERLOADED})


class Keeper:
    """All connections to receivers that no client uses at the moment: being cleaned, idle, or being parted from."""

    def __init__(self, engine: Engine, crew: Crew, counters: Counters, settings: PoolSettings, office: Office) -> None:
        self._engine = engine
        self._crew = crew
        self._counters = counters
        self._office = office
        self._pool = Pool(settings)
        self._cleaning = 0
        self._parting: dict[Receiver, None] = {}  # QUIT is said or will be; in this order
        self._lent: dict[Receiver, Callable[[], object]] = {}  # of idle clients, those idle longest first
        self._leaving = Leaving(engine, office, settings.throttle_close_timeout)
        self._armed: float | None = None  # when the sweeper wakes up; None: when it is told to
        self._changed = Event()
        self._loop: Any = get_hub().loop

    @property
    def cached(self) -> int:
        """Connections held here, in whatever state."""
        return len(self._pool) + self._cleaning + len(self._parting)

    @property
    def pool(self) -> Pool:
        """The index, for the status."""
        return self._pool

    # ---------------------------------------------------------------- for channels

    def take(
        self,
        key: PoolKey,
        claim: Callable[[Receiver], bool],
        seconds: float = _PROBE_SECONDS,
        with_places: bool = False,
    ) -> Receiver | None:
        """A live connection of this key, the caller's now; None: there is none to be had.

        Waits for the answer of one that has been idle for long. A caller that is thrown out of it holds nothing.

        Args:
            claim: asked for a live connection whether the caller may have it (its places change hands there); if not,
                it stays as it was.
            seconds: the longest to wait for an answer, if that is less than usual.
            with_places: the caller has places, and perhaps with them the promise of a connection.
        """
        while True:
            entry, discarded = self._pool.take(key, monotonic(), with_places)
            self._part(discarded)
            if entry is None:
                return None
            receiver = _receiver(entry)
            reason = _look(receiver) or _homeless(receiver) or self._probe(entry, min(seconds, _PROBE_SECONDS))
            if reason is not None:
                self._part([self._pool.reject(entry, reason)])
                if reason is Discard.TIMED_OUT:  # so will the others that lead there: nobody shall wait for each
                    self._part(self._pool.remove_older(entry, reason))
            elif self._claimed(entry, receiver, claim):
                self._engine.watch(receiver.stream.socket.fileno(), receiver.miss)
                return receiver
            else:
                self._pool.put_back(entry)
                self._give_way(entry)
                return None

    def give(self, receiver: Receiver, key: PoolKey, look: bool = True) -> None:
        """Take a connection back; whether it is fit to be kept turns out behind the caller's back.

        Args:
            look: see `Exchange.begin`.
        """
        limits = receiver.place.throttles if receiver.place is not None else ()
        entry = Entry(
            receiver, key, receiver.opened_at, receiver.messages, receiver.mailmax, receiver.errors, limits=limits
        )
        self._cleaning += 1
        self._clean(entry, look)

    def decline(self, reason: Discard) -> None:
        """Count a connection that was offered and is not fit; the caller closes it."""
        self._pool.decline(reason)
        self._counters.discarded.count(reason)

    def part(self, receiver: Receiver, reason: Discard, look: bool = True) -> None:
        """Close a connection whose receiver waits for a command, with QUIT; counts nothing, see `decline`.

        Args:
            look: see `Exchange.begin`.
        """
        self._say_quit(receiver, reason, look)

    def close(self, receiver: Receiver, reset: bool = False) -> None:
        """Close a connection that is of no more use; its places are given back, see `leaving`."""
        self._leaving.close(receiver.stream, receiver.place, reset)

    def close_early(self, stream: Stream, places: Places | None) -> None:
        """The same for one on which no session came up."""
        self._leaving.close(stream, places)

    def lend(self, receiver: Receiver, taken: Callable[[], object]) -> None:
        """The client of this connection is idle: should somebody wait for its place, `taken` is called, once, and the
        connection is to be given as soon as may be. It must not wait."""
        self._lent[receiver] = taken

    def keep(self, receiver: Receiver) -> None:
        """The client goes on; also after it was taken."""
        self._lent.pop(receiver, None)

    # ---------------------------------------------------------------- housekeeping

    def make_way(self, throttle: Throttle, count: int) -> bool:
        """So many places are missing under this throttle: a connection that holds a place there is closed now; False:
        none does, or as many are being closed already."""
        if self._leaving.under(throttle) >= count:
            return False
        for receiver in self._parting:
            if receiver.place is not None and throttle in receiver.place.throttles:
                self._parted(receiver)
                return True
        discarded = self._pool.yield_for(throttle)
        if discarded is not None:
            self._part([discarded])
            return True
        for receiver in self._lent:
            if receiver.place is not None and throttle in receiver.place.throttles:
                self._lent.pop(receiver)()
                break
        return False  # its place is free when it is clean

    def give_way(self, throttle: Throttle, count: int) -> int:
        """The same as often as need be; how many places will be free. Who waits may be one of ours, who asks for a
        connection that has become idle meanwhile: then it goes with its place."""
        made = 0
        for entry in self._pool.under(throttle):
            if made < count and self._office.awaited(entry.key):
                self._crew.run(self._pass_on, _receiver(entry), entry.key)
                made += 1
        while made < count and self.make_way(throttle, count):
            made += 1
        return max(made, self._leaving.under(throttle))

    def run(self) -> None:
        """Give up what has come to its age; for a greenlet of its own."""
        while True:
            self._armed = due = self._pool.next_expiry()
            self._changed.clear()
            self._changed.wait(None if due is None else max(0.0, due - monotonic()))
            self._part(self._pool.expire(monotonic()))

    def apply(self, settings: PoolSettings) -> None:
        """New settings hold for what is held already, too."""
        self._leaving.seconds = settings.throttle_close_timeout
        self._part(self._pool.apply(settings, monotonic()))
        self._changed.set()

    def forsake(self, source: str) -> int:
        """An address of this machine is gone: close what leaves from it; how many that were."""
        gone = self._pool.forsake(source)
        self._part(gone)
        return len(gone)

    def shed(self, count: int) -> None:
        """Descriptors are short: close `count` connections now."""
        self._part(self._pool.shed(count - self._leaving.hurry(count)))

    def drain(self) -> None:
        """Say QUIT to all; nothing is kept from now on. `cached` falls to zero."""
        self._part(self._pool.drain())

    # ---------------------------------------------------------------- on the way in

    def _clean(self, entry: Entry, look: bool) -> None:
        """RSET, and the connection is idle; or it is closed."""
        rset = Rset()
        stream = _receiver(entry).stream

        def receive(data: bytes) -> bool:
            return rset.receive(data) or rset.reason is not None

        def over(reason: Discard | None) -> None:
            self._cleaned(entry, reason or rset.reason)

        Exchange(self._engine, stream, rset.command, receive, over).begin(_RSET_SECONDS, look)

    def _cleaned(self, entry: Entry, reason: Discard | None) -> None:
        receiver = _receiver(entry)
        if reason is None and not may_wait(receiver.stream):
            reason = _look(receiver)  # up to EAGAIN: whatever comes later makes an edge
        self._cleaning -= 1
        if reason is not None:
            self.decline(reason)
            self.close(receiver)
            return
        receiver.guard()
        self._engine.watch(receiver.stream.socket.fileno(), partial(self._idle_event, receiver))
        self._part(self._pool.offer(entry, monotonic()))
        if self._office.wanted(receiver.place):
            self._crew.run(self._give_way, entry)  # which may have to ask another process
        if self._armed is None or self._pool.expiry_of(entry) < self._armed:
            self._changed.set()

    def _claimed(self, entry: Entry, receiver: Receiver, claim: Callable[[Receiver], bool]) -> bool:
        """Whether the caller has it; it may have to wait for that, in a process that has to ask another one."""
        self._cleaning += 1
        receiver.missed = False
        try:
            return claim(receiver)
        except BaseException:  # whoever asked is gone
            self._pool.put_back(entry)
            self._give_way(entry)
            raise
        finally:
            self._cleaning -= 1

    def _probe(self, entry: Entry, seconds: float) -> Discard | None:
        """Why a connection that was taken out of the pool cannot be handed out after all, or None."""
        if monotonic() - max(entry.idle_since, entry.proven_at) < _PROBE_AFTER:
            return None
        receiver = _receiver(entry)
        fd = receiver.stream.socket.fileno()
        self._engine.watch(fd, None)
        self._cleaning += 1
        try:
            reason = self._reset(receiver, seconds)
        except BaseException:  # whoever asked is gone, and the answer is still to come
            self._part([self._pool.reject(entry, Discard.OUTSTANDING)])
            raise
        finally:
            self._cleaning -= 1
        if reason is not None:
            return reason
        entry.proven_at = monotonic()
        self._engine.watch(fd, partial(self._idle_event, receiver))
        return self._pool.unfit(entry, entry.proven_at)  # a stop or a reload may have come meanwhile

    def _give_way(self, entry: Entry) -> None:
        """Somebody may have begun to wait for the place of a connection while it was not to be had."""
        receiver = _receiver(entry)
        if receiver in self._pool and self._office.wanted(receiver.place):
            self._pass_on(receiver, entry.key)

    def _reset(self, receiver: Receiver, seconds: float) -> Discard | None:
        """Why the session cannot be kept, or None."""
        rset = Rset()
        alarm = self._engine.alarms.start(seconds)
        try:
            send_all(self._engine, receiver.stream, rset.command)
            while rset.reason is None:
                data = receive(self._engine, receiver.stream, _READ_SIZE)
                if not data:
                    return Discard.PEER_CLOSED
                if rset.receive(data):
                    return _look(receiver)  # up to EAGAIN: whatever comes later makes an edge
            return rset.reason
        except OSError:
            return Discard.PEER_CLOSED
        except TimeIsUp as up:
            if up.alarm is not alarm:
                raise
            return Discard.TIMED_OUT
        finally:
            alarm.cancel()

    def _pass_on(self, receiver: Receiver, key: PoolKey) -> None:
        """Somebody waits for this connection's place: it gets the place, and the connection if it wants just this one.

        Otherwise the socket is closed in this very call, and its place stays taken until the receiver has closed, too:
        at no time are more connections open than places allow, here or there.
        """
        places = receiver.place
        if places is None or receiver not in self._pool or not self._office.awaited(key):
            self._unclaimed(receiver)
            return
        self._pool.promise(receiver)
        if self._office.pass_on(places, key):
            if receiver.place is places:  # else the one who is next has been here already
                receiver.place = None
            # Whoever got the place was woken before this is called, and has taken the connection by then.
            self._loop.run_callback(self._unclaimed, receiver)
        else:
            self._unclaimed(receiver)

    def _unclaimed(self, receiver: Receiver) -> None:
        """It must go, unless the one who has its place now has taken the connection, too."""
        discarded = self._pool.remove(receiver, Discard.YIELDED)
        if discarded is not None:
            self._part([discarded])

    def _idle_event(self, receiver: Receiver, _events: int) -> None:
        """An idle receiver has nothing to say: TLS's own messages are read, anything else is the end."""
        receiver.missed = True
        reason = _look(receiver)
        if reason is not None and (discarded := self._pool.remove(receiver, reason)) is not None:
            self._part([discarded])

    # ---------------------------------------------------------------- on the way out

    def _part(self, discarded: list[Discarded]) -> None:
        """Count, and close politely or at once."""
        for entry, reason in discarded:
            self._counters.discarded.count(reason)
            self._say_quit(_receiver(entry), reason)

    def _say_quit(self, receiver: Receiver, reason: Discard, look: bool = True) -> None:
        """QUIT, as far as the reason allows it, and close."""
        if reason in _POLITE:
            self._parting[receiver] = None
            self._quit(receiver, look)
            return
        if reason in _PRESSED:
            with contextlib.suppress(OSError):
                receiver.stream.send(Quit.command)
        self.close(receiver)

    def _quit(self, receiver: Receiver, look: bool) -> None:
        """QUIT, and its answer."""
        if receiver in self._parting:  # else its place was wanted meanwhile
            farewell = Quit()
            over = partial(self._parted_from, receiver)
            Exchange(self._engine, receiver.stream, farewell.command, farewell.receive, over).begin(_QUIT_SECONDS, look)

    def _parted_from(self, receiver: Receiver, _reason: Discard | None) -> None:
        self._parted(receiver)

    def _parted(self, receiver: Receiver) -> None:
        """Close a connection that QUIT was said to; a second time does nothing."""
        if receiver in self._parting:
            del self._parting[receiver]
            self.close(receiver)


def _homeless(receiver: Receiver) -> Discard | None:
    """Whether the address that the connection leaves from has gone: then no answer would ever come."""
    return None if receiver.source in own_addresses() else Discard.SOURCE_GONE


def _receiver(entry: Entry) -> Receiver:
    assert isinstance(entry.connection, Receiver)
    return entry.connection


def _look(receiver: Receiver) -> Discard | None:
    """What speaks against an idle connection, without waiting: None if there is nothing to read.

    A few messages of TLS's own are nothing; one that has more of them than fit in a turn is not idle.
    """
    try:
        data = receiver.stream.recv(_READ_SIZE)
    except BlockingIOError:
        return None
    except TurnOver:
        return Discard.PEER_SPOKE
    except OSError:
        return Discard.PEER_CLOSED
    return Discard.PEER_SPOKE if data else Discard.PEER_CLOSED
