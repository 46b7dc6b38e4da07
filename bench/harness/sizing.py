"""What the measured figures mean for the size of a machine: what one core and how much memory carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import analysis
from harness.candidates import CANDIDATES

OURS = "greenarrow"
SHARE_OF_A_CORE = 0.6
"""How much of a core one should plan with: beyond it, waiting times grow quickly."""


def _median(blocks: Mapping[str, Any], workload: str, key: str, who: str = OURS) -> float | None:
    figure = analysis.absolute(blocks[workload]["rounds"], who, key) if workload in blocks else None
    return figure.median if figure else None


def _per_core(title: str, cost_us: float | None, unit: str) -> str | None:
    if not cost_us:
        return None
    full = 1e6 / cost_us
    return f"| {title} | {cost_us:,.1f} µs | {full:,.0f} {unit} | {full * SHARE_OF_A_CORE:,.0f} {unit} |"


def _memory(blocks: Mapping[str, Any]) -> str | None:
    for workload in ("idle9k", "idle2k"):
        user = _median(blocks, workload, "kb_per_connection")
        kernel = _median(blocks, workload, "slab_kb_per_connection")
        ends = _median(blocks, workload, "slab_kb_per_connection", "direct")
        if user is not None and kernel is not None and ends is not None:
            whole = user + kernel - ends
            return (
                f"An idle relay takes {user:.2f} KB of the process and about {kernel - ends:.1f} KB of the kernel for "
                f"its two sockets: 10,000 of them {whole * 10_000 / 1024:,.0f} MB. Mail under way adds socket buffers."
            )
    return None


_GROWTH = ("grow100", "grow1000", "grow9000")


def growth(blocks: Mapping[str, Any]) -> str:
    """How the cost of a session changes with the relays that are open beside it; nothing when not measured."""
    if not all(name in blocks for name in _GROWTH):
        return ""
    lines = [
        "### Does cost grow with open relays?",
        "",
        "Medians of `sess1` beside so many idle relays: CPU µs a session, and p99 in ms.",
        "",
        "| | 100 | 1,000 | 9,000 | CPU, 9,000 ÷ 100 |",
        "|---|---|---|---|---|",
    ]
    for who in blocks[_GROWTH[0]]["candidates"]:
        cost = [_median(blocks, name, "cpu_us_per_unit", who) for name in _GROWTH]
        tail = [_median(blocks, name, "session_p99_us", who) for name in _GROWTH]
        if None not in cost and None not in tail:
            cells = [f"{c:,.1f}; {t / 1000:,.1f}" for c, t in zip(cost, tail, strict=True) if c and t]
            lines.append(f"| {CANDIDATES[who].title} | {' | '.join(cells)} | {(cost[-1] or 0) / (cost[0] or 1):.2f} |")
    return "\n".join(lines)


def section(blocks: Mapping[str, Any]) -> str:
    """Markdown, or nothing when ours was not measured."""
    rows = [
        _per_core("session with 1 message of 20 KB", _median(blocks, "sess1", "cpu_us_per_unit"), "sessions/s"),
        _per_core(
            "the same with a log line each",
            _median(blocks, "sess1+log", "cpu_us_per_unit", f"{OURS}-log"),
            "sessions/s",
        ),
        _per_core("session with 5 messages of 20 KB", _median(blocks, "sess5", "cpu_us_per_unit"), "sessions/s"),
        _per_core("session with 1 message of 100 KB", _median(blocks, "msg100k", "cpu_us_per_unit"), "sessions/s"),
        _per_core("megabyte of a large message", _median(blocks, "bulk", "cpu_us_per_unit"), "MB/s"),
    ]
    shown = [row for row in rows if row]
    if not shown:
        return ""
    lines = [
        "### Sizing, from these figures",
        "",
        f"| what | CPU | one core carries | plan with ({SHARE_OF_A_CORE:.0%}) |",
        "|---|---|---|---|",
        *shown,
    ]
    memory = _memory(blocks)
    return "\n".join(lines + (["", memory] if memory else []))
