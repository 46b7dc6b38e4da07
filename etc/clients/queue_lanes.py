"""The lanes of `queue_sender`: which mail waits for which receivers, and what becomes of each message.

A *lane* is the mail for one set of MX hosts on one route. `Lanes` is what the thread that fills them and the workers,
which empty them, have in common.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mail_queue import Envelope, MailQueue, Replies, log, says

from greenarrow_proxy_client import Limits, Session, Throttle

LINGER = 0.5  # seconds that a worker keeps its connection when there is no mail
Address = tuple[str, int]


@dataclass
class Route:
    """As the configuration has it; see queue_sender.toml."""

    name: str
    domains: list[str]
    mx: list[str]
    source_ip: str
    ehlo_name: str
    tls: str = "opportunistic"
    rates: list[list[int]] = field(default_factory=list)
    max_connections: int = 0  # all instances together; 0: no limit
    workers: int = 20  # of this instance, for each lane
    messages_per_connection: int = 50
    hold: float = 5.0  # seconds that a connection is kept without a permit to use it

    def limits(self) -> Limits:
        rates = [(amount, seconds) for amount, seconds in self.rates]
        # Where 30 % of the attempts fail, all instances slow down to half for five minutes.
        return Limits(self.name, rates, self.max_connections, backoff_threshold=30)


@dataclass(eq=False)
class Lane:
    """The mail for one set of MX hosts on one route that is ready to be sent: first attempts and later ones."""

    route: Route
    mx: Sequence[Address]
    throttle: Throttle
    first: deque[Envelope] = field(default_factory=deque)
    later: deque[Envelope] = field(default_factory=deque)
    workers: int = 0
    failures: int = 0  # attempts in a row that did not get as far as a message
    paused_until: float = 0.0

    def queue(self, envelope: Envelope) -> deque[Envelope]:
        return self.later if envelope.attempts else self.first

    @property
    def most(self) -> int:
        """Workers, within the proxy's advice. One may always ask: OPEN waits in a line that is fair to all."""
        cap = self.throttle.cap
        return self.route.workers if cap is None else min(self.route.workers, max(1, cap))


class Lanes:
    """Any thread may call what is here.

    Args:
        queue: the mail on the disk.
        session: the way to the proxy.
        retry: seconds until the second attempt, the third, and so on; the last one stays.
    """

    def __init__(self, queue: MailQueue, session: Session, retry: Sequence[float]) -> None:
        self.queue, self.session, self.retry = queue, session, retry
        self.stop = threading.Event()
        self.error: Exception | None = None
        self._changed = threading.Condition(threading.RLock())  # guards all below
        self._due: dict[str, float | None] = {}  # when a message is due; None: it is in a lane
        self._lanes: dict[tuple[str, tuple[Address, ...]], Lane] = {}
        self._threads: set[threading.Thread] = set()

    def take(self, lane: Lane) -> Envelope | None:
        """The message that has waited longest, after a short wait if need be; None: the worker is not needed."""
        ends = time.monotonic() + LINGER
        with self._changed:
            while not self.stop.is_set() and time.monotonic() >= lane.paused_until and lane.workers <= lane.most:
                queues = [queue for queue in (lane.first, lane.later) if queue]
                if queues:
                    envelope = min(queues, key=lambda queue: queue[0].due).popleft()
                    self.tell(lane)
                    return envelope
                if not self._changed.wait(ends - time.monotonic()):
                    break
            lane.workers -= 1  # here, or all would leave when there is one too many
        return None

    def put_back(self, lane: Lane, envelope: Envelope) -> None:
        """It was nobody's fault and does not count."""
        with self._changed:
            lane.queue(envelope).appendleft(envelope)

    def connected(self, lane: Lane) -> None:
        lane.failures = 0
        self.tell(lane)

    def tell(self, lane: Lane) -> None:
        """Report the backlog. It is demand: permits for it come unasked. So not while there is no connection to use
        them with, or they would lapse, and nobody would have them."""
        with self._changed:
            if self.stop.is_set() or not lane.throttle.connections:
                lane.throttle.backlog()
                return
            now = time.monotonic()
            lanes = [x for x in self._lanes.values() if x.throttle is lane.throttle and x.paused_until <= now]
            first, later = sum(len(each.first) for each in lanes), sum(len(each.later) for each in lanes)
            lane.throttle.backlog(ram=first, disk=later)

    def trouble(self, lane: Lane, envelope: Envelope, reason: str, retry_after: float) -> None:
        """No connection was to be had: later, the whole lane."""
        with self._changed:
            delay = retry_after or self.backoff(lane.failures)
            lane.failures += 1
            lane.paused_until = time.monotonic() + delay
        self.defer(envelope, reason, delay)

    def settle(self, envelope: Envelope, replies: Replies) -> None:
        """Write down what each recipient's reply means: served, never, or later."""
        for recipient, (code, text) in replies.items():
            if code // 100 not in (2, 5):
                envelope.reason = says(code, text)
                continue
            envelope.recipients.remove(recipient)
            if code >= 500:
                envelope.refused[recipient] = says(code, text)
        if envelope.recipients:
            self.try_again(envelope, envelope.reason)
            return
        self.queue.finish(envelope)
        with self._changed:
            self._due.pop(envelope.id, None)
        log("failed" if envelope.refused else "delivered", id=envelope.id, refused=envelope.refused)

    def try_again(self, envelope: Envelope, reason: str) -> None:
        envelope.attempts += 1
        self.defer(envelope, reason, self.backoff(envelope.attempts - 1))

    def give_up_all(self, error: Exception) -> None:
        self.error = error
        self.stop.set()

    def worker_ends(self, worker: threading.Thread) -> None:
        with self._changed:
            self._threads.discard(worker)

    def defer(self, envelope: Envelope, reason: str, delay: float) -> None:
        envelope.reason, envelope.due = reason, time.time() + delay
        self.queue.save(envelope)
        log("deferred", id=envelope.id, reason=reason, seconds=delay)
        with self._changed:
            self._due[envelope.id] = envelope.due

    def backoff(self, attempts: int) -> float:
        return self.retry[min(attempts, len(self.retry) - 1)]
