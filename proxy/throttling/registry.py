"""The throttles and paths that instances have named: whose limits are in force, from when and until when.

Makes throttles when a path first names them, reconciles the instances' parts, slows down and returns, and forgets a key
only when nobody needs it and its debt is paid. Giving out slots and places is left to the two who do that.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappush
from typing import Final, NamedTuple

from proxy.throttling.cluster import Cluster
from proxy.throttling.dispenser import Dispenser
from proxy.throttling.flows import Flow, Path, Receiver, Stake, Terms, Throttle
from proxy.throttling.leasing import Leased, make_path
from proxy.throttling.limits import BackoffRule, Part
from proxy.throttling.many import Pieces
from proxy.throttling.overrides import BY_HAND, NO_RATE, Override, Overrides
from proxy.throttling.places import PlaceBook
from proxy.throttling.telling import Teller
from proxy.throttling.throttle import SECOND, TICK, Key
from proxy.throttling.wheel import Wheel

#: Throttles that the paths of a session may name, each counted once for each path; one costs some 1,300 bytes.
MAX_NAMED = 200_000  # not final, nor the next three: tests make them small
#: Throttles that are known at a time, those of all sessions and those that are remembered for their debt.
MAX_THROTTLES = 500_000
#: Flows that may pass one throttle, and be on one path; a session needs a path once. There are steps that look at all
#: of them.
MAX_FLOWS = 100_000
MAX_ON_A_PATH = 10_000
MAX_PARTS: Final = 4096
MAX_FINES: Final = 4096


class Notice(enum.StrEnum):
    """What is worth a line in the log."""

    UNPERMITTED = "unpermitted"
    LATE = "late"
    BACKOFF = "backoff"
    MIXED_MODES = "mixed_modes"


class Remark(NamedTuple):
    """A notice; `instance` may be empty where it is nobody's; `detail` is a sentence.

    `reply`: of a receiver, that it is about. `calm`: it is no warning.
    """

    notice: Notice
    instance: str
    detail: str
    reply: str = ""
    calm: bool = False


class Registry:
    """Throttles by key and paths by their throttles.

    Args:
        start: when this manager began, in nanoseconds.
        overrides: what was set by hand, here and elsewhere.
        cluster: of the proxies that some limits hold for together; None: there is no store for them.
    """

    def __init__(
        self, start: int, dispenser: Dispenser, book: PlaceBook, overrides: Overrides, cluster: Cluster | None = None
    ) -> None:
        self._cluster = cluster
        self.throttles: Pieces[Key, Throttle] = Pieces()
        self.remarks: list[Remark] = []
        self.leases: Wheel[tuple[Throttle, str]] = Wheel(SECOND)
        self.backoffs: Wheel[Throttle] = Wheel(TICK)
        self.forgetting: Wheel[Throttle] = Wheel(SECOND)
        self._start = start
        self._overrides = overrides
        self._to_look_at: deque[tuple[Override, dict[Key, Throttle]]] = deque()  # for what was set by hand
        self.teller = Teller(dispenser)
        self._dispenser = dispenser
        self._book = book
        self._paths: Pieces[tuple[Throttle, ...], Path] = Pieces()
        self._parts: dict[Part, Part] = {}
        self.fines: dict[tuple[str, tuple[Throttle, ...]], int] = {}
        self._former_at: dict[Throttle, dict[Path, None]] = {}  # paths with slots that another process left

    # --- joining and leaving ---

    def check_room(self, named: int, keys: Sequence[Key]) -> None:
        """Whether the paths of a session may come to name so many throttles, and there be throttles of these keys.

        Raises:
            ValueError: says which bound it is, and what to do.
        """
        if named > MAX_NAMED:
            raise ValueError(
                f"the paths of this session would name more than {MAX_NAMED} throttles, the limit for a session: "
                "register fewer, or bind an id that is not needed any more to this path"
            )
        known = self.throttles
        if len(known) + len(keys) > MAX_THROTTLES < len(known) + sum(key not in known for key in keys):
            raise ValueError(
                f"the proxy would know more than {MAX_THROTTLES} throttles, the limit for all instances together: "
                "register fewer, or again when others are gone"
            )

    def check_crowd(self, keys: Sequence[Key]) -> None:
        """Whether one more flow may be on the path of these throttles.

        Raises:
            ValueError: says which of them has enough.
        """
        known = [throttle for key in keys if (throttle := self.throttles.get(key)) is not None]
        for throttle in known:
            if len(_terms(throttle)) >= MAX_FLOWS:
                raise ValueError(
                    f"{MAX_FLOWS} ids name the throttle {throttle.key.name} already, the limit for one: register fewer"
                )
        path = self._paths.get(tuple(known)) if len(known) == len(keys) else None
        if path is not None and path.refs >= MAX_ON_A_PATH:
            raise ValueError(f"{MAX_ON_A_PATH} ids are bound to this path already: a session needs a path only once")

    def check_scopes(self, parts: Iterable[tuple[Key, Part]]) -> None:
        """Whether a store is there for what is for all proxies, and nobody has said that it is for one, or the reverse.

        Raises:
            ValueError: says which throttle it is.
        """
        for key, part in parts:
            if part.cluster and (self._cluster is None or not self._cluster.store):
                raise ValueError(f"throttle {key.name}: scope cluster, and this proxy has no throttle_store")
            known = self.throttles.get(key)
            if known is not None and isinstance(known, Leased) is not part.cluster:
                scope = "proxy" if part.cluster else "cluster"
                raise ValueError(
                    f"throttle {key.name} has scope {scope} until it is forgotten: say the same everywhere"
                )

    def throttle(self, key: Key, cluster: bool, now: int) -> Throttle:
        """The one of this key; a new one, if there is none, with this scope."""
        throttle = self.throttles.get(key)
        if throttle is None:
            if cluster and self._cluster is not None:
                throttle = self._cluster.make(key, False, "i", now)
            else:
                throttle = Throttle(key)
            self.throttles[key] = throttle
            throttle.terms = Terms()
        return throttle

    def join(
        self, receiver: Receiver, id: int, throttles: tuple[Throttle, ...], parts: Iterable[Part], now: int
    ) -> Flow:
        """A new flow of `receiver` on the path of these throttles, with its instance's part in each."""
        flow = Flow(receiver, id, self.hold(throttles))
        for throttle, part in zip(throttles, parts, strict=True):
            terms = _terms(throttle)
            stake = terms.stake(receiver.name)
            known = stake is not None and stake.part == part
            if stake is None:
                stake = Stake(receiver.name, part)
                terms.stakes.append(stake)
            stake.add(flow)
            if not known:
                self._restake(throttle, stake, part, now)
        fine = self.fines.pop((receiver.name, throttles), 0)
        flow.fine = flow.want = fine
        return flow

    def hold(self, throttles: tuple[Throttle, ...]) -> Path:
        """The path of these throttles; `let_go` of it when it is not needed any more."""
        path = self._paths.get(throttles)
        if path is None:
            path = self._paths[throttles] = make_path(throttles)
        path.refs += 1
        return path

    def let_go(self, path: Path, now: int) -> None:
        path.refs -= 1
        if path.refs == 0:
            del self._paths[path.throttles]
            self.released(path.throttles, now)

    def restake(self, flow: Flow, parts: Iterable[Part], now: int) -> None:
        """The instance's part in each throttle of the flow's path, changed or said again."""
        for throttle, part in zip(flow.path.throttles, parts, strict=True):
            stake = _terms(throttle).stake(flow.receiver.name)
            if stake is not None and stake.part != part:
                self._restake(throttle, stake, part, now)

    def _restake(self, throttle: Throttle, stake: Stake, part: Part, now: int) -> None:
        # Instances have few different parts and many throttles: equal ones are kept once.
        if len(self._parts) >= MAX_PARTS:
            self._parts.clear()
        stake.part = self._parts.setdefault(part, part)
        self.relimit(throttle, now)

    def leave(self, flow: Flow, now: int, lease_until: int | None) -> None:
        """The flow is over. Its instance's part stays until `lease_until` (None: goes now) unless it comes back."""
        self._dispenser.withdraw(flow)
        path, name = flow.path, flow.receiver.name
        self.owe(flow, flow.fine)  # a reconnect does not pay it
        flow.paused, flow.fine = False, 0
        self._book.retry(flow, now)
        for throttle in path.throttles:
            stake = _terms(throttle).stake(name)
            assert stake is not None, "a stake outlives its flows"
            stake.remove(flow)
            if len(stake) == 0:
                if lease_until is not None and lease_until > now:
                    self.leases.arm((throttle, name), lease_until)
                else:
                    self.end_lease(throttle, name, now)
        self.let_go(path, now)

    def successor(self, flow: Flow, receiver: Receiver | None) -> Flow | None:
        """The flow of `receiver` with the throttles of one whose session is over."""
        path = self._paths.get(flow.path.throttles)
        flows = path.flows() if path is not None else []
        return next((each for each in flows if each.receiver is receiver), None)

    def owe(self, flow: Flow, messages: int = 1) -> None:
        """The instance of a flow whose session is over has to pay on that path, when it is back."""
        key = flow.receiver.name, flow.path.throttles
        if messages and (key in self.fines or len(self.fines) < MAX_FINES):
            self.fines[key] = self.fines.get(key, 0) + messages

    def end_lease(self, throttle: Throttle, name: str, now: int) -> None:
        """Drop the instance's part, if no flow of it is left."""
        terms = _terms(throttle)
        stake = terms.stake(name)
        if stake is not None and len(stake) == 0:
            terms.stakes.remove(stake)
            self.relimit(throttle, now)
            self.forget(throttle, now)

    def forget(self, throttle: Throttle, now: int) -> None:
        """Drop a throttle that nobody names, holds or waits for, but not before its debt is paid.

        One that has not given out a slot may go at once: made anew, it would have the debt of a start again.
        """
        terms = _terms(throttle)
        if terms.stakes or throttle.in_use():
            return
        debt = throttle.debt_until() if throttle.taken else 0
        if debt > now:
            self.forgetting.arm(throttle, debt)
        elif self.throttles.get(throttle.key) is throttle:
            del self.throttles[throttle.key]
            self._dispenser.wheel.disarm(throttle)
            self.backoffs.disarm(throttle)
            if self._cluster is not None:
                self._cluster.drop(throttle)

    def released(self, throttles: Iterable[Throttle], now: int) -> None:
        """Places or paths were given up: throttles that were remembered only for them may go."""
        for throttle in throttles:
            if throttle.terms is not None and not throttle.terms.stakes:
                self.forget(throttle, now)

    # --- what another manager had ---

    @property
    def start(self) -> int:
        return self._start

    def adopt(self, start: int) -> None:
        """What is known goes back to `start`."""
        self._start = start

    def paths(self) -> Iterator[Path]:
        """All of them; some may come meanwhile."""
        for piece in self._paths.pieces:
            yield from list(piece.values())

    def adopt_stake(self, throttle: Throttle, name: str, part: Part, until: int) -> None:
        """An instance's part, which is in force already, until the instance is back or its time is over."""
        _terms(throttle).stakes.append(Stake(name, self._parts.setdefault(part, part)))
        self.leases.arm((throttle, name), until)

    def adopt_fine(self, owner: str, throttles: tuple[Throttle, ...], messages: int) -> None:
        self.fines[owner, throttles] = self.fines.get((owner, throttles), 0) + messages

    def adopt_slots(self, throttles: tuple[Throttle, ...], slots: Iterable[int]) -> Path:
        """Slots that may be given out again on this path, which is to be let go when they are too old."""
        path = self._paths.get(throttles)
        if path is None or path not in self._former_at.get(throttles[0], ()):
            path = self.hold(throttles)
            for throttle in throttles:
                self._former_at.setdefault(throttle, {})[path] = None
        path.returned = path.returned or []
        for slot in slots:
            heappush(path.returned, slot)
        return path

    def outlived(self, path: Path, now: int) -> None:
        """Its slots are too old."""
        for throttle in path.throttles:
            paths = self._former_at[throttle]
            del paths[path]
            if not paths:
                del self._former_at[throttle]
        self.let_go(path, now)

    # --- limits in force ---

    def relimit(self, throttle: Throttle, now: int) -> None:
        """Put in force what follows from the parts and the backoff, and tell those whom it concerns."""
        terms = _terms(throttle)
        slowed, mixed = terms.backoff is not None, terms.mixed
        effective = terms.effective(now)
        closed = throttle.closed_until
        if self._overrides or closed:
            effective, throttle.closed_until = self._overrides.apply(throttle.key, effective)
            throttle.closed_by = BY_HAND
            if throttle.closed_until and not effective.limits:
                effective = effective._replace(limits=(NO_RATE,))
        if terms.mixed and not mixed:
            self.remarks.append(
                Remark(
                    Notice.MIXED_MODES,
                    "",
                    f"{throttle.key.name}: instances disagree on sum or average, the lower holds",
                )
            )
        slack = throttle.slack
        changed = throttle.limit_to(effective.limits, self._start, now) or closed != throttle.closed_until
        if throttle.slack > slack:
            self._forget_slots(throttle, now)
        if throttle.all_places != effective.places or closed > throttle.closed_until:
            throttle.limit_places(effective.places, now)
            changed = True
            self._book.pump(throttle, now)
            self._book.crowded[throttle] = None
        if terms.backoff is not None:
            self.backoffs.arm(throttle, terms.backoff.next_change(now))
        if changed or mixed != terms.mixed or slowed != (terms.backoff is not None):
            self._dispenser.serve(throttle, now)
            self.teller.all_of(throttle)

    def overridden(self, override: Override) -> None:
        """Something was set by hand, or is over: `step` sees to it, some throttles at a time."""
        self._to_look_at.extend((override, piece) for piece in self.throttles.pieces)

    @property
    def unfinished(self) -> bool:
        """Whether `step` has more to do."""
        return bool(self._to_look_at)

    def unseen(self) -> dict[tuple[str, str], None]:
        """Names and sources for which `step` has more to do."""
        return {(override.name, override.source): None for override, _ in self._to_look_at}

    def step(self, now: int) -> None:
        """Put what was set by hand in force for some throttles."""
        if self._to_look_at:
            override, piece = self._to_look_at.popleft()
            for throttle in [each for key, each in piece.items() if override.holds(key)]:
                self.relimit(throttle, now)

    def announce(self, flow: Flow) -> None:
        """The receiver of `flow` is to be told the limits in force."""
        self.teller.flow(flow)

    def slow_down(self, throttle: Throttle, rule: BackoffRule, name: str, now: int) -> None:
        """Enter backoff, or stay in it for longer."""
        terms = _terms(throttle)
        if terms.backoff is None:
            self.remarks.append(
                Remark(Notice.BACKOFF, name, f"{throttle.key.name} for {throttle.key.source} slows down")
            )
        terms.enter_backoff(rule, now)
        self.teller.all_of(throttle)
        self.relimit(throttle, now)

    def stretch(self, path: Path, need: int, now: int) -> None:
        """Permits of this path need `need` nanoseconds of slack."""
        for throttle in path.throttles:
            if throttle.stretch(need, self._start, now):
                self._forget_slots(throttle, now)

    def _forget_slots(self, throttle: Throttle, now: int) -> None:
        """The slack has grown: what was not sent yet, or comes back, was spaced for the smaller one."""
        flows = list(_terms(throttle))
        self._dispenser.forget_slots(flows)
        for path in self._former_at.get(throttle, ()):
            path.returned = None
        for flow in flows:
            self._dispenser.activate(flow, now)
        self.teller.all_of(throttle)


def _terms(throttle: Throttle) -> Terms:
    terms = throttle.terms
    assert terms is not None, "throttles of the registry have terms from the start"
    return terms
