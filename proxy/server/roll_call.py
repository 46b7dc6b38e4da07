"""What the master knows of its workers, and what it asks them: `status.colleagues.Colleagues`.

Who does not answer in time is one whose answer is missing. Who follows something hears of it until it says otherwise,
from workers that begin meanwhile, too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Protocol

from gevent.event import Event
from msgspec import MsgspecError

from proxy import __version__
from proxy.protocols import seam
from proxy.server import orders
from proxy.status import parts
from proxy.status.colleagues import Hear, Member, Reply
from proxy.status.parts import Part
from proxy.status.roll import Roll
from proxy.status.workers import SILENT


class Asked(Protocol):
    """A worker, as far as it is asked."""

    number: int
    serves: bool

    def say(self, record: seam.FromMaster) -> None: ...

    def order(self, what: str, body: object = None) -> None: ...


class RollCall:
    """See above.

    Args:
        everybody: workers and processes that this one has replaced. workers: those that follow.

    Attributes:
        roll: what is known of each.
    """

    def __init__(self, everybody: Callable[[], Sequence[Asked]], workers: Callable[[], Sequence[Asked]]) -> None:
        self.roll = Roll(os.getpid(), __version__, monotonic())
        self._everybody = everybody
        self._workers = workers
        self._ids: Iterator[int] = itertools.count(1)
        self._questions: dict[int, _Question] = {}
        self._followers: dict[int, tuple[str, bytes, Hear]] = {}

    def members(self) -> Sequence[Member]:
        """See `Colleagues`."""
        return self.roll.members()

    def parts(self) -> Sequence[Part]:
        """See `Colleagues`."""
        return self.roll.parts()

    def heard(self, who: int, part: Part) -> None:
        """See `Colleagues`."""
        self.roll.heard(who, part, monotonic())

    def heard_bytes(self, who: int, body: bytes) -> None:
        """The same, as it was said; what nobody understands is nothing."""
        with contextlib.suppress(MsgspecError):
            self.heard(who, parts.decode(body))

    def ask(self, what: str, body: bytes, seconds: float, who: int | None = None) -> list[Reply]:
        """See `Colleagues`. Who has been silent for long is not waited for, since everybody who looks would be."""
        there = [each for each in self._everybody() if each.serves and who in (None, each.number)]
        lately = monotonic() - SILENT
        asked = [each for each in there if self.roll.heard_at(each.number) > lately]
        id = next(self._ids)
        question = self._questions[id] = _Question({each.number for each in asked})
        for worker in asked:
            worker.say(seam.Question(id, what, body))
        try:
            if asked:
                question.done.wait(seconds)
        finally:
            del self._questions[id]
        return [Reply(each.number, question.bodies.get(each.number)) for each in there]

    def follow(self, what: str, body: bytes, hear: Hear) -> Callable[[], None]:
        """See `Colleagues`."""
        id = next(self._ids)
        self._followers[id] = (what, body, hear)
        for worker in self._workers():
            if worker.serves:
                worker.order(orders.FOLLOW, (id, what, body))

        def no_more() -> None:
            if self._followers.pop(id, None) is not None:
                for worker in self._workers():
                    worker.order(orders.FOLLOW_NO_MORE, id)

        return no_more

    # ---------------------------------------------------------------- what they say

    def replied(self, who: int, record: seam.Reply) -> None:
        """An answer has come."""
        question = self._questions.get(record.id)
        if question is not None and who in question.open:
            question.bodies[who] = record.body
            question.without(who)

    def followed(self, who: int, id: int, body: bytes) -> None:
        """Something that is followed has happened."""
        if id in self._followers:
            self._followers[id][2](who, body)

    def begins(self, worker: Asked) -> None:
        """It serves: it is told what is followed."""
        for id, (what, body, _) in self._followers.items():
            worker.order(orders.FOLLOW, (id, what, body))

    def gone(self, who: int) -> None:
        """It answers nothing any more."""
        for question in self._questions.values():
            question.without(who)


class _Question:
    """What was asked of some, whose answers are still open."""

    def __init__(self, open: set[int]) -> None:
        self.open = open
        self.bodies: dict[int, bytes] = {}
        self.done = Event()

    def without(self, who: int) -> None:
        self.open.discard(who)
        if not self.open:
            self.done.set()
