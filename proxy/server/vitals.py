"""What a process costs: its processor time, memory and descriptors, as the kernel says."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from proxy import __version__
from proxy.status.parts import ProcessPart

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICKS = os.sysconf("SC_CLK_TCK")
#: In /proc/self/stat, behind the name: starttime of proc_pid_stat(5).
_START_TIME = 19
#: Bytes that are enough for any file of /proc that is read here but one.
_ENOUGH = 1024


class Vitals:
    """Of this process.

    Args:
        number: 0: the master, or the only process; else the worker's.
        spare: lends held-back descriptors.
    """

    def __init__(self, number: int, spare: Callable[[], AbstractContextManager[None]]) -> None:
        self.number = number
        self._spare = spare
        self._started = _started()

    def look(self, open_connections: int) -> ProcessPart:
        """Now; quick, since it may be asked each second. What cannot be read (there may be no /proc) is 0."""
        part = ProcessPart(self.number, os.getpid(), __version__, self._started, time.process_time())
        part.most_descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        part.open_connections = open_connections
        with contextlib.suppress(OSError, ValueError, IndexError):
            try:
                self._read(part)
            except OSError:
                with self._spare():  # which costs 16 times as many calls
                    self._read(part)
        return part

    def _read(self, part: ProcessPart) -> None:
        virtual, resident = (int(pages) * _PAGE for pages in _read("/proc/self/statm").split()[:2])
        part.virtual, part.resident = virtual, resident
        part.descriptors = _descriptors()


def _descriptors() -> int:
    """Before Linux 6.2 they have to be counted one by one."""
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1


def _started() -> float:
    """Unix time."""
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        since_boot = float(_read("/proc/self/stat").rpartition(")")[2].split()[_START_TIME]) / _TICKS
        with open("/proc/stat", "rb") as file:
            booted = next(line for line in file if line.startswith(b"btime "))
        return float(booted.split()[1]) + since_boot
    return 0.0


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _ENOUGH).decode("ascii", "replace")
    finally:
        os.close(fd)
