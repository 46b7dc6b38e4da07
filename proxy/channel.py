"""A native channel: one SMTP session after another on one authenticated connection.

One greenlet serves a channel, top to bottom: wait for OPEN, connect (trying the destinations in order), answer OPENED
or FAILED, carry bytes both ways until END, answer ENDED, and again. It has a greenlet of its own, unlike a raw relay:
its frames and its TLS need the CPU anyway, and the TLS state outweighs the greenlet. The rules of the relay hold here
too: try, then wait; what is held back on one side stops reading on the other; an edge is only a hint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import gevent
from gevent import Timeout, get_hub, getcurrent

from proxy import log, native, upstream
from proxy import native_messages as m
from proxy.admission import clock_ns
from proxy.conversation import farewell, send_all
from proxy.errors import Draining, PeerError, ProxyError, Refused, Step, UnknownPath, UpstreamError
from proxy.flows import Flow
from proxy.model import Discard, Ending, Endpoint
from proxy.native_door import Guest
from proxy.places import Places
from proxy.pool import PoolKey
from proxy.receiver import Receiver, Wish, open_receiver
from proxy.relay import GONE
from proxy.services import Door, Services, numbers
from proxy.smtp import try_next_destination
from proxy.smtp_tracker import Tracker

_READ_SIZE = 65536
#: Reads of one side before the other gets its turn, and turns without waiting before other connections get theirs.
_READS_A_TURN = 4
_TURNS_IN_A_ROW = 8
#: The longest that one of several destinations may take to connect; a single one may take `connect_timeout`.
_CONNECT_ONE_OF_MANY = 10.0
#: What the client gave before END is sent on for this long.
_FLUSH_SECONDS = 5.0


class ClientGone(Exception):
    """The client's end of the channel is closed or broken."""


@dataclass(slots=True, eq=False)
class _Session:
    """One SMTP session on a channel, from OPENED to ENDED."""

    number: int
    request: m.Open
    key: PoolKey
    receiver: Receiver
    reused: bool
    started: float
    services: Services
    tracker: Tracker | None
    up: int = 0
    down: int = 0
    held_up: bytes = b""  # for the receiver, not yet taken by the kernel
    finished: bool = False  # the client said EOF
    receiver_done: bool = False  # the receiver said FIN, or is broken
    broken: Ending | None = None
    end: m.End | None = None
    idle_since: float = field(default=0.0)


class Channel:
    """One channel.

    Args:
        current: gives the services of the moment; each OPEN uses them.
        door: the listener it came through.
        guest: the authenticated connection.
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
        self._held_down = b""  # for the client, not yet taken by the kernel
        self._session: _Session | None = None
        self._doom: Ending | None = None  # why the session in progress is to be cut off
        self._goaway: m.Goaway | None = None
        self._told_goaway = False
        self._greenlet: Any = None
        self._waiting = False
        self._moved = 0
        self._swept = (-1, 0.0)

    @property
    def instance(self) -> str:
        return self._peer.instance

    @property
    def run_id(self) -> bytes:
        return self._peer.run_id

    # ---------------------------------------------------------------- the whole life

    def serve(self) -> None:
        """Serve until the client closes, breaks the protocol, or is told to go away. Closes nothing; never raises."""
        services = self._current()
        self._greenlet = getcurrent()
        services.instances.channels[self] = None
        try:
            if not self._peer.one_flight:
                self._send(self._guest.handshake.welcome(services.incarnation))
            while (request := self._next_open()) is not None:
                self._serve_session(request)
        except ClientGone:
            pass
        except ProxyError as error:
            services.counters.refused.count(error.code)
            self._log_refused(next(numbers), error)
            farewell(self._engine, self._stream, native.error_frame(error))
        except OSError:
            pass
        finally:
            del services.instances.channels[self]
            self._greenlet = None

    def goaway(self, seconds: float, reason: str) -> None:
        """See `services.Hosted`."""
        if self._goaway is None:
            self._goaway = m.Goaway(int(seconds * 1000), reason)
            self._wake()

    def sweep(self, now: float) -> None:
        """See `services.Hosted`: byte progress, as the relay counts it."""
        moved, since = self._swept
        if moved != self._moved:
            self._swept = self._moved, now
        elif now - since >= self._current().settings.idle_timeout:
            self._doom = Ending.IDLE_TIMEOUT
            self._wake()

    def cut(self, ending: Ending) -> None:
        """End the session in progress, and the channel; must not wait."""
        self._doom = ending
        self._wake()

    # ---------------------------------------------------------------- between sessions

    def _next_open(self) -> m.Open | None:
        """Wait for an OPEN; None when the client closes in good order, or is to go.

        Raises:
            ProxyError: the client broke the protocol, or is no longer welcome. ClientGone.
        """
        while True:
            frame = self._decoder.next_frame()
            if frame is not None:
                message = native.decode(frame, native.CHANNEL_FROM_CLIENT)
                if not isinstance(message, m.Open):
                    raise PeerError(f"{type(message).__name__.upper()} without an SMTP session")
                self._check_welcome()
                return message
            if self._goaway is not None:
                self._tell_goaway()
                return None
            if self._doom is not None:
                return None
            try:
                data = self._stream.recv(_READ_SIZE)
            except BlockingIOError:
                self._wait(self._stream.socket.fileno())
                continue
            except OSError:
                raise ClientGone from None
            if not data:
                return None
            self._moved += len(data)
            self._decoder.receive(data)

    def _check_welcome(self) -> None:
        """A reload may have changed who is allowed."""
        access, instance = self._current().access, self._peer.instance
        host = self._guest.client.host
        if not access.client_allowed(host, "native") or not access.instance_allowed(instance, host):
            raise Refused("this instance or address is no longer allowed")
        self._current().instances.fences.check(instance, self._peer.run_id)
        if self._goaway is not None:
            raise Draining(self._goaway.reason or "going away")

    def _tell_goaway(self) -> None:
        if self._goaway is not None and not self._told_goaway:
            self._told_goaway = True
            self._send(native.encode(self._goaway))

    # ---------------------------------------------------------------- one session

    def _serve_session(self, request: m.Open) -> None:
        services = self._current()
        started, number = monotonic(), next(numbers)
        attempts: list[tuple[m.Address, UpstreamError]] = []
        try:
            receiver, key, reused = self._open(services, request, attempts)
        except ProxyError as error:
            if isinstance(error, UpstreamError):
                services.counters.failed.count(error.step)
            else:
                services.counters.refused.count(error.code)
            self._log_refused(number, error, request, started)
            self._send(native.encode(native.failed(error, attempts)))
            return
        tracked = request.ehlo_name is not None and (request.reuse or request.throttles)
        tracker = Tracker() if tracked else None
        session = _Session(number, request, key, receiver, reused, started, services, tracker)
        self._session = session
        ending, reset = Ending.CLIENT_RESET, True
        try:
            self._send(native.encode(_opened(session)))
            self._carry(session)
            ending, reset = self._finish(session)
        except PeerError:
            ending = Ending.PROTOCOL_ERROR
            raise
        finally:
            self._session = None
            self._over(session, ending, reset)

    def _open(
        self, services: Services, request: m.Open, attempts: list[tuple[m.Address, UpstreamError]]
    ) -> tuple[Receiver, PoolKey, bool]:
        """A connection to the first destination that works.

        Raises:
            ProxyError: refused, or all have failed: then it is what the last one tried failed with.
            ClientGone: nobody waits for the answer any more.
        """
        access, instance = services.access, self._peer.instance
        ends_at = monotonic() + request.deadline_ms / 1000
        flows = self._flows(services, request)
        socket = self._stream.socket
        routes = []
        for address in request.destinations:
            endpoint = address.endpoint
            source = upstream.source_for(access, instance, socket, request.source_ip, endpoint)
            access.check_route(instance, source, endpoint)
            routes.append((address, source, endpoint))
        self._engine.watch(socket.fileno(), self._client_event)
        try:
            for number, (address, source, endpoint) in enumerate(routes):
                try:
                    return self._open_one(services, request, flows, source, endpoint, ends_at, len(routes) - number)
                except UpstreamError as error:
                    attempts.append((address, error))
                    if not try_next_destination(error) or number == len(routes) - 1:
                        raise
            raise AssertionError("OPEN without a destination")
        finally:
            self._engine.watch(socket.fileno(), None)

    def _flows(self, services: Services, request: m.Open) -> tuple[Flow, ...]:
        """The paths that the OPEN names, as the manager knows them.

        Raises:
            UnknownPath: not registered by a live session of this run, or for another source address.
        """
        if not request.throttles:
            return ()
        manager = services.admission.manager
        session = manager.sessions.get(self.instance)
        if session is None or session.run != self.run_id:
            raise UnknownPath("there is no session of this run that could have registered a path")
        try:
            flows = manager.flows(session, request.throttles)
        except KeyError as error:
            raise UnknownPath(f"path {error.args[0]} is not registered") from None
        for flow in flows:
            source = flow.path.throttles[0].key.source
            if source != request.source_ip:
                raise UnknownPath(f"path {flow.id} is for source {source}")
        return flows

    def _open_one(
        self,
        services: Services,
        request: m.Open,
        flows: tuple[Flow, ...],
        source: str,
        destination: Endpoint,
        ends_at: float,
        left: int,
    ) -> tuple[Receiver, PoolKey, bool]:
        key = PoolKey(
            source,
            destination,
            request.ehlo_name or "",
            request.tls,
            request.tls_server_name or "",
            "verify" if request.tls_verify else "",
            request.smtputf8,
            request.requiretls,
            request.tenant or "",
        )
        admission, instance = services.admission, self.instance
        who = (
            instance or self._guest.client.host,
            services.access.weight_of(instance),
            source,
            destination.host,
            flows,
        )
        if request.reuse and (kept := services.keeper.take(key)) is not None:
            may, places = admission.swap(kept.place, *who)
            if may:
                kept.place = places
                services.gauges.outgoing += 1
                services.counters.reused += 1
                return kept, key, True
            services.keeper.part(kept, Discard.YIELDED)
        seconds = (ends_at - monotonic()) / left
        places = admission.enter(*who, seconds)
        seconds = (ends_at - monotonic()) / left
        if seconds <= 0:
            raise UpstreamError(f"connect {source} -> {destination}: no time left", Step.CONNECT, 110)
        longest = services.settings.connect_timeout if left == 1 else _CONNECT_ONE_OF_MANY
        wish = Wish(request.ehlo_name, request.tls, request.tls_server_name, request.tls_verify)
        services.gauges.outgoing += 1
        try:
            receiver = open_receiver(
                self._engine,
                wish,
                source,
                destination,
                (min(seconds, longest), seconds),
                services.settings.idle_timeout,
            )
        except BaseException:
            services.gauges.outgoing -= 1
            admission.leave(places)
            raise
        receiver.place = places
        services.counters.fresh += 1
        return receiver, key, False

    def _client_event(self, events: int) -> None:
        """While we connect: a client that is gone ends the wait. What else it sends is read afterwards."""
        if events & GONE:
            self._greenlet.throw(ClientGone())

    # ---------------------------------------------------------------- bytes

    def _carry(self, session: _Session) -> None:
        """Move bytes both ways until END.

        Raises:
            ClientGone, PeerError.
        """
        client, receiver = self._stream.socket.fileno(), session.receiver.stream.socket.fileno()
        turns = 0
        while session.end is None:
            moved = self._from_receiver(session)
            moved |= self._from_client(session)
            if self._goaway is not None:
                self._tell_goaway()
            if self._doom is not None:
                raise ClientGone
            if session.end is not None:
                return
            if not moved:
                turns = 0
                self._wait(client, receiver)
            else:
                turns += 1
                if turns % _TURNS_IN_A_ROW == 0:
                    gevent.sleep(0)

    def _from_client(self, session: _Session) -> bool:
        """Read frames and send their bytes on, as far as the receiver takes them."""
        if not self._push(session):
            return False
        moved = False
        for _ in range(_READS_A_TURN):
            while (frame := self._decoder.next_frame()) is not None:
                moved = True
                if frame[0] == native.DATA:
                    if not self._give(session, frame[1]):
                        return True
                elif self._control(session, frame):
                    return True
            try:
                data = self._stream.recv(_READ_SIZE)
            except BlockingIOError:
                return moved
            except OSError:
                raise ClientGone from None
            if not data:
                raise ClientGone
            self._moved += len(data)
            self._decoder.receive(data)
            moved = True
        return moved

    def _control(self, session: _Session, frame: native.Frame) -> bool:
        """A frame without payload bytes; whether it ends the session."""
        message = native.decode(frame, native.CHANNEL_FROM_CLIENT)
        if isinstance(message, m.End):
            session.end = message
            return True
        if isinstance(message, m.Eof) and not session.finished:
            session.finished = True
            if not session.receiver_done:
                try:
                    session.receiver.stream.finish()
                except OSError as error:
                    self._receiver_broke(session, error)
            return False
        raise PeerError(f"{type(message).__name__.upper()} in the middle of an SMTP session")

    def _give(self, session: _Session, piece: memoryview | bytes) -> bool:
        """Send the client's bytes to the receiver; False: some are held back."""
        if session.finished:
            raise PeerError("DATA after EOF")
        if session.broken is not None:
            return True  # the client does not know yet
        if session.tracker is not None:
            session.tracker.client_bytes(bytes(piece))
        session.up += len(piece)
        session.held_up = bytes(piece)
        return self._push(session)

    def _push(self, session: _Session) -> bool:
        """Hand what is held back to the receiver; whether nothing is left."""
        stream = session.receiver.stream
        if not session.held_up and not stream.unsent:
            return True
        try:
            while session.held_up:
                sent = stream.send(session.held_up)
                session.held_up = session.held_up[sent:]
                self._moved += sent
            stream.flush()
        except BlockingIOError:
            return False
        except OSError as error:
            self._receiver_broke(session, error)
            return True
        return not stream.unsent

    def _from_receiver(self, session: _Session) -> bool:
        """Read from the receiver and frame it, as far as the client takes it."""
        if not self._flush_down() or session.receiver_done:
            return False
        moved = False
        for _ in range(_READS_A_TURN):
            try:
                data = session.receiver.stream.recv(_READ_SIZE)
            except BlockingIOError:
                return moved
            except OSError as error:
                self._receiver_broke(session, error)
                return True
            moved = True
            if not data:
                session.receiver_done = True
                self._queue(native.encode(m.Eof()))
                return True
            if session.tracker is not None:
                session.tracker.server_bytes(data)
            session.down += len(data)
            self._moved += len(data)
            if not self._queue(native.encode_data(data)):
                return True
        return moved

    def _receiver_broke(self, session: _Session, error: OSError) -> None:
        """Tell the client at once; it answers with END."""
        if session.broken is not None:
            return
        session.broken = Ending.UPSTREAM_RESET
        session.receiver_done = True
        session.held_up = b""
        number = error.errno or 0
        text = os.strerror(number) if number else str(error)
        self._queue(native.encode(m.Aborted("upstream_failed", number, text[:200])))

    # ---------------------------------------------------------------- the end of a session

    def _finish(self, session: _Session) -> tuple[Ending, bool]:
        """Answer END: keep the connection for the next one, or close it; how it ended, and whether by a reset."""
        assert session.end is not None
        reason = self._why_not_kept(session, session.end)
        if reason is None:
            self._send(native.encode(m.Ended(True, "kept")))
            return Ending.KEPT, False
        if session.end.keep:
            session.services.keeper.decline(reason)
        if session.broken is None:
            self._flush_up(session)
        self._send(native.encode(m.Ended(False, reason)))
        if session.broken is not None:
            return session.broken, True
        return Ending.UPSTREAM_CLOSED if session.receiver_done else Ending.CLIENT_CLOSED, bool(session.held_up)

    def _why_not_kept(self, session: _Session, end: m.End) -> Discard | None:
        """Only what the tracker has found clean is kept, and only when the client says so."""
        if not end.keep or not session.request.reuse or session.tracker is None:
            return Discard.NOT_OFFERED
        if not self._current().settings.reuse_connections:
            return Discard.DISABLED
        if self._goaway is not None:
            return Discard.DRAINING
        if session.broken is not None or session.receiver_done:
            return Discard.PEER_CLOSED
        if session.held_up or session.finished or session.receiver.stream.unsent:
            return Discard.OUTSTANDING
        if session.receiver.place is not None and self._current().admission.manager.wanted(session.receiver.place):
            return Discard.YIELDED
        return session.tracker.verdict()

    def _flush_up(self, session: _Session) -> None:
        """What the client gave before END shall reach the receiver."""
        timer = Timeout.start_new(_FLUSH_SECONDS)
        try:
            while not self._push(session):
                self._engine.wait(session.receiver.stream.socket.fileno())
        except Timeout as fired:
            if fired is not timer:
                raise
        finally:
            timer.close()

    def _over(self, session: _Session, ending: Ending, reset: bool) -> None:
        """Close, count, log."""
        services, receiver = session.services, session.receiver
        if self._doom is not None:
            ending = self._doom
        services.gauges.outgoing -= 1
        counters = services.counters
        if session.tracker is not None:
            receiver.messages += session.tracker.mails
            counters.messages += session.tracker.mails
            self._audit(services, receiver.place, session.tracker.mails)
        if ending is Ending.KEPT:
            services.keeper.give(receiver, session.key)
        else:
            self._engine.close(receiver.stream.socket, reset)
            services.admission.leave(receiver.place)
        counters.bytes_up += session.up
        counters.bytes_down += session.down
        counters.ended.count(ending)
        log.connection(
            session.number,
            self._peer.instance,
            self._door.protocol,
            self._guest.client,
            receiver.source,
            receiver.destination,
            session.reused,
            receiver.tls.version if receiver.tls else "",
            session.up,
            session.down,
            monotonic() - session.started,
            ending,
        )

    def _audit(self, services: Services, places: Places | None, messages: int) -> None:
        """Each MAIL should have had a permit."""
        if places is not None and places.flows and messages:
            services.admission.manager.mail_sent(places, messages, clock_ns())
            services.admission.settle()

    def _log_refused(
        self, number: int, error: ProxyError, request: m.Open | None = None, started: float | None = None
    ) -> None:
        log.refused(
            number,
            self._peer.instance,
            self._door.protocol,
            self._guest.client,
            (request.source_ip if request else None) or "",
            request.destinations[0].endpoint if request else None,
            monotonic() - started if started else 0.0,
            error,
        )

    # ---------------------------------------------------------------- small things

    def _send(self, data: bytes) -> None:
        """Send a frame and wait until it is gone.

        Raises:
            ClientGone.
        """
        data, self._held_down = self._held_down + data, b""
        try:
            send_all(self._engine, self._stream, data)
        except OSError:
            raise ClientGone from None

    def _queue(self, data: bytes) -> bool:
        """Send a frame without waiting; whether all of it is gone."""
        self._held_down += data
        return self._flush_down()

    def _flush_down(self) -> bool:
        if not self._held_down and not self._stream.unsent:
            return True
        try:
            while self._held_down:
                self._held_down = self._held_down[self._stream.send(self._held_down) :]
            self._stream.flush()
        except BlockingIOError:
            return False
        except OSError:
            raise ClientGone from None
        return not self._stream.unsent

    def _wait(self, *fds: int) -> None:
        """Until one of the sockets has an event, or somebody wakes us."""
        switch = self._greenlet.switch
        for fd in fds:
            self._engine.watch(fd, switch)
        self._waiting = True
        try:
            get_hub().switch()
        finally:
            self._waiting = False
            for fd in fds:
                self._engine.watch(fd, None)

    def _wake(self) -> None:
        if self._waiting:
            get_hub().loop.run_callback(self._greenlet.switch)


def _opened(session: _Session) -> m.Opened:
    receiver = session.receiver
    facts = receiver.tls
    return m.Opened(
        reused=session.reused,
        destination=m.Address(*receiver.destination),
        local=m.Address(*receiver.local),
        messages=receiver.messages,
        age_ms=int((monotonic() - receiver.opened_at) * 1000),
        greeting=receiver.greeting.encode("utf-8", "surrogateescape")[:4096] if receiver.greeting else None,
        ehlo=[line.encode("utf-8", "surrogateescape")[:4096] for line in receiver.hello[:256]],
        tls=m.TlsInfo(facts.version, facts.cipher, facts.verified, facts.verdict, facts.certificate[:32768])
        if facts
        else None,
    )
