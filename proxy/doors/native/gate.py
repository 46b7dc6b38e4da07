"""Whether a MAIL of a session on a channel may go on: with a slot of the proxy's throttles, and a permit or a new slot.

The proxy's throttles count messages where it sees them, as in mode smtp: each MAIL takes a slot of all that match.

The link between an MTA and the proxy may stall, and then deliver at once what was written over a while: each MAIL had
its permit when the MTA wrote it, and together they would be a burst at the receiver. So a permit is looked at here once
more (`throttling.audit`), when the MAIL could go, and one that comes too late for its own waits for the next slot of
its throttles, with all that stands behind it. Holding the bytes is `transfer`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from proxy.egress.office import Applicant, Office, Slot
from proxy.errors import Throttled
from proxy.model import UNNAMED, Names
from proxy.throttling.audit import LATE, Mail
from proxy.throttling.flows import Places

#: MAILs of a session that may turn out to have been in vain: no receiver takes so many without an answer to the first.
_MOST_IN_VAIN = 100
#: Seconds to wait for a slot.
_LONGEST = LATE / 1_000_000_000


class Way(NamedTuple):
    """Where a session's messages go, as the proxy's own throttles match it; canonical addresses."""

    source: str
    destination: str
    names: Names = UNNAMED


class Gate:
    """One session's.

    Args:
        places: of the connection to the receiver; they name the paths.
        wake: called when a MAIL that was held may go on, or never will; must not wait.

    Attributes:
        refusal: why the MAIL that is held will not go on; whoever acts upon it takes it away.
    """

    def __init__(self, office: Office, places: Places, way: Way, wake: Callable[[], None]) -> None:
        self.refusal: Throttled | None = None
        self._office = office
        self._places = places
        self._who = Applicant(places.owner, places.weight, way.source, way.destination, (), False, way.names)
        self._wake = wake
        self._waits: Slot | None = None
        self._slot: Slot | None = None  # the one under the proxy's own throttles
        self._mails: list[Mail] = []
        self._paid_unseen = False

    @property
    def closed(self) -> bool:
        """A MAIL waits for its slot."""
        return self._waits is not None

    def mail(self) -> bool:
        """A MAIL has come; whether it may go on. If not, `wake` is called when `closed` has changed."""
        return self._take_slot(self._slot_came) and self._look_at_permit()

    def unseen(self) -> bool:
        """Bytes have come in which nobody sees a MAIL; whether they may go on. They count as one message in all, as a
        connection does of which nothing is seen."""
        if self._paid_unseen:
            return True
        self._paid_unseen = True
        return self._take_slot(self._answered)

    def in_vain(self) -> None:
        """The connection was dead: the MAILs will be said again elsewhere, with the same permits."""
        for mail in self._mails:
            self._office.in_vain(mail)

    def leave(self) -> None:
        """The session is over; nobody waits any more."""
        if self._waits is not None:
            self._office.cancel_message(self._waits)
            self._waits = None

    # ---------------------------------------------------------------- steps; each says whether nothing waits

    def _take_slot(self, answer: Callable[[Throttled | None], None]) -> bool:
        """Of the proxy's own throttles."""
        ticket = self._slot = self._office.ask_slot(self._who, _LONGEST, answer)
        if ticket is None or ticket.granted:
            return True
        self._waits = ticket
        return False

    def _look_at_permit(self) -> bool:
        """The MAIL could go now: so its permit has to be good now."""
        self._waits, mail = self._office.permit(self._places, _LONGEST, self._permit_came)
        if mail is not None and len(self._mails) < _MOST_IN_VAIN:
            self._mails.append(mail)
        return self._waits is None

    def _slot_came(self, refusal: Throttled | None) -> None:
        self._waits = None
        if refusal is not None or self._look_at_permit():
            self._answered(refusal)

    def _permit_came(self, refusal: Throttled | None) -> None:
        """Meanwhile the slot of the proxy's own throttles has grown old."""
        self._waits = None
        if refusal is not None or self._office.put_off(self._slot) or self._take_slot(self._answered):
            self._answered(refusal)

    def _answered(self, refusal: Throttled | None) -> None:
        self._waits, self.refusal = None, refusal
        self._wake()
