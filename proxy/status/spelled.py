"""How a figure is spelled, on the page and in the terminal alike: rows in, words out.

What a figure is called in a table's head, and where it stands, is the table's own matter.
"""

from __future__ import annotations

from collections.abc import Iterable

from proxy.stats import duration, whole_seconds
from proxy.status.colleagues import LEAVING
from proxy.status.rows import (
    BackoffRow,
    BlockRow,
    InstanceRow,
    LeasedRow,
    PeerRow,
    Queues,
    Rate,
    SourceRow,
    StoreRow,
    ThrottleRow,
    TroubleRow,
    WorkerRow,
)
from proxy.status.workers import SILENT


def limits_text(limits: Iterable[Rate], places: int | None) -> str:
    """`1000/hr, 20 connections`."""
    said = [str(rate) for rate in limits] + ([_connections(places)] if places is not None else [])
    return ", ".join(said) or "unlimited"


def _connections(count: int) -> str:
    return f"{count} connection" + "s" * (count != 1)


def places_text(used: int, places: int | None) -> str:
    """`3 of 20`."""
    return str(used) if places is None else f"{used} of {places}"


def percent(share: float | None) -> str:
    """A share of 1 in percent; None: nothing."""
    return "" if share is None else f"{share:.0%}"


def next_slot(row: ThrottleRow) -> str:
    """When the next message may go; nothing without a rate."""
    if row.next_slot is None:
        return ""
    return "now" if row.next_slot <= 0 else duration(row.next_slot)


def store_engine(row: StoreRow) -> str:
    """`valkey 8.1.8 at 10.0.0.1:6379, by sentinel`."""
    form = "" if row.form == "single" else f", by {row.form}" if row.form == "sentinel" else f", a {row.form}"
    return f"{row.engine} {row.version} at {row.master}{form}" if row.engine else "not known yet"


def store_state(row: StoreRow) -> str:
    """`connected for 1h5m19s`, `DEGRADED for 12s: connection refused`."""
    if row.state == "connected":
        return f"connected for {whole_seconds(row.since)}"
    return f"DEGRADED for {whole_seconds(row.since)}" + (f": {row.why}" if row.why else "")


def store_members(row: StoreRow) -> str:
    """`2 of 3 proxies`."""
    return f"{row.seen or '?'} of {row.members} proxies"


def store_calls(row: StoreRow) -> str:
    """`19.8 a second, 12034 in all, 2 lost, 1 refused; half take 0.213ms, 99 % at most 1.102ms`."""
    said = [] if row.calls_a_second is None else [f"{row.calls_a_second:.1f} a second"]
    said += [f"{row.calls} in all"]
    said += [f"{count} {what}" for what, count in (("lost", row.lost), ("refused", row.refused)) if count]
    said += [f"{row.discarded} with a clock that cannot be trusted"] * (row.discarded > 0)
    text = ", ".join(said)
    if row.p50 is not None and row.p99 is not None:
        text += f"; half take {duration(row.p50)}, 99 % at most {duration(row.p99)}"
    return text


def leased_share(row: LeasedRow) -> str:
    """What holds while the store does not answer: `500/hr, 10 connections`."""
    said = ["nothing" if not rate.amount else str(rate) for rate in row.share]
    said += [_connections(row.share_places)] if row.share_places is not None else []
    return ", ".join(said) or "unlimited"


def between(row: ThrottleRow | BackoffRow | LeasedRow) -> str:
    """What a throttle counts by itself: a source, `to` a receiver, or all together."""
    source = called(row.source, row.source_name) if isinstance(row, ThrottleRow | LeasedRow) else row.source
    return " ".join(filter(None, (source, f"to {row.receiver}" if row.receiver else ""))) or "all"


def called(address: str, name: str) -> str:
    """A source address with its name, if it has one."""
    return f"{address} ({name})" if name else address


def throttle_state(row: ThrottleRow) -> str:
    """What is unusual about a throttle."""
    if row.shadow:
        refused = f", {row.would_refuse} refused" if row.would_refuse else ""
        backoff = f", {row.state} {whole_seconds(row.backoff)}" if row.backoff else ""
        return f"shadow: would have waited {row.would_wait} times{refused}{backoff}"
    warm_up = [f"warm-up day {row.warmup_day} of {row.warmup_days}"] * (row.warmup_day > 0)
    state = [f"{row.state} {whole_seconds(row.backoff)}" if row.backoff else row.state] * bool(row.state)
    return ", ".join(state + warm_up)


def backoff_state(row: BackoffRow) -> str:
    """`25 % of each limit for 59m50s`"""
    return "its limits come back" if row.state == "rising" else f"{row.to} for {whole_seconds(row.seconds)}"


def block_limits(row: BlockRow) -> str:
    """`2000/hr, 20 connections, 5/s new connections, 5 days of warm-up`."""
    said = [str(rate) for rate in row.limits] + ([_connections(row.places)] if row.places is not None else [])
    said += [f"{rate} new connections" for rate in row.connection_limits]
    said += [f"{row.warmup_days} days of warm-up"] * (row.warmup_days > 0)
    said += [f"{row.backoff_rules} back-off rule" + "s" * (row.backoff_rules > 1)] * (row.backoff_rules > 0)
    return (", ".join(said) or "no limit") + " (shadow mode)" * row.shadow


def holds_for(row: BlockRow) -> str:
    """`to yahoo.com from 192.0.2.0/24, vmta1 asked for by box7, counted per source`."""
    lists = (("to", row.receivers), ("from", row.sources), ("asked for by", row.instances))
    said = [f"{word} {', '.join(names)}" for word, names in lists if names]
    together = row.per == ["nothing"]
    return f"{' '.join(said) or 'all'}, counted {'all together' if together else 'per ' + ' and '.join(row.per)}"


def means(row: BlockRow) -> str:
    """The addresses; `and 12 more`; nothing where there are no names."""
    if not row.named:
        return ""
    more = [f"and {row.addresses_left_out} more"] * (row.addresses_left_out > 0)
    return " ".join([", ".join(row.addresses), *more]) or "no address"


def block_doubt(row: BlockRow) -> str:
    """What is not known of its names."""
    more = [f"and {row.failures_left_out} more"] * (row.failures_left_out > 0)
    return "; ".join([*row.failures, *more, *[f"{row.asking} without an answer yet"] * (row.asking > 0)])


def trouble_text(row: TroubleRow) -> str:
    """One line: what, how often lately, since when."""
    more = [f"{row.recent} in the last 5 minutes"] * (row.recent > 0)
    more += [f"for {whole_seconds(row.since)}"] if row.since is not None else []
    return row.text + (f" ({', '.join(more)})" if more else "")


def held_by(row: ThrottleRow) -> str:
    """What those who wait under a throttle wait for; nothing: nobody waits."""
    if row.state in ("paused", "backoff"):
        return "pause" if row.state == "paused" else "back-off"
    if row.waiting and row.places is not None and row.used >= row.places:
        return "places"
    if row.demand + row.waiting and row.next_slot:
        return "rate"
    return "other limits" if row.demand + row.waiting else ""


def ago(seconds: float | None) -> str:
    """`5m3s`; None: nothing."""
    return "" if seconds is None else whole_seconds(seconds)


def failures_text(row: PeerRow) -> str:
    """`connect 3, greeting 12`."""
    return ", ".join(f"{step} {count}" for step, count in sorted(row.failed.items()))


def worker_state(row: WorkerRow) -> str:
    """`serves`, `leaving`, `SILENT for 12s`, `DEAD for 3s: killed by signal 9`."""
    if not row.pid:
        return f"DEAD for {whole_seconds(row.died_ago or 0.0)}" + f": {row.died}" * bool(row.died)
    if row.silent >= SILENT:
        return f"SILENT for {whole_seconds(row.silent)}"
    return "leaving" if row.role == LEAVING else "serves"


def worker_death(row: WorkerRow) -> str:
    """The last one of this number: `5m3s ago: killed by signal 9`; none: nothing."""
    return "" if row.died_ago is None else f"{whole_seconds(row.died_ago)} ago" + f": {row.died}" * bool(row.died)


def mebibytes(count: int) -> str:
    """`45 MiB`."""
    return f"{count / (1 << 20):.0f} MiB"


def presence(row: SourceRow) -> str:
    """Whether a source address is on this machine."""
    if row.present:
        return "here"
    return "NOT HERE" if row.absent is None else f"GONE {whole_seconds(row.absent)}"


def instance_state(row: InstanceRow) -> str:
    """What is unusual about an instance under a throttle."""
    if row.paused:
        return "paused"
    return "gone" if row.mode and not row.connected else ""


def queues_text(row: Queues) -> str:
    """`in out buf`, as in the log."""
    return f"{row.entering} {row.leaving} {row.parked}"
