"""Gives slots to those who wait for them, in fair order.

A *path* is the set of throttles that one kind of message passes; a *flow* is one session's demand on a path. Order is
virtual time, by session at each throttle: who has had least relative to its weight comes first, and who joins starts at
the clock of the throttle, so nobody saves up turns. A flow queues at one throttle of its path at a time, first at the
one that holds it up longest, so a throttle's turn touches only the flows that it can serve. It goes on to those where
it is not its turn yet, and keeps the turns that it has had. A slot is taken from every throttle of a path in one step;
where one is not near yet, the others are kept for whoever has waited longest. docs/throttling.md has the promise.

The queues themselves are in `queues`, slots that come back in `returns`, the last step in `giving`: one object, each
file knowing those before it. Pure: the runs that a receiver gets pile up in its `runs`.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from typing import Final

from proxy.throttling.doubt import Doubt
from proxy.throttling.flows import WORD, Flow, Receiver, Slots, Throttle
from proxy.throttling.giving import SLOTS_IN_A_TURN
from proxy.throttling.queues import FRONT, Queues
from proxy.throttling.throttle import TICK

#: When a throttle's next slot is, times two (and one more, if who wants it needs no other throttle: whoever does goes
#: first), a number to tell equals apart, and the throttle.
Turn = tuple[int, int, Throttle]

#: All bits: a flow has had its turn at every throttle of its path.
EVERYWHERE: Final = -1
#: So many slots of a turn for one throttle, however many others wait with it.
SMALLEST_PART: Final = 50


class Dispenser(Queues):
    """Demand, and the turns in which it is served."""

    # --- demand ---

    def demand(self, flow: Flow, want: int, got: int, now: int, doubt: Doubt | None = None) -> None:
        """`want` messages wait without a permit after the flow's first `got` permits (modulo 2**32) arrived."""
        in_flight = (flow.granted - got) % WORD
        if in_flight >= WORD // 2:  # more got than granted: a liar gains nothing by it
            in_flight = 0
        want = max(0, want - in_flight)
        flow.want = (want if doubt is None else doubt.hold(flow, want)) + flow.fine
        self.activate(flow, now)

    def activate(self, flow: Flow, now: int) -> None:
        """Serve `flow` or queue it, if it wants anything."""
        if flow.want <= 0 or flow.paused:
            return
        path = flow.path
        if path.returned:
            self.recycle(path, now)
            if flow.want <= 0:
                return
        if flow.queued is not None:
            return
        slot, decider = path.earliest(now)
        if slot <= now + path.horizon and self._alone(flow, now) and self._give_alone(flow, slot, decider, now):
            return
        throttle = decider or path.throttles[0]
        self._join(flow)
        self._enqueue(flow, throttle)
        if slot <= now + path.horizon:
            self.serve(throttle, now)
        else:
            self._wheel(throttle).arm_earlier(throttle, slot - path.horizon)

    def _alone(self, flow: Flow, now: int) -> bool:
        """Whether `flow` may receive, and nobody waits at any throttle of its path."""
        for throttle in flow.path.throttles:
            if throttle.slots is not None:
                return False
        return flow.receiver.may_receive(now) and not self.queues_always

    def _give_alone(self, flow: Flow, slot: int, decider: Throttle | None, now: int) -> bool:
        """Serve `flow`, which is alone and whose next slot is near, without a queue: that would come to the same.

        Returns:
            False: what it wants is not one slot, nor a row of slots that are all near. Nothing has changed.
        """
        path, want = flow.path, flow.want
        throttles, step = path.throttles, 0
        if decider is not None and len(throttles) == 1 and flow.open is None and not flow.fine:
            if want > 1:
                step = decider.row(slot)
                if not step or slot + (want - 1) * step > now + path.horizon:
                    return False
                decider.take_row(slot, want)
            else:
                decider.take_slot(slot)
            self.idle.add(decider)
            self._give_row(flow, slot, want, step)
            return True
        if want > 1 and decider is not None:
            return False
        for throttle in throttles:
            self.idle.add(throttle)
        if decider is None:
            self._give_freely(flow, now)
        else:
            for throttle in throttles:
                throttle.take_slot(slot)
            self._give(flow, slot)
        return True

    def unpark(self, receiver: Receiver, now: int) -> None:
        """`receiver` may receive again."""
        flows, receiver.parked = receiver.parked, {}
        for flow in flows:
            self.activate(flow, now)

    # --- supply ---

    def serve(self, throttle: Throttle, now: int) -> None:
        """Give out the slots of `throttle` that are due; arm the wheel for the rest."""
        agenda: list[Turn] = []
        self._visit(throttle, agenda, now)
        if agenda:
            self._follow(agenda, now)

    def expire(self, now: int, most: int | None = None) -> None:
        """Serve the throttles whose turn has come, `most` of them."""
        due = self.wheel.expire(now, most)
        if due:
            self._serve(due, now)

    def resume(self, now: int) -> None:
        """A new turn begins: go on where the last one ended, with a part of it for each throttle that is unfinished."""
        left, waiting = SLOTS_IN_A_TURN, len(self.unfinished)
        part = max(SLOTS_IN_A_TURN // max(waiting, 1), SMALLEST_PART)
        while waiting and left > 0:
            throttle = self.unfinished.next()
            self._left = part = min(part, left)
            self.serve(throttle, now)  # what is not done of it stands behind the others now
            left -= part - self._left + 1
            waiting -= 1
        self._left = left

    def _serve(self, throttles: list[Throttle], now: int) -> None:
        """Serve these and whom they lead to, in the order of their slots.

        The order matters where paths share a throttle: a slot taken for a later instant would waste what lies before.
        """
        agenda: list[Turn] = [(throttle.earliest(now) << 1, next(self._order), throttle) for throttle in throttles]
        heapify(agenda)
        self._follow(agenda, now)

    def _follow(self, agenda: list[Turn], now: int) -> None:
        while agenda:
            self._visit(heappop(agenda)[2], agenda, now)

    def _visit(self, throttle: Throttle, agenda: list[Turn], now: int) -> None:
        if self._left <= 0:
            self.unfinished.add(throttle)
        elif throttle.slots is not None:
            self._take_turn(throttle, throttle.slots, agenda, now)

    def _take_turn(self, throttle: Throttle, slots: Slots, agenda: list[Turn], now: int) -> None:
        """Serve the queue of `throttle` while its slots are the next ones and near."""
        queue, times = slots.queue, slots.times
        while queue:
            if self._left <= 0:
                self.unfinished.add(throttle)
                return
            time, order, flow = queue[0]
            receiver = flow.receiver
            if (
                order != flow.order
                or flow.want <= 0
                or time < times[receiver.name]
                or not receiver.may_receive(now)
                or flow.paused
                or flow.queued is not throttle
            ):
                if not self._foremost(throttle, slots, now):
                    return
                flow = queue[0][2]
                receiver = flow.receiver
            path = flow.path
            if len(path.throttles) > 1 or slots.claim is not None:
                slot, decider = path.earliest(now)
                if decider is None:
                    self._serve_freely(flow, slots, now)
                elif not self._pass(flow, throttle, slots, slot, decider, agenda, now):
                    return
                continue
            if not throttle.windows:
                self._serve_freely(flow, slots, now)
                continue
            slot = throttle.earliest(now)
            if slot > now + path.horizon:
                self._wheel(throttle).arm(throttle, slot - path.horizon)
                return
            if agenda and slots.path is None and agenda[0][0] <= slot << 1:
                heappush(agenda, (slot << 1 | 1, next(self._order), throttle))
                return
            throttle.take_slot(slot)
            self._give(flow, slot)
            if flow.want > 0:
                flow.order = order = next(self._order)
                heapreplace(queue, (times[receiver.name], order, flow))
            else:
                heappop(queue)
                self._leave(flow)

    def _serve_freely(self, flow: Flow, slots: Slots, now: int) -> None:
        """The foremost flow of a queue is limited by nothing any more."""
        heappop(slots.queue)
        self._leave(flow)
        self._give_freely(flow, now)

    def _pass(
        self, flow: Flow, throttle: Throttle, slots: Slots, slot: int, decider: Throttle, agenda: list[Turn], now: int
    ) -> bool:
        """The turn of a flow that needs other throttles, too, or of one that others have a claim before.

        Returns:
            whether the turn of `throttle` goes on.
        """
        queue, ahead, wheel = slots.queue, flow.path.horizon, self._wheel(throttle)
        several = len(flow.path.throttles) > 1
        turn = slot << 1 | (not several)
        if several:
            own = slot if decider is throttle else throttle.earliest(now)
            if own > now + ahead:
                wheel.arm(throttle, own - ahead)
                return False
            if own == slot and agenda and agenda[0][0] < turn:
                heappush(agenda, (turn, next(self._order), throttle))
                return False
            there = self._where_to_wait(flow, throttle, own, slot, decider, now)
            if there is not None:
                when = slot if there is decider else max(own, there.earliest(now))
                self._move(flow, slots, there, when, agenda, now)
                if queue and slots.path is not None:
                    # The others would follow it for nothing: one is enough to ask there.
                    wheel.arm(throttle, slot)
                    return False
                return True
        rival, delayed = self._rival(flow, slot, now)
        if rival is not None:
            first, where, when = rival
            if when > now + first.path.horizon and where is not throttle:
                self._move(flow, slots, where, when, agenda, now)
                return True
            flow, slot, turn, ahead = first, when, when << 1, first.path.horizon
        if slot <= now + ahead and not (agenda and agenda[0][0] < turn):
            for claim in delayed:
                claim.delayed = True
            self._grant(flow, slot, throttle, agenda, now)
            return True
        if several and rival is None:
            heapreplace(queue, (FRONT, flow.order, flow))
            self._claim(flow)
        if slot > now + ahead:
            wheel.arm(throttle, slot - ahead)
        else:
            heappush(agenda, (turn, next(self._order), throttle))
        return False

    def _grant(self, flow: Flow, slot: int, throttle: Throttle, agenda: list[Turn], now: int) -> None:
        """`slot` to `flow`, at the turn of `throttle`; it waits for the next one where it waited for this."""
        throttles = flow.path.throttles
        for each in throttles:
            each.take_slot(slot)
        self._give(flow, slot)
        if len(throttles) == 1:
            flow.order = next(self._order)
        else:
            # Among the flows of its session it counts as served when its turn came, not when it got the slot.
            flow.order = flow.turn
            self._yield_claims(flow)
            if flow.want > 0:
                slots = throttle.slots
                if slots is not None and slots.queue[0][2] is flow:  # and not a rival, which may queue elsewhere
                    heapreplace(slots.queue, (slots.times[flow.receiver.name], flow.order, flow))
            else:
                # It spoke for those who wait at the other throttles of its path: the next one's turn.
                for each in throttles:
                    if each is not throttle and each.slots is not None and each.slots.queue:
                        heappush(agenda, (each.earliest(now) << 1, next(self._order), each))

    def _move(self, flow: Flow, slots: Slots, there: Throttle, when: int, agenda: list[Turn], now: int) -> None:
        """The foremost flow of one queue waits in another from now on, which is looked at for its slot `when`."""
        heappop(slots.queue)
        self._enqueue(flow, there)
        ahead = flow.path.horizon
        if when <= now + ahead:
            heappush(agenda, (when << 1, next(self._order), there))
        else:
            self._wheel(there).arm_earlier(there, when - ahead)

    def _where_to_wait(
        self, flow: Flow, throttle: Throttle, own: int, slot: int, decider: Throttle, now: int
    ) -> Throttle | None:
        """Where the foremost flow of `throttle` has to wait before it may have `slot`; None: nowhere, it is its turn.

        A turn that it has had stays its own until it gets a slot, wherever it waits meanwhile.
        """
        path, name = flow.path, flow.receiver.name
        if not flow.turns:
            flow.turn = next(self._order)
        if flow.turns != EVERYWHERE:
            flow.turns |= 1 << path.throttles.index(throttle)
            for index, other in enumerate(path.throttles):
                if not flow.turns >> index & 1:
                    slots = other.slots
                    if slots is None or not slots.queue:
                        continue
                    mine = slots.times[name], flow.order
                    # An entry that is out of date is never behind its true place.
                    if slots.queue[0] < mine and self._foremost(other, slots, now) and slots.queue[0] < mine:
                        return other
            flow.turns = EVERYWHERE
        if own < slot:
            # Its slot here comes later: others may have the one before if that costs it nothing, or less than it would
            # cost them.
            step = throttle.after(own)
            if step <= slot or decider.after(slot) - slot > step - own:
                if slot - now - path.horizon <= step - own + TICK:
                    self._claim(flow)
                return decider
        return None
