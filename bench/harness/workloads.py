"""What is measured: a table of workloads. How is in `measure`; who is in `candidates`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from harness import driven, native_driver, tail
from harness.candidates import CANDIDATES, TLS_SINK
from harness.workload import Metric, Workload

CPU_SESSION = Metric("cpu_us_per_unit", "CPU µs a session", 1, 1)
CPU_SET_UP = Metric("cpu_us_per_unit", "CPU µs to set one up", 1, 1)
CPU_ROUND_TRIP = Metric("cpu_us_per_unit", "CPU µs a round trip", 1, 2)
CPU_MB = Metric("cpu_us_per_unit", "CPU µs a MB", 1, 1)
MACHINE = Metric("machine_us_per_unit", "whole machine, CPU µs", 1, 1)
SESSIONS = Metric("units_per_second", "sessions/s", 1, 0, True)
ROUND_TRIPS = Metric("units_per_second", "round trips/s", 1, 0, True)
MB_SECOND = Metric("units_per_second", "MB/s", 1, 0, True)
SESSION_P50 = Metric("session_p50_us", "p50 ms", 0.001, 2)
SESSION_P99 = Metric("session_p99_us", "p99 ms", 0.001, 2)
SESSION_MAX = Metric("session_max_us", "longest ms", 0.001, 2)
TRIP_P50 = Metric("round_trip_p50_us", "p50 µs", 1, 0)
TRIP_P99 = Metric("round_trip_p99_us", "p99 µs", 1, 0)
CPU_DELIVERY = Metric("with_own_tls_us_per_unit", "CPU µs a session, the MTA's handshake in it", 1, 1)
OWN_TLS = Metric("own_tls_us_per_unit", "of it the MTA's handshake", 1, 1)
CPU_PERMIT = Metric("cpu_us_per_unit", "CPU µs a permit", 1, 2)
PERMITS = Metric("units_per_second", "permits/s", 1, 0, True)
PERMIT_P50 = Metric("permit_p50_us", "p50 µs", 1, 0)
PERMIT_P99 = Metric("permit_p99_us", "p99 µs", 1, 0)
MEMORY = Metric("kb_per_connection", "KB a relay", 1, 2)
KERNEL_MEMORY = Metric("slab_kb_per_connection", "kernel KB, all sockets", 1, 1)
KEPT_MEMORY = Metric("kb_per_kept", "KB a kept connection", 1, 2)
KEPT = Metric("kept", "kept")
MX_CONNECTS = Metric("mx_connections_per_unit", "connects at the MX a session", 1, 3)
IDLE_CPU = Metric("idle_cpu_percent", "CPU % while idle", 1, 2)

MAIN = 5
"""Rounds of the workloads that the goals are about."""

LOOPS = ("greenarrow", "greenarrow-python", "haproxy", "haproxy-splice", "tokio")
MODES = ("greenarrow", "smtp-own", "smtp-shared", "haproxy")
SMALL = ("greenarrow", "greenarrow-python", "haproxy", "tokio", "direct")


#: What mode smtp changes at the MX is shown beside what it costs.
_DIALOGUE = (CPU_SESSION, MX_CONNECTS, SESSIONS, SESSION_P50, SESSION_P99, MACHINE)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _sessions(name: str, title: str, shape: str, seconds: float = 2, **more: Any) -> Workload:
    metrics = (CPU_SESSION, SESSIONS, SESSION_P50, SESSION_P99, MACHINE)
    return Workload(
        name,
        title,
        "load",
        _words(f"{shape} --seconds {seconds}"),
        _words(f"{shape} --seconds 1.5"),
        more.pop("metrics", metrics),
        **more,
    )


def _round_trips(name: str, title: str, shape: str, **more: Any) -> Workload:
    metrics = more.pop("metrics", (CPU_ROUND_TRIP, ROUND_TRIPS, TRIP_P50, TRIP_P99, MACHINE))
    return Workload(
        name, title, "pingpong", _words(f"{shape} --seconds 2"), _words(f"{shape} --seconds 1.5"), metrics, **more
    )


def _bulk(name: str, title: str, shape: str) -> Workload:
    return Workload(
        name,
        title,
        "bulk",
        _words(f"{shape} --megabytes 2000"),
        _words(f"{shape} --megabytes 1500"),
        (CPU_MB, MB_SECOND, MACHINE),
        LOOPS,
        rounds=MAIN,
    )


def _idle(name: str, count: int, candidates: tuple[str, ...]) -> Workload:
    shape = _words(f"--connections {count} --seconds 2")
    metrics = (MEMORY, CPU_SET_UP, IDLE_CPU, KERNEL_MEMORY)
    return Workload(
        name,
        f"{count:,} idle relays",
        "idle",
        shape,
        shape,
        metrics,
        candidates,
        fresh=True,
        rounds=MAIN if count > 5000 else 1,  # the goal is about the larger number
    )


def _growth(count: int) -> Workload:
    title = f"sess1 beside {count:,} idle relays"
    return _sessions(
        f"grow{count}",
        title,
        "--connections 100",
        candidates=("greenarrow", "greenarrow-python", "haproxy"),
        idle_relays=count,
        rounds=2,
    )


def _driven(
    name: str, title: str, candidates: tuple[str, ...], measure: Callable[..., dict[str, Any]], rounds: int = 3
) -> Workload:
    """Driven from Python; the first candidate is the one that the others are compared with."""
    metrics = (CPU_SESSION, SESSIONS, SESSION_P50, SESSION_P99)
    return Workload(name, title, "", (), (), metrics, candidates, candidates[0], measure=measure, rounds=rounds)


def _permits(depth: int, title: str) -> Workload:
    return Workload(
        f"permits{depth}",
        title,
        "",
        (),
        (),
        (CPU_PERMIT, PERMITS, PERMIT_P50, PERMIT_P99),
        ("greenarrow", "greenarrow-python", "redis"),
        "redis",
        measure=partial(driven.permits, depth=depth),
        rounds=MAIN,
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        _sessions("sess1", "100 sessions at a time, 1 message of 20 KB each", "--connections 100", rounds=MAIN),
        _sessions(
            "sess1+log",
            "sess1 with one log line a connection",
            "--connections 100",
            candidates=("greenarrow-log", "greenarrow-python-log", "haproxy-tcplog"),
            baseline="haproxy-tcplog",
            rounds=MAIN,
        ),
        _sessions(
            "sess5",
            "1,000 sessions at a time, 5 messages of 20 KB each",
            "--connections 1000 --messages 5",
            3,
            candidates=SMALL,
            rounds=MAIN,
        ),
        _sessions(
            "smtp1",
            "mode smtp beside mode tcp and HAProxy: 20 sessions at a time, 1 message of 20 KB each",
            "--connections 20 --warm-up 400",
            metrics=_DIALOGUE,
            candidates=(*MODES, "greenarrow-python", "smtp-own-python", "smtp-shared-python"),
            rounds=MAIN,
        ),
        _sessions(
            "smtp5",
            "the same, 5 messages each",
            "--connections 20 --warm-up 400 --messages 5",
            metrics=_DIALOGUE,
            candidates=MODES,
            rounds=3,
        ),
        _sessions(
            "smtptls",
            "an MX with STARTTLS: 20 sessions at a time, 1 message of 20 KB each",
            "--connections 20 --warm-up 400",
            candidates=(
                *("smtp-shared", "smtp-shared-python", "smtp-own"),
                *("starttls-tcp", "starttls-haproxy", "starttls-exim"),
            ),
            baseline="starttls-haproxy",
            sink=TLS_SINK,
            after=driven.handshake_of,
            metrics=(CPU_DELIVERY, OWN_TLS, CPU_SESSION, MX_CONNECTS, SESSIONS, SESSION_P50, SESSION_P99),
            rounds=MAIN,
        ),
        _sessions(
            "channel",
            "20 sessions at a time through the authenticated doors, 1 message of 20 KB each",
            "--connections 20",
            candidates=(
                *("channel-socks", "channel-warm", "channel-mail"),
                *("channel-socks-python", "channel-warm-python", "channel-mail-python"),
            ),
            baseline="channel-socks",
            rounds=MAIN,
        ),
        _sessions(
            "msg100k",
            "100 sessions at a time, 1 message of 100 KB each",
            "--connections 100 --bytes 102400",
            candidates=SMALL,
            rounds=MAIN,
        ),
        _sessions(
            "rate",
            "300 sessions/s on a timetable",
            "--connections 1000 --rate 300",
            5,
            metrics=(SESSION_P50, SESSION_P99, CPU_SESSION),
            candidates=("greenarrow", "greenarrow-python", "haproxy", "tokio"),
            rounds=3,
        ),
        _sessions(
            "socks",
            "sess1 over SOCKS5 (ours: with password and BIND; the others: with neither)",
            "--connections 100",
            candidates=("greenarrow", "greenarrow-python", "dante", "tokio", "classic"),
            baseline="dante",
            door="socks",
            rounds=MAIN,
        ),
        _round_trips("pp1", "question and answer on one connection", "--connections 1", candidates=SMALL, rounds=2),
        _round_trips(
            "pp100", "question and answer on 100 connections", "--connections 100", candidates=SMALL, rounds=MAIN
        ),
        _round_trips(
            "pp4k",
            "question and answer on 4,000 connections, as fast as they go",
            "--connections 4000",
            metrics=(TRIP_P99, TRIP_P50, CPU_ROUND_TRIP, ROUND_TRIPS),
            candidates=("greenarrow", "greenarrow-python", "haproxy", "tokio"),
        ),
        _round_trips(
            "active4k",
            "4,000 connections, 8,000 questions/s in all, on a timetable",
            "--connections 4000 --rate 8000",
            metrics=(TRIP_P99, TRIP_P50, CPU_ROUND_TRIP),
            candidates=("greenarrow", "greenarrow-python", "haproxy", "tokio"),
            rounds=3,
        ),
        _bulk("bulk", "4 connections, client to MX", "--connections 4"),
        _bulk("bulkdn", "4 connections, MX to client", "--connections 4 --download"),
        _idle(
            "idle2k",
            2000,
            ("greenarrow", "greenarrow-python", "haproxy", "nginx", "tokio", "dante", "classic", "direct"),
        ),
        _idle("idle9k", 9000, ("greenarrow", "greenarrow-python", "haproxy", "tokio", "direct")),
        Workload(
            "kept2k",
            "2,000 connections that are kept without a client (mode smtp)",
            "idle",
            _words("--connections 2000 --seconds 1 --release"),
            _words("--connections 2000 --seconds 1 --release"),
            (KEPT_MEMORY, KEPT),
            ("kept", "kept-python"),
            "kept",
            fresh=True,
            rounds=2,
        ),
        _growth(100),
        _growth(1000),
        _growth(9000),
        _sessions(
            "growthrottles",
            "sess1 beside a session with so many throttles",
            "--connections 100",
            candidates=("throttles-0", "throttles-1k", "throttles-100k"),
            baseline="throttles-0",
            beside=native_driver.throttles,
            rounds=2,
        ),
        _driven(
            "growcached",
            "a message on a shared connection, beside so many kept ones that nobody wants",
            ("cached-0", "cached-1k"),
            native_driver.sharing_beside_kept,
        ),
        _driven(
            "native",
            "1 message of 20 KB each, driven from Python",
            ("native-socks", "native-fresh", "native-warm", "native-tls-fresh", "native-tls-warm", "haproxy-tls"),
            driven.driven_sessions,
            3,
        ),
        _driven(
            "reuse",
            "a message of 20 KB each on a warm channel; the proxy does EHLO and STARTTLS",
            ("mx-fresh", "mx-kept", "mx-tls-fresh", "mx-tls-kept"),
            native_driver.sharing,
        ),
        _sessions(
            "tail",
            "300 sessions/s on a timetable while something disturbs",
            "--connections 1000 --rate 300",
            3,
            rounds=2,
            metrics=(SESSION_P99, SESSION_P50, SESSION_MAX, CPU_SESSION),
            candidates=tuple(name for name in CANDIDATES if name.startswith("tail-")),
            baseline="tail-quiet",
            beside=tail.disturbed,
        ),
        _permits(1, "permits one by one, 50 clients"),
        _permits(16, "permits, 50 clients, 16 in flight each"),
        Workload(
            "core",
            "a permit in the throttle core: 5 sessions, 3,500/s, no network",
            "",
            (),
            (),
            (CPU_PERMIT, PERMITS),
            ("core", "core-python"),
            "core",
            measure=driven.core,
            rounds=MAIN,
        ),
    )
}

QUICK = ("sess1", "sess1+log", "socks", "pp100", "bulk", "idle2k", "channel", "smtp1", "smtptls", "permits1", "core")
QUICK_CANDIDATES = (
    *("greenarrow", "greenarrow-python", "greenarrow-log", "haproxy", "haproxy-tcplog", "tokio", "dante"),
    *("channel-socks", "channel-warm", "smtp-own", "smtp-shared", "starttls-haproxy", "redis", "core"),
)
