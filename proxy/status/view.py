"""Builds the operator's view from manager, pool and counters. Looks only: nothing here changes what it looks at.

The work is done in steps: `survey` is a generator that yields after each small piece, so that its caller can let others
run, and it lists a bounded number of everything. What was counted in different pieces need not fit to the last unit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from heapq import nlargest, nsmallest
from itertools import islice
from typing import NamedTuple, TypeVar

from proxy.egress.pool import Entry, Pool, PoolKey
from proxy.policy.directory import Book
from proxy.policy.trouble import Record, Troubles
from proxy.settings import ThrottleSettings
from proxy.stats import OTHER, Backlog, Counters, Flow, Snapshot, Standing, StoreFigures, Table
from proxy.status.backoffs import backoff_rows
from proxy.status.names import block_rows, failing
from proxy.status.rows import (
    CachedRow,
    Connections,
    ListenerRow,
    ManagerRow,
    Overview,
    PeerRow,
    PoolView,
    Program,
    Queues,
    SessionRow,
    SourceRow,
    Status,
)
from proxy.status.store import Pace, store_row
from proxy.status.throttles import LONGEST_REASON, STEP, Meter, asked_of, rank, throttle_row
from proxy.status.trouble import found
from proxy.throttling.flows import Throttle
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import Key

MOST_THROTTLES = 500
MOST_SESSIONS = 500
MOST_KEYS = 200
MOST_PEERS = 50


class Sources(NamedTuple):
    """What there is to look at; `snapshot` is of this moment, as the log would show it."""

    program: Program
    listeners: list[ListenerRow]
    connections: Connections
    counters: Counters
    snapshot: Snapshot
    manager: Manager
    pool: Pool
    troubles: Troubles
    present: Callable[[str], bool]
    host: str = ""
    generated_at: str = ""
    book: Book = Book()
    blocks: Sequence[ThrottleSettings] = ()
    name_of_source: Callable[[str], str] = lambda address: ""
    standing: Callable[[], Iterable[Standing | None]] = lambda: ()
    store: StoreFigures | None = None
    pace: Pace | None = None


def overview(sources: Sources, now: float) -> Generator[None, None, Overview]:
    """All but the single throttles.

    Args:
        now: seconds of the pool's clock.
    """
    manager, figures = sources.manager, sources.snapshot.manager
    pool = yield from _pool(sources.pool, sources.counters, now)
    sessions = list(_sessions(sources)) if figures is not None else []
    backlog = figures.backlog if figures is not None else Backlog()
    receivers, sources_ = _receivers(sources.troubles, now), _source_rows(sources, now)
    if receivers:
        yield
    by_instance, by_source = yield from _active(sources.standing())
    store = None
    if sources.store is not None:
        store = yield from store_row(sources.store, sources.pace, now, sources.name_of_source)
    view = Overview(
        active_instances=by_instance,
        active_sources=by_source,
        program=sources.program,
        listeners=sources.listeners,
        connections=sources.connections,
        counters=sources.counters.as_dict()
        | {"messages_without_permit": manager.unpermitted, "backoffs": manager.blocks.backoffs.begun},
        manager=ManagerRow(
            throttles=figures.throttles if figures is not None else 0,
            known=len(manager.throttles) + sum(1 for _ in manager.blocks.throttles()),
            sessions=len(figures.sessions) if figures is not None else 0,
            ram=backlog.ram,
            bounce=backlog.bounce,
            disk=backlog.disk,
            without_permit=manager.unpermitted,
            backing_off=len(manager.blocks.backoffs),
        ),
        pool=pool,
        sessions=sessions[:MOST_SESSIONS],
        sessions_left_out=max(0, len(sessions) - MOST_SESSIONS),
        host=sources.host,
        generated_at=sources.generated_at,
        receivers=receivers,
        receivers_left_out=len(sources.troubles.receivers) - len(receivers),
        sources=sources_[:MOST_PEERS],
        sources_left_out=max(0, len(sources_) - MOST_PEERS),
        source_names={row.name: row.source_name for row in sources_ if row.source_name},
        store=store,
    )
    view.trouble = found(view, sources.troubles, now, failing(sources.book), manager.blocks.backoffs.latest)
    return view


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


def survey(
    sources: Sources, meter: Meter, now: float, now_ns: int, most: int = MOST_THROTTLES, wanted: str = ""
) -> Generator[None, None, Status]:
    """The whole view.

    Args:
        now: seconds of the pool's clock. now_ns: nanoseconds of the manager's.
        most: throttles that are listed.
        wanted: of all throttles, only those are looked at that have this in their names or in those of their instances,
            large and small letters alike; "": all.
    """
    view = yield from overview(sources, now)
    manager = sources.manager
    everything = [*manager.throttles.values(), *manager.blocks.throttles()]
    if wanted:
        everything = yield from _named(everything, sources, wanted.casefold())
        meter = meter.aside()
    ranked: list[tuple[tuple[float, ...], Key, int]] = []
    for at in range(0, len(everything), STEP):
        some = enumerate(everything[at : at + STEP], at)
        ranked += [(rank(throttle, now_ns), throttle.key, index) for index, throttle in some]
        if len(ranked) > 2 * most + STEP:
            ranked = nsmallest(most, ranked)
        yield
    rows, asked = [], (yield from asked_of(manager))
    for *_, index in nsmallest(most, ranked):
        throttle = everything[index]
        row = yield from throttle_row(throttle, asked.get(throttle, {}), manager, meter, now_ns)
        row.source_name = sources.name_of_source(row.source)
        if (carried := throttle.carried) is not None:
            row.messages_accepted, row.messages_deferred = carried.accepted, carried.deferred
            row.messages_rejected = carried.rejected
        rows.append(row)
        if len(rows) % 20 == 0:
            yield
    meter.turn()
    known = {name: getattr(view, name) for name in Overview.__struct_fields__}
    blocks, blocks_left_out = yield from block_rows(sources.blocks, sources.book)
    backoffs, backoffs_left_out = yield from backoff_rows(manager.blocks.backoffs, now_ns)
    return Status(
        **known,
        throttles=rows,
        throttles_left_out=len(everything) - len(rows),
        blocks=blocks,
        blocks_left_out=blocks_left_out,
        backoffs=backoffs,
        backoffs_left_out=backoffs_left_out,
    )


def _named(throttles: list[Throttle], sources: Sources, wanted: str) -> Generator[None, None, list[Throttle]]:
    found, looked_at = [], 0
    for throttle in throttles:
        key, terms = throttle.key, throttle.terms
        stakes = [stake.name for stake in terms.stakes] if terms is not None else []
        names = (*key, sources.name_of_source(key.source), *(throttle.held or {}), *stakes)
        if any(wanted in str(name).casefold() for name in names):
            found.append(throttle)
        if (looked_at := looked_at + len(names)) > STEP:
            looked_at = 0
            yield
    return found


# --- receivers and sources ---


def _receivers(troubles: Troubles, now: float) -> list[PeerRow]:
    worst = troubles.receivers.worst(MOST_PEERS, now)
    return [_fill(PeerRow(str(name)), record, now) for name, record in worst]


def _source_rows(sources: Sources, now: float) -> list[SourceRow]:
    """Those with trouble, those that are gone, and those that mail has left from."""
    troubles, counters = sources.troubles, sources.counters
    worst: list[tuple[str, Record | None]] = [*troubles.sources.worst(MOST_PEERS, now)]
    names = dict(worst)
    for name in (*troubles.gone, *counters.sources_accepted, *counters.sources_deferred, *counters.sources_rejected):
        if name != OTHER:
            names.setdefault(name, None)
    rows = []
    for name, record in names.items():
        row = SourceRow(name, present=sources.present(name), source_name=sources.name_of_source(name))
        if record is not None:
            _fill(row, record, now)
        if not row.present and name in troubles.gone:
            row.absent = now - troubles.gone[name]
        row.messages_accepted = counters.sources_accepted.get(name, 0)
        row.messages_deferred = counters.sources_deferred.get(name, 0)
        row.messages_rejected = counters.sources_rejected.get(name, 0)
        rows.append(row)
    return sorted(rows, key=lambda row: (row.present, row.failing is None, row.name))


_Row = TypeVar("_Row", bound=PeerRow)


def _fill(row: _Row, record: Record, now: float) -> _Row:
    row.failing = None if record.failing_since is None else max(0.0, now - record.failing_since)
    row.in_a_row, row.recent = record.in_a_row, record.recent.total(now)
    row.opened, row.failed = record.opened, dict(record.failed)
    row.deferred, row.rejected = record.deferred, record.rejected
    row.last, row.last_ago = record.last[:LONGEST_REASON], max(0.0, now - record.last_at)
    return row


# --- sessions and the pool ---


def _sessions(sources: Sources) -> Iterator[SessionRow]:
    assert sources.snapshot.manager is not None
    for each in sorted(sources.snapshot.manager.sessions, key=lambda figures: figures.name):
        session = sources.manager.sessions.get(each.name)
        yield SessionRow(
            name=each.name,
            address=session.address if session is not None else "",
            connected=each.connected,
            ping=each.ping,
            ping_age=each.ping_age,
            ram=each.backlog.ram,
            bounce=each.backlog.bounce,
            disk=each.backlog.disk,
            forward=_queues(each.forward),
            back=_queues(each.back),
            paths=len(session.flows) if session is not None else 0,
            weight=session.weight if session is not None else 1.0,
            without_permit=session.unpermitted if session is not None else 0,
        )


def _queues(flow: Flow) -> Queues:
    return Queues(flow.entering, flow.leaving, flow.parked)


def _pool(pool: Pool, counters: Counters, now: float) -> Generator[None, None, PoolView]:
    entries = iter(pool.entries())
    held, age_sum, oldest, longest_idle = 0, 0.0, 0.0, 0.0
    rows: dict[PoolKey, CachedRow] = {}
    sources = Table()
    while step := list(islice(entries, STEP)):
        for entry in step:
            age, idle = max(0.0, now - entry.opened_at), max(0.0, now - entry.idle_since)
            held, age_sum = held + 1, age_sum + age
            sources.count(entry.key.source)
            oldest, longest_idle = max(oldest, age), max(longest_idle, idle)
            row = rows.get(entry.key)
            if row is None:
                row = rows[entry.key] = _cached_row(entry)
            row.connections += 1
            row.messages += entry.messages
            row.oldest, row.idle = max(row.oldest, age), max(row.idle, idle)
        yield
    keys = nlargest(MOST_KEYS, rows.values(), key=lambda row: (row.connections, row.messages))
    served = counters.reused + counters.fresh
    return PoolView(
        held=held,
        offered=pool.offered,
        hits=pool.hits,
        misses=pool.misses,
        reuse_ratio=counters.reused / served if served else None,
        discards={str(reason): count for reason, count in sorted(pool.discards.items()) if count},
        oldest=oldest,
        mean_age=age_sum / held if held else 0.0,
        longest_idle=longest_idle,
        keys=keys,
        keys_left_out=len(rows) - len(keys),
        sources=sources,
    )


def _cached_row(entry: Entry) -> CachedRow:
    """Without the tenant's name: it may be a user's."""
    key = entry.key
    return CachedRow(
        source=key.source,
        destination=str(key.destination),
        ehlo_name=key.ehlo_name,
        tls=key.tls.name.lower(),
        tls_server_name=key.tls_server_name,
        tenant=bool(key.tenant),
        connections=0,
        messages=0,
        oldest=0.0,
        idle=0.0,
    )
