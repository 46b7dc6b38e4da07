"""Collects what this process knows as one `Part`. Looks only: nothing here changes what it looks at.

`counted` is quick and is made each second where there are several processes; `details` takes longer, and is a generator
that yields after each small piece, so that its caller can let others run.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable
from heapq import nlargest
from itertools import islice
from typing import NamedTuple

from proxy.egress.pool import Pool, PoolKey
from proxy.policy.trouble import Record, Refusals, Troubles
from proxy.spans import OBSERVED, Spans
from proxy.stats import Counters, Standing, Table
from proxy.status.parts import (
    CachedPart,
    CachePart,
    Details,
    FailingPart,
    Part,
    PeerPart,
    PoolPart,
    RefusedPart,
    SpanPart,
)
from proxy.status.throttles import STEP

#: Records of `policy.trouble` between two yields.
_RECORDS = 100
MOST_KEYS = 200


class Gauged(NamedTuple):
    """What goes up and down; see `parts.Part`."""

    active: int = 0
    newcomers: int = 0
    newcomers_dropped: int = 0
    channels: int = 0
    dialogues: int = 0
    highest: int = 0


def counted(counters: Counters, spans: Spans, pool: Pool, gauged: Gauged) -> Part:
    """All but doors, process and details."""
    return Part(
        counters=counters.as_dict(),
        spans={name: SpanPart(list((span := getattr(spans, name)).counts), span.total) for name in OBSERVED},
        pool=PoolPart(
            held=len(pool),
            offered=pool.offered,
            hits=pool.hits,
            misses=pool.misses,
            discards={str(reason): count for reason, count in pool.discards.items() if count},
        ),
        active=gauged.active,
        newcomers=gauged.newcomers,
        newcomers_dropped=gauged.newcomers_dropped,
        channels=gauged.channels,
        dialogues=gauged.dialogues,
        highest=gauged.highest,
    )


def details(
    pool: Pool, troubles: Troubles, standing: Iterable[Standing | None], now: float
) -> Generator[None, None, Details]:
    """The rest; `now`: seconds of the pool's clock."""
    cache = yield from _cache(pool)
    instances, active_sources = yield from _active(standing)
    receivers = yield from _peers({str(name): record for name, record in troubles.receivers.items()}, now)
    sources = yield from _peers(dict(troubles.sources), now)
    return Details(
        cache=cache,
        instances=instances,
        active_sources=active_sources,
        receivers=receivers,
        sources=sources,
        gone=dict(troubles.gone),
        refused={code: _refused(refusals, now) for code, refusals in troubles.refused.items()},
    )


def _active(standing: Iterable[Standing | None]) -> Generator[None, None, tuple[Table, Table]]:
    """Connections that have asked for a receiver, by instance and by source address."""
    by_instance, by_source = Table(), Table()
    rest = iter(standing)
    while step := list(islice(rest, STEP)):
        for each in step:
            if each is not None and each.destination is not None:
                by_instance.count(each.instance or "-")
                by_source.count(each.source or "-")
        yield
    return by_instance, by_source


# --- what goes wrong ---


def _peers(records: dict[str, Record], now: float) -> Generator[None, None, dict[str, PeerPart]]:
    found: dict[str, PeerPart] = {}
    for name, record in records.items():
        found[name] = _peer(record, now)
        if len(found) % _RECORDS == 0:
            yield
    return found


def _peer(record: Record, now: float) -> PeerPart:
    since = record.failing_since
    return PeerPart(
        opened=record.opened,
        failed=dict(record.failed),
        deferred=record.deferred,
        rejected=record.rejected,
        recent=record.recent.slots(now),
        good_at=record.good_at,
        failing=[] if since is None else [FailingPart(since, record.last_at, record.in_a_row)],
        last=record.last,
        last_at=record.last_at,
    )


def _refused(refusals: Refusals, now: float) -> RefusedPart:
    times = [(refusals.since, refusals.last_at)]
    return RefusedPart(refusals.recent.slots(now), times, refusals.last, refusals.last_at)


# --- the cache ---


class _Held:
    """Of one key."""

    __slots__ = ("connections", "idle_since", "messages", "opened_at")

    def __init__(self) -> None:
        self.connections = 0
        self.messages = 0
        self.opened_at = math.inf
        self.idle_since = math.inf


def _cache(pool: Pool) -> Generator[None, None, CachePart]:
    found, sources = CachePart(), Table()
    keys: dict[PoolKey, _Held] = {}
    entries = iter(pool.entries())
    while step := list(islice(entries, STEP)):
        for entry in step:
            key, opened_at, idle_since = entry.key, entry.opened_at, entry.idle_since
            held = keys.get(key)
            if held is None:
                held = keys[key] = _Held()
            held.connections += 1
            held.messages += entry.messages
            if opened_at < held.opened_at:
                held.opened_at = opened_at
            if idle_since < held.idle_since:
                held.idle_since = idle_since
            found.opened_at += opened_at
            sources.count(key.source)
        found.held += len(step)
        yield
    found.sources = sources
    found.first_opened = min((held.opened_at for held in keys.values()), default=None)
    found.idle_since = min((held.idle_since for held in keys.values()), default=None)
    most = nlargest(MOST_KEYS, keys.items(), key=lambda item: (item[1].connections, item[1].messages))
    found.keys = [_cached(key, held) for key, held in most]
    found.keys_left_out = len(keys) - len(most)
    return found


def _cached(key: PoolKey, held: _Held) -> CachedPart:
    """Without the tenant's name: it may be a user's."""
    return CachedPart(
        key.source,
        str(key.destination),
        key.ehlo_name,
        key.tls.name.lower(),
        key.tls_server_name,
        bool(key.tenant),
        held.connections,
        held.messages,
        held.opened_at,
        held.idle_since,
        key[5:],
    )
