"""What the processes of one proxy ask each other for operators: both ends of each question, and how answers add up.

`Answering` is a worker's end, `Everywhere` the master's, which asks itself, too (`here`). A question is a word, its
body and the answer MessagePack; a process of another version that does not know a question, or answers something else,
is one that has not answered. `status.colleagues` says how they travel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, msgpack

from proxy.control import watching
from proxy.control.house import Heard
from proxy.log.outputs import MOST_RECENT, Recent
from proxy.model import Endpoint
from proxy.policy.logins import Entry, Logins
from proxy.server import neighbours
from proxy.server.here import Here
from proxy.status import parts
from proxy.status.colleagues import WORKER, Colleagues, Say
from proxy.status.parts import Details, Part, merge
from proxy.status.rows import ConnectionRow

#: An answer that takes longer is not waited for; seconds.
WITHIN = 2.0
#: So many parts are said without details, and then one with them.
_PLAIN_PARTS = 9
_Found = TypeVar("_Found")


class Verbose(Struct):
    """`log_verbose`: the steps of which connections are written, for so many seconds, and until `log_less` of `id`."""

    id: str
    wanted: dict[str, str]
    seconds: float


class Answering:
    """A worker's answers. Implements `colleagues.Answers`."""

    def __init__(self, here: Here | Household) -> None:
        self._here = here
        self._until_details = 0
        self._answers: dict[str, Callable[[bytes], Any]] = {
            "part": lambda _: here.part(),
            "expect": lambda body: here.expect(*msgpack.decode(body, type=tuple[list[str], list[str]])),
            "connections": lambda _: here.connections(),
            "events": lambda _: here.events(),
            "logins": lambda _: here.logins(),
            "drop_cached": lambda body: here.drop_cached(msgpack.decode(body, type=str)),
            "close": lambda body: here.close(msgpack.decode(body, type=int)),
            "log_verbose": lambda body: self._verbose(msgpack.decode(body, type=Verbose)),
            "log_less": lambda body: here.log_less(msgpack.decode(body, type=str | None)),
        }

    def part(self) -> bytes:
        """See `Answers`."""
        detailed = self._until_details == 0
        self._until_details = _PLAIN_PARTS if detailed else self._until_details - 1
        return parts.encode(self._here.part(detailed))

    def answer(self, what: str, body: bytes) -> bytes:
        """See `Answers`."""
        found = self._answers.get(what)
        try:
            return msgpack.encode(found(body)) if found is not None else b""
        except (msgspec.MsgspecError, ValueError):
            return b""

    def tell(self, what: str, body: bytes, say: Say) -> Callable[[], None]:
        """See `Answers`."""
        try:
            wanted = msgpack.decode(body, type=dict[str, str])
        except msgspec.MsgspecError:
            wanted = None
        if what != "trace" or wanted is None:
            return lambda: None
        return self._here.tell(wanted, lambda lines: say(msgpack.encode(lines)))

    def _verbose(self, verbose: Verbose) -> None:
        self._here.log_verbose(verbose.wanted, verbose.seconds, verbose.id)


class Everywhere:
    """All processes, asked by the master, who is one of them.

    Args:
        within: seconds; an answer that takes longer is not waited for.
    """

    def __init__(self, here: Here, colleagues: Callable[[], Colleagues], within: float = WITHIN) -> None:
        self._here = here
        self._colleagues = colleagues
        self._within = within

    @property
    def verbose(self) -> list[watching.Verbose]:
        """Whose steps are written into the log for a time."""
        return self._here.watching.verbose

    def parts(self) -> list[Part]:
        """What the others know now; of who does not answer in time, what it has said last."""
        colleagues = self._colleagues()
        for reply in colleagues.ask("part", b"", self._within):
            with contextlib.suppress(msgspec.MsgspecError):
                colleagues.heard(reply.who, parts.decode(reply.body or b""))
        known = list(colleagues.parts())
        self._tell_trouble(known)
        return known

    def _tell_trouble(self, known: Sequence[Part]) -> None:
        """Whom one has trouble with all are to look at: what goes well elsewhere ends it."""
        here = self._here.trouble()
        theirs = [(_trouble(part.details), bool(part.processes)) for part in known if part.details is not None]
        alive = [here, *(trouble for trouble, is_alive in theirs if is_alive)]
        everything = tuple(set[str]().union(*names) for names in zip(here, *(each for each, _ in theirs), strict=True))
        if len(alive) > 1 and any(each != everything for each in alive):
            self._here.expect(*everything)
            self._colleagues().ask("expect", msgpack.encode(everything), self._within)

    def holder(self, source: str, destination: Endpoint) -> int | None:
        """The worker that has the connections between these addresses in mode smtp; None: there is one process."""
        workers = [each.number for each in self._colleagues().members() if each.role == WORKER]
        return workers[neighbours.holder(source, destination, len(workers))] if workers else None

    def connections(self) -> Heard[list[ConnectionRow]]:
        """All clients' connections, the oldest first."""
        lists, silent = self._ask("connections", None, list[ConnectionRow], self._here.connections)
        return Heard(sorted(_all(lists), key=lambda row: -row.age), silent)

    def events(self) -> Heard[list[Recent]]:
        """What was logged lately, the newest last."""
        lists, silent = self._ask("events", None, list[Recent], self._here.events)
        return Heard(sorted(_all(lists), key=lambda line: line.at)[-MOST_RECENT:], silent)

    def logins(self) -> Heard[Logins]:
        """Who has proven a name with which secret."""
        lists, silent = self._ask("logins", None, list[Entry], self._here.logins)
        return Heard(Logins(_all(lists)), silent)

    def drop_cached(self, source: str) -> Heard[int]:
        """Close held-open connections that leave from an address; how many."""
        counts, silent = self._ask("drop_cached", source, int, lambda: self._here.drop_cached(source))
        return Heard(sum(counts), silent)

    def close(self, number: int) -> Heard[bool]:
        """End a client's connection; False: none has one of this number."""
        if self._here.close(number):
            return Heard(True)
        found, silent = self._ask("close", number, bool, lambda: False)
        return Heard(any(found), silent)

    def log_verbose(self, wanted: Mapping[str, str], seconds: float, because: str, id: str = "") -> Heard[None]:
        """Write the steps of connections into the log, for a time; `id`: see `Watching.begin`."""
        verbose = Verbose(self._here.watching.begin(wanted, seconds, because, id), dict(wanted), seconds)
        return Heard(None, self._ask("log_verbose", verbose, type(None), lambda: None)[1])

    def log_less(self, id: str | None) -> Heard[int]:
        """End one of these, or all; how many there were."""
        ended = self._here.watching.end(id)
        return Heard(ended, self._ask("log_less", id, int, lambda: 0)[1])

    def trace(self, wanted: Mapping[str, str], seconds: float) -> watching.Lines:
        """The steps of connections as they happen."""

        def others(hear: watching.Hear) -> Callable[[], None]:
            def take(_: int, body: bytes) -> None:
                for line in _decoded(body, list[str]) or ():
                    hear(line)

            return self._colleagues().follow("trace", msgpack.encode(dict(wanted)), take)

        return watching.trace(wanted, seconds, others)

    def standing_orders(self) -> list[tuple[str, bytes]]:
        """What a worker that is new has to be asked first, that it may do as the others."""
        return [
            ("log_verbose", msgpack.encode(Verbose(each.id, dict(each.wanted), each.left)))
            for each in self._here.watching.verbose
        ]

    def _ask(
        self, what: str, words: Any, kind: Any, here: Callable[[], _Found]
    ) -> tuple[list[_Found], tuple[int, ...]]:
        """The answers, ours in front, and who has not answered."""
        answers = [here()]
        silent = []
        for who, body in self._colleagues().ask(what, msgpack.encode(words), self._within):
            try:
                answers.append(msgpack.decode(body or b"", type=kind))
            except msgspec.MsgspecError:
                silent.append(who)
        return answers, tuple(silent)


def _trouble(details: Details) -> tuple[set[str], set[str]]:
    return set(details.receivers), set(details.sources)


class Household:
    """A process that was replaced, with the workers that it still has, as the one sees it that took its place: what
    `Here` is of one."""

    def __init__(self, here: Here, colleagues: Callable[[], Colleagues]) -> None:
        self._here = here
        self._colleagues = colleagues
        # Whoever asks us waits, too, and has to hear what the others have said.
        self._everywhere = Everywhere(here, colleagues, WITHIN / 2)

    def part(self, detailed: bool = True) -> Part:
        """See `Here`, also for the others."""
        others = self._everywhere.parts() if detailed else self._colleagues().parts()
        return merge([self._here.part(detailed), *others])

    def expect(self, receivers: Iterable[str], sources: Iterable[str]) -> None:
        names = list(receivers), list(sources)
        self._here.expect(*names)
        self._colleagues().ask("expect", msgpack.encode(names), WITHIN / 2)

    def connections(self) -> list[ConnectionRow]:
        return self._everywhere.connections().found

    def events(self) -> list[Recent]:
        return self._everywhere.events().found

    def logins(self) -> list[Entry]:
        return self._everywhere.logins().found.entries()

    def drop_cached(self, source: str) -> int:
        return self._everywhere.drop_cached(source).found

    def close(self, number: int) -> bool:
        return self._everywhere.close(number).found

    def log_verbose(self, wanted: Mapping[str, str], seconds: float, id: str) -> None:
        self._everywhere.log_verbose(wanted, seconds, "", id)

    def log_less(self, id: str | None) -> int:
        return self._everywhere.log_less(id).found

    def tell(self, wanted: Mapping[str, str], say: Callable[[list[str]], bool]) -> Callable[[], None]:
        ends = [
            self._here.tell(wanted, say),
            self._colleagues().follow(
                "trace", msgpack.encode(dict(wanted)), lambda _, body: say(_decoded(body, list[str]) or [])
            ),
        ]

        def end() -> None:
            for each in ends:
                each()

        return end


def _decoded(body: bytes | None, kind: type[_Found]) -> _Found | None:
    try:
        return msgpack.decode(body or b"", type=kind)
    except msgspec.MsgspecError:
        return None


def _all(lists: Iterable[list[_Found]]) -> list[_Found]:
    return [each for some in lists for each in some]
