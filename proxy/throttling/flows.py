"""Who gets permits and for what: the records that the dispenser, the place book and the manager share.

A *receiver* is a session, a *path* the throttles that one kind of message passes, a *flow* one receiver's demand on a
path, a *run* some of its slots. Only data and what follows from it at once; who is served is decided elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proxy.throttling.share import clamp_weight
from proxy.throttling.throttle import Throttle

if TYPE_CHECKING:
    from proxy.throttling.places import Ticket

#: Virtual time of one permit at weight 1.
UNIT = 1 << 20
WORD = 1 << 32


class Run:
    """`n` slots of a flow, the first at `first` and then each `step`; the first is the flow's `serial`th permit."""

    __slots__ = ("first", "flow", "n", "serial", "step")

    def __init__(self, flow: Flow, serial: int, first: int, n: int = 1, step: int = 0) -> None:
        self.flow = flow
        self.serial = serial
        self.first = first
        self.n = n
        self.step = step


class Receiver:
    """Who gets permits: a session, as far as the dispenser cares.

    Attributes:
        name: the instance; virtual time is kept under it, so a reconnect gains nothing.
        cost: virtual time of one permit.
        runs: granted and not yet sent. parked: flows that wait until this receiver may receive again.
        limits: flows whose limits it is to be told.
    """

    __slots__ = ("cost", "limits", "name", "parked", "runs", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weigh(weight)
        self.runs: list[Run] = []
        self.parked: dict[Flow, None] = {}
        self.limits: dict[Flow, None] = {}

    def weigh(self, weight: float) -> None:
        self.weight = clamp_weight(weight)
        self.cost = int(UNIT / self.weight)

    def may_receive(self, now: int) -> bool:
        raise NotImplementedError


class Path:
    """Throttles that a message passes together. `returned` holds slots that came back and may be used again."""

    __slots__ = ("refs", "returned", "throttles")

    def __init__(self, throttles: tuple[Throttle, ...]) -> None:
        self.throttles = throttles
        self.returned: list[int] | None = None
        self.refs = 0

    def flows(self) -> list[Flow]:
        """The flows on this path."""
        fewest = min((each.terms for each in self.throttles if each.terms is not None), key=len)
        return [flow for flow in fewest if flow.path is self]

    def earliest(self, now: int) -> tuple[int, Throttle | None]:
        """The next slot that all throttles have, and the throttle that decides it (None: nothing limits the rate)."""
        slot, decider = 0, None
        for throttle in self.throttles:
            if throttle.windows:
                own = throttle.earliest(now)
                if own > slot:
                    slot, decider = own, throttle
        return slot, decider

    @property
    def slack(self) -> int:
        """d of this path's permits: the smallest of its throttles'."""
        return min(throttle.slack for throttle in self.throttles)


class Flow:
    """One session's demand on one path.

    Attributes:
        id: the session's number for the path.
        want: permits wanted beyond those on their way. granted: permits granted so far.
        balance: permits granted and not returned, minus messages seen.
        yielded: the slot for which it last let others go first.
        fine: slots to take from this flow's share without giving them (messages that were sent without a permit).
        queued: the throttle in whose queue it stands. open: the run that may still grow. held: runs that were sent.
        places, waiting_places: connections open and requested. listed: either is not 0, and its throttles know.
        gated: tickets for connections that wait for this flow itself. cap: the last advice and when it was given.
    """

    # One flow for each path of each session: 100,000 of them must stay small.
    __slots__ = (
        *("id", "receiver", "path", "want", "granted", "balance", "fine", "paused", "queued", "open", "held"),
        *("places", "waiting_places", "listed", "gated", "cap", "yielded"),
    )

    def __init__(self, receiver: Receiver, id: int, path: Path) -> None:
        self.receiver = receiver
        self.id = id
        self.path = path
        self.want = 0
        self.granted = 0
        self.balance = 0
        self.yielded = 0
        self.fine = 0
        self.paused = False
        self.queued: Throttle | None = None
        self.open: Run | None = None
        self.held: list[Run] | None = None
        self.places = 0
        self.waiting_places = 0
        self.listed = False
        self.gated: list[Ticket] | None = None
        self.cap: tuple[int, int] | None = None
