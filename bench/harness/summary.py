"""The first page: what each thing costs, which goals are met, and what has changed since figures that are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness import analysis
from harness.candidates import CANDIDATES
from harness.machine import BENCH
from harness.sizing import SHARE_OF_A_CORE
from harness.targets import GOALS, Goal
from harness.workloads import WORKLOADS

REFERENCE = BENCH / "results" / "reference.json"
_DAY = 86400
#: Peers stay what they are between two versions of ours, so a ratio to them can be compared.
_PEERS = ("haproxy", "haproxy-tcplog", "starttls-haproxy", "dante", "redis")
_OURS = tuple(
    name for name, candidate in CANDIDATES.items() if name.startswith(("greenarrow", "smtp-")) or name == "starttls-tcp"
)


def _ratio(figure: analysis.Figure | None) -> str:
    return f"{figure.median:.2f} ({figure.low:.2f}-{figure.high:.2f})" if figure else "-"


def _verdict(goal: Goal, blocks: Mapping[str, Any]) -> str:
    if goal.limit is None:
        return ""
    return {None: "not measured", True: "met", False: "**missed**"}[goal.met(blocks)]


def _goal_row(goal: Goal, blocks: Mapping[str, Any]) -> str:
    cells = [_ratio(figure) for figure in goal.found(blocks)]
    return f"| {' | '.join([goal.measure, goal.against, goal.goal, *cells, _verdict(goal, blocks)])} |"


def goals(blocks: Mapping[str, Any]) -> str:
    """Every row, also of what was not measured: a goal that nobody looks at is not met."""
    verdicts = [goal.met(blocks) for goal in GOALS if goal.limit is not None]
    fewest = min((len(blocks[goal.workload]["rounds"]) for goal in GOALS if goal.workload in blocks), default=0)
    return "\n".join(
        [
            "| measure | against | goal | compiled | pure Python | met |",
            "|---|---|---|---|---|---|",
            *[_goal_row(goal, blocks) for goal in GOALS],
            "",
            f"{verdicts.count(True)} of {len(verdicts)} are met, {verdicts.count(False)} missed, "
            f"{verdicts.count(None)} not measured. Median (lowest-highest) of at least {fewest} rounds.",
        ]
    )


@dataclass(frozen=True)
class Cost:
    """A row of what things cost; `messages`: how many one unit carries, 0 where a day of them means nothing."""

    what: str
    workload: str
    ours: str = "greenarrow"
    python: str = "greenarrow-python"
    peer: str = "haproxy"
    messages: int = 0
    key: str = "cpu_us_per_unit"
    unit: str = "µs"


COSTS = (
    Cost("session of one message of 20 KB", "sess1", messages=1),
    Cost(
        "the same with a log line", "sess1+log", "greenarrow-log", "greenarrow-python-log", "haproxy-tcplog", messages=1
    ),
    Cost("session of five messages", "sess5", messages=5),
    Cost("session of one message of 100 KB", "msg100k", messages=1),
    Cost("a MB of a large message", "bulk"),
    Cost("session over SOCKS5, with password and BIND", "socks", peer="", messages=1),
    Cost("the same through a warm native channel", "channel", "channel-warm", "channel-warm-python", "", 1),
    Cost("mode smtp, a connection of its own", "smtp1", "smtp-own", "smtp-own-python", messages=1),
    Cost("mode smtp, a shared connection", "smtp1", "smtp-shared", "smtp-shared-python", messages=1),
    Cost(
        "the same with STARTTLS to the MX",
        "smtptls",
        "smtp-shared",
        "smtp-shared-python",
        "starttls-haproxy",
        1,
        "with_own_tls_us_per_unit",
    ),
    Cost("a permit, one by one", "permits1", peer=""),
    Cost("a permit, 16 at a time", "permits16", peer=""),
    Cost("a permit in the core, no network", "core", "core", "core-python", ""),
    Cost("an open relay, memory", "idle9k", key="kb_per_connection", unit="KB"),
    Cost("a kept connection, memory", "kept2k", "kept", "kept-python", "", key="kb_per_kept", unit="KB"),
)


def _amount(figure: analysis.Figure | None, unit: str) -> str:
    if figure is None:
        return "-"
    return f"{figure.median:,.{2 if figure.median < 10 else 1 if figure.median < 100 else 0}f} {unit}"


def _cost_row(cost: Cost, blocks: Mapping[str, Any]) -> str:
    rounds = blocks[cost.workload]["rounds"]
    ours = analysis.absolute(rounds, cost.ours, cost.key)
    python = analysis.absolute(rounds, cost.python, cost.key)
    against = analysis.ratio(rounds, cost.ours, cost.peer, cost.key) if cost.peer else None
    a_day = "-"
    if ours and cost.messages and ours.median:
        a_day = f"{_DAY * SHARE_OF_A_CORE * 1e6 / ours.median * cost.messages / 1e6:,.0f} million"
    cells = [
        cost.what,
        _amount(ours, cost.unit),
        _amount(python, cost.unit),
        f"{against.median:.2f}" if against else "-",
    ]
    return f"| {' | '.join([*cells, a_day])} |"


def costs(blocks: Mapping[str, Any]) -> str:
    rows = [_cost_row(cost, blocks) for cost in COSTS if cost.workload in blocks]
    return "\n".join(
        [
            f"| | compiled | pure Python | ÷ HAProxy | messages a day, {SHARE_OF_A_CORE:.0%} of one core |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def ratios(blocks: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Workload → candidate → its main figure ÷ the baseline's: what a later run can be compared with."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, block in blocks.items():
        if name not in WORKLOADS or block["baseline"] not in _PEERS:
            continue
        lead = WORKLOADS[name].metrics[0].key
        for candidate in block["candidates"]:
            figure = analysis.ratio(block["rounds"], candidate, block["baseline"], lead)
            if figure and candidate in _OURS:
                kept = {"median": figure.median, "low": figure.low, "high": figure.high}
                found.setdefault(name, {})[candidate] = {key: round(value, 3) for key, value in kept.items()}
    return found


def keep_as_reference(blocks: Mapping[str, Any]) -> None:
    """Later runs are compared with this one."""
    machine = next(iter(blocks.values()))["machine"]
    kept = {"date": machine["date"], "commit": machine["commit"], "ratios": ratios(blocks)}
    REFERENCE.write_text(json.dumps(kept, indent=1) + "\n")


def _is_slower(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Beyond noise: by more than what is none, and more than any round there was before."""
    return now["median"] > before["median"] * (1 + analysis.NOISE) and now["median"] > before["high"]


def changes(blocks: Mapping[str, Any]) -> str:
    """Ours then and now, ÷ the same baseline; nothing where there is no reference."""
    if not REFERENCE.exists():
        return ""
    reference = json.loads(REFERENCE.read_text())
    found = ratios(blocks)
    rows, slower = [], 0
    for workload, candidates in reference["ratios"].items():
        for candidate, before in candidates.items():
            now = found.get(workload, {}).get(candidate)
            if now is None:
                continue
            worse = _is_slower(before, now)
            slower += worse
            cells = [workload, CANDIDATES[candidate].title, f"{before['median']:.2f}", f"{now['median']:.2f}"]
            rows.append(f"| {' | '.join(cells)} | {'**slower**' if worse else ''} |")
    if not rows:
        return ""
    head = [
        "### Against earlier figures",
        "",
        f"Then: {reference['date']}, revision {reference['commit']}. The main figure of a workload ÷ its baseline's, "
        f"lower is better. Slower, by more than {analysis.NOISE:.0%} and than any round of then: {slower}.",
        "",
        "| workload | | then | now | |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(head + rows)
