"""Who waits for a place or for the slot of a message: what was asked for, until when, and who is to be told.

The manager's tickets say what has come of it; whoever has got something, or whose time is up, is told so in the hub, a
moment later: until then it may be called off. When another process takes over, they wait there instead (`move`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, Protocol

from gevent import get_hub

from proxy.egress.office import Answer, Applicant, PlaceAnswer, Slot
from proxy.errors import Throttled
from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.throttle import MILLISECOND, SECOND
from proxy.throttling.wheel import Wheel

#: Requests whose time is up that are told so before the loop looks at its sockets again.
_TIMED_OUT_A_TURN = 20


class Elsewhere(Protocol):
    """The office of another process, as who waits here sees it; `remote` is one. For the calls see `Office`."""

    def ask_place(self, who: Applicant, seconds: float, answer: PlaceAnswer, key: Hashable) -> int | None: ...

    def cancel_place(self, ticket: Any) -> None: ...

    def ask_slot(self, who: Applicant, seconds: float, answer: Answer) -> Slot | None: ...

    def cancel_message(self, ticket: Slot) -> None: ...

    def leave(self, places: Places | None) -> None: ...


class _ForPlace:
    """`refusal`: its time is up. `moved`: its number in the other process."""

    __slots__ = ("answer", "key", "moved", "refusal", "who")

    def __init__(self, who: Applicant, answer: PlaceAnswer, key: Hashable) -> None:
        self.who = who
        self.answer = answer
        self.key = key
        self.refusal: Throttled | None = None
        self.moved: int | None = None


class _ForSlot:
    """`moved`: its ticket in the other process."""

    __slots__ = ("answer", "moved", "who")

    def __init__(self, who: Applicant, answer: Answer) -> None:
        self.who = who
        self.answer = answer
        self.moved: Slot | None = None


class Waiters:
    """All of them; who asked first stands first.

    Attributes:
        away: the office of the process that has taken over. deadlines: until when they wait.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.away: Elsewhere | None = None
        self._clock = clock
        self._loop: Any = get_hub().loop
        self._places: dict[Ticket, _ForPlace] = {}
        self._slots: dict[MessageTicket, _ForSlot] = {}
        self._awaited: Counter[Hashable] = Counter()  # what those who wait for places would share, how often
        self.deadlines: Wheel[Ticket | MessageTicket] = Wheel(10 * MILLISECOND)

    @property
    def for_places(self) -> int:
        """How many wait for places."""
        return len(self._places)

    @property
    def for_slots(self) -> int:
        """How many wait for slots."""
        return len(self._slots)

    # ---------------------------------------------------------------- places

    def wait_for_place(
        self, ticket: Ticket, who: Applicant, seconds: float, answer: PlaceAnswer, key: Hashable
    ) -> None:
        self._places[ticket] = _ForPlace(who, answer, key)
        self._awaited[key] += 1
        self.deadlines.arm(ticket, self._clock() + int(seconds * SECOND))

    def stop_for_place(self, ticket: Ticket) -> bool:
        """It is called off, whether it got in or not; what was asked of another process is called off there.

        Returns:
            whether the manager here is to cancel it.
        """
        waiter = self._end(ticket)
        if waiter is None:
            return False
        if waiter.moved is None or self.away is None:
            return True
        if ticket.places is not None:
            self.away.leave(ticket.places)
        self.away.cancel_place(waiter.moved)
        return False

    def awaited(self, key: Hashable) -> bool:
        """Whether anybody would share it."""
        return key in self._awaited

    def would_share(self, ticket: Ticket, key: Hashable) -> bool:
        waiter = self._places.get(ticket)
        return (waiter.key if waiter is not None else None) == key

    def wake(self, tickets: Iterable[Ticket]) -> None:
        """They got in, or are refused."""
        for ticket in tickets:
            if ticket in self._places:
                self._loop.run_callback(self._tell, ticket)

    def refuse(self, ticket: Ticket, refusal: Throttled) -> None:
        waiter = self._places.get(ticket)
        if waiter is not None:
            waiter.refusal = refusal
            self._loop.run_callback(self._tell, ticket)

    def _tell(self, ticket: Ticket) -> None:
        waiter, places = self._places.get(ticket), ticket.places
        if waiter is None or (places is None and waiter.refusal is None):
            return  # called off meanwhile
        self._end(ticket)
        waiter.answer(waiter.refusal if places is None else None, places)

    def _end(self, ticket: Ticket) -> _ForPlace | None:
        waiter = self._places.pop(ticket, None)
        if waiter is None:
            return None
        self.deadlines.disarm(ticket)
        self._awaited[waiter.key] -= 1
        if not self._awaited[waiter.key]:
            del self._awaited[waiter.key]
        return waiter

    # ---------------------------------------------------------------- slots

    def wait_for_slot(self, ticket: MessageTicket, who: Applicant, seconds: float, answer: Answer) -> None:
        self._slots[ticket] = _ForSlot(who, answer)
        self.deadlines.arm(ticket, self._clock() + int(seconds * SECOND))

    def stop_for_slot(self, ticket: MessageTicket) -> bool:
        """As `stop_for_place`."""
        waiter = self._end_slot(ticket)
        if waiter is None:
            return False
        if waiter.moved is None or self.away is None:
            return True
        self.away.cancel_message(waiter.moved)
        return False

    def tell(self, ticket: MessageTicket, refusal: Throttled | None = None) -> None:
        """It has come, or does not come."""
        self._loop.run_callback(self._answer, ticket, refusal)

    def _answer(self, ticket: MessageTicket, refusal: Throttled | None = None) -> None:
        waiter = self._end_slot(ticket)
        if waiter is not None:
            waiter.answer(refusal)

    def _end_slot(self, ticket: MessageTicket) -> _ForSlot | None:
        waiter = self._slots.pop(ticket, None)
        if waiter is not None:
            self.deadlines.disarm(ticket)
        return waiter

    # ---------------------------------------------------------------- deadlines

    def expired(self, now: int) -> Iterable[Ticket | MessageTicket]:
        """Some of those whose time is up, to be told so."""
        return self.deadlines.expire(now, _TIMED_OUT_A_TURN)

    # ---------------------------------------------------------------- another process decides

    def move(self, away: Elsewhere) -> None:
        """Who waits here waits there from now on, in the same order.

        Who named paths of a session is told to come again: the session is over, and its instance's next one is there.
        """
        self.away = away
        for ticket in [each for each in self._places if each.places is None]:
            place, seconds = self._places[ticket], self._left(ticket)
            if ticket.flows:
                self.refuse(ticket, elsewhere())
                continue
            place.moved = away.ask_place(place.who, seconds, partial(self._placed_there, ticket), place.key)
            if place.moved is None:
                self._placed_there(ticket, None, None)
        for message in [each for each in self._slots if not each.granted]:
            slot, seconds = self._slots[message], self._left(message)
            if not slot.who.source:  # another slot for a permit of a session
                self.tell(message, elsewhere())
                continue
            slot.moved = message.heir = away.ask_slot(slot.who, seconds, partial(self._answer, message))
            if slot.moved is None:
                self.tell(message)

    def _left(self, ticket: Ticket | MessageTicket) -> float:
        """Seconds that it may still wait; its time runs there from now on."""
        until = self.deadlines.due(ticket)
        self.deadlines.disarm(ticket)
        return max(0.0, (until - self._clock()) / SECOND) if until is not None else 0.0

    def _placed_there(self, ticket: Ticket, refusal: Throttled | None, places: Places | None) -> None:
        if refusal is not None:
            self.refuse(ticket, refusal)
        else:  # none are needed there: these are nobody's
            ticket.places = places or Places(0, ticket.owner, ticket.weight, (), ())
            self.wake([ticket])


def elsewhere() -> Throttled:
    """What whoever asks here is told then."""
    return Throttled("another process of the proxy has taken over: ask that one, in a moment", "", 1.0)
