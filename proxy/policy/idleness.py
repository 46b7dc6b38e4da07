"""When a connection has been idle for too long, as housekeeping sees it now and then, and when one that stands still is
to be probed. Time is an argument.

The relay's pairs have the same rule in their engine (`relay.Pair.idle_for`), whose loop knows nothing of objects.
"""

from __future__ import annotations

from typing import Protocol

from proxy.model import Ending

#: Seconds without a byte until a client of which nothing is read is probed, and from one probe to the next.
PROBE_AFTER = 5.0


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


class Standstill:
    """One connection's, while the receiver holds back what the client sent.

    Nothing of the client is read meanwhile, and its end may stand behind more than there is room for: it is not seen,
    but for a probe that it answers.
    """

    __slots__ = ("_moved", "_since")

    def __init__(self) -> None:
        self._moved = -1
        self._since = 0.0

    def due_in(self, moved: int, now: float) -> float:
        """Seconds until the client is to be probed; 0: now, and then again in `PROBE_AFTER`.

        Args:
            moved: bytes so far, of both directions, probes not counted.
        """
        if moved != self._moved:
            self._moved, self._since = moved, now
        left = self._since + PROBE_AFTER - now
        if left > 0:
            return left
        self._since = now
        return 0.0
