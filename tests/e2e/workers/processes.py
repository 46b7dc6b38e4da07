"""A proxy with workers, and its processes as a test sees them."""

from __future__ import annotations

import os
import re
from typing import Any

from tests.program import Proxy
from tests.waiting import wait_for

_SERVES = re.compile(r"worker: a worker serves worker=(\d+) pid=(\d+)")


class Workers(Proxy):
    """One run of it, which has begun when all its workers serve.

    Args: count: how many there are; the rest is `Proxy`'s.
    """

    def __init__(self, more: str = "", count: int = 2, **arguments: Any) -> None:
        super().__init__(f"workers {count}\n{more}", **arguments)
        self.count = count

    def __enter__(self) -> Workers:
        super().__enter__()
        try:
            self._wait(lambda: len(self.pids()) >= self.count, 60.0, "workers that serve")
        except BaseException:
            self._end()
            raise
        return self

    def pids(self) -> dict[int, int]:
        """Number → process, of those that have said that they serve, and are there."""
        found = {int(match[1]): int(match[2]) for line in list(self.lines) if (match := _SERVES.match(line))}
        return {number: pid for number, pid in found.items() if _runs(pid)}

    def replaced(self, number: int, pid: int) -> None:
        """Wait until another process serves in place of this one."""
        self._wait(lambda: self.pids().get(number, pid) != pid, 60.0, f"worker {number} is replaced")

    def family(self) -> set[int]:
        """All its processes."""
        return {self.pid, *children(self.pid)}


def children(pid: int) -> set[int]:
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    state, parent = file.read().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(parent) == pid and state != "Z":
                found.add(int(name))
    return found


def gone(pids: set[int]) -> None:
    """Wait until none of these is there."""
    wait_for(lambda: not [pid for pid in pids if _runs(pid)], what="no process is left")


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
