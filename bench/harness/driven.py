"""Workloads that the C generator does not speak: they are driven from Python, and only the proxy's CPU is counted.

A driver gets the bench and a running candidate and returns a sample with the generator's keys. What the driver itself
costs therefore does not enter the figures, except where it could not load the candidate fully: rates are lower bounds.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
from functools import partial
from typing import Any

from harness import authenticated, mta, native_driver, smtp_driver
from harness.builds import GENERATOR
from harness.candidates import SECRET, project_python
from harness.machine import BENCH, ROOT, pinned
from harness.measure import Bench, Running
from harness.usage import process_cpu

_CLIENTS = 50
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
    driver = _redis_increments if running.candidate.name == "redis" else _native_permits
    return driver(bench, running, depth)


def _native_permits(bench: Bench, running: Running, depth: int) -> dict[str, Any]:
    """Sessions over plain TCP, as redis has it; each asks for its next permits when it has the last ones."""
    seconds = 1.5 if bench.quick else 3.0
    command = [str(GENERATOR), "permits", "--core", str(bench.cores.load), "--watch", str(running.pid)]
    command += ["--messages", str(depth), "--seconds", str(seconds)]
    address = "127.0.0.1", running.candidate.door_port("native")
    with authenticated.sessions(address, SECRET, _CLIENTS) as sessions:
        fds, incarnations = zip(*sessions, strict=True)
        command += ["--fds", ",".join(map(str, fds)), "--incarnations", ",".join(map(str, incarnations))]
        return bench.run_generator(command, running, fds)


def handshake_of(bench: Bench, running: Running, sample: dict[str, Any]) -> dict[str, Any]:
    """With a real MTA's handshake in place of the generator's, where that is what the row stands for."""
    if running.candidate.name != "starttls-exim":
        return sample
    own = mta.own_tls(bench.tls_sink())
    cost = sample["cpu_us_per_unit"] + own
    return sample | {"own_tls_us_per_unit": own, "with_own_tls_us_per_unit": cost}


def core(bench: Bench, running: Running) -> dict[str, Any]:
    """A permit without any network, in a process of its own."""
    program = [project_python(), str(BENCH / "throttle_core.py"), "--permit"]
    environ = os.environ | dict(running.candidate.environ)
    done = subprocess.run(
        pinned(bench.cores.proxy, program), capture_output=True, text=True, env=environ, cwd=ROOT, check=False
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it said nothing"}
    return {"unit": "permit", "errors": 0, **json.loads(done.stdout)}


def _redis_increments(bench: Bench, running: Running, depth: int) -> dict[str, Any]:
    """One INCR stands for one permit: the least that a limiter on redis can do."""
    assert running.pid is not None
    count = _PERMITS_QUICK if bench.quick else _PERMITS
    port = str(running.candidate.door_port("redis"))
    command = [
        "redis-benchmark",
        "-p",
        port,
        "-t",
        "incr",
        "-c",
        str(_CLIENTS),
        "-n",
        str(count),
        "-P",
        str(depth),
        "--csv",
    ]
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
