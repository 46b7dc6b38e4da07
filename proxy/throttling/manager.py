"""The throttle manager: sessions, the paths they name, demand, grants, outcomes, connection places. docs/throttling.md.

Everything is a call with the time in it, nothing polls: `next_wakeup` says when `advance` is due, one timer is enough.
What follows from a call piles up until it is collected: `take_ready` (sessions that have something to send, see
`Session.take`), `take_admitted` (tickets that got their places), `take_ended` (sessions whose connection is to be
closed), `take_notices` (for the log). Frames, sockets and proof of identity are `control`'s and `native`'s; the
arithmetic is in `throttle`, `dispenser`, `places` and `limits`.

The calls are those of one object and stand in five files, each of which knows those before it: `core` (the parts),
`attendance` (sessions), `statements` (what they say), `requests` (places and messages), `handover` (from one process to
another). Here are time, settings, and what receivers reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from proxy.throttling.blocks import Rules
from proxy.throttling.cluster import Answer, Ask, Cluster
from proxy.throttling.core import SWEEP
from proxy.throttling.flows import Throttle
from proxy.throttling.handover import Handover
from proxy.throttling.overrides import Override
from proxy.throttling.registry import Remark
from proxy.throttling.wheel import NEVER, Bell, Wheel


class Manager(Handover):
    """All throttles of this proxy.

    Args:
        incarnation: names this run of the manager.
        start: when it began, in nanoseconds of the clock that all calls use. What came before is unknown, so every
            limit begins as if its last slot had been given out at that moment.
        enforce: `throttle_enforce`: messages sent without a permit are paid for before the next connection.
        blocks: the proxy's own throttles.
        cluster: of the proxies that some limits hold for together; None: there is no store for them.
    """

    def __init__(
        self,
        incarnation: int,
        start: int,
        enforce: bool = False,
        blocks: Rules | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        super().__init__(incarnation, start, enforce, blocks, cluster)
        self._wheels: tuple[Wheel[Any], ...] = (
            self._dispenser.wheel,
            self._dispenser.fine,
            self._desk.wheel,
            self._book.wheel,
            self._adviser.wheel,
            self._audit.wheel,
            self._pings,
            self._registry.leases,
            self._registry.backoffs,
            self._registry.forgetting,
            self.blocks.backoffs.wheel,
            self.overrides.wheel,
            self._former,
        )
        self._bell = Bell()
        for wheel in self._wheels:
            wheel.bell = self._bell

    def end_backoff(self, name: str, now: int) -> int | None:
        """End the back-offs of a block by hand; of how many throttles. None: there is no such block."""
        self._need_thawed()
        if not self.blocks.has(name):
            return None
        count = self.blocks.end_backoff(name, now)
        self._relook(self.blocks.come_back(now, SWEEP), now)
        self._settle(now)
        return count

    def names(self) -> Iterator[set[str]]:
        """Of the throttles that instances have named, some at a time."""
        for piece in self._registry.throttles.pieces:
            yield {key.name for key in piece}

    def set_by_hand(self, override: Override, now: int) -> int:
        """Lower limits, or a pause, for a time; its number."""
        self._need_thawed()
        number = self.overrides.add(override)
        self._overridden([override])
        self._look_at_hand(now)
        return number

    def end_by_hand(self, fits: Callable[[int, Override], bool], now: int) -> int:
        """End those that fit before their time; how many."""
        self._need_thawed()
        ended = self.overrides.end(fits)
        self._overridden(ended)
        self._look_at_hand(now)
        return len(ended)

    def turn_day(self, day: int, now: int) -> None:
        """It is this day, counted from 1970-01-01: warm-ups follow the calendar."""
        if self._held is not None:
            self._held.append(lambda later: self.turn_day(day, later))
            return
        self.blocks.turn_day(day)
        self._refresh(now)
        self._settle(now)

    def reload(self, enforce: bool, blocks: Rules, now: int) -> None:
        """New settings; places, debts and sessions stay."""
        self._need_thawed()
        if self.enforce and not enforce:
            self._pardon(now)
        self.enforce = enforce
        self.blocks.reload(blocks, now)
        self._refresh(now)
        self._settle(now)

    def ask_store(self, now: int, identity: Callable[[bytes], str]) -> list[Ask]:
        """What to ask the throttle store, to be sent at once; see `Cluster.begin`. Not without a cluster."""
        assert self.cluster is not None
        if self._held is not None:  # whoever comes after us asks
            return []
        asks, changed = self.cluster.begin(now, identity)
        self._changed_elsewhere(changed, now)
        return asks

    def store_answered(self, asks: Sequence[Ask], answers: Sequence[Answer], sent: int, now: int) -> None:
        """What became of it; `sent`: the time that was given to `ask_store`."""
        assert self.cluster is not None
        changed = self.cluster.finish(asks, answers, sent)
        if self._held is None:
            self._changed_elsewhere(changed, now)

    def advance(self, now: int) -> None:
        """Do what is due."""
        if self._thawing:
            self._go_on(now)
        if self._held is not None:
            return
        for session in self._pings.expire(now):
            self._ping(session, now)
        for throttle in self._registry.backoffs.expire(now, SWEEP):
            self._registry.relimit(throttle, now)
        self._overridden(self.overrides.expire(now, SWEEP))
        self._registry.step(now)
        for throttle, name in self._registry.leases.expire(now, SWEEP):
            self._registry.end_lease(throttle, name, now)
        self._sweep(now)
        self._stretch(now)
        self._refresh(now)
        self._relook(self.blocks.come_back(now, SWEEP), now)
        self._registry.teller.step()
        self._dispenser.resume(now)
        self._serve_counted(now)
        self._dispenser.expire(now, SWEEP)
        self._desk.expire(now, SWEEP)
        self._settle(now)
        self._adviser.expire(now, SWEEP)
        self._audit.expire(now, SWEEP)
        for throttle in self._registry.forgetting.expire(now, SWEEP):
            self._registry.forget(throttle, now)
        self._drop_idle(now, SWEEP)
        self._outlive(now)
        self._settle(now)

    def next_wakeup(self) -> int | None:
        """When `advance` is due, in nanoseconds; in the past: at once; None: not before the next call."""
        if self._held is not None:
            return 0 if self._thawing else None
        if self._in_the_middle():
            return 0
        due = min([due for wheel in self._wheels if (due := wheel.next_wakeup()) is not None], default=None)
        self._bell.due = NEVER if due is None else due
        return due

    def wakes_before(self, moment: int) -> bool:
        """Whether `next_wakeup` may be before `moment`: no costs no look at the wheels, yes may be too cautious."""
        if self._held is not None:
            return self._thawing
        return self._bell.due < moment or self._in_the_middle()

    def _in_the_middle(self) -> bool:
        """Whether there is work that is not finished."""
        return bool(
            self._departed
            or self._stretching
            or self._registry.teller
            or self._registry.unfinished
            or self._dispenser.unfinished
            or self.blocks.stale
        )

    @property
    def has_notices(self) -> bool:
        return bool(self._registry.remarks or self._audit.remarks or self.blocks.backoffs.remarks)

    @property
    def has_news(self) -> bool:
        """Whether `take_ready` or one of the others has something."""
        book = self._book
        return bool(self._dispenser.touched or book.admitted or self._desk.granted or book.blocked or self._ended)

    @property
    def has_answers(self) -> bool:
        """Whether one of `take_admitted`, `take_granted`, `take_blocked`, `take_ended` has something."""
        return bool(self._book.admitted or self._desk.granted or self._book.blocked or self._ended)

    def take_notices(self) -> list[Remark]:
        remarks: list[Remark] = []
        for part in (self._registry, self._audit, self.blocks.backoffs):
            remarks += part.remarks
            part.remarks = []
        return remarks

    @property
    def unpermitted(self) -> int:
        """Messages that were sent without a permit."""
        return self._audit.unpermitted

    # --- steps ---

    def _serve_counted(self, now: int) -> None:
        """The proxy's own throttles whose slots have come: for a connection and for a message by turns."""
        due = self._book.wheel.expire(now, SWEEP) + self._dispenser.fine.expire(now, SWEEP)
        for throttle in dict.fromkeys(due):
            if throttle.taken % 2:
                self._dispenser.serve(throttle, now)
            self._book.pump(throttle, now)
            self._dispenser.serve(throttle, now)

    def _overridden(self, overrides: Iterable[Override]) -> None:
        """Something was set by hand, or is over: it reaches the throttles by and by."""
        for override in overrides:
            self.blocks.overridden(override)
            self._registry.overridden(override)

    def _changed_elsewhere(self, throttles: Iterable[Throttle], now: int) -> None:
        """The store has granted something, or does not answer any more."""
        self._relook(throttles, now)
        self._settle(now)

    def _look_at_hand(self, now: int) -> None:
        self._registry.step(now)
        self._refresh(now)
        self._settle(now)

    def _pardon(self, now: int) -> None:
        """Messages without a permit are only counted from now on."""
        for session in self.sessions.values():
            for flow in session.flows.values():
                if flow.fine:
                    flow.want -= flow.fine
                    flow.fine = 0
                    self._dispenser.paid.append(flow)

    def _refresh(self, now: int) -> None:
        """New settings reach some more of the proxy's own throttles."""
        self._relook(self.blocks.refresh(now, SWEEP), now)
