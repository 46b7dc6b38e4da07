"""Which of several proxies is used. Pure: what became of each, the time and the luck are told.

The first of the list that answers is used. When it is lost, or says "not now", the next one is, at once; and the
better one again when it has answered for a while. That while is its rest: drawn by luck between once and twice its
pause, so that a thousand MTAs do not come back in one moment, and the pause doubles each time the proxy fails soon
after, so that one that comes and goes is not followed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: The longest pause in seconds; a proxy that was used as long as that begins with the shortest again.
LONGEST_PAUSE = 300.0
#: Seconds at the beginning in which a worse proxy waits for a better one whose first attempt is not over.
GRACE = 1.0


@dataclass(slots=True)
class _Standing:
    """What is known of one proxy.

    Attributes:
        up: a session with it stands. looked: the first attempt is over, however it ended.
        leaving: it wants nothing new of us, until the session is made anew.
        pause: seconds; its rest, which ends at `rest_until`, is once to twice as long.
    """

    pause: float
    up: bool = False
    looked: bool = False
    leaving: bool = False
    rest_until: float = 0.0

    @property
    def fit(self) -> bool:
        return self.up and not self.leaving


@dataclass(slots=True)
class Choice:
    """Args:
    count: how many proxies there are; they are named by their places in the list.
    first_pause: seconds.
    began: now. Times are seconds of one clock that never goes back.

    Attributes:
        current: the one that is used, None: there is none.
    """

    count: int
    first_pause: float
    began: float
    current: int | None = None
    _since: float = 0.0
    _used: bool = False
    _all: list[_Standing] = field(init=False)

    def __post_init__(self) -> None:
        self._all = [_Standing(self.first_pause) for _ in range(self.count)]

    def came(self, which: int, now: float, luck: float) -> None:
        """A session with it stands. luck: from 0 to 1."""
        proxy = self._all[which]
        proxy.up = proxy.looked = True
        proxy.leaving = False
        proxy.rest_until = now + proxy.pause * (1 + luck)

    def went(self, which: int, now: float) -> None:
        """The attempt, or the session, is over."""
        proxy = self._all[which]
        if which == self.current and proxy.fit:
            self._failed(proxy, now)
        proxy.up = proxy.leaving = False
        proxy.looked = True

    def leaves(self, which: int, now: float) -> None:
        """It said that it goes away, or "not now": another one is better, if there is any."""
        proxy = self._all[which]
        if which == self.current and proxy.fit:
            self._failed(proxy, now)
        proxy.leaving = True

    def decide(self, now: float) -> int | None:
        """`current` for now. To be asked after each change, and at `look_again`."""
        best = self._best(now)
        if best != self.current:
            self.current, self._since = best, now
            self._used |= best is not None
        return best

    def look_again(self, now: float) -> float | None:
        """When `decide` may say something else though nothing happens; None: never."""
        better = self._all[: self.current] if self.current is not None else []
        moments = [proxy.rest_until for proxy in better if proxy.fit]
        if not self._used:
            moments.append(self.began + GRACE)
        return min((moment for moment in moments if moment > now), default=None)

    def _best(self, now: float) -> int | None:
        fit = [which for which, proxy in enumerate(self._all) if proxy.fit]
        rested = [which for which in fit if self._all[which].rest_until <= now]
        if self.current in fit:
            return min([self.current, *rested])
        if not self._used:
            early = now < self.began + GRACE
            fit = [which for which in fit if not early or all(proxy.looked for proxy in self._all[:which])]
            return min(fit, default=None)
        if fit:
            return min(rested or fit)
        return self.current if self.current is not None and self._all[self.current].up else None

    def _failed(self, proxy: _Standing, now: float) -> None:
        lasted = now - self._since >= LONGEST_PAUSE
        proxy.pause = self.first_pause if lasted else min(proxy.pause * 2, LONGEST_PAUSE)
