"""Throttles on the MTA's side: permits to send, shared fairly with all other instances.

`Throttle` is what an MTA's senders use. What it wants is told to the proxy, and what the proxy says comes to it, by
`dialogue`; the bookkeeping of permits is `proxy.throttling.lease`, the rules are docs/throttling.md.

Many threads may wait for one throttle. Whoever stops waiting, for whatever reason, wakes another one: it may have been
the one that was told of a permit, and without it nobody would look.

When the proxy is gone nothing is sent without a permit: permits at hand stay good until their use-by, a second or two,
`acquire` goes on waiting, and the session comes back and registers again by itself.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from greenarrow_proxy_client.control import clock_us
from greenarrow_proxy_client.errors import ProxyFailure, ProxyUnavailable
from proxy.protocols.native import session_messages as s
from proxy.throttling.lease import Demand, Lease
from proxy.throttling.lease import Permit as Slot

_SECOND = 1_000_000_000
#: Outcomes and backlogs of a path are reported at most this often.
REPORT_EVERY = _SECOND


def clock_ns() -> int:
    """Nanoseconds of `clock_us`."""
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
        burst: messages at once, less than each amount and at most 10,000; 0: the proxy's default.
        scope: "proxy", or "cluster": the limits are for all proxies together that use one throttle store.
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
    scope: str = "proxy"

    def record(self) -> s.Throttle:
        """As REG carries it."""
        rates = [s.Rate(amount, seconds, self.burst) for amount, seconds in self.rates]
        backoff = s.Backoff(self.backoff_percent, None, self.return_after, self.backoff_threshold)
        mode, scope = s.Mode(self.mode), s.Scope(self.scope)
        return s.Throttle(self.name, rates, self.max_connections, mode, self.paused, backoff, scope)


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
        return self._slot.usable(clock_ns())

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
class Tally:
    """Outcomes since the last report."""

    ok: int = 0
    deferred: int = 0
    failed: int = 0
    backoff: bool = False
    sent_at: int = -REPORT_EVERY


class Speaker(Protocol):
    """Who tells the proxy what a throttle wants; `dialogue.Dialogue`.

    Attributes:
        lock: held while anything of a throttle is looked at or changed.
        stopping: the session is over.
    """

    @property
    def lock(self) -> threading.RLock: ...
    @property
    def stopping(self) -> bool: ...

    def changed(self, throttle: Throttle) -> None:
        """Something about it may have to be told; the lock is held."""


@dataclass(slots=True, eq=False)
class Throttle:
    """One path: the throttles that one kind of message passes. Made by `Session.throttle`; usable by many threads.

    Attributes:
        id: the path's number in OPEN.
        source_ip, source: what it leaves from, an address or a name. mx, domain: of its receivers.
        limits: what this instance has configured.
        effective: (rates, connections) of each throttle as the proxy has reconciled them; empty before the first
        answer.
        cap: the proxy's advice, the number of connections that is this instance's fair share now; None: no advice.
        connections: SMTP sessions of this process under this throttle.
        paused, warning: as the proxy said last.
    """

    id: int
    source_ip: str | None
    limits: tuple[Limits, ...]
    _dialogue: Speaker = field(repr=False)
    source: str | None = None
    mx: str | None = None
    domain: str | None = None
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
    _tally: Tally = field(default_factory=Tally, repr=False)
    _arrived: threading.Condition = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._arrived = threading.Condition(self._dialogue.lock)

    def record(self, limits: Sequence[Limits] | None = None) -> s.Path:
        """As REG carries it, with these limits or its own."""
        records = [each.record() for each in (self.limits if limits is None else limits)]
        return s.Path(self.id, self.source_ip, records, self.source, self.mx, self.domain)

    def acquire(self, timeout: float | None = None) -> Permit:
        """Wait for a permit to send one message.

        Args:
            timeout: seconds; None: for ever.

        Raises:
            ThrottleTimeout: none came in time. ThrottleRejected: the proxy does not accept the limits.
            ProxyUnavailable: the session is closed.
        """
        ends_at = None if timeout is None else clock_ns() + int(timeout * _SECOND)
        with self._arrived:
            self._waiting += 1
            self._dialogue.changed(self)
            try:
                while True:
                    now = clock_ns()
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
                self._arrived.notify()
                self._dialogue.changed(self)

    def seconds_to_next(self) -> float | None:
        """Until the next permit at hand may be used; None: there is none. An open connection that has to wait long is
        better released meanwhile."""
        with self._arrived:
            now = clock_ns()
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
            ProxyUnavailable: the session is closed.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: self._bound or self._rejected or self._dialogue.stopping, timeout)
            if self._rejected:
                raise ThrottleRejected(self._rejected)
            if self._dialogue.stopping:
                raise ProxyUnavailable("the session is closed")
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
