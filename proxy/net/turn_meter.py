"""How long the hub works between two looks at the sockets: the one figure of a single-threaded program's health.

Two watchers of the loop: one right after it has looked, one right before it looks again. Between them runs everything
else, and nobody who comes meanwhile is seen.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from gevent import get_hub

from proxy.spans import Histogram


class TurnMeter:
    """Measures from its making to `stop`.

    Args:
        histogram: is told the seconds of each turn.
    """

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._began = monotonic()
        loop: Any = get_hub().loop
        self._watchers = [loop.check(ref=False), loop.prepare(ref=False)]
        self._watchers[0].start(self._looked)
        self._watchers[1].start(self._looks)

    def stop(self) -> None:
        for watcher in self._watchers:
            watcher.stop()
            watcher.close()

    def _looked(self) -> None:
        self._began = monotonic()

    def _looks(self) -> None:
        seconds, histogram = monotonic() - self._began, self._histogram
        if seconds <= histogram.first:  # as `observe`; there may be fifteen turns in a session, nearly all short
            histogram.counts[0] += 1
            histogram.total += seconds
        else:
            histogram.observe(seconds)
