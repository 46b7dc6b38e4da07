#!/usr/bin/env python3
"""What workers cost and bring: `python bench/workers.py [--docs] [--rounds N] [--seconds S]`.

The same mail through one process and through a master with two workers, in mode tcp and in mode smtp, without a
throttle block and under one that everything matches and nothing reaches: then each connection asks the master for its
place.

*Cost* is CPU time of the whole process tree a session, with all of it bound to one core, and load and sink to another
one: so both programs have the same to do with, and what the machine does besides hardly counts. *Rate* is measured with
nothing bound. On two cores load and sink take their part of what there is; the last column says how many sessions a
second the program itself would make of both cores, by the CPU time that it used meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from harness import machine
from harness.builds import GENERATOR, build_generator
from harness.candidates import SINK
from harness.goals import Row, report
from harness.report import put_into

sys.path.insert(0, str(machine.ROOT))

from tests.program import Proxy

DOCUMENT = machine.ROOT / "docs" / "performance" / "tables.md"
BEGIN, END = "<!-- bench: begin, written by bench/workers.py -->", "<!-- bench: end, workers -->"
CORES = machine.Cores()
GOAL = 1.10
BLOCK = """\
throttle all {
    max_concurrent_connections 100000
    max_delivery_rate 10000000/s
}
"""


@contextlib.contextmanager
def sink() -> Iterator[int]:
    command = machine.pinned(CORES.load, [str(GENERATOR), "sink", "--target", SINK])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise SystemExit(f"bench: the sink cannot listen on {SINK}")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


class Candidate:
    """One way to run the program.

    Args:
        workers: processes of the doors; 1: one process does everything.
    """

    def __init__(self, workers: int, mode: str, block: bool) -> None:
        self.workers, self.mode, self.block = workers, mode, block
        self.bound: list[dict[str, Any]] = []
        self.free: list[dict[str, Any]] = []

    def measure(self, sink_pid: int, seconds: float, bound: bool) -> dict[str, Any]:
        """One run of the generator, as its report says."""
        with self._proxy_on(bound) as proxy:
            self._load(proxy, sink_pid, 0.5, bound)  # warms it up
            sample = self._load(proxy, sink_pid, seconds, bound)
        if sample["errors"]:
            raise SystemExit(f"bench: {sample['errors']} errors in {sample['units']:.0f} sessions")
        return sample

    @contextlib.contextmanager
    def _proxy_on(self, bound: bool) -> Iterator[Proxy]:
        more = f"workers {self.workers}\nmode {self.mode}\nlog_connections none\n{BLOCK if self.block else ''}"
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {CORES.proxy} if bound else before)  # its processes inherit it
        try:
            proxy = Proxy(more).__enter__()
        finally:
            os.sched_setaffinity(0, before)
        with contextlib.ExitStack() as stack:
            stack.push(proxy)
            for number in range(1, self.workers + 1 if self.workers > 1 else 1):
                proxy.wait_line(f"a worker serves worker={number}")
            yield proxy

    def _load(self, proxy: Proxy, sink_pid: int, seconds: float, bound: bool) -> dict[str, Any]:
        host, port = proxy.proxy_protocol
        command = [str(GENERATOR), "load", "--target", SINK, "--proxy", f"{host}:{port}", "--handshake", "v2"]
        command += ["--connections", "100", "--messages", "1", "--bytes", "20480", "--seconds", str(seconds)]
        command += ["--watch", str(proxy.pid), "--sink-pid", str(sink_pid)]
        command += ["--core", str(CORES.load)] if bound else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise SystemExit(f"bench: {done.stderr.strip() or done.returncode}")
        sample: dict[str, Any] = json.loads(done.stdout)
        return sample


def median(samples: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(sample[name] for sample in samples)


def rows(one: Candidate, several: Candidate) -> list[Row]:
    """What the second costs beside the first, round by round, and how fast both were."""
    what = f"mode {one.mode}, {'every connection under a block' if one.block else 'no block'}"
    ratios = [b["cpu_us_per_unit"] / a["cpu_us_per_unit"] for a, b in zip(one.bound, several.bound, strict=True)]
    ratio = statistics.median(ratios)
    costs = [f"{median(each.bound, 'cpu_us_per_unit'):.0f} µs" for each in (one, several)]
    found = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}): {costs[1]} to {costs[0]}"
    result = [
        Row(f"CPU a session, {several.workers} workers to one process ({what})", f"≤ {GOAL}", found, ratio <= GOAL)
    ]
    for each in (one, several):
        rate, cores = median(each.free, "units_per_second"), min(each.workers, machine_cores())
        alone = cores * 1e6 / median(each.free, "cpu_us_per_unit")
        used = median(each.free, "proxy_core_use")
        name = "one process" if each.workers == 1 else f"{each.workers} workers"
        found = f"{rate:,.0f} with {used:.2f} cores; {cores} to itself would make {alone:,.0f}"
        result.append(Row(f"sessions a second, {name} ({what})", "", found, None))
    return result


def machine_cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help=f"put the table into {DOCUMENT.name}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run")
    parser.add_argument("--modes", nargs="*", default=["tcp", "smtp"])
    arguments = parser.parse_args()
    build_generator()
    machine.raise_file_limit()
    pairs = [
        (Candidate(1, mode, block), Candidate(2, mode, block))
        for mode, block in itertools.product(arguments.modes, (False, True))
    ]
    with machine.wide_port_range(), sink() as sink_pid:
        for number, (pair, bound) in itertools.product(
            range(arguments.rounds), itertools.product(pairs, (True, False))
        ):
            for each in pair if number % 2 else reversed(pair):
                sample = each.measure(sink_pid, arguments.seconds, bound)
                (each.bound if bound else each.free).append(sample)
    text = report(rows(*pair) for pair in pairs)
    print(text)
    if arguments.docs:
        put_into(DOCUMENT, text, BEGIN, END)


if __name__ == "__main__":
    main()
