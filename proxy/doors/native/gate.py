"""Whether a MAIL of a session on a channel may go on: with a permit that has not lapsed on its way, or a new slot.

The link between an MTA and the proxy may stall, and then deliver at once what was written over a while: each MAIL had
its permit when the MTA wrote it, and together they would be a burst at the receiver. So a permit is looked at here once
more (`throttling.audit`), and a MAIL that comes too late for its own waits for the next slot of its throttles, with all
that stands behind it. Holding the bytes is `transfer`'s.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.egress.admission import Admission, clock_ns
from proxy.errors import Throttled
from proxy.throttling.audit import LATE, Mail
from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Places

#: MAILs of a session that may turn out to have been in vain: no receiver takes so many without an answer to the first.
_MOST_IN_VAIN = 100


class Gate:
    """One session's.

    Args:
        places: of the connection to the receiver; they name the paths.
        wake: called when a MAIL that was held may go on, or never will; must not wait.

    Attributes:
        refusal: why the MAIL that is held will not go on.
    """

    def __init__(self, admission: Admission, places: Places, wake: Callable[[], None]) -> None:
        self.refusal: Throttled | None = None
        self._admission = admission
        self._places = places
        self._wake = wake
        self._ticket: MessageTicket | None = None
        self._mails: list[Mail] = []

    @property
    def closed(self) -> bool:
        """A MAIL waits for its slot."""
        return self._ticket is not None

    def mail(self) -> bool:
        """A MAIL has come; whether it may go on. If not, `wake` is called when `closed` has changed."""
        admission, places = self._admission, self._places
        mail = admission.manager.mail(places, clock_ns())
        if len(self._mails) < _MOST_IN_VAIN:
            self._mails.append(mail)
        admission.settle()
        if mail.late:
            self._ticket = admission.ask_message(
                places.owner, places.weight, "", "", mail.late, LATE / 1_000_000_000, self._answered
            )
        return self._ticket is None

    def in_vain(self) -> None:
        """The connection was dead: the MAILs will be said again elsewhere, with the same permits."""
        for mail in self._mails:
            self._admission.manager.in_vain(mail, clock_ns())

    def leave(self) -> None:
        """The session is over; nobody waits any more."""
        if self._ticket is not None:
            self._admission.cancel_message(self._ticket)
            self._ticket = None

    def _answered(self, refusal: Throttled | None) -> None:
        self._ticket, self.refusal = None, refusal
        self._wake()
