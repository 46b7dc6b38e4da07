"""Receivers through another proxy: this program as the agent on an MTA's machine (`via`).

What goes out leaves from the other proxy's machine. Between the two the native protocol is spoken, as the MTA's library
speaks it (docs/protocol.md): a channel for each connection that is open at the same time, and used again afterwards.
Several proxies may be named; the first that can be reached is taken, and one that could not, or did not answer, is left
alone for a while. Who waits may be called off (`CalledOff`), and then no proxy is blamed for it.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from time import monotonic

import msgspec
from gevent import Timeout

from proxy.egress import upstream
from proxy.errors import (
    DestinationNotAllowed,
    FamilyMismatch,
    Overloaded,
    PeerError,
    ProxyError,
    Refused,
    SourceNotAllowed,
    Throttled,
    UpstreamError,
    ViaUnavailable,
)
from proxy.model import Endpoint
from proxy.net.contexts import proven_context
from proxy.net.conversation import receive, rest_for, send_all, shake_hands
from proxy.net.framed import FramedStream
from proxy.net.peer import holds_back
from proxy.net.relay import Engine, RawSocket, keep_alive
from proxy.net.tls import PlainStream, Stream, TlsStream, tls_reason
from proxy.net.turns import TurnOver
from proxy.policy.turns import READ
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.protocols.native.auth import NO_CERTIFICATE, ClientHandshake, RefusedByProxy, certificate_hash
from proxy.settings import Settings

#: Seconds to connect to one proxy, TLS and authentication included.
CONNECT_WITHIN = 10.0
#: Seconds for the answer to END, and those beyond an OPEN's own deadline.
_GRACE = 5.0
#: A proxy that could not be reached is tried last for so long.
_AVOIDED = 10.0
#: What an attempt has at least, though the request's deadline is near.
_LEAST = 1.0
_MAX_IDLE_CHANNELS = 100
_MAX_IDLE = 240.0
#: FAILED.code → what it is here; all else goes by whether it may succeed later.
_REFUSALS: dict[str, type[Refused]] = {
    kind.code: kind for kind in (SourceNotAllowed, DestinationNotAllowed, FamilyMismatch, Refused)
}


class CalledOff(Exception):
    """Thrown into who waits here: nobody wants the connection any more. No OSError, for those are the proxies'."""


class _Silent(ViaUnavailable):
    """The proxy has not answered in time: it is frozen, or cut off from us."""


class Channel:
    """One authenticated connection to a proxy.

    Attributes:
        proxy: where it leads.
        stream: the bytes of the SMTP session that is open on it.
    """

    def __init__(self, engine: Engine, proxy: Endpoint, under: Stream, decoder: frames.FrameDecoder) -> None:
        self.proxy = proxy
        self.idle_since = 0.0
        self.stream = FramedStream(under, decoder, frames.CHANNEL_FROM_PROXY)
        self._engine = engine

    def open(self, request: m.Open) -> m.Opened:
        """Have an SMTP session opened; waits.

        Raises:
            ViaUnavailable: the channel is of no more use. ProxyError: the proxy's word; the channel is good.
        """
        engine, stream = self._engine, self.stream
        timer = Timeout.start_new(request.deadline_ms / 1000 + _GRACE)
        try:
            stream.say(request)
            send_all(engine, stream, b"")
            answer = self._answer()
        except (OSError, PeerError) as error:
            raise ViaUnavailable(f"via {self.proxy}: {error}") from None
        except Timeout as fired:
            if fired is not timer:
                raise
            raise _Silent(f"via {self.proxy}: no answer to OPEN in time") from None
        finally:
            timer.close()
        if isinstance(answer, m.Failed):
            raise _refusal(answer)
        return answer

    def _answer(self) -> m.Opened | m.Failed:
        message = self._message()
        if isinstance(message, m.Opened | m.Failed):
            return message
        if isinstance(message, m.Error):
            raise PeerError(message.message)
        if isinstance(message, m.Goaway):
            raise PeerError(f"it goes away: {message.reason}")
        raise PeerError(f"{type(message).__name__.upper()} instead of OPENED")

    def _message(self) -> m.Message:
        turn = self.stream.turn
        while True:
            if not turn.spend(READ, monotonic()):
                rest_for(turn)
            try:
                frame = self.stream.next_frame()
            except TurnOver:
                turn.end()
                continue
            except BlockingIOError:
                self._engine.wait(self.stream.socket.fileno())
                turn.begin(monotonic())
                continue
            if frame[0] != frames.DATA:
                message: m.Message = frames.decode(frame, frames.CHANNEL_FROM_PROXY)
                if not isinstance(message, m.Probe):
                    return message

    def end(self) -> bool:
        """The SMTP session is over; waits for ENDED. Whether the channel is good for another one."""
        stream, timer = self.stream, Timeout.start_new(_GRACE)
        try:
            stream.say(m.End(False))
            send_all(self._engine, stream, b"")
            while not isinstance(message := self._message(), m.Ended):
                if not isinstance(message, m.Eof | m.Aborted):  # GOAWAY, ERROR
                    return False
            stream.next_session()
            return stream.word is None
        except (OSError, PeerError):
            return False
        except Timeout as fired:
            if fired is not timer:
                raise
            return False
        finally:
            timer.close()


def of_settings(engine: Engine, settings: Settings, host_name: str, old: Via | None) -> Via | None:
    """The way out that the settings ask for; the old one, with its idle channels, if nothing has changed."""
    if not settings.via or settings.via_secret is None:
        return None
    new = Via(engine, settings.via, settings.via_secret, settings.via_instance or host_name, settings.via_tls)
    return old if old is not None and old.same_as(new) else new


class Via:
    """The proxies, and the channels to them that are idle.

    Args:
        proxies: in the order of preference.
        secret, instance: how we log in there.
        tls: as their `listen_tls` says.
    """

    def __init__(self, engine: Engine, proxies: Sequence[Endpoint], secret: bytes, instance: str, tls: bool) -> None:
        self._engine = engine
        self._proxies = tuple(proxies)
        self._secret = secret
        self._instance = instance
        self._context = proven_context() if tls else None
        self._run_id = os.urandom(16)
        self._idle: list[Channel] = []  # the last one used last, and taken first
        self._avoided: dict[Endpoint, float] = {}

    def same_as(self, other: Via) -> bool:
        """Whether the other one goes the same way under the same name."""
        mine = (self._proxies, self._secret, self._instance, self._context is None)
        return mine == (other._proxies, other._secret, other._instance, other._context is None)

    def open(self, request: m.Open) -> tuple[Channel, m.Opened]:
        """An SMTP session, of the first proxy that answers; waits, no longer than the request's deadline and a little.

        Raises:
            ProxyError: as the proxy says; ViaUnavailable: none of the proxies can be reached, or answers.
        """
        ends_at = monotonic() + request.deadline_ms / 1000
        reasons: list[str] = []
        proxies = self._in_order()
        for number, proxy in enumerate(proxies):
            # One that does not answer must leave time for those behind it.
            share = (ends_at - monotonic()) / (len(proxies) - number)
            try:
                return self._open_at(proxy, request, monotonic() + share)
            except ViaUnavailable as error:
                reasons.append(str(error))
        raise ViaUnavailable("; ".join(reasons))

    def _in_order(self) -> list[Endpoint]:
        """As configured, but for those that are left alone for now: these come last."""
        now = monotonic()
        return sorted(self._proxies, key=lambda proxy: self._avoided.get(proxy, 0.0) > now)

    def _open_at(self, proxy: Endpoint, request: m.Open, ends_at: float) -> tuple[Channel, m.Opened]:
        """The same of this proxy: on an idle channel, or on a new one.

        Raises:
            ProxyError: as the proxy says; ViaUnavailable: it cannot be reached, and is left alone for a while.
        """
        if proxy in self._avoided:  # one tries, the others go on without it until that is decided
            self._avoided[proxy] = monotonic() + _AVOIDED
        try:
            found = self._ask(proxy, request, ends_at)
        except ViaUnavailable:
            self._avoid(proxy)
            raise
        except ProxyError:
            self._avoided.pop(proxy, None)
            raise
        self._avoided.pop(proxy, None)
        return found

    def _ask(self, proxy: Endpoint, request: m.Open, ends_at: float) -> tuple[Channel, m.Opened]:
        while (channel := self._take_idle(proxy)) is not None:
            try:
                return channel, self._open_on(channel, request, ends_at)
            except _Silent:
                raise
            except ViaUnavailable:
                continue  # it had died meanwhile; nothing was opened
        channel = self._reach(proxy, ends_at)
        return channel, self._open_on(channel, request, ends_at)

    def _avoid(self, proxy: Endpoint) -> None:
        """Leave it alone for a while; what is idle there is of no use either."""
        self._avoided[proxy] = monotonic() + _AVOIDED
        while (channel := self._take_idle(proxy)) is not None:
            self.close(channel)

    def _open_on(self, channel: Channel, request: m.Open, ends_at: float) -> m.Opened:
        left = max(ends_at - monotonic(), _LEAST)
        try:
            return channel.open(msgspec.structs.replace(request, deadline_ms=int(left * 1000), probes=True))
        except ViaUnavailable:
            self.close(channel)
            raise
        except ProxyError:
            self.give(channel)
            raise
        except BaseException:
            self.close(channel)
            raise

    def give(self, channel: Channel) -> None:
        """Its SMTP session has ended in good order."""
        if len(self._idle) >= _MAX_IDLE_CHANNELS:
            self.close(channel)
            return
        channel.idle_since = monotonic()
        self._engine.watch(channel.stream.socket.fileno(), None)
        self._idle.append(channel)

    def close(self, channel: Channel) -> None:
        """Close it; an SMTP session that is open on it is broken off there with a reset.

        With bytes unsent it is a reset here, too: a FIN would stand behind them, and the proxy would hold the receiver,
        which takes nothing, and its place for minutes.
        """
        stream = channel.stream
        self._engine.close(stream.socket, reset=stream.unsent or holds_back(stream.socket))

    def shed(self) -> None:
        """Close what has been idle for long; called now and then."""
        oldest = monotonic() - _MAX_IDLE
        while self._idle and self._idle[0].idle_since < oldest:
            self.close(self._idle.pop(0))

    def stop(self) -> None:
        """Close all idle channels."""
        while self._idle:
            self.close(self._idle.pop())

    def _take_idle(self, proxy: Endpoint) -> Channel | None:
        for at in range(len(self._idle) - 1, -1, -1):
            if self._idle[at].proxy == proxy:
                return self._idle.pop(at)
        return None

    # ---------------------------------------------------------------- new channels

    def _reach(self, proxy: Endpoint, ends_at: float) -> Channel:
        """A new, authenticated channel.

        Raises:
            ViaUnavailable: why not. Overloaded: no descriptor for it; that is not the proxy's fault.
        """
        within = min(CONNECT_WITHIN, max(ends_at - monotonic(), _LEAST))
        try:
            source = upstream.system_source(proxy)
            sock = upstream.bind(source)
        except UpstreamError as error:
            raise ViaUnavailable(f"via {proxy}: {error}") from None
        timer = Timeout.start_new(within)
        try:
            upstream.connect(self._engine, sock, source, proxy, within)
            keep_alive(sock, 60.0)
            channel = self._log_in(proxy, sock)
        except BaseException as error:
            self._engine.close(sock)
            if error is timer:
                raise ViaUnavailable(f"via {proxy}: no answer within {within:.0f}s") from None
            if isinstance(error, RefusedByProxy):
                raise ViaUnavailable(f"via {proxy}: it refuses us as {self._instance}: {error}") from None
            if isinstance(error, ssl.SSLError):
                raise ViaUnavailable(f"via {proxy}: TLS: {tls_reason(error)}; is via_tls right?") from None
            if isinstance(error, OSError | PeerError | UpstreamError):
                raise ViaUnavailable(f"via {proxy}: {error}") from None
            raise
        finally:
            timer.close()
        return channel

    def _log_in(self, proxy: Endpoint, sock: RawSocket) -> Channel:
        stream: Stream = PlainStream(sock)
        certificate = NO_CERTIFICATE
        if self._context is not None:
            stream = TlsStream(sock, self._context, server_side=False)
            stream.turn.key = proxy.host
            shake_hands(self._engine, stream)
            certificate = certificate_hash(stream.tls.getpeercert(binary_form=True) or b"")
        handshake = ClientHandshake(
            m.Kind.CHANNEL,
            self._instance,
            self._secret,
            run_id=self._run_id,
            nonce=os.urandom(32),
            certificate=certificate,
        )
        send_all(self._engine, stream, handshake.start())
        while handshake.welcome is None:
            data = receive(self._engine, stream)
            if not data:
                raise PeerError("it closed in the middle of the login")
            send_all(self._engine, stream, handshake.receive(data))
        return Channel(self._engine, proxy, stream, handshake.decoder)


def _refusal(failed: m.Failed) -> ProxyError:
    """The other proxy's word, as if it were ours."""
    if failed.code == Throttled.code:
        return Throttled(failed.message, failed.throttle or "", failed.retry_after_ms / 1000)
    if failed.code == UpstreamError.code and failed.step is not None:
        reply = failed.smtp_reply.decode("utf-8", "replace") if failed.smtp_reply is not None else None
        return UpstreamError(failed.message, failed.step, failed.errno, reply)
    kind = _REFUSALS.get(failed.code, Overloaded if failed.retry else Refused)
    return kind(failed.message)
