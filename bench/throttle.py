#!/usr/bin/env python3
"""The throttle manager of the real program against its goals: `python bench/throttle.py [--docs] [--quick]`.

Real sessions over loopback, in clear and in TLS; the proxy has one core, the sessions and redis-benchmark the other.
Prints the table of goals with what was measured; `--docs` puts it into docs/throttling.md. The core alone is measured
by `throttle_core.py`, and what needs a network with delays by tests/unit/throttling/test_world.py.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness import machine
from harness.goals import Row, jain, percentile, report
from harness.permit_driver import Fleet, Member, closed_loop
from harness.report import put_into
from harness.usage import process_cpu

sys.path.insert(0, str(machine.ROOT))

import psutil

from tests.program import SECRET, Proxy

DOCUMENT = machine.ROOT / "docs" / "throttling.md"
BEGIN, END = "<!-- bench: begin, written by bench/throttle.py -->", "<!-- bench: end -->"
MANY = 100_000
CORES = machine.Cores()  # before this process is bound to one of them


@contextmanager
def running(tls: bool = False) -> Iterator[Proxy]:
    with Proxy(f"listen_tls {'yes' if tls else 'no'}\nsource_ip 127.0.0.0/8\n") as proxy:
        os.sched_setaffinity(proxy.pid, {CORES.proxy})
        yield proxy


def saturated(proxy: Proxy, sessions: int, rate: int, seconds: float, tls: bool = False) -> list[Row]:
    """All ask for more than there is, on one throttle: cost, wire, utilisation, fairness."""
    with Fleet(proxy.native, SECRET, [f"full-{number}" for number in range(sessions)], tls) as fleet:
        each_second: dict[int, Counter[str]] = {}
        for member in fleet.members:
            fleet.register(member, [(0, f"shared-{rate}", rate, 1)])
        for member in fleet.members:
            member.demand(2**31)
        fleet.run(1.0)
        begin = time.perf_counter()

        def count(member: Member, n: int, offset_us: int) -> None:
            second = int(time.perf_counter() + offset_us / 1e6 - begin)
            each_second.setdefault(second, Counter())[member.name] += n

        for member in fleet.members:
            member.on_grant = count
        cpu = process_cpu(proxy.pid)
        before = [sum(getattr(m, name) for m in fleet.members) for name in ("granted", "frames_in", "bytes_in")]
        fleet.run(seconds)
        spent, cpu = time.perf_counter() - begin, process_cpu(proxy.pid) - cpu
        after = [sum(getattr(m, name) for m in fleet.members) for name in ("granted", "frames_in", "bytes_in")]
    permits, frames, size = (now - then for now, then in zip(after, before, strict=True))
    whole = [list(counts.values()) for second, counts in each_second.items() if 0 < second < int(spent) - 1]
    fairness = min((jain(values + [0] * (sessions - len(values))) for values in whole), default=0.0)
    cost, use = cpu * 1e6 / permits, permits / (rate * spent)
    kind = f"{sessions} sessions{' in TLS' if tls else ''}, {rate:,}/s"
    rows = [
        Row(f"CPU a permit ({kind})", "≤ 8 µs", f"{cost:.2f} µs", cost <= 8),
        Row(f"permits a second and core ({kind})", "≥ 100,000", f"{1e6 / cost:,.0f}", cost <= 10),
        Row(f"frames a permit ({kind})", "≤ 0.06", f"{frames / permits:.3f}", frames / permits <= 0.06),
        Row(f"bytes a permit ({kind})", "≤ 16", f"{size / permits:.1f}", size / permits <= 16),
        Row(f"use of the limit ({kind})", "≥ 99.5 %", f"{use:.2%}", use >= 0.995),
        Row(f"Jain's index, worst second ({kind})", "≥ 0.999", f"{fairness:.5f}", fairness >= 0.999),
    ]
    return rows if rate < 50_000 else rows[:2] + rows[4:5]


def strict_minute(proxy: Proxy, seconds: float) -> list[Row]:
    rate = 6000
    with Fleet(proxy.native, SECRET, ["minute-a", "minute-b"]) as fleet:
        for member in fleet.members:
            fleet.register(member, [(0, "minute", rate, 60)])
            member.demand(2**31)
        fleet.run(1.0)
        before, begin = sum(member.granted for member in fleet.members), time.perf_counter()
        fleet.run(seconds)
        use = (sum(member.granted for member in fleet.members) - before) / (rate / 60 * (time.perf_counter() - begin))
    return [Row("use of a strict limit per minute", "≥ 99 %", f"{use:.2%}", use >= 0.99)]


def idle_grant(proxy: Proxy, seconds: float, tls: bool = False) -> list[Row]:
    with Fleet(proxy.native, SECRET, ["idle"], tls) as fleet:
        _, _, times = closed_loop(fleet, seconds, 1)
    p50, p99 = (percentile(times, share) * 1e3 for share in (0.5, 0.99))
    what = f"grant on an idle throttle{', TLS' if tls else ''}"
    return [Row(what, "p50 ≤ 1 ms", f"p50 {p50:.2f} ms, p99 {p99:.2f} ms", p50 <= 1)]


def newcomer(proxy: Proxy, rounds: int) -> list[Row]:
    """A session with nothing to send gets a backlog, where others use all of the limit."""
    rate, others = 2000, 3
    first: list[float] = []
    share: list[float] = []
    with Fleet(proxy.native, SECRET, [f"busy-{number}" for number in range(others + 1)]) as fleet:
        for member in fleet.members:
            fleet.register(member, [(0, "crowded", rate, 1)])
        *busy, late = fleet.members
        for member in busy:
            member.demand(2**31)
        fleet.run(0.5)
        for _ in range(rounds):
            usable: list[float] = []
            late.on_grant = lambda _m, n, off, to=usable: to.extend([time.perf_counter() + max(0, off) / 1e6] * n)  # type: ignore[misc]
            begin = time.perf_counter()
            late.demand(2**31)
            fleet.run(0.4)
            late.demand(0)
            fleet.run(0.1)
            first.append(usable[0] - begin)
            fair = rate / (others + 1)
            # The end of the first 100 ms in which it had 95 % of its share.
            steps = (step / 100 for step in range(10, 50))
            share.append(
                next((t for t in steps if sum(t - 0.1 <= at - begin < t for at in usable) >= 0.095 * fair), 9.9)
            )
    p50, p99, level = percentile(first, 0.5) * 1e3, percentile(first, 0.99) * 1e3, percentile(share, 0.5) * 1e3
    return [
        Row("first permit of a new backlog", "p50 ≤ 30 ms", f"{p50:.1f} ms", p50 <= 30),
        Row("the same", "p99 ≤ 100 ms", f"{p99:.1f} ms", p99 <= 100),
        Row("until it has its fair share", "≤ 250 ms", f"{level:.0f} ms", level <= 250),
    ]


def many_throttles(seconds: float) -> list[Row]:
    with running() as proxy, Fleet(proxy.native, SECRET, ["many"]) as fleet:
        before = psutil.Process(proxy.pid).memory_info().rss
        fleet.register(fleet.members[0], [(number, f"rule-{number:06}", 1000, 3600) for number in range(MANY)])
        grown = (psutil.Process(proxy.pid).memory_info().rss - before) / 2**20
        fleet.run(1.0)
        cpu, begin = process_cpu(proxy.pid), time.perf_counter()
        fleet.run(seconds)
        busy = (process_cpu(proxy.pid) - cpu) / (time.perf_counter() - begin)
    return [
        Row(f"memory of {MANY:,} throttles", "≤ 150 MB", f"{grown:.0f} MB", grown <= 150),
        Row(f"CPU while idle, {MANY:,} throttles", "< 2 % of a core", f"{busy:.2%}", busy < 0.02),
    ]


def against_redis(proxy: Proxy, seconds: float) -> list[Row]:
    rows = []
    for depth, least, how in ((1, 0.85, "one by one"), (16, 0.80, "16 at a time")):
        theirs = _redis(depth, 100_000)
        with Fleet(proxy.native, SECRET, [f"permits-{number}" for number in range(50)]) as fleet:
            granted, spent, _ = closed_loop(fleet, seconds, depth)
        ratio = granted / spent / theirs if theirs else 0.0
        found = f"{ratio:.2f} ({granted / spent:,.0f}/s, {theirs:,.0f}/s)"
        rows.append(Row(f"permits {how}, 50 sessions ÷ redis INCR", f"≥ {least:.2f}", found, ratio >= least))
    return rows


def _redis(depth: int, count: int) -> float:
    """INCRs a second of 50 connections, 0.0 without redis."""
    program = shutil.which("redis-server")
    if program is None or shutil.which("redis-benchmark") is None:
        return 0.0
    with tempfile.TemporaryDirectory() as directory:
        address = str(Path(directory) / "redis.sock")
        command = [program, "--port", "7911", "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        server = subprocess.Popen(
            machine.pinned(CORES.proxy, [*command, "--unixsocket", address]), stdout=subprocess.DEVNULL
        )
        try:
            while not os.path.exists(address):
                time.sleep(0.02)
            load = ["redis-benchmark", "-p", "7911", "-t", "incr", "-c", "50", "-n", str(count * depth), "--csv"]
            done = subprocess.run(
                machine.pinned(CORES.load, [*load, "-P", str(depth)]), capture_output=True, text=True, check=True
            )
            return float(next(csv.DictReader(io.StringIO(done.stdout)))["rps"])
        finally:
            server.terminate()
            server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter samples")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/throttling.md")
    options = parser.parse_args()
    seconds = 3.0 if options.quick else 8.0
    os.sched_setaffinity(0, {CORES.load})
    runs: list[list[Row]] = []

    def note(rows: list[Row]) -> None:
        runs.append(rows)
        for row in rows:
            print(f"{row.what}: {row.found} (target {row.goal})", file=sys.stderr, flush=True)

    for tls in (False, True):
        with running(tls) as proxy:
            note(saturated(proxy, 5, 3500, seconds, tls))
            note(idle_grant(proxy, 2.0, tls))
            if not tls:
                note(saturated(proxy, 10, 100_000, seconds))
                note(strict_minute(proxy, seconds + 5))
                note(newcomer(proxy, 10 if options.quick else 40))
                note(against_redis(proxy, 2.0))
    note(many_throttles(3.0))
    text = report(runs)
    print(text)
    if options.docs:
        put_into(DOCUMENT, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
