"""Places and slots in a process whose throttle manager is another one's: `Office`, at the other end of a link.

Whether a throttle block applies is looked up here, so a connection without one costs no message. All else is asked of
the master, one record each way. Connections that are held open stay in this process and so does who waits for them:
a mode smtp request comes to the process of its receiver. So whether a key is awaited is known here.

When the master is gone, what has places (`lent`) keeps them until its socket is closed, and who asks is told "not now".
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from hashlib import blake2b
from time import monotonic
from typing import Any

from gevent import get_hub

from proxy.egress.asking import Told
from proxy.egress.clock import clock_ns
from proxy.egress.lent import Loans
from proxy.egress.office import Answer, Applicant, Office, Permit, PlaceAnswer
from proxy.errors import Throttled
from proxy.model import UNNAMED, Names
from proxy.policy.limits import Limits
from proxy.protocols import seam
from proxy.protocols.seam import Record, Who
from proxy.throttling.audit import Mail
from proxy.throttling.flows import Places, Throttle, Ticket

#: Seconds after which to come back to a proxy whose master is gone: it is being started again, if it is at all.
_AFTER_THE_MASTER = 5.0
#: So often a slot is put off that comes late; on a machine that is as busy as that, its message goes all the same.
_PUT_OFF_AT_MOST = 3
#: Answers of the limits that are remembered.
_MOST_APPLIED = 10_000


class RemoteSlot:
    """The slot of one message. `last`: its last moment, when it has come; 0: nothing limits it.

    `who` asks for it, until `ends`.
    """

    __slots__ = ("answer", "ends", "id", "last", "who")

    def __init__(self, id: int, answer: Answer | None, who: Applicant, ends: float) -> None:
        self.id = id
        self.answer = answer
        self.who = who
        self.ends = ends
        self.last: int | None = None

    @property
    def granted(self) -> bool:
        return self.last is not None


#: Told the answer to a question, in the hub; must not wait.
_Heard = Callable[[Any], object]


class Remote(Office):
    """The office of a worker.

    Args:
        say: to the master; does not wait. say_late: the same, where the master need not hear it at once.
        limits: the throttle blocks in force.
        make_way: see `Keeper.make_way`; how many have given way of so many that are wanted.
        clock: as the master's.
    """

    def __init__(
        self,
        say: Callable[[Record], object],
        limits: Callable[[], Limits],
        make_way: Callable[[Throttle, int], int],
        clock: Callable[[], int] = clock_ns,
        say_late: Callable[[Record], object] | None = None,
    ) -> None:
        self._say = say
        self._say_late = say_late or say
        self._limits = limits
        self._make_way = make_way
        self._clock = clock
        self._loans = Loans()
        self._hub: Any = get_hub()
        self._numbers: Iterator[int] = itertools.count(1)
        self._asked: dict[int, _Heard] = {}
        self._keys: dict[int, Hashable] = {}  # of those of them that ask for a place with a key
        self._slots: dict[int, RemoteSlot] = {}
        self._abandoned: dict[int, Places] = {}  # a swap that nobody waits for any more: whose places they are
        self._awaited: Counter[Hashable] = Counter()
        self._is_alone = False
        self._looked_up: Limits | None = None
        self._applied: dict[tuple[str, str, str], bool] = {}  # by owner, source and destination, in those limits

    # ---------------------------------------------------------------- places

    @property
    def limited(self) -> bool:
        """See `Office`."""
        return bool(self._limits())

    def ask_place(self, who: Applicant, seconds: float, answer: PlaceAnswer, key: Hashable) -> int | None:
        """See `Office`."""
        if not self._applies(who):
            return None
        id = next(self._numbers)
        self._keys[id] = key
        self._awaited[key] += 1
        self._question(
            id, seam.Enter(id, told(who), seconds, _digest(key), who.rated), partial(self._placed, who, answer)
        )
        return id

    def _placed(self, who: Applicant, answer: PlaceAnswer, record: Any) -> None:
        if isinstance(record, seam.Refused):
            answer(_throttled(record), None)
        else:
            answer(None, self._loans.take(record, who.owner, who.weight))

    def cancel_place(self, ticket: Ticket | int) -> None:
        """See `Office`."""
        assert isinstance(ticket, int)
        if self._no_more(ticket) is not None:
            self._say(seam.Cancel(ticket))

    def swap(self, old: Places | None, who: Applicant) -> tuple[bool, Places | None]:
        """See `Office`."""
        if old is None and not self._applies(who):
            return True, None
        id = next(self._numbers)
        try:
            answer = self._ask(id, seam.Swap(id, old.number if old is not None else 0, told(who), who.rated))
        except BaseException:
            if old is None:
                self._say(seam.Cancel(id))
            else:
                self._abandoned[id] = old
            raise
        if not isinstance(answer, seam.Swapped) or not answer.may:
            return False, old
        new = self._loans.take(answer, who.owner, who.weight)
        if old is not None:
            self._loans.drop(old)
        return True, new

    def leave(self, places: Places | None) -> None:
        """See `Office`."""
        if places is not None and places.open:
            say = self._say if self._loans.wanted(places) else self._say_late
            say(seam.Leave(places.number))
            self._loans.drop(places)

    def wanted(self, places: Places | None) -> bool:
        """See `Office`."""
        return places is not None and self._loans.wanted(places)

    def awaited(self, key: Hashable) -> bool:
        """See `Office`."""
        return key in self._awaited

    def pass_on(self, places: Places, key: Hashable) -> bool:
        """See `Office`."""
        id = next(self._numbers)
        answer = self._ask(id, seam.PassOn(id, places.number, _digest(key)))
        if not isinstance(answer, seam.Yes) or not answer.may:
            return False
        if places.open:
            self._loans.drop(places)
        return True

    # ---------------------------------------------------------------- messages

    def ask_slot(self, who: Applicant, seconds: float, answer: Answer) -> RemoteSlot | None:
        """See `Office`."""
        if not self._applies(who):
            return None
        slot = RemoteSlot(next(self._numbers), answer, who, monotonic() + seconds)
        self._slots[slot.id] = slot
        if self._is_alone:
            self._hub.loop.run_callback(self._told, slot, _gone())
        else:
            self._say(seam.Ask(slot.id, told(who), seconds))
        return slot

    def permit(self, places: Places, seconds: float, answer: Answer) -> Permit:
        """See `Office`. Whoever granted it is asked: the manager of before does not know of those that came
        later."""
        slot = RemoteSlot(next(self._numbers), answer, Applicant(places.owner, places.weight, "", ""), 0.0)
        self._slots[slot.id] = slot
        if self._is_alone:
            self._hub.loop.run_callback(self._told, slot, _gone())
        else:
            self._say(seam.Mail(slot.id, places.number, seconds))
        return Permit(slot, None)

    def in_vain(self, mail: Mail) -> None:
        """See `Office`. What was used up there is not known here."""

    def cancel_message(self, ticket: object) -> None:
        """See `Office`."""
        assert isinstance(ticket, RemoteSlot)
        if self._slots.pop(ticket.id, None) is not None:
            self._say(seam.CancelMessage(ticket.id))

    def put_off(self, ticket: object, far: bool = False) -> bool:
        """See `Office`."""
        for _ in range(_PUT_OFF_AT_MOST):
            if not isinstance(ticket, RemoteSlot) or not ticket.last or self._clock() <= ticket.last:
                break
            answer = self._ask(ticket.id, seam.PutOff(ticket.id))
            if not isinstance(answer, seam.Yes) or not answer.may:
                return False
            ticket.last = answer.last
        return True

    # ---------------------------------------------------------------- what became of it

    @property
    def listens(self) -> bool:
        """See `Office`."""
        return bool(self._limits().listeners)

    def replied(self, places: Places | None, reply: str, settle_later: bool = False) -> None:
        """See `Office`."""
        if places is not None and self.listens:
            self._say(seam.Replied(places.number, reply))

    def carried(self, places: Places | None, accepted: int, deferred: int, rejected: int) -> None:
        """See `Office`."""
        if places is not None and (accepted or deferred or rejected):
            self._say(seam.Carried(places.number, accepted, deferred, rejected))

    # ---------------------------------------------------------------- what the master says

    def hear(self, record: seam.FromMaster) -> bool:
        """Act upon a record; whether it was for us. In the hub; whoever is answered goes on at once."""
        # (by its very type: isinstance of a Struct that it is not costs 0.2 µs, of a union more)
        if type(record) is seam.Placed:
            self._resume(record.id, record)
        elif type(record) is seam.Granted:
            if (slot := self._slots.get(record.id)) is not None:
                slot.last = record.last
                self._use(slot, _PUT_OFF_AT_MOST)
        elif type(record) is seam.Swapped or type(record) is seam.Yes:
            self._resume(record.id, record)
        elif type(record) is seam.Refused:
            if (slot := self._slots.get(record.id)) is not None:
                self._told(slot, _throttled(record))
            else:
                self._resume(record.id, record)
        elif type(record) is seam.Wanted:
            self._loans.is_wanted(record.throttle, record.wanted)
        elif type(record) is seam.MakeWay:
            throttle = self._loans.under(record.throttle)
            self._loans.is_wanted(record.throttle, True)
            self._say(seam.MadeWay(record.throttle, self._make_way(throttle, record.count) if throttle else 0))
        else:
            return False
        return True

    def lost(self) -> None:
        """The master is gone: nobody is let in any more, and nobody's place is wanted."""
        self._is_alone = True
        self._loans.nobody_waits()
        gone = _gone()
        for id in list(self._asked):
            self._answered(id, _refusal(id))
        for slot in list(self._slots.values()):
            self._told(slot, gone)

    # ---------------------------------------------------------------- steps

    def _applies(self, who: Applicant) -> bool:
        """Where blocks name receivers, only the master knows for sure: here DNS may have said something else."""
        limits = self._limits()
        if not limits or limits.by_name:
            return bool(limits)
        if self._looked_up is not limits or len(self._applied) >= _MOST_APPLIED:
            self._looked_up, self._applied = limits, {}
        key = (who.owner, who.source, who.destination)
        applies = self._applied.get(key)
        if applies is None:
            applies = self._applied[key] = bool(limits.fitting(who.owner, who.source, who.destination))
        return applies

    def _ask(self, id: int, record: Record) -> Any:
        """Say it and wait for the answer."""
        answer = Told()
        self._question(id, record, answer.tell)
        try:
            answer.wait()
        finally:
            self._no_more(id)
        return answer.what

    def _question(self, id: int, record: Record, heard: _Heard) -> None:
        self._asked[id] = heard
        if self._is_alone:
            self._answered(id, _refusal(id))
        else:
            self._say(record)

    def _answered(self, id: int, record: Any) -> None:
        self._hub.loop.run_callback(self._resume, id, record)

    def _resume(self, id: int, record: Any) -> None:
        heard = self._no_more(id)
        if heard is not None:
            heard(record)
            return
        old = self._abandoned.pop(id, None)  # who asked has been thrown out meanwhile
        if old is not None and isinstance(record, seam.Swapped) and record.may:
            self._take_over(old, record)

    def _no_more(self, id: int) -> _Heard | None:
        """Nobody waits for this answer any more; who did."""
        heard = self._asked.pop(id, None)
        if id in self._keys:
            key = self._keys.pop(id)
            self._awaited[key] -= 1
            if not self._awaited[key]:
                del self._awaited[key]
        return heard

    def _take_over(self, old: Places, record: seam.Swapped) -> None:
        """Who asked is gone, and the answer was yes: the connection has other places now."""
        new = self._loans.take(record, old.owner, old.weight)
        if not old.open:  # and its socket was closed meanwhile
            self.leave(new)
            return
        self._loans.drop(old)
        if new is not None:
            old.number, old.throttles, old.open = new.number, new.throttles, True

    def _use(self, slot: RemoteSlot, times: int) -> None:
        """It has come, and its message goes now. On a busy machine that may be later than its last moment: then those
        to come have to be put off first, and if that cannot be any more, it needs another one."""
        if not times or not slot.last or self._clock() <= slot.last:
            self._told(slot, None)
        else:
            self._question(slot.id, seam.PutOff(slot.id), partial(self._use_late, slot, times - 1))

    def _use_late(self, slot: RemoteSlot, times: int, record: Any) -> None:
        if slot.id not in self._slots:
            return  # called off
        if isinstance(record, seam.Yes) and record.may:
            slot.last = record.last
            self._use(slot, times)
        else:
            self._say(seam.Ask(slot.id, told(slot.who), max(0.0, slot.ends - monotonic())))

    def _told(self, slot: RemoteSlot, refusal: Throttled | None) -> None:
        if self._slots.pop(slot.id, None) is not None and slot.answer is not None:
            answer, slot.answer = slot.answer, None
            answer(refusal)


def told(who: Applicant) -> Who:
    """As it is told to a master."""
    names = who.names
    return who.owner, who.weight, who.source, who.destination, names.mx, names.domain


def applicant_of(who: Who, rated: bool = False) -> Applicant:
    """As it was told by a worker."""
    owner, weight, source, destination, mx, domain = who
    return Applicant(owner, weight, source, destination, (), rated, Names(mx, domain) if mx or domain else UNNAMED)


def _digest(key: Hashable) -> bytes:
    """A key as the master knows it: it only compares."""
    return b"" if key is None else blake2b(repr(key).encode(), digest_size=16).digest()


def _gone() -> Throttled:
    return Throttled(
        "the proxy's master process is gone, and nobody else may let anything new in", "", _AFTER_THE_MASTER
    )


def _refusal(id: int) -> seam.Refused:
    gone = _gone()
    return seam.Refused(id, str(gone), gone.throttle, gone.retry_after)


def _throttled(record: seam.Refused) -> Throttled:
    return Throttled(record.message, record.throttle, record.retry_after)
