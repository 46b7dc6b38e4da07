"""Gives slots to those who wait for them, in fair order.

A *path* is the set of throttles that one kind of message passes; a *flow* is one session's demand on a path. A flow
that wants permits waits in the queue of the one throttle that holds its path up longest, so a throttle's turn touches
only the flows that it can serve. Order is virtual time: who has had least relative to its weight comes first, and who
joins starts at the clock of the queue, so nobody saves up turns. A slot is taken from every throttle of a path in one
step.

Pure: the runs that a receiver gets pile up in its `runs`. Sessions, their pings and their limits are `manager`'s.
"""

from __future__ import annotations

from bisect import bisect_right
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

from proxy.throttling.flows import WORD, Flow, Path, Receiver, Run, Slots, Throttle
from proxy.throttling.throttle import MICROSECOND, MILLISECOND, TICK
from proxy.throttling.wheel import Wheel

#: The longest step that fits its field of the wire, in nanoseconds.
MAX_STEP = (WORD - 1) * MICROSECOND
#: No permit is usable longer than this after its slot.
LONGEST_SLACK = 2_000_000_000
#: When a throttle's next slot is, a number to tell equals apart, and the throttle.
Turn = tuple[int, int, Throttle]


class Dispenser:
    """The queues of all throttles.

    Attributes:
        touched: receivers that got something. paid: flows without a fine. idle: throttles that nobody waits under now.
        wheel, fine: throttles by their next turn; the fine one has those that give out nothing ahead.
    """

    def __init__(self) -> None:
        self.wheel: Wheel[Throttle] = Wheel(TICK)
        self.fine: Wheel[Throttle] = Wheel(MILLISECOND)
        self.touched: dict[Receiver, None] = {}
        self.paid: list[Flow] = []
        self.idle: dict[Throttle, None] = {}
        self._order = count()

    # --- demand ---

    def demand(self, flow: Flow, want: int, got: int, now: int) -> None:
        """`want` messages wait without a permit after the flow's first `got` permits (modulo 2**32) arrived."""
        in_flight = (flow.granted - got) % WORD
        if in_flight >= WORD // 2:  # more got than granted: a liar gains nothing by it
            in_flight = 0
        flow.want = max(0, want - in_flight) + flow.fine
        self.activate(flow, now)

    def activate(self, flow: Flow, now: int) -> None:
        """Serve `flow` or queue it, if it wants anything."""
        if flow.want <= 0 or flow.paused or flow.queued is not None:
            return
        path = flow.path
        if path.returned:
            self.recycle(path, now)
            if flow.want <= 0:
                return
        slot, decider = path.earliest(now)
        throttle = decider or path.throttles[0]
        self._enqueue(flow, throttle)
        if slot <= now + path.horizon:
            self.serve(throttle, now)
        else:
            self._wheel(throttle).arm_earlier(throttle, slot - throttle.lead)

    def _wheel(self, throttle: Throttle) -> Wheel[Throttle]:
        return self.fine if throttle.counts else self.wheel

    def withdraw(self, flow: Flow) -> None:
        """The session of `flow` is gone or means another path: it wants nothing, and what it held is not reused."""
        flow.want = 0
        flow.held = None

    def unpark(self, receiver: Receiver, now: int) -> None:
        """`receiver` may receive again."""
        flows, receiver.parked = receiver.parked, {}
        for flow in flows:
            self.activate(flow, now)

    def _enqueue(self, flow: Flow, throttle: Throttle) -> None:
        slots = throttle.slots
        if slots is None:
            slots = throttle.slots = Slots(flow.path)
        elif slots.path is not flow.path:
            slots.path = None
        name = flow.receiver.name
        time = slots.times.get(name, 0)
        if time < slots.clock:
            time = slots.clock
        slots.times[name] = time
        heappush(slots.queue, (time, next(self._order), flow))
        flow.queued = throttle

    # --- supply ---

    def serve(self, throttle: Throttle, now: int) -> None:
        """Give out the slots of `throttle` that are due; arm the wheel for the rest."""
        self._serve([throttle], now)

    def expire(self, now: int, most: int | None = None) -> None:
        """Serve the throttles whose turn has come, `most` of them."""
        due = self.wheel.expire(now, most)
        if due:
            self._serve(due, now)

    def _serve(self, throttles: list[Throttle], now: int) -> None:
        """Serve these and whom they lead to, in the order of their slots.

        The order matters where paths share a throttle: a slot taken for a later instant would waste what lies before.
        """
        agenda: list[Turn] = [(throttle.earliest(now), next(self._order), throttle) for throttle in throttles]
        heapify(agenda)
        while agenda:
            throttle = heappop(agenda)[2]
            slots = throttle.slots
            if slots is not None and self._take_turn(throttle, slots, agenda, now):
                throttle.slots = None
                self.idle[throttle] = None
                self._wheel(throttle).disarm(throttle)

    def _take_turn(self, throttle: Throttle, slots: Slots, agenda: list[Turn], now: int) -> bool:
        """Serve the queue of `throttle` while its slots are the next ones and near. Whether nobody is left in it."""
        queue, times, wheel = slots.queue, slots.times, self._wheel(throttle)
        while queue:
            time, order, flow = queue[0]
            receiver, path = flow.receiver, flow.path
            if flow.want <= 0 or flow.paused or not receiver.may_receive(now):
                heappop(queue)
                self._stand_aside(flow)
                continue
            own = times[receiver.name]
            if time < own:  # its session got something meanwhile; among that session's flows it keeps its turn
                heapreplace(queue, (own, order, flow))
                continue
            slot, decider = path.earliest(now)
            if decider is None:
                heappop(queue)
                flow.queued = None
                self._give_freely(flow, now)
                continue
            if slot > now + path.horizon:
                if decider is throttle:
                    wheel.arm(throttle, slot - throttle.lead)
                    return False
                heappop(queue)
                self._enqueue(flow, decider)
                self._wheel(decider).arm_earlier(decider, slot - decider.lead)
                if queue and slots.path is not None:
                    wheel.arm(throttle, slot)
                    return False
                continue
            if len(path.throttles) > 1:
                elsewhere = self._where_to_wait(flow, throttle, slot, decider, now)
                if elsewhere is not None:
                    heappop(queue)
                    self._enqueue(flow, elsewhere)
                    heappush(agenda, (slot, next(self._order), elsewhere))
                    if queue and slots.path is not None:
                        # The others would follow it for nothing: one is enough to ask there.
                        wheel.arm(throttle, slot)
                        return False
                    continue
                if agenda and agenda[0][0] < slot:
                    heappush(agenda, (slot, next(self._order), throttle))
                    return False
            slots.clock = own
            for each in path.throttles:
                each.take_slot(slot)
            self._give(flow, slot)
            if flow.want <= 0:
                # It spoke for those who wait at the other throttles of its path: the next one's turn.
                for each in path.throttles:
                    if each is not throttle and each.slots is not None:
                        heappush(agenda, (each.earliest(now), next(self._order), each))
            heapreplace(queue, (times[receiver.name], next(self._order), flow))
        return True

    def _where_to_wait(self, flow: Flow, throttle: Throttle, slot: int, decider: Throttle, now: int) -> Throttle | None:
        """The throttle of its path that a flow must wait for before it may take `slot`; None: none."""
        if decider is not throttle and throttle.earliest(now) < slot:
            return decider
        if flow.yielded != slot:
            for other in flow.path.throttles:
                # Others with other paths came first there for the same instant; it yields to them once.
                if other is throttle or other.slots is None or other.slots.path is not None:
                    continue
                if other.earliest(now) <= slot:
                    flow.yielded = slot
                    return other
        return None

    def _stand_aside(self, flow: Flow) -> None:
        flow.queued = None
        if flow.want > 0 and not flow.paused:  # who pauses it activates it again
            flow.receiver.parked[flow] = None

    def _give(self, flow: Flow, slot: int) -> None:
        """One slot to `flow`, charged at every throttle of its path; the caller has taken it from them."""
        receiver = flow.receiver
        name, cost = receiver.name, receiver.cost
        for throttle in flow.path.throttles:
            slots = throttle.slots
            if slots is not None:
                time = slots.times.get(name, 0)
                slots.times[name] = (time if time > slots.clock else slots.clock) + cost
        flow.want -= 1
        flow.balance += 1
        if flow.fine:
            flow.fine -= 1
            if not flow.fine:
                self.paid.append(flow)
            return
        serial = flow.granted
        flow.granted = serial + 1
        run = flow.open
        if run is not None:
            n = run.n
            if n == 1 and 0 < slot - run.first <= MAX_STEP:
                run.step = slot - run.first
                run.n = 2
                return
            if n > 1 and run.first + run.step * n == slot:
                run.n = n + 1
                return
        run = flow.open = Run(flow, serial, slot)
        receiver.runs.append(run)
        self.touched[receiver] = None

    def _give_freely(self, flow: Flow, now: int) -> None:
        """All that `flow` wants: no rate limits it."""
        n = flow.want - flow.fine
        if flow.fine:
            self.paid.append(flow)
        flow.balance += flow.want
        flow.want = flow.fine = 0
        if n > 0:
            flow.open = None
            flow.receiver.runs.append(Run(flow, flow.granted, -(-now // MICROSECOND) * MICROSECOND, n))
            flow.granted += n
            self.touched[flow.receiver] = None

    # --- slots that come back ---

    def sent(self, run: Run, now: int) -> None:
        """`run` has left for its receiver; from now on it may come back."""
        flow = run.flow
        flow.open = None
        if run.n > 1 and run.step == 0:
            return  # unlimited: there is nothing to recycle
        held = flow.held
        if held is None:
            flow.held = [run]
            return
        stale = 0
        while stale < len(held) and held[stale].first + held[stale].step * (held[stale].n - 1) + LONGEST_SLACK < now:
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
        flow.balance -= len(taken)
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
        while returned:
            if returned[0] < oldest:
                heappop(returned)
                continue
            waiting = [
                flow for flow in path.flows() if flow.want > 0 and not flow.paused and flow.receiver.may_receive(now)
            ]
            if not waiting:
                return
            self._give(min(waiting, key=_virtual_time), heappop(returned))
        path.returned = None

    def forget_slots(self, flow: Flow) -> None:
        """The slack of the flow's path has grown: slots from before were spaced for the smaller one.

        They must not be given out again, and those that have not left yet must not meet a receiver that knows the new
        slack.
        """
        flow.held = flow.open = flow.path.returned = None
        receiver = flow.receiver
        lost = sum(run.n for run in receiver.runs if run.flow is flow)
        if lost:
            receiver.runs = [run for run in receiver.runs if run.flow is not flow]
            flow.granted -= lost
            flow.balance -= lost
            flow.want += lost


def _serial(run: Run) -> int:
    return run.serial


def _virtual_time(flow: Flow) -> tuple[int, int]:
    """Order of the flows of one path; the number of permits so far decides between equals."""
    slots = (flow.queued or flow.path.throttles[0]).slots
    return (slots.times.get(flow.receiver.name, slots.clock) if slots else 0), flow.granted
