"""An MTA to copy from: drains a mail queue through the proxy, within limits that it shares with all other instances.

    python3 queue_sender.py queue_sender.toml            until SIGTERM
    python3 queue_sender.py --drain queue_sender.toml    until the queue is empty

Four modules: `mail_queue` is the queue on the disk, `queue_lanes` what waits for whom and what became of it,
`queue_worker` the way of a message through the proxy. This one fills the lanes and sees that each has workers.

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
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from mail_queue import Envelope, MailQueue, log
from queue_lanes import Address, Lane, Lanes, Route
from queue_worker import LOOK, Worker

from greenarrow_proxy_client import Session

DAMAGED = float("inf")  # when such a message is due


class Sender(Lanes):
    """The lanes, and the thread that fills them.

    Args:
        config: the parsed TOML file.

    Raises:
        KeyError, TypeError, ValueError: the configuration is wrong. BlockingIOError: the queue has a sender.
    """

    def __init__(self, config: dict) -> None:
        self.routes = [Route(**each) for each in config["route"]]
        self.give_up = config["give_up"]
        queue = MailQueue(config["queue"])
        queue.lock()
        queue.clean()
        secret = Path(config["secret_file"]).read_text().strip()
        proxies = [config["proxy"]] if isinstance(config["proxy"], str) else config["proxy"]
        session = Session([endpoint(each) for each in proxies], secret, config["instance"])
        super().__init__(queue, session, config["retry"])
        self._throttles = {r.name: session.throttle(r.source_ip, r.limits()) for r in self.routes}

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
                self.defer(envelope, str(error), self.backoff(0))
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
