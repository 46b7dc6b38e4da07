"""Seats for clients, of all processes of the proxy together (`max_connections`): who has how many of them.

The master lends them to its workers, many at a time while there are many, so hardly a client costs a word between two
processes. Who has none left asks for more; when the master has none left either, all others are asked for half of
those that they do not use. So never more are taken than there are, and nobody is refused while one is free anywhere.

Pure: what is to be said, and to whom, is what each call returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

#: A share of those that are free that is lent at a time, where no more are needed: one in so many, for each process.
_SHARE = 4


class Word(NamedTuple):
    """To a process: so many seats more (less, if it is negative; 0: there are none). None: give half of the free ones
    back, and say how many."""

    who: int
    seats: int | None


class Seats:
    """The master's book.

    Args:
        limit: how many there are. processes: that may ask.
    """

    def __init__(self, limit: int, processes: int) -> None:
        self._limit = limit
        self._processes = max(1, processes)
        self._lent: Counter[int] = Counter()
        self._waiting: dict[int, int] = {}  # who → how many it needs
        self._asked: set[int] = set()  # to give some back, and have not answered

    @property
    def free(self) -> int:
        """With the master; below 0 after the limit was lowered."""
        return self._limit - self._lent.total()

    def lent(self, who: int) -> int:
        """How many a process has."""
        return self._lent[who]

    def want(self, who: int, count: int) -> list[Word]:
        """A process needs so many more."""
        if self.free > 0 and not self._waiting:
            return [self._lend(who, count)]
        self._waiting[who] = count
        if self._asked:
            return []
        self._asked = {other for other, seats in self._lent.items() if seats > 0} - {who}
        return [Word(other, None) for other in sorted(self._asked)] or list(self._serve())

    def given_back(self, who: int, count: int) -> list[Word]:
        """It was asked to give some back."""
        self._lent[who] -= min(count, self._lent[who])
        return self._answered(who)

    def gone(self, who: int) -> list[Word]:
        """A process has ended."""
        del self._lent[who]
        self._waiting.pop(who, None)
        return self._answered(who)

    def hurry(self) -> list[Word]:
        """Whoever has not answered is not waited for any longer."""
        self._asked.clear()
        return list(self._serve())

    def set_limit(self, limit: int) -> list[Word]:
        """So many there are from now on; where they are fewer than were lent, each process loses its part.

        While one still has more clients than seats, another lets in as many as leave it: all together come down to the
        limit, and at no time are there more than when it was lowered.
        """
        self._limit = limit
        missing, lent = -self.free, self._lent.total()
        words = []
        for who, seats in sorted(self._lent.items()):
            part = -(-seats * missing // lent) if missing > 0 else 0
            if part:
                self._lent[who] -= part
                words.append(Word(who, -part))
        return words

    @property
    def waits(self) -> bool:
        """Whether somebody waits for what others give back."""
        return bool(self._waiting)

    def _answered(self, who: int) -> list[Word]:
        self._asked.discard(who)
        return [] if self._asked else list(self._serve())

    def _serve(self) -> Iterator[Word]:
        """Those who wait, in their order."""
        waiting, self._waiting = self._waiting, {}
        for who, count in waiting.items():
            yield self._lend(who, count)

    def _lend(self, who: int, count: int) -> Word:
        free = max(0, self.free)
        lent = min(free, max(count, free // (_SHARE * self._processes)))
        self._lent[who] += lent
        return Word(who, lent)
