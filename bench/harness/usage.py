"""What a single process has used, for workloads that are driven from Python."""

from __future__ import annotations

import time


def process_cpu(pid: int) -> float:
    """CPU seconds of one process, all its threads, in nanosecond steps (clock_getcpuclockid(3) in Python)."""
    return time.clock_gettime((~pid << 3) | 2)
