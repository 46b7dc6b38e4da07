"""The goals that the project has set itself, as ratios to peers measured in the same round."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """`ours` ÷ `against` of a workload's figure; at most `limit`, or at least when `at_least` is set.

    `limit` is for the pure Python relay, whose row is `python`, `stretch` for the compiled one, whose row is `ours`.
    """

    title: str
    workload: str
    key: str
    against: str
    limit: float | None
    stretch: float | None = None
    ours: str = "greenarrow"
    at_least: bool = False
    python: str = "greenarrow-python"


_CPU = "cpu_us_per_unit"

TARGETS = (
    Target("CPU a session, 1 message", "sess1", _CPU, "haproxy", 1.20, 0.90),
    Target("CPU a session, 1 message", "sess1", _CPU, "tokio", 1.20, 0.95),
    Target(
        "the same with a log line each",
        "sess1+log",
        _CPU,
        "haproxy-tcplog",
        1.25,
        0.95,
        "greenarrow-log",
        python="greenarrow-python-log",
    ),
    Target("CPU a session, 5 messages", "sess5", _CPU, "haproxy", 1.05, 0.80),
    Target("CPU a session, 5 messages", "sess5", _CPU, "tokio", 1.10, 0.90),
    Target("CPU a round trip", "pp100", _CPU, "haproxy", 1.15, 0.95),
    Target("CPU a round trip", "pp100", _CPU, "tokio", 1.25, 1.00),
    Target("CPU a MB, to the MX", "bulk", _CPU, "haproxy", 0.35, 0.30),
    Target("CPU a MB, to the MX", "bulk", _CPU, "haproxy-splice", 0.65, 0.55),
    Target("CPU a MB, to the MX", "bulk", _CPU, "tokio", 0.27, 0.22),
    Target("CPU a MB, from the MX", "bulkdn", _CPU, "haproxy", 0.35, 0.30),
    Target("CPU a MB, from the MX", "bulkdn", _CPU, "haproxy-splice", 0.65, 0.55),
    Target("CPU a MB, from the MX", "bulkdn", _CPU, "tokio", 0.27, 0.22),
    Target("memory of an idle relay (9,000)", "idle9k", "kb_per_connection", "haproxy", 0.65, 0.35),
    Target("memory of an idle relay (9,000)", "idle9k", "kb_per_connection", "tokio", 0.15, 0.08),
    Target("p50 at 300 sessions/s", "rate", "session_p50_us", "haproxy", 1.05, 1.00),
    Target("p99 at 300 sessions/s", "rate", "session_p99_us", "haproxy", 1.05, 1.00),
    Target("p99, 4,000 active, closed loop", "pp4k", "round_trip_p99_us", "haproxy", 1.00, 0.95),
    Target("p99, 4,000 active, on a timetable", "active4k", "round_trip_p99_us", "haproxy", 1.00, 0.95),
    Target("CPU a session, 100 KB message", "msg100k", _CPU, "haproxy", 1.05, 0.85),
    Target("SOCKS5, password and BIND", "socks", _CPU, "dante", 0.55, 0.45),
    Target("SOCKS5, password and BIND", "socks", _CPU, "tokio", 1.30, 1.05),
    Target("sessions/s", "sess1", "units_per_second", "direct", 0.65, 0.80, at_least=True),
    Target("CPU a session", "sess1", _CPU, "classic", 0.48, 0.40),
    Target("mode smtp, own connection", "smtp1", _CPU, "greenarrow", 1.40, None, "smtp-own", python=""),
    Target("mode smtp, shared connection", "smtp1", _CPU, "haproxy", 0.60, None, "smtp-shared", python=""),
    Target("session on a warm native channel", "native", _CPU, "native-socks", 0.60, None, "native-warm", python=""),
)
