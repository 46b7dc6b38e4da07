"""The throttles that the proxy itself imposes: the operator's `throttle NAME { … }` blocks.

Which blocks apply to a connection (by source and destination), one throttle for each source address, and what a reload
changes. Their rate counts connections: a place takes a slot that is used at once. Waiting is done in `places`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Protocol

from proxy.throttling.flows import Throttle
from proxy.throttling.throttle import Key, Limit

#: Verdicts and idle throttles are dropped when there are more: addresses may come from whole prefixes.
MAX_REMEMBERED = 65_536


class Rate(Protocol):
    """`amount` connections in any `seconds` seconds."""

    @property
    def amount(self) -> int: ...
    @property
    def seconds(self) -> int: ...


class Block(Protocol):
    """One block as configured; empty networks: any. 0 places or no rate: unlimited.

    `wait` in seconds; None: as long as who asks can wait.
    """

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> Sequence[IPv4Network | IPv6Network]: ...
    @property
    def destination(self) -> Sequence[IPv4Network | IPv6Network]: ...
    @property
    def max_concurrent_connections(self) -> int: ...
    @property
    def max_delivery_rate(self) -> Sequence[Rate]: ...
    @property
    def wait(self) -> float | None: ...


class Blocks:
    """All blocks and their throttles; false when there are none.

    Args:
        start: when the proxy began, in nanoseconds: what its predecessor did is unknown.
    """

    def __init__(self, blocks: Iterable[Block], start: int) -> None:
        self._start = start
        self._blocks: dict[str, Block] = {block.name: block for block in blocks}
        self._throttles: dict[Key, Throttle] = {}
        self._verdicts: dict[tuple[str, str], tuple[str, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def reload(self, blocks: Iterable[Block], now: int) -> list[Throttle]:
        """Put other blocks in force. Places and debts stay with the name.

        Returns:
            throttles whose lines must be looked at again.
        """
        self._blocks = {block.name: block for block in blocks}
        self._verdicts.clear()
        for throttle in self._throttles.values():
            self._configure(throttle, now)
        return list(self._throttles.values())

    def match(self, source: str, destination: str, now: int) -> tuple[Throttle, ...]:
        """The throttles for a connection from one address to another, both in canonical text form."""
        names = self._verdicts.get((source, destination))
        if names is None:
            names = self._judge(source, destination)
        return tuple([self._throttle(Key(source, name), now) for name in names])

    def wait(self, throttles: Iterable[Throttle]) -> float | None:
        """Seconds that a request may queue under these: the shortest that a block says; None: none does.

        An instance's throttle may have the name of a block, and is none.
        """
        names = [throttle.key.name for throttle in throttles if throttle.counts]
        waits = [self._blocks[name].wait for name in names if name in self._blocks]
        return min([wait for wait in waits if wait is not None], default=None)

    def throttles(self) -> Iterable[Throttle]:
        return self._throttles.values()

    def _judge(self, source: str, destination: str) -> tuple[str, ...]:
        leaving, going = ip_address(source), ip_address(destination)
        names = tuple(
            block.name
            for block in self._blocks.values()
            if (not block.source or any(leaving in network for network in block.source))
            and (not block.destination or any(going in network for network in block.destination))
        )
        if len(self._verdicts) >= MAX_REMEMBERED:
            self._verdicts.clear()
        self._verdicts[source, destination] = names
        return names

    def _throttle(self, key: Key, now: int) -> Throttle:
        throttle = self._throttles.get(key)
        if throttle is None:
            if len(self._throttles) >= MAX_REMEMBERED:
                self._throttles = {key: each for key, each in self._throttles.items() if each.busy(now)}
            throttle = self._throttles[key] = Throttle(key, counts=True)
            self._configure(throttle, now)
        return throttle

    def _configure(self, throttle: Throttle, now: int) -> None:
        block = self._blocks.get(throttle.key.name)
        rates = block.max_delivery_rate if block is not None else ()
        lowest: dict[int, int] = {}
        for rate in rates:
            lowest[rate.seconds] = min(rate.amount, lowest.get(rate.seconds, rate.amount))
        throttle.limit_to(tuple(Limit(lowest[seconds], seconds) for seconds in sorted(lowest)), self._start, now)
        throttle.cap = block.max_concurrent_connections if block is not None else 0
