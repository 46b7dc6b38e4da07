"""Builds the operator's view from manager, pool and counters. Looks only: nothing here changes what it looks at.

The work is done in steps: `survey` is a generator that yields after each small piece, so that its caller can let others
run, and it lists a bounded number of everything. What was counted in different pieces need not fit to the last unit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from heapq import nlargest, nsmallest
from itertools import islice
from typing import NamedTuple, TypeVar

from proxy.egress.pool import Entry, Pool, PoolKey
from proxy.policy.directory import Book
from proxy.policy.trouble import Record, Troubles
from proxy.settings import ThrottleSettings
from proxy.stats import OTHER, Backlog, Counters, Flow, Snapshot, Standing, Table, whole_seconds
from proxy.status.backoffs import backoff_rows, state_of
from proxy.status.names import block_rows, failing
from proxy.status.rows import (
    CachedRow,
    Connections,
    InstanceRow,
    ListenerRow,
    ManagerRow,
    Overview,
    PeerRow,
    PoolView,
    Program,
    Queues,
    Rate,
    SessionRow,
    SourceRow,
    Status,
    ThrottleRow,
)
from proxy.status.trouble import found
from proxy.throttling.flows import Stake, Throttle
from proxy.throttling.limits import Mode, Part
from proxy.throttling.manager import Manager
from proxy.throttling.overrides import NO_RATE, Override, told
from proxy.throttling.throttle import SECOND, Key, Limit

MOST_THROTTLES = 500
MOST_INSTANCES = 20
MOST_SESSIONS = 500
MOST_KEYS = 200
MOST_PEERS = 50
_LONGEST_REASON = 300
#: Things looked at between two yields: well under a millisecond.
STEP = 500
#: A sample of a throttle's slots is replaced when it is older.
SAMPLE = 60 * SECOND


_Asked = dict[Throttle, dict[str, int]]


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


class _Sample(NamedTuple):
    at: int
    taken: int


class Meter:
    """How much of a rate is used: compares the slots given out with those of the last look and the one before.

    Remembers the throttles of the last look only.
    """

    def __init__(self) -> None:
        self._last: dict[Throttle, tuple[_Sample, _Sample]] = {}
        self._next: dict[Throttle, tuple[_Sample, _Sample]] = {}

    def use(self, throttle: Throttle, now: int) -> float | None:
        """Share of the slots since one or two `SAMPLE`s (or the first look) that were given out; None: unknown."""
        if not throttle.windows:
            return None
        fresh = _Sample(now, throttle.taken)
        older, newer = self._last.get(throttle, (fresh, fresh))
        if now - newer.at >= SAMPLE:
            older, newer = newer, fresh
        self._next[throttle] = older, newer
        elapsed = now - older.at
        if elapsed < SECOND:
            return None
        slowest = max(window.interval for window in throttle.windows)
        return min(1.0, (throttle.taken - older.taken) * slowest / elapsed)

    def turn(self) -> None:
        """A look is over."""
        self._last, self._next = self._next, {}

    def aside(self) -> Meter:
        """For a look at some throttles only, which is not to be remembered."""
        meter = Meter()
        meter._last = self._last
        return meter


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
        ranked += [(_rank(throttle, now_ns), throttle.key, index) for index, throttle in some]
        if len(ranked) > 2 * most + STEP:
            ranked = nsmallest(most, ranked)
        yield
    rows, asked = [], (yield from _asked(manager))
    for *_, index in nsmallest(most, ranked):
        throttle = everything[index]
        row = yield from _throttle(throttle, asked.get(throttle, {}), manager, meter, now_ns)
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


def _asked(manager: Manager) -> Generator[None, None, _Asked]:
    """Messages that wait in the proxy, by throttle and instance."""
    asked: _Asked = {}
    for number, (name, throttles, count) in enumerate(manager.waiting_messages(), 1):
        for throttle in throttles if count else ():
            names = asked.setdefault(throttle, {})
            names[name] = names.get(name, 0) + count
        if number % STEP == 0:
            yield
    return asked


def _rank(throttle: Throttle, now: int) -> tuple[float, ...]:
    """Smaller comes first: connections that wait, messages that wait, places used, then debt. Of equals, the first
    by name, so that the page does not jump."""
    waiting = throttle.line.size if throttle.line is not None else 0
    queued = len(throttle.slots.queue) if throttle.slots is not None else 0
    use = throttle.used / throttle.cap if throttle.cap else 0.0
    return -waiting, -queued, -use, -throttle.used, throttle.debt_until() <= now, -throttle.taken


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
    row.last, row.last_ago = record.last[:_LONGEST_REASON], max(0.0, now - record.last_at)
    return row


# --- one throttle ---


def _throttle(
    throttle: Throttle, asked: Mapping[str, int], manager: Manager, meter: Meter, now: int
) -> Generator[None, None, ThrottleRow]:
    terms = throttle.terms
    stakes = list(terms.stakes) if terms is not None else []
    instances = _holders(throttle)
    for name, count in asked.items():
        instances.setdefault(name, InstanceRow(name)).demand += count
    for stake in stakes:
        yield from _add_part(instances, stake, manager)
    for flow, share in (terms.advice or {}).items() if terms is not None else ():
        if (row := instances.get(flow.receiver.name)) is not None:
            row.share = (row.share or 0) + share
    shown = nlargest(MOST_INSTANCES, instances.values(), key=lambda row: (row.waiting, row.demand, row.used))
    day = days = 0
    if throttle.counts:
        state, backoff = state_of(manager.blocks.backoffs, throttle.key, now)
        day, days = manager.blocks.warmup_of(throttle)
    else:
        state, backoff = _state(throttle, stakes, now)
    how = _reconciled([stake.part for stake in stakes]) if terms is not None else "throttle block"
    by_hand = list(manager.overrides.of(throttle.key)) if manager.overrides else []
    if any(each.pause for each in by_hand):
        state = "paused"
    return ThrottleRow(
        source=throttle.key.source,
        name=throttle.key.name + (" (connections)" if throttle.connections else ""),
        kind="proxy" if terms is None else "instances",
        reconciled="; ".join([how, *(_by_hand(each, now) for each in by_hand)]),
        limits=_rates(window.limit for window in throttle.windows if window.limit != NO_RATE),
        places=throttle.cap or None,
        state=state,
        backoff=backoff,
        used=throttle.used,
        waiting=sum(row.waiting for row in instances.values()),
        demand=sum(row.demand for row in instances.values()),
        next_slot=max(0, throttle.earliest(now) - now - 999) / SECOND if throttle.windows else None,
        taken=throttle.taken,
        place_use=throttle.used / throttle.cap if throttle.cap else None,
        rate_use=meter.use(throttle, now),
        instances=sorted(shown, key=lambda row: row.name),
        instances_left_out=len(instances) - len(shown),
        receiver=throttle.key.receiver,
        shadow=throttle.shadow is not None,
        would_wait=throttle.shadow.waited if throttle.shadow is not None else 0,
        would_refuse=throttle.shadow.refused if throttle.shadow is not None else 0,
        warmup_day=day,
        warmup_days=days,
    )


def _by_hand(override: Override, now: int) -> str:
    because = f" ({override.because[:_LONGEST_REASON]})" if override.because else ""
    return f"{told(override)}, for {whole_seconds((override.until - now) / SECOND)} more{because}"


def _holders(throttle: Throttle) -> dict[str, InstanceRow]:
    """Who holds places or stands in the line."""
    rows = {name: InstanceRow(name, used=used) for name, used in (throttle.held or {}).items()}
    for name, (waiting, _) in throttle.line.waiting().items() if throttle.line is not None else ():
        rows.setdefault(name, InstanceRow(name)).waiting = waiting
    return rows


def _add_part(rows: dict[str, InstanceRow], stake: Stake, manager: Manager) -> Iterator[None]:
    """What an instance said, and what its flows want."""
    row = rows.setdefault(stake.name, InstanceRow(stake.name))
    part = stake.part
    row.limits, row.places = _rates(part.limits), part.places or None
    row.mode, row.paused = str(part.mode), part.paused
    row.connected = len(stake) > 0 and stake.name in manager.sessions
    for number, flow in enumerate(list(stake), 1):
        row.demand += max(0, flow.want - flow.fine)
        row.waiting += len(flow.gated or ())
        if number % STEP == 0:
            yield


def _state(throttle: Throttle, stakes: list[Stake], now: int) -> tuple[str, float]:
    backoff = throttle.terms.backoff if throttle.terms is not None else None
    if stakes and all(stake.part.paused for stake in stakes):
        return "paused", 0.0
    if backoff is None:
        return "", 0.0
    return ("backoff", (backoff.until - now) / SECOND) if backoff.until > now else ("rising", 0.0)


def _reconciled(parts: list[Part]) -> str:
    """How `limits.reconcile` made one set of limits of these."""
    active = [part for part in parts if not part.paused]
    sums = sum(1 for part in active if part.mode is Mode.SUM)
    paused = f", {len(parts) - len(active)} paused" if len(parts) > len(active) else ""
    if len(active) < 2:
        return ("one instance" if active else "no instance") + paused
    if 0 < sums < len(active):
        return f"lower of sum ({sums}) and average ({len(active) - sums})" + paused
    return f"{'sum' if sums else 'average'} of {len(active)}" + paused


def _rates(limits: Iterable[Limit]) -> list[Rate]:
    return [Rate(*limit) for limit in limits]


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
