"""What an operator has set by hand for a time: a throttle that is paused, or that has lower limits than it would have.

By name, and for one source address or all of them. The least of all that hold counts, and never more than there would
be without. Each ends by itself; nothing is stored, so a restart ends all of them, and a reload none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from proxy.throttling.limits import Effective
from proxy.throttling.throttle import TICK, Key, Limit
from proxy.throttling.wheel import Wheel

#: What stands in for the rate of a throttle that has none, while it is paused: none to speak of.
NO_RATE = Limit(100_000, 1)

#: Why a throttle is closed.
BY_HAND = "by hand"


class Override(NamedTuple):
    """One of them.

    Args:
        source: "": of all source addresses. pause: nothing new goes on. places: 0: nothing is said of them.
        limits: one for each length of window. until: nanoseconds of the manager's clock. because: the operator's words.
    """

    name: str
    source: str
    pause: bool
    places: int
    limits: tuple[Limit, ...]
    until: int
    because: str = ""

    def holds(self, key: Key) -> bool:
        return key.name == self.name and self.source in ("", key.source)


class Overrides:
    """All of them, by number."""

    def __init__(self) -> None:
        self.wheel: Wheel[int] = Wheel(TICK)
        self._all: dict[int, Override] = {}
        self._next = 1

    def __bool__(self) -> bool:
        return bool(self._all)

    def items(self) -> list[tuple[int, Override]]:
        """The oldest first."""
        return list(self._all.items())

    def add(self, override: Override) -> int:
        """Its number from now on. Another one of the same kind for the same throttles is over."""
        for number in [each for each, other in self._all.items() if _same(other, override)]:
            self._end(number)
        number, self._next = self._next, self._next + 1
        self._all[number] = override
        self.wheel.arm(number, override.until)
        return number

    @property
    def next_number(self) -> int:
        return self._next

    def adopt(self, all: Iterable[tuple[int, Override]], next_number: int) -> None:
        """Those of another manager, with the numbers that they have there."""
        for number, override in all:
            self._all[number] = override
            self.wheel.arm(number, override.until)
        self._next = next_number

    def end(self, fits: Callable[[int, Override], bool]) -> list[Override]:
        """End those that fit."""
        return [self._end(number) for number in [each for each, other in self._all.items() if fits(each, other)]]

    def expire(self, now: int, most: int) -> list[Override]:
        """Those whose time is over."""
        return [self._all.pop(number) for number in self.wheel.expire(now, most)]

    def of(self, key: Key) -> Iterator[Override]:
        """Those that hold for a throttle."""
        return (override for override in self._all.values() if override.holds(key))

    def apply(self, key: Key, terms: Effective) -> tuple[Effective, int]:
        """What a throttle has by these terms, and when the last pause ends; 0: there is none."""
        closed_until = 0
        for override in self.of(key):
            terms = _least(terms, override)
            if override.pause:
                closed_until = max(closed_until, override.until)
        return terms, closed_until

    def _end(self, number: int) -> Override:
        self.wheel.disarm(number)
        return self._all.pop(number)


def _same(one: Override, other: Override) -> bool:
    return (one.name, one.source, one.pause) == (other.name, other.source, other.pause)


def _least(terms: Effective, override: Override) -> Effective:
    limits = {limit.seconds: limit for limit in terms.limits}
    for limit in override.limits:
        known = limits.get(limit.seconds)
        if known is None:
            limits[limit.seconds] = limit
        elif limit.amount < known.amount:
            burst = min(known.burst, limit.burst, max(1, limit.amount - 1))
            limits[limit.seconds] = limit._replace(burst=burst)
    places = min(terms.places, override.places) if terms.places and override.places else terms.places or override.places
    return Effective(tuple(limits[seconds] for seconds in sorted(limits)), places, terms.mixed)


def told(override: Override) -> str:
    """In words: `pause yahoo`, `limit gmail for 192.0.2.1: 5 connections, 100 in 3600 s`."""
    whom = override.name + (f" for {override.source}" if override.source else "")
    if override.pause:
        return f"pause {whom}"
    limits = [f"{override.places} connections"] * (override.places > 0)
    limits += [f"{limit.amount} in {limit.seconds} s" for limit in override.limits]
    return f"limit {whom}: {', '.join(limits)}"
