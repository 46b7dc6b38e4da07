"""The status page: one HTML document without outside parts, that keeps itself up to date, with or without its script.

It is made in pieces, each well under a millisecond of work, so that who makes it can let others run in between, and
lists a bounded number of everything; what is looked for (`?q=`) is found all the same. What an operator wants first
stands first: trouble before all, and in a table the columns that say who waits for what, for a telephone shows no more.
Everything that is not written here is escaped: names come from instances, addresses from configuration and clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from proxy.stats import duration, whole_seconds
from proxy.status.looks import REFRESH, SCRIPT, STYLE
from proxy.status.markup import Mark, Row, Table, figures, holds, section, text
from proxy.status.rows import (
    BlockRow,
    CachedRow,
    InstanceRow,
    LeasedRow,
    MinuteRow,
    PeerRow,
    SessionRow,
    SourceRow,
    Status,
    ThrottleRow,
    WorkerRow,
)
from proxy.status.spelled import (
    ago,
    backoff_state,
    between,
    block_doubt,
    block_limits,
    called,
    failures_text,
    held_by,
    holds_for,
    instance_state,
    leased_share,
    limits_text,
    means,
    mebibytes,
    next_slot,
    percent,
    places_text,
    presence,
    queues_text,
    store_calls,
    store_engine,
    store_members,
    store_state,
    throttle_state,
    trouble_text,
    worker_death,
    worker_state,
)

#: Rows of a table: a page that a telephone can hold, whatever there is.
MOST_ROWS = 100
#: Of throttles and the instances under them together; of one throttle's instances, unless it is looked for.
MOST_THROTTLE_ROWS = 250
MOST_INSTANCES = 5
#: Characters of what is looked for.
LONGEST_QUERY = 100


def pieces(view: Status, wanted: str = "") -> Iterator[str]:
    """The document.

    Args:
        wanted: only rows with this text in them are listed, large and small letters alike; "": all.
    """
    wanted = wanted[:LONGEST_QUERY]
    yield _top(view, wanted)
    yield _trouble(view)
    yield _overview(view)
    yield _last_hour(view.minutes)
    small = wanted.casefold()
    yield from section(_throttles(view, small), MOST_THROTTLE_ROWS, small)
    for table in _TABLES:
        made = table(view)
        if made is None:
            continue
        if small:
            made = made._replace(rows=(row for row in made.rows if holds(row.cells, small)))
        yield from section(made, MOST_ROWS, small)
        if table is _pool_keys:
            yield _pool(view)
        elif table is _store_keys:
            yield _store(view)
    yield f"</main><script>{SCRIPT}</script></body></html>\n"


# --- before the tables ---


def _top(view: Status, wanted: str) -> str:
    program = view.program
    draining = ' <span class="b">draining</span>' if program.draining else ""
    clear = ' <a href="/">show all</a>' if wanted else ""
    return "".join(
        (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<noscript><meta http-equiv="refresh" content="{REFRESH}"></noscript>',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>GreenArrow Proxy on {text(view.host)}</title>",
            f"<style>{STYLE}</style></head><body><main><h1>GreenArrow Proxy on {text(view.host)}{draining}</h1>",
            f'<p class="f">{text(view.generated_at)}, version {text(program.version)}, ',
            f"up {whole_seconds(program.uptime)}, incarnation {text(program.incarnation)}, ",
            f"relay {text(program.relay)}, core {text(program.core)}. ",
            'Also: <a href="/status.json">status.json</a>, <a href="/metrics">metrics</a>, ',
            '<a href="/healthz">healthz</a></p><p id="live" class="b" role="status"></p>',
            '<form role="search" action="/"><label for="q">Rows with</label>',
            f'<input id="q" name="q" type="search" maxlength="{LONGEST_QUERY}" autocomplete="off" ',
            f'value="{text(wanted)}"><button>Show</button>{clear}</form>',
        )
    )


def _trouble(view: Status) -> str:
    """In words, before all else."""
    if not view.trouble:
        return '<h2>Trouble</h2><p class="ok">none</p>'
    items = "".join(f'<li class="b">{text(trouble_text(row))}</li>' for row in view.trouble)
    return f"<h2>Trouble</h2><ul>{items}</ul>"


def _overview(view: Status) -> str:
    connections = view.connections
    return figures(
        ("clients", f"{connections.open} of {connections.limit}"),
        ("not yet known", connections.newcomers),
        ("native channels", connections.channels),
        ("mode smtp clients", connections.dialogues),
        ("to receivers", f"{connections.active} active, {connections.cached} cached"),
        ("throttles in use", f"{view.manager.throttles} of {view.manager.known} known"),
        ("messages without a permit", view.manager.without_permit),
    )


# --- the last hour ---

#: Of one line, in units of its picture.
_STEP, _HEIGHT = 3, 30


def _last_hour(minutes: list[MinuteRow]) -> str:
    if not minutes:
        return ""
    lines = (
        _line("connections ended, a second", [row.ended for row in minutes], "{:.1f}"),
        _line("connections failed, a second", [row.failed for row in minutes], "{:.1f}"),
        _line("longest turn, seconds", [row.turn for row in minutes], "{:.3g}"),
    )
    return f'<h2>The last hour</h2><div class="h">{"".join(lines)}</div>'


def _line(title: str, values: list[float], form: str) -> str:
    """One figure by minutes, the latest on the right; in words what it is now and at most."""
    most = max(values)
    scale = _HEIGHT / most if most else 0.0
    left = _STEP * (60 - len(values))
    points = " ".join(
        f"{left + _STEP * at},{_HEIGHT + 1 - value * scale:.1f}" for at, value in enumerate([*values, values[-1]])
    )
    said = f"{title}: {form.format(values[-1])}, at most {form.format(most)}"
    return (
        f'<figure><svg viewBox="0 0 {_STEP * 60} {_HEIGHT + 2}" role="img" aria-label="{said}">'
        f'<polyline points="{points}"/></svg><figcaption>{said}</figcaption></figure>'
    )


# --- throttles ---


def _throttles(view: Status, wanted: str) -> Table:
    head = (
        *("throttle", "held by", "#waiting", "#places", "#rate used", "#delivered", "#deferred", "#rejected"),
        *("state", "#demand", "#next slot", "limits", "how / mode", "#share"),
    )
    rows = _throttle_rows(view.throttles, wanted)
    caption = "First those that somebody waits for, then the busiest; below each, its instances"
    return Table("Throttles", caption, head, rows, findable=view.throttles_left_out)


def _throttle_rows(throttles: Iterable[ThrottleRow], wanted: str) -> Iterator[Row]:
    """One that is looked for has all its instances; of one that is not, those instances that are."""
    for throttle in throttles:
        cells = _throttle_cells(throttle)
        inner = [Row(_instance_cells(each), inner=True) for each in throttle.instances]
        if wanted and not holds(cells, wanted):
            inner = [row for row in inner if holds(row.cells, wanted)]
            if not inner:
                continue
            left_out = 0
        elif wanted:
            left_out = throttle.instances_left_out
        else:
            inner, left_out = _busiest(throttle), throttle.instances_left_out
            left_out += len(throttle.instances) - len(inner)
        yield Row(cells)
        yield from inner
        if left_out:
            yield Row((f"and {left_out} more", *[""] * (len(cells) - 1)), inner=True)


def _busiest(throttle: ThrottleRow) -> list[Row]:
    ranked = sorted(throttle.instances, key=lambda row: (-row.waiting, -row.demand, -row.used, row.name))
    shown = sorted(ranked[:MOST_INSTANCES], key=lambda row: row.name)
    return [Row(_instance_cells(each), inner=True) for each in shown]


def _throttle_cells(row: ThrottleRow) -> tuple[object, ...]:
    return (
        *(Mark(f"{row.name}\n{between(row)}", "two"), Mark(held_by(row), "w")),
        *(Mark(str(row.waiting), "w") if row.waiting else 0, places_text(row.used, row.places), percent(row.rate_use)),
        *(row.messages_accepted, row.messages_deferred, row.messages_rejected),
        *(Mark(throttle_state(row), "b"), row.demand, next_slot(row)),
        *(limits_text(row.limits, row.places), row.reconciled, ""),
    )


def _instance_cells(row: InstanceRow) -> tuple[object, ...]:
    said = limits_text(row.limits, row.places) if row.mode else ""
    share = "" if row.share is None else row.share
    state = instance_state(row)
    return row.name, "", row.waiting, row.used, "", "", "", "", state, row.demand, "", said, row.mode, share


# --- other tables ---


def _store_keys(view: Status) -> Table | None:
    if view.store is None:
        return None
    head = ("throttle", "state", "#places here", "limits of all", "without it", "#leased", "#unused", "#proxies")
    caption = "Limits that hold for several proxies together; those first for which the store does not answer"
    return Table("Throttle store", caption, head, map(_leased_row, view.store.keys), view.store.keys_left_out)


def _leased_row(row: LeasedRow) -> Row:
    here = "" if row.places_here is None else row.places_here
    return Row(
        (
            *(Mark(f"{row.name}\n{between(row)}", "two"), Mark(row.state, "b") if row.state == "alone" else row.state),
            *(here, limits_text(row.limits, row.places), leased_share(row), row.leased, row.unused, row.users or "?"),
        )
    )


def _store(view: Status) -> str:
    store = view.store
    if store is None:
        return ""
    return figures(
        ("throttle store", store.address),
        ("state", store_state(store)),
        ("engine", store_engine(store)),
        ("members", store_members(store)),
        ("calls", store_calls(store)),
        ("its memory was another one", f"{store.epochs} times"),
        ("lost", f"{store.degraded} times"),
    )


def _backoffs(view: Status) -> Table | None:
    if not view.backoffs:
        return None
    rows = (
        Row((row.name, between(row), backoff_state(row), row.instance, Mark(row.reply, "l"))) for row in view.backoffs
    )
    head = ("throttle", "for", "back-off", "instance", "what the receiver said")
    return Table(
        "Back-off", "What a receiver's reply has slowed down, the latest first", head, rows, view.backoffs_left_out
    )


def _names(view: Status) -> Table | None:
    if not view.blocks:
        return None
    rows = (
        Row(
            (
                row.name,
                block_limits(row),
                block_doubt(row),
                Mark(holds_for(row), "l"),
                _hosts(row),
                Mark(means(row), "l"),
            )
        )
        for row in view.blocks
    )
    head = ("throttle block", "limits", "not known", "holds for", "#MX hosts", "its names mean now")
    return Table("Throttle blocks", "As configured, and what DNS says", head, rows, view.blocks_left_out)


def _hosts(row: BlockRow) -> object:
    return row.hosts if row.named else ""


def _receivers(view: Status) -> Table:
    rows = (Row((row.name, *_peer_cells(row))) for row in view.receivers)
    caption = "Those that fail, and those that have failed since the start"
    return Table("Receivers with trouble", caption, ("receiver", *_PEER_HEAD), rows, view.receivers_left_out)


#: Of receivers and of sources.
_PEER_HEAD = ("failing for", "#last 5 min", "last refusal or failure", "#ago", "failed", "#4xx", "#5xx", "#connections")


def _peer_cells(row: PeerRow) -> tuple[object, ...]:
    last_ago = ago(row.last_ago) if row.last else ""
    return (
        *(Mark(ago(row.failing), "b"), row.recent, Mark(row.last, "l"), last_ago, failures_text(row)),
        *(row.deferred, row.rejected, row.opened),
    )


def _sources(view: Status) -> Table:
    head = ("source", "on this machine", "#delivered", "#deferred", "#rejected", *_PEER_HEAD)
    caption = "With trouble, gone, or used for mail; messages since the start"
    rows = map(_source_row, view.sources)
    return Table("Source addresses", caption, head, rows, view.sources_left_out)


def _source_row(row: SourceRow) -> Row:
    here = presence(row) if row.present else Mark(presence(row), "b")
    messages = row.messages_accepted, row.messages_deferred, row.messages_rejected
    return Row((called(row.name, row.source_name), here, *messages, *_peer_cells(row)))


def _sessions(view: Status) -> Table:
    head = (
        *("instance", "address", "#connected", "#ping", "#ago", "#ram", "#bounce", "#disk", "#forward", "#back"),
        *("#paths", "#weight", "#without permit"),
    )
    caption = "Instances that are connected; messages in their queues"
    return Table("Sessions", caption, head, map(_session_row, view.sessions), view.sessions_left_out)


def _session_row(row: SessionRow) -> Row:
    return Row(
        (
            *(row.name, row.address, whole_seconds(row.connected), duration(row.ping), whole_seconds(row.ping_age)),
            *(row.ram, row.bounce, row.disk, queues_text(row.forward), queues_text(row.back)),
            *(row.paths, f"{row.weight:g}", row.without_permit),
        )
    )


def _pool_keys(view: Status) -> Table:
    head = ("destination", "source", "#connections", "#messages", "#oldest", "#idle", "EHLO name", "TLS", "tenant")
    caption = "To receivers, held open and not in use"
    return Table("Cached connections", caption, head, map(_cached_row, view.pool.keys), view.pool.keys_left_out)


def _cached_row(row: CachedRow) -> Row:
    return Row(
        (
            *(row.destination, row.source, row.connections, row.messages, whole_seconds(row.oldest)),
            *(whole_seconds(row.idle), row.ehlo_name, f"{row.tls} {row.tls_server_name}", "yes" if row.tenant else ""),
        )
    )


def _pool(view: Status) -> str:
    pool = view.pool
    return figures(
        ("held", pool.held),
        ("given back so far", pool.offered),
        ("requests served from here", percent(pool.reuse_ratio) or "none yet"),
        ("look-ups that found one", f"{pool.hits} of {pool.hits + pool.misses}"),
        ("oldest", whole_seconds(pool.oldest)),
        ("mean age", whole_seconds(pool.mean_age)),
        ("longest idle", whole_seconds(pool.longest_idle)),
        *((f"closed: {reason}", count) for reason, count in pool.discards.items()),
    )


def _listeners(view: Status) -> Table:
    rows = (
        Row((row.address, row.protocol.replace("_", " "), row.open_connections, "closing" if row.closing else ""))
        for row in view.listeners
    )
    return Table("Listeners", "Where clients connect", ("address", "protocol", "#open connections", "state"), rows)


def _workers(view: Status) -> Table | None:
    """One process needs no table."""
    if len(view.workers) < 2:
        return None
    head = (
        *("number", "role", "state", "#open connections", "#CPU", "#memory", "#descriptors", "#restarts", "last death"),
        *("#up", "#pid", "version"),
    )
    caption = "What runs; each worker has its own connections, the master sees to the rest"
    return Table("Processes", caption, head, map(_worker_row, view.workers))


def _worker_row(row: WorkerRow) -> Row:
    descriptors = f"{row.descriptors} of {row.most_descriptors}"
    return Row(
        (
            *(str(row.number), row.role, worker_state(row), row.open_connections, whole_seconds(row.cpu)),
            *(mebibytes(row.memory), descriptors, row.restarts, worker_death(row), whole_seconds(row.up)),
            *(row.pid, row.version),
        )
    )


def _counters(view: Status) -> Table:
    return Table("Counters", "Since the start", ("counter", "of", "#count"), _counter_rows(view))


def _counter_rows(view: Status) -> Iterator[Row]:
    for name, value in view.counters.items():
        for key, count in sorted(value.items()) if isinstance(value, dict) else [("", value)]:
            yield Row((name.replace("_", " "), key, count))


#: In the order of the page, behind the throttles.
_TABLES: tuple[Callable[[Status], Table | None], ...] = (
    *(_store_keys, _backoffs, _names, _receivers, _sources, _sessions, _pool_keys, _listeners, _workers, _counters),
)
