"""What is said about throttles in a session: one thread that sleeps until there is something to say to the proxy.

It says what the throttles want (`throttle.Throttle`), at most as often as docs/throttling.md has it, and gives them
what the proxy says. After a new session all is said again.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

from greenarrow_proxy_client.proxies import Proxies
from greenarrow_proxy_client.throttle import REPORT_EVERY, Limits, Tally, Throttle, clock_ns
from proxy.errors import PeerError
from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from proxy.throttling.wheel import Wheel

_SECOND = 1_000_000_000
_MILLISECOND = 1_000_000
#: Records in a frame, and paths registered that the proxy has not answered yet: pings must not stand behind them.
_RECORDS_A_FRAME = 1000
#: The advice in CAP that there is none any more.
_NO_CAP = 2**32 - 1


class Dialogue:
    """Args:
    proxies: the session's connection; this is a `control.Listener` of it, and `throttle.Speaker` of the throttles.
    """

    def __init__(self, proxies: Proxies) -> None:
        self.lock = threading.RLock()
        self._proxies = proxies
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
        proxies.listen(self)

    def throttle(
        self,
        source_ip: str | None,
        limits: Sequence[Limits],
        source: str | None = None,
        mx: str | None = None,
        domain: str | None = None,
    ) -> Throttle:
        """See `Session.throttle`."""
        if source_ip is not None:
            source_ip = m.canonical_host(source_ip)
        with self.lock:
            throttle = Throttle(next(self._ids), source_ip, tuple(limits), self, source, mx, domain)
            _check(throttle.record())
            self._throttles[throttle.id] = throttle
            self._unregistered[throttle] = None
            self._something.notify()
        return throttle

    def change(self, throttle: Throttle, limits: Sequence[Limits]) -> None:
        """See `Session.change_limits`."""
        _check(throttle.record(limits))
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
                throttle._rejected = ""  # another proxy, or another configuration, may accept it
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
            clock_ns(),
            grant.use_by,
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
                self._proxies.send(frame)
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
            now = clock_ns()
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
                frames.append(s.Reg(incarnation, [throttle.record() for throttle in paths]))
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
        want = max(0, ready - lease.at_hand(now))
        later = throttle._demand.due_at(want, lease.got, now, lease.voided)
        if throttle._backlog != throttle._told_backlog:  # for the status: no need to hurry
            stale_at = now if not ready else throttle._told_at + REPORT_EVERY
            later = stale_at if later is None else min(later, stale_at)
        if later is not None and later <= now:
            wants.append(s.Want(throttle.id, want, lease.got % 2**32, *throttle._backlog, lease.voided % 2**32))
            throttle._demand.sent(want, lease.got, now, lease.voided)
            throttle._told_backlog, throttle._told_at = throttle._backlog, now
            later = None
        tally = throttle._tally
        if tally.ok or tally.deferred or tally.failed or tally.backoff:
            due = tally.sent_at + REPORT_EVERY
            if due <= now:
                tallies.append(s.Tally(throttle.id, tally.ok, tally.deferred, tally.failed, tally.backoff))
                throttle._tally = Tally(sent_at=now)
            else:
                later = due if later is None else min(later, due)
        lapses = lease.lapses_at()  # nobody may come for it, and then another one is wanted
        if lapses is not None:
            later = lapses if later is None else min(later, lapses)
        return later


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
