"""The parts of a manager, and what the work of one means for another.

Slots, places, the registry, the desk, the audit and the adviser know nothing of each other, or little. Whoever has let
one of them work says so here (`_settle`), and which throttles are in use is kept here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from proxy.throttling.advice import Adviser
from proxy.throttling.audit import Audit
from proxy.throttling.blocks import Blocks, NoRules, Rules
from proxy.throttling.cluster import Cluster
from proxy.throttling.desk import Desk
from proxy.throttling.dispenser import Dispenser
from proxy.throttling.estate import Record
from proxy.throttling.flows import Flow, Throttle
from proxy.throttling.later import Later
from proxy.throttling.overrides import Overrides
from proxy.throttling.places import PlaceBook
from proxy.throttling.registry import Registry
from proxy.throttling.session import Session
from proxy.throttling.throttle import SECOND, Key
from proxy.throttling.wheel import Wheel

#: Departed flows are cleared away, and throttles that fall due together are served, this many at a time, so that a
#: session with 100,000 paths stops nobody.
SWEEP: Final = 100
#: Records of a kind that are taken for one delivery; the others wait their turn.
DELIVERY: Final = 500


class Core:
    """All parts. The arguments are `manager.Manager`'s."""

    def __init__(
        self,
        incarnation: int,
        start: int,
        enforce: bool = False,
        blocks: Rules | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        self.cluster = cluster
        self.incarnation = incarnation
        self.enforce = enforce
        self.overrides = Overrides()
        self.blocks = Blocks(blocks or NoRules(), start, self.overrides, cluster)
        self._audit = Audit(start)
        self._dispenser = Dispenser()
        self._book = PlaceBook(self._shut)
        self._registry = Registry(start, self._dispenser, self._book, self.overrides, cluster)
        self._desk = Desk(self._dispenser, self._registry)
        self._adviser = Adviser()
        self._active: set[Throttle] = set()
        self._debts: Wheel[Throttle] = Wheel(SECOND)  # throttles that are active, as far as is known, for debt alone
        self._held: Later | None = None  # calls that wait, while it is frozen: see `handover`
        self._meanwhile: list[Record] = []  # what others have to know of that time

    @property
    def throttles(self) -> Mapping[Key, Throttle]:
        """Those that instances have named, by key; to be read only."""
        return self._registry.throttles

    def active_throttles(self, now: int) -> int:
        """Keys with demand, places in use or unexpired debt (which is looked at once a second)."""
        self._drop_idle(now)  # all of them: a few, since it is done all the time
        return len(self._active)

    def waiting_messages(self) -> list[tuple[str, tuple[Throttle, ...], int]]:
        """Messages that the proxy itself asks slots for: whose, under which throttles, how many."""
        return [(name, throttles, len(clerk.tickets)) for (name, throttles), clerk in self._desk.clerks.items()]

    def _drop_idle(self, now: int, most: int | None = None) -> None:
        """Look at throttles that nobody waits under or uses any more, or whose debt should be paid."""
        throttles = self._debts.expire(now, most)
        for idle in (self._dispenser.idle, self._book.idle):
            while idle and len(throttles) != most:
                throttles.append(idle.pop())
        for throttle in throttles:
            if not throttle.busy(now):
                self._active.discard(throttle)
            elif not throttle.in_use() and throttle in self._active:
                self._debts.arm(throttle, throttle.debt_until())

    def _shut(self, flow: Flow) -> bool:
        """Whether connections of this flow wait for itself."""
        return flow.paused or (self.enforce and flow.fine > 0)

    def _settle(self, now: int) -> None:
        """Pass on what one part's work means for another."""
        if self._held is not None:
            return
        if self._desk.clerks:
            self._desk.settle(now)
        while self._dispenser.paid:
            self._book.retry(self._dispenser.paid.pop(), now)
        crowded = self._book.crowded
        if crowded:
            for throttle in crowded:
                self._adviser.crowded(throttle, now)
            crowded.clear()
        given = self._adviser.given
        if given:
            for flow in given:
                session = flow.receiver
                if flow.cap is not None and isinstance(session, Session):
                    session.caps[flow.id] = flow.cap[0]
                    self._dispenser.touched[session] = None
            given.clear()
