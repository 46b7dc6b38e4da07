"""Turns: how much whoever serves a peer does before others get their turn, in which order these do, and who must rest.

A peer may feed us as fast as it likes: frames, records, reads that bring nothing. So whoever serves one counts what it
does against a `Turn`, and when that is used up it stands in the `Line` behind the others. The line goes round by key
(an address, as a rule): many connections of one address get no more turns together than a single one of another. Pure:
the clock is an argument; the greenlets are `net.turns`'.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

#: What a turn has, in units of about a microsecond of work, and the seconds after which it is over all the same: some
#: work costs more than it is thought to.
WORK: Final = 1000
SECONDS: Final = 0.002
#: What is counted: a read, a frame of bytes that only pass through, a record or message that is acted upon.
READ: Final = 50
FRAME: Final = 2
RECORD: Final = 5
#: Turns of those in the line, and seconds of them, before sockets and timers are looked at again.
MOST_A_ROUND = 8
ROUND_SECONDS = 0.002

#: Refusals in a row that cost nothing, then seconds of the first pause, and of the longest.
_FREE_REFUSALS: Final = 4
_FIRST_PAUSE: Final = 0.01
_LONGEST_PAUSE: Final = 1.0

Item = TypeVar("Item", bound=Hashable)


class Turn:
    """What one who serves a peer may do now. A new one has begun, without an end in time.

    Attributes:
        key: whose turns these are; see `Line`. None: nobody's in particular.
        left: of its work; others come first when there is none, see `over`.
    """

    __slots__ = ("_ends", "key", "left")

    def __init__(self, key: Hashable = None) -> None:
        self.key = key
        self.left = WORK
        self._ends = float("inf")

    @property
    def over(self) -> bool:
        """Whether others come first now."""
        return self.left <= 0

    def begin(self, now: float) -> None:
        """It is our turn; `now` in seconds of a monotonic clock."""
        self.left = WORK
        self._ends = now + SECONDS

    def spend(self, work: int, now: float) -> bool:
        """Count work that is done, or is to be done now; whether the turn goes on after it."""
        self.left = self.left - work if now < self._ends else 0
        return self.left > 0

    def end(self) -> None:
        """Others come first, however much is left."""
        self.left = 0


class Line(Generic[Item]):
    """Who waits for another turn: one of each key, then the next of each, and within a key who came first.

    An item stands in the line once.
    """

    def __init__(self) -> None:
        self._keys: OrderedDict[Hashable, OrderedDict[Item, None]] = OrderedDict()
        self._key_of: dict[Item, Hashable] = {}

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, item: Item) -> bool:
        return item in self._key_of

    def add(self, key: Hashable, item: Item) -> None:
        """Last of its key; a key that nobody has yet is last of all."""
        self._key_of[item] = key
        self._keys.setdefault(key, OrderedDict())[item] = None

    def next(self) -> Item:
        """Take out whose turn it is; its key is behind all others then.

        Raises:
            KeyError: nobody waits.
        """
        key, items = self._keys.popitem(last=False)
        item, _ = items.popitem(last=False)
        del self._key_of[item]
        if items:
            self._keys[key] = items
        return item

    def leave(self, item: Item) -> None:
        """It does not wait any more; also when it did not."""
        if item not in self._key_of:
            return
        key = self._key_of.pop(item)
        items = self._keys[key]
        del items[item]
        if not items:
            del self._keys[key]


class Refusals:
    """How long one rests who asks again and again for what it does not get.

    A refusal costs the peer nothing and us some work. The first few in a row are free: a client may well try one thing
    after another.
    """

    __slots__ = ("_row",)

    def __init__(self) -> None:
        self._row = 0

    def refused(self) -> float:
        """One more; seconds until the peer is listened to again."""
        self._row += 1
        over = self._row - _FREE_REFUSALS
        return 0.0 if over <= 0 else min(_FIRST_PAUSE * 2.0 ** min(over - 1, 30), _LONGEST_PAUSE)

    def served(self) -> None:
        """It got something: the row is over."""
        self._row = 0
