"""The running program: the wiring of everything else, start, reload and stop.

`run` is the whole life from the first socket to the exit code. A reload builds everything that can fail before it
changes anything: it is all or nothing. Accepted connections are `reception`'s, watching for signals is `signals`', what
is read of certificates `certificates`', how clients take leave `drain`'s, what is done now and then `routine`'s, and
what becomes of this process when another one takes over `replacement`'s.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from datetime import UTC, datetime, tzinfo
from functools import partial
from time import monotonic
from typing import NamedTuple

import gevent
from gevent.event import Event
from gevent.lock import Semaphore

from proxy import __version__
from proxy.config.in_force import Row, digest
from proxy.config.load import Loaded
from proxy.egress.admission import Admission
from proxy.egress.branch import Branches
from proxy.egress.clock import clock_ns
from proxy.egress.leases import Leases, make_cluster
from proxy.egress.office import Office
from proxy.egress.switch import Switch
from proxy.errors import ConfigError
from proxy.log import lines as log
from proxy.log import outputs
from proxy.model import Breathe, Endpoint, hold_breath, let_go
from proxy.net.turn_meter import TurnMeter
from proxy.net.turns import Breather, rest
from proxy.numbering import numbers, step_for
from proxy.server import calendar, check_config, control_socket, figures, findings, process, systemd, wiring
from proxy.server.control_socket import ControlSocket
from proxy.server.drain import drain
from proxy.server.here import Here
from proxy.server.listener import ListenError
from proxy.server.listeners import Doors, Opened, close_all, close_unclaimed
from proxy.server.orders import Handed, Plan
from proxy.server.questions import Answering, Everywhere, Household
from proxy.server.reception import Reception
from proxy.server.replacement import Replacement
from proxy.server.routine import Routine
from proxy.server.signals import Signals
from proxy.server.steering import Steering
from proxy.server.succession import Predecessor
from proxy.server.vitals import Vitals
from proxy.server.wiring import Wiring
from proxy.server.workers import Workers, count_of
from proxy.services import Services
from proxy.settings import Settings
from proxy.spans import SPANS
from proxy.stats import Snapshot
from proxy.status.http import House, InForce, ReloadFailure, StatusDoor
from proxy.status.parts import Part, merge
from proxy.store import store
from proxy.throttling.flows import Throttle
from proxy.throttling.manager import Manager

EXIT_OK, EXIT_FORCED, EXIT_CANNOT_LISTEN = 0, 1, 69

#: Descriptors that are not for connections: listeners, log, epoll, pipes of the relay (64), files read at a reload.
_OTHER_DESCRIPTORS = 160
#: So many that the garbage collector should not look at them again and again.
_MANY_THROTTLES = 1_000
#: Reads the configuration anew, breathing in the middle; borrows descriptors for the files. Raises ConfigError.
Load = Callable[[Breathe, Callable[[], AbstractContextManager[None]]], Loaded]


def run(load: Load, loaded: Loaded, predecessor: Predecessor | None = None) -> int:
    """Serve until a signal ends it.

    Args:
        load: for SIGHUP.
        loaded: what to start with.
        predecessor: a running process that this one is to replace.

    Returns:
        The exit code: 0 clean stop, 1 a second signal ended the drain, 69 cannot listen.
    """
    outputs.setup(loaded.settings)
    outputs.share(loaded.settings.workers != 1)
    try:
        return Server(load, loaded, predecessor).run()
    finally:
        outputs.flush(1.0)


class Server:
    """The program's one instance; lives in the hub's thread."""

    def __init__(self, load: Load, loaded: Loaded, predecessor: Predecessor | None = None) -> None:
        settings = loaded.settings
        self._load = load
        self._first = loaded
        self._predecessor = predecessor
        self._descriptors = process.raise_descriptor_limit()
        self._reserve = process.Reserve()
        self._stops = 0
        self._stop = Event()
        self._begun = Event()  # the first settings are in force
        self._settled = Event()  # no reload is going on
        self._settled.set()
        self._reloading = Semaphore()
        self._reload_failure: ReloadFailure | None = None
        self._in_force: InForce
        self._zone: tzinfo = UTC  # whose calendar days count
        self._wiring = Wiring(settings, self._reserve.lent, partial(self._office, settings))
        self._admission = self._wiring.admission
        self._store: store.Store | None = None
        self._leases = Leases(self._admission)
        self._vitals = Vitals(0, self._reserve.lent)
        self._here = Here(lambda: self.services, self._part)
        self._everywhere = Everywhere(self._here, lambda: self._workers.colleagues)
        self._make_doors(count_of(settings))
        self._make_views()
        self._make_signals()

    def _make_doors(self, workers: int) -> None:
        """Where clients come in, and who serves them."""
        self._inherited = systemd.Inherited(os.environ, os.getpid())
        self._reception = Reception(
            services=lambda: self._wiring.services,
            open_connections=lambda: self._doors.open_connections(),
            serve_status=lambda *connection: self._status.admit(*connection),
            ask=lambda count: self._workers.seating.want(0, count),
        )
        self._doors = Doors(
            self._reception.admit,
            self._reception.accept_failed,
            self._reserve.lent,
            self._predecessor or self._inherited,
            workers,
        )
        self._workers = Workers(
            workers,
            self._wiring.incarnation,
            self._branches,
            self._doors.kept,
            self._everywhere.standing_orders,
            self._reception,
            self._wiring.budget,
        )

    def _make_views(self) -> None:
        """Where the program is looked at and steered from."""
        self._status = self._status_door()
        self._steering = Steering(
            lambda: self.services,
            self._everywhere,
            self._status,
            self._doors.listening,
            self._reload,
            self._stop.set,
            self._reserve.lent,
        )
        predecessor = self._predecessor
        self._control = ControlSocket(
            self._steering, self._reserve.lent, predecessor.control if predecessor is not None else lambda path: None
        )

    def _make_signals(self) -> None:
        """What others tell the process, and what it does by itself."""
        self._notifier = systemd.Notifier(os.environ, os.getpid())
        self._routine = Routine(lambda: self.services, self.snapshot, self._turn_day, self._status.tick, self._notifier)
        answering = Answering(Household(self._here, lambda: self._workers.colleagues))
        self._replacement = Replacement(self._wiring, self._switch, answering, self._total)
        stop = self._stop_soon
        self._signals = Signals(
            at_once={signal.SIGTERM: stop, signal.SIGINT: stop},
            in_turn={signal.SIGHUP: self._reload, signal.SIGUSR1: self._report, signal.SIGUSR2: self._upgrade},
        )

    def _office(self, settings: Settings, parts: Wiring) -> tuple[Office, Admission]:
        cluster = make_cluster(settings, socket.gethostname())
        manager = Manager(parts.incarnation, clock_ns(), settings.throttle_enforce, parts.limits, cluster)
        admission = Admission(manager, self._make_way)
        self._switch = Switch(admission)
        self._branches = Branches(self._switch)
        return self._switch, admission

    def _make_way(self, throttle: Throttle, count: int) -> bool:
        """Of the cached connections of native channels one, or some of the workers'."""
        if self._wiring.keeper.make_way(throttle, count):
            return True
        self._branches.make_way(throttle, count)
        return False

    @property
    def services(self) -> Services:
        """Those in force."""
        return self._wiring.services

    # ---------------------------------------------------------------- life

    def run(self) -> int:
        """Start, serve, drain; the exit code."""
        process.forbid_core_dumps()
        log.note(log.Event.START, log.INFO, f"greenarrow_proxy {__version__} starts", pid=os.getpid())
        self._signals.watch()
        with self._reloading:
            try:
                self._begin()
            except ListenError as error:
                log.note(log.Event.LISTEN, log.ERROR, str(error))
                self._workers.kill()
                return EXIT_CANNOT_LISTEN
            except ConfigError:
                self._workers.kill()
                raise
        self._begun.set()
        _tell_doubts(self._first, hold_breath)
        self._wiring.watch_addresses()
        process.log_what_the_hub_catches(self._wiring.counters)
        TurnMeter(SPANS.turn)
        self._routine.begin()
        gevent.spawn(self._wiring.keeper.run)
        process.load_codecs()
        collector = process.Collector(lambda: len(self._admission.manager.throttles) >= _MANY_THROTTLES)
        collector.begin()
        gevent.spawn(collector.steps_forever)
        if self._predecessor is None:
            self._notifier.ready("serving")
        else:
            self._notifier.succeeded(os.getpid(), "serving")
        self._stop.wait()
        return self._drain()

    def _begin(self) -> None:
        """Put the first settings in force, and take over from whoever is to be replaced.

        Raises:
            ConfigError, ListenError: we cannot serve; nobody was let in.
        """
        predecessor, settings, above = self._predecessor, self._first.settings, 0
        if predecessor is not None:
            predecessor.greet()
            hello = predecessor.hello
            log.note(log.Event.UPGRADE, log.INFO, "taking over from a running process", pid=hello.pid)
            self._wiring.incarnation, above = hello.incarnation, hello.highest
            self._wiring.certificates.use_generated(hello.identity)
        workers = count_of(settings)
        numbers.count_as(0, step_for(workers), above)
        prepared = self._prepare(self._first, hold_breath)
        self._workers.start(self._plan(settings, prepared.own), prepared.opened, above)
        if predecessor is not None:
            predecessor.take_over(self._admission.manager)
        self._take(prepared, hold_breath)
        self._workers.serve()
        if predecessor is not None:
            hello = predecessor.hello
            predecessor.settle = self._admission.settle
            predecessor.heard = self._workers.adopt(predecessor.link, hello.pid, hello.version, predecessor.held)
            predecessor.close_unclaimed()
            predecessor.taken()
        close_unclaimed(self._inherited)

    def _prepare(self, loaded: Loaded, breathe: Breathe) -> _Prepared:
        """Everything about new settings that can fail, or takes a while.

        Raises:
            ConfigError: the certificate is of no use. ListenError: an address cannot be had. Nothing has changed then.
        """
        settings = loaded.settings
        store_tls = self._wiring.certificates.of_store(loaded)
        control = self._control.prepare(settings)
        opened: Opened = {}
        try:
            opened = self._doors.open_missing(settings, breathe)
            own = list(self._doors.endpoints(settings, opened))
            wired = self._wiring.prepare(loaded, own, breathe)
            if hasattr(self._wiring, "services"):
                self._workers.prepare(self._plan(settings, own), opened)
        except BaseException:
            self._workers.abort()
            close_all(opened)
            control.close()
            raise
        wanted = store.of_settings(self._wiring.engine, settings.throttle_store, store_tls, clock_ns, self._store)
        digested = digest(loaded.in_force, breathe)
        return _Prepared(wired, opened, own, control, loaded.in_force, digested, wanted)

    def _plan(self, settings: Settings, own: Iterable[Endpoint] | None = None) -> Plan:
        """What the workers need of settings; `own`: where the program listens, if that is new."""
        if own is None:
            own = [door.endpoint for door in self._doors.listening()]
        clients = 0 if settings.max_connections else self._descriptors_left() // 2
        return Plan(settings, tuple(own), clients, self._wiring.certificates.generated())

    def _most_clients(self) -> int:
        """`max_connections` in force, or what the descriptors of all processes together allow."""
        own = self._reception.limit
        return own if self.services.settings.max_connections else own * max(1, len(self._workers))

    def _descriptors_left(self) -> int:
        return max(2, self._descriptors - _OTHER_DESCRIPTORS)

    def _status_door(self) -> StatusDoor:
        return StatusDoor(
            House(
                services=lambda: self.services,
                part=self._part,
                total=self._total,
                others=self._everywhere.parts,
                members=lambda: self._workers.colleagues.members(),
                manager=lambda: figures.manager_of(self.services),
                limit=self._most_clients,
                draining=self._stop.is_set,
                in_force=lambda: self._in_force,
                reload_failure=lambda: self._reload_failure,
                spare=self._reserve.lent,
                book=self._wiring.book,
                store=self._leases.figures,
            )
        )

    def _take(self, prepared: _Prepared, breathe: Breathe) -> None:
        """Put new settings in force. Nothing here can fail."""
        settings = prepared.wired.services.settings
        self._wiring.take(prepared.wired, breathe)
        self._take_store(prepared.store, settings)
        self._control.take(settings, prepared.control)
        self._steering.in_force, self._steering.limits = prepared.in_force, prepared.wired.limits
        self._in_force = InForce(prepared.digest, datetime.now(UTC))
        self._doors.take(settings, prepared.opened, breathe)
        self._workers.commit(self._plan(settings))
        self._zone = calendar.zone(settings.timezone)
        self._turn_day()
        self._admission.manager.reload(settings.throttle_enforce, self._wiring.limits, clock_ns())
        self._admission.settle()
        for session in list(self._wiring.instances.sessions):
            session.reloaded()
        self._wiring.tell_dialogues()
        limit = settings.max_connections or self._descriptors_left() // 2
        self._reception.set_limit(limit, shared=bool(settings.max_connections and self._workers))
        self._workers.committed()

    def _take_store(self, wanted: store.Store | None, settings: Settings) -> None:
        """It connects, and goes on trying, by itself; nobody waits for it."""
        if wanted is not self._store:
            if self._store is not None:
                self._store.stop()
            if wanted is not None:
                wanted.start()
            self._store = wanted
        self._leases.use(wanted, settings)

    def _report(self) -> None:
        """SIGUSR1: with what the workers know now; during the start, when there is something to know."""
        self._begun.wait()
        self._everywhere.parts()
        self._routine.report()

    # ---------------------------------------------------------------- reload

    def _reload(self) -> list[str]:
        """Read the configuration anew, in turns with all else; on any error the old one is in force, whole.

        Returns:
            Every mistake; none: the new one is in force.
        """
        with self._reloading:
            if self._stop.is_set():
                return ["the proxy is stopping"]
            self._settled.clear()
            self._notifier.reloading()
            try:
                mistakes = self._reload_now()
            finally:
                self._settled.set()
            self._outcome(mistakes)
            return mistakes

    def _reload_now(self) -> list[str]:
        breathe = Breather("reload")
        # Else all of them are freed in one go, by whoever is the last.
        old = [*_values(self.services.settings), *self._steering.in_force]
        old_limits = self._wiring.limits
        try:
            with process.no_garbage_collection():
                loaded = self._load(breathe, self._reserve.lent)
                self._take(self._prepare(loaded, breathe), breathe)
                outputs.reconfigure(loaded.settings)
                _tell_doubts(loaded, breathe)
                old_limits.let_go(breathe)
                loaded.origins.let_go(breathe)
                let_go(old, breathe)
        except (ConfigError, ListenError) as error:
            return str(error).splitlines()
        except MemoryError:
            return ["there is no memory for a new configuration"]
        file = loaded.settings.config_filename or "-"
        log.note(log.Event.RELOAD, log.INFO, "the new configuration is in force", file=file)
        return []

    def _outcome(self, mistakes: list[str]) -> None:
        """Count, log and remember how a reload ended; systemd is told as well."""
        figures, now = self._wiring.counters, monotonic()
        if not mistakes:
            figures.reloads += 1
            self._reload_failure = None
            self._notifier.ready("serving")
            return
        figures.reloads_failed += 1
        for line in (*mistakes, "the old configuration is still in force"):
            log.note(log.Event.RELOAD_FAILED, log.ERROR, line)
        since = self._reload_failure.since if self._reload_failure is not None else now
        self._reload_failure = ReloadFailure(since, mistakes[0])
        self._notifier.ready(f"serving with an old configuration: {mistakes[0]}")

    # ---------------------------------------------------------------- a new program

    def _upgrade(self) -> None:
        """SIGUSR2: a new process of this program takes over; on any error nothing has happened."""
        with self._reloading:
            if self._stop.is_set() or not self._replacement.run(self._handed()):
                return
            self._routine.end()
            self._notifier.close()
            self._control.close(forget=False)
            self._stop.set()

    def _handed(self) -> list[tuple[Handed, int]]:
        """All listening sockets, and what they are."""
        doors = [
            (Handed("door", endpoint.host, endpoint.port, index), sock.fileno())
            for endpoint, index, sock in self._doors.sockets()
        ]
        return doors + self._control.handed()

    # ---------------------------------------------------------------- the end

    def _stop_soon(self) -> None:
        """SIGTERM or SIGINT: the first one drains, a second one ends at once."""
        self._stops += 1
        if self._stops > 1:
            log.note(
                log.Event.STOP,
                log.WARNING,
                "second signal: ending at once",
                open_connections=self._doors.open_connections() + self._workers.open_connections(now=False),
            )
            outputs.flush(1.0)
            self._workers.abandon()
            os._exit(EXIT_FORCED)
        if self._replacement.done:
            self._replacement.hurry = monotonic() + self.services.settings.drain_timeout
        self._stop.set()

    def _drain(self) -> int:
        """Let what is open finish, then stop what is the program's own."""
        self._settled.wait()  # a reload that is just putting new doors in force: they would be left open
        settings, replacement = self.services.settings, self._replacement
        timeout = settings.upgrade_timeout if replacement.done else settings.drain_timeout
        cut = drain(
            self.services,
            self._doors,
            self._notifier,
            timeout,
            self._workers,
            replacement.done,
            lambda: replacement.hurry,
            replacement.ours,
        )
        rest()
        self.close()
        log.note(log.Event.STOP, log.INFO, "stopped", reset_connections=cut)
        self._replacement.say_last()
        return EXIT_OK

    def close(self) -> None:
        """Stop what goes on without any connection: doors, look-ups, the control socket, the timer of throttles."""
        self._doors.close()
        self._wiring.look_ups.stop()
        self._leases.stop()
        if self._store is not None:
            self._store.stop()
        self._admission.stop()
        self._control.close()
        self._reserve.close()

    # ---------------------------------------------------------------- its state

    def snapshot(self) -> Snapshot:
        """The figures of this moment."""
        return figures.snapshot(self._total(), figures.manager_of(self.services))

    def _part(self) -> Part:
        """What this process knows."""
        return figures.part_of(self.services, self._doors, self._vitals)

    def _total(self) -> Part:
        """What all processes know, by their last word."""
        return merge([self._part(), *self._workers.colleagues.parts()])

    def _turn_day(self) -> None:
        self._admission.turn_day(calendar.day_in(self._zone))


class _Prepared(NamedTuple):
    """New settings with what they need, had but not yet used."""

    wired: wiring.Prepared
    opened: Opened
    own: Sequence[Endpoint]
    control: control_socket.Prepared
    in_force: Sequence[Row]
    digest: str
    store: store.Store | None


def _values(settings: Settings) -> list[object]:
    """What is in all lists of the settings."""
    lists = [value for field in fields(settings) if isinstance(value := getattr(settings, field.name), tuple)]
    return [value for values in lists for value in values]


def _tell_doubts(loaded: Loaded, breathe: Breathe) -> None:
    """What `--check-config` would warn of."""
    doubts = check_config.doubts(loaded, breathe=breathe)
    for line in findings.sentences(doubts, loaded.origins, marked=False, breathe=breathe):
        breathe()
        log.note(log.Event.CONFIG, log.WARNING, line)
