"""The clock of limits."""

from __future__ import annotations

import time


def clock_ns() -> int:
    """Nanoseconds of a clock that never steps and goes on while the machine is suspended."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
