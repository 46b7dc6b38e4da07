"""Throttles on the MTA's side: permits to send, shared fairly with all other instances.

`Throttle` is what an MTA's senders use; `Dialogue` speaks for all throttles of a session, in one thread that sleeps
until there is something to say. The bookkeeping of permits is `proxy.throttling.lease`, the rules are
docs/throttling.md.

When the proxy is gone nothing is sent without a permit: permits at hand stay good until their use-by, a second or two,
`acquire` goes on waiting, and the session comes back and registers again by itself.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from greenarrow_proxy_client.control import Control, clock_us
from greenarrow_proxy_client.errors import ProxyFailure, ProxyUnavailable
from proxy.errors import PeerError
from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from proxy.throttling.lease import Demand, Lease
from proxy.throttling.lease import Permit as Slot
from proxy.throttling.wheel import Wheel

_SECOND = 1_000_000_000
_MILLISECOND = 1_000_000
#: Outcomes and backlogs of a path are reported at most this often.
_REPORT_EVERY = _SECOND
#: Records in a frame, and paths registered that the proxy has not answered yet: pings must not stand behind them.
_RECORDS_A_FRAME = 1000
#: The advice in CAP that there is none any more.
_NO_CAP = 2**32 - 1


def _clock_ns() -> int:
    return clock_us() * 1000


class ThrottleTimeout(ProxyFailure, TimeoutError):
    """No permit came in time."""

    code = "throttled"


class ThrottleRejected(ProxyFailure):
    """The proxy does not accept the limits of this throttle; the text says why."""

    code = "throttle_rejected"
    retry = False


class PermitExpired(ProxyFailure):
    """The permit is too old to be used; nothing was sent. Acquire another one."""

    code = "permit_expired"


@dataclass(frozen=True, slots=True)
class Limits:
    """One throttle as this instance has it configured.

    Args:
        name: of the rule; together with the source address it names the throttle for all instances.
        rates: (messages, seconds) each, at most four, of different lengths.
        max_connections: 0 is unlimited.
        mode: "average" (the limits describe the whole cluster) or "sum" (they are this instance's part of it).
        paused: nothing is sent under this throttle by this instance.
        burst: messages at once; 0: the proxy's default.
        backoff_percent, return_after, backoff_threshold: when `backoff_threshold` percent of the outcomes are bad, or
            `Throttle.report` says so, all instances slow down to that percentage for so many seconds.
    """

    name: str
    rates: Sequence[tuple[int, int]] = ()
    max_connections: int = 0
    mode: str = "average"
    paused: bool = False
    burst: int = 0
    backoff_percent: int = 50
    return_after: int = 300
    backoff_threshold: int = 0

    def record(self) -> s.Throttle:
        """As REG carries it."""
        rates = [s.Rate(amount, seconds, self.burst) for amount, seconds in self.rates]
        backoff = s.Backoff(self.backoff_percent, None, self.return_after, self.backoff_threshold)
        return s.Throttle(self.name, rates, self.max_connections, s.Mode(self.mode), self.paused, backoff)


class Permit:
    """Allows one message. A context manager only for the looks of it: a permit is used up by time, not by leaving.

    Give it to `ProxiedSMTP.permit`, which checks it right before MAIL FROM, or call `check` there yourself.
    """

    __slots__ = ("_slot",)

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    @property
    def usable(self) -> bool:
        """Whether the message may be sent now."""
        return self._slot.usable(_clock_ns())

    def check(self) -> None:
        """To be called right before MAIL FROM.

        Raises:
            PermitExpired: too late.
        """
        if not self.usable:
            raise PermitExpired("the permit has expired before MAIL FROM; acquire another one")

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        return


@dataclass(slots=True)
class _Tally:
    """Outcomes since the last report."""

    ok: int = 0
    deferred: int = 0
    failed: int = 0
    backoff: bool = False
    sent_at: int = -_REPORT_EVERY


@dataclass(slots=True, eq=False)
class Throttle:
    """One path: the throttles that one kind of message passes. Made by `Session.throttle`; usable by many threads.

    Attributes:
        id: the path's number in OPEN.
        limits: what this instance has configured.
        effective: (rates, connections) of each throttle as the proxy has reconciled them; empty before the first
        answer.
        cap: the proxy's advice, the number of connections that is this instance's fair share now; None: no advice.
        connections: SMTP sessions of this process under this throttle.
        paused, warning: as the proxy said last.
    """

    id: int
    source_ip: str
    limits: tuple[Limits, ...]
    _dialogue: Dialogue = field(repr=False)
    effective: list[tuple[list[tuple[int, int]], int]] = field(default_factory=list)
    cap: int | None = None
    connections: int = 0
    paused: bool = False
    warning: str = ""
    _bound: bool = False
    _asked: bool = False
    _rejected: str = ""
    _waiting: int = 0
    _backlog: tuple[int, int, int] = (0, 0, 0)
    _told_backlog: tuple[int, int, int] = (0, 0, 0)
    _told_at: int = 0
    _lease: Lease = field(default_factory=Lease, repr=False)
    _demand: Demand = field(default_factory=Demand, repr=False)
    _tally: _Tally = field(default_factory=_Tally, repr=False)
    _arrived: threading.Condition = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._arrived = threading.Condition(self._dialogue.lock)

    def acquire(self, timeout: float | None = None) -> Permit:
        """Wait for a permit to send one message.

        Args:
            timeout: seconds; None: for ever.

        Raises:
            ThrottleTimeout: none came in time. ThrottleRejected: the proxy does not accept the limits.
            ProxyUnavailable: the session is closed.
        """
        ends_at = None if timeout is None else _clock_ns() + int(timeout * _SECOND)
        with self._arrived:
            self._waiting += 1
            self._dialogue.changed(self)
            try:
                while True:
                    now = _clock_ns()
                    slot = self._lease.take(now)
                    if slot is not None:
                        self._spend()
                        return Permit(slot)
                    if self._rejected:
                        raise ThrottleRejected(self._rejected)
                    if self._dialogue.stopping:
                        raise ProxyUnavailable("the session is closed")
                    if ends_at is not None and now >= ends_at:
                        raise ThrottleTimeout(f"no permit of throttle {self.limits[0].name} in {timeout} s")
                    self._arrived.wait(self._patience(now, ends_at))
            finally:
                self._waiting -= 1
                self._dialogue.changed(self)

    def seconds_to_next(self) -> float | None:
        """Until the next permit at hand may be used; None: there is none. An open connection that has to wait long is
        better released meanwhile."""
        with self._arrived:
            now = _clock_ns()
            at = self._lease.next_at(now)
            return None if at is None else (at - now) / _SECOND

    def backlog(self, ram: int = 0, bounce: int = 0, disk: int = 0) -> None:
        """How many messages are ready for an attempt now and wait: first attempts, bounces' first attempts, later ones.

        It is the demand: permits for these messages come before they are asked for, as many as may be sent.
        """
        with self._arrived:
            self._backlog = (ram, bounce, disk)
            self._dialogue.changed(self)

    def report(self, ok: int = 0, deferred: int = 0, failed: int = 0, backoff: bool = False) -> None:
        """How attempts ended. `backoff`: this instance's word that the throttle shall slow down for all."""
        with self._arrived:
            tally = self._tally
            tally.ok += ok
            tally.deferred += deferred
            tally.failed += failed
            tally.backoff |= backoff
            self._dialogue.changed(self)

    def wait_until_registered(self, timeout: float | None = None) -> bool:
        """Whether the proxy knows the throttle within `timeout` seconds.

        Raises:
            ThrottleRejected: it does not accept the limits.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: self._bound or self._rejected, timeout)
            if self._rejected:
                raise ThrottleRejected(self._rejected)
            return self._bound

    def count(self, connections: int) -> None:
        """SMTP sessions begun (or, negative, over) under this throttle; `Session` does it."""
        with self._arrived:
            self.connections += connections

    @property
    def over_cap(self) -> bool:
        """Whether this process has more connections than its fair share: one should be closed or released after the
        current message."""
        return self.cap is not None and self.connections > self.cap

    def _spend(self) -> None:
        """The message that got the permit waits no more."""
        ram, bounce, disk = self._backlog
        if ram:
            ram -= 1
        elif bounce:
            bounce -= 1
        elif disk:
            disk -= 1
        self._backlog = (ram, bounce, disk)

    def _patience(self, now: int, ends_at: int | None) -> float | None:
        """Seconds to sleep: until the next permit, or the end."""
        moments = [moment for moment in (self._lease.next_at(now), ends_at) if moment is not None]
        return max(0.0, (min(moments) - now) / _SECOND) if moments else None

    def _ready(self) -> int:
        return max(sum(self._backlog), self._waiting)


class Dialogue:
    """All throttles of a session: says what is due, and takes what the proxy says. A `control.Listener`."""

    def __init__(self, control: Control) -> None:
        self.lock = threading.RLock()
        self._control = control
        self._something = threading.Condition(self.lock)
        self._throttles: dict[int, Throttle] = {}
        self.stopping = False
        self._changed: dict[Throttle, None] = {}
        self._later: Wheel[Throttle] = Wheel(_MILLISECOND)  # what has to be looked at again, and when
        self._unanswered = 0  # paths
        self._unregistered: dict[Throttle, None] = {}
        self._ids = itertools.count(1)
        self._incarnation: int | None = None
        self._thread = threading.Thread(target=self._run, name="proxy throttles", daemon=True)
        self._thread.start()
        control.listen(self)

    def throttle(self, source_ip: str, limits: Sequence[Limits]) -> Throttle:
        """See `Session.throttle`."""
        records = [each.record() for each in limits]
        with self.lock:
            throttle = Throttle(next(self._ids), m.canonical_host(source_ip), tuple(limits), self)
            _check(s.Path(throttle.id, throttle.source_ip, records))
            self._throttles[throttle.id] = throttle
            self._unregistered[throttle] = None
            self._something.notify()
        return throttle

    def change(self, throttle: Throttle, limits: Sequence[Limits]) -> None:
        """See `Session.change_limits`."""
        _check(s.Path(throttle.id, throttle.source_ip, [each.record() for each in limits]))
        with self.lock:
            throttle.limits, throttle._rejected = tuple(limits), ""
            self._unregistered[throttle] = None
            self._something.notify()

    def changed(self, throttle: Throttle) -> None:
        """Something about it may have to be told; the lock is held."""
        if throttle not in self._changed:
            self._changed[throttle] = None
            self._something.notify()

    def stop(self) -> None:
        """End the thread; permits at hand are given back."""
        with self.lock:
            self.stopping = True
            for throttle in self._throttles.values():
                throttle._backlog = (0, 0, 0)
                throttle._arrived.notify_all()
                self._changed[throttle] = None
            self._something.notify()
        self._thread.join()
        while frames := self._due()[0]:
            self._say(frames)

    # --- what the proxy says ---

    def connected(self, welcome: m.Welcome) -> None:
        with self.lock:
            self._incarnation = welcome.incarnation
            self._unanswered = 0
            for throttle in self._throttles.values():
                throttle._bound = throttle._asked = False
                throttle.cap = None
                throttle._lease.reconnected()
                throttle._demand.reconnected()
                throttle._told_backlog = (0, 0, 0)
                self._unregistered[throttle] = None
                self._changed[throttle] = None
            self._something.notify()

    def disconnected(self) -> None:
        with self.lock:
            self._incarnation = None
            for throttle in self._throttles.values():
                throttle._bound = False

    def received(self, message: m.Message, at_us: int) -> None:
        with self.lock:
            if isinstance(message, s.Grant):
                for grant in message.records:
                    self._granted(grant, message, at_us)
            elif isinstance(message, s.Limit):
                for limit in message.records:
                    self._limited(limit)
            elif isinstance(message, s.Cap):
                for share in message.records:
                    if share.id in self._throttles:
                        self._throttles[share.id].cap = share.cap if share.cap != _NO_CAP else None

    def _granted(self, grant: s.SlotGrant, message: s.Grant, at_us: int) -> None:
        throttle = self._throttles.get(grant.id)
        if throttle is None:
            return
        throttle._lease.granted(
            grant.n,
            grant.first_offset_us,
            grant.step_us,
            message.ping_t,
            message.hold_us,
            at_us * 1000,
            _clock_ns(),
        )
        throttle._arrived.notify(grant.n)
        self.changed(throttle)

    def _limited(self, limit: s.PathLimit) -> None:
        throttle = self._throttles.get(limit.id)
        if throttle is None:
            return
        if throttle._asked:
            throttle._asked = False
            self._unanswered -= 1
            self._something.notify()
        throttle.warning, throttle.paused = limit.warning, limit.paused
        throttle.effective = [
            ([(rate.amount, rate.seconds) for rate in each.rates], each.max_connections) for each in limit.throttles
        ]
        throttle._bound = bool(limit.throttles)
        throttle._rejected = "" if throttle._bound else limit.warning or "the proxy does not accept this throttle"
        throttle._lease.slack_us = limit.slack_us
        throttle._arrived.notify_all()
        self.changed(throttle)

    # --- what the proxy is told ---

    def _run(self) -> None:
        while True:
            with self.lock:
                if self.stopping:
                    return
                frames, wait = self._due()
                if not frames:
                    self._something.wait(wait)
            self._say(frames)

    def _say(self, frames: list[m.Message]) -> None:
        for frame in frames:
            try:
                self._control.send(frame)
            except ValueError:  # paths with long names: more than a frame holds
                assert isinstance(frame, s.Reg)
                middle = len(frame.paths) // 2
                self._say([s.Reg(frame.incarnation, half) for half in (frame.paths[:middle], frame.paths[middle:])])

    def _due(self) -> tuple[list[m.Message], float | None]:
        """The messages that are due, and seconds until the next may be; both empty when no session is up."""
        with self.lock:
            incarnation = self._incarnation
            if incarnation is None:
                return [], None
            now = _clock_ns()
            paths = self._next_paths()
            wants: list[s.Want] = []
            returns: list[s.SlotRun] = []
            tallies: list[s.Tally] = []
            self._changed.update(dict.fromkeys(self._later.expire(now)))
            while self._changed and max(len(wants), len(returns), len(tallies)) < _RECORDS_A_FRAME:
                throttle = self._changed.popitem()[0]
                later = self._examine(throttle, now, wants, returns, tallies)
                if later is not None:
                    self._later.arm(throttle, later)
            frames: list[m.Message] = []
            if paths:
                frames.append(s.Reg(incarnation, [_path(throttle) for throttle in paths]))
            if returns:
                frames.append(s.Return(incarnation, returns))
            if wants:
                frames.append(s.Demand(incarnation, wants))
            if tallies:
                frames.append(s.Outcome(incarnation, tallies))
            next_at = self._later.next_wakeup()
            return frames, None if next_at is None else max(0.0, (next_at - now) / _SECOND)

    def _next_paths(self) -> list[Throttle]:
        """Paths to register now; more when these are answered."""
        paths = list(itertools.islice(self._unregistered, _RECORDS_A_FRAME - self._unanswered))
        for throttle in paths:
            del self._unregistered[throttle]
            if not throttle._asked:
                throttle._asked = True
                self._unanswered += 1
        return paths

    def _examine(
        self, throttle: Throttle, now: int, wants: list[s.Want], returns: list[s.SlotRun], tallies: list[s.Tally]
    ) -> int | None:
        """Collect what is due of one throttle; when to look again, None: after the next change."""
        if not throttle._bound:
            return None
        lease, ready = throttle._lease, throttle._ready()
        if not ready and len(lease):
            returns += [s.SlotRun(throttle.id, first, n) for first, n in lease.give_back(now)]
        want = max(0, ready - len(lease))
        later = throttle._demand.due_at(want, lease.got, now)
        if throttle._backlog != throttle._told_backlog:  # for the status: no need to hurry
            stale_at = now if not ready else throttle._told_at + _REPORT_EVERY
            later = stale_at if later is None else min(later, stale_at)
        if later is not None and later <= now:
            wants.append(s.Want(throttle.id, want, lease.got % 2**32, *throttle._backlog))
            throttle._demand.sent(want, lease.got, now)
            throttle._told_backlog, throttle._told_at = throttle._backlog, now
            later = None
        tally = throttle._tally
        if tally.ok or tally.deferred or tally.failed or tally.backoff:
            due = tally.sent_at + _REPORT_EVERY
            if due <= now:
                tallies.append(s.Tally(throttle.id, tally.ok, tally.deferred, tally.failed, tally.backoff))
                throttle._tally = _Tally(sent_at=now)
            else:
                later = due if later is None else min(later, due)
        return later


def _path(throttle: Throttle) -> s.Path:
    return s.Path(throttle.id, throttle.source_ip, [each.record() for each in throttle.limits])


def _check(path: s.Path) -> None:
    """Find here what the proxy would have to end the session for.

    Raises:
        ValueError: names the field.
    """
    frame = native.encode(s.Reg(0, [path]))
    try:
        native.decode((s.Reg.TYPE, frame[native.HEADER :]), native.SESSION_FROM_CLIENT)
    except PeerError as error:
        raise ValueError(str(error)) from None
