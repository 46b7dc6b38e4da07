"""The master's workers: started, told what to do, watched, and replaced when they die.

A worker that dies costs its own connections and nothing more. Its sockets are kept (`listeners`), its places are given
back when the kernel has closed what it had, that is when it is gone, and another takes its number after a pause that
grows. One that says nothing for too long, or does not read its link, has hung and is killed. What they are asked is
`roll_call`'s, starting and watching a process `child`'s.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

import gevent

from proxy import __version__
from proxy.config.values import MOST_WORKERS
from proxy.egress.branch import Branches
from proxy.errors import ConfigError
from proxy.log import lines as log
from proxy.model import Endpoint
from proxy.net.seam import Seam, pair
from proxy.numbering import step_for
from proxy.policy.budget import FailureBudget
from proxy.protocols import seam
from proxy.server import orders
from proxy.server.child import LINK_FD, start_child, watch
from proxy.server.listeners import Opened
from proxy.server.orders import Begin, Plan, unpack
from proxy.server.reception import Reception
from proxy.server.roll_call import RollCall
from proxy.server.seating import Seating
from proxy.server.staff import Worker
from proxy.settings import Settings
from proxy.status.colleagues import LEAVING
from proxy.throttling.flows import Places

#: Turns of a second in which nothing is heard, until a worker counts as hung.
_SILENT_TURNS = 15
#: Seconds until one that died is replaced, doubled each time; who has lived for so long begins anew.
_FIRST_PAUSE, _LONGEST_PAUSE, _LONG_LIFE = 0.1, 30.0, 60.0
#: Seconds for all of them to be ready for new settings.
_PREPARED_WITHIN = 60.0
#: Seconds for them to say how many clients they have.
_COUNTED_WITHIN = 1.0
#: Seconds that a worker may take to end when all it had is over.
_ENDS_WITHIN = 5.0
#: Not for the children: whom systemd talks to is the master.
_OURS_ALONE = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


def count_of(settings: Settings) -> int:
    """How many there are; none where one process does everything."""
    cores = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    wanted = cores if settings.workers == "auto" else settings.workers
    return wanted if wanted > 1 else 0


class Workers:
    """All of them; with a count of 0 there are none, and every call is nothing.

    Args:
        branches: where their throttles are.
        kept: the listening sockets of a worker, counted from 0.
        standing_orders: what a new one is asked first.
        reception: ours, which has a part of `max_connections`, too. budget: ours, which hears of all failures.
    """

    def __init__(
        self,
        count: int,
        incarnation: int,
        branches: Branches,
        kept: Callable[[int], dict[Endpoint, socket.socket]],
        standing_orders: Callable[[], Iterable[tuple[str, bytes]]],
        reception: Reception,
        budget: FailureBudget,
    ) -> None:
        self._count = count
        self._incarnation = incarnation
        self._branches = branches
        self._kept = kept
        self._standing_orders = standing_orders
        self._reception = reception
        self._budget = budget
        if count:
            budget.tell = partial(self._tell_of_failure, 0)
        self.seating = Seating(count + 1, self._tell_of_seats)
        self._workers = [Worker(number) for number in range(1, count + 1)]
        self._leaving: dict[Worker, None] = {}  # processes that this one has replaced, and that still have connections
        self._holds = False  # nobody is to serve yet
        self._above = 0
        self._plan: Plan | None = None
        self._generation = 0
        self.colleagues = RollCall(self._everybody, lambda: self._workers)
        self._roll = self.colleagues.roll
        self._inboxes = [pair() for _ in self._workers]
        self._ends = False
        self._last = MOST_WORKERS  # number
        self._ticker: gevent.Greenlet[Any] | None = None

    def __len__(self) -> int:
        return len(self._workers)

    # ---------------------------------------------------------------- settings

    def start(self, plan: Plan, opened: Opened, above: int = 0) -> None:
        """Start all of them with these settings, and wait until they are ready to serve.

        Args:
            opened: the listening sockets of all doors.
            above: the highest number of a connection that a process before us has given.

        Raises:
            ConfigError: one of them cannot.
        """
        self._plan, self._above = plan, above
        self._generation += 1
        self._holds = True
        for worker in self._workers:
            self._spawn(worker, self._share(worker, opened))
        if self._workers:
            self._ticker = gevent.spawn(self._tick_forever)
        self._wait_for(lambda worker: worker.prepared is not None)
        for worker in self._workers:
            if worker.prepared:
                raise ConfigError(worker.prepared.decode())

    def serve(self) -> None:
        """Let those that are ready serve."""
        self._holds = False
        for worker in self._workers:
            if worker.commits and worker.prepared == b"":
                worker.order(orders.COMMIT)
        self._wait_for(lambda worker: worker.serves)

    def prepare(self, plan: Plan, opened: Opened) -> None:
        """All that serve get ready for new settings.

        Raises:
            ConfigError: one cannot, or has died over it; then `abort`.
        """
        self._wait_for(lambda worker: not worker.commits or not worker.pid)  # those that have just begun
        asked = [worker for worker in self._workers if worker.serves]
        for worker in asked:
            worker.prepared = None
            try:
                worker.hand(self._share(worker, opened))
            except OSError as error:
                why = f"worker {worker.number} cannot be given its sockets: {os.strerror(error.errno or 0)}"
                raise ConfigError(why) from None
            worker.order(orders.PREPARE, plan)
        self._wait_for(lambda worker: worker not in asked or worker.prepared is not None or not worker.serves)
        for worker in asked:
            if not worker.serves:
                raise ConfigError(f"worker {worker.number} ended while it got ready for the new configuration")
            if worker.prepared is None:
                raise ConfigError(f"worker {worker.number} did not get ready for the new configuration in time")
            if worker.prepared:
                raise ConfigError(worker.prepared.decode())

    def _share(self, worker: Worker, opened: Opened) -> dict[Endpoint, socket.socket]:
        return {at: sockets[worker.number - 1] for at, sockets in opened.items() if len(sockets) == self._count}

    def commit(self, plan: Plan) -> None:
        """What was prepared is to be in force. Whoever was just starting gets it when it has started."""
        self.seating.set_limit(None if plan.max_connections else plan.settings.max_connections)
        if self._holds:
            return  # at a start they have it already
        self._plan = plan
        self._generation += 1
        for worker in self._workers:
            if worker.serves and worker.prepared == b"":
                worker.generation = self._generation
                worker.committing = True
                worker.order(orders.COMMIT)

    def committed(self) -> None:
        """Wait until it is, everywhere."""
        self._wait_for(lambda worker: not worker.committing or not worker.serves)

    def abort(self) -> None:
        """The old settings stay in force."""
        for worker in self._workers:
            if worker.serves:
                worker.order(orders.ABORT)

    # ---------------------------------------------------------------- those that were replaced

    def adopt(self, link: Seam, pid: int, version: str, held: Mapping[int, Places]) -> Callable[[Any], None]:
        """A process that this one has replaced is a worker that takes nothing new.

        Args:
            link: to it. held: the places that it has, by its numbers.

        Returns:
            takes each record that it says.
        """
        self._last += 1
        worker = Worker(self._last)
        worker.pid, worker.link, worker.serves = pid, link, True
        worker.branch = self._branches.open(worker.say, held)
        self._roll.begun(worker.number, pid, version, monotonic(), LEAVING)
        self._leaving[worker] = None
        watch(pid, os.pidfd_open(pid), partial(self._left, worker))
        return lambda record: self._take(worker, [record], [])

    def _left(self, worker: Worker) -> None:
        """It has ended."""
        self._let_go(worker)
        self._roll.ended(worker.number)
        del self._leaving[worker]
        log.note(log.Event.WORKER, log.INFO, "the process that was replaced has ended", pid=worker.pid)
        worker.pid = 0

    def _everybody(self) -> list[Worker]:
        return [*self._workers, *self._leaving]

    # ---------------------------------------------------------------- the end

    def finish(self, timeout: float, replaced: bool, ours: Collection[tuple[Endpoint, int]] = ()) -> None:
        """They take nothing new, and end when what they have is over, or after `timeout`; see `drain.drain`."""
        self._ends = True
        for worker in self._everybody():
            own = [endpoint for endpoint, index in ours if index == worker.number - 1]
            worker.order(orders.DRAIN, (timeout, replaced, own))

    def open_connections(self, now: bool = True) -> int:
        """Of clients.

        Args:
            now: ask; else what they have said last.
        """
        for reply in self.colleagues.ask("part", b"", _COUNTED_WITHIN) if now else ():
            self.colleagues.heard_bytes(reply.who, reply.body or b"")
        return sum(part.open for part in self._roll.parts())

    def all_gone(self) -> bool:
        return not any(worker.pid for worker in self._everybody())

    def abandon(self) -> None:
        """End them without waiting for it."""
        self._ends = True
        for worker in self._everybody():
            worker.kill("")

    def kill(self) -> int:
        """End those that are left; how many connections they and all others had to reset."""
        self.abandon()
        with gevent.Timeout(_ENDS_WITHIN, False):
            for worker in self._workers:
                if worker.pid:
                    worker.gone.wait()
        if self._ticker is not None:
            self._ticker.kill(block=False)
        self.seating.stop()
        return sum(worker.cut for worker in self._workers)

    # ---------------------------------------------------------------- what is of all processes together

    def _tell_of_seats(self, who: int, count: int | None) -> None:
        if who:
            worker = self._workers[who - 1]
            worker.order(orders.SEATS_BACK) if count is None else worker.order(orders.SEATS, count)
        elif count is None:
            self.seating.given_back(0, self._reception.give_back())
        else:
            self._reception.lent(count)

    def _tell_of_failure(self, who: int, address: str) -> None:
        for worker in self._workers:
            if worker.number != who:
                worker.order(orders.FAILED, address)

    # ---------------------------------------------------------------- one worker's life

    def _spawn(self, worker: Worker, sockets: dict[Endpoint, socket.socket]) -> None:
        try:
            child = start_child(_as_worker(), _OURS_ALONE, {})
        except OSError as error:
            self._roll.begun(worker.number, 0, __version__, monotonic())
            self._died(worker, f"cannot be started: {os.strerror(error.errno or 0)}")
            return
        worker.pid, worker.since = child.pid, monotonic()
        worker.runs += 1
        self._roll.begun(worker.number, worker.pid, __version__, worker.since)
        worker.silent, worker.serves, worker.prepared = 0, False, None
        worker.commits, worker.committing = True, False
        worker.gone.clear()
        worker.link = Seam(child.link, True, partial(self._take, worker), partial(self._lost, worker))
        worker.branch = self._branches.open(worker.say)
        child.watch(partial(self._exited, worker))
        try:
            self._begin(worker, sockets)
        except OSError as error:
            worker.kill(f"cannot be given its sockets: {os.strerror(error.errno or 0)}")

    def _begin(self, worker: Worker, sockets: dict[Endpoint, socket.socket]) -> None:
        above = max(self._above, self._roll.highest()) if worker.runs > 1 else self._above
        step = step_for(self._count)
        begin = Begin(worker.number, self._count, step, above, self._incarnation)
        worker.order(orders.BEGIN, begin)
        ways = [self._inboxes[worker.number - 1][0], *(each[1] for each in self._inboxes)]
        worker.say_with(seam.Order(orders.NEIGHBOURS), [each.fileno() for each in ways])
        self._send_plan(worker, sockets)

    def _send_plan(self, worker: Worker, sockets: dict[Endpoint, socket.socket]) -> None:
        worker.hand(sockets)
        worker.generation = self._generation
        worker.order(orders.PREPARE, self._plan)

    def _take(self, worker: Worker, records: Sequence[seam.FromWorker], fds: list[int]) -> None:
        worker.silent = 0
        for fd in fds:  # a worker has none to give
            os.close(fd)
        with self._branches.together():
            for record in records:
                self._hear(worker, record)

    def _hear(self, worker: Worker, record: seam.FromWorker) -> None:
        try:
            if worker.branch is not None and worker.branch.hear(record):
                return
            if isinstance(record, seam.Reply):
                self.colleagues.replied(worker.number, record)
            elif isinstance(record, seam.Tell):
                self._told(worker, record)
        except Exception as error:  # the others' records are not to be lost
            log.internal_error(f"worker {worker.number}", error)

    def _told(self, worker: Worker, record: seam.Tell) -> None:
        if record.what == orders.PART:
            self.colleagues.heard_bytes(worker.number, record.body)
        elif record.what == orders.PREPARED:
            worker.prepared = record.body
            if worker.commits and not record.body:
                if not self._holds:
                    worker.order(orders.COMMIT)
            elif worker.commits and not self._holds:
                worker.kill(f"cannot begin: {record.body.decode()}")
        elif record.what == orders.SERVING:
            self._serves(worker)
        elif record.what == orders.FOLLOWED:
            self.colleagues.followed(worker.number, *unpack(record.body))
        elif record.what == orders.FAILED:
            address = unpack(record.body)
            self._budget.failed_elsewhere(address, monotonic())
            self._tell_of_failure(worker.number, address)
        elif record.what == orders.SEATS_WANTED:
            self.seating.want(worker.number, unpack(record.body))
        elif record.what == orders.SEATS_RETURNED:
            self.seating.given_back(worker.number, unpack(record.body))
        elif record.what == orders.DRAINED:
            worker.cut = unpack(record.body)
        worker.changed.set()

    def _serves(self, worker: Worker) -> None:
        if worker.commits:
            log.note(log.Event.WORKER, log.INFO, "a worker serves", worker=worker.number, pid=worker.pid)
        if not worker.serves:
            self._ask_first(worker)
        worker.commits, worker.committing, worker.serves = False, False, True
        if worker.generation != self._generation:  # a reload came while it started
            worker.commits = True
            self._send_plan(worker, self._kept(worker.number - 1))

    def _ask_first(self, worker: Worker) -> None:
        """What the others were asked while it was not there: until it serves, nobody is asked anything."""
        for what, body in self._standing_orders():
            worker.say(seam.Question(0, what, body))
        self.colleagues.begins(worker)

    # ---------------------------------------------------------------- its death

    def _lost(self, worker: Worker) -> None:
        """Its link is gone: it will be, too."""
        worker.link = None
        worker.serves = False
        worker.changed.set()
        if worker.pid and not self._ends:
            gevent.spawn_later(_ENDS_WITHIN, self._kill_if, worker, worker.pid, "its link is broken")

    def _kill_if(self, worker: Worker, pid: int, why: str) -> None:
        if worker.pid == pid:
            worker.kill(why)

    def _exited(self, worker: Worker, how: str) -> None:
        """The kernel has closed all that it had."""
        worker.pid = 0
        self._let_go(worker)
        if self._ends:
            self._roll.ended(worker.number)
        self.seating.gone(worker.number)
        worker.gone.set()
        worker.changed.set()
        if not self._ends:
            self._died(worker, worker.died or how)

    def _let_go(self, worker: Worker) -> None:
        if worker.link is not None:
            worker.link.close()
            worker.link = None
        if worker.branch is not None:
            worker.branch.close()
            worker.branch = None
        worker.serves = False
        self.colleagues.gone(worker.number)

    def _died(self, worker: Worker, why: str) -> None:
        now = monotonic()
        lived = now - worker.since
        worker.failures = 0 if lived > _LONG_LIFE else worker.failures + 1
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(max(worker.failures - 1, 0), 20))
        self._roll.died(worker.number, why, now)
        log.note(
            log.Event.WORKER,
            log.ERROR,
            "a worker has died; its connections are gone, another one takes its place",
            worker=worker.number,
            reason=why,
            seconds=lived,
            again_in=pause,
        )
        gevent.spawn_later(pause, self._again, worker)

    def _again(self, worker: Worker) -> None:
        if not self._ends and not worker.pid:
            worker.died = ""
            self._spawn(worker, self._kept(worker.number - 1))

    def _tick_forever(self) -> None:
        while True:
            gevent.sleep(1.0)
            for worker in self._workers:
                if worker.pid:
                    worker.silent += 1
                    if worker.silent > _SILENT_TURNS and worker.silent % _SILENT_TURNS == 1:
                        worker.kill(f"it has said nothing for {worker.silent - 1} s")

    def _wait_for(self, done: Callable[[Worker], object]) -> None:
        with gevent.Timeout(_PREPARED_WITHIN, False):
            for worker in self._workers:
                while not done(worker):
                    worker.changed.clear()
                    worker.changed.wait()


def _as_worker() -> list[str]:
    """The command line of a worker: ours, without what is ours alone."""
    return [*sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv[1:])], "worker", str(LINK_FD)]
