"""Builds the operator's view from the manager and what the processes know (`parts`). Looks only: nothing here changes
what it looks at.

The work is done in steps: `survey` is a generator that yields after each small piece, so that its caller can let others
run, and it lists a bounded number of everything. What was counted in different pieces need not fit to the last unit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from heapq import nlargest, nsmallest
from typing import NamedTuple, TypeVar

from proxy.policy.directory import Book
from proxy.policy.trouble import lately
from proxy.settings import ThrottleSettings
from proxy.stats import OTHER, Backlog, Flow, ManagerFigures, StoreFigures
from proxy.status.backoffs import backoff_rows
from proxy.status.colleagues import Member
from proxy.status.gather import MOST_KEYS
from proxy.status.names import block_rows, failing
from proxy.status.parts import CachedPart, Counted, Details, Part, PeerPart, failing_in_a_row
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
from proxy.status.workers import worker_rows
from proxy.throttling.flows import Throttle
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import Key

MOST_THROTTLES = 500
MOST_SESSIONS = 500
MOST_PEERS = 50


class Sources(NamedTuple):
    """What there is to look at.

    Args:
        part: of all processes together, with details. limit: `max_connections` in force. figures: of the manager.
        members: the processes, if there are several.
    """

    program: Program
    part: Part
    limit: int
    figures: ManagerFigures | None
    manager: Manager
    present: Callable[[str], bool]
    host: str = ""
    generated_at: str = ""
    book: Book = Book()
    blocks: Sequence[ThrottleSettings] = ()
    name_of_source: Callable[[str], str] = lambda address: ""
    store: StoreFigures | None = None
    pace: Pace | None = None
    members: Sequence[Member] = ()


def overview(sources: Sources, now: float) -> Generator[None, None, Overview]:
    """All but the single throttles.

    Args:
        now: seconds of the pool's clock.
    """
    manager, figures, part = sources.manager, sources.figures, sources.part
    details = part.details or Details()
    pool = _pool(part, details, now)
    sessions = list(_sessions(sources.manager, figures)) if figures is not None else []
    backlog = figures.backlog if figures is not None else Backlog()
    receivers = yield from _receivers(details, now)
    sources_ = yield from _source_rows(sources, details, now)
    if receivers:
        yield
    store = None
    if sources.store is not None:
        store = yield from store_row(sources.store, sources.pace, now, sources.name_of_source)
    view = Overview(
        active_instances=details.instances,
        active_sources=details.active_sources,
        program=sources.program,
        listeners=[ListenerRow(*door) for door in part.doors.values()],
        connections=_connections(part, sources.limit),
        counters=part.counters
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
        receivers_left_out=sum(1 for peer in details.receivers.values() if peer.last_at) - len(receivers),
        sources=sources_[:MOST_PEERS],
        sources_left_out=max(0, len(sources_) - MOST_PEERS),
        source_names={row.name: row.source_name for row in sources_ if row.source_name},
        store=store,
        workers=worker_rows(sources.members, part, now, sources.program.uptime),
    )
    view.trouble = found(view, details.refused, now, failing(sources.book), manager.blocks.backoffs.latest)
    return view


def _connections(part: Part, limit: int) -> Connections:
    return Connections(
        open=part.open,
        limit=limit,
        newcomers=part.newcomers,
        newcomers_dropped=part.newcomers_dropped,
        channels=part.channels,
        dialogues=part.dialogues,
        active=part.active,
        cached=part.cached,
    )


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


def _receivers(details: Details, now: float) -> Generator[None, None, list[PeerRow]]:
    worst = yield from _worst(details.receivers, now)
    return [_fill(PeerRow(name), peer, recent, now) for name, peer, recent in worst]


def _worst(peers: Mapping[str, PeerPart], now: float) -> Generator[None, None, list[tuple[str, PeerPart, int]]]:
    """Those that fail first, then those of which most has gone wrong lately, then the latest; none that only another
    process has had trouble with, and has forgotten."""

    ranked = []
    for name, peer in peers.items():
        recent = lately(peer.recent, now)
        if peer.last_at:
            ranked.append(((failing_in_a_row(peer) is not None and recent > 0, recent, peer.last_at), name))
        if len(ranked) % STEP == 0:
            yield
    return [(name, peers[name], rank[1]) for rank, name in nlargest(MOST_PEERS, ranked, key=lambda each: each[0])]


def _source_rows(sources: Sources, details: Details, now: float) -> Generator[None, None, list[SourceRow]]:
    """Those with trouble, those that are gone, and those that mail has left from."""
    counters = sources.part.counters
    accepted, deferred, rejected = (
        _table(counters, f"sources_{name}") for name in ("accepted", "deferred", "rejected")
    )
    worst = yield from _worst(details.sources, now)
    names: dict[str, tuple[PeerPart, int] | None] = {name: (peer, recent) for name, peer, recent in worst}
    for name in (*details.gone, *accepted, *deferred, *rejected):
        if name != OTHER:
            names.setdefault(name, None)
    rows = []
    for name, known in names.items():
        row = SourceRow(name, present=sources.present(name), source_name=sources.name_of_source(name))
        if known is not None:
            _fill(row, *known, now)
        if not row.present and name in details.gone:
            row.absent = now - details.gone[name]
        row.messages_accepted = accepted.get(name, 0)
        row.messages_deferred = deferred.get(name, 0)
        row.messages_rejected = rejected.get(name, 0)
        rows.append(row)
    return sorted(rows, key=lambda row: (row.present, row.failing is None, row.name))


def _table(counters: Counted, name: str) -> dict[str, int]:
    table = counters.get(name)
    return table if isinstance(table, dict) else {}


_Row = TypeVar("_Row", bound=PeerRow)


def _fill(row: _Row, peer: PeerPart, recent: int, now: float) -> _Row:
    run = failing_in_a_row(peer)
    row.failing, row.in_a_row = (None, 0) if run is None else (max(0.0, now - run.since), run.failures)
    row.recent = recent
    row.opened, row.failed = peer.opened, dict(peer.failed)
    row.deferred, row.rejected = peer.deferred, peer.rejected
    row.last, row.last_ago = peer.last[:LONGEST_REASON], max(0.0, now - peer.last_at)
    return row


# --- sessions and the pool ---


def _sessions(manager: Manager, figures: ManagerFigures) -> Iterator[SessionRow]:
    for each in sorted(figures.sessions, key=lambda figures: figures.name):
        session = manager.sessions.get(each.name)
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


def _pool(part: Part, details: Details, now: float) -> PoolView:
    pool, cache, counters = part.pool, details.cache, part.counters
    reused, fresh = counters.get("reused", 0), counters.get("fresh", 0)
    assert isinstance(reused, int)
    assert isinstance(fresh, int)
    keys = nlargest(MOST_KEYS, cache.keys, key=lambda key: (key.connections, key.messages))
    return PoolView(
        held=pool.held,
        offered=pool.offered,
        hits=pool.hits,
        misses=pool.misses,
        reuse_ratio=reused / (reused + fresh) if reused + fresh else None,
        discards={reason: count for reason, count in sorted(pool.discards.items()) if count},
        oldest=_since(cache.first_opened, now),
        mean_age=max(0.0, now - cache.opened_at / cache.held) if cache.held else 0.0,
        longest_idle=_since(cache.idle_since, now),
        keys=[_cached_row(key, now) for key in keys],
        keys_left_out=cache.keys_left_out + len(cache.keys) - len(keys),
        sources=cache.sources,
    )


def _since(at: float | None, now: float) -> float:
    return 0.0 if at is None else max(0.0, now - at)


def _cached_row(key: CachedPart, now: float) -> CachedRow:
    return CachedRow(*key[:8], oldest=_since(key.opened_at, now), idle=_since(key.idle_since, now))
