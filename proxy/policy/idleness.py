"""When a connection has been idle for too long, as housekeeping sees it now and then. Time is an argument.

The relay's pairs have the same rule in their engine (`relay.Pair.idle_for`), whose loop knows nothing of objects.
"""

from __future__ import annotations

from typing import Protocol

from proxy.model import Ending


class Patience(Protocol):
    """The directives of these names; seconds."""

    @property
    def idle_timeout(self) -> float: ...
    @property
    def half_close_timeout(self) -> float: ...


class Idleness:
    """One connection's. Idle is who moves no byte either way, and whose sides neither close."""

    __slots__ = ("_progress", "_since")

    def __init__(self) -> None:
        self._progress = -1
        self._since = 0.0

    def over(self, moved: int, half_closed: bool, patience: Patience, now: float, busy: bool = False) -> Ending | None:
        """Why it is to end now, or None.

        Args:
            moved: bytes so far, of both directions.
            half_closed: one side has closed, and the other has not.
            busy: it does something that has a deadline of its own.
        """
        progress = moved + half_closed
        if busy or progress != self._progress:
            self._progress, self._since = progress, now
            return None
        idle = now - self._since
        if idle >= patience.idle_timeout:
            return Ending.IDLE_TIMEOUT
        return Ending.HALF_CLOSE_TIMEOUT if half_closed and idle >= patience.half_close_timeout else None
