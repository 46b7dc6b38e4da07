"""The throttles that the proxy itself imposes: the operator's `throttle NAME { … }` blocks.

Which blocks hold for a connection is decided by `Rules` (in `policy.limits`); here each of them has a throttle for
whatever counts by itself there, and a reload changes these. Their delivery rate counts messages where they are seen,
each asked for by itself, and connections else: a place takes a slot that is used at once. A connection rate has a meter
of its own, where every new connection takes one. Waiting is done in `places`.

Replies of receivers may slow them down: what was said, and until when it holds, is kept in `backoff`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from proxy.model import Names
from proxy.throttling.backoff import Backoffs, Rule, Slowdown
from proxy.throttling.cluster import Cluster
from proxy.throttling.flows import Throttle
from proxy.throttling.limits import Effective
from proxy.throttling.overrides import BY_HAND, NO_RATE, Override, Overrides
from proxy.throttling.throttle import SECOND, Key, Limit, Shadow
from proxy.throttling.warmup import Warmup, limit_on, number_of

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
    def warmup(self) -> Warmup | None: ...
    @property
    def wait(self) -> float | None: ...
    @property
    def enforce(self) -> bool: ...
    @property
    def scope(self) -> str: ...


class Rules(Protocol):
    """All blocks, and which of them hold for whom; false without any."""

    @property
    def blocks(self) -> Mapping[str, Block]: ...
    @property
    def by_instance(self) -> bool: ...
    @property
    def listeners(self) -> Mapping[str, object]:
        """Blocks that replies slow down, by name."""

    def __bool__(self) -> bool: ...
    def match(self, instance: str, source: str, destination: str, names: Names) -> Sequence[tuple[str, str, str]]:
        """Name, and the source and the receiver that count by themselves ("": all together), of each."""

    def struck(self, names: Iterable[str], reply: str) -> Iterable[tuple[str, Sequence[Rule]]]:
        """Those of these blocks that a reply concerns, and by which of their rules."""


class NoRules:
    """The rules of who has none."""

    by_instance = False

    def __init__(self) -> None:
        self.blocks: Mapping[str, Block] = {}
        self.listeners: Mapping[str, object] = {}

    def __bool__(self) -> bool:
        return False

    def match(self, instance: str, source: str, destination: str, names: Names) -> Sequence[tuple[str, str, str]]:
        return ()

    def struck(self, names: Iterable[str], reply: str) -> Iterable[tuple[str, Sequence[Rule]]]:
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
        overrides: what was set by hand, here and elsewhere.
        cluster: of the proxies that the limits of some blocks hold for together; None: there is no store for them.

    Attributes:
        backoffs: which of them are slowed down, and why.
        day: of the calendar, counted from 1970-01-01; 0: nobody has said it yet.
    """

    def __init__(self, rules: Rules, start: int, overrides: Overrides, cluster: Cluster | None = None) -> None:
        self._start = start
        self._cluster = cluster
        self._scopes: dict[str, str] = {}  # of blocks, as they were said first: another one holds from a restart on
        self._overrides = overrides
        self._rules = rules
        self._any = bool(rules)
        self._throttles: dict[Key, Throttle] = {}
        self._connections: dict[Key, Throttle] = {}  # the meters of connection rates
        self._verdicts: dict[_Verdict, tuple[Key, ...]] = {}
        self._stale: dict[Throttle, None] = {}
        self.backoffs = Backoffs()
        self.day = 0

    def __bool__(self) -> bool:
        return self._any

    @property
    def stale(self) -> bool:
        """Whether `refresh` has more to do."""
        return bool(self._stale)

    def reload(self, rules: Rules, now: int) -> None:
        """Put other blocks in force, by and by (`refresh`); each throttle at once when it is asked for. Places and
        debts stay with the name and what it counts by, and so does a back-off while its block has any rule for one."""
        gone = [name for name in self._rules.listeners if name not in rules.listeners]
        self.backoffs.end(gone, "has no rule for a back-off any more", now)
        self._rules = rules
        self._any = bool(rules)
        self._verdicts.clear()
        self._stale = dict.fromkeys(self.throttles())

    def turn_day(self, day: int) -> None:
        """Another day begins: the limits of blocks that warm up change, by and by (`refresh`)."""
        if day != self.day:
            self.day = day
            blocks = self._rules.blocks
            for throttle in self._throttles.values():
                block = blocks.get(throttle.key.name)
                if block is not None and block.warmup is not None:
                    self._stale[throttle] = None

    def warmup_of(self, throttle: Throttle) -> tuple[int, int]:
        """Which day of its warm-up a throttle is in, of how many; (0, 0): none."""
        block = self._rules.blocks.get(throttle.key.name)
        if block is None or block.warmup is None or throttle.connections:
            return 0, 0
        return number_of(block.warmup, self.day), len(block.warmup.figures)

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

    def has(self, name: str) -> bool:
        """Whether there is a block of this name."""
        return name in self._rules.blocks

    @property
    def listens(self) -> bool:
        """Whether replies of receivers are of interest."""
        return bool(self._rules.listeners)

    def replied(self, throttles: Iterable[Throttle], reply: str, instance: str, now: int) -> list[Throttle]:
        """A receiver refused something on a connection that stands under these; those whose limits have changed.

        Args:
            reply: its code and a blank, then its lines, joined by LF.
        """
        keys: dict[str, list[Key]] = {}
        for throttle in throttles:
            if throttle.counts and not throttle.connections and throttle.key.name in self._rules.listeners:
                keys.setdefault(throttle.key.name, []).append(throttle.key)
        changed: list[Throttle] = []
        for name, struck in self._rules.struck(keys, reply) if keys else ():
            for key in keys[name]:
                for other in self.backoffs.strike(key, struck, reply.replace("\n", " "), instance, now):
                    changed += self._reconfigure(other, now)
        return changed

    def come_back(self, now: int, most: int) -> list[Throttle]:
        """Throttles whose back-off is over, or is less from now on."""
        return [throttle for key in self.backoffs.expire(now, most) for throttle in self._reconfigure(key, now)]

    def end_backoff(self, name: str, now: int) -> int:
        """End every back-off of a block by hand, of how many throttles; see to it by `come_back`."""
        return self.backoffs.end([name], "was ended by hand", now)

    def overridden(self, override: Override) -> None:
        """Something was set by hand, or is over: it reaches the throttles by and by (`refresh`)."""
        self._stale |= dict.fromkeys(each for each in self.throttles() if override.holds(each.key))

    def wait(self, throttles: Iterable[Throttle]) -> float | None:
        """Seconds that a request may queue under these: the shortest that a block says, none at all in a pause; None:
        none says anything.

        An instance's throttle may have the name of a block, and is none.
        """
        holding = [throttle for throttle in throttles if throttle.counts and throttle.shadow is None]
        if any(throttle.closed_until for throttle in holding):
            return 0.0
        names = [throttle.key.name for throttle in holding]
        waits = [self._rules.blocks[name].wait for name in names if name in self._rules.blocks]
        return min([wait for wait in waits if wait is not None], default=None)

    @property
    def start(self) -> int:
        return self._start

    def adopt(self, start: int, day: int) -> None:
        """What is known goes back to `start`."""
        self._start, self.day = start, day

    def adopted(self, key: Key, connections: bool, now: int) -> Throttle:
        """A throttle that another manager had. The limits of now hold when it is asked for, or by and by."""
        known = self._connections if connections else self._throttles
        throttle = known[key] = self._make(key, connections, now)
        self._stale[throttle] = None
        return throttle

    def adopt_slowdown(self, key: Key, slowdown: Slowdown, now: int) -> None:
        """What replies did elsewhere; nothing, if its block has no rule for a back-off here."""
        if key.name in self._rules.listeners:
            self.backoffs.adopt(key, slowdown, now)

    def find(self, key: Key, connections: bool) -> Throttle | None:
        return (self._connections if connections else self._throttles).get(key)

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
                    self._drop(known.pop(idle))
            throttle = known[key] = self._make(key, known is self._connections, now)
            self._configure(throttle, now)
        elif self._stale and throttle in self._stale:
            self._configure(throttle, now)  # who waits there is looked at by `refresh`
        return throttle

    def _make(self, key: Key, connections: bool, now: int) -> Throttle:
        throttle: Throttle | None = None
        block = self._rules.blocks.get(key.name) if self._cluster is not None else None
        shared = block is not None and block.enforce and self._scopes.setdefault(key.name, block.scope) == "cluster"
        if shared and self._cluster is not None:
            throttle = self._cluster.make(key, True, "c" if connections else "m", now)
        throttle = throttle or Throttle(key, counts=True)
        throttle.connections = connections
        return throttle

    def _drop(self, throttle: Throttle) -> None:
        self._stale.pop(throttle, None)
        if self._cluster is not None:
            self._cluster.drop(throttle)

    def _reconfigure(self, key: Key, now: int) -> list[Throttle]:
        """Put the terms of now in force for the throttles of a key."""
        found = [known[key] for known in (self._throttles, self._connections) if key in known]
        for throttle in found:
            self._configure(throttle, now)
        return found

    def _configure(self, throttle: Throttle, now: int) -> None:
        block = self._rules.blocks.get(throttle.key.name)
        rates: Sequence[Rate] = ()
        if block is not None:
            rates = block.max_connection_rate if throttle.connections else block.max_delivery_rate
        lowest: dict[int, int] = {}
        for rate in rates:
            lowest[rate.seconds] = min(rate.amount, lowest.get(rate.seconds, rate.amount))
        places = block.max_concurrent_connections if block is not None and not throttle.connections else 0
        limits = tuple(Limit(lowest[seconds], seconds) for seconds in sorted(lowest))
        if block is not None and not throttle.connections:
            limits += limit_on(block.warmup, self.day)
        terms = Effective(limits, places)
        throttle.closed_until, throttle.closed_by = 0, ""
        slowdown = self.backoffs.of(throttle.key)
        if slowdown is not None:
            terms = slowdown.apply(terms, now, messages=not throttle.connections)
            throttle.closed_until, throttle.closed_by = slowdown.closed_until(now), "after a reply of the receiver"
        if self._overrides:
            terms, until = self._overrides.apply(throttle.key, terms)
            if until > throttle.closed_until:
                throttle.closed_until, throttle.closed_by = until, BY_HAND
        throttle.limit_to(terms.limits or (NO_RATE,) * (throttle.closed_until > 0), self._start, now)
        throttle.limit_places(terms.places, now)
        if block is None or block.enforce:
            throttle.shadow = None
        else:
            throttle.shadow = throttle.shadow or Shadow()
            throttle.shadow.patience = int((block.wait if block.wait is not None else _LONGEST_WAIT) * SECOND)
