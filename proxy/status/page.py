"""The status page: one HTML document without scripts or outside parts, that loads itself anew.

It is made in pieces, each well under a millisecond of work, so that who makes it can let others run in between.
Everything that is not written here is escaped: names come from instances, addresses from configuration and clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from itertools import chain, islice

from proxy.log.lines import printable
from proxy.stats import duration, whole_seconds
from proxy.status.rows import (
    CachedRow,
    InstanceRow,
    PeerRow,
    SessionRow,
    SourceRow,
    Status,
    ThrottleRow,
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
    limits_text,
    means,
    next_slot,
    percent,
    places_text,
    presence,
    queues_text,
    throttle_state,
    trouble_text,
)

REFRESH = 5
#: Rows of a table in one piece.
_ROWS = 25
_STYLE = """
:root{color-scheme:light dark}
body{font:14px/1.45 system-ui,sans-serif;margin:1.5rem auto;max-width:110rem;padding:0 1rem}
h1{font-size:1.35rem;margin:0}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}p{margin:.2rem 0;opacity:.75}
.s{overflow-x:auto}table{border-collapse:collapse}
th,td{padding:.22rem .6rem;text-align:left;border-bottom:1px solid #8883;white-space:nowrap}
th{font-weight:600;opacity:.7}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
tr.i td{opacity:.8;border-bottom-style:dotted}tr.i td:nth-child(2){padding-left:1.8rem}
.w{color:light-dark(#9a4408,#f5a524);font-weight:600}.b{color:light-dark(#b3121b,#ff7b72);font-weight:600}
.ok{color:light-dark(#116329,#56d364)}.t{margin:.3rem 0;padding-left:1.2rem}
.c{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem}.c b{font-variant-numeric:tabular-nums}
"""


class _Html(str):
    """Markup; whatever is not one is text and gets escaped."""

    __slots__ = ()


def pieces(view: Status) -> Iterator[str]:
    """The document."""
    program = view.program
    draining = ' <span class="b">draining</span>' if program.draining else ""
    yield "".join(
        (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="refresh" content="{REFRESH}">',
            '<meta name="viewport" content="width=device-width"><title>GreenArrow Proxy</title>',
            f"<style>{_STYLE}</style></head><body><main><h1>GreenArrow Proxy on {_text(view.host)}{draining}</h1>",
            f"<p>{_text(view.generated_at)}, version {_text(program.version)}, up {whole_seconds(program.uptime)}, "
            f"incarnation {_text(program.incarnation)}, relay {_text(program.relay)}. ",
            'Also: <a href="/status.json">status.json</a>, <a href="/metrics">metrics</a>, ',
            '<a href="/healthz">healthz</a></p>',
            _trouble(view),
            _overview(view),
        )
    )
    for section in (_throttles, _backoffs, _names, _receivers, _sources, _sessions, _pool, _counters):
        yield from section(view)
    yield "</main></body></html>\n"


# --- sections ---


def _trouble(view: Status) -> str:
    """In words, before all else."""
    if not view.trouble:
        return '<h2>Trouble</h2><p class="ok">none</p>'
    items = "".join(f'<li class="b">{_text(trouble_text(row))}</li>' for row in view.trouble)
    return f'<h2>Trouble</h2><ul class="t">{items}</ul>'


def _overview(view: Status) -> str:
    connections = view.connections
    figures = _figures(
        ("clients", f"{connections.open} of {connections.limit}"),
        ("not yet known", connections.newcomers),
        ("native channels", connections.channels),
        ("mode smtp clients", connections.dialogues),
        ("to receivers", f"{connections.active} active, {connections.cached} cached"),
        ("throttles in use", f"{view.manager.throttles} of {view.manager.known} known"),
        ("messages without a permit", view.manager.without_permit),
    )
    rows = [
        (row.address, row.protocol.replace("_", " "), row.open_connections, "closing" if row.closing else "")
        for row in view.listeners
    ]
    return figures + "".join(_section("Listeners", _table(("address", "protocol", "#open connections", ""), rows)))


def _throttles(view: Status) -> Iterator[str]:
    head = (
        *("throttle", "source / instance", "limits", "how / mode", "state", "#places", "#waiting", "#share"),
        *("#demand", "held by", "#next slot", "#rate used"),
    )

    def rows() -> Iterator[_Html]:
        for throttle in view.throttles:
            yield _row(head, _throttle_cells(throttle))
            for each in throttle.instances:
                yield _row(head, _instance_cells(each), "i")
            if throttle.instances_left_out:
                yield _row(head, ("", f"and {throttle.instances_left_out} more"), "i")

    left_out = f"<p>{view.throttles_left_out} more are not shown.</p>" if view.throttles_left_out else ""
    yield from _section("Throttles", _markup_table(head, rows()), left_out)


def _backoffs(view: Status) -> Iterator[str]:
    if not view.backoffs:
        return
    left_out = f"<p>{view.backoffs_left_out} more are not shown.</p>" if view.backoffs_left_out else ""
    rows = ((row.name, between(row), backoff_state(row), row.instance, row.reply) for row in view.backoffs)
    head = ("throttle", "for", "back-off", "instance", "what the receiver said")
    yield from _section("Back-off", _table(head, rows), left_out)


def _names(view: Status) -> Iterator[str]:
    if not view.blocks:
        return
    left_out = f"<p>{view.blocks_left_out} more are not shown.</p>" if view.blocks_left_out else ""
    rows = (
        (row.name, block_limits(row), holds_for(row), row.hosts if row.named else "", means(row), block_doubt(row))
        for row in view.blocks
    )
    head = ("throttle block", "limits", "holds for", "#MX hosts", "its names mean now", "not known")
    yield from _section("Throttle blocks", _table(head, rows), left_out)


def _throttle_cells(row: ThrottleRow) -> tuple[object, ...]:
    state = _Html(f'<span class="b">{throttle_state(row)}</span>')
    waiting: object = _Html(f'<span class="w">{row.waiting}</span>') if row.waiting else 0
    return (
        *(_Html(f"<b>{_text(row.name)}</b>"), between(row), limits_text(row.limits, row.places), row.reconciled, state),
        *(places_text(row.used, row.places), waiting, "", row.demand, held_by(row)),
        *(next_slot(row), percent(row.rate_use)),
    )


def _instance_cells(row: InstanceRow) -> tuple[object, ...]:
    said = limits_text(row.limits, row.places) if row.mode else ""
    share = "" if row.share is None else row.share
    return ("", row.name, said, row.mode, instance_state(row), row.used, row.waiting, share, row.demand, "", "", "")


def _receivers(view: Status) -> Iterator[str]:
    left_out = f"<p>{view.receivers_left_out} more are not shown.</p>" if view.receivers_left_out else ""
    head = ("receiver", *_PEER_HEAD)
    rows = ((row.name, *_peer_cells(row)) for row in view.receivers)
    yield from _section("Receivers with trouble", _table(head, rows), left_out)


#: Of receivers and of sources.
_PEER_HEAD = ("failing for", "#last 5 min", "last refusal or failure", "#ago", "failed", "#4xx", "#5xx", "#connections")


def _peer_cells(row: PeerRow) -> tuple[object, ...]:
    failing = _Html(f'<span class="b">{ago(row.failing)}</span>')
    last_ago = ago(row.last_ago) if row.last else ""
    return failing, row.recent, row.last, last_ago, failures_text(row), row.deferred, row.rejected, row.opened


def _sources(view: Status) -> Iterator[str]:
    left_out = f"<p>{view.sources_left_out} more are not shown.</p>" if view.sources_left_out else ""
    head = ("source", "on this machine", *_PEER_HEAD, "#delivered", "#deferred", "#rejected")
    yield from _section("Source addresses", _table(head, map(_source_cells, view.sources)), left_out)


def _source_cells(row: SourceRow) -> tuple[object, ...]:
    here = presence(row) if row.present else _Html(f'<span class="b">{presence(row)}</span>')
    return (
        *(called(row.name, row.source_name), here, *_peer_cells(row)),
        *(row.messages_accepted, row.messages_deferred, row.messages_rejected),
    )


def _sessions(view: Status) -> Iterator[str]:
    head = (
        *("instance", "address", "#connected", "#ping", "#ago", "#ram", "#bounce", "#disk", "#forward", "#back"),
        *("#paths", "#weight", "#without permit"),
    )
    left_out = f"<p>{view.sessions_left_out} more are not shown.</p>" if view.sessions_left_out else ""
    yield from _section("Sessions", _table(head, map(_session_cells, view.sessions)), left_out)


def _session_cells(row: SessionRow) -> tuple[object, ...]:
    return (
        *(row.name, row.address, whole_seconds(row.connected), duration(row.ping), whole_seconds(row.ping_age)),
        *(row.ram, row.bounce, row.disk, queues_text(row.forward), queues_text(row.back), row.paths, f"{row.weight:g}"),
        row.without_permit,
    )


def _pool(view: Status) -> Iterator[str]:
    pool = view.pool
    figures = _figures(
        ("held", pool.held),
        ("given back so far", pool.offered),
        ("requests served from here", percent(pool.reuse_ratio) or "none yet"),
        ("look-ups that found one", f"{pool.hits} of {pool.hits + pool.misses}"),
        ("oldest", whole_seconds(pool.oldest)),
        ("mean age", whole_seconds(pool.mean_age)),
        ("longest idle", whole_seconds(pool.longest_idle)),
        *((f"closed: {reason}", count) for reason, count in pool.discards.items()),
    )
    head = ("source", "destination", "EHLO name", "TLS", "tenant", "#connections", "#messages", "#oldest", "#idle")
    left_out = f"<p>{pool.keys_left_out} more are not shown.</p>" if pool.keys_left_out else ""
    table = _table(head, map(_cached_cells, pool.keys))
    yield from _section("Cached connections", chain((figures,), table), left_out)


def _cached_cells(row: CachedRow) -> tuple[object, ...]:
    return (
        *(row.source, row.destination, row.ehlo_name, f"{row.tls} {row.tls_server_name}", "yes" if row.tenant else ""),
        *(row.connections, row.messages, whole_seconds(row.oldest), whole_seconds(row.idle)),
    )


def _counters(view: Status) -> Iterator[str]:
    rows: list[tuple[object, ...]] = []
    for name, value in view.counters.items():
        parts = sorted(value.items()) if isinstance(value, dict) else [("", value)]
        rows += [(name.replace("_", " "), key, count) for key, count in parts]
    yield from _section("Counters since the start", _table(("counter", "", "#count"), rows))


# --- markup ---


def _text(value: object) -> str:
    return value if isinstance(value, _Html) else escape(printable(str(value)))


def _section(title: str, content: Iterable[str], after: str = "") -> Iterator[str]:
    yield f"<h2>{title}</h2>"
    yield from content
    yield after


def _figures(*figures: tuple[str, object]) -> str:
    spans = (f"<span>{_text(name)} <b>{_text(value)}</b></span>" for name, value in figures)
    return f'<div class="c">{"".join(spans)}</div>'


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> Iterator[str]:
    return _markup_table(head, (_row(head, cells) for cells in rows))


def _markup_table(head: tuple[str, ...], rows: Iterator[_Html]) -> Iterator[str]:
    """A name in `head` that begins with # is that of a column of figures."""
    some = "".join(islice(rows, _ROWS))
    if not some:
        yield "<p>none</p>"
        return
    names = "".join(f'<th class="n">{n[1:]}</th>' if n.startswith("#") else f"<th>{n}</th>" for n in head)
    yield f'<div class="s"><table><tr>{names}</tr>'
    while some:
        yield some
        some = "".join(islice(rows, _ROWS))
    yield "</table></div>"


def _row(head: tuple[str, ...], cells: tuple[object, ...], kind: str = "") -> _Html:
    tags = ('<td class="n">' if name.startswith("#") else "<td>" for name in head)
    content = "".join(tag + _text(cell) + "</td>" for tag, cell in zip(tags, cells, strict=False))
    return _Html(f'<tr class="{kind}">{content}</tr>' if kind else f"<tr>{content}</tr>")
