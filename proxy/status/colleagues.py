"""What the process with the status page and the control socket asks of the others: an interface.

With `workers`, a master has the listeners' view of the world and each worker its own connections. The master answers
operators for all of them: it asks, and adds up. How questions travel is not known here. A question is a word and bytes;
both ends of each are in `server.questions`; `Answers` is what a worker has to call. With one process nobody is
asked: `Alone`.

Whoever does not answer in time is named, and what is shown goes without him: no answer to an operator waits for a
process that hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from proxy.status.parts import Part


class Reply(NamedTuple):
    """What one worker has answered. `who`: its number; `body`: None: nothing in time, or nothing that can be read."""

    who: int
    body: bytes | None


#: Roles.
MASTER, WORKER, LEAVING = "master", "worker", "leaving"


class Member(NamedTuple):
    """A process of the program, as the master keeps it.

    Args:
        number: 0: the master; its workers from 1. A worker that replaces another has its number.
        role: `master`, `worker`, or `leaving`: takes nothing new, and ends when it has nothing left.
        pid: 0: there is none at the moment: it died, and another one is to come.
        since: when it was started, monotonic clock.
        restarts: how many of this number have died. died: of what the last one did, in words; deaths: when, monotonic,
            of the last ones.
        heard_at: when it has said something last, monotonic; a process that works says something each second.
    """

    number: int
    role: str
    pid: int
    version: str
    since: float
    restarts: int = 0
    died: str = ""
    deaths: tuple[float, ...] = ()
    heard_at: float = 0.0


#: What is told of what was asked to be told: which worker, and the bytes. Called in the hub; must not wait.
Hear = Callable[[int, bytes], object]


class Colleagues(Protocol):
    """The other processes. A body may be some megabytes (each of 4,000 connections has 150 bytes in a list of them):
    who carries it cuts it into what fits through the link."""

    def members(self) -> Sequence[Member]:
        """The master itself in front, then the others by number. Does not wait."""

    def parts(self) -> Sequence[Part]:
        """What each has said last, and in one what those had counted that are gone; see `roll.Roll`. Does not wait."""

    def heard(self, who: int, part: Part) -> None:
        """One has said this, asked or not. Does not wait."""

    def ask(self, what: str, body: bytes, seconds: float, who: int | None = None) -> list[Reply]:
        """Ask all of them at the same time, or one; waits for the last one, but no longer than so, and not for who
        has been silent for long.

        Returns:
            in the order of their numbers, one for each that there was when it was asked.
        """

    def follow(self, what: str, body: bytes, hear: Hear) -> Callable[[], None]:
        """Have all of them tell what happens, also those that come later, until the function that comes back is
        called; a second time does nothing. Does not wait. What comes faster than it is taken is left out by who
        tells."""


#: Takes what a worker tells, without waiting; False: there is no room, and it is left out.
Say = Callable[[bytes], bool]


class Answers(Protocol):
    """What a worker has to call. The first is said each second, whether anybody asks or not."""

    def part(self) -> bytes:
        """What it knows, for `Colleagues.parts`; may wait."""

    def answer(self, what: str, body: bytes) -> bytes:
        """To `Colleagues.ask`; b"" where the question is not known. May wait: each in a greenlet of its own."""

    def tell(self, what: str, body: bytes, say: Say) -> Callable[[], None]:
        """To `Colleagues.follow`: tell what happens until the function that comes back is called. Does not wait."""


class Alone:
    """There are no others. Implements `Colleagues`."""

    def members(self) -> Sequence[Member]:
        """See `Colleagues`."""
        return ()

    def parts(self) -> Sequence[Part]:
        """See `Colleagues`."""
        return ()

    def heard(self, who: int, part: Part) -> None:
        """See `Colleagues`."""

    def ask(self, what: str, body: bytes, seconds: float, who: int | None = None) -> list[Reply]:
        """See `Colleagues`."""
        return []

    def follow(self, what: str, body: bytes, hear: Hear) -> Callable[[], None]:
        """See `Colleagues`."""
        return lambda: None
