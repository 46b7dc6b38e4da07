"""Weighted max-min division: the examples of docs/throttling.md, and what must hold for any numbers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.throttling.share import MAX_WEIGHT, MIN_WEIGHT, clamp_weight, integer_max_min

DEMANDS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 60), max_size=8)
WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from((1 / 16, 0.5, 1.0, 1.5, 3.0, 16.0)))


def checked(
    capacity: int, demands: Mapping[str, int], weights: Mapping[str, float] | None = None, rotation: int = 0
) -> dict[str, int]:
    """The division, with what must always hold asserted."""
    shares = integer_max_min(capacity, demands, weights, rotation)
    assert shares.keys() == demands.keys()
    assert sum(shares.values()) == min(capacity, sum(demands.values()))
    assert all(0 <= shares[name] <= demands[name] for name in demands)
    return shares


@pytest.mark.parametrize(
    ("capacity", "demands", "expected"),
    [
        (20, {}, {}),
        (20, {"a": 5}, {"a": 5}),
        (20, {"a": 50}, {"a": 20}),
        (20, {"a": 50, "b": 50}, {"a": 10, "b": 10}),
        (20, {"a": 2, "b": 50, "c": 50}, {"a": 2, "b": 9, "c": 9}),
        (20, {"a": 0, "b": 50}, {"a": 0, "b": 20}),
        (0, {"a": 3}, {"a": 0}),
    ],
)
def test_equal_weights(capacity: int, demands: dict[str, int], expected: dict[str, int]) -> None:
    assert checked(capacity, demands) == expected


def test_weights_count_until_demand_is_met() -> None:
    assert checked(20, {"a": 50, "b": 50}, {"a": 3.0}) == {"a": 15, "b": 5}
    assert checked(20, {"a": 6, "b": 50}, {"a": 3.0}) == {"a": 6, "b": 14}


def test_remainder_rotates() -> None:
    shares = [checked(2, {"a": 9, "b": 9, "c": 9}, rotation=turn) for turn in range(3)]
    assert shares == [{"a": 1, "b": 1, "c": 0}, {"a": 0, "b": 1, "c": 1}, {"a": 1, "b": 0, "c": 1}]


@given(st.integers(0, 100), DEMANDS, WEIGHTS, st.integers(0, 20))
def test_integer_shares_are_fair(
    capacity: int, demands: dict[str, int], weights: dict[str, float], rotation: int
) -> None:
    shares = checked(capacity, demands, weights, rotation)
    for poor in demands:
        if shares[poor] == demands[poor]:
            continue
        for rich in demands:
            # Giving one place of the richer to the poorer would not make them more equal by more than a place each.
            assert (shares[rich] - 1) / weights.get(rich, 1.0) <= (shares[poor] + 1) / weights.get(poor, 1.0)


@given(st.integers(0, 40), DEMANDS)
def test_everybody_is_served_within_one_round(capacity: int, demands: dict[str, int]) -> None:
    if capacity == 0:
        return
    wanting = {name for name in demands if demands[name]}
    served = {
        name for turn in range(len(wanting)) for name, share in checked(capacity, demands, None, turn).items() if share
    }
    assert served == wanting


def test_weights_are_clamped() -> None:
    assert (clamp_weight(0.0), clamp_weight(1.0), clamp_weight(99)) == (MIN_WEIGHT, 1.0, MAX_WEIGHT)


def test_the_remainder_begins_at_the_first_of_those_who_want_any() -> None:
    assert integer_max_min(1, {"a": 0, "b": 1, "c": 1}) == {"a": 0, "b": 1, "c": 0}
    assert integer_max_min(1, {"a": 0, "b": 1, "c": 1}, rotation=1) == {"a": 0, "b": 0, "c": 1}
