"""Weighted max-min division: nobody gets more than they want, nobody with less could have had more.

Pure arithmetic on whole connection places. Who asks, and what is done with the answer, is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Final

#: An operator's weight stays within these: a weight is a preference, not a way to shut others out.
MIN_WEIGHT: Final = 1 / 16
MAX_WEIGHT: Final = 16.0


def clamp_weight(weight: float) -> float:
    """`weight` within [1/16, 16]."""
    return min(MAX_WEIGHT, max(MIN_WEIGHT, weight))


def integer_max_min(
    capacity: int, demands: Mapping[str, int], weights: Mapping[str, float] | None = None, rotation: int = 0
) -> dict[str, int]:
    """Divide `capacity` places so that the smallest share relative to its weight is as large as possible.

    Shares are whole places, their sum is min(capacity, all demands), and the remainder rotates.

    Args:
        demands: name → what is wanted. weights: name → weight; 1 where absent.
        rotation: where in the order of names the remainder begins. Counting it up serves everybody in turn, also with
            fewer places than names.
    """
    weights = weights or {}
    names = sorted(name for name in demands if demands[name] > 0)
    shares = dict.fromkeys(demands, 0)
    level = _water_level(capacity, {name: demands[name] for name in names}, weights)
    for name in names:
        shares[name] = (
            demands[name] if level is None else min(demands[name], int(level * Fraction(weights.get(name, 1.0))))
        )
    left = capacity - sum(shares.values())
    turn = names[rotation % len(names) :] + names[: rotation % len(names)] if names else []
    # Below one whole place each is left over per unsatisfied name, so one walk round is enough.
    for name in turn:
        if left > 0 and shares[name] < demands[name]:
            shares[name] += 1
            left -= 1
    return shares


def _water_level(capacity: int, demands: Mapping[str, int], weights: Mapping[str, float]) -> Fraction | None:
    """Share per unit of weight at which the capacity is used up, exactly; None when all demands fit."""
    left = Fraction(capacity)
    total = sum((Fraction(weights.get(name, 1.0)) for name in demands), Fraction(0))
    for name in sorted(demands, key=lambda name: demands[name] / Fraction(weights.get(name, 1.0))):
        weight = Fraction(weights.get(name, 1.0))
        if left * weight < demands[name] * total:
            return left / total
        left -= demands[name]
        total -= weight
    return None
