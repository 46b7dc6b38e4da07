"""An MTA to copy from: drains a mail queue through the proxy, within limits that it shares with all other instances.

    python3 queue_sender.py queue_sender.toml            until SIGTERM
    python3 queue_sender.py --drain queue_sender.toml    until the queue is empty

Three modules: `mail_queue` is the queue on the disk, `queue_worker` the way of a message through the proxy. This one
sees that each *lane*, the mail for one set of MX hosts, has workers, and writes down what became of each message.

What is promised: no message is lost, and none is sent again for a reason that could be known. SMTP leaves two cases in
which it cannot be known, and then the message is sent again (RFC 5321 section 4.5.4, RFC 1047): the connection broke
after the final dot and before the reply to it; this process was killed before that reply was on the disk. In the log,
such a message has a "data" line that no "delivered" or "failed" follows.

What a whole MTA has besides: DNS (see `Sender.resolve`), bounce messages made from failed/, DKIM, SMTPUTF8.
The log is one JSON object a line. docs/library.md explains the library's side of it.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import tomllib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mail_queue import Envelope, MailQueue, Replies, log, says
from queue_worker import LOOK, Worker

from greenarrow_proxy_client import Limits, Session, Throttle

DAMAGED = float("inf")  # when such a message is due
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


class Sender:
    """Args:
    config: the parsed TOML file.

    Raises:
        KeyError, TypeError, ValueError: the configuration is wrong. BlockingIOError: the queue has a sender.
    """

    def __init__(self, config: dict) -> None:
        self.routes = [Route(**each) for each in config["route"]]
        self.retry, self.give_up = config["retry"], config["give_up"]
        self.queue = MailQueue(config["queue"])
        self.queue.lock()
        self.queue.clean()
        self.stop = threading.Event()
        self.error: Exception | None = None
        self._changed = threading.Condition(threading.RLock())  # guards all below
        self._due: dict[str, float | None] = {}  # when a message is due; None: it is in a lane
        self._lanes: dict[tuple[str, tuple[Address, ...]], Lane] = {}
        self._threads: set[threading.Thread] = set()
        secret = Path(config["secret_file"]).read_text().strip()
        self.session = Session(endpoint(config["proxy"]), secret, config["instance"])
        self._throttles = {r.name: self.session.throttle(r.source_ip, r.limits()) for r in self.routes}

    # --- the queue's own thread ---

    def run(self, drain: bool = False) -> None:
        """Send until `stop` is set; with `drain`, until nothing is left in the queue. Ends in good order: messages
        whose sending has begun are finished, connections are given back.

        Raises:
            Exception: why a worker gave up all.
        """
        while not self.stop.is_set() and (self._look() or not drain):
            self.stop.wait(LOOK)
        self.stop.set()
        with self._changed:
            self._changed.notify_all()
            threads = list(self._threads)
        for thread in threads:
            thread.join()
        self.session.close()
        if self.error is not None:
            raise self.error

    def _look(self) -> bool:
        """Put what is due into its lane, see that each lane has workers; whether there is any mail left."""
        ids = list(self.queue.ids())
        for id in ids:
            due = self._due.get(id, 0.0)
            if due is not None and due <= time.time():
                try:
                    self._schedule(self.queue.load(id))
                except FileNotFoundError:  # it was finished while we looked
                    continue
                except (ValueError, TypeError) as error:  # not our writing; the others shall not wait for it
                    self._due[id] = DAMAGED
                    log("damaged", id=id, reason=str(error))
        with self._changed:
            for lane in self._lanes.values():
                self._hire(lane)
        return any(self._due.get(id) != DAMAGED for id in ids)

    def _schedule(self, envelope: Envelope) -> None:
        self._due[envelope.id] = envelope.due
        if not envelope.recipients:  # a crash came between
            self.settle(envelope, {})
        elif time.time() - envelope.created > self.give_up:
            late = f"given up; {envelope.reason or 'there was no attempt'}".encode()
            self.settle(envelope, dict.fromkeys(envelope.recipients, (500, late)))
        elif envelope.due <= time.time():
            try:
                lane = self._lane(envelope.domain)
            except LookupError as error:
                self._defer(envelope, str(error), self._backoff(0))
                return
            with self._changed:
                self._due[envelope.id] = None
                lane.queue(envelope).append(envelope)
                self._changed.notify_all()
                self.tell(lane)

    def resolve(self, route: Route, domain: str) -> Sequence[Address]:
        """Where to connect to, in order. This is where DNS goes: the MX records of `domain` by preference, then the
        addresses of each, of the source's family. Cache them; domains with the same MX hosts share a lane.

        Raises:
            LookupError: not now; the message will be tried again.
        """
        return [endpoint(each) for each in route.mx]

    def _lane(self, domain: str) -> Lane:
        route = next((r for r in self.routes if domain in r.domains or "*" in r.domains), None)
        if route is None:
            raise LookupError(f"no route to {domain}")
        mx = tuple(self.resolve(route, domain))
        with self._changed:
            return self._lanes.setdefault((route.name, mx), Lane(route, mx, self._throttles[route.name]))

    def _hire(self, lane: Lane) -> None:
        """As many workers as there are messages, at most."""
        if time.monotonic() < lane.paused_until or self.stop.is_set():
            return
        for _ in range(min(len(lane.first) + len(lane.later), lane.most - lane.workers)):
            lane.workers += 1
            worker = Worker(self, lane)
            self._threads.add(worker)
            worker.start()

    # --- for workers ---

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
            delay = retry_after or self._backoff(lane.failures)
            lane.failures += 1
            lane.paused_until = time.monotonic() + delay
        self._defer(envelope, reason, delay)

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
        self._defer(envelope, reason, self._backoff(envelope.attempts - 1))

    def give_up_all(self, error: Exception) -> None:
        self.error = error
        self.stop.set()

    def worker_ends(self, worker: Worker) -> None:
        with self._changed:
            self._threads.discard(worker)

    def _defer(self, envelope: Envelope, reason: str, delay: float) -> None:
        envelope.reason, envelope.due = reason, time.time() + delay
        self.queue.save(envelope)
        log("deferred", id=envelope.id, reason=reason, seconds=delay)
        with self._changed:
            self._due[envelope.id] = envelope.due

    def _backoff(self, attempts: int) -> float:
        return self.retry[min(attempts, len(self.retry) - 1)]


def endpoint(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main(arguments: list[str]) -> int:
    (file,) = [each for each in arguments if each != "--drain"]
    sender = Sender(tomllib.loads(Path(file).read_text()))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sender.stop.set())
    try:
        sender.run(drain="--drain" in arguments)
    except Exception as error:
        log("gave_up", reason=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
