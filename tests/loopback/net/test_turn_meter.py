"""A turn of the hub is measured from one look at the sockets to the next."""

from __future__ import annotations

import gevent
import pytest

from proxy.net import turn_meter
from proxy.spans import Histogram


def test_work_between_two_looks_is_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(turn_meter, "monotonic", lambda: now)
    histogram = Histogram((0.1, 1.0))
    meter = turn_meter.TurnMeter(histogram)
    try:
        gevent.sleep(0.001)  # at least one whole turn, in which this clock stands
        before = list(histogram.counts)
        gevent.sleep(0.001)  # here a turn begins, woken by the timer
        now += 0.5
        gevent.sleep(0.001)
        assert histogram.counts[1] == before[1] + 1
        assert histogram.counts[0] > before[0]
        assert histogram.total == pytest.approx(0.5)
    finally:
        meter.stop()
    counts = list(histogram.counts)
    gevent.sleep(0.001)
    assert histogram.counts == counts
