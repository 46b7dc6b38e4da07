"""Goals and what was found, as a table; and two figures that several benchmarks need."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from harness import machine


class Row(NamedTuple):
    """A goal and what was found; `met`: None where it has no limit."""

    what: str
    goal: str
    found: str
    met: bool | None


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def jain(values: Sequence[float]) -> float:
    """1: all have as much; 1 of n: one has all."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def report(runs: Iterable[list[Row]]) -> str:
    """When and where, and the table."""
    facts = machine.facts()
    load = statistics.fmean(os.getloadavg())
    head = (
        f"{facts['date']}, {facts['processor']}, {facts['cores']} cores, Python {facts['python']}, revision "
        f"{facts['commit']}, load average {load:.1f} (others were at work on the machine if it is above 2).\n\n"
    )
    lines = ["| goal | target | measured | |", "|---|---|---|---|"]
    for rows in runs:
        for row in rows:
            verdict = "" if row.met is None else "met" if row.met else "**missed**"
            lines.append(f"| {row.what} | {row.goal} | {row.found} | {verdict} |")
    return head + "\n".join(lines) + "\n"
