"""Message slots that the proxy takes itself, one at a time, for those it serves.

Who cannot speak for itself has the proxy ask: mode smtp, which holds a MAIL until its slot; a MAIL that came too late
for its permit. The proxy then has a flow of the instance's name on the path, beside those of the instance's session, if
there is one: the same queues, the same virtual time under the same name, so a message is served when the session's next
permit would be. The flow wants one slot for each ticket that waits, and tickets are served in the order they came.

A slot that is given out ahead is kept until its time; if by then its ticket has been called off, the next one has it,
and if there is none it goes back to whoever waits on the path. Pure: who waits, and how, is `egress.admission`'s.
"""

from __future__ import annotations

from heapq import heappop, heappush

from proxy.errors import Throttled
from proxy.throttling.dispenser import Dispenser
from proxy.throttling.flows import Flow, Path, Receiver, Throttle
from proxy.throttling.refusals import message_refusal
from proxy.throttling.registry import Registry
from proxy.throttling.throttle import MICROSECOND, MILLISECOND
from proxy.throttling.wheel import Wheel


class MessageTicket:
    """A request for one message slot.

    Attributes:
        granted: the slot is there, and is to be used in the same breath. asked: it is wanted by now.
        slot, last: which it is, and its last moment; None before.
        heir: the one that has taken its place at the manager of another process, which has taken over from this one.
    """

    __slots__ = ("asked", "clerk", "heir", "last", "path", "slot")

    def __init__(self, clerk: Clerk) -> None:
        self.asked = False
        self.clerk = clerk
        self.path = clerk.flow.path
        self.slot: int | None = None
        self.last = 0
        self.heir: object = None

    @property
    def granted(self) -> bool:
        return self.slot is not None

    @property
    def throttles(self) -> tuple[Throttle, ...]:
        return self.path.throttles


class Clerk(Receiver):
    """The proxy in the place of one instance on one path.

    Attributes:
        tickets: those that wait, in order.
        slots: (slot, its last moment) of slots that are still to come; never more than tickets.
    """

    __slots__ = ("flow", "slots", "tickets")
    __deletable__ = ("flow",)  # mypyc wants to know

    def __init__(self, name: str, weight: float, path: Path) -> None:
        super().__init__(name, weight)
        self.flow = Flow(self, 0, path)
        self.tickets: dict[MessageTicket, None] = {}
        self.slots: list[tuple[int, int]] = []

    def may_receive(self, now: int) -> bool:
        return True


class Desk:
    """All requests of this kind.

    Attributes:
        granted: tickets that got their slot and were not yet collected.
        wheel: clerks by the next slot that comes.
        clerks: all of them, by instance and path; not to be changed from outside.
    """

    def __init__(self, dispenser: Dispenser, registry: Registry) -> None:
        self.granted: list[MessageTicket] = []
        self.wheel: Wheel[Clerk] = Wheel(MILLISECOND)
        self._dispenser = dispenser
        self._registry = registry
        self.clerks: dict[tuple[str, tuple[Throttle, ...]], Clerk] = {}

    def ticket(self, name: str, weight: float, throttles: tuple[Throttle, ...]) -> MessageTicket | None:
        """For the next message of instance `name` under all of these; to `ask` with. None: nothing limits it."""
        if not any(throttle.windows for throttle in throttles):
            return None
        clerk = self.clerks.get((name, throttles))
        if clerk is None:
            clerk = self.clerks[name, throttles] = Clerk(name, weight, self._registry.hold(throttles))
            path = clerk.flow.path
            path.desk = path.desk or {}
            path.desk[clerk.flow] = None
        clerk.weigh(weight)
        ticket = MessageTicket(clerk)
        clerk.tickets[ticket] = None
        return ticket

    def ask(self, ticket: MessageTicket, now: int) -> None:
        """A slot for this ticket, unless it has been called off."""
        clerk = ticket.clerk
        if ticket in clerk.tickets:
            ticket.asked = True
            clerk.flow.want += 1
            self._dispenser.activate(clerk.flow, now)
            self.settle(now)

    def cancel(self, ticket: MessageTicket, now: int) -> None:
        """Nobody waits for it any more; what was granted and not used goes to the next.

        Under the proxy's own throttles a slot has no life beyond its moment: then it is lost.
        """
        clerk = ticket.clerk
        if ticket.slot is not None:
            self._reuse(ticket.path, ticket.slot, ticket.last, now)
        elif ticket in clerk.tickets:
            del clerk.tickets[ticket]
            if len(clerk.slots) > len(clerk.tickets):
                slot, last = max(clerk.slots)
                clerk.slots.remove((slot, last))
                self._reuse(ticket.path, slot, last, now)
            elif ticket.asked:
                clerk.flow.want -= 1
            self._dismiss(clerk, now)
        self.settle(now)

    def put_off(self, ticket: MessageTicket, now: int, far: bool = False) -> bool:
        """The message of a ticket that was granted goes only now: if that is too late for its slot, those to come are
        put off in return, so that the bound holds where the message goes.

        Args:
            far: whoever lets it go has to be told first: its slot is one of this moment then, with all of its time.

        Returns:
            False: much too late; it needs another slot.
        """
        if ticket.slot is None or now <= ticket.last:
            return True
        late = now - (ticket.slot if far else ticket.last)
        if not all(throttle.may_put_off(late) for throttle in ticket.throttles):
            return False
        ticket.slot, ticket.last = ticket.slot + late, ticket.last + late
        for throttle in ticket.throttles:
            throttle.put_off(ticket.slot, late)
        return True

    def refusal(self, ticket: MessageTicket, now: int) -> Throttled:
        """Why it got no slot in time, and when to come back."""
        return message_refusal(ticket.path, now)

    def expire(self, now: int, most: int) -> None:
        """Hand out the slots whose time has come."""
        for clerk in self.wheel.expire(now, most):
            self._hand_out(clerk, now)
        self.settle(now)

    def settle(self, now: int) -> None:
        """Take what the dispenser has given; to be called after whatever makes it give."""
        while self.clerks and (given := [each for each in self._dispenser.touched if isinstance(each, Clerk)]):
            for clerk in given:
                del self._dispenser.touched[clerk]
                self._receive(clerk, now)

    # --- steps ---

    def _receive(self, clerk: Clerk, now: int) -> None:
        flow, runs = clerk.flow, list(clerk.runs)
        clerk.runs.clear()
        flow.open = None
        slack = flow.path.slack
        for run in runs:
            for slot in [run.first + run.step * i for i in range(run.n)]:
                if slot < now + MICROSECOND:  # never too late in the call that gives it out
                    self._give(clerk, slot, slot + slack)
                else:
                    heappush(clerk.slots, (slot, slot + slack))
        self._hand_out(clerk, now)

    def _give(self, clerk: Clerk, slot: int, last: int) -> None:
        ticket = next(iter(clerk.tickets))
        del clerk.tickets[ticket]
        ticket.slot, ticket.last = slot, last
        self.granted.append(ticket)

    def _hand_out(self, clerk: Clerk, now: int) -> None:
        """The slots that have come; one that we are too late for is lost, and another one is asked for."""
        flow = clerk.flow
        while clerk.slots and clerk.slots[0][0] < now + MICROSECOND:
            slot, last = heappop(clerk.slots)
            if now > last:
                flow.want += 1
            else:
                self._give(clerk, slot, last)
        if clerk.slots:
            self.wheel.arm(clerk, clerk.slots[0][0])
        self._dispenser.activate(flow, now)
        self._dismiss(clerk, now)

    def _reuse(self, path: Path, slot: int, last: int, now: int) -> None:
        """Not if the slack has grown since: the slots of before were spaced for the smaller one."""
        if last - slot == path.slack:
            self._dispenser.reuse(path, [slot], now)
            if path.refs == len(path.desk or ()):
                path.returned = None  # there is no session here that would be told of a growth, and forget it

    def _dismiss(self, clerk: Clerk, now: int) -> None:
        """A clerk with nobody to serve goes, but not out of the middle of a queue."""
        if clerk.tickets:
            return
        flow = clerk.flow
        if flow.queued is not None:
            self._dispenser.serve(flow.queued, now)
        if flow.queued is not None:
            self.wheel.arm(clerk, now + 1_000 * MILLISECOND)  # it may be needed again before it can go
            return
        path = flow.path
        del self.clerks[clerk.name, path.throttles], clerk.flow  # no circle is left behind
        self.wheel.disarm(clerk)
        assert path.desk is not None, "it was listed when it was made"
        del path.desk[flow]
        if not path.desk:
            path.desk = None
        self._registry.let_go(path, now)
