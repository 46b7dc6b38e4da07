"""Slots that come back, and those that must not: an instance returns permits, or the slack of a path has grown.

What comes back goes to somebody else on the same path as the same slot, as far as there is life in it; nothing is
refunded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from proxy.throttling.flows import WORD, Flow, Path, Run
from proxy.throttling.giving import Giver
from proxy.throttling.throttle import TICK

#: No permit is usable longer than this after its slot.
LONGEST_SLACK: Final = 2_000_000_000


class Returns(Giver):
    """The runs that left for their receivers, and what of them comes back."""

    def sent(self, run: Run, now: int) -> None:
        """`run` has left for its receiver; from now on it may come back."""
        flow = run.flow
        flow.open = None
        if run.free:
            return  # there is nothing to recycle
        held = flow.held
        if held is None:
            flow.held = [run]
            return
        # When half of them are too old, since what is left of a list moves when its beginning goes.
        if held and _too_old(held[len(held) // 2], now):
            stale = len(held) // 2
            while stale < len(held) and _too_old(held[stale], now):
                stale += 1
            del held[:stale]
        held.append(run)

    def give_back(self, flow: Flow, first: int, n: int, now: int) -> int:
        """The flow's permits from the `first`th on (modulo 2**32) will not be used.

        Returns:
            how many of the `n` it really held. What it did not hold, or gave back before, changes nothing.
        """
        start = flow.granted - (flow.granted - first) % WORD
        taken = self._take_back(flow, start, start + n)
        self.reuse(flow.path, taken, now)
        return len(taken)

    def reuse(self, path: Path, taken: list[int], now: int) -> None:
        """Slots of `path` that nobody will use: to those who wait on it, as far as there is life in them."""
        oldest = now + TICK - path.slack
        usable = [slot for slot in taken if slot >= oldest]
        if usable:
            if path.returned is None:
                path.returned = []
            for slot in usable:
                heappush(path.returned, slot)
            self.recycle(path, now)

    def _take_back(self, flow: Flow, start: int, end: int) -> list[int]:
        """Cut permits [start, end) out of what the flow holds; their slots."""
        held = flow.held or []
        slots: list[int] = []
        index = max(0, bisect_right(held, start, key=_serial) - 1)
        while index < len(held) and held[index].serial < end:
            run = held[index]
            low, high = max(start, run.serial) - run.serial, min(end, run.serial + run.n) - run.serial
            if low >= high:
                index += 1
                continue
            slots += [run.first + run.step * i for i in range(low, high)]
            rest = []
            if low > 0:
                rest.append(Run(flow, run.serial, run.first, low, run.step))
            if high < run.n:
                rest.append(Run(flow, run.serial + high, run.first + run.step * high, run.n - high, run.step))
            held[index : index + 1] = rest
            index += len(rest)
        return slots

    def recycle(self, path: Path, now: int) -> None:
        """Give the returned slots of `path` to flows that wait on it: the same slots, nothing is refunded."""
        returned = path.returned
        oldest = now + TICK - path.slack
        waiting: list[tuple[tuple[int, int], int, Flow]] | None = None
        while returned:
            if returned[0] < oldest:
                heappop(returned)
                continue
            if waiting is None:  # once, since there may be thousands of slots and of flows
                waiting = [
                    (_virtual_time(flow), number, flow)
                    for number, flow in enumerate(path.flows())
                    if flow.want > 0 and not flow.paused and flow.receiver.may_receive(now)
                ]
                heapify(waiting)
            first = _first(waiting)
            if first is None:
                return
            self._give(first, heappop(returned))
        path.returned = None

    def forget_slots(self, flows: list[Flow]) -> None:
        """The slack of these flows' paths has grown: slots from before were spaced for the smaller one.

        They must not be given out again, and those that have not left yet must not meet a receiver that knows the new
        slack.
        """
        for flow in flows:
            flow.path.returned = None
        served = [flow for flow in flows if flow.granted]
        for flow in served:
            flow.held = flow.open = None
        these = set(served)
        for receiver in {flow.receiver for flow in served}:
            for run in receiver.runs:
                if run.flow in these:
                    flow = run.flow
                    flow.granted -= run.n
                    flow.want += run.n
            receiver.runs = deque([run for run in receiver.runs if run.flow not in these])


def _too_old(run: Run, now: int) -> bool:
    return run.first + run.step * (run.n - 1) + LONGEST_SLACK < now


def _serial(run: Run) -> int:
    return run.serial


def _first(waiting: list[tuple[tuple[int, int], int, Flow]]) -> Flow | None:
    """The flow that comes first, of a heap in which times are as they were: they only grow."""
    while waiting:
        time, number, flow = waiting[0]
        if flow.want <= 0:
            heappop(waiting)
        elif (current := _virtual_time(flow)) != time:
            heapreplace(waiting, (current, number, flow))
        else:
            return flow
    return None


def _virtual_time(flow: Flow) -> tuple[int, int]:
    """Order of the flows of one path; the number of permits so far decides between equals."""
    slots = (flow.queued or flow.path.throttles[0]).slots
    return (slots.times.get(flow.receiver.name, slots.clock) if slots else 0), flow.granted
