"""How often an address may fail, and for how long its failures are answered late."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy import budget
from proxy.policy.budget import BUDGET, REFILL_SECONDS, FailureBudget

HERE, THERE = "192.0.2.1", "192.0.2.2"


def failed(times: int, now: float = 0.0) -> FailureBudget:
    failures = FailureBudget()
    for _ in range(times):
        failures.failed(HERE, now)
    return failures


@pytest.mark.parametrize(("times", "exhausted"), [(0, False), (1, False), (BUDGET - 1, False), (BUDGET, True)])
def test_so_many_failures_are_forgiven(times: int, exhausted: bool) -> None:
    assert failed(times).exhausted(HERE, 0.0) is exhausted


def test_others_are_not_affected() -> None:
    failures = failed(BUDGET)
    assert not failures.exhausted(THERE, 0.0)


def test_one_failure_is_forgiven_at_a_time() -> None:
    failures = failed(BUDGET)
    assert failures.exhausted(HERE, REFILL_SECONDS - 0.01)
    assert not failures.exhausted(HERE, REFILL_SECONDS)
    failures.failed(HERE, REFILL_SECONDS)
    assert failures.exhausted(HERE, REFILL_SECONDS)


def test_all_is_forgiven_after_a_while() -> None:
    failures = failed(BUDGET)
    later = BUDGET * REFILL_SECONDS
    assert not failures.exhausted(HERE, later)
    for _ in range(BUDGET - 1):
        failures.failed(HERE, later)
    assert not failures.exhausted(HERE, later)


def test_a_thousand_failures_are_no_worse_than_a_few() -> None:
    assert failed(1000).exhausted(HERE, 2 * REFILL_SECONDS - 0.01)
    assert not failed(1000).exhausted(HERE, 2 * REFILL_SECONDS)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 100)), max_size=60))
def test_never_longer_than_two_refills_and_never_after_a_long_rest(steps: list[tuple[int, float]]) -> None:
    failures, now = FailureBudget(), 0.0
    for count, pause in steps:
        now += pause
        for _ in range(count):
            failures.failed(HERE, now)
        assert not failures.exhausted(HERE, now + 2 * REFILL_SECONDS + 1e-6)


def test_memory_is_bounded_and_who_failed_last_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_MAX_ADDRESSES", 3)
    failures = failed(BUDGET)
    failures.failed("a", 0.0)
    failures.failed("b", 0.0)
    failures.failed(HERE, 0.0)
    failures.failed("c", 0.0)
    assert failures.exhausted(HERE, 0.0)
    for name in "defg":
        failures.failed(name, 0.0)
    assert not failures.exhausted(HERE, 0.0)


def test_all_processes_together_have_one_budget() -> None:
    budgets = [FailureBudget(), FailureBudget()]
    budgets[0].tell = lambda address: budgets[1].failed_elsewhere(address, 5.0)
    budgets[1].tell = lambda address: budgets[0].failed_elsewhere(address, 5.0)
    for number in range(BUDGET):
        assert not budgets[number % 2].exhausted("192.0.2.1", 5.0)
        budgets[number % 2].failed("192.0.2.1", 5.0)
    assert budgets[0].exhausted("192.0.2.1", 5.0)
    assert budgets[1].exhausted("192.0.2.1", 5.0)
