"""Who shares the limits of a throttle store: the other proxies, what is kept for those that do not call, and its clock.

A proxy that cannot reach the store goes on with its share, and the store must not give that share to others meanwhile.
Neither can ask the other. So who calls says when it is here (`meet` of lease.lua); whoever is silent counts as one that
goes on alone, from before it may do so until the last slot that it may have given out is an interval old. What is kept
for it is decided here, by each caller for itself, from what the store says of all. docs/throttling.md has the proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from proxy.throttling.throttle import AHEAD, MICROSECOND, MILLISECOND, SECOND, Limit, interval, slack_range

#: A call is waited for so long; a later reply is as good as none.
CALL = 100 * MILLISECOND
#: A member that was not heard of for so long goes on alone, as far as the others know.
SILENT = 300 * MILLISECOND
#: What was heard of the members is used for so long.
VIEW = 200 * MILLISECOND
#: Without a successful call for so long a proxy goes on alone. At any moment from then on, all calls that the store
#: carries out rest on a view that is younger than VIEW and calls it silent.
ALONE = SILENT + VIEW
#: A share begins when no call of ours can be carried out any more, and ALONE has passed since.
SHARE = ALONE + CALL
#: Two clocks may differ by so much at once, and one may gain on the other so many nanoseconds a millisecond (200 ppm).
STEP = 50 * MILLISECOND
DRIFT = 5_000


class Member(NamedTuple):
    """A proxy, as the store knows it, in nanoseconds.

    Args:
        silent: since its last call. alone: since the last moment at which it may have given out slots of its share.
        told: of how many members it was told: its share is one part of so many; 0: it has none.
    """

    name: str
    silent: int
    alone: int
    told: int


class Clock:
    """The store's clock against ours: their difference lies between two bounds.

    A reply was written between the call and its receipt, so each narrows the difference down; drift widens it again. A
    reply outside of what is possible comes from a clock that was set.
    """

    __slots__ = ("_at", "_high", "_low", "_since")

    def __init__(self) -> None:
        self._at: int | None = None
        self._since = 0
        self._low = self._high = 0

    def forget(self) -> None:
        """What is known holds no more."""
        self._at = None

    def check(self, time: int, sent: int, received: int) -> bool:
        """Whether a reply with this time, in nanoseconds, can be true. If not, the clock was set, and is not known."""
        low, high = time - received, time - sent
        if self._at is not None:
            drift = max(0, received - self._at) // DRIFT
            before_low, before_high = self._low - drift, self._high + drift
            if high < before_low - STEP or low > before_high + STEP:
                self.forget()
                return False
            low, high = max(low, before_low), min(high, before_high)
            if low > high:  # within what is let pass; but a clock that creeps shall not take us along
                low, high = before_low, before_high
        else:
            self._since = received
        self._low, self._high, self._at = low, high, received
        return True

    def known(self, now: int) -> bool:
        """Whether `by` can be said: what was heard long ago is worth little."""
        return self._at is not None and now - self._at < 10 * SECOND

    def settled(self, now: int) -> bool:
        """Whether it went on in step for long enough.

        Who has just come does not know that a clock was set a moment ago, but the others have noticed by then, and the
        epoch is another one.
        """
        return self.known(now) and now - self._since >= SILENT

    def by(self, moment: int) -> int:
        """A time of the store, in its microseconds, that it reaches at `moment` of our clock or before."""
        return (moment + self._low) // MICROSECOND


def share(amount: int, told: int) -> int:
    """The part of one of so many members; 0: none."""
    return amount // told if told else 0


def least_burst(limit: Limit, told: int) -> int:
    """The burst of a limit that several proxies share: one that their shares have, too."""
    return max(1, min(limit.burst, share(limit.amount, told) - 1))


def left_for(limit: Limit, members: Sequence[Member], configured: int, age: int) -> int:
    """How much of a limit those who call may have, besides what is kept for those who do not; 0: nothing.

    Args:
        members: as the store knew them `age` nanoseconds ago, one of them we. configured: how many there should be.
    """
    amount, total = limit.amount, max(configured, len(members))
    kept = max(0, configured - len(members)) * share(amount, configured)
    here = taken = 0
    for member in members:
        part = share(amount, member.told)
        if member.silent > SILENT or member.alone + age < hold(limit, part, member.told):
            kept += part
        else:
            taken += part
        here += member.silent <= SILENT
    # What no share has, since it cannot be divided, is for the greater part of the members: of two stores that each
    # believe to be the only one, one at most has it.
    if here < total and 2 * here <= total:
        return max(0, min(amount - kept, taken))
    return max(0, amount - kept)


def hold(limit: Limit, part: int, told: int) -> int:
    """For how long after its last slot alone a share is kept, in nanoseconds."""
    if not part:
        return 0
    burst = least_burst(limit, told)
    slack = slack_range(limit.seconds)[1] + reserve(limit)
    return AHEAD + burst * interval(Limit(part, limit.seconds, burst), slack)


def reserve(limit: Limit) -> int:
    """What is added to the slack of a shared limit: a round trip, and what two clocks may differ in a window."""
    return CALL + 2 * STEP + limit.seconds * SECOND // DRIFT
