"""The connection to a receiver that a dialogue of mode smtp has now: watched, lent, left as the dialogue left it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gevent import get_hub

from proxy.doors.smtp.books import Books
from proxy.doors.smtp.egress import Egress, Line, Preview
from proxy.doors.smtp.wire import Wires
from proxy.model import Discard
from proxy.net.alarm import TimeIsUp
from proxy.protocols.smtp.mediator import Mediator
from proxy.protocols.smtp.states import State, Want
from proxy.services import Services

#: A client that is silent for so long between two messages lets others have its connection.
_SILENCE: Final = 1.0
#: Of a dialogue: nothing that only the client's own session could be the reason for.
_DIRTY: Final = frozenset({Discard.OUTSTANDING, Discard.IN_DATA})


class Holding:
    """Of one client; all of it in its greenlet, but for what says otherwise.

    Attributes:
        line: the connection, if there is one. preview: what the client is told before it has any.
        kept: whether the last one that was left was given to whoever comes next.
    """

    def __init__(
        self,
        services: Services,
        egress: Egress,
        first: Line | Preview,
        mediator: Mediator,
        wires: Wires,
        books: Books,
    ) -> None:
        self.egress = egress
        self.line = first if isinstance(first, Line) else None
        self.preview = first if isinstance(first, Preview) else None
        self.kept = False
        self._services = services
        self._mediator = mediator
        self._wires = wires
        self._books = books
        self._taken = False
        self._lent = False

    def attach(self) -> None:
        """Watch it from now on."""
        assert self.line is not None
        self._wires.attach(self.line.stream, self.egress.missed(self.line))

    def lose(self) -> None:
        """It is the egress's again, or no more."""
        self._wires.detach()
        self.line = None

    def wait(self, step: Callable[[], bool]) -> None:
        """Until something happens. An idle client's connection may meanwhile be taken by who waits for one, and is for
        all after a while.

        Args:
            step: what the hub does while the client is not idle, see `Wires.wait`.
        """
        mediator, line = self._mediator, self.line
        if line is None or not mediator.idle:
            self._wires.wait(step)
            return
        self.egress.lend(line, self._take)
        self._lent = True
        alarm = self._services.engine.alarms.start(_SILENCE) if line.shared else None
        try:
            if not self._taken:
                self._wires.wait()
        except TimeIsUp as fired:
            if fired.alarm is not alarm:
                raise
            self._taken = True
        finally:
            self._lent = False
            if alarm is not None:
                alarm.cancel()
            self.egress.keep(line)
        if self._taken:
            self._taken = False
            if not self._wires.client.readable:
                mediator.taken()

    def _take(self) -> None:
        self._taken = True
        if self._lent:
            self._wires.wake()

    def lend_while_held(self) -> None:
        """A MAIL waits for its slot: meanwhile its connection, and its place, may be somebody else's."""
        if self.line is not None and self._mediator.may_lend:
            self.egress.lend(self.line, self._give_soon)

    def _give_soon(self) -> None:
        get_hub().loop.run_callback(self._give_while_held)

    def _give_while_held(self) -> None:
        if self._mediator.want is Want.SLOT and self.line is not None:  # else the slot was faster
            self.leave()
            self._mediator.left()

    def leave(self) -> None:
        """Part from the receiver, as the dialogue has left it; a second time does nothing."""
        line, self.line = self.line, None
        if line is None:
            return
        mediator = self._mediator
        tracker, verdict, receiver = mediator.tracker, mediator.verdict, self._wires.receiver
        look = receiver is None or receiver.readable
        self._wires.detach()
        line.messages, line.errors = tracker.mails, tracker.errors
        self._books.count(tracker, mediator.in_vain)
        self.egress.carried(line, tracker.accepted, tracker.deferred, tracker.rejected)
        if mediator.death or verdict in _DIRTY or mediator.state is State.RAW or line.greeting is None:
            if line.shared and verdict is not None:
                self._services.keeper.decline(verdict)
            self.egress.drop(line, verdict in _DIRTY)
        elif verdict is None and line.shared and line.hello:
            self.kept = True
            self.egress.give(line, look)
        else:
            self.egress.part(line, verdict or Discard.NOT_OFFERED)
