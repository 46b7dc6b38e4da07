"""Who lets permits lapse gets fewer: a flow's part of the slots is halved while they do, and comes back afterwards.

An instance that is further away than its permits live, or whose senders hang, would otherwise take its fair share for
ever and use none of it. Additive increase, multiplicative decrease, per flow: the part is in slots of the path's
slowest limit, and never nothing, since only permits can show that they are used again. Evidence is judged once a round,
the time in which the fate of a permit must have become known. Where nobody else waits, nothing is held back.

Pure: told what was granted, what lapsed, and the time.
"""

from __future__ import annotations

from typing import Final

from proxy.throttling.flows import WORD, Flow
from proxy.throttling.throttle import SECOND

#: All of the slots; the least part is one of so many.
WHOLE: Final = 32
#: What comes back for a round without a lapse.
STEP: Final = 2
#: One in so many permits may lapse without consequence.
TOLERATED: Final = 4
#: A client says what lapsed within a second, its manager looks each second.
REPORTED_WITHIN: Final = 2 * SECOND
#: Unused budget is kept for so long.
MEMORY: Final = SECOND


class Doubt:
    """One flow that let permits lapse.

    Attributes:
        part: of WHOLE.
        held: what the flow wants beyond what it may have now.
    """

    __slots__ = ("_at", "_budget", "_granted", "_judged", "_seen_at", "_trusted", "held", "part")

    def __init__(self, flow: Flow, now: int) -> None:
        self.part = WHOLE
        self.held = 0
        self._at = now
        self._budget = 0
        self._granted = flow.granted
        self._judged = self._trusted = flow.granted
        self._seen_at: int | None = None

    def halve(self, flow: Flow, received: int) -> None:
        """Too many lapsed of the flow's first `received` permits; those from before the last time do not count."""
        if received > self._judged or self.part == WHOLE:
            self.part = max(1, self.part // 2)
            self._judged = self._trusted = flow.granted
            self._seen_at = None

    def hold(self, flow: Flow, want: int) -> int:
        """How many of `want` the flow may have now; the others are held."""
        most = want if _alone(flow) else max(0, self._budget // max(1, _interval(flow)))
        self.held = max(0, want - most)
        return min(want, most)

    def refresh(self, flow: Flow, now: int, round_trip: int) -> bool:
        """Let time pass. Whether there is no doubt any more: what it holds is to be wanted again."""
        step = _interval(flow)
        kept = max(step, MEMORY * self.part // WHOLE)
        self._budget = min(kept, self._budget + (now - self._at) * self.part // WHOLE)
        self._budget -= (flow.granted - self._granted) * step
        self._at, self._granted = now, flow.granted
        if self._seen_at is None:
            if flow.granted > self._trusted:
                self._seen_at = now
        elif now >= self._seen_at + flow.path.slack + round_trip + REPORTED_WITHIN:
            self.part += STEP
            self._trusted = flow.granted
            self._seen_at = None
        return self.part >= WHOLE


def lapsed_too_many(lapsed: int, received: int) -> bool:
    """Whether so many of the permits received since the last report are more than chance."""
    return 0 < lapsed <= received + TOLERATED and lapsed * TOLERATED >= received


def since(last: int, count: int) -> int:
    """How far a count modulo 2**32 has gone on; a jump back is none."""
    gone = (count - last) % WORD
    return gone if gone < WORD // 2 else 0


def _alone(flow: Flow) -> bool:
    """Whether nobody else waits at any throttle of its path."""
    own = flow.queued is not None
    return all(each.slots is None or each.slots.waiting <= own for each in flow.path.throttles)


def _interval(flow: Flow) -> int:
    return max([window.interval for throttle in flow.path.throttles for window in throttle.windows], default=0)
