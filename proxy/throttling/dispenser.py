"""Gives slots to those who wait for them, in fair order.

A *path* is the set of throttles that one kind of message passes; a *flow* is one session's demand on a path. Order is
virtual time, by session at each throttle: who has had least relative to its weight comes first, and who joins starts at
the clock of the throttle, so nobody saves up turns. A flow queues at one throttle of its path at a time, first at the
one that holds it up longest, so a throttle's turn touches only the flows that it can serve. It goes on to those where
it is not its turn yet, and keeps the turns that it has had. A slot is taken from every throttle of a path in one step;
where one is not near yet, the others are kept for whoever has waited longest. docs/throttling.md has the promise.

Pure: the runs that a receiver gets pile up in its `runs`. Sessions, their pings and their limits are `manager`'s.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count

from proxy.throttling.doubt import Doubt
from proxy.throttling.flows import WORD, Flow, Path, Receiver, Run, Slots, Throttle
from proxy.throttling.many import Rota
from proxy.throttling.throttle import MICROSECOND, MILLISECOND, TICK
from proxy.throttling.wheel import Wheel

#: The longest step that fits its field of the wire, in nanoseconds.
MAX_STEP = (WORD - 1) * MICROSECOND
#: No permit is usable longer than this after its slot.
LONGEST_SLACK = 2_000_000_000
#: When a throttle's next slot is, times two (and one more, if who wants it needs no other throttle: whoever does goes
#: first), a number to tell equals apart, and the throttle.
Turn = tuple[int, int, Throttle]


#: Before all virtual times: who has had its turn in this queue already.
FRONT = -1
#: All bits: a flow has had its turn at every throttle of its path.
EVERYWHERE = -1
#: Who was held up elsewhere may catch up so many slots at once.
LAG = 4
#: Slots that are given out in one turn (some 20 ms); what is left is done in the next, when others had theirs.
SLOTS_IN_A_TURN = 4_000
#: So many of them for one throttle, however many others wait with it.
SMALLEST_PART = 50


class Dispenser:
    """The queues of all throttles.

    Attributes:
        touched: receivers that got something. paid: flows without a fine. idle: throttles that nobody waits under now.
        wheel, fine: throttles by their next turn; the fine one has those that give out nothing ahead.
        unfinished: throttles that are to be served as soon as others had their turn, see `resume`.
    """

    def __init__(self) -> None:
        self.wheel: Wheel[Throttle] = Wheel(TICK)
        self.fine: Wheel[Throttle] = Wheel(MILLISECOND)
        self.touched: dict[Receiver, None] = {}
        self.paid: list[Flow] = []
        self.idle: set[Throttle] = set()
        self.unfinished: Rota[Throttle] = Rota()
        self._left = SLOTS_IN_A_TURN
        self._order = count()

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
        if flow.want == 1 and slot <= now + path.horizon and self._alone(flow, now):
            self._give_alone(flow, slot, decider, now)
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
        return flow.receiver.may_receive(now)

    def _give_alone(self, flow: Flow, slot: int, decider: Throttle | None, now: int) -> None:
        """All that `flow` wants is one slot, which is near, and nobody waits for it: no queue is needed."""
        for throttle in flow.path.throttles:
            self.idle.add(throttle)
            if decider is not None:
                throttle.take_slot(slot)
        if decider is None:
            self._give_freely(flow, now)
        else:
            self._give(flow, slot)

    def _wheel(self, throttle: Throttle) -> Wheel[Throttle]:
        return self.fine if throttle.counts else self.wheel

    def withdraw(self, flow: Flow) -> None:
        """The session of `flow` is gone or means another path: it wants nothing, and what it held is not reused."""
        flow.want = 0
        flow.held = None
        if flow.queued is not None:
            self._leave(flow)  # what is left of it in the queue is passed over

    def unpark(self, receiver: Receiver, now: int) -> None:
        """`receiver` may receive again."""
        flows, receiver.parked = receiver.parked, {}
        for flow in flows:
            self.activate(flow, now)

    def _join(self, flow: Flow) -> None:
        """`flow` waits from now on: known at every throttle of its path, level with those that are there."""
        path, name = flow.path, flow.receiver.name
        flow.order = next(self._order)
        for throttle in path.throttles:
            slots = throttle.slots
            if slots is None:
                slots = throttle.slots = Slots(path)
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

    # --- supply ---

    def serve(self, throttle: Throttle, now: int) -> None:
        """Give out the slots of `throttle` that are due; arm the wheel for the rest."""
        self._serve([throttle], now)

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
            self._serve([throttle], now)  # what is not done of it stands behind the others now
            left -= part - self._left + 1
            waiting -= 1
        self._left = left

    def _serve(self, throttles: list[Throttle], now: int) -> None:
        """Serve these and whom they lead to, in the order of their slots.

        The order matters where paths share a throttle: a slot taken for a later instant would waste what lies before.
        """
        agenda: list[Turn] = [(throttle.earliest(now) << 1, next(self._order), throttle) for throttle in throttles]
        heapify(agenda)
        while agenda:
            throttle = heappop(agenda)[2]
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
                self._move(flow, slots, there, max(own, there.earliest(now)), agenda, now)
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

    def _stand_aside(self, flow: Flow) -> None:
        self._leave(flow)
        if flow.want > 0 and not flow.paused:  # who pauses it activates it again
            flow.receiver.parked[flow] = None

    def _give(self, flow: Flow, slot: int) -> None:
        """One slot to `flow`, charged at every throttle of its path; the caller has taken it from them."""
        self._left -= 1
        receiver = flow.receiver
        name, cost = receiver.name, receiver.cost
        for throttle in flow.path.throttles:
            slots = throttle.slots
            if slots is not None:
                clock, times = slots.clock, slots.times
                time = times.get(name, clock)
                if time > clock:
                    slots.clock = time
                elif time < clock - LAG * cost:
                    time = clock - LAG * cost
                times[name] = time + cost
        flow.want -= 1
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
            if n == 1 and 0 <= slot - run.first <= MAX_STEP:
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
        flow.want = flow.fine = 0
        if n > 0:
            flow.open = None
            flow.receiver.runs.append(Run(flow, flow.granted, -(-now // MICROSECOND) * MICROSECOND, n, free=True))
            flow.granted += n
            self.touched[flow.receiver] = None

    # --- slots that come back ---

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


def _waits(flow: Flow, throttle: Throttle, now: int) -> bool:
    """Whether an entry in the queue of `throttle` means somebody who can be served."""
    return flow.queued is throttle and flow.want > 0 and not flow.paused and flow.receiver.may_receive(now)


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
