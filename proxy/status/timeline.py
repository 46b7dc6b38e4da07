"""The last hour in minutes, kept in memory: how many connections ended and failed, and how long turns took at most.

Pure: the time and the totals are arguments. Whoever has them calls `look` now and then; a minute that nobody looked in
is part of the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from proxy.status.rows import MinuteRow

MINUTE = 60.0
#: Minutes that are kept.
MOST = 60


class Timeline:
    """Differences of totals, one a minute; they begin at 0.

    Args:
        now: seconds, of the beginning. bounds: upper ends of the classes of turns, seconds; the last class has none.
    """

    def __init__(self, now: float, bounds: Sequence[float]) -> None:
        self.rows: deque[MinuteRow] = deque(maxlen=MOST)
        self._bounds = (*bounds, *bounds[-1:])
        self._last = now, 0, 0, [0] * len(self._bounds)

    def look(self, now: float, ended: int, failed: int, turns: Sequence[int]) -> None:
        """The totals of this moment; nothing happens before a minute is over.

        Args:
            turns: how many turns of each class there were.
        """
        before, was_ended, was_failed, was_turns = self._last
        elapsed = now - before
        if elapsed < MINUTE:
            return
        longest = max((at for at, (new, old) in enumerate(zip(turns, was_turns, strict=True)) if new > old), default=-1)
        self.rows.append(
            MinuteRow(
                ended=(ended - was_ended) / elapsed,
                failed=(failed - was_failed) / elapsed,
                turn=self._bounds[longest] if longest >= 0 else 0.0,
            )
        )
        self._last = now, ended, failed, list(turns)
