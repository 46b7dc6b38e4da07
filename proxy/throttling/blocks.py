"""The throttles that the proxy itself imposes: the operator's `throttle NAME { … }` blocks.

Which blocks hold for a connection is decided by `Rules` (in `policy.limits`); here each of them has a throttle for
whatever counts by itself there, and a reload changes these. Their delivery rate counts messages where they are seen,
each asked for by itself, and connections else: a place takes a slot that is used at once. A connection rate has a meter
of its own, where every new connection takes one. Waiting is done in `places`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from proxy.model import Names
from proxy.throttling.flows import Throttle
from proxy.throttling.throttle import SECOND, Key, Limit, Shadow

#: Verdicts and idle throttles are dropped when there are more: addresses may come from whole prefixes.
MAX_REMEMBERED = 65_536
#: Seconds that most requests can wait, where the block does not say: for what a shadow would have refused.
_LONGEST_WAIT = 40.0


class Rate(Protocol):
    """`amount` connections in any `seconds` seconds."""

    @property
    def amount(self) -> int: ...
    @property
    def seconds(self) -> int: ...


class Block(Protocol):
    """One block as configured. 0 places or no rate: unlimited. `enforce`: else it only counts.

    `wait` in seconds; None: as long as who asks can wait.
    """

    @property
    def name(self) -> str: ...
    @property
    def max_concurrent_connections(self) -> int: ...
    @property
    def max_delivery_rate(self) -> Sequence[Rate]: ...
    @property
    def max_connection_rate(self) -> Sequence[Rate]: ...
    @property
    def wait(self) -> float | None: ...
    @property
    def enforce(self) -> bool: ...


class Rules(Protocol):
    """All blocks, and which of them hold for whom; false without any."""

    @property
    def blocks(self) -> Mapping[str, Block]: ...
    @property
    def by_instance(self) -> bool: ...
    def __bool__(self) -> bool: ...
    def match(self, instance: str, source: str, destination: str, names: Names) -> Sequence[tuple[str, str, str]]:
        """Name, and the source and the receiver that count by themselves ("": all together), of each."""


class NoRules:
    """The rules of who has none."""

    by_instance = False

    def __init__(self) -> None:
        self.blocks: Mapping[str, Block] = {}

    def __bool__(self) -> bool:
        return False

    def match(self, instance: str, source: str, destination: str, names: Names) -> Sequence[tuple[str, str, str]]:
        return ()


class Applying(NamedTuple):
    """The throttles that hold for one connection.

    Args:
        all: for its places; those that only count, too. messages: for each message on it.
    """

    all: tuple[Throttle, ...]
    messages: tuple[Throttle, ...]


_Verdict = tuple[str, str, str, Names]


class Blocks:
    """All blocks and their throttles; false when there are none.

    Args:
        start: when the proxy began, in nanoseconds: what its predecessor did is unknown.
    """

    def __init__(self, rules: Rules, start: int) -> None:
        self._start = start
        self._rules = rules
        self._throttles: dict[Key, Throttle] = {}
        self._connections: dict[Key, Throttle] = {}  # the meters of connection rates
        self._verdicts: dict[_Verdict, tuple[Key, ...]] = {}
        self._stale: dict[Throttle, None] = {}

    def __bool__(self) -> bool:
        return bool(self._rules)

    @property
    def stale(self) -> bool:
        """Whether `refresh` has more to do."""
        return bool(self._stale)

    def reload(self, rules: Rules) -> None:
        """Put other blocks in force, by and by (`refresh`); each throttle at once when it is asked for. Places and
        debts stay with the name and what it counts by."""
        self._rules = rules
        self._verdicts.clear()
        self._stale = dict.fromkeys(self.throttles())

    def refresh(self, now: int, most: int) -> list[Throttle]:
        """Put new terms in force for some of the throttles that a reload has left.

        Returns:
            throttles whose lines must be looked at again.
        """
        fresh: list[Throttle] = []
        while self._stale and len(fresh) < most:
            throttle, _ = self._stale.popitem()
            self._configure(throttle, now)
            fresh.append(throttle)
        return fresh

    def forget_verdicts(self) -> None:
        """What is known of addresses has changed: who comes from now on is judged anew."""
        self._verdicts.clear()

    def match(self, owner: str, source: str, destination: str, names: Names, now: int) -> Applying:
        """The throttles for a connection from one address to another, both in canonical text form.

        Args:
            owner: the instance, or a client's address, which no block can name.
        """
        case = owner if self._rules.by_instance else "", source, destination, names
        keys = self._verdicts.get(case)
        if keys is None:
            keys = self._judge(case)
        blocks = self._rules.blocks
        messages = tuple([self._throttle(self._throttles, key, now) for key in keys])
        paced = tuple([self._paced(key, now) for key in keys if blocks[key.name].max_connection_rate])
        return Applying(messages + paced, messages)

    def wait(self, throttles: Iterable[Throttle]) -> float | None:
        """Seconds that a request may queue under these: the shortest that a block says; None: none does.

        An instance's throttle may have the name of a block, and is none.
        """
        names = [throttle.key.name for throttle in throttles if throttle.counts and throttle.shadow is None]
        waits = [self._rules.blocks[name].wait for name in names if name in self._rules.blocks]
        return min([wait for wait in waits if wait is not None], default=None)

    def throttles(self) -> Iterable[Throttle]:
        return [*self._throttles.values(), *self._connections.values()]

    def _judge(self, case: _Verdict) -> tuple[Key, ...]:
        hits = self._rules.match(*case)
        keys = tuple([Key(source, name, receiver) for name, source, receiver in hits])
        if len(self._verdicts) >= MAX_REMEMBERED:
            self._verdicts.clear()
        self._verdicts[case] = keys
        return keys

    def _paced(self, key: Key, now: int) -> Throttle:
        return self._throttle(self._connections, key, now)

    def _throttle(self, known: dict[Key, Throttle], key: Key, now: int) -> Throttle:
        throttle = known.get(key)
        if throttle is None:
            if len(known) >= MAX_REMEMBERED:
                for idle in [key for key, each in known.items() if not each.busy(now)]:
                    self._stale.pop(known.pop(idle), None)
            throttle = known[key] = Throttle(key, counts=True)
            throttle.connections = known is self._connections
            self._configure(throttle, now)
        elif self._stale and throttle in self._stale:
            self._configure(throttle, now)  # who waits there is looked at by `refresh`
        return throttle

    def _configure(self, throttle: Throttle, now: int) -> None:
        block = self._rules.blocks.get(throttle.key.name)
        rates: Sequence[Rate] = ()
        if block is not None:
            rates = block.max_connection_rate if throttle.connections else block.max_delivery_rate
        lowest: dict[int, int] = {}
        for rate in rates:
            lowest[rate.seconds] = min(rate.amount, lowest.get(rate.seconds, rate.amount))
        throttle.limit_to(tuple(Limit(lowest[seconds], seconds) for seconds in sorted(lowest)), self._start, now)
        throttle.cap = block.max_concurrent_connections if block is not None and not throttle.connections else 0
        if block is None or block.enforce:
            throttle.shadow = None
        else:
            throttle.shadow = throttle.shadow or Shadow()
            throttle.shadow.patience = int((block.wait if block.wait is not None else _LONGEST_WAIT) * SECOND)
