"""One slot, or as many as wanted, to a flow: charged at every throttle of its path, written into its receiver's runs.

The last step of dispensing, after it has been decided who is served: see `dispenser`.
"""

from __future__ import annotations

from itertools import count
from typing import Final

from proxy.throttling.flows import WORD, Flow, Receiver, Run, Throttle
from proxy.throttling.many import Rota
from proxy.throttling.throttle import MICROSECOND, MILLISECOND, TICK
from proxy.throttling.wheel import Wheel

#: The longest step that fits its field of the wire, in nanoseconds.
MAX_STEP: Final = (WORD - 1) * MICROSECOND
#: Who was held up elsewhere may catch up so many slots at once.
LAG: Final = 4
#: Slots that are given out in one turn (some 20 ms); what is left is done in the next, when others had theirs.
SLOTS_IN_A_TURN: Final = 4_000


class Giver:
    """What is given out, and to whom.

    Attributes:
        touched: receivers that got something. paid: flows without a fine. idle: throttles that nobody waits under now.
        wheel, fine: throttles by their next turn; the fine one has those that give out nothing ahead.
        unfinished: throttles that are to be served as soon as others had their turn.
        former: virtual times that there were when another process left what it had (see `handover`): who waits there is
            back soon.
        queues_always: everybody queues, also who is alone: slower and the same. A test compares.
    """

    def __init__(self) -> None:
        self.wheel: Wheel[Throttle] = Wheel(TICK)
        self.fine: Wheel[Throttle] = Wheel(MILLISECOND)
        self.touched: dict[Receiver, None] = {}
        self.paid: list[Flow] = []
        self.idle: set[Throttle] = set()
        self.unfinished: Rota[Throttle] = Rota()
        self.former: dict[Throttle, tuple[int, dict[str, int]]] = {}
        self._left = SLOTS_IN_A_TURN
        self._order = count()
        self.queues_always = False

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

    def _give_row(self, flow: Flow, slot: int, n: int, step: int) -> None:
        """As `_give` for `n` slots in a row; not where somebody waits, nor to who pays or has a run that may grow."""
        receiver, serial = flow.receiver, flow.granted
        flow.want -= n
        flow.granted = serial + n
        run = flow.open = Run(flow, serial, slot, n, step)
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

    def _wheel(self, throttle: Throttle) -> Wheel[Throttle]:
        return self.fine if throttle.counts else self.wheel
