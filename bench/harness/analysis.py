"""Figures out of samples: medians, spread, ratios within a round. Pure: no I/O.

Absolute times differ from run to run by more than the effects that matter, so candidates are compared within the same
round and the median of those ratios counts. An effect under 8 % is none: that is the scatter of such a median.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NOISE = 0.08

Rounds = Sequence[Mapping[str, Mapping[str, Any]]]
"""The rounds of a workload, each: candidate → sample."""


@dataclass(frozen=True)
class Figure:
    """Median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def _figure(values: list[float]) -> Figure | None:
    return Figure(statistics.median(values), min(values), max(values), len(values)) if values else None


def _value(sample: Mapping[str, Any] | None, key: str) -> float | None:
    if not sample or "failed" in sample:
        return None
    value = sample.get(key)
    return None if value is None else float(value)


def absolute(rounds: Rounds, candidate: str, key: str, scale: float = 1.0) -> Figure | None:
    values = [_value(samples.get(candidate), key) for samples in rounds]
    return _figure([value * scale for value in values if value is not None])


def ratio(rounds: Rounds, candidate: str, against: str, key: str) -> Figure | None:
    """How much of `against` the candidate needs, round by round."""
    values = []
    for samples in rounds:
        ours, theirs = _value(samples.get(candidate), key), _value(samples.get(against), key)
        if ours is not None and theirs:
            values.append(ours / theirs)
    return _figure(values)


def is_noise(figure: Figure) -> bool:
    return abs(figure.median - 1) < NOISE


def failures(rounds: Rounds, candidate: str) -> list[str]:
    return [samples[candidate]["failed"] for samples in rounds if "failed" in samples.get(candidate, {})]
