"""The throttle manager's office for other processes: a branch for each worker, which does what the worker asks for.

What a worker holds is known here by number, so that it can be given back when the worker is gone. Connections that are
held open are in the workers: who of them has to give up a place for somebody who waits is asked in turn. What the
records mean is said in `protocols.seam`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import gevent
from gevent import get_hub

from proxy.egress.lent import name_of
from proxy.egress.remote import RemoteSlot, applicant_of
from proxy.egress.switch import Switch, heir_of
from proxy.errors import Throttled
from proxy.protocols import seam
from proxy.protocols.seam import ThrottleName
from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Places, Throttle, Ticket

#: Slots that were told are remembered, so many for each worker, for those of their messages that go late.
_MOST_TOLD = 10_000
#: A slot of this process's manager, or of one that has taken over from it.
Granted = MessageTicket | RemoteSlot
EMPTY: Mapping[int, Places] = MappingProxyType({})


class Branches:
    """All of them.

    Args:
        office: is asked.
    """

    def __init__(self, office: Switch) -> None:
        self.office = office
        self._loop: Any = get_hub().loop
        self._open: dict[Branch, None] = {}
        self._told: dict[Throttle, set[Branch]] = {}  # under which somebody waits, and who was told so
        self._to_ask: dict[Throttle, list[Branch]] = {}  # who may make way there, and was not asked yet

    def open(self, say: Callable[[seam.FromMaster], object], held: Mapping[int, Places] = EMPTY) -> Branch:
        """A branch for a worker who listens to `say`.

        Args:
            held: what it has already, by its numbers.
        """
        self.office.here.settled = self._settled
        branch = Branch(self, say, held)
        self._open[branch] = None
        return branch

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A worker has said several things: what follows from all of them is carried out at the end. Must not wait."""
        self.office.here.hold()
        try:
            yield
        finally:
            self.office.here.settle_held()

    def make_way(self, throttle: Throttle, count: int) -> None:
        """So many places are missing: ask those who hold any. They give way by and by."""
        holders = [branch for branch in self._open if branch.holds(throttle)]
        for branch in holders:
            self._tell_wanted(throttle, branch)
        if throttle in self._to_ask:  # one is being asked, and the answer may not be about these
            self._to_ask[throttle] = holders
        elif holders:
            self._to_ask[throttle] = holders
            self._ask_next(throttle, count)

    def made_way(self, throttle: Throttle, count: int) -> None:
        """One of them has given up so many."""
        waiting = throttle.line.size if throttle.line is not None else 0
        missing = throttle.used + waiting - throttle.cap if waiting and throttle.full() else 0
        if missing > count and throttle in self._to_ask:
            self._ask_next(throttle, missing - count)
        else:
            self._to_ask.pop(throttle, None)

    def note_told(self, throttle: Throttle, branch: Branch) -> None:
        """It is said with other words."""
        self._told.setdefault(throttle, set()).add(branch)

    def closed(self, branch: Branch) -> None:
        """The worker is gone."""
        del self._open[branch]
        for throttle, told in list(self._told.items()):
            told.discard(branch)
            if not told:
                del self._told[throttle]
        for throttle, holders in list(self._to_ask.items()):
            if branch in holders:
                holders.remove(branch)
            if not holders:
                del self._to_ask[throttle]

    def later(self, what: Callable[[], object]) -> None:
        """Behind what was woken in this turn."""
        self._loop.run_callback(what)

    def _tell_wanted(self, throttle: Throttle, branch: Branch) -> None:
        told = self._told.setdefault(throttle, set())
        if branch not in told:
            told.add(branch)
            branch.say(seam.Wanted(name_of(throttle), True))

    def _ask_next(self, throttle: Throttle, count: int) -> None:
        holders = self._to_ask[throttle]
        if holders:
            holders.pop(0).ask_way(throttle, count)
        else:
            del self._to_ask[throttle]

    def _settled(self) -> None:
        """Where nobody waits any more, nobody need give way."""
        if self._told:
            for throttle in [each for each in self._told if each.line is None]:
                for branch in self._told.pop(throttle):
                    branch.say(seam.Wanted(name_of(throttle), False))


class Branch:
    """What one worker has asked for, and has."""

    def __init__(
        self, branches: Branches, say: Callable[[seam.FromMaster], object], held: Mapping[int, Places]
    ) -> None:
        self.say = say
        self._next = itertools.count(max(held, default=0) + 1)
        self._branches = branches
        self._office = branches.office
        self._places = dict(held)
        self._numbers: dict[int, int] = {}  # id of the request → number, while they are held
        self._ids: dict[int, int] = {}
        self._under: dict[Throttle, int] = {}  # how many of its places are under it
        self._tickets: dict[int, Ticket | int] = {}
        self._slots: dict[int, Granted] = {}
        self._told: OrderedDict[int, Granted] = OrderedDict()
        self._asked_way: dict[ThrottleName, Throttle] = {}
        for places in held.values():
            self._count_in(places)

    def __len__(self) -> int:
        """Connections that have places."""
        return len(self._places)

    def holds(self, throttle: Throttle) -> bool:
        return throttle in self._under

    def ask_way(self, throttle: Throttle, count: int) -> None:
        self._asked_way[name_of(throttle)] = throttle
        self.say(seam.MakeWay(name_of(throttle), count))

    def hear(self, record: seam.FromWorker) -> bool:
        """Act upon a record; whether it was for us. Does not wait."""
        # By its very type, the usual ones first: isinstance of a Struct that it is not costs 0.2 µs.
        if type(record) is seam.Enter:
            self._enter(record)
        elif type(record) is seam.Leave:
            self._leave(record.number)
        elif type(record) is seam.Ask:
            self._ask(record)
        elif type(record) is seam.Carried:
            places = self._places.get(record.number)
            self._office.carried(places, record.accepted, record.deferred, record.rejected)
        elif type(record) is seam.Cancel:
            self._cancel(record.id)
        elif type(record) is seam.Swap:
            self._may_wait(self._swap, record)
        elif type(record) is seam.PassOn:
            self._may_wait(self._pass_on, record)
        elif type(record) is seam.Mail:
            self._mail(record)
        elif type(record) is seam.CancelMessage:
            if (slot := self._slots.pop(record.id, None) or self._told.pop(record.id, None)) is not None:
                self._office.cancel_message(slot)
        elif type(record) is seam.PutOff:
            self._may_wait(self._put_off, record)
        elif type(record) is seam.Replied:
            self._office.replied(self._places.get(record.number), record.reply)
        elif type(record) is seam.MadeWay:
            if (throttle := self._asked_way.pop(record.throttle, None)) is not None:
                self._branches.made_way(throttle, record.count)
        else:
            return False
        return True

    def close(self) -> None:
        """The worker is gone, and the kernel has closed its sockets."""
        self._branches.closed(self)
        for ticket in self._tickets.values():
            self._office.cancel_place(ticket)
        self._tickets.clear()
        for slot in self._slots.values():
            self._office.cancel_message(slot)
        self._slots.clear()
        for number in list(self._places):
            self._leave(number)

    def _may_wait(self, act: Callable[[Any], object], record: object) -> None:
        """Another process may have to be asked, if it has taken over from this one."""
        if self._office.away is None:
            act(record)
        else:
            gevent.spawn(act, record)

    # ---------------------------------------------------------------- places

    def _enter(self, record: seam.Enter) -> None:
        id, key = record.id, (self, record.key) if record.key else None
        who = applicant_of(record.who, record.rated)
        answer = self._office.ask_place(who, record.seconds, partial(self._placed, id), key)
        if isinstance(answer, Ticket | int):
            self._tickets[id] = answer
        elif answer is None:
            self.say(seam.Placed(id, 0))
        else:
            self.say(seam.Placed(id, *self._lend(id, answer)))

    def _placed(self, id: int, refusal: Throttled | None, places: Places | None) -> None:
        self._tickets.pop(id)
        if refusal is not None:
            self.say(_refused(id, refusal))
        else:
            self.say(seam.Placed(id, *(self._lend(id, places) if places is not None else (0, [], []))))

    def _lend(self, id: int, places: Places) -> tuple[int, list[ThrottleName], list[int]]:
        number = next(self._next)
        self._places[number] = places
        self._numbers[id] = number
        self._ids[number] = id
        self._count_in(places)
        wanted = [index for index, throttle in enumerate(places.throttles) if throttle.line is not None]
        for index in wanted:
            self._branches.note_told(places.throttles[index], self)
        return number, [name_of(throttle) for throttle in places.throttles], wanted

    def _forget(self, number: int) -> Places | None:
        places = self._places.pop(number, None)
        if places is None:
            return None
        self._numbers.pop(self._ids.pop(number, 0), None)
        under = self._under
        for throttle in places.throttles:
            left = under[throttle] - 1
            if left:
                under[throttle] = left
            else:
                del under[throttle]
        return places

    def _count_in(self, places: Places) -> None:
        under = self._under
        for throttle in places.throttles:
            under[throttle] = under.get(throttle, 0) + 1

    def _cancel(self, id: int) -> None:
        if (ticket := self._tickets.pop(id, None)) is not None:
            self._office.cancel_place(ticket)
        elif (number := self._numbers.get(id)) is not None:
            self._leave(number)

    def _leave(self, number: int) -> None:
        self._office.leave(self._forget(number))

    def _swap(self, record: seam.Swap) -> None:
        old = self._places.get(record.number)
        may, new = self._office.swap(old, applicant_of(record.who, record.rated))
        if not may:
            self.say(seam.Swapped(record.id, False))
            return
        self._forget(record.number)
        self.say(seam.Swapped(record.id, True, *(self._lend(record.id, new) if new is not None else (0, [], []))))

    def _pass_on(self, record: seam.PassOn) -> None:
        places = self._places.get(record.number)
        passed = places is not None and self._office.pass_on(places, (self, record.key))
        if passed:
            self._forget(record.number)
        self._branches.later(partial(self.say, seam.Yes(record.id, passed)))

    # ---------------------------------------------------------------- messages

    def _ask(self, record: seam.Ask) -> None:
        id = record.id
        slot = self._office.ask_slot(applicant_of(record.who), record.seconds, partial(self._granted, id))
        if slot is None:
            self.say(seam.Granted(id, 0))
            return
        self._slots[id] = slot
        if slot.granted:
            self._granted(id, None)

    def _mail(self, record: seam.Mail) -> None:
        """Of a process that this one has replaced; its connection was there before."""
        places = self._places.get(record.number)
        if places is None:
            self.say(seam.Granted(record.id, 0))
            return
        waits = self._office.permit(places, record.seconds, partial(self._granted, record.id)).waits
        if waits is None:
            self.say(seam.Granted(record.id, 0))
        else:
            assert isinstance(waits, Granted)
            self._slots[record.id] = waits

    def _put_off(self, record: seam.PutOff) -> None:
        slot = self._told.get(record.id)
        may = slot is not None and self._office.put_off(slot, far=True)
        self.say(seam.Yes(record.id, may, slot.last or 0 if slot is not None else 0))

    def _granted(self, id: int, refusal: Throttled | None) -> None:
        slot = heir_of(self._slots.pop(id))
        if refusal is not None:
            self.say(_refused(id, refusal))
            return
        assert isinstance(slot, Granted)
        self._told[id] = slot
        if len(self._told) > _MOST_TOLD:
            self._told.popitem(last=False)
        self.say(seam.Granted(id, slot.last or 0))


def _refused(id: int, refusal: Throttled) -> seam.Refused:
    return seam.Refused(id, str(refusal), refusal.throttle, refusal.retry_after)
