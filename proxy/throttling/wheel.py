"""A timing wheel: things that fall due, in buckets of one tick, without a timer each.

Its one job is "what is due by now, and when must I look again". An item sits in at most one bucket; arming it again
moves it. A bucket fires at its end, so never before an item is due and at most one tick after. Nothing here knows
what an item is.
"""

from __future__ import annotations

from collections.abc import Hashable
from heapq import heappop, heappush
from typing import Final, Generic, TypeVar

from proxy.throttling.many import MASK, Pieces

Item = TypeVar("Item", bound=Hashable)
#: A bucket is kept in lists of so many items: one of 100,000 would be looked at whole by each collection of garbage.
_PIECE: Final = 1_000
#: Entries looked at for one item wanted: those that were moved have left theirs behind.
_LOOKS: Final = 8


#: Later than anything is due.
NEVER: Final = 2**62 - 1


class Bell:
    """For who looks after several wheels: `due` is never later than the first of them fires, and may be earlier."""

    __slots__ = ("due",)

    def __init__(self) -> None:
        self.due = NEVER


class Wheel(Generic[Item]):
    """Items by due time.

    Args:
        tick_ns: width of a bucket in nanoseconds.

    Attributes:
        bell: set to whatever is armed before it.
    """

    __slots__ = ("_bucket_of", "_buckets", "_live", "_order", "_tick", "bell")

    def __init__(self, tick_ns: int) -> None:
        self._tick = tick_ns
        self._bucket_of: Pieces[Item, int] = Pieces()
        self._buckets: dict[int, list[list[Item]]] = {}  # in pieces, see `_PIECE`
        self._live: dict[int, int] = {}  # bucket → items that are really in it: moved ones leave a stale entry behind
        self._order: list[int] = []
        self.bell = Bell()

    def __len__(self) -> int:
        return len(self._bucket_of)

    def __contains__(self, item: Item) -> bool:
        return item in self._bucket_of

    def arm(self, item: Item, due_ns: int) -> None:
        """Let `item` fall due at `due_ns`, whatever was said about it before."""
        index = -(-due_ns // self._tick)
        piece = self._bucket_of.pieces[hash(item) & MASK]
        old = piece.get(item)
        if old == index:
            return
        if old is not None:
            self._live[old] -= 1
        piece[item] = index
        due, bell = index * self._tick, self.bell
        if due < bell.due:
            bell.due = due
        bucket = self._buckets.get(index)
        if bucket is None:
            self._buckets[index] = [[item]]
            self._live[index] = 1
            heappush(self._order, index)
        else:
            if len(bucket[-1]) >= _PIECE:
                bucket.append([])
            bucket[-1].append(item)
            self._live[index] += 1

    def arm_earlier(self, item: Item, due_ns: int) -> None:
        """Like `arm`, but never later than it already is."""
        index = self._bucket_of.pieces[hash(item) & MASK].get(item)
        if index is None or -(-due_ns // self._tick) < index:
            self.arm(item, due_ns)

    def due(self, item: Item) -> int | None:
        """When it falls due, to the tick; None: it is not armed."""
        index = self._bucket_of.get(item)
        return None if index is None else index * self._tick

    def disarm(self, item: Item) -> None:
        """Forget `item`; its place in a bucket is cleared when that bucket fires."""
        index = self._bucket_of.pieces[hash(item) & MASK].pop(item, None)
        if index is not None:
            self._live[index] -= 1

    def expire(self, now_ns: int, most: int | None = None) -> list[Item]:
        """The items that are due, each once; they are no longer armed.

        Args:
            most: that many of them at most; the others stay due, so that `next_wakeup` is in the past.
        """
        due: list[Item] = []
        if not self._order or self._order[0] * self._tick > now_ns:
            return due  # nearly always
        pieces = self._bucket_of.pieces
        looks = None if most is None else _LOOKS * most
        while self._order and self._order[0] * self._tick <= now_ns:
            index = self._order[0]
            bucket = self._buckets[index]
            while bucket:
                if len(due) == most or looks == 0:
                    return due
                last = bucket[-1]
                item = last.pop()
                if not last:
                    bucket.pop()
                if looks is not None:
                    looks -= 1
                piece = pieces[hash(item) & MASK]
                if piece.get(item) == index:
                    del piece[item]
                    self._live[index] -= 1
                    due.append(item)
            self._drop_first()
        return due

    def next_wakeup(self) -> int | None:
        """Nanosecond at which the first bucket fires, None when nothing is armed."""
        while self._order:
            if self._live[self._order[0]]:
                return self._order[0] * self._tick
            self._drop_first()
        return None

    def _drop_first(self) -> None:
        index = heappop(self._order)
        del self._buckets[index], self._live[index]
