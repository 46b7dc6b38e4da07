"""Telling everybody whose flows pass a throttle that its limits have changed: a few at once, many by and by.

A throttle may have 100,000 flows, and a frame of an instance may change it a hundred times. So who has many is only
noted; `step` tells some of them, and what changes meanwhile is told in another round. Until it is a flow's turn, its
permits must not overtake its limits, which say how long they are usable: `owes` tells of which paths that is true.
"""

from __future__ import annotations

from collections.abc import Iterator

from proxy.throttling.dispenser import Dispenser
from proxy.throttling.flows import Flow, Path, Terms, Throttle

#: Flows that are told in the same call, and in one step.
AT_ONCE = 100
STEP = 300


class Teller:
    """What is to be told, and to whom it still is. A flow that is not there any more is told nothing."""

    def __init__(self, dispenser: Dispenser) -> None:
        self._dispenser = dispenser
        self._rounds: dict[Throttle, Iterator[Flow] | None] = {}  # None: not begun
        self._again: set[Throttle] = set()

    def __bool__(self) -> bool:
        """Whether there is more to do: `step` is due."""
        return bool(self._rounds)

    def flow(self, flow: Flow) -> None:
        """The receiver of this flow is to be told the limits in force."""
        flow.receiver.limits[flow] = None
        self._dispenser.touched[flow.receiver] = None

    def all_of(self, throttle: Throttle) -> None:
        """All flows that pass this throttle."""
        terms = throttle.terms
        assert terms is not None
        if self._rounds.get(throttle) is not None:
            self._again.add(throttle)
        elif len(terms) > AT_ONCE:
            self._rounds[throttle] = None
        else:
            for flow in terms:
                self.flow(flow)

    def owes(self, path: Path) -> bool:
        """Whether limits of this path may have to be told before a permit."""
        rounds = self._rounds
        return bool(rounds) and any(throttle in rounds for throttle in path.throttles)

    def step(self, most: int = STEP) -> None:
        """Tell some."""
        while most > 0 and self._rounds:
            throttle, flows = next(iter(self._rounds.items()))
            if flows is None:
                assert throttle.terms is not None
                flows = self._rounds[throttle] = _present(throttle.terms)
            for flow in flows:
                self.flow(flow)
                most -= 1
                if most <= 0:
                    return
            del self._rounds[throttle]
            if throttle in self._again:
                self._again.discard(throttle)
                self._rounds[throttle] = None  # behind the others


def _present(terms: Terms) -> Iterator[Flow]:
    """The flows, by and by; some may come and go meanwhile. Who comes is told by whoever lets it in."""
    for stake in list(terms.stakes):
        for flow in stake.flows():
            if flow in stake:
                yield flow
