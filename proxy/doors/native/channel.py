"""A native channel: one SMTP session after another on one authenticated connection.

One greenlet serves a channel, top to bottom: wait for OPEN, open a connection, answer OPENED or FAILED, carry bytes
both ways until END, answer ENDED, and again. It has a greenlet of its own, unlike a raw relay: its frames and its TLS
need the CPU anyway, and the TLS state outweighs the greenlet. How it waits and is interrupted is `link`'s; how
a receiver is had, `open`'s; how bytes move, `transfer`'s; what a session comes to, `session`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from time import monotonic
from typing import Any

from gevent import get_hub

from proxy import __version__
from proxy.doors.native.dialogue import Dialogue
from proxy.doors.native.entrance import Guest, check_still_welcome
from proxy.doors.native.link import ClientGone, Link
from proxy.doors.native.open import Attempts, Opener, Taken
from proxy.doors.native.session import Session, opened
from proxy.doors.native.transfer import Transfer
from proxy.egress.receiver import Receiver
from proxy.errors import Draining, IdleTooLong, NameInUse, PeerError, ProxyError, UpstreamError, let_go
from proxy.log import lines as log
from proxy.log import steps
from proxy.model import Ending, Endpoint
from proxy.numbering import numbers
from proxy.policy.idleness import Idleness
from proxy.policy.turns import Refusals
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.services import Door, Services, note_failure
from proxy.stats import Standing

#: Seconds that ENDED waits for the answer to the OPEN behind it.
_LONGEST_HELD = 1.0
#: Seconds; the shortest time of a timer.
_AT_ONCE = 1e-9


class _Impatient(PeerError):
    """While an OPEN is served its client has nothing to say: what it said could only be acted upon without end."""

    def __init__(self) -> None:
        super().__init__("a frame before the answer to an OPEN")


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
        self._link = Link(current().engine, guest)
        self._opening = False
        self._receiver: Receiver | None = None  # of the session in progress
        self._transfer: Transfer | None = None  # its
        self._dialogue: Dialogue | None = None  # the one in progress
        self._idleness = Idleness()
        self._deadline: Any = None  # a timer of the loop, once there is an end in sight
        self._refusals = Refusals()
        self._asked: m.Open | None = None  # what is being served, ...
        self._number, self._started = 0, 0.0  # ... as which connection, and since when

    @property
    def instance(self) -> str:
        return self._peer.instance

    @property
    def run_id(self) -> bytes:
        return self._peer.run_id

    # ---------------------------------------------------------------- the whole life

    def serve(self) -> None:
        """Serve until the client closes, breaks the protocol, or is told to go away. Closes nothing; never raises."""
        services, link = self._current(), self._link
        instances = services.instances
        instances.channels[self] = instances.connections[self] = None
        if (leaving := instances.leaving) is not None:
            self.goaway(leaving.left(monotonic()), leaving.reason, Ending.DRAIN_TIMEOUT)
        try:
            if not self._peer.one_flight:
                link.send(self._welcome(services))
            while (request := self._next_open()) is not None:
                self._serve_session(request)
                self._asked = None
            link.part()
        except ClientGone as gone:
            goodbye = self._goodbye()
            if goodbye is not None:
                link.part(goodbye)
            else:
                with contextlib.suppress(OSError):
                    link.stream.finish()
            let_go(gone)
        except ProxyError as error:
            self._failed(services, self._guest.number, error)
            link.part(error)
            let_go(error)
        except Exception as error:
            services.counters.internal_errors += 1
            log.internal_error(f"channel {self._guest.number} of {self._guest.client}", error)
        finally:
            if self._deadline is not None:
                self._deadline.close()
            del instances.channels[self], instances.connections[self]

    def _welcome(self, services: Services) -> bytes:
        settings = services.settings
        return self._guest.handshake.welcome(
            services.incarnation,
            reuse_max_idle_ms=int(settings.reuse_connections_max_idle * 1000) if settings.reuse_connections else 0,
            software=f"greenarrow_proxy {__version__}",
        )

    def _goodbye(self) -> ProxyError | None:
        """Why we end the channel; None: the client does."""
        link = self._link
        if link.doom in (Ending.IDLE_TIMEOUT, Ending.HALF_CLOSE_TIMEOUT):
            return IdleTooLong("nothing was said for too long")
        if link.doom is Ending.CLOSED_BY_OPERATOR:
            return Draining("closed by the operator")
        if link.doom is Ending.DRAIN_TIMEOUT:
            return Draining(link.goes_why or "the proxy is shutting down")
        return NameInUse(link.goes_why) if link.doom is Ending.NO_LONGER_ALLOWED else None

    def goaway(self, seconds: float, reason: str, ending: Ending) -> None:
        """See `services.HostedChannel`."""
        link = self._link
        if link.goes_at is None:
            link.goes_at, link.goes_why = monotonic() + seconds, reason
            link.goes_code = NameInUse.code if ending is Ending.NO_LONGER_ALLOWED else Draining.code
            self._deadline = get_hub().loop.timer(max(seconds, _AT_ONCE))
            self._deadline.start(self.cut, ending)
            link.wake()

    def standing(self) -> Standing | None:
        """See `services.HostedConnection`."""
        asked = self._asked
        if asked is None:
            return None
        client, destination = self._guest.client, asked.destinations[0].endpoint
        source = asked.source_ip or ""
        ends = client, source, destination
        standing = Standing(self._number, self.instance, "native", *ends, "open", self._started)
        if self._dialogue is not None:
            return standing._replace(source=self._dialogue.source, state=self._dialogue.doing)
        if self._receiver is not None:
            return standing._replace(source=self._receiver.local.host, state="relay")
        return standing

    def sweep(self, now: float) -> None:
        """See `services.HostedChannel`: byte progress, as the relay counts it. An OPEN has its own deadline."""
        if self._receiver is not None:
            self._receiver.guard()
        half_closed = self._transfer is not None and self._transfer.half_closed
        settings = self._current().settings
        moved = self._link.moved if self._transfer is None else self._transfer.moved
        ending = self._idleness.over(moved, half_closed, settings, now, busy=self._opening)
        if ending is not None:
            self.cut(ending)
        elif self._link.blocked or (self._transfer is not None and self._transfer.blocked):
            self._link.wake()  # refused for want of memory with nothing in flight: no edge would tell of more room

    def cut(self, ending: Ending) -> None:
        """End the session in progress, and the channel; must not wait."""
        link = self._link
        if self._dialogue is not None:
            self._dialogue.cut(ending)
        refusal = NameInUse if ending is Ending.NO_LONGER_ALLOWED else Draining
        link.interrupt(ending, refusal(link.goes_why) if link.goes_at is not None else None)

    # ---------------------------------------------------------------- between sessions

    def _next_open(self) -> m.Open | None:
        """Wait for an OPEN; None when the client is to go.

        Raises:
            ProxyError: the client broke the protocol, is no longer welcome, or is gone.
        """
        link = self._link
        while True:
            frame = link.decoder.next_frame()
            if frame is not None:
                if frame[0] == frames.DATA:
                    raise PeerError("DATA without an SMTP session")
                message = frames.decode_again(frame, frames.CHANNEL_FROM_CLIENT)
                if not isinstance(message, m.Open):
                    raise PeerError(f"{type(message).__name__.upper()} without an SMTP session")
                self._check_welcome()
                return message
            if link.goes_at is not None:
                link.tell_goaway()
                return None
            if not link.readable or not link.receive():
                if link.holds:
                    link.send(b"")
                link.wait()

    def _check_welcome(self) -> None:
        """A reload may have changed who is allowed, a newer run may have fenced this one.

        Raises:
            Refused.
        """
        services, peer = self._current(), self._peer
        check_still_welcome(services.access, peer, self._guest.client.host)
        services.instances.fences.check(peer.instance, peer.run_id)
        if self._link.goes_at is not None:
            raise Draining(self._link.goes_why)

    # ---------------------------------------------------------------- one session

    def _serve_session(self, request: m.Open) -> None:
        """From OPEN to ENDED or FAILED.

        Raises:
            ProxyError: the channel is over; the client broke the protocol or is gone.
        """
        services, link = self._current(), self._link
        started, number = monotonic(), numbers.take()
        attempts: Attempts = []
        if link.decoder.unread:
            raise _Impatient
        self._asked, self._number, self._started = request, number, started
        self._step("asks for a connection, held open or new")
        if request.dialogue:
            self._serve_dialogue(services, request, number, started)
            return
        try:
            taken = self._open(services, request, attempts, number)
        except ProxyError as error:
            if not isinstance(error, UpstreamError):  # those have been told as they happened
                self._failed(
                    services, number, error, started, request.source_ip or "", request.destinations[0].endpoint
                )
            if isinstance(error, ClientGone):
                raise
            self._answer_failed(frames.encode(frames.failed(error, attempts)), error, started)
            let_go(error)
            return
        self._refusals.served()
        session = Session(services, self._door, self._guest, link, request, taken, number, started)
        transfer = session.transfer
        ending, reset = Ending.CLIENT_RESET, True
        self._receiver, self._transfer = taken.receiver, transfer
        try:
            if link.has_spoken():
                raise _Impatient
            link.send(opened(taken, attempts))
            self._step("has a held-open one" if taken.reused else "has a new one")
            transfer.carry()
            ending, reset = session.finish(self._current())
        except ClientGone:
            ending = link.doom or ending
            raise
        except PeerError:
            ending = Ending.PROTOCOL_ERROR
            raise
        finally:
            self._receiver = self._transfer = None
            session.over(ending, reset)
            self._step(f"over: {ending}")

    def _answer_failed(self, failed: bytes, error: ProxyError, started: float) -> None:
        """Answer FAILED. Who asks again and again for what we refuse must rest before it is heard again.

        Raises:
            ProxyError: the client did not wait for the answer, or is gone.
        """
        if self._link.has_spoken():
            raise _Impatient
        self._link.send(failed)
        if not isinstance(error, UpstreamError):
            pause = self._refusals.refused() - (monotonic() - started)
            if pause > 0:
                self._link.pause(pause)

    def _serve_dialogue(self, services: Services, request: m.Open, number: int, started: float) -> None:
        """The same where the proxy takes part in the dialogue.

        Raises:
            ProxyError: as `_serve_session`.
        """
        link, destination = self._link, request.destinations[0].endpoint
        source = request.source_ip or ""
        link.send(b"")
        self._opening = True
        try:
            try:
                link.watch_client()
                dialogue = Dialogue(services, self._door, self._guest, link, self.instance, request, number)
                source = dialogue.source
                opened = dialogue.open()
            finally:
                link.unwatch_client()
        except PeerError:
            raise
        except ProxyError as error:
            self._failed(services, number, error, started, source, destination)
            self._answer_failed(frames.encode(frames.failed(error, [])), error, started)
            let_go(error)
            self._opening = False
            return
        self._refusals.served()
        self._dialogue = dialogue
        try:
            if link.has_spoken():
                dialogue.give_up()
                raise _Impatient
            try:
                link.send(frames.encode(opened))
            except BaseException:
                dialogue.give_up()
                raise
            dialogue.serve()
        finally:
            self._opening = False
            self._dialogue = None

    def _open(self, services: Services, request: m.Open, attempts: Attempts, number: int) -> Taken:
        """Serve the OPEN, unless the client goes away meanwhile.

        Raises:
            ProxyError: as `Opener.run`. ClientGone: nobody waits for the answer any more.
        """
        started = monotonic()

        def tell(source: str, destination: Endpoint, error: UpstreamError) -> None:
            self._failed(services, number, error, started, source, destination)

        link = self._link
        opener = Opener(services, self._guest, self._peer, request, tell)
        alarm = link.engine.alarms.start(_LONGEST_HELD, link) if link.holds else None
        self._opening = True
        try:
            link.watch_client()
            return opener.run(attempts)
        finally:
            if alarm is not None:
                alarm.cancel()
            link.unwatch_client()
            self._opening = False

    def _step(self, text: str) -> None:
        if steps.on and (standing := self.standing()) is not None:
            steps.tell(standing, text)

    # ---------------------------------------------------------------- refusals

    def _failed(
        self,
        services: Services,
        number: int,
        error: ProxyError,
        started: float | None = None,
        source: str = "",
        destination: Endpoint | None = None,
    ) -> None:
        """Count and log what did not come to be."""
        note_failure(
            services,
            self._door,
            number,
            self._peer.instance,
            self._guest.client,
            source,
            destination,
            monotonic() if started is None else started,
            error,
        )
