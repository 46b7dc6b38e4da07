"""The index of idle SMTP connections: which are held for which key, which to hand out, which to close and why.

Only decides: it holds opaque connections and tells the caller what to close; probing, RSET, QUIT and closing are
`upstream`'s. A connection is offered after it was proven clean, and is in here only while it is idle: taking it moves
it out, and its user offers it anew. Every offered connection ends exactly once, as a hit or as a discard with a
reason, so `offered == hits + sum(discards) + len(pool)` holds at any time.

No call looks at all connections except `apply` and `drain` (a reload, a stop) and `listing` (a status page). Being held
is membership in the containers that `_insert` and `_remove` alone touch, so no count can drift.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import NamedTuple, Protocol

from proxy.model import Discard, Endpoint, TlsMode


class PoolKey(NamedTuple):
    """Everything that makes two connections different to the receiver or to the sender's policy."""

    source: str  # local IP, in canonical form
    destination: Endpoint
    ehlo_name: str
    tls: TlsMode
    tls_server_name: str = ""
    tls_demand: str = ""  # what the receiver had to prove: who demands more never gets a connection that proved less
    smtputf8: bool = False
    requiretls: bool = False
    tenant: str = ""  # a word of the client's, for whatever else must not be mixed
    group: str = ""  # the operator's word on who shares with whom; see `Modes.group`


class Entry:
    """A connection and what the pool has to know of it; whoever has it out may change the counts, nobody else.

    Args:
        opened_at: when it was connected; seconds of the clock that every `now` is of.
        messages: MAIL commands over all its users, failed ones included, as RFC 9422 counts.
        mailmax: the receiver's LIMITS MAILMAX (RFC 9422), if it announced one.
        errors: replies 5xx over all its users.
        limits: names of the throttles under which it holds a place.
        idle_since: set by `Pool.offer`.
    """

    # Written out: of a compiled dataclass this stays interpreted.
    def __init__(
        self,
        connection: Hashable,
        key: PoolKey,
        opened_at: float,
        messages: int = 0,
        mailmax: int | None = None,
        errors: int = 0,
        limits: tuple[Hashable, ...] = (),
        idle_since: float = 0.0,
    ) -> None:
        self.connection = connection
        self.key = key
        self.opened_at = opened_at
        self.messages = messages
        self.mailmax = mailmax
        self.errors = errors
        self.limits = limits
        self.idle_since = idle_since
        self.proven_at = 0.0  # when its receiver last answered while it was idle; whoever asks it sets this


class Discarded(NamedTuple):
    """Close this connection and give its places back; the pool has forgotten it."""

    entry: Entry
    reason: Discard


class Taken(NamedTuple):
    """`entry` is the caller's now (None: nothing there, connect afresh); the discarded are to be closed either way."""

    entry: Entry | None
    discarded: list[Discarded]


class Listed(NamedTuple):
    """One key in the status: connections held, MAIL commands they carried, seconds since the oldest was connected."""

    key: PoolKey
    cached: int
    messages: int
    oldest: float


class PoolSettings(Protocol):
    """The directives that `config.Settings` has for the pool (interface.md); seconds and numbers."""

    @property
    def throttle_close_timeout(self) -> float: ...
    @property
    def reuse_connections(self) -> bool: ...
    @property
    def reuse_connections_max_idle(self) -> float: ...
    @property
    def reuse_connections_max_age(self) -> float: ...
    @property
    def reuse_connections_max_messages(self) -> int: ...
    @property
    def reuse_connections_max_errors(self) -> int: ...
    @property
    def reuse_connections_max_cached(self) -> int: ...
    @property
    def reuse_connections_max_cached_per_destination(self) -> int: ...


#: Entries in the order in which they became idle: the first has been idle longest.
_Queue = OrderedDict[Entry, None]


class Pool:
    """Idle connections. `now` never goes back between two calls.

    A new connection is always warmer than those held, so over a cap the one that has been idle longest goes.
    """

    def __init__(self, settings: PoolSettings) -> None:
        self._settings = settings
        self._draining = False
        self._by_connection: dict[Hashable, Entry] = {}
        self._promised: dict[Entry, None] = {}
        self._idle: _Queue = OrderedDict()
        self._by_key: dict[Hashable, _Queue] = {}
        self._by_destination: dict[Hashable, _Queue] = {}
        self._by_limit: dict[Hashable, _Queue] = {}
        # (opened_at, serial, entry): entries that left are skipped when they come up, see `_insert`.
        self._ages: list[tuple[float, int, Entry]] = []
        self._serial = 0
        self.offered = 0
        self.hits = 0
        self.misses = 0
        self.discards: Counter[Discard] = Counter()

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, connection: object) -> bool:
        return connection in self._by_connection

    # -- the way in ----------------------------------------------------------------------------------------------------

    def offer(self, entry: Entry, now: float) -> list[Discarded]:
        """Holds a connection that was proven clean. What comes back may be that very one.

        Raises:
            ValueError: the connection is held already.
        """
        if entry.connection in self._by_connection:
            raise ValueError("a connection was offered twice")
        self.offered += 1
        entry.idle_since = now
        if reason := self.unfit(entry, now):
            return [self._count(entry, reason)]
        self._insert(entry)
        discarded = []
        mates = self._by_destination[entry.key.destination]
        if len(mates) > self._settings.reuse_connections_max_cached_per_destination:
            discarded.append(self._discard(next(iter(mates)), Discard.MAX_CACHED_PER_DESTINATION))
        if len(self._idle) > self._settings.reuse_connections_max_cached:
            discarded.append(self._discard(next(iter(self._idle)), Discard.MAX_CACHED))
        return discarded

    def decline(self, reason: Discard) -> None:
        """Counts a connection that its user gave back but that was found unfit before it could be offered."""
        self.offered += 1
        self.discards[reason] += 1

    # -- the ways out --------------------------------------------------------------------------------------------------

    def take(self, key: PoolKey, now: float, with_places: bool = True) -> Taken:
        """Hands out a connection of this key: one that was promised, else the one that was used last. The caller checks
        that it is alive, see `reject`.

        Args:
            with_places: who has none of its own was not promised anything.
        """
        discarded: list[Discarded] = []
        while queue := self._by_key.get(key):
            entry = self._choose(key, queue, with_places)
            if entry is None:
                break
            if reason := self.unfit(entry, now):
                discarded.append(self._discard(entry, reason))
                continue
            self._remove(entry)
            self.hits += 1
            return Taken(entry, discarded)
        self.misses += 1
        return Taken(None, discarded)

    def _choose(self, key: PoolKey, queue: _Queue, with_places: bool) -> Entry | None:
        if not self._promised:
            return next(reversed(queue))
        promised = next((each for each in self._promised if each.key == key), None) if with_places else None
        return promised or next((each for each in reversed(queue) if each not in self._promised), None)

    def reject(self, entry: Entry, reason: Discard) -> Discarded:
        """The connection just taken was found dead: the hit was none. Then `take` again."""
        self.hits -= 1
        return self._count(entry, reason)

    def put_back(self, entry: Entry) -> None:
        """The connection just taken is not needed after all: it is idle as it was, and the hit was none."""
        self.hits -= 1
        self.misses += 1
        self._insert(entry)
        for queue in [self._idle, *(index[name] for index, name in self._queues(entry))]:
            for warmer in [each for each in queue if each.idle_since > entry.idle_since]:
                queue.move_to_end(warmer)

    def promise(self, connection: Hashable) -> None:
        """The places of this held connection went to somebody who asks for its key: that one shall find it and no
        other, and `yield_for` is not to look for places here."""
        entry = self._by_connection[connection]
        self._promised[entry] = None
        self._leave_queues(entry, self._limit_queues(entry))
        entry.limits = ()

    def remove(self, connection: Hashable, reason: Discard) -> Discarded | None:
        """The watch found a held connection closed or talking; None: it is not held (any more)."""
        entry = self._by_connection.get(connection)
        return None if entry is None else self._discard(entry, reason)

    def remove_older(self, entry: Entry, reason: Discard) -> list[Discarded]:
        """What was found dead in `entry`, which is not held, concerns all that were idle longer on the same way."""
        mates = self._by_destination.get(entry.key.destination, ())
        older = [each for each in mates if each.key.source == entry.key.source and each.idle_since <= entry.idle_since]
        return [self._discard(each, reason) for each in older]

    def forsake(self, source: str) -> list[Discarded]:
        """The address that these leave from is not on this machine any more."""
        gone = [entry for entry in self._idle if entry.key.source == source]
        return [self._discard(entry, Discard.SOURCE_GONE) for entry in gone]

    def yield_for(self, limit: Hashable) -> Discarded | None:
        """Somebody waits under this throttle: the connection idle longest that holds a place there gives it up."""
        queue = self._by_limit.get(limit)
        return self._discard(next(iter(queue)), Discard.YIELDED) if queue else None

    def under(self, limit: Hashable) -> list[Entry]:
        """Those that hold a place under this throttle, the one idle longest first."""
        return list(self._by_limit.get(limit, ()))

    def shed(self, count: int) -> list[Discarded]:
        """Gives up those idle longest, when descriptors run out."""
        count = min(count, len(self._idle))
        return [self._discard(next(iter(self._idle)), Discard.OVERLOADED) for _ in range(count)]

    def expire(self, now: float) -> list[Discarded]:
        """Gives up what has come to its age, or has been idle too long."""
        discarded = []
        while (oldest := self._oldest()) and now >= oldest.opened_at + self._settings.reuse_connections_max_age:
            discarded.append(self._discard(oldest, Discard.MAX_AGE))
        while self._idle:
            entry = next(iter(self._idle))
            if now < entry.idle_since + self._settings.reuse_connections_max_idle:
                break
            discarded.append(self._discard(entry, Discard.MAX_IDLE))
        return discarded

    def next_expiry(self) -> float | None:
        """When `expire` has something to do next; None: nothing is held."""
        oldest = self._oldest()
        if oldest is None:
            return None
        return min(
            oldest.opened_at + self._settings.reuse_connections_max_age,
            next(iter(self._idle)).idle_since + self._settings.reuse_connections_max_idle,
        )

    def expiry_of(self, entry: Entry) -> float:
        """When one that was offered last comes to its end, if nobody takes it."""
        settings = self._settings
        aged = entry.opened_at + settings.reuse_connections_max_age
        idle = entry.idle_since + settings.reuse_connections_max_idle
        return aged if aged < idle else idle

    def drain(self) -> list[Discarded]:
        """Gives everything up; from now on nothing is held."""
        self._draining = True
        return [self._discard(entry, Discard.DRAINING) for entry in list(self._idle)]

    def apply(self, settings: PoolSettings, now: float) -> list[Discarded]:
        """The settings after a reload; gives up what they do not allow any more."""
        self._settings = settings
        discarded = []
        for entry in list(self._idle):
            if reason := self.unfit(entry, now):
                discarded.append(self._discard(entry, reason))
            elif (
                len(self._by_destination[entry.key.destination]) > settings.reuse_connections_max_cached_per_destination
            ):
                discarded.append(self._discard(entry, Discard.MAX_CACHED_PER_DESTINATION))
        while len(self._idle) > settings.reuse_connections_max_cached:
            discarded.append(self._discard(next(iter(self._idle)), Discard.MAX_CACHED))
        return discarded

    # -- status --------------------------------------------------------------------------------------------------------

    def listing(self, now: float) -> list[Listed]:
        """One line a key, in no order."""
        return [
            Listed(
                next(iter(queue)).key,
                len(queue),
                sum(entry.messages for entry in queue),
                now - min(entry.opened_at for entry in queue),
            )
            for queue in self._by_key.values()
        ]

    def entries(self) -> list[Entry]:
        """All that are held, those idle longest first; to be read only."""
        return list(self._idle)

    def destinations(self) -> dict[Endpoint, int]:
        """How many are held for each destination."""
        return {next(iter(queue)).key.destination: len(queue) for queue in self._by_destination.values()}

    # -- inside --------------------------------------------------------------------------------------------------------

    def unfit(self, entry: Entry, now: float) -> Discard | None:
        """Why an entry may not be held or handed out. Age comes before count: by count alone, traffic would gather at
        the slowest receiver."""
        settings = self._settings
        if self._draining:
            return Discard.DRAINING
        if not settings.reuse_connections:
            return Discard.DISABLED
        if now >= entry.opened_at + settings.reuse_connections_max_age:
            return Discard.MAX_AGE
        if now >= entry.idle_since + settings.reuse_connections_max_idle:
            return Discard.MAX_IDLE
        if entry.messages >= settings.reuse_connections_max_messages:
            return Discard.MAX_MESSAGES
        if entry.mailmax is not None and entry.messages >= entry.mailmax:
            return Discard.PEER_LIMIT
        if entry.errors >= settings.reuse_connections_max_errors:
            return Discard.MAX_ERRORS
        return None

    def _oldest(self) -> Entry | None:
        """The entry that was connected first."""
        while self._ages and self._ages[0][2] not in self._idle:
            heapq.heappop(self._ages)
        return self._ages[0][2] if self._ages else None

    def _queues(self, entry: Entry) -> list[tuple[dict[Hashable, _Queue], Hashable]]:
        queues = self._limit_queues(entry) if entry.limits else []
        queues.append((self._by_key, entry.key))
        queues.append((self._by_destination, entry.key.destination))
        return queues

    def _limit_queues(self, entry: Entry) -> list[tuple[dict[Hashable, _Queue], Hashable]]:
        return [(self._by_limit, limit) for limit in dict.fromkeys(entry.limits)]

    def _insert(self, entry: Entry) -> None:
        self._by_connection[entry.connection] = entry
        self._idle[entry] = None
        for index, name in self._queues(entry):
            queue = index.get(name)
            if queue is None:
                queue = index[name] = OrderedDict()
            queue[entry] = None
        self._serial += 1
        heapq.heappush(self._ages, (entry.opened_at, self._serial, entry))
        # Each round through the pool leaves an old item in the heap: rebuilding it at twice the size costs O(1) a call.
        if len(self._ages) > 2 * len(self._idle) + 64:
            self._ages = [(held.opened_at, serial, held) for serial, held in enumerate(self._idle)]
            heapq.heapify(self._ages)

    def _remove(self, entry: Entry) -> None:
        del self._by_connection[entry.connection]
        del self._idle[entry]
        self._promised.pop(entry, None)
        self._leave_queues(entry, self._queues(entry))

    def _leave_queues(self, entry: Entry, queues: list[tuple[dict[Hashable, _Queue], Hashable]]) -> None:
        for index, name in queues:
            queue = index[name]
            del queue[entry]
            if not queue:
                del index[name]

    def _discard(self, entry: Entry, reason: Discard) -> Discarded:
        self._remove(entry)
        return self._count(entry, reason)

    def _count(self, entry: Entry, reason: Discard) -> Discarded:
        self.discards[reason] += 1
        return Discarded(entry, reason)
