"""The office of a process that may be replaced: its own throttle manager, until another process has taken that over.

Before `hand_over` everything goes to `admission`. Afterwards this process is a worker of the one that has replaced it
(`remote`). Places that it still has from before stay on the manager that is frozen here: what happens to them is told
the other one by the manager (`Handover.meanwhile`). Who waits asks anew there, without noticing.
"""

from __future__ import annotations

from collections.abc import Hashable

from proxy.egress.admission import Admission
from proxy.egress.lent import Lent
from proxy.egress.office import Answer, Applicant, Office, Permit, PlaceAnswer, Slot
from proxy.egress.remote import Remote, RemoteSlot
from proxy.throttling.audit import Mail
from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Places, Ticket


class Switch(Office):
    """See above; for the calls of `Office` see there.

    Attributes:
        away: None: the manager is here.
    """

    def __init__(self, here: Admission) -> None:
        self.here = here
        self.away: Remote | None = None

    def hand_over(self, away: Remote) -> None:
        """From now on another process decides."""
        self.away = away
        self.here.move(away)

    # ---------------------------------------------------------------- places

    @property
    def limited(self) -> bool:
        """See `Office`."""
        return bool(self.here.manager.blocks)

    def ask_place(
        self, who: Applicant, seconds: float, answer: PlaceAnswer, key: Hashable
    ) -> Places | Ticket | int | None:
        """See `Office`."""
        return (self.away or self.here).ask_place(who, seconds, answer, key)

    def cancel_place(self, ticket: Ticket | int) -> None:
        """See `Office`."""
        if isinstance(ticket, Ticket):
            self.here.cancel_place(ticket)
        elif self.away is not None:
            self.away.cancel_place(ticket)

    def swap(self, old: Places | None, who: Applicant) -> tuple[bool, Places | None]:
        """See `Office`."""
        office = self.here if old is not None else self.away or self.here
        return self._of(old, office).swap(old, who)

    def leave(self, places: Places | None) -> None:
        """See `Office`."""
        self._of(places, self.here).leave(places)

    def wanted(self, places: Places | None) -> bool:
        """See `Office`."""
        return self._of(places, self.here).wanted(places)

    def awaited(self, key: Hashable) -> bool:
        """See `Office`."""
        return self.here.awaited(key) or (self.away is not None and self.away.awaited(key))

    def pass_on(self, places: Places, key: Hashable) -> bool:
        """See `Office`."""
        return self._of(places, self.here).pass_on(places, key)

    # ---------------------------------------------------------------- messages

    def ask_slot(self, who: Applicant, seconds: float, answer: Answer) -> MessageTicket | RemoteSlot | None:
        """See `Office`."""
        return (self.away or self.here).ask_slot(who, seconds, answer)

    def cancel_message(self, ticket: Slot) -> None:
        """See `Office`."""
        self._with(ticket).cancel_message(ticket)

    def put_off(self, ticket: Slot | None, far: bool = False) -> bool:
        """See `Office`."""
        ticket = heir_of(ticket)
        return self._with(ticket).put_off(ticket, far)

    def permit(self, places: Places, seconds: float, answer: Answer) -> Permit:
        """See `Office`."""
        return (self.away or self.here).permit(places, seconds, answer)

    def in_vain(self, mail: Mail) -> None:
        """See `Office`."""
        self.here.in_vain(mail)

    # ---------------------------------------------------------------- what became of it

    @property
    def listens(self) -> bool:
        """See `Office`."""
        return self.here.listens

    def replied(self, places: Places | None, reply: str, settle_later: bool = False) -> None:
        """See `Office`."""
        self._of(places, self.here).replied(places, reply, settle_later)

    def carried(self, places: Places | None, accepted: int, deferred: int, rejected: int) -> None:
        """See `Office`."""
        self._of(places, self.here).carried(places, accepted, deferred, rejected)

    # ---------------------------------------------------------------- whose it is

    def _of(self, places: Places | None, otherwise: Office) -> Office:
        return self.away if self.away is not None and isinstance(places, Lent) else otherwise

    def _with(self, ticket: Slot | None) -> Office:
        return self.away if self.away is not None and isinstance(ticket, RemoteSlot) else self.here


def heir_of(ticket: Slot | None) -> Slot | None:
    """Who waited here when another process took over has its slot from there."""
    return ticket.heir if isinstance(ticket, MessageTicket) and isinstance(ticket.heir, RemoteSlot) else ticket
