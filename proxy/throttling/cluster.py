"""What this proxy asks a throttle store for, and what follows from the replies: the calls of lease.lua, decided purely.

Some ten times a second, up to sixteen while something is wanted, `begin` says what to ask now: always for the others
(`meet`), and for slots and places of each throttle that needs some. All of it goes out together. `finish` is told what
became of it. A call whose reply is lost, late or cannot be believed counts as carried out: what it was granted is gone.
Without a reply to `meet` for half a second every throttle goes on with this proxy's share, from a tenth later on.

How much of a limit those who call may have is decided here, too (`membership.left_for`): the store does the arithmetic
that must be done in one place, and no more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from proxy.throttling.flows import Throttle
from proxy.throttling.leasing import LEASED_AHEAD, Leased, Slot
from proxy.throttling.limits import Effective
from proxy.throttling.membership import ALONE, CALL, SHARE, SILENT, VIEW, Clock, Member, left_for, share
from proxy.throttling.throttle import MICROSECOND, MILLISECOND, SECOND, Key

#: Time between two calls while something is wanted, and else.
BUSY, IDLE = 60 * MILLISECOND, 100 * MILLISECOND
#: Somebody else calls under our name: after so long we take another one.
TAKEN_FOR = 600 * MILLISECOND
#: Places that are used are told again so often though nothing has changed.
_TELL_AGAIN = SECOND
#: Members that a store does not know, since it has lost its memory, are reckoned with for so long after they were seen.
_REMEMBERED = 3600 * SECOND
#: Throttles that go on alone in one turn, some 13 ms.
_PARTED_AT_ONCE = 1_000
#: A limit of which nothing is left is looked at again so soon.
_NOTHING_LEFT = 500 * MILLISECOND
#: A moment long ago.
_LONG_AGO = 10**15

MEMBERS = b"{ga:}:members"
_DONE, _LATE, _ASKED, _TAKEN = 0, 1, 2, 3


class Ask(NamedTuple):
    """One call of the script. `subject` and `extra` are for `finish`."""

    keys: tuple[bytes, ...]
    arguments: tuple[bytes | int, ...]
    subject: Leased | None = None
    places: bool = False
    identity: str = ""


class Answer(NamedTuple):
    """What became of it: the reply and when it was received, on the clock of `begin`; value None: none came.

    Args:
        identity: of the server that answered.
    """

    value: Any
    received: int = 0
    identity: str = ""


class Account:
    """What is known of one throttle's state in the store."""

    __slots__ = ("generation", "keys", "not_before", "places_key", "told", "told_at", "used")

    def __init__(self, tag: str) -> None:
        self.keys = tag
        self.places_key = f"{tag}:p".encode()
        self.not_before = 0
        self.generation = 0
        self.told: tuple[int, int] | None = None  # places used and wanted, as said last
        self.told_at = 0


class Cluster:
    """This proxy as one of several.

    Args:
        name: what the store knows this proxy by. run: this process. members: how many there should be.
        draw: a random word of 64 bits, in hexadecimal.
        start: when it began.

    Attributes:
        throttles: all of them. hungry, moved: of which slots were wanted, and places taken or given back: looked at in
            `begin`.
        alone: the store does not answer, and each throttle goes on with our share.
        view: the members, as the store said last; one of them we.
        store: whether there is one at all.
        trouble: why the last reply was not believed, in words; "": it was.
        told: of how many members we are one; 0: we have no share.
        since: when we came to be alone, or together. granted: slots, of all throttles.
        discarded, epochs, degraded: replies that could not be believed; times that the store's memory was another one;
            times that we went on alone.
    """

    def __init__(self, name: str, run: str, members: int, draw: Callable[[], str], start: int) -> None:
        self.name, self.run, self.members = name, run, members
        self.throttles: dict[Leased, Account] = {}
        self._parting: dict[str, Leased] = {}  # by their keys: forgotten here, with places to be given back
        self.hungry: dict[Leased, None] = {}
        self.moved: dict[Leased, None] = {}
        self.store = True
        self.alone = False
        self.granted = 0
        self.view: tuple[Member, ...] = ()
        self.told = members
        self.trouble = ""
        self.discarded = self.epochs = self.degraded = 0
        self.since = start
        self._draw = draw
        self._word = b""
        self._replace = b""
        self._candidate = draw().encode()
        self._home = ""  # the server where we were here
        self._clocks: dict[str, Clock] = {}
        self._here = False  # the last `meet` told the others that we are here, and was answered
        self._here_at = start  # when we last said so, which may have been carried out
        self._coming = False
        self._to_part: list[Leased] = []  # throttles that are to go on alone, the first ones last
        self._share_from = start + SHARE
        self._alone_until = start  # the run before this one may have gone on alone
        self._view_sent = self._view_at = 0
        self._seen = self._seen_at = 0  # the members of late, under this word
        self._seen_word = b""
        self._called_at = start - SECOND
        self._taken_since: int | None = None
        self._leaving = False

    # --- throttles ---

    def make(self, key: Key, counts: bool, kind: str, now: int) -> Leased:
        """A throttle of all proxies together.

        Args:
            kind: one letter: keys are the same in what counts differently.
        """
        throttle = Leased(key, counts, self)
        tag = f"{{ga:{key.name}:{key.source}" + (f":{key.receiver}" if key.receiver else "") + f"}}:{kind}"
        if (former := self._parting.pop(tag, None)) is not None:
            self._forget(former)
        self.throttles[throttle] = Account(tag)
        if self.alone:
            throttle.go_alone(self.told, self._share_from, now)
        return throttle

    def drop(self, throttle: Throttle) -> None:
        """It is forgotten here, as soon as its places are given back; what it owes is not, in the store."""
        if not isinstance(throttle, Leased):
            return
        account = self.throttles.get(throttle)
        if account is None or not throttle.places or throttle.cap_here <= self._place_for_each(throttle):
            self._forget(throttle)
            return
        throttle.set_places(self._place_for_each(throttle))
        self._parting[account.keys] = throttle
        self._tell_again(throttle)

    def _forget(self, throttle: Leased) -> None:
        self.throttles.pop(throttle, None)
        self.hungry.pop(throttle, None)
        self.moved.pop(throttle, None)

    def relimited(self, throttle: Leased, now: int) -> None:
        """It has other limits, or places."""
        if self.alone:
            throttle.go_alone(self.told, self._share_from, now)
            self._places_alone(throttle)

    def share_of(self, throttle: Leased) -> Effective:
        """What this proxy goes on with while the store does not answer."""
        limits = tuple([limit._replace(amount=share(limit.amount, self.told)) for limit in throttle.limits])
        return Effective(limits, self._share_of_places(throttle))

    @property
    def total(self) -> int:
        """Members that share a limit: as configured, or as there have been lately, if these are more."""
        return max(self.members, self._seen)

    # --- calls ---

    def due(self, now: int) -> int:
        """When `begin` is to be called next."""
        wants = self._here and any(True for _ in self._wanting(now))
        return self._called_at + (BUSY if wants else IDLE)

    def leave(self) -> None:
        """This proxy ends: say so, and nothing more."""
        self._leaving = True

    def begin(self, now: int, identity: Callable[[bytes], str]) -> tuple[list[Ask], list[Leased]]:
        """What to ask now, to be sent at once, and throttles of which something has changed.

        Args:
            identity: of the server that has a key; "": it is not connected.
        """
        changed: list[Leased] = []
        self._called_at = now
        if not self._here and not self.alone and now >= self._here_at + ALONE:
            self._go_alone(now)
        if self._to_part:
            changed += self._part(now)
        asks = [self._meet(now, identity, changed)]
        if self._may_ask(now):
            asks += self._slots(now, identity)
            asks += self._places(now, identity)
        return asks, changed

    def finish(self, asks: Sequence[Ask], answers: Sequence[Answer], sent: int) -> list[Leased]:
        """What became of what `begin` said at `sent`; throttles of which something has changed."""
        changed: list[Leased] = []
        believed = True
        for ask, answer in zip(asks, answers, strict=True):
            value = answer.value
            good = isinstance(value, list) and len(value) > 2 and answer.received - sent <= CALL
            if good and not self._believe(ask, answer, sent):
                good = believed = False
            if ask.subject is None:
                self._met(value if good else None, sent, answer.received)
            elif good and believed:
                (self._got_places if ask.places else self._got_slots)(ask.subject, value, sent, answer.received)
                changed.append(ask.subject)
            elif ask.places:
                self._tell_again(ask.subject)
        return changed

    # --- who is here ---

    def _meet(self, now: int, identity: Callable[[bytes], str], changed: list[Leased]) -> Ask:
        home, how, by = identity(MEMBERS), b"ask", 0
        clock = self._clocks.get(home)
        if self._leaving:
            how = b"bye"
        elif (self._here or self._coming) and clock is not None and clock.known(now):
            how, by = b"here", clock.by(now + CALL)
            if home != self._home and self._home:
                # What the other one has leased to us is as good as a share there: it may go on without us.
                self._alone_until = max(self._alone_until, self._here_at + SHARE + LEASED_AHEAD)
            self._home, self._here_at = home, now
            if self.alone:
                changed += self._come_together(now)
        arguments = (
            *(b"meet", self.name.encode(), self.run.encode(), how, by, _short(home), self._candidate, self._replace),
            *(self.total, (now - self._alone_until) // MICROSECOND),
        )
        return Ask((MEMBERS,), arguments, identity=home)

    def _believe(self, ask: Ask, answer: Answer, sent: int) -> bool:
        """Whether the server is the one that was meant, and its clock was not set."""
        if answer.identity != ask.identity:
            self._discard("another server has answered")
            return False
        clock = self._clocks.get(answer.identity)
        if clock is None:
            if len(self._clocks) >= 64:
                self._clocks.clear()
            clock = self._clocks[answer.identity] = Clock()
        if not clock.check(int(answer.value[0]) * MICROSECOND, sent, answer.received):
            self._discard("the store's clock was set")
            self._replace = self._word
            return False
        return True

    def _discard(self, why: str) -> None:
        self.trouble = why
        self.discarded += 1
        self._here = self._coming = False

    def _met(self, value: list[Any] | None, sent: int, received: int) -> None:
        """The reply to `meet`."""
        said = self._here or self._coming
        self._here = self._coming = False
        if value is None or self._leaving:
            return
        verdict, word = value[1], bytes(value[2])
        if word != self._word:
            self.epochs += bool(self._word)
            self._word = word
        if self._replace and word != self._replace:
            self._replace = b""
        if word == self._candidate:
            self._candidate = self._draw().encode()
        if verdict == _ASKED:
            self._coming = True
        elif verdict == _DONE and said:
            self._here = True
            self._taken_since = None
            self.trouble = ""
            self._view_sent, self._view_at = sent, received
            self.view = tuple(_members(value[3:]))
            # A store that remembers us knows who has left; one that does not may know less than we.
            if word == self._seen_word or len(self.view) >= self._seen or sent - self._seen_at > _REMEMBERED:
                self._seen, self._seen_at, self._seen_word = len(self.view), sent, word
            self.told = next((member.told for member in self.view if member.name == self.name), 0)
        elif verdict == _TAKEN:
            self._taken(sent)

    def _taken(self, now: int) -> None:
        """Another process is here under our name: the one before us, or for good."""
        self._coming = True
        self.told = 0
        self.trouble = f"another proxy is here as {self.name}"
        if self._taken_since is None:
            self._taken_since = now
        elif now - self._taken_since >= TAKEN_FOR:
            self.name, self._taken_since = f"{self.name}#{self.run[:6]}", None

    def _go_alone(self, now: int) -> None:
        self.alone = True
        self.degraded += 1
        self.since = now
        self._share_from = self._here_at + SHARE
        self._to_part = [each for each in self.throttles if each not in self.hungry] + list(self.hungry)

    def _part(self, now: int) -> list[Leased]:
        """Some throttles go on with their shares; those that do not yet have what was leased, and no more."""
        parted = self._to_part[-_PARTED_AT_ONCE:]
        del self._to_part[-_PARTED_AT_ONCE:]
        for throttle in parted:
            if throttle in self.throttles:
                throttle.go_alone(self.told, self._share_from, now)
                self._places_alone(throttle)
        return parted

    def _come_together(self, now: int) -> list[Leased]:
        """We say that we are here: from now on nothing of our share goes."""
        self.alone = False
        self.since = now
        self._to_part.clear()
        for throttle in self.throttles:
            if throttle.alone_until is not None:
                self._alone_until = max(self._alone_until, throttle.alone_until)
                throttle.alone_until = None
            throttle.come_together(now)
        return list(self.throttles)

    # --- slots ---

    def _may_ask(self, now: int) -> bool:
        return self._here and not self._leaving and self._view_sent + VIEW > now and self.told > 0

    def _wanting(self, now: int) -> Iterator[Leased]:
        for throttle in list(self.hungry):
            if throttle.wanted() > 0:
                if now >= self.throttles[throttle].not_before:
                    yield throttle
            elif not throttle.waited_for() and not throttle.pace:
                del self.hungry[throttle]

    def _slots(self, now: int, identity: Callable[[bytes], str]) -> Iterator[Ask]:
        age = max(0, now - self._view_at)
        for throttle in self._wanting(now):
            account = self.throttles[throttle]
            left = [left_for(limit, self.view, self.total, age) for limit in throttle.limits]
            if not all(left):
                account.not_before = now + _NOTHING_LEFT
                throttle.expected = now + SECOND
                continue
            keys = tuple([f"{account.keys}:{limit.seconds}".encode() for limit in throttle.limits])
            home = identity(keys[0])
            clock = self._clocks.get(home)
            settled = clock is not None and clock.settled(now)
            terms: list[int] = []
            for limit, amount in zip(throttle.limits, left, strict=True):
                interval, burst = throttle.spacing(limit, self.total, amount)
                terms += (interval // MICROSECOND, burst)
            most = throttle.wanted() if settled else 0
            by = clock.by(min(now + CALL, self._view_sent + VIEW)) if clock is not None and settled else 0
            if most:
                throttle.called()
            arguments = (b"slots", self.name.encode(), by, self._word_at(home), most, LEASED_AHEAD // MICROSECOND)
            yield Ask(keys, (*arguments, *terms), throttle, identity=home)

    def _got_slots(self, throttle: Leased, value: list[Any], sent: int, received: int) -> None:
        if value[1] != _DONE:
            return
        account = self.throttles.get(throttle)
        wait = int(value[2]) * MICROSECOND
        if account is not None:
            account.not_before = received + wait
        throttle.users = int(value[3])
        throttle.expected = received + wait + (LEASED_AHEAD // 2 if wait else 0)
        if throttle.alone is None:
            before = throttle.granted
            throttle.lease(_leased(value[4:], sent, received))
            self.granted += throttle.granted - before

    def _word_at(self, identity: str) -> bytes:
        """The epoch, and which server it is: what another one has of a limit may be old."""
        return self._word + b"." + _short(identity)

    # --- places ---

    def _places(self, now: int, identity: Callable[[bytes], str]) -> Iterator[Ask]:
        for throttle in list(self.moved):
            account = self.throttles[throttle]
            used, wanted = throttle.used_here, throttle.line.size if throttle.line is not None else 0
            quiet = account.told == (used, wanted) and not (wanted and throttle.full())
            least = self._place_for_each(throttle)
            if not throttle.places or (quiet and not used and throttle.cap_here <= least):
                del self.moved[throttle]
                if self._parting.get(account.keys) is throttle:
                    del self._parting[account.keys]
                    self._forget(throttle)
                continue
            if quiet and now - account.told_at < _TELL_AGAIN:
                continue
            if quiet and not used:
                throttle.set_places(least)  # nobody has wanted one for a while: they are for others
            home = identity(account.places_key)
            clock = self._clocks.get(home)
            if clock is None or not clock.settled(now):
                if clock is None or not clock.known(now):
                    yield Ask((account.places_key,), (b"slots", b"", 0, b"", 0, 0), throttle, identity=home)
                continue
            account.told, account.told_at = (used, wanted), now
            by = clock.by(min(now + CALL, self._view_sent + VIEW))
            arguments = (
                *(b"places", self.name.encode(), by, self._word_at(home), self.run.encode(), account.generation),
                *(used, wanted, throttle.cap_here, throttle.places, share(throttle.places, self.total)),
                *(self._place_for_each(throttle), max(0, self.total - len(self.view))),
            )
            names = tuple([(b"-" if each.silent > SILENT else b"+") + each.name.encode() for each in self.view])
            yield Ask((account.places_key,), (*arguments, *names), throttle, True, home)

    def _place_for_each(self, throttle: Leased) -> int:
        """A place that no member is without, if there are as many: who loses the store goes on with it at least."""
        return int(throttle.places >= self.total)

    def _got_places(self, throttle: Leased, value: list[Any], sent: int, received: int) -> None:
        account = self.throttles.get(throttle)
        if value[1] != _DONE:
            self._tell_again(throttle)
        if account is None or value[1] != _DONE or self.alone:
            return
        generation, cap = int(value[2]), int(value[3])
        if generation != account.generation:
            account.generation = generation
            account.told = None  # it is to be said that we know
            self.moved[throttle] = None
        throttle.set_places(cap)

    def _tell_again(self, throttle: Leased) -> None:
        """Whether the store knows what is used here is not known."""
        account = self.throttles.get(throttle)
        if account is not None:
            account.told = None
            self.moved[throttle] = None

    def _places_alone(self, throttle: Leased) -> None:
        """No more than it had, and no more than its share; what is open stays so."""
        if throttle.places:
            own = min(throttle.cap_here, self._share_of_places(throttle))
            throttle.set_places(max(own, self._place_for_each(throttle) if self.told else 0))

    def _share_of_places(self, throttle: Leased) -> int:
        return share(throttle.places, self.told)


def _short(identity: str) -> bytes:
    return hashlib.sha1(identity.encode(), usedforsecurity=False).hexdigest()[:12].encode()


def _members(flat: Sequence[Any]) -> Iterator[Member]:
    for number in range(0, len(flat) - 3, 4):
        name, silent, alone, told = flat[number : number + 4]
        yield Member(
            bytes(name).decode("utf-8", "replace"), int(silent) * MICROSECOND, int(alone) * MICROSECOND, int(told)
        )


def _leased(runs: Sequence[Any], sent: int, received: int) -> Iterable[Slot]:
    """Each slot: not before receipt + offset, and with the slack of its permits until call + offset + slack + CALL."""
    for number in range(0, len(runs) - 2, 3):
        first, step, n = (int(each) * MICROSECOND for each in runs[number : number + 3])
        for index in range(n // MICROSECOND):
            offset = first + step * index
            yield Slot(received + offset, sent + offset + CALL)
