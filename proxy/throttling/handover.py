"""From one process to another: what an upgrade carries over, so that limits go on where they were.

The manager that goes is *frozen*: it gives nothing any more, and what is said to it waits. What it has is gathered in
chunks, a few milliseconds each, and a new manager in another process of the same machine adopts it. From then on that
one gives. If it comes to nothing, the old one is thawed, and all that was said meanwhile happens then, as after a stall
of the process.

The process that goes::

    manager.freeze(now)
    for chunk in manager.gather(now, breathe):
        send(chunk)
    # it has taken over: manager.retire(); else manager.thaw(now), and nothing has happened
    for chunk in manager.meanwhile():
        send(chunk)                           # sockets that were closed in between, permits that were used, ...

The one that comes, before anybody asks it for anything::

    reader = Reader()
    for chunk in chunks:
        reader.feed(chunk)                    # estate.Unreadable: refuse, and say why
    manager = Manager(0, now, settings.throttle_enforce, limits)
    held = manager.adopt(reader.finish(), now, breathe)
    manager.adopt_meanwhile(chunk, held, now) # each of the others

or `held = manager.adopt_as_it_comes(chunks, now, breathe)`, which saves a third of the time with very many throttles,
and leaves a manager that has to be thrown away if what comes is refused in the end.

`held` has the places of each socket that the other process goes on to hold, by that one's `Places.number`: later
`manager.release(held.pop(number), now)`, `swap`, `wanted`, `mail` or `replied` are what they always are. To take over
from one that has others' places itself is the same again: `held` of the next has its numbers.

Who waits for a place or a slot in the old process asks the new one again, in order: tickets do not travel, but their
owners' turns do. Sessions do not travel either: instances come back within a second, with the same incarnation (it is
the same manager, in another process), so their permits in hand stay good; till then their part in the limits stays.

While it is frozen pings are answered, `admit` and `ask_message` give tickets that wait, `swap` and `heir` say no, and a
MAIL is judged and its permit used. Other frames of sessions wait (better left unread: an OPEN that names a path which
was registered in that time finds none), and what an operator does is refused with `Frozen`. From "ready" on a MAIL is
to be held against the permits of the new one, which grants them: `mail` with the places by number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from proxy.throttling.adopting import Adopting, Former
from proxy.throttling.audit import Gathered, Spent
from proxy.throttling.blocks import Rules
from proxy.throttling.cluster import Cluster
from proxy.throttling.core import SWEEP
from proxy.throttling.estate import (
    Estate,
    LeftOf,
    OwedOf,
    Reader,
    Record,
    RepliedOf,
    SpentOf,
    chunks_of,
    records_of,
)
from proxy.throttling.flows import Flow, Path, Places, Receiver, Throttle
from proxy.throttling.gathering import Gathering
from proxy.throttling.later import Later
from proxy.throttling.requests import Requests
from proxy.throttling.session import LEASE
from proxy.throttling.throttle import SECOND, Key
from proxy.throttling.wheel import Wheel

#: Calls that waited which are made in one step.
THAWED = 500


class Frozen(Exception):
    """Not now: this manager is about to be replaced."""


class Handover(Requests):
    """The calls with which a manager leaves, stays after all, or begins. The arguments are `manager.Manager`'s."""

    def __init__(
        self,
        incarnation: int,
        start: int,
        enforce: bool = False,
        blocks: Rules | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        super().__init__(incarnation, start, enforce, blocks, cluster)
        self._former: Wheel[Former] = Wheel(SECOND)  # what is remembered of them until everybody is back
        self._frozen_at = 0
        self._thawing = False

    # --- the one that goes ---

    @property
    def frozen(self) -> bool:
        return self._held is not None and not self._thawing

    def freeze(self, now: int) -> None:
        """Give nothing from now on."""
        while self._thawing:
            self._go_on(now)
        if self._held is None:
            self._held, self._meanwhile, self._frozen_at = Later(), [], now

    def thaw(self, now: int) -> None:
        """Go on: what was said meanwhile happens now, in the order it was said; if that was much, the rest by
        `advance`."""
        if not self.frozen:
            return
        self._thawing, self._meanwhile, self._audit.gathered = True, [], None
        for session in self.sessions.values():  # nobody was asked whether it was there
            session.pong_at = min(now, session.pong_at + now - self._frozen_at)
        self._go_on(now)

    def gather(self, now: int, breathe: Callable[[], None] = lambda: None) -> Iterator[bytes]:
        """All that another manager needs to go on, in chunks; this one is frozen. Once: to try again, thaw and freeze.

        Args:
            breathe: called now and then; lets others have their turn.
        """
        if not self.frozen:
            raise ValueError("a manager that goes on would give out what it has left")
        if self._audit.gathered is not None:
            raise ValueError("what has happened since it was gathered would be lost")
        self._audit.gathered = Gathered()
        return Gathering(self, self.sessions.values(), now, breathe).chunks()

    def retire(self) -> None:
        """Another one goes on, for good: what is said to this one is told (`meanwhile`), and not kept."""
        held = self._held = self._held or Later()
        held.drop()

    def meanwhile(self) -> list[bytes]:
        """What has happened since it was frozen, or since this was last asked for, that was not in it: chunks."""
        records, self._meanwhile = self._meanwhile, []
        return list(chunks_of(records))

    # --- the one that comes ---

    def adopt(self, estate: Estate, now: int, breathe: Callable[[], None] = lambda: None) -> dict[int, Places]:
        """Go on where another manager was frozen; nobody has asked this one for anything yet.

        Returns:
            the places of sockets that the other process holds, by its numbers.

        Raises:
            Unreadable: it is of another machine, or of before its start.
        """
        adopting = Adopting(self, self._remember(now + LEASE), now, breathe)
        adopting.begin(estate.head)
        adopting.take(estate.records)
        adopting.finish()
        return adopting.held

    def adopt_as_it_comes(
        self, chunks: Iterable[bytes], now: int, breathe: Callable[[], None] = lambda: None
    ) -> dict[int, Places]:
        """As `adopt`, while the other process is still gathering: so both work at a time, and less time is lost.

        Raises:
            Unreadable: as by `adopt` and a `Reader`; what has come until then has been adopted, so this manager is good
                for nothing.
        """
        reader, adopting = Reader(keep=False), Adopting(self, self._remember(now + LEASE), now, breathe)
        for chunk in chunks:
            begun = reader.head is not None
            records = reader.feed(chunk)
            if not begun and reader.head is not None:
                adopting.begin(reader.head)
            adopting.take(records)
        reader.finish()
        adopting.finish()
        return adopting.held

    def adopt_meanwhile(self, chunk: bytes, held: dict[int, Places], now: int) -> None:
        """What has happened at the other process in between (its `meanwhile`).

        Raises:
            Unreadable: it is damaged; nothing of it has been done.
        """
        for record in records_of(chunk):
            self._take_in(record, held, now)

    # --- steps ---

    def _go_on(self, now: int) -> None:
        """Do some of what was said while it was frozen; what is said meanwhile comes behind it."""
        held, self._held = self._held.calls if self._held is not None else [], None
        for call in held[:THAWED]:
            call(now)
        if len(held) > THAWED:
            self._held = Later(held[THAWED:])
            return
        self._thawing = False
        for session in self.sessions.values():
            if session.has_words:
                self._dispenser.touched[session] = None

    def _need_thawed(self) -> None:
        if self._held is not None:
            raise Frozen("another process takes over: ask that one, in a moment")

    def _remember(self, until: int) -> Callable[[Former], None]:
        return lambda former: self._former.arm(former, until)

    def _outlive(self, now: int) -> None:
        """Who is not back by now finds nothing that is its own any more."""
        for former in self._former.expire(now, SWEEP):
            if isinstance(former, Path):
                self._registry.outlived(former, now)
            else:
                self._dispenser.former.pop(former, None)
                self._book.former.pop(former, None)

    def _take_in(self, record: Record, held: dict[int, Places], now: int) -> None:
        if isinstance(record, LeftOf) and record.number in held:
            self._leave(held.pop(record.number), now)
        elif isinstance(record, RepliedOf) and record.number in held:
            self.replied(held[record.number], record.reply, now)
        elif isinstance(record, SpentOf | OwedOf):
            throttles = [self._find(kind, Key(*key)) for kind, *key in record.keys]
            known = tuple([throttle for throttle in throttles if throttle is not None])
            if len(known) < len(throttles):
                return  # forgotten, and so is what was granted under it
            if isinstance(record, SpentOf):
                self._audit.spent_elsewhere(Spent((record.owner, known), record.slot, record.last), record.back, now)
            else:
                self._make_pay(Flow(Receiver(record.owner, 1.0), 0, Path(known)), now)

    def _find(self, kind: int, key: Key) -> Throttle | None:
        return self.blocks.find(key, kind == 2) if kind else self._registry.throttles.get(key)
