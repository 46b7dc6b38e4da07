"""One instance's session: its life, its turns and its queues, frames in and frames out.

What is short and usual is acted upon in the hub as it comes, one read for each event; the greenlet does what may take
longer, or has to wait. The manager's words are written by whoever made it speak, without waiting. What the kernel does
not take is queued, at most 16 frames; beyond that the records stay parked in the session, it gets no permits, and
nothing that it says is acted upon: who does not read is not listened to. Pings go before all else, both ways. A session
also hands out the key with which its channels authenticate in one flight, and announces the certificates they may show.
What a message of the instance leads to is `control_acts`'.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from select import EPOLLIN
from time import monotonic
from typing import Any, Final

from gevent import get_hub, getcurrent

from proxy import __version__
from proxy.doors.native import control_frames
from proxy.doors.native.control_acts import Acts, SessionOver
from proxy.doors.native.control_queue import Outgoing
from proxy.doors.native.entrance import Guest, check_still_welcome
from proxy.egress.admission import Admission, Client
from proxy.egress.clock import clock_ns
from proxy.errors import GOODBYES, NameInUse, NoPong, ProxyError, Refused, Replaced, let_go
from proxy.log import lines as log
from proxy.model import Ending
from proxy.net.conversation import farewell, rest_for
from proxy.net.relay import UNSURE
from proxy.net.turns import TurnOver
from proxy.policy.turns import READ, RECORD
from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from proxy.protocols.native.auth import ChannelKey
from proxy.services import Door, Services
from proxy.stats import Backlog, Flow, SessionFigures
from proxy.throttling.session import DEAD_AFTER, End, Session
from proxy.throttling.throttle import SECOND

_READ_SIZE: Final = 65536
#: Frames in a queue; the figure in the status lines.
QUEUE: Final = 16
#: Frames that are taken in ahead of their turn, and how many of them before they are answered.
_URGENT: Final = frozenset((s.Ping.TYPE, s.Pong.TYPE))
_URGENT_AT_ONCE: Final = 16
#: Frames that are acted upon in the hub, so many for one event, and how long they may be: some hundred records at most.
_BRIEF: Final = frozenset((s.Ping.TYPE, s.Pong.TYPE, s.Demand.TYPE, s.Return.TYPE, s.Outcome.TYPE))
_IN_THE_HUB: Final = 16
_SHORT: Final = 512
#: Records of a kind that are sent at once when somebody else made the manager speak, and in our own turn.
_A_FEW, _MANY = 50, 100


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
        self._outgoing = Outgoing(guest.stream)
        self._turn = guest.stream.turn
        self._congested = False
        self._leaving = False
        self._doom: ProxyError | SessionOver | None = None
        self._recheck = False  # after a reload
        self._goodbye = ""
        self._key_id = b""
        self._holds_name = False
        self._greenlet: Any = None
        self._waiting = False
        self._raised: BaseException | None = None  # in the hub; for our greenlet
        self._missed = True  # events may have gone by that nobody acted upon: only a read that finds nothing is proof
        self._dry = False  # all was read that had come, and an event will tell of more
        self._incarnation = current().incarnation

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
        try:
            self._begin(services)
            services.instances.sessions[self] = None
            if (leaving := services.instances.leaving) is not None:
                self.goaway(leaving.left(monotonic()), leaving.reason)
            try:
                self._listen()
            finally:
                del services.instances.sessions[self]
        except GOODBYES as error:
            self._goodbye = error.code
            farewell(self._engine, self._stream, native.error_frame(error))
            let_go(error)
        except ProxyError as error:
            services.counters.refused.count(error.code)
            self._log(log.WARNING, f"session ends: {error}", reason=error.code)
            farewell(self._engine, self._stream, native.error_frame(error))
            let_go(error)
        except (SessionOver, OSError) as gone:
            let_go(gone)
        except Exception as error:
            services.counters.internal_errors += 1
            log.internal_error(f"session of {self.instance} at {self._guest.client}", error)
        finally:
            self._end(services)

    def _begin(self, services: Services) -> None:
        """WELCOME and CERT; then the manager knows the session.

        Nothing waits here: between the claim of the name and the manager's hello no other run may come.

        Raises:
            NameInUse: this run was replaced by another one.
        """
        instances, peer = services.instances, self._peer
        fenced = instances.fences.claim(peer.instance, peer.run_id, self._guest.client.host)
        self._holds_name = True
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
        self._queue([welcome + self._certificates(services)])
        if fenced is not None:
            self._fence(services, fenced)
        weight = services.access.weight_of(peer.instance)
        host = self._guest.client.host
        self._session = self._admission.manager.hello(peer.instance, peer.run_id, host, weight, clock_ns())
        self._acts = Acts(self._current, peer.instance, self._session, self._queue, self._count)
        self._admission.clients[self._session] = self
        self._admission.settle()
        self._log(log.INFO, "session begins", tls="yes" if services.identity else "no")

    def _fence(self, services: Services, run_id: bytes) -> None:
        """A new run has the name: the old one's channels finish what runs on them."""
        for channel in list(services.instances.channels):
            if channel.instance == self.instance and channel.run_id == run_id:
                channel.goaway(0.0, f"name in use by {self._guest.client.host}", Ending.NO_LONGER_ALLOWED)

    def _listen(self) -> None:
        """Read frames and act on them.

        Raises:
            ProxyError: the client broke the protocol, or is no longer welcome. SessionOver, OSError.
        """
        self._turn.begin(monotonic())
        while True:
            self._flush()
            if self._recheck:
                self._recheck = False
                self._acts.recheck_sources()
                self._admission.settle()
            self._speak(_MANY)  # what did not fit before
            self._take_frames()
            if self._incoming and len(self._outgoing.frames) < QUEUE and self._admission.listens_to_sessions:
                self._acts.act(native.decode(self._incoming.popleft(), native.SESSION_FROM_CLIENT))
                self._admission.settle()
                self._count(RECORD)
                continue
            if self._doom is not None:
                raise self._doom
            if len(self._incoming) < QUEUE and self._receive():
                self._count(READ)
                continue
            if self._turn.over or self._has_more():
                self._count(RECORD)
            else:
                self._wait()

    def _receive(self) -> bool:
        """Read once; False: there is nothing now, or the turn is over.

        Raises:
            SessionOver: the client closed. OSError.
        """
        if self._dry:
            return False
        try:
            data = self._stream.recv(_READ_SIZE)
        except TurnOver:
            self._turn.end()
            return False
        except BlockingIOError:
            self._missed, self._dry = False, True
            return False
        if not data:
            raise SessionOver
        self._dry = not self._missed and self._stream.drained
        self._decoder.receive(data)
        return True

    def _take_frames(self) -> None:
        """Whole frames into the queue; pings do not stand in it."""
        urgent = 0
        while len(self._incoming) < QUEUE and (frame := self._decoder.next_frame()) is not None:
            if frame[0] in _URGENT:
                self._acts.act(native.decode(frame, native.SESSION_FROM_CLIENT))
                urgent += 1
                if urgent % _URGENT_AT_ONCE == 0:
                    self._admission.settle()
                self._count(RECORD)
            else:
                self._incoming.append((frame[0], bytes(frame[1])))
        if urgent:
            self._admission.settle()

    # ---------------------------------------------------------------- in the hub

    def _event(self, events: int) -> None:
        """An event of the socket, while our greenlet waits."""
        self._turn.begin(monotonic())
        self._dry = False
        try:
            if events & UNSURE:  # no other event will tell of it
                self._missed = True
            elif self._at_rest() and not (events & EPOLLIN and self._step()):
                return
        except BaseException as error:
            self._raised = error
        self._greenlet.switch()

    def _at_rest(self) -> bool:
        """Whether nothing is left of what came or was said before."""
        return not (
            self._congested
            or self._incoming
            or self._outgoing.frames
            or self._stream.unsent
            or self._recheck
            or self._doom is not None
            or not self._admission.listens_to_sessions
        )

    def _step(self) -> bool:
        """The usual case: one read, and in it what is quickly done.

        Returns:
            whether the greenlet has to look around: there may be more to read, or what came is for it.

        Raises:
            As `_listen`.
        """
        if not self._receive():
            return self._turn.over
        decoder, acts, left = self._decoder, self._acts, _IN_THE_HUB
        while (frame := decoder.next_frame()) is not None:
            kind, payload = frame
            if kind not in _BRIEF or len(payload) > _SHORT or not left or self._turn.over:
                self._incoming.append((kind, bytes(payload)))
                return True
            left -= 1
            acts.act(native.decode(frame, native.SESSION_FROM_CLIENT))
        self._admission.settle()
        return self._turn.over or not self._dry

    # ---------------------------------------------------------------- small things of the greenlet

    def _has_more(self) -> bool:
        """Whether there is something to be sent that the kernel may take at once."""
        session = self._session
        if session is None or not session.parked_records or self._outgoing.frames or self._stream.unsent:
            return False
        return not self._admission.manager.frozen

    def _count(self, work: int) -> None:
        """Count work that was done, and let others have their turn when ours is over, unless this is the hub.

        Raises:
            ProxyError, SessionOver: the session has ended meanwhile.
        """
        if not self._turn.spend(work, monotonic()) and not self._waiting:
            self._admission.settle()
            rest_for(self._turn)
            self._missed, self._dry = True, False
        if self._doom is not None:
            raise self._doom

    def _end(self, services: Services) -> None:
        """Whatever the reason: its key is void, its permits are not given out again."""
        self._greenlet = None
        services.instances.channel_keys.pop(self._key_id, None)
        if self._holds_name:
            services.instances.fences.release(self._peer.instance)
        session = self._session
        if session is not None:
            self._admission.clients.pop(session, None)
            reason = session.end or self._goodbye or End.LOST
            if session.end is None:
                self._admission.manager.lost(session, clock_ns())
            self._admission.settle()
            self._log(log.INFO, "session is over", reason=reason)
            self._acts.over()

    # ---------------------------------------------------------------- what others tell it

    def goaway(self, seconds: float, reason: str) -> None:
        """See `services.Hosted`: no more permits from now on."""
        if self._session is not None and self._session.end is None:
            self._leaving = self._congested = True
            self._admission.manager.congest(self._session, True, clock_ns())
            self._admission.settle()
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
        if self._session is not None:
            self._admission.manager.weigh(self._session, services.access.weight_of(self.instance))
            if announcement := self._certificates(services):
                self._queue([announcement])
            self._recheck = True
            self._wake()

    def figures(self) -> SessionFigures | None:
        """For the status lines; None before the session has begun."""
        session = self._session
        if session is None:
            return None
        now = session.figures(clock_ns())
        queued = len(self._outgoing.frames)  # the last delivery may have had some frames more than there was room for
        return SessionFigures(
            name=now.name,
            connected=now.connected,
            ping=now.ping,
            ping_age=now.ping_age,
            backlog=Backlog(now.ram, now.bounce, now.disk),
            forward=Flow(entering=len(self._incoming)),
            back=Flow(leaving=min(queued, QUEUE), parked=session.parked_records + max(0, queued - QUEUE)),
        )

    # ---------------------------------------------------------------- frames out

    def deliver(self) -> None:
        """See `admission.Client`: a few words now, the rest in our own turn."""
        self._speak(_A_FEW)

    def resume(self) -> None:
        """See `admission.Client`."""
        self._wake()

    def _speak(self, most: int) -> None:
        """Send what waits, `most` records of a kind. With the queue full the records stay where they are."""
        session = self._session
        outgoing = self._outgoing
        if session is None or session.end is not None or len(outgoing.frames) >= QUEUE or not session.has_words:
            return
        output = self._admission.manager.take(session, clock_ns(), most)
        if output.pongs or output.ping is not None:
            outgoing.add_first(control_frames.urgent_frames(output, self._incarnation))
        self._queue(control_frames.frames(output, self._incarnation))
        if session.has_words and self._has_more():
            self._wake()  # the rest in our own greenlet, where others get their turn

    def ended(self, reason: End) -> None:
        """See `admission.Client`."""
        if reason is End.FENCED:
            newer = self._admission.manager.sessions.get(self.instance)
            self.cut(NameInUse(f"name in use by {newer.address if newer is not None else 'a newer run'}"))
        elif reason is End.REPLACED:
            self.cut(Replaced("a newer session of this run has replaced this one"))
        elif reason is End.SILENT:
            self.cut(NoPong(f"no PONG for {DEAD_AFTER // SECOND} s"))
        else:
            self.cut()

    def _certificates(self, services: Services) -> bytes:
        if services.identity is None:
            return b""
        return native.encode(s.Cert(services.incarnation, [services.identity.certificate]))

    def _queue(self, frames: Sequence[bytes]) -> None:
        try:
            self._outgoing.send(frames)
        except OSError:
            self.cut()
            return
        if self._outgoing.frames or self._congested or self._leaving:
            self._heed_congestion()

    def _flush(self) -> None:
        """Hand frames to the kernel; a queue that is full stops the permits, one that is empty again starts them.

        Raises:
            OSError: the connection is broken.
        """
        if self._outgoing.frames or self._stream.unsent:
            self._outgoing.flush()
        if self._outgoing.frames or self._congested or self._leaving:
            self._heed_congestion()

    def _heed_congestion(self) -> None:
        session, waiting = self._session, len(self._outgoing.frames)
        if session is None or session.end is not None:
            return
        full = self._leaving or waiting >= QUEUE or (self._congested and waiting > 0)
        if full != self._congested:
            self._congested = full
            self._admission.manager.congest(session, full, clock_ns())
            self._admission.settle()

    # ---------------------------------------------------------------- small things

    def _wait(self) -> None:
        """Until there is something that the hub does not do, or somebody wakes us.

        Raises:
            Whatever went wrong in the hub.
        """
        fd = self._stream.socket.fileno()
        self._engine.watch(fd, self._event)
        self._waiting = True
        try:
            get_hub().switch()
        finally:
            self._waiting = False
            self._engine.watch(fd, None)
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised

    def _wake(self) -> None:
        get_hub().loop.run_callback(self._resume)

    def _resume(self) -> None:
        if self._waiting:  # by now it may wait for something else
            self._turn.begin(monotonic())
            self._greenlet.switch()

    def _log(self, level: int, message: str, **fields: object) -> None:
        log.note(log.Event.SESSION, level, message, instance=self.instance, client=self._guest.client, **fields)
