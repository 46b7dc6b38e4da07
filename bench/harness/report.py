"""The run as a person reads it: Markdown tables, and the same tables put into the documents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import analysis, sizing, summary
from harness.candidates import CANDIDATES
from harness.machine import ROOT, facts
from harness.workload import Metric, Workload
from harness.workloads import WORKLOADS

FIRST_PAGE = ROOT / "docs" / "performance.md"
TABLES = ROOT / "docs" / "performance" / "tables.md"


def _title(name: str) -> str:
    return CANDIDATES[name].title if name in CANDIDATES else name


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def _absolute_cell(figure: analysis.Figure | None, metric: Metric) -> str:
    if figure is None:
        return "-"
    low, high = (_number(value, metric.digits) for value in (figure.low, figure.high))
    return f"{_number(figure.median, metric.digits)} ({low}-{high})"


def _ratio_cell(figure: analysis.Figure | None) -> str:
    if figure is None:
        return "-"
    text = f"{figure.median:.2f} ({figure.low:.2f}-{figure.high:.2f})"
    return f"{text} ≈" if analysis.is_noise(figure) else text


def _rows(workload: Workload, block: Mapping[str, Any]) -> list[str]:
    rounds, lead = block["rounds"], workload.metrics[0]
    rows = []
    for name in block["candidates"]:
        cells = [_absolute_cell(analysis.absolute(rounds, name, m.key, m.scale), m) for m in workload.metrics]
        baseline = block["baseline"]
        against = "1" if name == baseline else _ratio_cell(analysis.ratio(rounds, name, baseline, lead.key))
        failed = analysis.failures(rounds, name)
        note = f" ({len(failed)} of {len(rounds)} rounds failed: {failed[0]})" if failed else ""
        rows.append(f"| {_title(name)}{note} | {cells[0]} | {against} | {' | '.join(cells[1:])} |")
    return rows


def _form(machine: Mapping[str, Any]) -> str:
    return str(machine.get("form", "form unknown"))


def _provenance(block: Mapping[str, Any]) -> str:
    machine = block["machine"]
    return (
        f"{len(block['rounds'])} rounds, {machine['date']}, revision {machine['commit']}, {_form(machine)}, "
        f"load average before {machine['load_average_before']}."
    )


def workload_table(name: str, block: Mapping[str, Any]) -> str:
    workload = WORKLOADS[name]
    heads = [metric.title for metric in workload.metrics]
    columns = ["", heads[0], f"÷ {_title(block['baseline'])}", *heads[1:]]
    lines = [
        f"### {name}: {workload.title}",
        "",
        _provenance(block),
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *_rows(workload, block),
    ]
    lines += [f"\nNot measured: {_title(who)}: {why}." for who, why in sorted(block.get("missing", {}).items())]
    return "\n".join(lines)


def _version(text: str) -> str:
    """What a program says of itself, without who wrote it and where it was built."""
    return re.split(r"\.?\s{2}|\s+(?:- https?|sha=|\d{4}/)", text)[0].replace(" version", "").replace(" server", "")


def _machine_line(blocks: Mapping[str, Any]) -> str:
    machine = next(iter(blocks.values()), {"machine": facts()})["machine"]
    peers = ", ".join(sorted({_version(text) for block in blocks.values() for text in block["versions"].values()}))
    return (
        f"Machine: {machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"Python {machine['python']}; ours: {_form(machine)}. Peers: {peers or 'none with a version'}.\n"
        "Median (lowest-highest) of the rounds; ratios are taken within a round; ≈ marks an effect under "
        f"{analysis.NOISE:.0%}, which is noise."
    )


def _ordered(blocks: Mapping[str, Any]) -> dict[str, Any]:
    return {name: blocks[name] for name in WORKLOADS if name in blocks}


def costs(blocks: Mapping[str, Any]) -> str:
    """What each thing costs, and on what machine."""
    ordered = _ordered(blocks)
    return f"{summary.costs(ordered)}\n\n{_machine_line(ordered)}\n"


def tables(blocks: Mapping[str, Any]) -> str:
    """All that stands behind the first page."""
    ordered = _ordered(blocks)
    parts = [_machine_line(ordered), summary.changes(ordered), sizing.section(ordered), sizing.growth(ordered)]
    parts += [workload_table(name, block) for name, block in ordered.items()]
    return "\n\n".join(part for part in parts if part) + "\n"


def first_page(blocks: Mapping[str, Any]) -> str:
    """What is asked first, for whoever has run it."""
    ordered = _ordered(blocks)
    return f"### What it costs\n\n{summary.costs(ordered)}\n\n### Goals\n\n{summary.goals(ordered)}\n"


def markdown(blocks: Mapping[str, Any]) -> str:
    """The whole run in one text: the goals first."""
    return f"{first_page(blocks)}\n{tables(blocks)}"


def put_into_documents(blocks: Mapping[str, Any]) -> None:
    """Costs and goals into the first page, everything else behind it."""
    ordered = _ordered(blocks)
    for document, part, text in (
        (FIRST_PAGE, "costs", costs(ordered)),
        (FIRST_PAGE, "goals", summary.goals(ordered) + "\n"),
        (TABLES, "tables", tables(ordered)),
    ):
        begin, end = f"<!-- bench: begin, {part}, written by bench/run.py -->", f"<!-- bench: end, {part} -->"
        put_into(document, text, begin, end)


def put_into(document: Path, text: str, begin: str, end: str) -> None:
    """Replaces what stands between the markers.

    Raises:
        ValueError: the document has no such markers.
    """
    before, found_begin, rest = document.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{document}: the markers for the tables are missing")
    document.write_text(f"{before}{begin}\n{text}{end}{after}")
