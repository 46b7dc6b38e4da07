"""One instance's session: frames in, calls to the throttle manager; what the manager has to say, frames out.

The greenlet reads; the manager's words are written by whoever made it speak, without waiting. What the kernel does not
take is queued, at most 16 frames; beyond that the records stay parked in the session, and it gets no permits. A session
also hands out the key with which its channels authenticate in one flight, and announces the certificates they may show.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any

import gevent
from gevent import get_hub, getcurrent

from proxy import __version__, log, native
from proxy import native_messages as m
from proxy import native_session as s
from proxy.admission import Admission, Client, clock_ns
from proxy.conversation import farewell, send_all
from proxy.errors import NameInUse, ProxyError, Refused
from proxy.limits import BackoffRule, Mode, Part
from proxy.native_auth import ChannelKey
from proxy.native_door import Guest, check_still_welcome
from proxy.services import Door, Services
from proxy.session import End, LimitRecord, Output, Session
from proxy.stats import Backlog, Flow, SessionFigures
from proxy.throttle import SECOND, Key, Limit

_READ_SIZE = 65536
#: Frames in a queue; the figure in the status lines.
QUEUE = 16
#: Seconds of work after which others get their turn.
_TURN = 0.005
_MAX_RECORDS = 4096
_MAX_LIMITS = 512
_MAX_CACHED = 256


class SessionOver(Exception):
    """The session's connection is to be closed; there is nothing to say to it."""


class Control(Client):
    """One session.

    Args:
        current: gives the services of the moment.
    """

    def __init__(self, current: Callable[[], Services], door: Door, guest: Guest) -> None:
        assert guest.handshake.peer is not None
        self._current = current
        self._door = door
        self._guest = guest
        self._peer = guest.handshake.peer
        self._stream = guest.stream
        self._decoder = guest.handshake.decoder
        self._engine = current().engine
        self._admission: Admission = current().admission
        self._session: Session | None = None
        self._incoming: deque[native.Frame] = deque()
        self._outgoing: deque[bytes] = deque()
        self._congested = False
        self._leaving = False
        self._doom: ProxyError | SessionOver | None = None
        self._key_id = b""
        self._greenlet: Any = None
        self._waiting = False

    @property
    def instance(self) -> str:
        return self._peer.instance

    @property
    def run_id(self) -> bytes:
        return self._peer.run_id

    # ---------------------------------------------------------------- the whole life

    def serve(self) -> None:
        """Serve until the session ends. Closes nothing; never raises."""
        services = self._current()
        self._greenlet = getcurrent()
        host = self._guest.client.host
        try:
            self._begin(services)
            services.instances.hosts[host] += 1
            services.instances.sessions[self] = None
            try:
                self._listen()
            finally:
                del services.instances.sessions[self]
                services.instances.hosts[host] -= 1
                if not services.instances.hosts[host]:
                    del services.instances.hosts[host]
        except ProxyError as error:
            services.counters.refused.count(error.code)
            self._log(log.WARNING, f"session ends: {error}", reason=error.code)
            farewell(self._engine, self._stream, native.error_frame(error))
        except (SessionOver, OSError):
            pass
        finally:
            self._end(services)

    def _begin(self, services: Services) -> None:
        """WELCOME and CERT; then the manager knows the session.

        Raises:
            NameInUse: this run was replaced by another one. OSError: the client is gone.
        """
        instances, peer = services.instances, self._peer
        fenced = instances.fences.claim(peer.instance, peer.run_id, self._guest.client.host)
        key = b""
        if services.identity is not None:
            self._key_id, key = os.urandom(8), os.urandom(32)
            instances.channel_keys[self._key_id] = ChannelKey(
                peer.instance, peer.run_id, peer.version, key, peer.secret
            )
        keeps = services.settings.reuse_connections
        welcome = self._guest.handshake.welcome(
            services.incarnation,
            key_id=self._key_id,
            key=key,
            reuse_max_idle_ms=int(services.settings.reuse_connections_max_idle * 1000) if keeps else 0,
            software=f"greenarrow_proxy {__version__}",
        )
        send_all(self._engine, self._stream, welcome + self._certificates(services))
        if fenced is not None:
            self._fence(services, fenced)
        weight = services.access.weight_of(peer.instance)
        host = self._guest.client.host
        self._session = self._admission.manager.hello(peer.instance, peer.run_id, host, weight, clock_ns())
        self._admission.clients[self._session] = self
        self._admission.settle()
        self._log(log.INFO, "session begins", tls="yes" if services.identity else "no")

    def _fence(self, services: Services, run_id: bytes) -> None:
        """A new run has the name: the old one's channels finish what runs on them."""
        for channel in list(services.instances.channels):
            if channel.instance == self.instance and channel.run_id == run_id:
                channel.goaway(0.0, f"name in use by {self._guest.client.host}")

    def _listen(self) -> None:
        """Read frames and act on them.

        Raises:
            ProxyError: the client broke the protocol, or is no longer welcome. SessionOver, OSError.
        """
        turn_ends = monotonic() + _TURN
        while True:
            if self._doom is not None:
                raise self._doom
            self._flush()
            while self._incoming:
                self._act(native.decode(self._incoming.popleft(), native.SESSION_FROM_CLIENT))
                if monotonic() >= turn_ends:
                    gevent.sleep(0)
                    turn_ends = monotonic() + _TURN
            while len(self._incoming) < QUEUE and (frame := self._decoder.next_frame()) is not None:
                self._incoming.append((frame[0], bytes(frame[1])))
            if self._incoming:
                continue
            try:
                data = self._stream.recv(_READ_SIZE)
            except BlockingIOError:
                self._wait()
                turn_ends = monotonic() + _TURN
                continue
            if not data:
                raise SessionOver
            self._decoder.receive(data)

    def _end(self, services: Services) -> None:
        """Whatever the reason: its key is void, its permits are not given out again."""
        self._greenlet = None
        services.instances.channel_keys.pop(self._key_id, None)
        session = self._session
        if session is not None:
            self._admission.clients.pop(session, None)
            if session.end is None:
                self._admission.manager.lost(session, clock_ns())
            self._admission.settle()
            self._log(log.INFO, "session is over", reason=session.end or End.LOST)

    # ---------------------------------------------------------------- what others tell it

    def goaway(self, seconds: float, reason: str) -> None:
        """See `services.Hosted`: no more permits from now on."""
        if self._session is not None and self._session.end is None:
            self._leaving = self._congested = True
            self._admission.manager.congest(self._session, True, clock_ns())
            self._queue([native.encode(m.Goaway(int(seconds * 1000), reason))])

    def cut(self, error: ProxyError | None = None) -> None:
        """Close the connection, with a reason or without a word; must not wait."""
        if self._doom is None:
            self._doom = error or SessionOver()
            self._wake()

    def reloaded(self) -> None:
        """New settings: is the instance still welcome, and which certificates may its channels show now?"""
        services = self._current()
        try:
            check_still_welcome(services.access, self._peer, self._guest.client.host)
        except Refused as error:
            self.cut(error)
            return
        if (announcement := self._certificates(services)) and self._session is not None:
            self._queue([announcement])

    def figures(self) -> SessionFigures | None:
        """For the status lines; None before the session has begun."""
        session = self._session
        if session is None:
            return None
        now = session.figures(clock_ns())
        parked = len(session.runs) + len(session.limits) + len(session.caps)
        return SessionFigures(
            name=now.name,
            connected=now.connected,
            ping=now.ping,
            ping_age=now.ping_age,
            backlog=Backlog(now.ram, now.bounce, now.disk),
            forward=Flow(entering=len(self._incoming)),
            back=Flow(leaving=len(self._outgoing), parked=parked),
        )

    # ---------------------------------------------------------------- frames in

    def _act(self, message: Any) -> None:
        """One message of the client.

        Raises:
            SessionOver: it said BYE.
        """
        session, manager = self._session, self._admission.manager
        assert session is not None
        if message.incarnation != self._current().incarnation:
            return  # of a proxy that is no more
        now = clock_ns()
        if isinstance(message, s.Ping):
            manager.ping(session, message.t, now)
        elif isinstance(message, s.Pong):
            manager.pong(session, message.t, message.hold_us, now)
        elif isinstance(message, s.Demand):
            for want in message.records:
                manager.demand(session, want.id, want.want, want.got_cum, want.ram, want.bounce, want.disk, now)
        elif isinstance(message, s.Return):
            for run in message.records:
                manager.give_back(session, run.id, run.first, run.n, now)
        elif isinstance(message, s.Outcome):
            for tally in message.records:
                manager.outcome(session, tally.id, tally.ok, tally.deferred, tally.failed, tally.backoff, now)
        elif isinstance(message, s.Reg):
            for path in message.paths:
                self._register(session, path, now)
        elif isinstance(message, s.List):
            self._queue([native.encode(self._cached(message.source_ip))])
        elif isinstance(message, s.Bye):
            manager.bye(session, now)
            raise SessionOver
        self._admission.settle()

    def _register(self, session: Session, path: s.Path, now: int) -> None:
        """Bind a path, or say why not with a LIMIT that has no throttles."""
        try:
            self._current().access.check_source(self.instance, path.source_ip)
            parts = [(Key(path.source_ip, throttle.name), _part(throttle)) for throttle in path.throttles]
            self._admission.manager.register(session, path.id, parts, now)
        except (ValueError, Refused) as error:
            refusal = s.PathLimit(path.id, [], warning=str(error)[:512])
            self._queue([native.encode(s.Limit(self._current().incarnation, [refusal]))])

    def _cached(self, source_ip: str | None) -> s.Cached:
        """Idle connections that the instance could take over now."""
        services = self._current()
        entries = []
        for listed in services.keeper.pool.listing(monotonic()):
            key = listed.key
            if key.tenant or (source_ip is not None and key.source != source_ip):
                continue
            try:
                services.access.check_source(self.instance, key.source)
            except Refused:
                continue
            address = m.Address(*key.destination)
            entries.append(s.CachedEntry(key.source, address, key.ehlo_name, key.tls, listed.cached))
        return s.Cached(services.incarnation, entries[:_MAX_CACHED], len(entries) > _MAX_CACHED)

    # ---------------------------------------------------------------- frames out

    def deliver(self) -> None:
        """See `admission.Client`. With the queue full the records stay where they are."""
        session = self._session
        if session is None or session.end is not None or len(self._outgoing) >= QUEUE:
            return
        output = self._admission.manager.take(session, clock_ns())
        self._queue(_frames(output, self._current().incarnation))

    def ended(self, reason: End) -> None:
        """See `admission.Client`."""
        if reason is End.FENCED:
            self.cut(NameInUse("name in use by a newer run of this instance"))
        else:
            self.cut()

    def _certificates(self, services: Services) -> bytes:
        if services.identity is None:
            return b""
        return native.encode(s.Cert(services.incarnation, [services.identity.certificate]))

    def _queue(self, frames: Iterable[bytes]) -> None:
        self._outgoing.extend(frames)
        try:
            self._flush()
        except OSError:
            self.cut()

    def _flush(self) -> None:
        """Hand frames to the kernel; a queue that is full stops the permits, one that is empty again starts them.

        Raises:
            OSError: the connection is broken.
        """
        stream, outgoing = self._stream, self._outgoing
        try:
            while outgoing:
                frame = outgoing[0]
                sent = stream.send(frame)
                if sent < len(frame):
                    outgoing[0] = frame[sent:]
                else:
                    outgoing.popleft()
            stream.flush()
        except BlockingIOError:
            pass
        session = self._session
        if session is None or session.end is not None:
            return
        full = self._leaving or len(outgoing) >= QUEUE or (self._congested and bool(outgoing))
        if full != self._congested:
            self._congested = full
            self._admission.manager.congest(session, full, clock_ns())
            if not full:
                self.deliver()

    # ---------------------------------------------------------------- small things

    def _wait(self) -> None:
        """Until the socket has an event, or somebody wakes us."""
        fd = self._stream.socket.fileno()
        self._engine.watch(fd, self._greenlet.switch)
        self._waiting = True
        try:
            get_hub().switch()
        finally:
            self._waiting = False
            self._engine.watch(fd, None)

    def _wake(self) -> None:
        if self._waiting:
            get_hub().loop.run_callback(self._greenlet.switch)

    def _log(self, level: int, message: str, **fields: object) -> None:
        log.note(log.Event.SESSION, level, message, instance=self.instance, client=self._guest.client, **fields)


def _part(throttle: s.Throttle) -> Part:
    """What an instance says of a throttle, as the manager takes it.

    Raises:
        ValueError: two rates for one length of window.
    """
    limits = [_limit(rate) for rate in throttle.rates if rate.amount]
    if len({limit.seconds for limit in limits}) < len(limits):
        raise ValueError(f"throttle {throttle.name}: two rates for one length of window")
    rule = None
    if throttle.backoff is not None:
        slow = throttle.backoff
        rate = _limit(slow.rate) if slow.rate is not None and slow.rate.amount else None
        rule = BackoffRule(slow.percent, rate, slow.return_after_s * SECOND, slow.threshold)
    mode = Mode.SUM if throttle.mode is s.Mode.SUM else Mode.AVERAGE
    return Part(tuple(limits), throttle.max_connections, mode, throttle.paused, rule)


def _limit(rate: s.Rate) -> Limit:
    return Limit(rate.amount, rate.seconds, rate.burst or 1)


def _frames(output: Output, incarnation: int) -> list[bytes]:
    """The frames for what a session is to be sent, pongs first; lists are split at what a frame may hold."""
    frames = [native.encode(s.Pong(incarnation, pong.t, pong.hold_us)) for pong in output.pongs]
    if output.ping is not None:
        frames.append(native.encode(s.Ping(incarnation, output.ping)))
    for at in range(0, len(output.limits), _MAX_LIMITS):
        limits = [_path_limit(record) for record in output.limits[at : at + _MAX_LIMITS]]
        frames.append(native.encode(s.Limit(incarnation, limits)))
    for at in range(0, len(output.grants), _MAX_RECORDS):
        grants = [s.SlotGrant(*grant) for grant in output.grants[at : at + _MAX_RECORDS]]
        frames.append(native.encode(s.Grant(incarnation, output.ping_t, output.hold_us, grants)))
    for at in range(0, len(output.caps), _MAX_RECORDS):
        caps = [s.Share(*cap) for cap in output.caps[at : at + _MAX_RECORDS]]
        frames.append(native.encode(s.Cap(incarnation, caps)))
    return frames


def _path_limit(record: LimitRecord) -> s.PathLimit:
    throttles = [
        s.Effective([s.Rate(limit.amount, limit.seconds, limit.burst) for limit in effective.limits], effective.places)
        for effective in record.throttles
    ]
    return s.PathLimit(record.id, throttles, record.slack_us, record.backoff_ms, record.paused, record.warning)
