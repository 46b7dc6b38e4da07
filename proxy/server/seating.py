"""Who may have how many clients, where several processes share `max_connections`: the master's side, with its words.

The book is `policy.seats`; what a process does with its seats is `reception`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gevent import get_hub

from proxy.policy.seats import Seats, Word

#: Seconds until a process that does not give back what it need not have is not waited for any longer.
_ANSWERS_WITHIN = 2.0

#: Tells a process that it has so many seats more, or (None) that it is to give some back. Must not wait.
Tell = Callable[[int, int | None], object]


class Seating:
    """Args: processes: that share them. tell: see `Tell`."""

    def __init__(self, processes: int, tell: Tell) -> None:
        self._processes = processes
        self._tell = tell
        self._seats: Seats | None = None
        self._timer: Any = None

    def set_limit(self, limit: int | None) -> None:
        """So many for all of them; None: each has its own."""
        if limit is None:
            self._seats = None
        elif self._seats is None:
            self._seats = Seats(limit, self._processes)
        else:
            self._say(self._seats.set_limit(limit))

    def want(self, who: int, count: int) -> None:
        """A process needs so many more."""
        if self._seats is None:  # it will hear in a moment that it has its own
            self._tell(who, count)
        else:
            self._say(self._seats.want(who, count))

    def given_back(self, who: int, count: int) -> None:
        """It had been asked to."""
        if self._seats is not None:
            self._say(self._seats.given_back(who, count))

    def gone(self, who: int) -> None:
        """A process has ended."""
        if self._seats is not None:
            self._say(self._seats.gone(who))

    def stop(self) -> None:
        """Wait for nobody any more."""
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _say(self, words: list[Word]) -> None:
        for who, count in words:
            self._tell(who, count)
        if self._seats is None or not self._seats.waits:
            self.stop()
        elif self._timer is None:
            self._timer = get_hub().loop.timer(_ANSWERS_WITHIN)
            self._timer.start(self._hurry)

    def _hurry(self) -> None:
        self.stop()
        if self._seats is not None:
            self._say(self._seats.hurry())
