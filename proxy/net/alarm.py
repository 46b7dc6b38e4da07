"""Deadlines for many greenlets for the price of one timer: coarse, late by a tick at most, cheap to start and cancel.

Almost every deadline of a handshake or a connect is cancelled. A gevent.Timeout costs such a one 2.6 µs, an alarm
0.75 µs. What a deadline is for, and what its passing means, is the caller's.
"""

from __future__ import annotations

from time import monotonic
from typing import Any, Final

from gevent import getcurrent

#: Seconds. The timer runs only while there are alarms.
TICK: Final = 0.1


class TimeIsUp(BaseException):
    """A deadline has passed: thrown into the greenlet that set it, as `gevent.Timeout` is.

    Not an Exception, so that no `except Exception` on the way takes it for an error. Whoever catches it compares
    `alarm` with its own: another's must go on.
    """

    def __init__(self, alarm: Alarm) -> None:
        super().__init__()
        self.alarm = alarm


class Alarm:
    """One deadline; of whom it is thrown into."""

    __slots__ = ("_bucket", "greenlet")

    def __init__(self, greenlet: Any, bucket: dict[Alarm, None]) -> None:
        self.greenlet = greenlet
        self._bucket = bucket
        bucket[self] = None

    @property
    def pending(self) -> bool:
        """Whether it will go off."""
        return self in self._bucket

    def cancel(self) -> None:
        """Forget it; also after it went off."""
        self._bucket.pop(self, None)


class Alarms:
    """All deadlines of one loop, in buckets of a tick.

    Args:
        loop: gevent's.
    """

    def __init__(self, loop: Any) -> None:
        self._buckets: dict[int, dict[Alarm, None]] = {}
        self._timer = loop.timer(TICK, TICK)
        self._running = False

    def start(self, seconds: float, whose: Any = None) -> Alarm:
        """A deadline, `seconds` from now.

        Args:
            whose: what has a `throw` for it, as a greenlet has; None: the running greenlet.
        """
        tick = int((monotonic() + seconds) / TICK) + 1
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = {}
            if not self._running:
                self._running = True
                self._timer.start(self._ring)
        return Alarm(whose or getcurrent(), bucket)

    def _ring(self) -> None:
        now = int(monotonic() / TICK)
        for tick in [tick for tick in self._buckets if tick <= now]:
            bucket = self._buckets[tick]
            while bucket:  # what a greenlet lets out ends this call; the next one goes on
                alarm, _ = bucket.popitem()
                alarm.greenlet.throw(TimeIsUp(alarm))
            del self._buckets[tick]
        if not self._buckets:
            self._running = False
            self._timer.stop()

    def stop(self) -> None:
        """For the end of the program, and for tests."""
        self._timer.stop()
        self._timer.close()
