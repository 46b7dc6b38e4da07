"""The throttle manager's doing: its clock, its one timer, and those who wait for a place or for a message's slot.

`manager` decides and never waits. Here a request for a connection waits in its greenlet until its ticket is admitted or
its time is up; one for a message in its greenlet (`message`) or without any (`ask_slot`). After each call what
follows from it is carried out: tickets are woken, sessions are given what they are to send, notices are logged, and the
timer is set. Many whose time is up together are told in turns. With no throttle configured or named, a connection costs
one look.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable
from time import monotonic
from typing import Any

from gevent import get_hub, getcurrent

from proxy.errors import Throttled
from proxy.log import lines as log
from proxy.model import UNNAMED, Names
from proxy.spans import SPANS
from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Flow, Places, Throttle, Ticket
from proxy.throttling.manager import Manager
from proxy.throttling.overrides import Override
from proxy.throttling.registry import Remark
from proxy.throttling.session import End, Session
from proxy.throttling.throttle import MILLISECOND
from proxy.throttling.wheel import Wheel

_NANOSECONDS = 1_000_000_000
#: Requests whose time is up that are told so before the loop looks at its sockets again.
_TIMED_OUT_A_TURN = 20

#: Told once, in the hub: None: the slot is there, to be used at once; or why there is none. Must not wait.
Answer = Callable[[Throttled | None], None]


def clock_ns() -> int:
    """Nanoseconds of a clock that never steps and goes on while the machine is suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Client:
    """Who serves a session's connection, as the admission sees it."""

    def deliver(self) -> None:
        """Something waits to be sent to the session; must not wait."""
        raise NotImplementedError

    def ended(self, reason: End) -> None:
        """The manager is done with the session: close its connection; must not wait."""
        raise NotImplementedError


class Admission:
    """The one manager and whoever deals with it.

    Args:
        make_way: told a full throttle under which a request waits: a cached connection is to give up its place there;
            says whether one did.
    """

    def __init__(self, manager: Manager, make_way: Callable[[Throttle], bool]) -> None:
        self.manager = manager
        self.clients: dict[Session, Client] = {}
        self._make_way = make_way
        self._hub: Any = get_hub()
        self._waiting: dict[Ticket, Any] = {}  # the greenlets
        self._refused: dict[Ticket, Throttled] = {}  # of those, whose time is up
        self._answers: dict[MessageTicket, Answer] = {}
        self._deadlines: Wheel[Ticket | MessageTicket] = Wheel(10 * MILLISECOND)
        self._keys: dict[Ticket, Hashable] = {}  # what those who wait would share
        self._awaited: Counter[Hashable] = Counter()  # the same, how often
        self._timer: Any = self._hub.loop.timer(0)
        self._armed_for: int | None = None
        self._settling = False

    # ---------------------------------------------------------------- places

    def enter(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        seconds: float,
        key: Hashable = None,
        rated: bool = True,
        names: Names = UNNAMED,
    ) -> Places | None:
        """Wait in fair order for a place under every throttle that applies; None: none does.

        Args:
            owner: instance name, else the client's address.
            seconds: the longest to wait; the proxy's own throttles may say less.
            key: of the cached connection that would do; see `pass_on`.
            rated: whether the connection counts against the rates of the proxy's own throttles; not if its messages do,
                each by `message` or `ask_slot`.
            names: what the client says of its receiver.

        Raises:
            Throttled: not in time; says which throttle, and when to come back.
        """
        manager = self.manager
        if not flows and not manager.blocks:
            return None
        answer = manager.admit(owner, weight, source, destination, flows, clock_ns(), rated, names)
        self.settle()
        if isinstance(answer, Places):
            SPANS.place.observe(0.0)
            return answer
        began = monotonic()
        try:
            self._wait_for(answer, self._longest(answer, seconds), key)
        finally:
            SPANS.place.observe(monotonic() - began)
        return answer.places

    def swap(
        self,
        old: Places | None,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        rated: bool = True,
        names: Names = UNNAMED,
    ) -> tuple[bool, Places | None]:
        """A cached connection changes its user: its places for those of the new one, in one call, without waiting.

        Returns:
            whether it may, and the new places; if not, the old ones are as they were.
        """
        manager = self.manager
        if old is None:
            if not flows and not manager.blocks:
                return True, None
            answer = manager.admit(owner, weight, source, destination, flows, clock_ns(), rated, names)
            if isinstance(answer, Ticket):
                manager.cancel(answer, clock_ns())
                self.settle()
                return False, None
            SPANS.place.observe(0.0)
            self.settle()
            return True, answer
        new = manager.swap(old, owner, weight, source, destination, flows, clock_ns(), rated, names)
        self.settle()
        return new is not None, new

    def leave(self, places: Places | None) -> None:
        """The socket is closed."""
        if places is not None:
            self._wake(self.manager.release(places, clock_ns()))
            self.settle()

    def wanted(self, places: Places | None) -> bool:
        """Whether somebody waits for one of these places."""
        return places is not None and self.manager.wanted(places)

    def awaited(self, key: Hashable) -> bool:
        """Whether one who waits for places, anywhere, asks for this key."""
        return key in self._awaited

    def pass_on(self, places: Places, key: Hashable) -> bool:
        """Give the places of a cached connection to who is next, if that one asks for its key; whether it did.

        It takes over the connection when it runs next. Otherwise the caller has to close the socket: the places are
        taken until it gives them back, so that whoever is next connects when that is done.
        """
        heir = self.manager.heir(places, clock_ns())
        if heir is None or self._keys.get(heir) != key:
            return False
        tickets = self.manager.release(places, clock_ns())
        self._wake(tickets)
        self.settle()
        return heir in tickets

    def _wait_for(self, ticket: Ticket, seconds: float, key: Hashable) -> None:
        """Until the ticket is admitted.

        Raises:
            Throttled: time is up.
        """
        self._waiting[ticket] = getcurrent()
        self._keys[ticket] = key
        self._awaited[key] += 1
        self._let_wait(ticket, seconds)
        try:
            while ticket.places is None:
                refusal = self._refused.pop(ticket, None)
                if refusal is not None:
                    raise refusal
                self._hub.switch()
        except BaseException:
            self._wake(self.manager.cancel(ticket, clock_ns()))
            raise
        finally:
            self._deadlines.disarm(ticket)
            self._refused.pop(ticket, None)
            del self._waiting[ticket]
            del self._keys[ticket]
            self._awaited[key] -= 1
            if not self._awaited[key]:
                del self._awaited[key]
            self.settle()

    def _wake(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket in self._waiting:
                self._hub.loop.run_callback(self._resume, ticket)

    def _resume(self, ticket: Ticket) -> None:
        greenlet = self._waiting.get(ticket)  # by now it may have been called off, and wait for something else
        if greenlet is not None:
            greenlet.switch()

    # ---------------------------------------------------------------- messages

    def message(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        seconds: float,
        waits: Callable[[], object] = lambda: None,
        names: Names = UNNAMED,
    ) -> MessageTicket | None:
        """Wait for `ask_slot` in the running greenlet.

        Args:
            waits: called when the slot is not there at once; must not wait.

        Returns:
            None: nothing limits the message. Else a ticket for `put_off`, if the message does not go at once.

        Raises:
            Throttled: not in time.
        """
        greenlet, answers = getcurrent(), []

        def answer(refusal: Throttled | None) -> None:
            answers.append(refusal)
            greenlet.switch()

        ticket = self.ask_slot(owner, weight, source, destination, flows, seconds, answer, names)
        if ticket not in self._answers:
            SPANS.slot.observe(0.0)
            return ticket
        began = monotonic()
        try:
            waits()
            while not answers:
                self._hub.switch()
        except BaseException:
            self.cancel_message(ticket)
            raise
        finally:
            SPANS.slot.observe(monotonic() - began)
        if answers[0] is not None:
            raise answers[0]
        return ticket

    def put_off(self, ticket: MessageTicket | None) -> bool:
        """The message of a ticket that was granted goes in this moment, which may be later than its slot.

        Returns:
            False: so much later that it needs another slot.
        """
        return ticket is None or self.manager.put_off(ticket, clock_ns())

    def ask_slot(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        seconds: float,
        answer: Answer,
        names: Names,
    ) -> MessageTicket | None:
        """Ask for the slot of one message that the proxy is to pass on, in fair order with all instances' demand.

        Args:
            owner: instance name, else the client's address; one that has a session shares its turns with it.
            weight: as the operator has set it.
            source, destination, names: canonical addresses, and what the client says: the proxy's own throttles that
                match them apply; none without a source.
            flows: a session's paths, whose throttles apply, too.
            seconds: the longest to wait; the proxy's own throttles may say less.
            answer: see `Answer`. Not called if the slot is there at once, nor after `cancel_message`.

        Returns:
            None: nothing limits it. Else a ticket for `cancel_message` and `put_off`; if it is `granted`, the slot is
            there: pass the message on now. The refusal names the throttle (`throttle`) and says when to come back
            (`retry_after`, seconds).
        """
        manager = self.manager
        if not flows and not manager.blocks:
            return None
        ticket = manager.ask_message(owner, weight, source, destination, flows, clock_ns(), names)
        if ticket is not None and not ticket.granted:
            self._answers[ticket] = answer
            self._let_wait(ticket, self._longest(ticket, seconds))
        self.settle()
        return ticket

    def cancel_message(self, ticket: MessageTicket) -> None:
        """Nobody waits for it any more. A slot that has come and was not told of goes to the next; after the answer
        this changes nothing."""
        if self._answers.pop(ticket, None) is not None:
            self._deadlines.disarm(ticket)
            self.manager.cancel_message(ticket, clock_ns())
            self.settle()

    def _answer(self, ticket: MessageTicket, refusal: Throttled | None = None) -> None:
        answer = self._answers.pop(ticket, None)
        if answer is not None:
            self._deadlines.disarm(ticket)
            answer(refusal)

    # ---------------------------------------------------------------- replies of receivers

    @property
    def listens(self) -> bool:
        """Whether refusals are of interest."""
        return self.manager.blocks.listens

    def replied(self, places: Places | None, reply: str, settle_later: bool = False) -> None:
        """A receiver refused something on the connection that has these places; must not wait.

        Whoever asks from now on finds the limits that follow, and so does who waits: to be called before the places are
        given back.

        Args:
            reply: its code and a blank, then its lines, joined by LF.
            settle_later: the caller must not have the engine called, as `settle` may.
        """
        if places is not None and self.listens:
            self.manager.replied(places, reply, clock_ns())
            if settle_later:
                self._hub.loop.run_callback(self.settle)
            else:
                self.settle()

    def end_backoff(self, name: str) -> int | None:
        """End the back-offs of a block by hand; of how many throttles. None: there is no such block."""
        count = self.manager.end_backoff(name, clock_ns())
        self.settle()
        return count

    def set_by_hand(self, override: Override, seconds: float) -> int:
        """Lower limits, or a pause, for so long (`override.until` is set here); its number."""
        now = clock_ns()
        number = self.manager.set_by_hand(override._replace(until=now + int(seconds * _NANOSECONDS)), now)
        self.settle()
        return number

    def end_by_hand(self, fits: Callable[[int, Override], bool]) -> int:
        """End those that fit before their time; how many."""
        count = self.manager.end_by_hand(fits, clock_ns())
        self.settle()
        return count

    def turn_day(self, day: int) -> None:
        """It is this day, counted from 1970-01-01; to be called now and then, since the clock may have been set."""
        self.manager.turn_day(day, clock_ns())
        self.settle()

    # ---------------------------------------------------------------- deadlines

    def _longest(self, ticket: Ticket | MessageTicket, seconds: float) -> float:
        own = self.manager.wait_of(ticket)
        return seconds if own is None else min(seconds, own)

    def _let_wait(self, ticket: Ticket | MessageTicket, seconds: float) -> None:
        self._deadlines.arm(ticket, clock_ns() + int(seconds * _NANOSECONDS))
        self._arm()

    def _time_out(self, now: int) -> None:
        """Tell some of those whose time is up; who has got it meanwhile is about to be told so."""
        for ticket in self._deadlines.expire(now, _TIMED_OUT_A_TURN):
            refusal = self.manager.refusal(ticket, now)
            if isinstance(ticket, MessageTicket):
                if not ticket.granted:
                    self.manager.cancel_message(ticket, now)
                    self._hub.loop.run_callback(self._answer, ticket, refusal)
            elif ticket.places is None:
                self._refused[ticket] = refusal
                self._wake([*self.manager.cancel(ticket, now), ticket])

    # ---------------------------------------------------------------- what follows from a call

    def settle(self) -> None:
        """Carry out what the last calls to the manager have led to. To be called after each."""
        if self._settling:
            return  # a delivery called the manager: the loop below goes round once more
        self._settling = True
        manager = self.manager
        try:
            while True:
                admitted, ready, ended = manager.take_admitted(), manager.take_ready(), manager.take_ended()
                self._wake(admitted)
                granted = manager.take_granted()
                for ticket in granted:
                    self._hub.loop.run_callback(self._answer, ticket)
                blocked = manager.take_blocked()
                for throttle in blocked:
                    # In a pause a place that is given up is nobody's.
                    while throttle.line is not None and throttle.full() and not throttle.closed_until:
                        if not self._make_way(throttle):
                            break
                for session in ready:
                    client = self.clients.get(session)
                    if client is not None:
                        client.deliver()
                for session in ended:
                    client = self.clients.pop(session, None)
                    if client is not None and session.end is not None:
                        client.ended(session.end)
                if not (admitted or granted or ready or ended or blocked):
                    break
            for remark in manager.take_notices():
                self._tell(remark)
        finally:
            self._settling = False
        self._arm()

    def _tell(self, remark: Remark) -> None:
        level, reply = log.INFO if remark.calm else log.WARNING, {"reply": remark.reply} if remark.reply else {}
        log.note(log.Event.THROTTLE, level, remark.detail, notice=remark.notice, instance=remark.instance, **reply)

    def _arm(self) -> None:
        due = self.manager.next_wakeup()
        first = self._deadlines.next_wakeup()
        if first is not None and (due is None or first < due):
            due = first
        if due is None or (self._armed_for is not None and self._armed_for <= due):
            return  # it rings early at worst
        self._armed_for = due
        self._timer.close()
        self._timer = self._hub.loop.timer(max(0.0, (due - clock_ns()) / _NANOSECONDS))
        self._timer.start(self._ring)

    def _ring(self) -> None:
        self._armed_for = None
        now = clock_ns()
        self.manager.advance(now)
        self._time_out(now)
        self.settle()
