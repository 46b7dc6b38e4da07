"""What one process of the program knows, as plain data, and the sum of what several know.

With `workers` there are several processes, and an operator wants one view: each says its `Part`, `merge` makes one of
them, and whoever shows something shows that one. With one process it is the only part, and the same code shows it.

Pure. All that is counted is added up; of what has a time there is the first or the last, on the monotonic clock, which
all processes of a machine share. `merge` is associative and commutative, `Part()` is its neutral element (sums of
fractions to the last digit), so it does not matter who adds up what first. Collecting a part is `gather`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import NamedTuple, TypeVar

from msgspec import Struct, ValidationError, field, msgpack

from proxy.policy.trouble import LATELY, slot_of

_Key = TypeVar("_Key", int, str, tuple[object, ...])
_Item = TypeVar("_Item")
#: Counters as `Counters.as_dict` has them: numbers, and tables of numbers.
Counted = dict[str, int | dict[str, int]]


class SpanPart(NamedTuple):
    """A histogram; see `spans.Histogram`."""

    counts: list[int]
    total: float


class DoorPart(NamedTuple):
    """A listener. `closing`: a reload took it away; not if it is open in any process."""

    address: str
    protocol: str
    open_connections: int
    closing: bool = False


class ProcessPart(Struct):
    """A process of the program.

    Args:
        number: 0: the master, or the only one; workers are 1 and up. started: Unix time.
        cpu: seconds so far. resident, virtual: bytes. descriptors: open; most_descriptors: that may be.
    """

    number: int
    pid: int
    version: str
    started: float
    cpu: float = 0.0
    resident: int = 0
    virtual: int = 0
    descriptors: int = 0
    most_descriptors: int = 0
    open_connections: int = 0


class FailingPart(NamedTuple):
    """What one process has seen go wrong, and nothing go well in between."""

    since: float
    until: float
    failures: int


class PeerPart(Struct):
    """A receiver or a source; see `trouble.Record`. `recent`: how often lately, by `trouble.Recent`'s slots; `good_at`:
    when something went well last, 0: not since the record began."""

    opened: int = 0
    failed: dict[str, int] = {}
    deferred: int = 0
    rejected: int = 0
    recent: dict[int, int] = {}
    good_at: float = 0.0
    failing: list[FailingPart] = []
    last: str = ""
    last_at: float = 0.0


class RefusedPart(Struct):
    """Requests refused for one reason. `times`: from when to when there were some, without a pause of `LATELY`; the
    latest last."""

    recent: dict[int, int] = {}
    times: list[tuple[float, float]] = []
    last: str = ""
    last_at: float = 0.0


class CachedPart(NamedTuple):
    """Held-open connections of one key. `opened_at`, `idle_since`: the first. `more`: what else is in the key, and is
    not to be shown."""

    source: str
    destination: str
    ehlo_name: str
    tls: str
    tls_server_name: str
    tenant: bool
    connections: int
    messages: int
    opened_at: float
    idle_since: float
    more: tuple[str | bool, ...] = ()


class PoolPart(Struct):
    """What the cache has counted; see `rows.PoolView`."""

    held: int = 0
    offered: int = 0
    hits: int = 0
    misses: int = 0
    discards: dict[str, int] = {}


class CachePart(Struct):
    """What is in the cache.

    Args:
        held: connections. opened_at: the times of their connects added up. first_opened, idle_since: the first of all;
            None: nothing is held. sources: how many leave from where.
        keys: of many those with most connections.
    """

    held: int = 0
    opened_at: float = 0.0
    first_opened: float | None = None
    idle_since: float | None = None
    sources: dict[str, int] = {}
    keys: list[CachedPart] = []
    keys_left_out: int = 0


class Details(Struct):
    """What takes longer to collect.

    Args:
        instances, active_sources: connections that have asked for a receiver, by instance and by source address.
        gone: source addresses that are not on this machine any more → since when.
    """

    cache: CachePart = field(default_factory=CachePart)
    instances: dict[str, int] = {}
    active_sources: dict[str, int] = {}
    receivers: dict[str, PeerPart] = {}
    sources: dict[str, PeerPart] = {}
    gone: dict[str, float] = {}
    refused: dict[str, RefusedPart] = {}


class Part(Struct):
    """All of it.

    Args:
        processes: whose part it is. doors: by address and protocol. spans: those of `spans.Spans`.
        cpu, lost: seconds, and lines of the log that could not be written; of all processes, those that are gone, too.
        active, cached: outgoing connections in use or being set up, and held open. open: clients' connections.
        newcomers, newcomers_dropped, channels, dialogues: see `rows.Connections`.
        highest: number of a connection that has been used.
        details: None: not collected.
    """

    processes: list[ProcessPart] = []
    counters: Counted = {}
    spans: dict[str, SpanPart] = {}
    doors: dict[str, DoorPart] = {}
    pool: PoolPart = field(default_factory=PoolPart)
    cpu: float = 0.0
    lost: int = 0
    active: int = 0
    cached: int = 0
    open: int = 0
    newcomers: int = 0
    newcomers_dropped: int = 0
    channels: int = 0
    dialogues: int = 0
    highest: int = 0
    details: Details | None = None

    def total(self, name: str) -> int:
        """All of a table of counters together."""
        table = self.counters.get(name)
        return sum(table.values()) if isinstance(table, dict) else 0


encode: Callable[[Part], bytes] = msgpack.Encoder().encode
_decoder = msgpack.Decoder(Part)


def decode(data: bytes) -> Part:
    """The part of a process.

    Raises:
        msgspec.MsgspecError: it is none; all fields have defaults, but each part is of somebody.
    """
    part: Part = _decoder.decode(data)
    if not part.processes:
        raise ValidationError("a part is of at least one process")
    return part


def merge(parts: Iterable[Part]) -> Part:
    """What all of them know; of none: the neutral element. What is handed in stays as it is."""
    return reduce(_both, parts, Part())


def _both(a: Part, b: Part) -> Part:
    if not a.processes and a == Part():
        return b
    return Part(
        processes=sorted([*a.processes, *b.processes], key=lambda each: (each.number, each.pid)),
        counters=_counted(a.counters, b.counters),
        spans=_joined(a.spans, b.spans, _span),
        doors=_joined(a.doors, b.doors, _door),
        pool=_pool(a.pool, b.pool),
        cpu=a.cpu + b.cpu,
        lost=a.lost + b.lost,
        active=a.active + b.active,
        cached=a.cached + b.cached,
        open=a.open + b.open,
        newcomers=a.newcomers + b.newcomers,
        newcomers_dropped=a.newcomers_dropped + b.newcomers_dropped,
        channels=a.channels + b.channels,
        dialogues=a.dialogues + b.dialogues,
        highest=max(a.highest, b.highest),
        details=_either(a.details, b.details, _details),
    )


def _either(a: _Item | None, b: _Item | None, both: Callable[[_Item, _Item], _Item]) -> _Item | None:
    if a is None or b is None:
        return a if b is None else b
    return both(a, b)


def _joined(
    a: Mapping[_Key, _Item], b: Mapping[_Key, _Item], both: Callable[[_Item, _Item], _Item]
) -> dict[_Key, _Item]:
    """By name; those of `a` in front."""
    joined = dict(a)
    for key, item in b.items():
        joined[key] = both(joined[key], item) if key in joined else item
    return joined


def _sums(a: Mapping[_Key, int], b: Mapping[_Key, int]) -> dict[_Key, int]:
    return _joined(a, b, int.__add__)


def _counted(a: Counted, b: Counted) -> Counted:
    def both(one: int | dict[str, int], other: int | dict[str, int]) -> int | dict[str, int]:
        if isinstance(one, dict) and isinstance(other, dict):
            return _sums(one, other)
        assert isinstance(one, int)
        assert isinstance(other, int)
        return one + other

    return _joined(a, b, both)


def _span(a: SpanPart, b: SpanPart) -> SpanPart:
    return SpanPart([one + other for one, other in zip(a.counts, b.counts, strict=True)], a.total + b.total)


def _door(a: DoorPart, b: DoorPart) -> DoorPart:
    return DoorPart(a.address, a.protocol, a.open_connections + b.open_connections, a.closing and b.closing)


def _details(a: Details, b: Details) -> Details:
    return Details(
        cache=_cache(a.cache, b.cache),
        instances=_sums(a.instances, b.instances),
        active_sources=_sums(a.active_sources, b.active_sources),
        receivers=_joined(a.receivers, b.receivers, _peer),
        sources=_joined(a.sources, b.sources, _peer),
        gone=_joined(a.gone, b.gone, min),
        refused=_joined(a.refused, b.refused, _refused),
    )


# --- the cache ---


def _pool(a: PoolPart, b: PoolPart) -> PoolPart:
    return PoolPart(
        held=a.held + b.held,
        offered=a.offered + b.offered,
        hits=a.hits + b.hits,
        misses=a.misses + b.misses,
        discards=_sums(a.discards, b.discards),
    )


def _cache(a: CachePart, b: CachePart) -> CachePart:
    return CachePart(
        held=a.held + b.held,
        opened_at=a.opened_at + b.opened_at,
        first_opened=_either(a.first_opened, b.first_opened, min),
        idle_since=_either(a.idle_since, b.idle_since, min),
        sources=_sums(a.sources, b.sources),
        keys=list(_joined(_by_key(a.keys), _by_key(b.keys), _cached).values()),
        keys_left_out=a.keys_left_out + b.keys_left_out,
    )


def _by_key(rows: list[CachedPart]) -> dict[tuple[object, ...], CachedPart]:
    return {(*row[:6], *row.more): row for row in rows}


def _cached(a: CachedPart, b: CachedPart) -> CachedPart:
    return a._replace(
        connections=a.connections + b.connections,
        messages=a.messages + b.messages,
        opened_at=min(a.opened_at, b.opened_at),
        idle_since=min(a.idle_since, b.idle_since),
    )


# --- what goes wrong ---


def _peer(a: PeerPart, b: PeerPart) -> PeerPart:
    good_at = max(a.good_at, b.good_at)
    # Whoever has seen nothing go wrong since something went well elsewhere is not failing.
    failing = sorted(each for each in (*a.failing, *b.failing) if each.until >= good_at)
    return PeerPart(
        opened=a.opened + b.opened,
        failed=_sums(a.failed, b.failed),
        deferred=a.deferred + b.deferred,
        rejected=a.rejected + b.rejected,
        recent=_sums(a.recent, b.recent),
        good_at=good_at,
        failing=failing,
        last=max((a.last_at, a.last), (b.last_at, b.last))[1],
        last_at=max(a.last_at, b.last_at),
    )


def _refused(a: RefusedPart, b: RefusedPart) -> RefusedPart:
    return RefusedPart(
        recent=_sums(a.recent, b.recent),
        times=_without_pauses(sorted([*a.times, *b.times])),
        last=max((a.last_at, a.last), (b.last_at, b.last))[1],
        last_at=max(a.last_at, b.last_at),
    )


def _without_pauses(times: list[tuple[float, float]]) -> list[tuple[float, float]]:
    joined = times[:1]
    for since, until in times[1:]:
        before = joined[-1]
        if since - before[1] < LATELY:
            joined[-1] = before[0], max(before[1], until)
        else:
            joined.append((since, until))
    return joined


# --- what is shown of that ---


class Failing(NamedTuple):
    """A receiver or source with which nothing has gone well; see `trouble.Record`."""

    since: float
    failures: int


def failing_in_a_row(peer: PeerPart) -> Failing | None:
    """What of its failures came behind the last thing that went well; None: none.

    Where one process has seen something go well in the middle of another's failures, the slots of `recent` know how
    many of these came behind it, but for those of its own half minute: so there may have been more, but not fewer, and
    the first one later.
    """
    if not peer.failing:
        return None
    if len(peer.failing) == 1 and peer.failing[0].since >= peer.good_at:
        return Failing(peer.failing[0].since, peer.failing[0].failures)
    around = sum(1 for each in peer.failing if each.since < peer.good_at)
    failures = sum(each.failures for each in peer.failing)
    if around:
        behind = sum(each.failures for each in peer.failing if each.since >= peer.good_at)
        later = sum(count for slot, count in peer.recent.items() if slot > slot_of(peer.good_at))
        failures = min(failures, max(behind + around, later))
    return Failing(min(max(each.since, peer.good_at) for each in peer.failing), failures)
