"""Where places under throttles and slots of messages are had: what a connection needs of all others, as an interface.

Two have it: `admission`, which has the throttle manager at hand, and `remote`, in a process whose manager is another
one's. Whoever serves a connection does not know which it deals with.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, Protocol

from proxy.errors import Throttled
from proxy.model import UNNAMED, Names
from proxy.throttling.audit import Mail
from proxy.throttling.flows import Flow, Places, Ticket

#: Told once, in the hub: None: it is there, to be used at once; or why there is none. Must not wait.
Answer = Callable[[Throttled | None], None]
#: Told once, in the hub: why there are no places, or the places (None: none are needed). Must not wait.
PlaceAnswer = Callable[[Throttled | None, Places | None], object]


class Applicant:
    """Who asks for places or slots, and for which receiver; the same for every call of one client. Never changed.

    Args:
        owner: instance name, else the client's address; one that has a session shares its turns with it.
        weight: as the operator has set it.
        source, destination: addresses in canonical form; the proxy's own throttles that match them apply. None does
            without a source.
        flows: a session's paths, whose throttles apply, too.
        rated: whether a connection counts against the rates of the proxy's own throttles; not if its messages do, each
            by `ask_slot`.
        names: what the client says of its receiver.
    """

    __slots__ = ("destination", "flows", "names", "owner", "rated", "source", "weight")

    def __init__(
        self,
        owner: str,
        weight: float,
        source: str,
        destination: str,
        flows: tuple[Flow, ...] = (),
        rated: bool = True,
        names: Names = UNNAMED,
    ) -> None:
        self.owner = owner
        self.weight = weight
        self.source = source
        self.destination = destination
        self.flows = flows
        self.rated = rated
        self.names = names


class Slot(Protocol):
    """A request for the slot of one message."""

    @property
    def granted(self) -> bool:
        """The slot is there, and is to be used in the same breath."""


class Permit(NamedTuple):
    """What a MAIL comes to. `waits`: it has to, for a slot; `mail`: what it has used up, if that was seen here."""

    waits: Slot | None
    mail: Mail | None


class Office(Protocol):
    """All calls but `swap`, `pass_on` and `put_off` return at once."""

    # ---------------------------------------------------------------- places

    @property
    def limited(self) -> bool:
        """Whether the proxy has throttles of its own: without, `ask_place` need not be called."""

    def ask_place(
        self, who: Applicant, seconds: float, answer: PlaceAnswer, key: Hashable
    ) -> Places | Ticket | int | None:
        """Ask for a place under every throttle that applies, in fair order. See `asking.wait_for_place`, too.

        Args:
            seconds: the longest to wait; the proxy's own throttles may say less.
            answer: not called if they are there at once, nor after `cancel_place`.
            key: of the cached connection that would do; see `pass_on`.

        Returns:
            None: none applies. The places; or a ticket.
        """

    def cancel_place(self, ticket: Ticket | int) -> None:
        """Nobody waits for it any more, whether it was given meanwhile or not; after the answer this changes
        nothing."""

    def swap(self, old: Places | None, who: Applicant) -> tuple[bool, Places | None]:
        """A cached connection changes its user: its places for those of the new one, in one call. Whoever is thrown out
        of it has to give back the old ones.

        Returns:
            whether it may, and the new places; if not, the old ones are as they were.
        """

    def leave(self, places: Places | None) -> None:
        """The socket is closed."""

    def wanted(self, places: Places | None) -> bool:
        """Whether somebody waits for one of these places."""

    def awaited(self, key: Hashable) -> bool:
        """Whether one who waits for places, anywhere, asks for this key."""

    def pass_on(self, places: Places, key: Hashable) -> bool:
        """Give the places of a cached connection to who is next, if that one asks for its key; whether it did.

        It takes over the connection when it runs next. Otherwise the caller has to close the socket: the places are
        taken until it gives them back, so that whoever is next connects when that is done.
        """

    # ---------------------------------------------------------------- messages

    def ask_slot(self, who: Applicant, seconds: float, answer: Answer) -> Slot | None:
        """Ask for the slot of one message that the proxy is to pass on, in fair order with all instances' demand. See
        `asking.wait_for_slot`, too.

        Args:
            seconds: the longest to wait; the proxy's own throttles may say less.
            answer: see `Answer`. Not called if the slot is there at once, nor after `cancel_message`.

        Returns:
            None: nothing limits it. Else a ticket for `cancel_message` and `put_off`; if it is `granted`, the slot is
            there: pass the message on now. The refusal names the throttle (`throttle`) and says when to come back
            (`retry_after`, seconds).
        """

    def permit(self, places: Places, seconds: float, answer: Answer) -> Permit:
        """A MAIL of a session could go now, on the connection with these places: so its permit has to be good now.

        Args:
            seconds: the longest to wait for another slot, if it is not. answer: as in `ask_slot`.
        """

    def in_vain(self, mail: Mail) -> None:
        """That MAIL of a session was no message, and will be said again elsewhere with the same permit."""

    def cancel_message(self, ticket: Slot) -> None:
        """Nobody waits for it any more. A slot that has come and was not told of goes to the next; after the answer
        this changes nothing."""

    def put_off(self, ticket: Slot | None, far: bool = False) -> bool:
        """The message of a ticket that was granted goes in this moment, which may be later than its slot.

        Args:
            far: it goes from another process, as soon as that is told.

        Returns:
            False: so much later that it needs another slot.
        """

    # ---------------------------------------------------------------- what became of it

    @property
    def listens(self) -> bool:
        """Whether refusals are of interest."""

    def replied(self, places: Places | None, reply: str, settle_later: bool = False) -> None:
        """A receiver refused something on the connection that has these places.

        Whoever asks from now on finds the limits that follow, and so does who waits: to be called before the places are
        given back.

        Args:
            reply: its code and a blank, then its lines, joined by LF.
            settle_later: the caller must not have the engine called, as this may.
        """

    def carried(self, places: Places | None, accepted: int, deferred: int, rejected: int) -> None:
        """What became of the messages of one use of the connection that has these places."""
