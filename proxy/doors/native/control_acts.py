"""What an instance says in its session, as calls of the throttle manager; one message after another.

A message may hold thousands of records: each is counted against the session's turn, and others run in between. When
the session ends meanwhile, `count` raises that. Frames, queues and waiting are `control`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any, TypeVar

from proxy.doors.native import control_frames
from proxy.doors.native.control_frames import MAX_CACHED
from proxy.doors.native.receiver_names import names_of
from proxy.egress.clock import clock_ns
from proxy.errors import Refused
from proxy.policy.turns import RECORD
from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from proxy.services import Services
from proxy.throttling.session import Session
from proxy.throttling.throttle import Key

Record = TypeVar("Record")


class SessionOver(Exception):
    """The session's connection is to be closed; there is nothing to say to it."""


def _nobody(what: object) -> None:
    """Sends and counts for a session that is over."""


class Acts:
    """Acts upon the messages of one session. What follows from it is carried out by `Admission.settle`, the caller's.

    Args:
        current: gives the services of the moment.
        queue: sends frames. count: counts work; see `Control`.
    """

    def __init__(
        self,
        current: Callable[[], Services],
        instance: str,
        session: Session,
        queue: Callable[[Sequence[bytes]], None],
        count: Callable[[int], None],
    ) -> None:
        self._current = current
        self._incarnation = current().incarnation
        self._instance = instance
        self._session = session
        self._manager = current().admission.manager
        self._queue = queue
        self._count = count

    def over(self) -> None:
        """The session has ended: it is not referred to any more, and is freed without the garbage collector."""
        self._queue = self._count = _nobody

    def act(self, message: Any) -> None:
        """One message of the client.

        Raises:
            SessionOver: it said BYE.
        """
        session, manager = self._session, self._manager
        if message.incarnation != self._incarnation:
            return  # of a proxy that is no more
        now = clock_ns()
        if isinstance(message, s.Demand):
            self._demand(message.records, now)
        elif isinstance(message, s.Ping):
            manager.ping(session, message.t, now)
        elif isinstance(message, s.Pong):
            manager.pong(session, message.t, message.hold_us, now)
        elif isinstance(message, s.Return):
            for run in self._slowly(message.records):
                manager.give_back(session, run.id, run.first, run.n, clock_ns())
        elif isinstance(message, s.Outcome):
            for tally in self._slowly(message.records):
                manager.outcome(session, tally.id, tally.ok, tally.deferred, tally.failed, tally.backoff, clock_ns())
        elif isinstance(message, s.Reg):
            self._register(message.paths)
        elif isinstance(message, s.List):
            self._queue([native.encode(self._cached(message.source_ip))])
        elif isinstance(message, s.Bye):
            manager.bye(session, now)
            raise SessionOver

    def _demand(self, records: list[s.Want], now: int) -> None:
        """Nearly all that is ever said, and nearly always it is one record."""
        demand, session, others = self._manager.demand, self._session, False
        for want in records:
            if others:
                self._count(RECORD)
                now = clock_ns()
            others = True
            demand(session, want.id, want.want, want.got_cum, want.ram, want.bounce, want.disk, now, want.lapsed_cum)

    def _slowly(self, records: Sequence[Record]) -> Iterator[Record]:
        """The records; the turn may end after each."""
        for record in records:
            yield record
            self._count(RECORD)

    def _register(self, paths: list[s.Path]) -> None:
        """Bind the paths, or say why not with LIMITs that have no throttles."""
        refused: dict[int, str] = {}
        for path in self._slowly(paths):
            try:
                source = self._source_of(path)
                parts = [(Key(source, each.name), control_frames.part_of(each)) for each in path.throttles]
                self._manager.register(self._session, path.id, parts, clock_ns(), names_of(path))
            except (ValueError, Refused) as error:
                refused[path.id] = str(error)
        if refused:
            self._queue(control_frames.refusals(refused, self._current().incarnation))

    def _source_of(self, path: s.Path) -> str:
        """What the path's throttles count by: an address, or the name of a source of several.

        Raises:
            SourceNotAllowed: the instance may not leave from there, or the name is not known.
        """
        access = self._current().access
        if path.source is not None:
            return access.source_of_path(self._instance, path.source)
        assert path.source_ip is not None, "one of both, see `session_messages.Path`"
        access.check_source(self._instance, path.source_ip)
        return path.source_ip

    def recheck_sources(self) -> None:
        """After a reload: paths of a source address that the instance may not use any more are unbound, and it is told.
        Else they would go on having their part of all slots, for connections that are refused."""
        verdicts: dict[str, str] = {}
        refused: dict[int, str] = {}
        for id, flow in self._slowly(list(self._session.flows.items())):
            source = flow.path.throttles[0].key.source
            if source not in verdicts:
                verdicts[source] = self._why_not(source)
            if verdicts[source]:
                self._manager.unregister(self._session, id, clock_ns())
                refused[id] = verdicts[source]
        if refused:
            self._queue(control_frames.refusals(refused, self._current().incarnation))

    def _why_not(self, source: str) -> str:
        try:
            self._current().access.check_source_of_path(self._instance, source)
        except Refused as error:
            return str(error)
        return ""

    def _cached(self, source_ip: str | None) -> s.Cached:
        """Idle connections that the instance could take over now."""
        services = self._current()
        entries = []
        for listed in services.keeper.pool.listing(monotonic()):
            key = listed.key
            if key.tenant or (source_ip is not None and key.source != source_ip):
                continue
            if self._why_not(key.source):
                continue
            address = m.Address(*key.destination)
            entries.append(s.CachedEntry(key.source, address, key.ehlo_name, key.tls, listed.cached))
        return s.Cached(services.incarnation, entries[:MAX_CACHED], len(entries) > MAX_CACHED)
