"""A worker: a process that serves the standard doors for a master, which has the throttles, signals and operators.

It does what the master orders (`orders`), in turn, and asks it for places and slots (`egress.remote`). When the master
is gone it takes nothing new, finishes what it has, and ends.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import Any

import gevent
from gevent.event import Event
from gevent.queue import Queue

from proxy.doors import front
from proxy.egress.admission import Admission
from proxy.egress.clock import clock_ns
from proxy.egress.office import Office
from proxy.egress.remote import Remote
from proxy.errors import ConfigError
from proxy.log import lines as log
from proxy.log import outputs
from proxy.model import Endpoint, hold_breath
from proxy.net.relay import RawSocket
from proxy.net.seam import Seam
from proxy.net.turn_meter import TurnMeter
from proxy.net.turns import Breather, rest
from proxy.numbering import numbers
from proxy.protocols import seam
from proxy.server import figures, orders, process, systemd
from proxy.server.drain import drain
from proxy.server.here import Here
from proxy.server.listener import ListenError
from proxy.server.listeners import Doors, Opened, close_all, standard_doors
from proxy.server.neighbours import Neighbours
from proxy.server.orders import Begin, Plan, pack, unpack
from proxy.server.questions import Answering
from proxy.server.reception import Reception
from proxy.server.routine import sweep_forever
from proxy.server.vitals import Vitals
from proxy.server.wiring import Prepared, Wiring
from proxy.services import Door, Services
from proxy.spans import SPANS
from proxy.status.parts import Part
from proxy.throttling.manager import Manager

#: Bytes that may wait for the master when something is told that can be left out.
_MOST_FOLLOWED = 1 << 20
#: Seconds between two reports.
_REPORT_EVERY = 1.0
#: Orders that do not wait for those before them.
_AT_ONCE = frozenset({orders.SEATS, orders.SEATS_BACK, orders.FAILED})
#: What ends the master is not meant for us: it tells us what to do.
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def run(fd: int) -> int:
    """Serve until the master says so, or is gone.

    Args:
        fd: our end of the link.

    Returns:
        The exit code.
    """
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    try:
        return Worker(socket.socket(fileno=fd)).run()
    finally:
        outputs.flush(1.0)


class Handed:
    """Listening sockets that the master has opened."""

    def __init__(self) -> None:
        self._sockets: dict[Endpoint, socket.socket] = {}

    def put(self, endpoints: Sequence[Endpoint], fds: Sequence[int]) -> None:
        # The last ones are missing if we have no descriptor left for them.
        for endpoint, fd in zip(endpoints, fds, strict=False):
            self._sockets[endpoint] = socket.socket(fileno=fd)

    def take(self, endpoint: Endpoint, count: int) -> list[socket.socket]:
        """See `listeners.Handed`. A socket of our own would be another one.

        Raises:
            ListenError: it has not come.
        """
        found = self._sockets.pop(endpoint, None)
        if found is None:
            raise ListenError(f"cannot listen on {endpoint}: a worker has no descriptor left for its socket")
        return [found]

    def close(self) -> None:
        """Those that nobody has taken."""
        for sock in self._sockets.values():
            sock.close()
        self._sockets.clear()


class Worker:
    """This process."""

    def __init__(self, sock: socket.socket) -> None:
        self._orders: Queue[tuple[seam.Order, list[int]]] = Queue()
        self._descriptors = process.raise_descriptor_limit()
        self._reserve = process.Reserve()
        self._handed = Handed()
        self._begun: Begin | None = None
        self._wiring: Wiring | None = None
        self._remote: Remote | None = None
        self._answering: Answering | None = None
        self._neighbours: Neighbours | None = None
        self._prepared: tuple[Prepared, Opened, Plan] | None = None
        self._end = Event()
        self._drain_timeout, self._replaced = 0.0, False
        self._own: list[tuple[Endpoint, int]] = []  # doors that nobody else listens on
        self._told: dict[int, Any] = {}  # what the master follows: how it ends
        self._reception = Reception(
            services=lambda: self._services,
            open_connections=lambda: self._doors.open_connections(),
            serve_status=lambda *_: False,
            ask=lambda count: self._link.say(seam.Tell(orders.SEATS_WANTED, pack(count))),
        )
        self._doors = Doors(
            self._reception.admit,
            self._reception.accept_failed,
            self._reserve.lent,
            self._handed,
            wanted=standard_doors,
        )
        self._link = Seam(sock, False, self._take, self._lost)

    @property
    def _services(self) -> Services:
        assert self._wiring is not None
        return self._wiring.services

    # ---------------------------------------------------------------- life

    def run(self) -> int:
        process.forbid_core_dumps()
        gevent.spawn(self._obey_forever)
        self._end.wait()
        if self._neighbours is not None:
            self._neighbours.stay()
            rest()  # whoever is in our inbox is served here
        if self._wiring is None or not hasattr(self._wiring, "services"):
            return 0
        cut = drain(
            self._services,
            self._doors,
            systemd.Notifier({}, 0),
            self._drain_timeout,
            replaced=self._replaced,
            ours=self._own,
        )
        rest()  # those that were cut write their last line
        self._link.say(seam.Tell(orders.PART, self._part_in_full()))
        self._link.say(seam.Tell(orders.DRAINED, pack(cut)))
        self._link.close()
        return 0

    def _lost(self) -> None:
        """The master is gone."""
        self._reception.alone()
        if self._remote is not None:
            self._remote.lost()
        if self._wiring is not None and hasattr(self._wiring, "services"):
            self._drain_timeout = self._services.settings.drain_timeout
            log.note(log.Event.WORKER, log.ERROR, "the master is gone: finishing what is open", pid=os.getpid())
        self._end.set()

    # ---------------------------------------------------------------- what the master says

    def _take(self, records: Sequence[seam.FromMaster], fds: list[int]) -> None:
        for record in records:
            if isinstance(record, seam.Order) and record.what in _AT_ONCE:
                self._act_at_once(record)
            elif isinstance(record, seam.Order):
                self._orders.put((record, fds))
                fds = []
            elif isinstance(record, seam.Question):
                gevent.spawn(self._answer, record)
            elif self._remote is not None:
                try:
                    self._remote.hear(record)
                except Exception as error:  # the other records are not to be lost
                    log.internal_error("a record of the master", error)

    def _act_at_once(self, record: seam.Order) -> None:
        """In the hub: clients wait, and a reload takes a while."""
        if record.what == orders.SEATS:
            self._reception.lent(unpack(record.body))
        elif record.what == orders.FAILED:
            if self._wiring is not None:
                self._wiring.budget.failed_elsewhere(unpack(record.body), monotonic())
        else:
            self._link.say(seam.Tell(orders.SEATS_RETURNED, pack(self._reception.give_back())))

    def _answer(self, question: seam.Question) -> None:
        if self._answering is not None:
            body = self._answering.answer(question.what, question.body)
            if question.id:
                self._link.say(seam.Reply(question.id, body))

    def _obey_forever(self) -> None:
        acts = {
            orders.BEGIN: self._begin,
            orders.SOCKETS: self._handed.put,
            orders.NEIGHBOURS: self._meet,
            orders.PREPARE: self._prepare,
            orders.COMMIT: self._commit,
            orders.ABORT: self._abort,
            orders.DRAIN: self._leave,
            orders.FOLLOW: self._follow,
            orders.FOLLOW_NO_MORE: self._follow_no_more,
        }
        while True:
            order, fds = self._orders.get()
            body = unpack(order.body) if order.body else None
            act: Any = acts[order.what]
            try:
                if order.what in (orders.SOCKETS, orders.NEIGHBOURS):
                    act(body, fds)
                elif body is None:
                    act()
                else:
                    act(body)
            except Exception as error:
                log.internal_error(f"the order {order.what}", error)

    def _begin(self, begin: Begin) -> None:
        self._begun = begin
        numbers.count_as(begin.number, begin.step, begin.above)

    def _meet(self, _: object, fds: list[int]) -> None:
        assert self._begun is not None
        self._neighbours = Neighbours(self._begun.number - 1, fds[0], fds[1:], self._take_over)

    def _take_over(self, data: bytes, sock: RawSocket) -> None:
        """A client that another worker has passed on."""
        passed = seam.decode_passed(data)
        services = self._services
        sock.setblocking(False)
        door = self._doors.door_at(passed.door) or Door(passed.protocol, passed.door)
        services.crew.run(front.go_on, services, door, sock, passed)

    # ---------------------------------------------------------------- settings

    def _prepare(self, plan: Plan) -> None:
        """Everything about them that can fail; the master hears of it."""
        begun, settings = self._begun, plan.settings
        assert begun is not None
        breathe = hold_breath if self._wiring is None else Breather("reload")
        opened: Opened = {}
        try:
            if self._wiring is None:
                outputs.setup(settings)
                self._wire(begun, plan)
            assert self._wiring is not None
            self._wiring.certificates.use_generated(plan.identity)
            opened = self._doors.open_missing(settings, breathe)
            prepared = self._wiring.prepare(plan.loaded(), plan.own, breathe)
        except (ConfigError, ListenError) as error:
            close_all(opened)
            self._link.say(seam.Tell(orders.PREPARED, str(error).encode()))
            return
        self._prepared = prepared, opened, plan
        self._link.say(seam.Tell(orders.PREPARED))

    def _wire(self, begun: Begin, plan: Plan) -> None:
        wiring = self._wiring = Wiring(plan.settings, self._reserve.lent, self._office)
        wiring.incarnation = begun.incarnation
        wiring.neighbours = self._neighbours
        wiring.budget.tell = lambda address: self._link.say(seam.Tell(orders.FAILED, pack(address)))
        vitals = Vitals(begun.number, self._reserve.lent)
        here = Here(lambda: self._services, lambda: self._part(vitals))
        self._answering = Answering(here)

    def _office(self, wiring: Wiring) -> tuple[Office, Admission]:
        remote = self._remote = Remote(
            self._link.say,
            lambda: wiring.limits,
            lambda throttle, count: wiring.keeper.give_way(throttle, count),
            say_late=self._link.say_late,
        )
        nobody = Manager(wiring.incarnation, clock_ns())
        return remote, Admission(nobody, lambda throttle, count: False)

    def _commit(self) -> None:
        prepared, self._prepared = self._prepared, None
        wiring = self._wiring
        if prepared is None or wiring is None:
            return
        wired, opened, plan = prepared
        first = not hasattr(wiring, "services")
        breathe = hold_breath if first else Breather("reload")
        wiring.take(wired, breathe)
        outputs.reconfigure(plan.settings)
        limit = plan.settings.max_connections or plan.max_connections
        self._reception.set_limit(limit, shared=not plan.max_connections)
        self._doors.take(plan.settings, opened, breathe)
        self._handed.close()
        wiring.tell_dialogues()
        if first:
            self._run_in()
        self._link.say(seam.Tell(orders.SERVING))

    def _run_in(self) -> None:
        """What goes on beside the connections."""
        wiring = self._wiring
        assert wiring is not None
        if self._neighbours is not None:
            self._neighbours.begin()
        wiring.watch_addresses()
        process.log_what_the_hub_catches(wiring.counters)
        TurnMeter(SPANS.turn)
        gevent.spawn(wiring.keeper.run)
        gevent.spawn(sweep_forever, lambda: self._services, lambda: None)
        gevent.spawn(self._report_forever)
        process.load_codecs()
        process.Collector(lambda: False).begin()

    def _abort(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            close_all(prepared[1])
        self._handed.close()

    def _leave(self, how: tuple[float, bool, list[Endpoint]]) -> None:
        self._drain_timeout, self._replaced, own = how
        self._own = [(endpoint, 0) for endpoint in own]
        self._end.set()

    # ---------------------------------------------------------------- what it says of itself

    def _part(self, vitals: Vitals) -> Part:
        return figures.part_of(self._services, self._doors, vitals)

    def _part_in_full(self) -> bytes:
        return self._answering.part() if self._answering is not None else b""

    def _report_forever(self) -> None:
        while True:
            log.status(())  # none are ours, but what was left out of the log is to be told
            self._link.say(seam.Tell(orders.PART, self._part_in_full()))
            gevent.sleep(_REPORT_EVERY)

    def _follow(self, what: tuple[int, str, bytes]) -> None:
        id, kind, body = what
        if self._answering is not None:
            self._told[id] = self._answering.tell(kind, body, partial(self._followed, id))

    def _followed(self, id: int, body: bytes) -> bool:
        if self._link.waits > _MOST_FOLLOWED:
            return False
        self._link.say(seam.Tell(orders.FOLLOWED, pack((id, body))))
        return True

    def _follow_no_more(self, id: int) -> None:
        if (end := self._told.pop(id, None)) is not None:
            end()
