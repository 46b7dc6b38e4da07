"""What an operator should know first, in words: found in the figures that the rest of the view shows.

One line for each kind of trouble, however many are in it; the kinds are a closed list (docs/operations.md). What fails
now and then is no trouble: a receiver is in it when nothing goes well there any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from proxy.policy.trouble import LATELY, lately
from proxy.status.parts import RefusedPart
from proxy.status.rows import Overview, PeerRow, SourceRow, StoreRow, TroubleRow, WorkerRow
from proxy.status.workers import silent
from proxy.throttling.backoff import Slowdown
from proxy.throttling.throttle import Key

_KINDS = (
    *("draining", "old_configuration", "internal_errors", "nearly_full", "source_missing", "sources_failing"),
    *("receivers_failing", "backoff", "dns", "store_degraded", "store_members", "worker_silent", "workers_dying"),
)

#: Failures of the last five minutes, with nothing that went well since, that put a receiver or a source in trouble.
FEW = 3
#: Seconds that nothing has gone well from a source address. Many receivers' good and bad answers come mixed there.
_LONG = 60.0
#: Refused requests of one kind in the last five minutes that are told.
_MANY_REFUSALS = 5
#: Share of `max_connections` at which it is told.
_NEARLY_FULL = 0.9

#: Refusals that somebody must act upon, by code; what happens by itself (draining, throttled) is none.
_REFUSALS = {
    "accept_errors": "listeners cannot accept, for descriptors (LimitNOFILE) or memory have run out",
    "bad_credentials": "clients give a wrong secret or an unknown instance",
    "client_not_allowed": "clients are not in allow_from",
    "source_not_allowed": "clients ask for a source address that is not in source_ip",
    "destination_not_allowed": "clients ask for a destination that is not allowed",
    "overloaded": "clients are turned away, for the proxy is full or an address fails too often",
    "via_unavailable": "the proxy that this agent goes through (via) is not available",
}
#: All of them: what looks at the kinds by name finds each before it has ever been there.
KINDS = (*_KINDS, *_REFUSALS)


def found(
    view: Overview,
    refused: Mapping[str, RefusedPart],
    now: float,
    dns: Sequence[str] = (),
    backing_off: tuple[Key, Slowdown] | None = None,
) -> list[TroubleRow]:
    """All of it, the worst first.

    Args:
        view: all else of it. refused: requests, by the error's code. now: seconds of the clock of `refused`.
        dns: what cannot be looked up. backing_off: the last throttle that began to back off, if any does.
    """
    return [
        *_program(view),
        *_workers(view.workers),
        *_store(view.store),
        *_sources(view),
        *_receivers(view),
        *_backoffs(view, backing_off),
        *_dns(dns),
        *_refusals(refused, now),
    ]


def _program(view: Overview) -> Iterator[TroubleRow]:
    if view.program.draining:
        yield TroubleRow("draining", "the proxy is stopping: it accepts nothing new")
    if (since := view.program.old_configuration) is not None:
        text = f"the last reload failed, and an old configuration is in force: {view.program.reload_mistake}"
        yield TroubleRow("old_configuration", text, since=since)
    if errors := view.counters.get("internal_errors"):
        yield TroubleRow("internal_errors", f"{errors} mistakes of the proxy itself since the start: see the log")
    connections = view.connections
    if connections.limit and connections.open >= _NEARLY_FULL * connections.limit:
        yield TroubleRow("nearly_full", f"{connections.open} of {connections.limit} client connections are in use")


def _workers(rows: Sequence[WorkerRow]) -> Iterator[TroubleRow]:
    if lost := list(silent(rows)):
        one = len(lost) == 1
        names = ", ".join(str(row.number) for row in lost)
        many = f"worker {names} does" if one else f"workers {names} do"
        text = f"{many} not answer, and what {'it knows' if one else 'they know'} is missing or old"
        yield TroubleRow("worker_silent", text, since=max(row.silent for row in lost))
    deaths = sum(row.died_lately for row in rows)
    if deaths > 1:
        last = min((row for row in rows if row.died_ago is not None), key=lambda row: row.died_ago or 0.0)
        text = f"workers die again and again, number {last.number} was the last one: {last.died}"
        yield TroubleRow("workers_dying", text, deaths)


def _store(store: StoreRow | None) -> Iterator[TroubleRow]:
    if store is None:
        return
    if store.state != "connected":
        ours = "the whole" if store.members == 1 else f"1/{store.members}"
        why = store.why or "it has not answered yet"
        text = f"the throttle store {store.address} does not answer, and this proxy goes on with {ours} of each limit"
        yield TroubleRow("store_degraded", f"{text}: {why}", since=store.since)
    if store.seen > store.members:
        text = f"{store.seen} proxies use the throttle store, and throttle_store_members is {store.members}"
        yield TroubleRow("store_members", f"{text}: without it they would go beyond the limits")


def _sources(view: Overview) -> Iterator[TroubleRow]:
    missing = [row for row in view.sources if not row.present]
    if missing:
        names = _names(missing)
        since = max((row.absent for row in missing if row.absent is not None), default=None)
        are = "is" if len(missing) == 1 else "are"
        yield TroubleRow("source_missing", f"{names} {are} not on this machine", sum(r.recent for r in missing), since)
    failing = [row for row in view.sources if row.present and _in_trouble(row) and (row.failing or 0) >= _LONG]
    if failing:
        yield _failing("sources_failing", "source", failing)


def _receivers(view: Overview) -> Iterator[TroubleRow]:
    failing = [row for row in view.receivers if _in_trouble(row)]
    if failing:
        yield _failing("receivers_failing", "receiver", failing)


def _backoffs(view: Overview, last: tuple[Key, Slowdown] | None) -> Iterator[TroubleRow]:
    if last is not None:
        key, slowdown = last
        count = view.manager.backing_off
        many = f"{count} throttles back off, {key} is the last" if count > 1 else f"throttle {key} backs off"
        yield TroubleRow("backoff", f"{many}: {slowdown.causes[-1].reply}")


def _dns(failures: Sequence[str]) -> Iterator[TroubleRow]:
    if failures:
        are = "domain of throttle blocks" if len(failures) == 1 else "domains of throttle blocks"
        text = f"{len(failures)} {are} cannot be looked up, what was known stays in force: {failures[0]}"
        yield TroubleRow("dns", text)


def _failing(kind: str, what: str, rows: list[PeerRow] | list[SourceRow]) -> TroubleRow:
    worst = max(rows, key=lambda row: row.recent)
    many = f"{len(rows)} {what}s refuse or fail" if len(rows) > 1 else f"{what} {worst.name} refuses or fails"
    most = f", {worst.name} most often" if len(rows) > 1 else ""
    text = f"{many}, and nothing goes well there{most}: {worst.last}"
    return TroubleRow(kind, text, sum(row.recent for row in rows), max(row.failing or 0.0 for row in rows))


def _in_trouble(row: PeerRow) -> bool:
    return row.recent > 0 and row.in_a_row >= FEW


def _refusals(refused: Mapping[str, RefusedPart], now: float) -> Iterator[TroubleRow]:
    for code, text in _REFUSALS.items():
        refusals = refused.get(code)
        if refusals is None or now - refusals.last_at > LATELY:
            continue
        recent = lately(refusals.recent, now)
        if recent >= (1 if code == "accept_errors" else _MANY_REFUSALS):
            yield TroubleRow(code, f"{text}; the last: {refusals.last}", recent, now - refusals.times[-1][0])


def _names(rows: list[SourceRow]) -> str:
    shown = ", ".join(row.name for row in rows[:3])
    return f"source {shown}" if len(rows) == 1 else f"{len(rows)} sources ({shown}{', ...' * (len(rows) > 3)})"
