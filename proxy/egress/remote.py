"""Places and slots in a process whose throttle manager is another one's: `Office`, at the other end of a link.

Whether a throttle block applies is looked up here, so a connection without one costs no message. All else is asked of
the master, one record each way. Connections that are held open stay in this process and so does who waits for them:
a mode smtp request comes to the process of its receiver. So whether a key is awaited is known here.

Places of the master are named by their number; their throttles are names here, and nothing more. When the master is
gone, what has places keeps them until its socket is closed, and who asks is told "not now".
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from hashlib import blake2b
from time import monotonic
from typing import Any

from gevent import get_hub, getcurrent

from proxy.egress.office import Answer, Office, Permit
from proxy.errors import Throttled
from proxy.model import UNNAMED, Names
from proxy.policy.limits import Limits
from proxy.protocols import seam
from proxy.protocols.seam import Record, ThrottleName, Who
from proxy.spans import SPANS
from proxy.throttling.audit import Mail
from proxy.throttling.flows import Flow, Places, Throttle
from proxy.throttling.throttle import Key

#: Seconds after which to come back to a proxy whose master is gone: it is being started again, if it is at all.
_AFTER_THE_MASTER = 5.0
#: So often a slot is put off that comes late; on a machine that is as busy as that, its message goes all the same.
_PUT_OFF_AT_MOST = 3


class Lent(Places):
    """Places of another process; `number` is their name there. Their throttles are names here, and nothing more."""

    __slots__ = ()


class RemoteSlot:
    """The slot of one message. `last`: its last moment, when it has come; 0: nothing limits it.

    `who` asks for it, until `ends`.
    """

    __slots__ = ("answer", "ends", "id", "last", "who")

    def __init__(self, id: int, answer: Answer | None, who: Who, ends: float) -> None:
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
#: Told why there are no places, or the places; in the hub, must not wait.
PlaceAnswer = Callable[[Throttled | None, Places | None], object]


class Remote(Office):
    """The office of a worker.

    Args:
        say: to the master; does not wait.
        limits: the throttle blocks in force.
        make_way: see `Keeper.make_way`; how many have given way of so many that are wanted.
    """

    def __init__(
        self,
        say: Callable[[Record], object],
        limits: Callable[[], Limits],
        make_way: Callable[[Throttle, int], int],
    ) -> None:
        self._say = say
        self._limits = limits
        self._make_way = make_way
        self._hub: Any = get_hub()
        self._numbers: Iterator[int] = itertools.count(1)
        self._asked: dict[int, _Heard] = {}
        self._slots: dict[int, RemoteSlot] = {}
        self._abandoned: dict[int, Places] = {}  # a swap that nobody waits for any more: whose places they are
        self._awaited: Counter[Hashable] = Counter()
        self._throttles: dict[ThrottleName, Throttle] = {}  # under which places are held
        self._held: Counter[Throttle] = Counter()
        self._wanted: set[Throttle] = set()
        self._is_alone = False

    # ---------------------------------------------------------------- places

    @property
    def limited(self) -> bool:
        """See `Office`."""
        return bool(self._limits())

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
        if not self._applies(owner, source, destination, names):
            return None
        began, id = monotonic(), next(self._numbers)
        self._awaited[key] += 1
        try:
            who = (owner, weight, source, destination, *names)
            answer = self._ask(id, seam.Enter(id, who, seconds, _digest(key), rated))
        except BaseException:
            self._say(seam.Cancel(id))
            raise
        finally:
            SPANS.place.observe(monotonic() - began)
            self._awaited[key] -= 1
            if not self._awaited[key]:
                del self._awaited[key]
        if isinstance(answer, seam.Refused):
            raise _throttled(answer)
        return self._lent(answer, owner, weight)

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
        """See `Office`."""
        if old is None and not self._applies(owner, source, destination, names):
            return True, None
        id = next(self._numbers)
        who = (owner, weight, source, destination, *names)
        try:
            answer = self._ask(id, seam.Swap(id, old.number if old is not None else 0, who, rated))
        except BaseException:
            if old is None:
                self._say(seam.Cancel(id))
            else:
                self._abandoned[id] = old
            raise
        if not isinstance(answer, seam.Swapped) or not answer.may:
            return False, old
        new = self._lent(answer, owner, weight)
        if old is not None:
            self._drop(old)
        return True, new

    def ask_place(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        seconds: float,
        answer: PlaceAnswer,
        key: Hashable,
        rated: bool,
        names: Names,
    ) -> int | None:
        """`enter` without a greenlet.

        Returns:
            None: no throttle applies. Else a number for `cancel_place`; `answer` comes.
        """
        if not self._applies(owner, source, destination, names):
            return None
        id = next(self._numbers)

        def heard(record: Any) -> None:
            if isinstance(record, seam.Refused):
                answer(_throttled(record), None)
            else:
                answer(None, self._lent(record, owner, weight))

        who = (owner, weight, source, destination, *names)
        self._question(id, seam.Enter(id, who, seconds, _digest(key), rated), heard)
        return id

    def cancel_place(self, id: int) -> None:
        """Nobody waits for it any more; after the answer this changes nothing."""
        if self._asked.pop(id, None) is not None:
            self._say(seam.Cancel(id))

    def leave(self, places: Places | None) -> None:
        """See `Office`."""
        if places is not None and places.open:
            self._say(seam.Leave(places.number))
            self._drop(places)

    def wanted(self, places: Places | None) -> bool:
        """See `Office`."""
        return places is not None and not self._wanted.isdisjoint(places.throttles)

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
            self._drop(places)
        return True

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
    ) -> RemoteSlot | None:
        """See `Office`."""
        greenlet, answers = getcurrent(), []

        def answer(refusal: Throttled | None) -> None:
            answers.append(refusal)
            greenlet.switch()

        slot = self.ask_slot(owner, weight, source, destination, flows, seconds, answer, names)
        if slot is None:
            return None
        began = monotonic()
        try:
            waits()
            while not answers:
                self._hub.switch()
        except BaseException:
            self.cancel_message(slot)
            raise
        finally:
            SPANS.slot.observe(monotonic() - began)
        if answers[0] is not None:
            raise answers[0]
        return slot if slot.last else None

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
    ) -> RemoteSlot | None:
        """See `Office`."""
        if not self._applies(owner, source, destination, names):
            return None
        who = (owner, weight, source, destination, *names)
        slot = RemoteSlot(next(self._numbers), answer, who, monotonic() + seconds)
        self._slots[slot.id] = slot
        if self._is_alone:
            self._hub.loop.run_callback(self._told, slot, _gone())
        else:
            self._say(seam.Ask(slot.id, who, seconds))
        return slot

    def permit(self, places: Places, seconds: float, answer: Answer) -> Permit:
        """See `Office`. Whoever granted it is asked: the manager of before does not know of those that came
        later."""
        slot = RemoteSlot(next(self._numbers), answer, (places.owner, places.weight, "", "", "", ""), 0.0)
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
            if not isinstance(ticket, RemoteSlot) or not ticket.last or _now() <= ticket.last:
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
        """Act upon a record; whether it was for us. Does not wait."""
        if isinstance(record, seam.Placed | seam.Swapped | seam.Yes):
            self._answered(record.id, record)
        elif isinstance(record, seam.Refused):
            if (slot := self._slots.get(record.id)) is not None:
                self._told(slot, _throttled(record))
            else:
                self._answered(record.id, record)
        elif isinstance(record, seam.Granted):
            if (slot := self._slots.get(record.id)) is not None:
                slot.last = record.last
                self._use(slot, _PUT_OFF_AT_MOST)
        elif isinstance(record, seam.Wanted):
            self._is_wanted(record.throttle, record.wanted)
        elif isinstance(record, seam.MakeWay):
            throttle = self._throttles.get(record.throttle)
            self._is_wanted(record.throttle, True)
            self._say(seam.MadeWay(record.throttle, self._make_way(throttle, record.count) if throttle else 0))
        else:
            return False
        return True

    def lost(self) -> None:
        """The master is gone: nobody is let in any more, and nobody's place is wanted."""
        self._is_alone = True
        self._wanted.clear()
        gone = _gone()
        for id in list(self._asked):
            self._answered(id, _refusal(id))
        for slot in list(self._slots.values()):
            self._told(slot, gone)

    # ---------------------------------------------------------------- steps

    def _applies(self, owner: str, source: str, destination: str, names: Names) -> bool:
        """Where blocks name receivers, only the master knows for sure: here DNS may have said something else."""
        limits = self._limits()
        return bool(limits) and (limits.by_name or bool(limits.match(owner, source, destination, names)))

    def _ask(self, id: int, record: Record) -> Any:
        """Say it and wait for the answer."""
        greenlet, answers = getcurrent(), []

        def heard(answer: Any) -> None:
            answers.append(answer)
            greenlet.switch()

        self._question(id, record, heard)
        try:
            while not answers:
                self._hub.switch()
        finally:
            self._asked.pop(id, None)
        return answers[0]

    def _question(self, id: int, record: Record, heard: _Heard) -> None:
        self._asked[id] = heard
        if self._is_alone:
            self._answered(id, _refusal(id))
        else:
            self._say(record)

    def _answered(self, id: int, record: Any) -> None:
        self._hub.loop.run_callback(self._resume, id, record)

    def _resume(self, id: int, record: Any) -> None:
        heard = self._asked.pop(id, None)
        if heard is not None:
            heard(record)
            return
        old = self._abandoned.pop(id, None)  # who asked has been thrown out meanwhile
        if old is not None and isinstance(record, seam.Swapped) and record.may:
            self._take_over(old, record)

    def _take_over(self, old: Places, record: seam.Swapped) -> None:
        """Who asked is gone, and the answer was yes: the connection has other places now."""
        new = self._lent(record, old.owner, old.weight)
        if not old.open:  # and its socket was closed meanwhile
            self.leave(new)
            return
        self._drop(old)
        if new is not None:
            old.number, old.throttles, old.open = new.number, new.throttles, True

    def _lent(self, record: seam.Placed | seam.Swapped, owner: str, weight: float) -> Places | None:
        if not record.number:
            return None
        throttles = tuple([self._throttle(name) for name in record.throttles])
        self._held.update(throttles)
        self._wanted.update([throttles[index] for index in record.wanted])
        return Lent(record.number, owner, weight, throttles, ())

    def _drop(self, places: Places) -> None:
        """They are not held here any more."""
        places.open = False
        for throttle in places.throttles:
            self._held[throttle] -= 1
            if not self._held[throttle]:
                del self._held[throttle]
                del self._throttles[name_of(throttle)]
                self._wanted.discard(throttle)

    def _throttle(self, name: ThrottleName) -> Throttle:
        throttle = self._throttles.get(name)
        if throttle is None:
            throttle = self._throttles[name] = Throttle(Key(*name))
        return throttle

    def _is_wanted(self, name: ThrottleName, wanted: bool) -> None:
        throttle = self._throttles.get(name)
        if throttle is None:
            return
        if wanted:
            self._wanted.add(throttle)
        else:
            self._wanted.discard(throttle)

    def _use(self, slot: RemoteSlot, times: int) -> None:
        """It has come, and its message goes now. On a busy machine that may be later than its last moment: then those
        to come have to be put off first, and if that cannot be any more, it needs another one."""
        if not times or not slot.last or _now() <= slot.last:
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
            self._say(seam.Ask(slot.id, slot.who, max(0.0, slot.ends - monotonic())))

    def _told(self, slot: RemoteSlot, refusal: Throttled | None) -> None:
        if self._slots.pop(slot.id, None) is not None and slot.answer is not None:
            answer, slot.answer = slot.answer, None
            answer(refusal)


def who_of(who: Who) -> tuple[str, float, str, str, Names]:
    """Owner, weight, source, destination and names."""
    owner, weight, source, destination, mx, domain = who
    return owner, weight, source, destination, Names(mx, domain)


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


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def name_of(throttle: Throttle) -> ThrottleName:
    """As it is told to a worker."""
    key = throttle.key
    return key.source, key.name, key.receiver
