"""Histograms: in which class an observation is, and what they add up to."""

from __future__ import annotations

import pytest

from proxy.spans import OBSERVED, Histogram, Spans


@pytest.mark.parametrize(
    ("value", "number"), [(0.0, 0), (1.0, 0), (1.001, 1), (2.0, 1), (4.9, 2), (5.0, 2), (5.1, 3), (1e9, 3)]
)
def test_the_class_of_an_observation(value, number) -> None:
    histogram = Histogram((1.0, 2.0, 5.0))
    histogram.observe(value)
    assert histogram.counts == [int(each == number) for each in range(4)]
    assert histogram.total == value


def test_bounds_are_in_order() -> None:
    for name in OBSERVED:
        bounds = getattr(Spans(), name).bounds
        assert list(bounds) == sorted(set(bounds)), name
