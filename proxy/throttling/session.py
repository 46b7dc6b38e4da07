"""One instance's session with the throttle manager: what is known of it, and what waits to be sent to it.

`Session` gathers; `take` turns what has gathered into the records of the wire, with times relative to the moment of
sending. Advice and limits are coalesced (the latest wins), grants are appended. What happens to whom is `manager`'s.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from itertools import islice
from typing import Final, NamedTuple, TypeVar

from proxy.throttling.doubt import Doubt
from proxy.throttling.flows import Flow, Path, Receiver, Run
from proxy.throttling.limits import Effective
from proxy.throttling.throttle import MICROSECOND, SECOND

PING_EVERY: Final = 1 * SECOND
#: Without a round trip for this long there are no grants, and then no session.
STALE_AFTER: Final = 3 * SECOND
DEAD_AFTER: Final = 5 * SECOND
#: A lost session's part in the limits stays until this long after its last pong.
LEASE: Final = 10 * SECOND
#: Room beside two round trips that the slack of a permit should leave.
SLACK_MARGIN: Final = 50_000_000
#: Answers kept for a client that pings and does not read.
MAX_PONGS: Final = 16
#: Runs that are looked at for one delivery: those whose limits come first are held, and there may be many.
_LOOKED_AT: Final = 2000
#: No path has less.
SMALLEST_SLACK: Final = 100_000_000


_WORD: Final = 2**32 - 1

K = TypeVar("K")
V = TypeVar("V")


class End(enum.StrEnum):
    """Why the manager is done with a session."""

    BYE = "bye"
    LOST = "lost"
    SILENT = "silent"
    FENCED = "fenced"
    REPLACED = "replaced"


class PongRecord(NamedTuple):
    """Answer to the client's ping `t`, held `hold_us`."""

    t: int
    hold_us: int


class GrantRecord(NamedTuple):
    """`n` slots of path `id`: the first `first_offset_us` from now (negative: ago), then each `step_us`.

    `slack_us`: how long after its time each may be used.
    """

    id: int
    n: int
    first_offset_us: int
    step_us: int
    slack_us: int


class LimitRecord(NamedTuple):
    """What is in force on path `id`, throttles in the order of REG; `slack_us` is d; `backoff_ms` from now, 0: none."""

    id: int
    throttles: tuple[Effective, ...]
    slack_us: int
    backoff_ms: int
    paused: bool
    warning: str


class Output(NamedTuple):
    """What to send, in this order. Grants count from the client's ping `ping_t`, which came `hold_us` ago.

    Limits go before grants: a client must know the slack of a path before its first permit. `ping` is the manager's own
    ping (microseconds), to be echoed, or None.
    """

    pongs: list[PongRecord]
    ping: int | None
    limits: list[LimitRecord]
    ping_t: int
    hold_us: int
    grants: list[GrantRecord]
    caps: list[tuple[int, int]]


class Figures(NamedTuple):
    """For the status line; times in seconds, `ping` 0: no round trip yet."""

    name: str
    connected: float
    ping: float
    ping_age: float
    ram: int
    bounce: int
    disk: int


class Session(Receiver):
    """Made by `Manager.hello`; give it back to the manager's calls."""

    __slots__ = (
        *("run", "address", "since", "end", "flows", "backlogs", "ram", "bounce", "disk", "congested"),
        *("ping_t", "ping_at", "pong_at", "rtt", "worst_rtt", "pongs", "ping_due", "caps", "unpermitted"),
        *("slack", "named", "doubted", "lapses"),
    )

    def __init__(self, name: str, run: bytes, address: str, weight: float, now: int) -> None:
        super().__init__(name, weight)
        self.run = run
        self.address = address
        self.since = now
        self.flows: dict[int, Flow] = {}
        self.named = 0
        #: Flows that let permits lapse; and what was last said of a path, once it was not 0: permits received, lapsed.
        self.doubted: dict[Flow, Doubt] = {}
        self.lapses: dict[int, tuple[int, int]] = {}
        self.backlogs: dict[int, int] = {}  # three figures in one number: the collector never looks at such a dict
        self.ram = self.bounce = self.disk = 0
        self.ping_t: int | None = None
        self.ping_at = now
        self.pong_at = now
        self.rtt = 0
        self.worst_rtt = 0
        self.slack = SMALLEST_SLACK
        self.congested = False
        self.end: End | None = None
        self.pongs: list[tuple[int, int]] = []
        self.ping_due: int | None = None
        self.caps: dict[int, int] = {}
        self.unpermitted = 0

    def may_receive(self, now: int) -> bool:
        """Alive, able to take frames, and pinged: only a permit that counts from a ping can be called off."""
        return self.end is None and not self.congested and self.ping_t is not None and now - self.pong_at <= STALE_AFTER

    @property
    def needed_slack(self) -> int:
        """Twice the round trip and a margin: a permit is usable for d - RTT."""
        return 2 * self.worst_rtt + SLACK_MARGIN

    @property
    def parked_records(self) -> int:
        """Records that wait to be sent."""
        return len(self.runs) + len(self.limits) + len(self.caps)

    @property
    def has_words(self) -> bool:
        """Whether anything waits to be sent."""
        return bool(self.runs or self.pongs or self.ping_due is not None or self.limits or self.caps)

    def pinged(self, t: int, now: int) -> None:
        self.ping_t = t
        self.ping_at = now
        self.pongs.append((t, now))
        del self.pongs[:-MAX_PONGS]

    def measured(self, rtt: int, now: int) -> bool:
        """A round trip. Returns whether `slack`, what this session's permits need, has grown."""
        self.rtt = rtt
        # One slow round trip is remembered for a while: slack follows the worst, not the last.
        self.worst_rtt = max(rtt, self.worst_rtt * 7 // 8)
        self.pong_at = now
        if self.needed_slack <= self.slack:
            return False
        self.slack = self.needed_slack * 9 // 8
        return True

    def backlog(self, id: int, ram: int, bounce: int, disk: int) -> None:
        """The latest figures of one path; the session's are the sums."""
        if not (ram or bounce or disk or id in self.backlogs):
            return
        old = self.backlogs.pop(id, 0)
        self.ram += ram - (old >> 64)
        self.bounce += bounce - (old >> 32 & _WORD)
        self.disk += disk - (old & _WORD)
        if ram or bounce or disk:
            self.backlogs[id] = ram << 64 | bounce << 32 | disk

    def forget(self) -> None:
        """It is over: it and its flows must not keep each other alive (see `server.process.Collector`)."""
        for each in (self.flows, self.doubted, self.lapses, self.backlogs, self.parked, self.limits, self.caps):
            each.clear()
        self.runs.clear()

    def figures(self, now: int) -> Figures:
        return Figures(
            self.name,
            (now - self.since) / SECOND,
            self.rtt / SECOND,
            (now - self.pong_at) / SECOND,
            self.ram,
            self.bounce,
            self.disk,
        )

    def take(
        self, sent: Callable[[Run, int, int], None], now: int, most: int, owes: Callable[[Path], bool] | None = None
    ) -> Output:
        """What waits, `most` records of a kind; `now` is not after the moment of sending.

        Args:
            sent: told of each run that leaves, and of its slack.
            owes: whether the limits of a path are still to be told by somebody else; None: those of no path.
        """
        ping, self.ping_due = self.ping_due, None
        sent_at = now // MICROSECOND * MICROSECOND
        pongs: list[PongRecord] = []
        limits: dict[Flow, None] = {}
        caps: list[tuple[int, int]] = []
        grants: list[GrantRecord] = []
        if self.pongs:
            pongs, self.pongs = _held(self.pongs, sent_at), []
        if self.limits:
            limits, self.limits = _split(self.limits, most)
        if self.caps:
            first, self.caps = _split(self.caps, most)
            caps = list(first.items())
        if owes is not None:
            self._limits_first(limits, owes)
        if self.runs:
            for run in self._take_runs(most):
                flow, slack = run.flow, run.flow.path.slack
                sent(run, slack, now)
                offset, step = (run.first - sent_at) // MICROSECOND, run.step // MICROSECOND
                grants.append(GrantRecord(flow.id, run.n, offset, step, slack // MICROSECOND))
        told = [self._limit(flow, now) for flow in limits] if limits else []
        if self.ping_t is None:
            return Output(pongs, ping, told, 0, 0, grants, caps)
        hold = max(0, sent_at - self.ping_at) // MICROSECOND
        return Output(pongs, ping, told, self.ping_t, hold, grants, caps)

    def answer(self, now: int) -> Output:
        """Nothing but answers to pings."""
        pongs, self.pongs = self.pongs, []
        return Output(_held(pongs, now // MICROSECOND * MICROSECOND), None, [], 0, 0, [], [])

    def _limits_first(self, told: dict[Flow, None], owes: Callable[[Path], bool]) -> None:
        """Limits that somebody else would tell by and by: now, if a permit needs them."""
        for run in islice(self.runs, _LOOKED_AT):
            if run.flow not in told and owes(run.flow.path):
                self.limits[run.flow] = None

    def _take_runs(self, most: int) -> list[Run]:
        """The runs that may leave now: none before the limits of its path, which say how long it is usable."""
        runs, later = self.runs, self.limits
        ready: list[Run] = []
        if not later and len(runs) <= most:
            ready += runs
            runs.clear()
            return ready
        held: list[Run] = []
        while runs and len(ready) < most and len(ready) + len(held) < _LOOKED_AT:
            run = runs.popleft()
            (held if run.flow in later else ready).append(run)
        runs.extendleft(reversed(held))
        return ready

    def _limit(self, flow: Flow, now: int) -> LimitRecord:
        throttles = flow.path.throttles
        backoff, warnings = 0, []
        for throttle in throttles:
            terms = throttle.terms
            if terms is None:
                continue
            if terms.backoff is not None:
                backoff = max(backoff, terms.backoff.until - now)
            if terms.mixed:
                warnings.append(f"{throttle.key.name}: instances disagree on sum or average, the lower limit holds")
        slack = flow.path.slack
        if self.needed_slack > slack:
            warnings.append(
                f"round trip of {self.worst_rtt // 1_000_000} ms is too long for permits of {slack // 1_000_000} ms"
            )
        if flow in self.doubted:
            warnings.append("permits lapse: fewer are given until they are used")
        return LimitRecord(
            flow.id,
            tuple(Effective(tuple(window.limit for window in each.windows), each.all_places) for each in throttles),
            slack // MICROSECOND,
            -(-max(0, backoff) // 1_000_000),
            flow.paused,
            "; ".join(warnings)[:512],
        )


def _held(pongs: list[tuple[int, int]], sent_at: int) -> list[PongRecord]:
    return [PongRecord(t, max(0, sent_at - at) // MICROSECOND) for t, at in pongs]


def _split(records: dict[K, V], most: int) -> tuple[dict[K, V], dict[K, V]]:
    """The first `most` and the others."""
    if len(records) <= most:
        return records, {}
    first = dict(islice(records.items(), most))
    for key in first:
        del records[key]
    return first, records
