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
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, Protocol

from gevent import get_hub, getcurrent

from proxy.egress.office import Answer, Office, Permit, Slot
from proxy.errors import Throttled
from proxy.log import lines as log
from proxy.model import UNNAMED, Names
from proxy.spans import SPANS
from proxy.throttling.audit import Mail
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


def clock_ns() -> int:
    """Nanoseconds of a clock that never steps and goes on while the machine is suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _elsewhere() -> Throttled:
    return Throttled("another process of the proxy has taken over: ask that one, in a moment", "", 1.0)


class Client:
    """Who serves a session's connection, as the admission sees it."""

    def deliver(self) -> None:
        """Something waits to be sent to the session; must not wait."""
        raise NotImplementedError

    def resume(self) -> None:
        """The manager listens again; must not wait."""
        raise NotImplementedError

    def ended(self, reason: End) -> None:
        """The manager is done with the session: close its connection; must not wait."""
        raise NotImplementedError


class _Request(NamedTuple):
    """What was asked for by who waits. `rated`: see `Office.enter`."""

    owner: str
    weight: float
    source: str
    destination: str
    names: Names
    rated: bool


class Elsewhere(Protocol):
    """The office of another process; `remote` is one. For the calls see `Switch` and `Office`."""

    def ask_place(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        seconds: float,
        answer: Callable[[Throttled | None, Places | None], object],
        key: Hashable,
        rated: bool,
        names: Names,
    ) -> int | None: ...

    def cancel_place(self, id: int) -> None: ...

    def ask_slot(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        seconds: float,
        answer: Answer,
        names: Names = UNNAMED,
    ) -> Slot | None: ...

    def cancel_message(self, ticket: Slot) -> None: ...

    def leave(self, places: Places | None) -> None: ...


class Admission(Office):
    """The one manager and whoever deals with it; for the calls of `Office` see there.

    Args:
        make_way: told a full throttle under which requests wait, and how many places are missing: a cached connection
            is to give up its place there; says whether one did.

    Attributes:
        settled: called when all that follows from a call is done, if there is anybody to be told. handed_over: the
            same, when another process has taken over the manager.
    """

    def __init__(self, manager: Manager, make_way: Callable[[Throttle, int], bool]) -> None:
        self.settled: Callable[[], object] | None = None
        self.handed_over: Callable[[], object] | None = None
        self.manager = manager
        self.clients: dict[Session, Client] = {}
        self._make_way = make_way
        self._hub: Any = get_hub()
        self._waiting: dict[Ticket, Callable[[], object]] = {}  # what goes on with it
        self._refused: dict[Ticket, Throttled] = {}  # of those, whose time is up
        self._answers: dict[MessageTicket, Answer] = {}
        self._deadlines: Wheel[Ticket | MessageTicket] = Wheel(10 * MILLISECOND)
        self._keys: dict[Ticket, Hashable] = {}  # what those who wait would share
        self._awaited: Counter[Hashable] = Counter()  # the same, how often
        self._requests: dict[Ticket | MessageTicket, _Request] = {}  # of those who wait
        self._away: Elsewhere | None = None
        self._moved: dict[Ticket | MessageTicket, Any] = {}  # what those who wait there wait for
        self._timer: Any = self._hub.loop.timer(0)
        self._armed_for: int | None = None
        self._settling = False

    # ---------------------------------------------------------------- places

    @property
    def limited(self) -> bool:
        """See `Office`."""
        return bool(self.manager.blocks)

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
        """See `Office`."""
        manager = self.manager
        if not flows and not manager.blocks:
            return None
        if self._away is not None:
            raise _elsewhere()
        answer = manager.admit(owner, weight, source, destination, flows, clock_ns(), rated, names)
        self.settle()
        if isinstance(answer, Places):
            SPANS.place.observe(0.0)
            return answer
        began = monotonic()
        try:
            request = _Request(owner, weight, source, destination, names, rated)
            self._wait_for(answer, self._longest(answer, seconds), key, request)
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
        """See `Office`. Does not wait."""
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
        """See `Office`."""
        if places is not None:
            self._wake(self.manager.release(places, clock_ns()))
            self.settle()

    def wanted(self, places: Places | None) -> bool:
        """See `Office`."""
        return places is not None and self.manager.wanted(places)

    def awaited(self, key: Hashable) -> bool:
        """See `Office`."""
        return key in self._awaited

    def pass_on(self, places: Places, key: Hashable) -> bool:
        """See `Office`. Does not wait."""
        heir = self.manager.heir(places, clock_ns())
        if heir is None or self._keys.get(heir) != key:
            return False
        tickets = self.manager.release(places, clock_ns())
        self._wake(tickets)
        self.settle()
        return heir in tickets

    def _wait_for(self, ticket: Ticket, seconds: float, key: Hashable, request: _Request) -> None:
        """Until the ticket is admitted.

        Raises:
            Throttled: time is up.
        """
        self._begin_waiting(ticket, seconds, key, request, getcurrent().switch)
        try:
            while ticket.places is None:
                if ticket in self._refused:
                    raise self._refused[ticket]
                self._hub.switch()
        except BaseException:
            self._call_off(ticket)
            raise
        finally:
            self._end_waiting(ticket)
            self.settle()

    def ask_place(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        seconds: float,
        answer: Callable[[Throttled | None, Places | None], object],
        key: Hashable,
        rated: bool,
        names: Names,
    ) -> Places | Ticket | None:
        """See `Switch.ask_place`."""
        manager = self.manager
        if not manager.blocks:
            return None
        ticket = manager.admit(owner, weight, source, destination, (), clock_ns(), rated, names)
        self.settle()
        if isinstance(ticket, Ticket):
            request = _Request(owner, weight, source, destination, names, rated)
            go_on = partial(self._answer_place, ticket, answer)
            self._begin_waiting(ticket, self._longest(ticket, seconds), key, request, go_on)
        return ticket

    def cancel_place(self, ticket: Ticket) -> None:
        """See `Switch.cancel_place`."""
        if ticket in self._waiting:
            self._call_off(ticket)
            self._end_waiting(ticket)
            self.settle()

    def _call_off(self, ticket: Ticket) -> None:
        """Nobody waits for it any more, whether it got in or not."""
        if ticket in self._moved:
            assert self._away is not None
            if ticket.places is not None:
                self._away.leave(ticket.places)
            self._away.cancel_place(self._moved[ticket])
        else:
            self._wake(self.manager.cancel(ticket, clock_ns()))

    def _answer_place(self, ticket: Ticket, answer: Callable[[Throttled | None, Places | None], object]) -> None:
        refusal = self._refused.get(ticket)
        if ticket.places is not None or refusal is not None:
            self._end_waiting(ticket)
            answer(refusal if ticket.places is None else None, ticket.places)

    def _begin_waiting(
        self, ticket: Ticket, seconds: float, key: Hashable, request: _Request, go_on: Callable[[], object]
    ) -> None:
        self._requests[ticket] = request
        self._waiting[ticket] = go_on
        self._keys[ticket] = key
        self._awaited[key] += 1
        self._let_wait(ticket, seconds)

    def _end_waiting(self, ticket: Ticket) -> None:
        self._deadlines.disarm(ticket)
        self._refused.pop(ticket, None)
        self._moved.pop(ticket, None)
        del self._waiting[ticket], self._requests[ticket]
        key = self._keys.pop(ticket)
        self._awaited[key] -= 1
        if not self._awaited[key]:
            del self._awaited[key]

    def _wake(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if ticket in self._waiting:
                self._hub.loop.run_callback(self._resume, ticket)

    def _resume(self, ticket: Ticket) -> None:
        go_on = self._waiting.get(ticket)  # by now it may have been called off, and wait for something else
        if go_on is not None:
            go_on()

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
        """See `Office`."""
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

    def put_off(self, ticket: Slot | None, far: bool = False) -> bool:
        """See `Office`. Does not wait."""
        assert ticket is None or isinstance(ticket, MessageTicket)
        if ticket is None:
            return True
        now = clock_ns()
        if self.manager.frozen:  # another process gives out what comes after it, and would not hear of the delay
            return now <= ticket.last
        return self.manager.put_off(ticket, now, far)

    def ask_slot(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        seconds: float,
        answer: Answer,
        names: Names = UNNAMED,
    ) -> MessageTicket | None:
        """See `Office`."""
        manager = self.manager
        if not flows and not manager.blocks:
            return None
        ticket = manager.ask_message(owner, weight, source, destination, flows, clock_ns(), names)
        if ticket is not None and not ticket.granted:
            self._answers[ticket] = answer
            self._requests[ticket] = _Request(owner, weight, source, destination, names, False)
            self._let_wait(ticket, self._longest(ticket, seconds))
        self.settle()
        return ticket

    def permit(self, places: Places, seconds: float, answer: Answer) -> Permit:
        """See `Office`."""
        mail = self.manager.mail(places, clock_ns())
        self.settle()
        if not mail.late:
            return Permit(None, mail)
        slot = self.ask_slot(places.owner, places.weight, "", "", mail.late, seconds, answer)
        return Permit(None if slot is None or slot.granted else slot, mail)

    def in_vain(self, mail: Mail) -> None:
        """See `Office`."""
        self.manager.in_vain(mail, clock_ns())

    def cancel_message(self, ticket: Slot) -> None:
        """See `Office`."""
        assert isinstance(ticket, MessageTicket)
        if self._answers.pop(ticket, None) is not None:
            del self._requests[ticket]
            self._deadlines.disarm(ticket)
            moved = self._moved.pop(ticket, None)
            if moved is not None and self._away is not None:
                self._away.cancel_message(moved)
                return
            self.manager.cancel_message(ticket, clock_ns())
            self.settle()

    def _answer(self, ticket: MessageTicket, refusal: Throttled | None = None) -> None:
        answer = self._answers.pop(ticket, None)
        if answer is not None:
            del self._requests[ticket]
            self._moved.pop(ticket, None)
            self._deadlines.disarm(ticket)
            answer(refusal)

    # ---------------------------------------------------------------- another process decides

    @property
    def listens_to_sessions(self) -> bool:
        """Not while another process may be about to take over."""
        return not self.manager.frozen or self._away is not None

    def thaw(self) -> None:
        """No other process takes over."""
        self.manager.thaw(clock_ns())
        self.settle()
        for client in list(self.clients.values()):
            client.resume()

    def move(self, away: Elsewhere) -> None:
        """Who waits here waits there from now on, in the same order; the manager here is frozen for good.

        Who named paths of a session is told to come again: the session is over, and its instance's next one is there.
        """
        self._away = away
        self.manager.retire()
        for ticket in [each for each in self._waiting if each.places is None]:
            ends, seconds, who = self._left_of(ticket)
            if ticket.flows:
                self._refused[ticket] = _elsewhere()
                self._wake([ticket])
                continue
            answer = partial(self._placed_there, ticket)
            moved = away.ask_place(*ends, seconds, answer, self._keys[ticket], who.rated, who.names)
            if moved is None:
                self._placed_there(ticket, None, None)
            else:
                self._moved[ticket] = moved
        for message in [each for each in self._answers if not each.granted]:
            ends, seconds, who = self._left_of(message)
            if not who.source:  # another slot for a permit of a session
                self._hub.loop.run_callback(self._answer, message, _elsewhere())
                continue
            slot = away.ask_slot(*ends, (), seconds, partial(self._answer, message), who.names)
            if slot is None:
                self._hub.loop.run_callback(self._answer, message)
            else:
                self._moved[message] = message.heir = slot

    def _left_of(self, ticket: Ticket | MessageTicket) -> tuple[tuple[str, float, str, str], float, _Request]:
        """Who asked for what, and the seconds that it may still wait; its time runs there from now on."""
        until = self._deadlines.due(ticket)
        self._deadlines.disarm(ticket)
        seconds = max(0.0, (until - clock_ns()) / _NANOSECONDS) if until is not None else 0.0
        who = self._requests[ticket]
        return (who.owner, who.weight, who.source, who.destination), seconds, who

    def _placed_there(self, ticket: Ticket, refusal: Throttled | None, places: Places | None) -> None:
        if refusal is not None:
            self._refused[ticket] = refusal
        else:  # none are needed there: these are nobody's
            ticket.places = places or Places(0, ticket.owner, ticket.weight, (), ())
        self._wake([ticket])

    # ---------------------------------------------------------------- replies of receivers

    @property
    def listens(self) -> bool:
        """See `Office`."""
        return self.manager.blocks.listens

    def replied(self, places: Places | None, reply: str, settle_later: bool = False) -> None:
        """See `Office`."""
        if places is not None and self.listens:
            self.manager.replied(places, reply, clock_ns())
            if settle_later:
                self._hub.loop.run_callback(self.settle)
            else:
                self.settle()

    def carried(self, places: Places | None, accepted: int, deferred: int, rejected: int) -> None:
        """See `Office`."""
        if places is not None:
            places.carried(accepted, deferred, rejected)

    # ---------------------------------------------------------------- by hand

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
                        if not self._make_way(throttle, throttle.used + throttle.line.size - throttle.cap):
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
            if self.settled is not None:
                self.settled()
            if self.handed_over is not None:
                self.handed_over()
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

    def stop(self) -> None:
        """For the end of the program, and for tests: it looks at the clock no more."""
        self._timer.close()
        self._armed_for = 0  # earlier than anything is due

    def _ring(self) -> None:
        self._armed_for = None
        now = clock_ns()
        self.manager.advance(now)
        self._time_out(now)
        self.settle()
