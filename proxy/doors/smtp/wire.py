"""The two ends of a mediated dialogue: bytes in and out without waiting, and one place to wait for either.

The rules of the relay hold: try, then wait; an edge is only a hint. What bytes mean is not known here.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from gevent import get_hub, getcurrent

from proxy.doors.smtp.egress import LineStream
from proxy.errors import PeerError, ProxyError
from proxy.net.relay import UNSURE, Engine
from proxy.net.turns import TurnOver
from proxy.policy.turns import READ, Turn

_RESET: Final = select.EPOLLERR | select.EPOLLHUP


class ClientGone(PeerError):
    """The client has closed, or is to be cut off, while something was waited for on its behalf."""

    code = "client_gone"


class InVain(ProxyError):
    """The client has closed its sending side, and what is waited for is of no use to it, or takes too long."""

    code = "client_gone"


class End:
    """One side of a dialogue.

    Args:
        stream: its socket is registered with the engine.
        happened: called in the hub for each event, after it was noted.

    Attributes:
        readable: there may be something to read.
        broken: it was reset; what was sent will not arrive.
        blocked: it has not taken all that it was given.
        moved: bytes read and taken by the stream.
    """

    def __init__(self, engine: Engine, stream: LineStream, happened: Callable[[End, int], None]) -> None:
        self.stream = stream
        self.readable = True
        self.broken = False
        self.blocked = False
        self.moved = 0
        self._unsure = False
        self._engine = engine
        self._happened = happened
        self._unsent = b""

    def watch(self, missed: bool = True) -> None:
        """Note events from now on; those of before may have gone by, if `missed`."""
        self.readable = missed
        self._engine.watch(self.stream.socket.fileno(), self._event)

    def unwatch(self) -> None:
        """Somebody else has the socket now."""
        self._engine.watch(self.stream.socket.fileno(), None)

    def read(self, size: int, turn: Turn, cost: int) -> bytes | None:
        """What there is now; b"" at the end, None: nothing, or the turn is over.

        Args:
            cost: units of the turn for a read that brings `size` bytes, beside those of the read itself.

        Raises:
            OSError: the connection is broken.
        """
        try:
            data = self.stream.recv(size)
        except TurnOver:
            turn.end()
            return None
        except BlockingIOError:
            self.readable = self._unsure = False
            turn.spend(READ, monotonic())
            return None
        taken = len(data)
        turn.spend(READ + cost * taken // size, monotonic())
        self.moved += taken
        self.readable = self._unsure or not self.stream.drained
        if self.stream.unsent:  # TLS has something to say of its own
            self.blocked = True
        return data

    def write(self, data: bytes) -> None:
        """Hand on as much as is taken now; the rest follows by `push`.

        Raises:
            OSError: the connection is broken.
        """
        if not self.blocked:
            self.blocked = True
            try:
                sent = self.stream.send(data)
            except BlockingIOError:
                sent = 0
            self.moved += sent
            if sent == len(data) and not self.stream.unsent:
                self.blocked = False
                return
            data = data[sent:]
        self._unsent = self._unsent + data if self._unsent else data
        self.push()

    def push(self) -> None:
        """Hand on what is held back.

        Raises:
            OSError: the connection is broken.
        """
        stream, unsent = self.stream, self._unsent
        self.blocked = True
        try:
            while unsent:
                sent = stream.send(unsent)
                self.moved += sent
                self._unsent = unsent = unsent[sent:] if sent < len(unsent) else b""
            if stream.unsent:
                stream.flush()
            self.blocked = stream.unsent
        except BlockingIOError:
            pass

    def over(self) -> None:
        """Nobody is told of anything any more."""
        self._happened = _nobody

    def take_unsent(self) -> bytes:
        """What was not taken; the caller sends it."""
        unsent, self._unsent, self.blocked = self._unsent, b"", False
        return unsent

    def _event(self, events: int) -> None:
        self.readable = True
        if events & UNSURE:  # a short read need not be the last one
            self._unsure = True
            if events & _RESET:
                self.broken = True
        self._happened(self, events)


def _nobody(end: End, events: int) -> None:
    """Is told of the events of an end that is over."""


class Wires:
    """The client's end, the receiver's if there is one, and the greenlet that waits for both.

    Args:
        missed: see `End.watch`, of the client.

    Attributes:
        doom: set by `interrupt`: all of it ends now.
    """

    def __init__(self, engine: Engine, client: LineStream, missed: bool = True) -> None:
        self.engine = engine
        self.client = End(engine, client, self._happened)
        self.receiver: End | None = None
        self.doom = False
        self._greenlet: Any = getcurrent()
        self._hub: Any = get_hub()
        self._waiting = False
        self._step: Callable[[], bool] | None = None  # while it waits
        self._trouble: Exception | None = None  # what came of that
        self._hear: Callable[[], float | None] | None = None  # while an errand is under way
        self._timer: Any = None
        self.client.watch(missed)

    @property
    def busy(self) -> bool:
        """Whether there may be anything to move."""
        client, receiver = self.client, self.receiver
        if client.readable or client.blocked or client.broken:
            return True
        return receiver is not None and (receiver.readable or receiver.blocked)

    def attach(self, stream: LineStream, missed: bool) -> None:
        """A receiver, from now on; for `missed` see `End.watch`."""
        self.receiver = End(self.engine, stream, self._happened)
        self.receiver.watch(missed)

    def detach(self) -> None:
        """No receiver any more; whoever has its socket now does as it likes with it."""
        if self.receiver is not None:
            self.receiver.unwatch()
            self.receiver.over()
            self.receiver = None

    def over(self) -> None:
        """All is done; what is left refers to itself no more, and is freed without the garbage collector."""
        self.detach()
        self.client.over()

    def secure(self, stream: LineStream) -> None:
        """The client speaks through this stream now."""
        self.client.stream = stream
        self.client.watch()

    def wait(self, step: Callable[[], bool] | None = None) -> None:
        """Until either end has an event, or somebody wakes us.

        Args:
            step: called in the hub for an event: whether we are needed for what came of it; we go on waiting if not.
                Must not wait. What it raises is raised here.
        """
        self._waiting, self._step = True, step
        try:
            if not self.doom:
                self._hub.switch()
        finally:
            self._waiting, self._step = False, None
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise trouble

    def wake(self) -> None:
        """Let the greenlet look around; must not wait."""
        self._hub.loop.run_callback(self._resume)

    def interrupt(self) -> None:
        """End whatever is in progress; must not wait."""
        self.doom = True
        self._hub.loop.run_callback(self._cancel, ClientGone("to be cut off"))
        self.wake()

    def begin_errand(self, hear: Callable[[], float | None]) -> None:
        """The greenlet goes to wait elsewhere: from now on the client's going away is thrown in as ClientGone, and that
        nothing can come of the errand any more, though the client may still listen, as InVain.

        Args:
            hear: read what the client says meanwhile; the seconds that the errand may take from now on, None: as many
                as it likes. Must not wait. What it raises is thrown in.

        Raises:
            ClientGone, OSError: the client is gone already.
        """
        if self.doom:
            raise ClientGone("to be cut off")
        self._limit(hear())
        self._hear = hear

    def end_errand(self) -> None:
        """The greenlet is back."""
        self._hear = None
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _limit(self, seconds: float | None) -> None:
        if seconds is not None and self._timer is None:
            self._timer = self._hub.loop.timer(seconds)
            self._timer.start(self._cancel, InVain("the client has closed its sending side"))

    def _happened(self, end: End, events: int) -> None:
        if self._waiting:
            try:
                if self._step is not None and not self._step():
                    return
            except Exception as error:
                self._trouble = error
            self._greenlet.switch()
        elif end is self.client and self._hear is not None:
            self._overhear(self._hear, events)

    def _overhear(self, hear: Callable[[], float | None], events: int) -> None:
        why: ProxyError = ClientGone("the client has closed")
        try:
            if not events & _RESET:
                self._limit(hear())
                return
        except OSError:
            pass
        except ProxyError as error:
            why = error
        self._cancel(why)

    def _resume(self) -> None:
        if self._waiting:  # by now it may wait for something else
            self._greenlet.switch()

    def _cancel(self, why: ProxyError) -> None:
        if self._hear is not None:
            self._hear = None
            self._greenlet.throw(why)
