"""`/metrics`: counters and gauges in the exposition format of Prometheus.

A collector is built for each request from what is counted anyway, so nothing is counted twice. Labels have few values:
closed vocabularies, listeners, and at most `stats.MAX_NAMES` instances; never a destination or a client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from proxy.errors import ConfigError, ProxyError, Step, UpstreamError, every
from proxy.model import Discard, Ending
from proxy.spans import SPANS, Histogram
from proxy.stats import MAX_NAMES
from proxy.status.parts import Part, ProcessPart, SpanPart
from proxy.status.rows import Overview, SessionRow, StoreRow, WorkerRow
from proxy.status.trouble import KINDS
from proxy.status.workers import SILENT

CONTENT_TYPE = CONTENT_TYPE_LATEST
_PREFIX = "greenarrow_proxy_"

#: Name in `Counters` → name of the metric, label of a table, help.
_COUNTERS = {
    "accepted": ("accepted_connections", "protocol", "Client connections, by protocol"),
    "refused": ("refused", "reason", "Connections and requests that were refused"),
    "failed": ("failed", "step", "Outgoing connections that did not come to be, by step"),
    "ended": ("ended_connections", "outcome", "Relayed connections that have ended"),
    "discarded": ("discarded_connections", "reason", "Held-open connections that were closed"),
    "tls_sessions": ("tls_sessions", "certificate", "new SMTP sessions over TLS, by what the certificate proves"),
    "tls_resumed": (
        "tls_sessions_resumed",
        "",
        "those of them that an earlier session went on in: no new certificates",
    ),
    "tls_failures": ("tls_failures", "result", "sessions whose TLS failed, by result of RFC 8460"),
    "in_clear": ("sessions_in_clear", "cause", "SMTP sessions in clear although TLS was offered and wanted"),
    "bytes_up": ("bytes_up", "", "Bytes from clients to receivers"),
    "bytes_down": ("bytes_down", "", "Bytes from receivers to clients"),
    "reused": ("reused_connections", "", "Requests served by a held-open connection"),
    "fresh": ("fresh_connections", "", "Requests served by a new connection"),
    "messages": ("messages", "", "MAIL commands seen"),
    "messages_accepted": ("messages_accepted", "instance", "Messages that receivers took (2xx to the final dot)"),
    "messages_deferred": ("messages_deferred", "instance", "Replies 4xx to MAIL, RCPT and final dots, ours included"),
    "messages_rejected": ("messages_rejected", "instance", "Replies 5xx to MAIL, RCPT and final dots"),
    "sources_accepted": ("source_messages_accepted", "source", "The same by the address that mail leaves from"),
    "sources_deferred": ("source_messages_deferred", "source", "The same by the address that mail leaves from"),
    "sources_rejected": ("source_messages_rejected", "source", "The same by the address that mail leaves from"),
    "messages_without_permit": ("messages_without_permit", "", "MAIL commands that no permit covered"),
    "backoffs": ("throttle_backoffs", "", "Times that a reply has slowed a throttle down"),
    "instances_ended": ("instance_connections", "instance", "Relayed connections that have ended, by instance"),
    "instances_failed": (
        "instance_failed",
        "instance",
        "Outgoing connections that did not come to be, by instance and step",
    ),
    "sources_ended": ("source_connections", "source", "Relayed connections that have ended, by source address"),
    "sources_failed": ("source_failed", "source", "The same by source address and step"),
    "probes": ("probes", "", "Connections that closed without a byte, and health checks"),
    "accept_errors": ("accept_errors", "", "Times that a listener could not accept"),
    "internal_errors": ("internal_errors", "", "Mistakes of the program itself"),
    "reloads": ("reloads", "", "Configurations put in force by a reload"),
    "reloads_failed": ("reloads_failed", "", "Reloads that were refused"),
}


#: Of these, what is counted by two labels.
_BY_STEP = frozenset(("instances_failed", "sources_failed"))
#: Histograms of `proxy.spans`.
_SPANS = {
    "connect": "Until a receiver was connected",
    "tls": "TLS handshakes with receivers",
    "place": "Waiting for a place under the throttles, those that did not have to included",
    "slot": "Waiting for a message's slot, where messages are seen, those that did not have to included",
    "session": "From the client's request to the end",
    "turn": "Work between two looks at the sockets, in which nobody else is served",
    "bytes": "From client to receiver in a session",
    "messages": "MAIL commands of a session whose dialogue is seen",
    "store": "Calls to the throttle store that were answered in time",
}

#: What labels of a closed vocabulary have before anything has happened: a rate over a series that begins with its first
#: event is 0 for that event.
_FROM_THE_START: dict[str, dict[str, int]] = {
    "accepted": dict.fromkeys(("native", "socks5", "proxy_protocol", "redirect"), 0),
    "refused": dict.fromkeys(
        (each.code for each in every(ProxyError) if not issubclass(each, UpstreamError | ConfigError)), 0
    ),
    "failed": dict.fromkeys(map(str, Step), 0),
    "ended": dict.fromkeys(map(str, Ending), 0),
    "discarded": dict.fromkeys(map(str, Discard), 0),
    "in_clear": dict.fromkeys(("handshake", "starttls", "remembered"), 0),
}


def render(view: Overview, part: Part) -> bytes:
    """The whole exposition; `part`: what all processes know."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_View(view, part))
    return generate_latest(registry)


class _View(Collector):
    def __init__(self, view: Overview, part: Part) -> None:
        self._view = view
        self._part = part

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        view, program = self._view, self._view.program
        yield InfoMetricFamily(
            _PREFIX + "build",
            "The program",
            value={"version": program.version, "relay": program.relay, "core": program.core},
        )
        yield _gauge("uptime_seconds", "Since the start", program.uptime)
        yield _gauge(
            "config_last_reload_successful",
            "0 while an old configuration is in force because a reload was refused",
            int(program.old_configuration is None),
        )
        yield InfoMetricFamily(
            _PREFIX + "config", "The configuration in force; hash tells it from others", {"hash": program.configuration}
        )
        yield _gauge(
            "config_last_reload_success_timestamp_seconds",
            "When it was put in force, Unix time",
            datetime.fromisoformat(program.configured).timestamp() if program.configured else 0,
        )
        yield _gauge("draining", "1 while the program is stopping", int(program.draining))
        yield _trouble(view)
        yield from _counters(view)
        yield from _spans(self._part.spans)
        yield from _connections(view)
        yield from _throttling(view)
        yield from _pool(view)
        if view.store is not None:
            yield from _store(view.store)
        yield CounterMetricFamily(
            _PREFIX + "log_lines_lost", "Lines of the log that could not be written", value=self._part.lost
        )
        yield from _processes(self._part)
        if len(view.workers) > 1:
            yield from _workers(view.workers)


def _spans(spans: Mapping[str, SpanPart]) -> Iterator[Metric]:
    for name, text in _SPANS.items():
        histogram: Histogram = getattr(SPANS, name)
        span = spans.get(name) or SpanPart([0] * len(histogram.counts), 0.0)
        unit = "" if name in ("bytes", "messages") else "_seconds"
        metric = {"bytes": "session_bytes", "messages": "session_messages", "store": "store_call"}.get(name, name)
        counts = list(accumulate(span.counts))
        ends = [*map(floatToGoString, histogram.bounds), "+Inf"]
        buckets = list(zip(ends, counts, strict=True))
        yield HistogramMetricFamily(_PREFIX + metric + unit, text, buckets=buckets, sum_value=span.total)


def _trouble(view: Overview) -> Metric:
    family = GaugeMetricFamily(_PREFIX + "trouble", "1 while there is trouble of this kind", labels=["kind"])
    there = {row.kind for row in view.trouble}
    for kind in KINDS:
        family.add_metric([kind], int(kind in there))
    return family


def _counters(view: Overview) -> Iterator[Metric]:
    for name, value in view.counters.items():
        metric, label, text = _COUNTERS.get(name, (name, "name", name.replace("_", " ")))
        if isinstance(value, dict) and name in _BY_STEP:
            yield _by_step(metric, text, label, value, view)
        elif isinstance(value, dict) and label == "source":
            family = CounterMetricFamily(_PREFIX + metric, text, labels=[label, "source_name"])
            for key, count in value.items():
                family.add_metric([key, view.source_names.get(key, "")], count)
            yield family
        elif isinstance(value, dict):
            family = CounterMetricFamily(_PREFIX + metric, text, labels=[label])
            for key, count in (_FROM_THE_START.get(name, {}) | value).items():
                family.add_metric([key], count)
            yield family
        else:
            yield CounterMetricFamily(_PREFIX + metric, text, value=value)


def _by_step(metric: str, text: str, label: str, value: dict[str, int], view: Overview) -> Metric:
    """Counted under a name and, behind a blank, a step."""
    names = [label, "source_name"] if label == "source" else [label]
    family = CounterMetricFamily(_PREFIX + metric, text, labels=[*names, "step"])
    for key, count in value.items():
        name, _, step = key.rpartition(" ")
        values = [name, view.source_names.get(name, "")] if label == "source" else [name]
        family.add_metric([*values, step], count)
    return family


def _connections(view: Overview) -> Iterator[Metric]:
    connections = view.connections
    listeners = GaugeMetricFamily(
        _PREFIX + "open_connections", "Client connections, by listener", labels=["listener", "protocol"]
    )
    for row in view.listeners:
        listeners.add_metric([row.address, row.protocol], row.open_connections)
    yield listeners
    yield _gauge("max_connections", "Client connections that are accepted", connections.limit)
    yield _gauge("newcomers", "Clients that have not said yet who they are", connections.newcomers)
    yield CounterMetricFamily(
        _PREFIX + "newcomers_dropped", "Newcomers cut off because there were too many", connections.newcomers_dropped
    )
    yield _gauge("channels", "Native channels", connections.channels)
    yield _gauge("smtp_dialogues", "Clients of mode smtp", connections.dialogues)
    outgoing = GaugeMetricFamily(_PREFIX + "remote_connections", "Connections to receivers", labels=["state"])
    outgoing.add_metric(["active"], connections.active)
    outgoing.add_metric(["cached"], connections.cached)
    yield outgoing
    yield _named("instance_active", "instance", "Clients' connections, by instance", view.active_instances)
    yield _named("source_active", "source", "Clients' connections, by the address they leave from", view.active_sources)
    yield _named("source_cached", "source", "Held-open connections, by the address they leave from", view.pool.sources)


def _throttling(view: Overview) -> Iterator[Metric]:
    manager = view.manager
    yield _gauge("throttles", "Throttles with demand, places in use or debt", manager.throttles)
    yield _gauge("throttles_known", "Throttles that are remembered", manager.known)
    yield _gauge("throttles_backing_off", "Throttles that a reply has slowed down", manager.backing_off)
    yield _gauge("sessions", "Instances with a throttle session", manager.sessions)
    total = GaugeMetricFamily(_PREFIX + "backlog", "Messages that wait for a permit", labels=["queue"])
    for queue, count in (("ram", manager.ram), ("bounce", manager.bounce), ("disk", manager.disk)):
        total.add_metric([queue], count)
    yield total
    sessions = view.sessions[:MAX_NAMES]
    yield _by_instance(
        "session_backlog", "The same, by instance", sessions, lambda row: row.ram + row.bounce + row.disk
    )
    yield _by_instance("session_ping_seconds", "Last round trip", sessions, lambda row: row.ping)
    yield _by_instance("session_ping_age_seconds", "Since the last round trip", sessions, lambda row: row.ping_age)


def _pool(view: Overview) -> Iterator[Metric]:
    pool = view.pool
    yield CounterMetricFamily(_PREFIX + "pool_offered", "Connections given back to be shared", pool.offered)
    lookups = CounterMetricFamily(_PREFIX + "pool_lookups", "Look-ups; who waits makes two", labels=["result"])
    lookups.add_metric(["hit"], pool.hits)
    lookups.add_metric(["miss"], pool.misses)
    yield lookups
    if pool.reuse_ratio is not None:
        yield _gauge("pool_reuse_ratio", "Requests served from the pool, of all that were served", pool.reuse_ratio)
    yield _gauge("pool_oldest_seconds", "Age of the oldest held-open connection", pool.oldest)
    yield _gauge("pool_mean_age_seconds", "Mean age of held-open connections", pool.mean_age)
    yield _gauge("pool_longest_idle_seconds", "Longest time that one has been idle", pool.longest_idle)


def _store(store: StoreRow) -> Iterator[Metric]:
    yield InfoMetricFamily(
        _PREFIX + "store",
        "The throttle store that several proxies share, as it says itself",
        {"engine": store.engine, "version": store.version, "form": store.form},
    )
    yield _gauge(
        "store_up", "0 while it does not answer and each limit goes on with a share", int(store.state == "connected")
    )
    yield _gauge("store_members", "throttle_store_members", store.members)
    yield _gauge("store_members_seen", "Proxies that the store hears of; 0: not known", store.seen)
    yield _gauge("store_throttles", "Throttles that it holds for this proxy", store.throttles)
    yield CounterMetricFamily(_PREFIX + "store_calls", "Calls to it", value=store.calls)
    failed = CounterMetricFamily(
        _PREFIX + "store_calls_failed", "Calls that gave nothing, by reason", labels=["reason"]
    )
    for reason, count in (("lost", store.lost), ("refused", store.refused), ("clock", store.discarded)):
        failed.add_metric([reason], count)
    yield failed
    yield CounterMetricFamily(_PREFIX + "store_slots", "Slots that it granted", value=store.slots)
    yield CounterMetricFamily(
        _PREFIX + "store_epochs", "Times that its memory was another one, and each limit began anew", value=store.epochs
    )
    yield CounterMetricFamily(_PREFIX + "store_degraded", "Times that it was lost", value=store.degraded)


def _processes(part: Part) -> Iterator[Metric]:
    """All together, under the names that every Prometheus client has for its process."""

    def total(figure: Callable[[ProcessPart], float]) -> float:
        return sum(map(figure, part.processes))

    virtual, resident = total(lambda each: each.virtual), total(lambda each: each.resident)
    yield GaugeMetricFamily("process_virtual_memory_bytes", "Virtual memory size in bytes.", value=virtual)
    yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory size in bytes.", value=resident)
    started = min((each.started for each in part.processes), default=0.0)
    text = "Start time of the process since unix epoch in seconds."
    yield GaugeMetricFamily("process_start_time_seconds", text, value=started)
    yield CounterMetricFamily("process_cpu_seconds", "Total user and system CPU time spent in seconds.", value=part.cpu)
    most, used = total(lambda each: each.most_descriptors), total(lambda each: each.descriptors)
    yield GaugeMetricFamily("process_max_fds", "Maximum number of open file descriptors.", value=most)
    yield GaugeMetricFamily("process_open_fds", "Number of open file descriptors.", value=used)


def _workers(rows: list[WorkerRow]) -> Iterator[Metric]:
    """Each by itself."""
    up = {row.number: int(bool(row.pid) and row.silent < SILENT) for row in rows}
    family = GaugeMetricFamily(
        _PREFIX + "worker_up", "0 while a process is dead or does not answer", labels=["worker", "role"]
    )
    for row in rows:
        family.add_metric([str(row.number), row.role], up[row.number])
    yield family
    for name, text, figure in _OF_A_WORKER:
        kind = CounterMetricFamily if name in ("cpu_seconds", "restarts") else GaugeMetricFamily
        each = kind(f"{_PREFIX}worker_{name}", text, labels=["worker"])
        for row in rows:
            each.add_metric([str(row.number)], figure(row))
        yield each


#: Metric, help, figure. The master is number 0.
_OF_A_WORKER: tuple[tuple[str, str, Callable[[WorkerRow], float]], ...] = (
    ("open_connections", "Client connections, by process", lambda row: row.open_connections),
    ("cpu_seconds", "CPU time of the processes that have this number now", lambda row: row.cpu),
    ("resident_memory_bytes", "Resident memory", lambda row: row.memory),
    ("open_fds", "Open descriptors", lambda row: row.descriptors),
    ("max_fds", "Descriptors that a process may have", lambda row: row.most_descriptors),
    ("restarts", "Processes of this number that have died", lambda row: row.restarts),
)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(_PREFIX + name, text, value=value)


def _named(name: str, label: str, text: str, counts: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, text, labels=[label])
    for key, count in counts.items():
        family.add_metric([key], count)
    return family


def _by_instance(name: str, text: str, rows: list[SessionRow], figure: Callable[[SessionRow], float]) -> Metric:
    family = GaugeMetricFamily(_PREFIX + name, text, labels=["instance"])
    for row in rows:
        family.add_metric([row.name], figure(row))
    return family
