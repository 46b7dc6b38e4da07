"""Resting: a greenlet whose turn is over stands in one line with all others of whom that is true.

The loop takes a few of them a round (`policy.turns` says how many and in which order), then looks at sockets and timers
again. So however many peers feed us for ever, whoever has only a byte to pass on waits for one round at the most. This
is the one way in which the program lets others run in the middle of its work.
"""

from __future__ import annotations

from collections.abc import Hashable
from time import monotonic
from typing import Any, Final

from gevent import get_hub, getcurrent

from proxy.policy.turns import MOST_A_ROUND, ROUND_SECONDS, Line

#: Seconds; a timer that is due at once. Not `loop.run_callback` and not `gevent.sleep(0)`: the loop runs 50 callbacks,
#: also those that are added meanwhile, before it looks at its watch and at its sockets.
_SHORTEST: Final = 1e-9
#: Seconds of a long work before others run.
TURN_SECONDS = 0.005


class TurnOver(Exception):
    """There is more to do, and it is the turn of others: rest, then call again. No edge will tell of it."""


class Turns:
    """The line of one loop. `rounds`: how often it was looked at."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._line: Line[Any] = Line()
        self._timer = hub.loop.timer(_SHORTEST, _SHORTEST)
        self.rounds = 0

    def __len__(self) -> int:
        return len(self._line)

    def rest(self, key: Hashable) -> None:
        """Let others run, sockets included, until it is the turn of this greenlet again."""
        line, me = self._line, getcurrent()
        assert me is not self._hub, "the hub cannot rest"
        line.add(key, me)
        if not self._timer.active:
            self._timer.start(self._round)
        try:
            while me in line:  # other wake-ups are only hints
                self._hub.switch()
        finally:
            line.leave(me)

    def _round(self) -> None:
        line = self._line
        self.rounds += 1
        ends = monotonic() + ROUND_SECONDS
        for _ in range(min(len(line), MOST_A_ROUND)):  # who rests again comes in the next round
            if not line:
                break
            line.next().switch()
            if monotonic() >= ends:
                break
        if not line:
            self._timer.stop()


class Breather:
    """Called after each small piece of a long work (`model.Breathe`): rests when the work has had its turn.

    Args:
        key: whose work it is, see `Turns.rest`.
    """

    __slots__ = ("_ends", "_key", "rests")

    def __init__(self, key: Hashable = None) -> None:
        self._key = key
        self._ends = monotonic() + TURN_SECONDS
        self.rests = 0

    def __call__(self) -> None:
        if monotonic() >= self._ends:
            self.rests += 1
            rest(self._key)
            self._ends = monotonic() + TURN_SECONDS


def turns() -> Turns:
    """The line of this thread's hub."""
    hub: Any = get_hub()
    found: Turns | None = getattr(hub, "proxy_turns", None)
    if found is None:
        found = hub.proxy_turns = Turns(hub)
    return found


def rest(key: Hashable = None) -> None:
    """See `Turns.rest`; None: it is nobody's in particular."""
    turns().rest(key)
