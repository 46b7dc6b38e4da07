"""What the benchmark makes of its samples: goals, and what has become slower. Nothing is measured here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness import summary
from harness.candidates import CANDIDATES
from harness.targets import GOALS, Goal
from harness.workloads import MAIN, QUICK, QUICK_CANDIDATES, WORKLOADS

pytestmark = pytest.mark.either_form("the benchmark")

GOAL = Goal("a session", "HAProxy", "sess1", 0.97)


def blocks(*rounds: dict[str, float], workload: str = "sess1", key: str = "cpu_us_per_unit") -> dict[str, object]:
    """One workload, by candidate the figure of each round."""
    samples = [{name: {key: value} for name, value in each.items()} for each in rounds]
    baseline = WORKLOADS[workload].baseline
    return {workload: {"rounds": samples, "candidates": list(rounds[0]), "baseline": baseline}}


def test_a_goal_is_met_by_the_median_of_the_ratios_of_each_round() -> None:
    found = blocks(
        {"greenarrow": 90, "greenarrow-python": 120, "haproxy": 100},
        {"greenarrow": 190, "greenarrow-python": 230, "haproxy": 200},
        {"greenarrow": 150, "greenarrow-python": 120, "haproxy": 100},
    )
    compiled, python = GOAL.found(found)
    assert compiled is not None
    assert python is not None
    assert (compiled.median, compiled.low, compiled.high) == (0.95, 0.90, 1.50)
    assert python.median == 1.2
    assert GOAL.met(found) is True
    assert replace(GOAL, limit=0.94).met(found) is False
    assert replace(GOAL, judged="python", limit=1.19).met(found) is False


def test_a_goal_is_judged_as_it_is_printed() -> None:
    assert GOAL.met(blocks({"greenarrow": 97.4, "haproxy": 100})) is True
    assert GOAL.met(blocks({"greenarrow": 97.6, "haproxy": 100})) is False


def test_a_failed_round_does_not_count_and_none_at_all_is_not_met() -> None:
    found = blocks({"greenarrow": 90, "haproxy": 100}, {"greenarrow": 300, "haproxy": 100})
    found["sess1"]["rounds"][1]["greenarrow"] = {"failed": "a word"}  # type: ignore[index]
    assert GOAL.met(found) is True
    found["sess1"]["rounds"][0]["haproxy"] = {"failed": "a word"}  # type: ignore[index]
    assert GOAL.met(found) is None
    assert GOAL.met({}) is None
    assert "not measured" in summary.goals({})


def test_a_turned_goal_is_what_the_peer_needs_of_ours() -> None:
    goal = Goal("permits", "redis", "permits1", 0.50, "redis", turned=True)
    assert goal.met(blocks({"greenarrow": 16, "redis": 8}, workload="permits1")) is True
    assert goal.met(blocks({"greenarrow": 17, "redis": 8}, workload="permits1")) is False
    assert goal.goal == "≥ 0.50"


def test_a_goal_without_a_peer_is_the_figure_itself() -> None:
    goal = Goal("a permit", "", "core", 0.50, "", "core", "core-python", unit=" µs")
    assert goal.met(blocks({"core": 0.5, "core-python": 1.3}, workload="core")) is True
    assert goal.met(blocks({"core": 0.51, "core-python": 1.3}, workload="core")) is False


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.measure)
def test_what_a_goal_needs_is_measured_in_five_rounds(goal: Goal) -> None:
    workload = WORKLOADS[goal.workload]
    assert workload.rounds >= MAIN == 5
    needed = {goal.ours, goal.peer, goal.python, goal.python_peer} - {""}
    assert needed <= set(workload.candidates)


def test_every_row_of_the_first_page_is_measured() -> None:
    for cost in summary.COSTS:
        workload = WORKLOADS[cost.workload]
        assert {cost.ours, cost.python, cost.peer} - {""} <= set(workload.candidates), cost.what
        assert cost.key == "cpu_us_per_unit" or cost.key in {metric.key for metric in workload.metrics}, cost.what


def test_whoever_is_named_exists() -> None:
    for workload in WORKLOADS.values():
        assert set(workload.candidates) <= set(CANDIDATES)
        assert workload.baseline in workload.candidates or workload.candidates == ("greenarrow",), workload.name
    assert set(QUICK) <= set(WORKLOADS)
    assert set(QUICK_CANDIDATES) <= set(CANDIDATES)
    ports = [candidate.port for candidate in CANDIDATES.values()]
    assert len(set(ports)) == len(ports)


def test_slower_is_what_is_beyond_noise_and_beyond_every_earlier_round(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(summary, "REFERENCE", tmp_path / "reference.json")
    assert summary.changes({}) == ""
    earlier = blocks({"greenarrow": 100, "haproxy": 100}, {"greenarrow": 115, "haproxy": 100})
    earlier["sess1"]["machine"] = {"date": "2026-11-25", "commit": "abc"}  # type: ignore[index]
    summary.keep_as_reference(earlier)
    for now, slower in ((114, False), (116, False), (120, True)):
        text = summary.changes(blocks({"greenarrow": now, "haproxy": 100}))
        assert "| 1.07 |" in text or "| 1.08 |" in text
        assert ("**slower**" in text) is slower, now
