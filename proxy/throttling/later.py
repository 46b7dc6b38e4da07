"""What is said to a manager while it is frozen: calls that wait, in their order (see `handover`)."""

from __future__ import annotations

from collections.abc import Callable


class Later:
    """Calls that wait. Each takes the time at which it is made at last, in nanoseconds."""

    def __init__(self, calls: list[Callable[[int], object]] | None = None) -> None:
        self.calls: list[Callable[[int], object]] = calls or []
        self._kept = True

    def append(self, call: Callable[[int], object]) -> None:
        if self._kept:
            self.calls.append(call)

    def put_first(self, call: Callable[[int], object]) -> None:
        if self._kept:
            self.calls.insert(0, call)

    def drop(self) -> None:
        """Nobody will ever make them: keep none, and none that comes."""
        self.calls.clear()
        self._kept = False
