"""Containers for very many things, no step of which takes long however many they are.

A dict that grows is copied whole, now and then: 30 to 80 ms at 350,000 entries. One whose first entries go looks at
their empty places again, whenever it is asked for its first. Both would be a pause of everybody. Nothing here knows
what is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator, MutableMapping
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

#: Pieces of a mapping, a power of two: 500,000 entries are 31,000 in each.
PIECES: Final = 16
#: The bits of a hash that say in which piece a key is.
MASK: Final = PIECES - 1


class Pieces(MutableMapping[Key, Value]):
    """A dict in pieces, each of which grows by itself. Its order is that of nothing in particular.

    Attributes:
        pieces: a key is in `pieces[hash(key) & MASK]`; for those to whom a call would be too slow.
    """

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: tuple[dict[Key, Value], ...] = tuple([{} for _ in range(PIECES)])

    def __getitem__(self, key: Key) -> Value:
        return self.pieces[hash(key) & MASK][key]

    def __setitem__(self, key: Key, value: Value) -> None:
        self.pieces[hash(key) & MASK][key] = value

    def __delitem__(self, key: Key) -> None:
        del self.pieces[hash(key) & MASK][key]

    def __contains__(self, key: object) -> bool:
        return key in self.pieces[hash(key) & MASK]

    def get(self, key: Key, default: Value | None = None) -> Value | None:  # type: ignore[override]
        return self.pieces[hash(key) & MASK].get(key, default)

    def __len__(self) -> int:
        return sum(map(len, self.pieces))

    def __bool__(self) -> bool:
        return any(self.pieces)

    def __iter__(self) -> Iterator[Key]:
        for piece in self.pieces:
            yield from piece


class Rota(Generic[Key]):
    """Who waits for a turn, each once, in the order they came."""

    __slots__ = ("_all", "_order")

    def __init__(self) -> None:
        self._order: deque[Key] = deque()
        self._all: set[Key] = set()

    def __len__(self) -> int:
        return len(self._order)

    def add(self, item: Key) -> None:
        """Behind the others, if it does not wait already."""
        if item not in self._all:
            self._all.add(item)
            self._order.append(item)

    def next(self) -> Key:
        """The first one, which does not wait any more."""
        item = self._order.popleft()
        self._all.remove(item)
        return item
