"""Collects what this process knows as one `Part`. Looks only: nothing here changes what it looks at.

`counted` is quick and is made each second where there are several processes; `details` takes longer, and is a generator
that yields after each small piece, so that its caller can let others run.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from heapq import nlargest
from itertools import islice
from typing import NamedTuple

from proxy.egress.pool import Entry, Pool, PoolKey
from proxy.policy.trouble import Record, Refusals, Troubles
from proxy.spans import Spans
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
        spans={name: SpanPart(list((span := getattr(spans, name)).counts), span.total) for name in spans.__slots__},
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


def _cache(pool: Pool) -> Generator[None, None, CachePart]:
    found, sources = CachePart(), Table()
    rows: dict[PoolKey, CachedPart] = {}
    entries = iter(pool.entries())
    while step := list(islice(entries, STEP)):
        for entry in step:
            found.held += 1
            found.opened_at += entry.opened_at
            sources.count(entry.key.source)
            row = rows.get(entry.key)
            rows[entry.key] = _cached(entry) if row is None else _with(row, entry)
        yield
    found.sources = sources
    found.first_opened = min((row.opened_at for row in rows.values()), default=None)
    found.idle_since = min((row.idle_since for row in rows.values()), default=None)
    most = nlargest(MOST_KEYS, rows, key=lambda key: (rows[key].connections, rows[key].messages))
    found.keys = {repr(tuple(key)): rows[key] for key in most}
    found.keys_left_out = len(rows) - len(most)
    return found


def _with(row: CachedPart, entry: Entry) -> CachedPart:
    return row._replace(
        connections=row.connections + 1,
        messages=row.messages + entry.messages,
        opened_at=min(row.opened_at, entry.opened_at),
        idle_since=min(row.idle_since, entry.idle_since),
    )


def _cached(entry: Entry) -> CachedPart:
    """Without the tenant's name: it may be a user's."""
    key = entry.key
    return CachedPart(
        source=key.source,
        destination=str(key.destination),
        ehlo_name=key.ehlo_name,
        tls=key.tls.name.lower(),
        tls_server_name=key.tls_server_name,
        tenant=bool(key.tenant),
        connections=1,
        messages=entry.messages,
        opened_at=entry.opened_at,
        idle_since=entry.idle_since,
    )
