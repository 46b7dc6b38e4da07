"""Waiting for a receiver that takes nothing, on behalf of a client of which nothing is read: it is probed now and then.

When is decided by `policy.idleness`; what a probe is, is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from proxy.net.alarm import TimeIsUp
from proxy.net.relay import Engine
from proxy.policy.idleness import PROBE_AFTER, Standstill


class Prober:
    """One client's.

    Args:
        probe: say something that means nothing to a client that lives; must not wait. What it raises ends the waiting.
    """

    def __init__(self, engine: Engine, probe: Callable[[], None]) -> None:
        self._alarms = engine.alarms
        self._probe = probe
        self._standstill = Standstill()

    def wait(self, moved: int, wait: Callable[[], None]) -> None:
        """Wait as `wait` does, but no longer than until the next probe is due; the caller looks around and calls again.

        Args:
            moved: see `Standstill.due_in`.
        """
        left = self._standstill.due_in(moved, monotonic())
        if not left:
            self._probe()
            left = PROBE_AFTER
        alarm = self._alarms.start(left)
        try:
            wait()
        except TimeIsUp as fired:
            if fired.alarm is not alarm:
                raise
        finally:
            alarm.cancel()
