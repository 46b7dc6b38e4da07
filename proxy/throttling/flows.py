"""Throttles, who uses them and for what: the records that the dispenser, the place book and the manager share.

A *receiver* is a session, a *path* the throttles that one kind of message passes, a *flow* one receiver's demand on a
path, a *run* some of its slots, a *ticket* its request for a connection. They name each other, so they stand in one
file. Only data and what follows from it at once; who is served is decided elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

from proxy.model import UNNAMED, Names
from proxy.throttling.limits import Backoff, BackoffRule, Effective, Part, reconcile
from proxy.throttling.line import Line, Request
from proxy.throttling.share import clamp_weight
from proxy.throttling.throttle import MICROSECOND, SECOND, Carried, Key, Meter

#: Virtual time of one permit at weight 1.
UNIT: Final = 1 << 20
WORD: Final = 1 << 32
#: Outcomes are judged over this time, and only when there are enough of them.
OUTCOME_PERIOD: Final = 60 * SECOND
OUTCOME_MINIMUM: Final = 20


class Throttle(Meter):
    """The meter of one key, and who uses it.

    Attributes:
        slots, line, terms: who waits for slots, who waits for places, what the instances said; None: nothing.
        along: throttles at which all who hold a place here hold one, too: theirs come free together.
    """

    __slots__ = ("along", "line", "slots", "terms")

    def __init__(self, key: Key, counts: bool = False) -> None:
        super().__init__(key, counts)
        self.slots: Slots | None = None
        self.line: Line[Ticket] | None = None
        self.terms: Terms | None = None
        self.along: tuple[Throttle, ...] = ()

    @property
    def kind(self) -> int:
        """Of instances (0), the proxy's own (1), or the meter of its connection rate (2): with the key, which it is."""
        return self.counts + self.connections

    def in_use(self) -> bool:
        """Whether someone waits, or a place is taken."""
        return bool(self.used or self.slots or self.line)

    def busy(self, now: int) -> bool:
        """What the status counts: in use, or in debt."""
        return self.in_use() or self.debt_until() > now


class Run:
    """`n` slots of a flow, the first at `first` and then each `step`; the first is the flow's `serial`th permit.

    Step 0: all at once, those of a burst; or `free`, when no rate limits the path and there are no slots at all.
    """

    __slots__ = ("first", "flow", "free", "n", "serial", "step")

    def __init__(self, flow: Flow, serial: int, first: int, n: int = 1, step: int = 0, free: bool = False) -> None:
        self.flow = flow
        self.serial = serial
        self.first = first
        self.n = n
        self.step = step
        self.free = free


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
        self.runs: deque[Run] = deque()  # one for life: a list of 100,000 made anew is looked at by each collection
        self.parked: dict[Flow, None] = {}
        self.limits: dict[Flow, None] = {}

    def weigh(self, weight: float) -> None:
        self.weight = clamp_weight(weight)
        self.cost = int(UNIT / self.weight)

    def may_receive(self, now: int) -> bool:
        raise NotImplementedError


class Path:
    """Throttles that a message passes together.

    Attributes:
        horizon: how far ahead its slots are given out; at least the rest of a microsecond, since slots are whole ones.
        returned: slots that came back and may be used again.
        desk: flows of the proxy itself (see `desk`), which no instance has registered.
    """

    __slots__ = ("desk", "horizon", "refs", "returned", "throttles")

    def __init__(self, throttles: tuple[Throttle, ...]) -> None:
        self.throttles = throttles
        self.horizon = max(min([throttle.lead for throttle in throttles]), MICROSECOND - 1)
        self.returned: list[int] | None = None
        self.desk: dict[Flow, None] | None = None
        self.refs = 0

    def flows(self) -> list[Flow]:
        """The flows on this path."""
        fewest = min([each.terms for each in self.throttles if each.terms is not None], key=len, default=())
        return [flow for flow in fewest if flow.path is self] + list(self.desk or ())

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
    def limited(self) -> bool:
        """Whether its messages need slots."""
        throttles = self.throttles
        return bool(throttles[0].windows) or any(throttle.windows for throttle in throttles[1:])

    @property
    def slack(self) -> int:
        """d of this path's permits: the smallest of its throttles'."""
        throttles = self.throttles
        return throttles[0].slack if len(throttles) == 1 else min([throttle.slack for throttle in throttles])


class Flow:
    """One session's demand on one path.

    Attributes:
        id: the session's number for the path.
        want: permits wanted beyond those on their way. granted: permits granted so far.
        order: who waits longer has the smaller one; `turn`, once it has had its first turn, will be the next one.
        turns: throttles of its path, by bit, where it has had its turn. delayed: somebody who came later was let in
            before it meanwhile.
        fine: slots to take from this flow's share without giving them (messages that were sent without a permit).
        queued: the throttle in whose queue it stands. open: the run that may still grow. held: runs that were sent.
        places, waiting_places: connections open and requested. listed: either is not 0, and its throttles know.
        gated: tickets for connections that wait for this flow itself. cap: the last advice and when it was given.
        names: of the receivers that its connections go to, where an OPEN does not say.
    """

    # One flow for each path of each session: 100,000 of them must stay small.
    __slots__ = (
        *("id", "receiver", "path", "want", "granted", "fine", "paused", "queued", "open", "held"),
        *("places", "waiting_places", "listed", "gated", "cap", "order", "turn", "turns", "delayed"),
        "names",
    )

    def __init__(self, receiver: Receiver, id: int, path: Path) -> None:
        self.receiver = receiver
        self.id = id
        self.path = path
        self.want = 0
        self.granted = 0
        self.order = 0
        self.turn = 0
        self.turns = 0
        self.delayed = False
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
        self.names: Names = UNNAMED

    def has_had_turn(self, throttle: Throttle) -> bool:
        """Whether it may go before the others at `throttle` (of its path)."""
        return self.turns >> self.path.throttles.index(throttle) & 1 == 1


def throttles_of(flows: tuple[Flow, ...]) -> tuple[Throttle, ...]:
    """All throttles of these paths, each once."""
    if len(flows) == 1:
        return flows[0].path.throttles
    return tuple(dict.fromkeys(throttle for flow in flows for throttle in flow.path.throttles))


class Slots:
    """Who waits for a throttle's slots: a heap by virtual time, and the virtual time of each name.

    Attributes:
        queue: those who wait here; others wait at another throttle of their path. waiting: how many in all.
        path: the one path of all who wait, None when there are several.
        times: names' virtual times, `clock` that of the last slot. claim: for whom the next slot is kept, if anybody.
    """

    __slots__ = ("claim", "clock", "path", "queue", "times", "waiting")

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self.queue: list[tuple[int, int, Flow]] = []
        self.waiting = 0
        self.times: dict[str, int] = {}
        self.clock = 0
        self.claim: Flow | None = None


class Places:
    """The places of one socket; given back once, however often it is closed.

    Attributes:
        number: by which other processes know it, from 1 on.
    """

    __slots__ = ("flows", "number", "open", "owner", "throttles", "weight")

    def __init__(
        self, number: int, owner: str, weight: float, throttles: tuple[Throttle, ...], flows: tuple[Flow, ...]
    ) -> None:
        self.number = number
        self.owner = owner
        self.weight = weight
        self.throttles = throttles
        self.flows = flows
        self.open = True

    def carried(self, accepted: int, deferred: int, rejected: int) -> None:
        """What became of the messages of one use of the connection."""
        if not accepted and not deferred and not rejected:
            return
        for throttle in self.throttles:
            if throttle.carried is None:
                throttle.carried = Carried()
            throttle.carried.accepted += accepted
            throttle.carried.deferred += deferred
            throttle.carried.rejected += rejected


NOWHERE: frozenset[Throttle] = frozenset()


class Ticket(Request):
    """A request that waits. `places` is set when it got in; `blocker` is what it waits for until then.

    Attributes:
        rated: it also takes a slot of the throttles that count connections.
        turns: throttles where it has had its turn.
    """

    __slots__ = ("blocker", "flows", "places", "rated", "throttles", "turns", "waiting")

    def __init__(
        self,
        owner: str,
        weight: float,
        throttles: tuple[Throttle, ...],
        flows: tuple[Flow, ...],
        rated: bool = True,
    ) -> None:
        super().__init__(owner, weight)
        self.throttles = throttles
        self.flows = flows
        self.rated = rated
        self.turns = NOWHERE
        self.places: Places | None = None
        self.blocker: Throttle | Flow | None = None
        self.waiting = True


class Stake:
    """One instance's part in a throttle, and its flows that name the throttle; with none it is only remembered.

    Nearly always there is one flow: it is kept without a container, since there may be 100,000 throttles.
    """

    __slots__ = ("_flow", "_more", "name", "part")

    def __init__(self, name: str, part: Part) -> None:
        self.name = name
        self.part = part
        self._flow: Flow | None = None
        self._more: dict[Flow, None] | None = None

    def add(self, flow: Flow) -> None:
        if self._flow is None:
            self._flow = flow
        else:
            if self._more is None:
                self._more = {}
            self._more[flow] = None

    def remove(self, flow: Flow) -> None:
        if self._flow is flow:
            self._flow = None
        elif self._more is not None:
            del self._more[flow]

    def flows(self) -> list[Flow]:
        """All of them now."""
        first = [] if self._flow is None else [self._flow]
        return first + list(self._more or ())

    def __contains__(self, flow: Flow) -> bool:
        return flow is self._flow or (self._more is not None and flow in self._more)

    def __iter__(self) -> Iterator[Flow]:
        if self._flow is not None:
            yield self._flow
        if self._more is not None:
            yield from self._more

    def __len__(self) -> int:
        return (self._flow is not None) + len(self._more or ())


class Terms:
    """All that was said about one throttle, and by whom; iterates over the flows whose path names it.

    Attributes:
        stakes: one for each instance.
        users: flows with connections, open or waiting. advice: how many each should have, if they are too few.
        mixed: the instances' modes contradict each other. bad, total: outcomes of the current period.
    """

    __slots__ = ("advice", "backoff", "bad", "mixed", "period_end", "stakes", "total", "users")

    def __init__(self) -> None:
        self.stakes: list[Stake] = []
        self.users: dict[Flow, None] | None = None
        self.advice: dict[Flow, int] | None = None
        self.backoff: Backoff | None = None
        self.mixed = False
        self.total = 0
        self.bad = 0
        self.period_end = 0

    def stake(self, name: str) -> Stake | None:
        for stake in self.stakes:
            if stake.name == name:
                return stake
        return None

    def __iter__(self) -> Iterator[Flow]:
        for stake in self.stakes:
            yield from stake

    def __len__(self) -> int:
        return sum(map(len, self.stakes))

    def effective(self, now: int) -> Effective:
        """What is in force now."""
        full = reconcile([stake.part for stake in self.stakes])
        self.mixed = full.mixed
        if self.backoff is not None and self.backoff.over(now):
            self.backoff = None
        return full if self.backoff is None else self.backoff.apply(full, now)

    def enter_backoff(self, rule: BackoffRule, now: int) -> None:
        """Slow down, or stay slow for longer."""
        self.backoff = Backoff(rule, now)
        self.total = self.bad = 0

    def count(self, ok: int, bad: int, threshold: int, now: int) -> bool:
        """Add outcomes; whether the bad ones of this period reach `threshold` percent (0: never)."""
        if now >= self.period_end:
            self.total = self.bad = 0
            self.period_end = now + OUTCOME_PERIOD
        self.total += ok + bad
        self.bad += bad
        return threshold > 0 and self.total >= OUTCOME_MINIMUM and self.bad * 100 >= self.total * threshold
