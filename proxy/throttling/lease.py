"""The MTA's side of throttling: the permits it holds on one path, and when to tell the manager what it wants.

A permit may be used from `not_before` to `use_by`, both on this machine's clock; the clocks of two machines are never
compared. `not_before` counts from the receipt of the grant, which is not before it was sent; `use_by` counts from this
side's own ping that the grant names, which is not after: so a stalled link voids permits instead of releasing a burst.
Pure: the clock is an argument. It must be one that goes on while the machine or the process is stopped
(CLOCK_BOOTTIME), and `Permit.usable` must be asked again right before MAIL FROM.
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace
from typing import Final, NamedTuple

MICROSECOND: Final = 1_000
WORD: Final = 1 << 32
#: Changes of demand are sent at most this often, except to and from zero.
COALESCE: Final = 10_000_000
#: Permits that lapsed are told this often.
TELL_LAPSED: Final = 1_000_000_000


class Permit(NamedTuple):
    """Allows one message, once: the `serial`th of its session. Times in nanoseconds of the client's clock."""

    not_before: int
    use_by: int
    serial: int

    def usable(self, now: int) -> bool:
        return self.not_before <= now <= self.use_by


class _Run(NamedTuple):
    """`n` permits; the first is usable until `use_by`, each next one `step` later."""

    use_by: int
    serial: int
    not_before: int
    n: int
    step: int
    returnable: bool


class Lease:
    """The permits of one path in one session.

    Attributes:
        slack_us: d, as the last LIMIT said; 0: not yet known, and no permit is usable without it.
        got: permits received so far in this session; sent with DEMAND modulo 2**32.
        voided: permits that came too late or grew too old.
    """

    __slots__ = ("_count", "_runs", "got", "slack_us", "voided")

    def __init__(self) -> None:
        self.slack_us = 0
        self.got = 0
        self.voided = 0
        self._runs: list[_Run] = []
        self._count = 0

    def __len__(self) -> int:
        """Permits at hand, some of them perhaps too old by now."""
        return self._count

    def granted(
        self,
        n: int,
        first_offset_us: int,
        step_us: int,
        ping_t_us: int,
        hold_us: int,
        received: int,
        now: int,
        use_by_us: int = 0,
    ) -> None:
        """A record of a GRANT frame, in the order of arrival.

        Args:
            ping_t_us, hold_us: as the frame says: the time of this side's ping, and how long the manager had it.
            received: when the frame arrived, in nanoseconds.
            use_by_us: as the record says, for the first of them; 0: it does not, and `slack_us` is needed.
        """
        known = self.slack_us or use_by_us
        use_by = (use_by_us or ping_t_us + hold_us + first_offset_us + self.slack_us) * MICROSECOND
        not_before = received + first_offset_us * MICROSECOND
        if known and not_before <= use_by:  # else the frame was under way for longer than d
            heappush(self._runs, _Run(use_by, self.got, not_before, n, step_us * MICROSECOND, True))
            self._count += n
        else:
            self.voided += n
        self.got += n
        self._expire(now)

    def take(self, now: int) -> Permit | None:
        """A permit that is usable now; it is gone from here."""
        self._expire(now)
        if not self._runs or self._runs[0].not_before > now:
            return None
        run = self._runs[0]
        self._skip(1)
        return Permit(run.not_before, run.use_by, run.serial)

    def at_hand(self, now: int) -> int:
        """How many permits are not too old now."""
        self._expire(now)
        return self._count

    def lapses_at(self) -> int | None:
        """The first moment at which the next permit will be too old, None if there is none."""
        return self._runs[0].use_by + 1 if self._runs else None

    def next_at(self, now: int) -> int | None:
        """When the next permit can be used, None if there is none."""
        self._expire(now)
        return max(now, self._runs[0].not_before) if self._runs else None

    def give_back(self, now: int) -> list[tuple[int, int]]:
        """Nothing is left to send: the permits at hand as (first, n) for RETURN, and they are gone from here."""
        self._expire(now)
        runs, self._runs, self._count = self._runs, [], 0
        return [(run.serial % WORD, run.n) for run in sorted(runs, key=_serial) if run.returnable]

    def reconnected(self) -> None:
        """A new session: its counts begin anew. Permits at hand stay usable, but can no longer be returned."""
        self.got = self.voided = 0
        self._runs = [run._replace(returnable=False) for run in self._runs]  # in the same order

    def _expire(self, now: int) -> None:
        while self._runs and self._runs[0].use_by < now:
            run = self._runs[0]
            old = min(run.n, -(-(now - run.use_by) // run.step)) if run.step else run.n
            self.voided += old
            self._skip(old)

    def _skip(self, n: int) -> None:
        """Drop the first `n` permits of the first run."""
        use_by, serial, not_before, left, step, returnable = self._runs[0]
        self._count -= n
        if left > n:
            run = _Run(use_by + n * step, serial + n, not_before + n * step, left - n, step, returnable)
            heapreplace(self._runs, run)
        else:
            heappop(self._runs)


def _serial(run: _Run) -> int:
    return run.serial


class Demand:
    """When to send a DEMAND for one path: at once to and from zero, else when the manager is more than 25 % off.

    And within a second when more permits have lapsed than it has been told.
    """

    __slots__ = ("_got", "_lapsed", "_sent_at", "_want")

    def __init__(self) -> None:
        self._lapsed = 0
        self._want = 0
        self._got = 0
        self._sent_at: int | None = None

    def due_at(self, want: int, got: int, now: int, lapsed: int = 0) -> int | None:
        """When to send; None: not at all.

        Args:
            want: messages that are ready without a permit. got: permits received. lapsed: how many of them for nothing.
        """
        due = self._figures_due_at(want, got, now)
        if lapsed == self._lapsed or self._sent_at is None:
            return due
        telling = max(now, self._sent_at + TELL_LAPSED)
        return telling if due is None else min(due, telling)

    def _figures_due_at(self, want: int, got: int, now: int) -> int | None:
        believed = max(0, self._want - (got - self._got))
        if want == believed or (want and believed and abs(want - believed) * 4 <= believed):
            return None
        if self._sent_at is None or not want or not believed:
            return now
        return max(now, self._sent_at + COALESCE)

    def sent(self, want: int, got: int, now: int, lapsed: int = 0) -> None:
        self._want, self._got, self._sent_at, self._lapsed = want, got, now, lapsed

    def reconnected(self) -> None:
        """A new manager or session knows of no demand."""
        self._want = self._got = self._lapsed = 0
        self._sent_at = None
