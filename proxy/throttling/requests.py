"""What the proxy asks for on behalf of its clients, with a session or without: places, and slots of single messages.

And the MAILs that it sees pass: each should have a permit of its instance, or is charged.
"""

from __future__ import annotations

from collections.abc import Iterable

from proxy.errors import Throttled
from proxy.model import UNNAMED, Names
from proxy.throttling.audit import Mail, Spent, Verdict
from proxy.throttling.desk import MessageTicket
from proxy.throttling.estate import LeftOf, OwedOf, RepliedOf, SpentOf
from proxy.throttling.flows import Flow, Places, Throttle, Ticket, throttles_of
from proxy.throttling.refusals import refusal
from proxy.throttling.session import Session
from proxy.throttling.statements import Statements

#: Characters of a reply that another process is told of; fewer are looked at.
_LONGEST_REPLY = 4_096


class Requests(Statements):
    """The calls that a connection and its messages become."""

    # --- connections ---

    def flows(self, session: Session, ids: Iterable[int]) -> tuple[Flow, ...]:
        """The flows that a session's path numbers name, for `admit`.

        Raises:
            KeyError: a number that is not registered.
        """
        return tuple([session.flows[id] for id in ids])

    def admit(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        now: int,
        rated: bool = True,
        names: Names = UNNAMED,
    ) -> Places | Ticket:
        """Places for one connection under every throttle that applies, all or none.

        Args:
            owner: instance name, else the client's address: fairness is among owners.
            source: address to leave from. destination: address to go to; canonical text, for the proxy's own throttles.
            flows: what the OPEN names; empty for clients without a session.
            rated: the connection takes a slot of the proxy's own throttles; not if its messages do, see `ask_message`.
            names: what the client says of its receiver.

        Returns:
            the places, or a ticket to wait with; it comes back in `take_admitted`, or `cancel` it and see `refusal`.
        """
        throttles = self._under(owner, source, destination, names, flows, now)
        if self._held is not None and throttles:
            ticket = self._book.ticket(owner, weight, throttles, flows, rated)
            self._held.append(lambda later: self._ask_late(ticket, later))
            return ticket
        answer = self._book.admit(owner, weight, throttles, flows, now, rated)
        if isinstance(answer, Places):
            for throttle in answer.throttles:
                self._active.add(throttle)
        self._settle(now)
        return answer

    def swap(
        self,
        old: Places,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        now: int,
        rated: bool = True,
        names: Names = UNNAMED,
    ) -> Places | None:
        """A cached connection goes to another user: its places for those of the new path. None: not possible now."""
        if self._held is not None:
            return None
        new = self._book.swap(
            old, owner, weight, self._under(owner, source, destination, names, flows, now), flows, now, rated
        )
        if new is not None:
            for throttle in new.throttles:
                self._active.add(throttle)
            self._registry.released(old.throttles, now)
        self._settle(now)
        return new

    def release(self, places: Places, now: int) -> list[Ticket]:
        """The socket is closed; a second time changes nothing.

        Returns:
            tickets that got in by it (and any others not yet collected); their `places` are set.
        """
        if self._held is not None:
            self._leave_late(places)
            return []
        self._leave(places, now)
        return self.take_admitted()

    def heir(self, places: Places, now: int) -> Ticket | None:
        """Who would be the first to get in if these were released; None: nobody, or only releasing would tell."""
        return self._book.heir(places, now) if self._held is None else None

    def cancel(self, ticket: Ticket, now: int) -> list[Ticket]:
        """Nobody waits for `ticket` any more, whether it got in or not. Returns as `release`."""
        if self._held is not None:
            self._cancel_late(ticket)
            return []
        self._cancel(ticket, now)
        return self.take_admitted()

    def take_admitted(self) -> list[Ticket]:
        admitted, self._book.admitted = self._book.admitted, []
        return admitted

    def take_blocked(self) -> list[Throttle]:
        """Full throttles that somebody began to wait under: a cached connection with a place there should give way."""
        throttles, self._book.blocked = list(self._book.blocked), {}
        return throttles

    def wanted(self, places: Places) -> bool:
        """Whether somebody waits for a place that these hold: a cached connection then gives way."""
        return any(throttle.line is not None for throttle in places.throttles)

    def wait_of(self, ticket: Ticket | MessageTicket) -> float | None:
        """Seconds that the proxy's own throttles let a request wait; None: none of them applies."""
        return self.blocks.wait(ticket.throttles)

    def refusal(self, ticket: Ticket | MessageTicket, now: int) -> Throttled:
        """Why `ticket` did not get in, and when to come back."""
        return self._desk.refusal(ticket, now) if isinstance(ticket, MessageTicket) else refusal(ticket, now)

    def _under(
        self, owner: str, source: str, destination: str, names: Names, flows: tuple[Flow, ...], now: int
    ) -> tuple[Throttle, ...]:
        throttles = throttles_of(flows)
        if self.blocks:
            throttles = tuple(
                dict.fromkeys([*throttles, *self.blocks.match(owner, source, destination, names, now).all])
            )
        return throttles

    # --- messages ---

    def ask_message(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...],
        now: int,
        names: Names = UNNAMED,
    ) -> MessageTicket | None:
        """A slot for one message that the proxy passes on for `owner`, in fair order with everybody's demand.

        Args:
            owner, weight, source, destination, names: as for `admit`; who has a session shares its turns with it.
                Without a source the proxy's own throttles do not apply.
            flows: paths of a session whose throttles it shall pass, too.

        Returns:
            None: nothing limits it. A ticket: `granted` already, or later (`take_granted`); it may be called off at any
            time (`cancel_message`), and `refusal` says why it was not.
        """
        throttles = throttles_of(flows)
        if source and self.blocks:
            for throttle in self.blocks.match(owner, source, destination, names, now).messages:
                if throttle.shadow is None:
                    throttles += (throttle,)
                else:
                    throttle.shadow_slot(now)
        ticket = self._desk.ticket(owner, weight, throttles)
        if ticket is None:
            self._settle(now)
            return None
        if self._held is not None:
            waiting = ticket
            self._held.append(lambda later: self._ask_message_late(waiting, later))
        else:
            self._desk.ask(ticket, now)
            for throttle in throttles:
                self._active.add(throttle)
        self._settle(now)
        return ticket

    def cancel_message(self, ticket: MessageTicket, now: int) -> None:
        """Nobody waits for `ticket` any more; a slot that it got and that was not used goes to the next."""
        if self._held is not None:
            # Before those who ask: nothing is to be given to who has gone by then.
            self._held.put_first(lambda later: self.cancel_message(ticket, later))
            return
        self._desk.cancel(ticket, now)
        self._settle(now)

    def put_off(self, ticket: MessageTicket, now: int, far: bool = False) -> bool:
        """The message of a granted ticket goes only now; False: much too late, it needs another slot. See
        `Desk.put_off`."""
        if self._held is not None:
            return ticket.slot is None or now <= ticket.last
        return self._desk.put_off(ticket, now, far)

    def take_granted(self) -> list[MessageTicket]:
        granted, self._desk.granted = self._desk.granted, []
        return granted

    def mail(self, places: Places, now: int) -> Mail:
        """The proxy saw a MAIL on a connection: it should have had a permit on every path.

        Returns:
            with the paths on which it came too late for its permit: it must not go on before it has another slot there
            (`ask_message`).
        """
        late: list[Flow] = []
        spent: list[Spent] = []
        for flow in places.flows:
            verdict, used = self._audit.mail(flow, now)
            if used is not None:
                spent.append(used)
                self._note_spent(used, back=False)
            if verdict is Verdict.LATE:
                late.append(flow)
                self._audit.tell_late(flow, now)
            elif verdict is Verdict.UNPERMITTED:
                self._charge(flow, now)
        self._settle(now)
        return Mail(tuple(late), tuple(spent))

    def in_vain(self, mail: Mail, now: int) -> None:
        """That MAIL was no message, and will be said again elsewhere with the same permit."""
        for spent in mail.spent:
            self._audit.in_vain(spent, now)
            self._note_spent(spent, back=True)

    def replied(self, places: Places, reply: str, now: int) -> None:
        """A receiver refused something on the connection that has these places: see `Blocks.replied`."""
        if self._held is not None:
            self._meanwhile.append(RepliedOf(places.number, reply[:_LONGEST_REPLY]))
            self._held.append(lambda later: self.replied(places, reply, later))
            return
        self._relook(self.blocks.replied(places.throttles, reply, places.owner, now), now)
        self._settle(now)

    def _charge(self, flow: Flow, now: int) -> None:
        """A message without a permit, on a connection that an earlier session of the instance may have opened."""
        session = self.sessions.get(flow.receiver.name)
        self._audit.tell_unpermitted(flow, session, now)
        if not self.enforce:
            return
        if self._held is not None:
            self._meanwhile.append(OwedOf(flow.receiver.name, _keys(flow.path.throttles)))
            self._held.append(lambda later: self._make_pay(flow, later))
        else:
            self._make_pay(flow, now)

    def _make_pay(self, flow: Flow, now: int) -> None:
        session = self.sessions.get(flow.receiver.name)
        payer = flow if flow.receiver is session else self._registry.successor(flow, session)
        if payer is None:
            self._registry.owe(flow)
            return
        payer.fine += 1
        payer.want += 1
        self._book.shut(payer, now)
        self._dispenser.activate(payer, now)
        self._settle(now)

    def _relook(self, throttles: Iterable[Throttle], now: int) -> None:
        """Their limits are others now: so may be who gets something."""
        for throttle in throttles:
            self._book.pump(throttle, now)
            self._dispenser.serve(throttle, now)

    # --- what waits while the manager is frozen ---

    def _ask_late(self, ticket: Ticket, now: int) -> None:
        self._book.ask(ticket, now)
        if ticket.places is not None:
            self._active.update(ticket.places.throttles)
        self._settle(now)

    def _ask_message_late(self, ticket: MessageTicket, now: int) -> None:
        self._desk.ask(ticket, now)
        self._settle(now)

    def _leave_late(self, places: Places) -> None:
        self._meanwhile.append(LeftOf(places.number))
        assert self._held is not None
        self._held.append(lambda later: self._leave(places, later))

    def _leave(self, places: Places, now: int) -> None:
        self._book.release(places, now)
        self._registry.released(places.throttles, now)
        self._settle(now)

    def _cancel_late(self, ticket: Ticket) -> None:
        assert self._held is not None
        if ticket.places is not None:
            self._leave_late(ticket.places)
        elif ticket.blocker is None:  # it has not asked yet
            ticket.waiting = False
        else:
            self._held.append(lambda later: self._cancel(ticket, later))

    def _cancel(self, ticket: Ticket, now: int) -> None:
        self._book.cancel(ticket, now)
        if ticket.places is not None:
            self._registry.released(ticket.places.throttles, now)
        self._settle(now)

    def _note_spent(self, spent: Spent, back: bool) -> None:
        """A permit of an account that was told already."""
        gathered = self._audit.gathered
        if gathered is not None and spent.holder in gathered:
            owner, throttles = spent.holder
            self._meanwhile.append(SpentOf(owner, _keys(throttles), spent.slot, spent.last, back))


def _keys(throttles: tuple[Throttle, ...]) -> list[tuple[int, str, str, str]]:
    return [(each.kind, *each.key) for each in throttles]
