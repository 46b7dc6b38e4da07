"""Who waits for slots, where, and who comes first there: by virtual time, kept for each session at each throttle.

A flow stands in the queue of one throttle of its path. Whose turn it is everywhere, but one of whose slots is not near
yet, has a claim: the others are kept for it, unless somebody has one that has waited longer. What is done with a turn
is `dispenser`'s.
"""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace
from typing import Final

from proxy.throttling.flows import Flow, Slots, Throttle
from proxy.throttling.giving import LAG
from proxy.throttling.returns import Returns

#: Before all virtual times: who has had its turn in this queue already.
FRONT: Final = -1


class Queues(Returns):
    """The queues of all throttles."""

    def withdraw(self, flow: Flow) -> None:
        """The session of `flow` is gone or means another path: it wants nothing, and what it held is not reused."""
        flow.want = 0
        flow.held = None
        if flow.queued is not None:
            self._leave(flow)  # what is left of it in the queue is passed over

    def _join(self, flow: Flow) -> None:
        """`flow` waits from now on: known at every throttle of its path, level with those that are there."""
        path, name = flow.path, flow.receiver.name
        flow.order = next(self._order)
        for throttle in path.throttles:
            slots = throttle.slots
            if slots is None:
                slots = throttle.slots = Slots(path)
                if self.former and (former := self.former.pop(throttle, None)) is not None:
                    slots.clock, slots.times = former
            elif slots.path is not path:
                slots.path = None
            slots.waiting += 1
            time = slots.times.get(name)
            if time is None or time < slots.clock - LAG * flow.receiver.cost:
                slots.times[name] = slots.clock

    def _leave(self, flow: Flow) -> None:
        """`flow` waits no more."""
        flow.queued = None
        self._yield_claims(flow)
        for throttle in flow.path.throttles:
            slots = throttle.slots
            assert slots is not None, "it is kept while somebody waits"
            slots.waiting -= 1
            if not slots.waiting:
                throttle.slots = None
                self.idle.add(throttle)
                self._wheel(throttle).disarm(throttle)

    def _enqueue(self, flow: Flow, throttle: Throttle) -> None:
        """Let `flow` wait in the queue of `throttle`, in front if it has had its turn there."""
        slots = throttle.slots
        assert slots is not None, "it has joined"
        front = flow.turns and flow.has_had_turn(throttle)
        heappush(slots.queue, (FRONT if front else slots.times[flow.receiver.name], flow.order, flow))
        flow.queued = throttle

    def _stand_aside(self, flow: Flow) -> None:
        self._leave(flow)
        if flow.want > 0 and not flow.paused:  # who pauses it activates it again
            flow.receiver.parked[flow] = None

    def _foremost(self, throttle: Throttle, slots: Slots, now: int) -> bool:
        """Bring who is to be served next to the front of the queue. Whether anybody waits there."""
        queue = slots.queue
        while queue:
            time, order, flow = queue[0]
            if not _waits(flow, throttle, now):
                heappop(queue)
                if flow.queued is throttle:
                    self._stand_aside(flow)
            elif order != flow.order:  # it got a slot
                heapreplace(queue, (slots.times[flow.receiver.name], flow.order, flow))
            elif FRONT < time < (own := slots.times[flow.receiver.name]):
                # Its session got something meanwhile; among that session's flows it keeps its turn.
                heapreplace(queue, (own, order, flow))
            else:
                return True
        return False

    # --- holding a slot ---

    def _claim(self, flow: Flow) -> None:
        """It is the turn of `flow` everywhere, but one of its slots is not near: the others are kept for it until then.

        Who has waited longest holds what it needs at all throttles at once, so no two wait for each other.
        """
        for each in flow.path.throttles:
            slots = each.slots
            assert slots is not None
            claim = slots.claim
            if claim is None or claim.queued is None or claim.order > flow.order:
                slots.claim = flow

    def _yield_claims(self, flow: Flow) -> None:
        """`flow` has got its slot, or waits no more."""
        if flow.turns:
            flow.turns = 0
            flow.delayed = False
            for each in flow.path.throttles:
                if each.slots is not None and each.slots.claim is flow:
                    each.slots.claim = None

    def _rival(self, flow: Flow, slot: int, now: int) -> tuple[tuple[Flow, Throttle, int] | None, list[Flow]]:
        """Who has waited longer and has a claim that `flow` would delay if it took `slot`; where, and to which slot.

        A delay does not count if it is a smaller part of an interval than the throttle would stand idle for it; but
        once only, or two throttles by turns could put a claim off for ever.

        Returns:
            the rival, and whose claims `slot` delays although they are no rivals.
        """
        delayed: list[Flow] = []
        for throttle in flow.path.throttles:
            slots = throttle.slots
            if slots is None or (claim := slots.claim) is None or claim is flow or claim.order > flow.order:
                continue
            if claim.want <= 0 or claim.paused or not claim.receiver.may_receive(now):
                slots.claim = None
                continue
            when, decider = claim.path.earliest(now)
            step = throttle.after(slot)
            if step > when and decider is not None:
                idle, interval = max(0, when - slot), decider.after(when) - when
                if claim.delayed or (step - when) * (step - slot) > idle * interval:
                    return (claim, throttle, when), []
                delayed.append(claim)
        return None, delayed


def _waits(flow: Flow, throttle: Throttle, now: int) -> bool:
    """Whether an entry in the queue of `throttle` means somebody who can be served."""
    return flow.queued is throttle and flow.want > 0 and not flow.paused and flow.receiver.may_receive(now)
