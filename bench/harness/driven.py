"""Workloads that the C generator does not speak: they are driven from Python, and only the proxy's CPU is counted.

A driver gets the bench and a running candidate and returns a sample with the generator's keys. What the driver itself
costs therefore does not enter the figures, except where it could not load the candidate fully: rates are lower bounds.
"""

from __future__ import annotations

import csv
import io
import subprocess
from functools import partial
from typing import Any

from harness import native_driver, permit_driver, smtp_driver
from harness.candidates import SECRET
from harness.machine import pinned
from harness.measure import Bench, Running
from harness.usage import process_cpu

_PERMITS = 400_000
_PERMITS_QUICK = 100_000


def driven_sessions(bench: Bench, running: Running) -> dict[str, Any]:
    """One message of 20 KB each, over whatever the candidate's own door is."""
    assert running.pid is not None
    candidate = running.candidate
    if candidate.variant in ("fresh", "warm"):
        return native_driver.channels(bench, running)
    if candidate.name == "haproxy-tls":
        context = smtp_driver.unverified_tls()
        dial = partial(smtp_driver.dial_proxy_tls, candidate.door_port("tls"), context)
    else:
        dial = partial(smtp_driver.dial_socks5, candidate.door_port("socks"))
    return smtp_driver.drive_sessions(running.pid, bench.quick, dial)


def permits(bench: Bench, running: Running, depth: int) -> dict[str, Any]:
    """Permits asked for by 50 clients, `depth` in flight each."""
    driver = {"redis": _redis_increments, "greenarrow": _native_permits}.get(running.candidate.name)
    return driver(bench, running, depth) if driver else {"failed": "no driver for it"}


def _native_permits(bench: Bench, running: Running, depth: int) -> dict[str, Any]:
    """Sessions over plain TCP, as redis has it; each asks for its next permits when it has the last ones."""
    assert running.pid is not None
    address = "127.0.0.1", running.candidate.door_port("native")
    names = [f"permits-{number}" for number in range(50)]
    with permit_driver.Fleet(address, SECRET, names) as fleet:
        before = process_cpu(running.pid)
        granted, seconds, times = permit_driver.closed_loop(fleet, 1.5 if bench.quick else 4.0, depth)
        spent = process_cpu(running.pid) - before
        all_of_them = sum(member.granted for member in fleet.members)
    times.sort()
    return {
        "units": granted,
        "unit": "permit",
        "errors": 0,
        "units_per_second": granted / seconds,
        "cpu_us_per_unit": spent * 1e6 / all_of_them,
        "permit_p50_us": times[len(times) // 2] * 1e6,
        "permit_p99_us": times[len(times) * 99 // 100] * 1e6,
    }


def _redis_increments(bench: Bench, running: Running, depth: int) -> dict[str, Any]:
    """One INCR stands for one permit: the least that a limiter on redis can do."""
    assert running.pid is not None
    count = _PERMITS_QUICK if bench.quick else _PERMITS
    port = str(running.candidate.door_port("redis"))
    command = ["redis-benchmark", "-p", port, "-t", "incr", "-c", "50", "-n", str(count), "-P", str(depth), "--csv"]
    before = process_cpu(running.pid)
    done = subprocess.run(pinned(bench.cores.load, command), capture_output=True, text=True, check=False)
    spent = process_cpu(running.pid) - before
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    if not rows:
        return {"failed": done.stderr.strip() or "redis-benchmark said nothing"}
    return {
        "units": count,
        "unit": "permit",
        "errors": 0,
        "units_per_second": float(rows[0]["rps"]),
        "cpu_us_per_unit": spent * 1e6 / count,
        "permit_p50_us": float(rows[0]["p50_latency_ms"]) * 1000,
        "permit_p99_us": float(rows[0]["p99_latency_ms"]) * 1000,
    }
