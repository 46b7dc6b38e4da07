#!/usr/bin/env python3
"""The benchmark: `make bench` (everything), `make bench-quick` (about three minutes). See docs/performance/method.md.

Only the order of things is here: which workloads, how many rounds, who goes first, where the results are written.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable
from typing import Any

from harness import builds, machine, plot, report, summary
from harness.candidates import CANDIDATES, Candidate, Unavailable
from harness.measure import Bench, Sample, version_of
from harness.workload import Workload
from harness.workloads import QUICK, QUICK_CANDIDATES, WORKLOADS

RESULTS = machine.BENCH / "results"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer workloads, candidates and rounds, shorter samples")
    parser.add_argument("--rounds", type=int, help="exactly, of --workloads; else at most (5, quick 2)")
    parser.add_argument("--workloads", help=f"comma-separated, of: {', '.join(WORKLOADS)}")
    parser.add_argument("--candidates", help=f"comma-separated, of: {', '.join(CANDIDATES)}")
    parser.add_argument("--label", help="name of the files in bench/results (default: full, or quick)")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="put the tables into the documents (full runs do)",
    )
    parser.add_argument("--report-only", action="store_true", help="measure nothing, write tables and plot anew")
    parser.add_argument("--reference", action="store_true", help="later runs are compared with what this one found")
    return parser.parse_args()


def chosen(text: str | None, default: tuple[str, ...], known: dict[str, Any]) -> list[str]:
    names = text.split(",") if text else list(default)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"bench: unknown: {', '.join(unknown)}; there are: {', '.join(known)}")
    return names


def order_of(names: list[str], number: int) -> list[str]:
    """Another one goes first each round, and every second round runs backwards: drift must hit all alike."""
    start = number // 2 % len(names)
    turned = names[start:] + names[:start]
    return turned[::-1] if number % 2 else turned


def show(workload: Workload, name: str, number: int, sample: Sample) -> None:
    if "failed" in sample:
        figures = f"FAILED: {sample['failed']}"
    else:
        shown = [(metric, sample.get(metric.key)) for metric in workload.metrics]
        figures = ", ".join(f"{m.title} {v * m.scale:.{m.digits}f}" for m, v in shown if v is not None)
    say(f"  {number + 1} {workload.name:10} {name:15} {figures}")


def measure(bench: Bench, workload: Workload, names: list[str], rounds: int) -> dict[str, Any]:
    """All rounds of one workload, as the block that goes into the results file."""
    facts = machine.facts()
    present = list(names)
    missing: dict[str, str] = {}
    done: list[dict[str, Sample]] = []
    for number in range(rounds):
        samples: dict[str, Sample] = {}
        for name in order_of(present, number):
            if name in missing:
                continue
            try:
                samples[name] = bench.sample(workload, CANDIDATES[name])
                show(workload, name, number, samples[name])
            except Unavailable as reason:
                missing[name] = str(reason)
                say(f"  - {workload.name:10} {name:15} not measured: {reason}")
        done.append(samples)
    measured = [name for name in present if any(name in samples for samples in done)]
    return {
        "machine": facts,
        "baseline": workload.baseline,
        "candidates": measured,
        "missing": missing,
        "versions": versions(CANDIDATES[name] for name in measured),
        "rounds": done,
    }


def versions(candidates: Iterable[Candidate]) -> dict[str, str]:
    found: dict[str, str] = {}
    for candidate in candidates:
        text = version_of(candidate)
        if text:
            found[candidate.name] = text
    return found


def write(label: str, blocks: dict[str, Any], into_docs: bool) -> None:
    """A workload measured again replaces its old block whole, so ratios always stay within one run."""
    RESULTS.mkdir(exist_ok=True)
    text = report.markdown(blocks)
    (RESULTS / f"{label}.json").write_text(json.dumps(blocks, indent=1) + "\n")
    (RESULTS / f"{label}.md").write_text(text)
    (RESULTS / f"{label}.svg").write_text(plot.svg(blocks))
    if into_docs:
        report.put_into_documents(blocks)


def load(label: str) -> dict[str, Any]:
    path = RESULTS / f"{label}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def rounds_of(workload: Workload, options: argparse.Namespace) -> int:
    if options.rounds and options.workloads:
        return int(options.rounds)
    return min(workload.rounds, options.rounds or (2 if options.quick else workload.rounds))


def measure_all(options: argparse.Namespace, blocks: dict[str, Any], label: str, into_docs: bool) -> None:
    """One workload after the other; results are written behind each, so that a run that is broken off is not lost."""
    names = chosen(options.workloads, QUICK if options.quick else tuple(WORKLOADS), WORKLOADS)
    everybody = QUICK_CANDIDATES if options.quick and not options.workloads else tuple(CANDIDATES)
    allowed = chosen(options.candidates, everybody, CANDIDATES)
    with machine.wide_port_range() as notes, Bench(machine.Cores(), options.quick) as bench:
        for note in notes + machine.complaints():
            say(f"bench: {note}")
        for number, workload in enumerate(WORKLOADS[name] for name in names):
            say(f"{workload.name}: {workload.title}")
            candidates = [name for name in workload.candidates if name in allowed]
            if candidates:
                blocks[workload.name] = measure(bench, workload, candidates, rounds_of(workload, options))
                write(label, blocks, into_docs)
            bench.stop_all_but({who for name in names[number + 1 :] for who in WORKLOADS[name].candidates})


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: ended"))  # what was started is stopped then, too
    label = options.label or ("quick" if options.quick else "full")
    into_docs = options.docs or label == "full"
    blocks = load(label)
    if not options.report_only:
        builds.build_generator()
        machine.raise_file_limit()
        measure_all(options, blocks, label, into_docs)
    write(label, blocks, into_docs)
    if options.reference:
        summary.keep_as_reference(blocks)
    print(report.tables(blocks) + "\n" + report.first_page(blocks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
