"""The throttle manager's doing: its clock, its one timer, and those who wait for a place or for a message's slot.

`manager` decides and never waits; who waits for what it gives is in `waiters`. After each call what follows from it is
carried out: tickets are woken, sessions are given what they are to send, notices are logged, and the timer is set. Many
whose time is up together are told in turns. With no throttle configured or named, a connection costs one look.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from gevent import get_hub

from proxy.egress.clock import clock_ns
from proxy.egress.office import Answer, Applicant, Office, Permit, PlaceAnswer, Slot
from proxy.egress.waiters import Elsewhere, Waiters, elsewhere
from proxy.log import lines as log
from proxy.spans import SPANS
from proxy.throttling.audit import Mail
from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Places, Throttle, Ticket
from proxy.throttling.manager import Manager
from proxy.throttling.overrides import Override
from proxy.throttling.registry import Remark
from proxy.throttling.session import End, Session
from proxy.throttling.throttle import SECOND


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


class Admission(Office):
    """The one manager and whoever deals with it; for the calls of `Office` see there.

    Args:
        make_way: told a full throttle under which requests wait, and how many places are missing: a cached connection
            is to give up its place there; says whether one did.
        clock: nanoseconds, as `clock_ns`.

    Attributes:
        settled: called when all that follows from a call is done, if there is anybody to be told. handed_over: the
            same, when another process has taken over the manager.
    """

    def __init__(
        self,
        manager: Manager,
        make_way: Callable[[Throttle, int], bool],
        clock: Callable[[], int] = clock_ns,
    ) -> None:
        self.settled: Callable[[], object] | None = None
        self.handed_over: Callable[[], object] | None = None
        self.manager = manager
        self.clients: dict[Session, Client] = {}
        self._make_way = make_way
        self._hub: Any = get_hub()
        self.waiters = Waiters(clock)
        self._clock = clock
        self._timer: Any = self._hub.loop.timer(0)
        self._armed_for: int | None = None
        self._settling = False

    # ---------------------------------------------------------------- places

    @property
    def limited(self) -> bool:
        """See `Office`."""
        return bool(self.manager.blocks)

    def ask_place(self, who: Applicant, seconds: float, answer: PlaceAnswer, key: Hashable) -> Places | Ticket | None:
        """See `Office`.

        Raises:
            Throttled: another process has taken over.
        """
        manager, flows = self.manager, who.flows
        if not flows and not manager.blocks:
            return None
        if self.waiters.away is not None:
            raise elsewhere()
        ticket = manager.admit(
            who.owner, who.weight, who.source, who.destination, flows, self._clock(), who.rated, who.names
        )
        self.settle()
        if isinstance(ticket, Places):
            return ticket
        if ticket.places is not None:  # while all was carried out
            return ticket.places
        self.waiters.wait_for_place(ticket, who, self._longest(ticket, seconds), answer, key)
        self._arm()
        return ticket

    def cancel_place(self, ticket: Ticket | int) -> None:
        """See `Office`."""
        assert isinstance(ticket, Ticket)
        if self.waiters.stop_for_place(ticket):
            self.waiters.wake(self.manager.cancel(ticket, self._clock()))
            self.settle()

    def swap(self, old: Places | None, who: Applicant) -> tuple[bool, Places | None]:
        """See `Office`. Does not wait."""
        manager, flows, now = self.manager, who.flows, self._clock()
        if old is not None:
            new = manager.swap(
                old, who.owner, who.weight, who.source, who.destination, flows, now, who.rated, who.names
            )
            self.settle()
            return new is not None, new
        if not flows and not manager.blocks:
            return True, None
        answer = manager.admit(who.owner, who.weight, who.source, who.destination, flows, now, who.rated, who.names)
        if isinstance(answer, Ticket):
            manager.cancel(answer, now)
            self.settle()
            return False, None
        SPANS.place.observe(0.0)
        self.settle()
        return True, answer

    def leave(self, places: Places | None) -> None:
        """See `Office`."""
        if places is not None:
            admitted = self.manager.release(places, self._clock())
            if admitted:
                self.waiters.wake(admitted)
            self.settle()

    def wanted(self, places: Places | None) -> bool:
        """See `Office`."""
        return places is not None and self.manager.wanted(places)

    def awaited(self, key: Hashable) -> bool:
        """See `Office`."""
        return self.waiters.awaited(key)

    def pass_on(self, places: Places, key: Hashable) -> bool:
        """See `Office`. Does not wait."""
        heir = self.manager.heir(places, self._clock())
        if heir is None or not self.waiters.would_share(heir, key):
            return False
        tickets = self.manager.release(places, self._clock())
        self.waiters.wake(tickets)
        self.settle()
        return heir in tickets

    # ---------------------------------------------------------------- messages

    def put_off(self, ticket: Slot | None, far: bool = False) -> bool:
        """See `Office`. Does not wait."""
        assert ticket is None or isinstance(ticket, MessageTicket)
        if ticket is None:
            return True
        now = self._clock()
        if self.manager.frozen:  # another process gives out what comes after it, and would not hear of the delay
            return now <= ticket.last
        return self.manager.put_off(ticket, now, far)

    def ask_slot(self, who: Applicant, seconds: float, answer: Answer) -> MessageTicket | None:
        """See `Office`."""
        manager, flows = self.manager, who.flows
        if not flows and not manager.blocks:
            return None
        ticket = manager.ask_message(
            who.owner, who.weight, who.source, who.destination, flows, self._clock(), who.names
        )
        self.settle()
        if ticket is not None and not ticket.granted:
            self.waiters.wait_for_slot(ticket, who, self._longest(ticket, seconds), answer)
            self._arm()
        return ticket

    def permit(self, places: Places, seconds: float, answer: Answer) -> Permit:
        """See `Office`."""
        mail = self.manager.mail(places, self._clock())
        self.settle()
        if not mail.late:
            return Permit(None, mail)
        slot = self.ask_slot(Applicant(places.owner, places.weight, "", "", mail.late), seconds, answer)
        return Permit(None if slot is None or slot.granted else slot, mail)

    def in_vain(self, mail: Mail) -> None:
        """See `Office`."""
        self.manager.in_vain(mail, self._clock())

    def cancel_message(self, ticket: Slot) -> None:
        """See `Office`."""
        assert isinstance(ticket, MessageTicket)
        if self.waiters.stop_for_slot(ticket):
            self.manager.cancel_message(ticket, self._clock())
            self.settle()

    # ---------------------------------------------------------------- another process decides

    @property
    def listens_to_sessions(self) -> bool:
        """Not while another process may be about to take over."""
        return not self.manager.frozen or self.waiters.away is not None

    def thaw(self) -> None:
        """No other process takes over."""
        self.manager.thaw(self._clock())
        self.settle()
        for client in list(self.clients.values()):
            client.resume()

    def move(self, away: Elsewhere) -> None:
        """Who waits here waits there from now on; the manager here is frozen for good."""
        self.manager.retire()
        self.waiters.move(away)

    # ---------------------------------------------------------------- replies of receivers

    @property
    def listens(self) -> bool:
        """See `Office`."""
        return self.manager.blocks.listens

    def replied(self, places: Places | None, reply: str, settle_later: bool = False) -> None:
        """See `Office`."""
        if places is not None and self.listens:
            self.manager.replied(places, reply, self._clock())
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
        count = self.manager.end_backoff(name, self._clock())
        self.settle()
        return count

    def set_by_hand(self, override: Override, seconds: float) -> int:
        """Lower limits, or a pause, for so long (`override.until` is set here); its number."""
        now = self._clock()
        number = self.manager.set_by_hand(override._replace(until=now + int(seconds * SECOND)), now)
        self.settle()
        return number

    def end_by_hand(self, fits: Callable[[int, Override], bool]) -> int:
        """End those that fit before their time; how many."""
        count = self.manager.end_by_hand(fits, self._clock())
        self.settle()
        return count

    def turn_day(self, day: int) -> None:
        """It is this day, counted from 1970-01-01; to be called now and then, since the clock may have been set."""
        self.manager.turn_day(day, self._clock())
        self.settle()

    # ---------------------------------------------------------------- deadlines

    def _longest(self, ticket: Ticket | MessageTicket, seconds: float) -> float:
        own = self.manager.wait_of(ticket)
        return seconds if own is None else min(seconds, own)

    def _time_out(self, now: int) -> None:
        """Tell some of those whose time is up; who has got it meanwhile is about to be told so."""
        manager, waiters = self.manager, self.waiters
        for ticket in waiters.expired(now):
            refusal = manager.refusal(ticket, now)
            if isinstance(ticket, MessageTicket):
                if not ticket.granted:
                    manager.cancel_message(ticket, now)
                    waiters.tell(ticket, refusal)
            elif ticket.places is None:
                waiters.wake(manager.cancel(ticket, now))
                waiters.refuse(ticket, refusal)

    # ---------------------------------------------------------------- what follows from a call

    def hold(self) -> None:
        """What the next calls lead to is carried out at once, by `settle_held`, which must come in the same breath."""
        self._settling = True

    def settle_held(self) -> None:
        """See `hold`."""
        self._settling = False
        self.settle()

    def settle(self) -> None:
        """Carry out what the last calls to the manager have led to. To be called after each."""
        if self._settling:
            return  # held, or a delivery called the manager: the loop below goes round once more
        self._settling = True
        manager = self.manager
        try:
            while manager.has_news:
                for session in manager.take_ready():  # nearly always that is all
                    client = self.clients.get(session)
                    if client is not None:
                        client.deliver()
                if manager.has_answers:
                    self._carry_out(manager)
            if self.settled is not None:
                self.settled()
            if self.handed_over is not None:
                self.handed_over()
            if manager.has_notices:
                for remark in manager.take_notices():
                    self._tell(remark)
        finally:
            self._settling = False
        self._arm()

    def _carry_out(self, manager: Manager) -> None:
        """What is for others than the sessions that have something to be sent."""
        admitted = manager.take_admitted()
        if admitted:
            self.waiters.wake(admitted)
        for ticket in manager.take_granted():
            self.waiters.tell(ticket)
        for throttle in manager.take_blocked():
            # In a pause a place that is given up is nobody's.
            while throttle.line is not None and throttle.full() and not throttle.closed_until:
                if not self._make_way(throttle, throttle.used + throttle.line.size - throttle.cap):
                    break
        for session in manager.take_ended():
            client = self.clients.pop(session, None)
            if client is not None and session.end is not None:
                client.ended(session.end)

    def _tell(self, remark: Remark) -> None:
        level, reply = log.INFO if remark.calm else log.WARNING, {"reply": remark.reply} if remark.reply else {}
        log.note(log.Event.THROTTLE, level, remark.detail, notice=remark.notice, instance=remark.instance, **reply)

    def _arm(self) -> None:
        first, armed_for = self.waiters.deadlines.next_wakeup(), self._armed_for
        if armed_for is not None and (first is None or first >= armed_for) and not self.manager.wakes_before(armed_for):
            return  # nearly always: nothing has become due earlier
        due = self.manager.next_wakeup()
        if first is not None and (due is None or first < due):
            due = first
        if due is None or (self._armed_for is not None and self._armed_for <= due):
            return  # it rings early at worst
        self._armed_for = due
        self._timer.close()
        self._timer = self._hub.loop.timer(max(0.0, (due - self._clock()) / SECOND))
        self._timer.start(self._ring)

    def stop(self) -> None:
        """For the end of the program, and for tests: it looks at the clock no more."""
        self._timer.close()
        self._armed_for = 0  # earlier than anything is due

    def _ring(self) -> None:
        self._armed_for = None
        now = self._clock()
        self.manager.advance(now)
        self._time_out(now)
        self.settle()
