"""Brings a connection to a receiver up as a client asked: bind, connect, greeting, EHLO, TLS, EHLO.

Runs in the greenlet of whoever wants the connection, under that one's deadline; `smtp.ClientDialogue` decides what to
say next. What comes of it is a `receiver.Receiver`. Who may ask for it, and who keeps it, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import ssl
from collections.abc import Callable, Iterator
from time import monotonic

from gevent import Timeout

from proxy.egress import upstream
from proxy.egress.receiver import InClear, Limits, Receiver, StaleSession, TlsFacts, Wish, may_do_without, may_try_again
from proxy.egress.resumption import LARGEST, Known, Sessions, Terms
from proxy.errors import Step, UpstreamError
from proxy.model import Endpoint, TlsMode
from proxy.net import contexts
from proxy.net.alarm import TimeIsUp
from proxy.net.apart import for_receivers
from proxy.net.certificates import judged
from proxy.net.conversation import READ_SIZE, may_wait, receive, send_all, shake_hands
from proxy.net.relay import Engine, RawSocket
from proxy.net.tls import PlainStream, Stream, TlsStream, tls_reason
from proxy.net.turns import TurnOver
from proxy.policy.certificates import Demand, Result
from proxy.protocols.smtp.dialogue import Action, ClientDialogue, Then, mailmax
from proxy.spans import SPANS

#: The longest that STARTTLS's reply and the handshake may take each, where TLS can be done without; half of the time
#: that is left, if that is less.
_HANDSHAKE_SECONDS = 10.0
#: Seconds from which on a deadline may be an alarm's, a little late and cheap: nothing is shared out by it.
_COARSE_FROM = 30.0


def open_receiver(
    engine: Engine,
    wish: Wish,
    source: str,
    destination: Endpoint,
    limits: Limits,
    idle_timeout: float,
    failed: Callable[[Stream], None],
    once_more: Callable[[UpstreamError], None] | None = None,
    sessions: Sessions | None = None,
) -> Receiver:
    """Connect and bring the session up.

    Args:
        failed: closes a connection whose session did not come up. Its receiver may count it for a while yet, and it
            holds its place for so long. Must not wait.
        once_more: called when the handshake has failed, its connection was `failed`, and a new one is made, in clear or
            with a full handshake: it may wait for that one's place, and give up by an exception.
        sessions: see `BringUp`.

    Raises:
        UpstreamError: with the step that failed; a deadline is ETIMEDOUT at the step it was in.
        Overloaded: no descriptor.
    """
    try:
        return _attempt(engine, wish, source, destination, limits, idle_timeout, failed, sessions)
    except UpstreamError as error:
        if not may_try_again(wish, error) or monotonic() >= limits.ends_at:
            raise
        failure = error
    if once_more is not None:
        once_more(failure)
    # Not on the same connection: after half a handshake it is of no use.
    if isinstance(failure, StaleSession):
        return _attempt(engine, wish, source, destination, limits, idle_timeout, failed, sessions)
    receiver = _attempt(engine, wish._replace(tls=TlsMode.NONE), source, destination, limits, idle_timeout, failed)
    receiver.in_clear = InClear("handshake", failure.reason, failure.tls_result)
    return receiver


def _attempt(
    engine: Engine,
    wish: Wish,
    source: str,
    destination: Endpoint,
    limits: Limits,
    idle_timeout: float,
    failed: Callable[[Stream], None],
    sessions: Sessions | None = None,
) -> Receiver:
    seconds = max(min(limits.connect, limits.ends_at - monotonic()), 0.001)
    receiver = connect_receiver(engine, source, destination, seconds, idle_timeout)
    if wish.ehlo_name is None:
        return receiver
    try:
        BringUp(engine, receiver, wish, sessions).run(max(min(limits.session, limits.ends_at - monotonic()), 0.001))
        return receiver
    except BaseException:
        failed(receiver.stream)
        raise


def connect_receiver(
    engine: Engine,
    source: str,
    destination: Endpoint,
    seconds: float,
    idle_timeout: float,
    sock: RawSocket | None = None,
    begun: Callable[[RawSocket], None] | None = None,
) -> Receiver:
    """A TCP connection on which nothing was said or heard.

    Args:
        sock: one that is bound already; it is closed if it does not connect.
        begun: see `upstream.connect`.

    Raises:
        UpstreamError, Overloaded: as `open_receiver`.
    """
    opened_at = monotonic()
    if sock is None:
        sock = upstream.bind(source)
    try:
        events = upstream.connect(engine, sock, source, destination, seconds, begun)
        stream = PlainStream(sock)
        stream.drained = not events  # what comes now makes one
        local = upstream.local_endpoint(sock)
        return Receiver(stream, source, destination, local, opened_at, idle_timeout)
    except BaseException:
        engine.close(sock)
        raise


class BringUp:
    """Does what the dialogue says until the session is up, at once or in two steps. Closes nothing.

    Args:
        wish: without an EHLO name it is `greet`, and `hello` with the name that turned up meanwhile; else `run`.
        sessions: of TLS, to be resumed and to be kept; None: each handshake is a full one.

    Attributes:
        mode: the TLS that is tried.
    """

    def __init__(self, engine: Engine, receiver: Receiver, wish: Wish, sessions: Sessions | None = None) -> None:
        self._engine = engine
        self.receiver = receiver
        self._wish = wish
        self._sessions = sessions
        self.mode = wish.tls
        self._dialogue = ClientDialogue(wish.ehlo_name, wish.tls, receiver.destination)
        self._ends_at = math.inf
        self._offered = False  # an earlier TLS session
        self._heard = True  # anything since TLS began: before that, an alert is its failure

    def run(self, seconds: float) -> None:
        """Bring the session up within `seconds`.

        Raises:
            UpstreamError: the step, and the errno or the receiver's reply.
        """
        self._within(seconds, self._dialogue.begin())
        self._note_result()

    def greet(self, seconds: float) -> None:
        """Read the greeting.

        Raises:
            UpstreamError: as `run`.
        """
        self._within(seconds, self._dialogue.begin())
        self.receiver.greeting = str(self._dialogue.greeting)

    def hello(self, name: str, seconds: float) -> None:
        """The rest, behind `greet`.

        Raises:
            UpstreamError: as `run`. PeerError: the name cannot stand in a command.
        """
        self._within(seconds, self._dialogue.introduce(name))
        self._note_result()

    def _within(self, seconds: float, action: Action) -> None:
        self._ends_at = monotonic() + seconds
        exact = Timeout.start_new(seconds) if seconds < _COARSE_FROM else None
        alarm = self._engine.alarms.start(seconds) if exact is None else None
        try:
            self._converse(action)
        except ssl.SSLError as error:
            step = self._dialogue.step if self._heard else Step.TLS
            raise self._failed(_tls_reason(error), 0, step=step) from None
        except OSError as error:
            if not self._heard and (alert := self._alert()) is not None:
                raise self._failed(_tls_reason(alert), 0, step=Step.TLS) from None
            number = error.errno or errno.ECONNRESET
            raise self._failed(os.strerror(number), number) from None
        except (Timeout, TimeIsUp) as up:
            if up is not exact and (alarm is None or not isinstance(up, TimeIsUp) or up.alarm is not alarm):
                raise
            raise self._failed(f"no answer within {seconds:.0f}s", errno.ETIMEDOUT) from None
        finally:
            if exact is not None:
                exact.close()
            if alarm is not None:
                alarm.cancel()

    def _alert(self) -> ssl.SSLError | None:
        """What the receiver said in TLS before it closed in front of our EHLO, if it did: that write may fail first."""
        try:
            self.receiver.stream.recv(1)
        except ssl.SSLError as error:
            return error
        except (OSError, TurnOver):
            pass
        return None

    def _converse(self, action: Action) -> None:
        dialogue, waited = self._dialogue, False
        while action.then is not Then.DONE and action.then is not Then.INTRODUCE:
            if action.send:
                waited = send_all(self._engine, self.receiver.stream, action.send)
            if action.then is Then.START_TLS:
                with self._hurrying("the TLS handshake hangs"):
                    self._start_tls()
                action = dialogue.tls_started()
                self._heard = False
                continue
            if dialogue.step is Step.STARTTLS:
                with self._hurrying("STARTTLS is not answered"):
                    data = receive(self._engine, self.receiver.stream)
            else:
                stream = self.receiver.stream
                data = receive(self._engine, stream, READ_SIZE, waited or not may_wait(stream))
                waited = False
            if not data:
                raise dialogue.eof()
            self._heard = True
            action = dialogue.receive(data)

    def _start_tls(self) -> None:
        wish, receiver = self._wish, self.receiver
        name = wish.tls_server_name or None
        context = contexts.client_context(wish.profile)
        known = self._sessions.get(self._terms, context, monotonic()) if self._sessions is not None else None
        try:
            session = known.session if known is not None else None
            self._offered = session is not None
            stream = TlsStream(receiver.stream.socket, context, server_side=False, name=name, session=session)
        except ValueError:
            raise self._failed(f"{name} cannot be a TLS server name", 0) from None
        stream.turn.key = receiver.destination.host
        try:
            began = monotonic()
            shake_hands(self._engine, stream, for_receivers())
            SPANS.tls.observe(monotonic() - began)
            receiver.stream = stream
            receiver.tls = facts = _facts(stream, wish.demand, known)
            if wish.demand.binding and not facts.verdict.verified:
                raise self._failed(facts.verdict.why, 0, facts.verdict.result)
        except BaseException:
            if known is not None and self._sessions is not None:  # the next one begins anew
                self._sessions.forget(self._terms)
            raise

    @property
    def _terms(self) -> Terms:
        """Whose TLS session this is."""
        receiver, wish = self.receiver, self._wish
        return Terms(receiver.source, receiver.destination, wish.tls_server_name, wish.profile, wish.demand.word)

    def _keep_session(self) -> None:
        """For the next connection; tickets of TLS 1.3 came in front of the first reply that was read."""
        stream, facts = self.receiver.stream, self.receiver.tls
        if self._sessions is None or facts is None or not isinstance(stream, TlsStream):
            return
        session = stream.tls.session
        if session is None or not (session.has_ticket or facts.version != "TLSv1.3"):
            return
        if stream.own_bytes > LARGEST or sum(map(len, facts.chain)) > LARGEST:
            return
        known = Known(session, stream.tls.context, facts.chain)
        self._sessions.keep(self._terms, known, session.ticket_lifetime_hint or session.timeout, monotonic())

    @contextlib.contextmanager
    def _hurrying(self, hangs: str) -> Iterator[None]:
        """A limit for a step on the way to TLS; if TLS can be done without, it leaves time for a session in clear.

        Raises:
            UpstreamError: it hangs.
        """
        if not may_do_without(self._wish):
            yield
            return
        timer = Timeout.start_new(max(min(_HANDSHAKE_SECONDS, (self._ends_at - monotonic()) / 2), 0.001))
        try:
            yield
        except Timeout as fired:
            if fired is not timer:
                raise
            raise self._failed(hangs, errno.ETIMEDOUT) from None
        finally:
            timer.close()

    def _note_result(self) -> None:
        receiver, dialogue = self.receiver, self._dialogue
        if dialogue.starttls_refusal is not None:
            receiver.in_clear = InClear(
                "starttls", f"STARTTLS refused: {dialogue.starttls_refusal}", Result.STARTTLS_NOT_SUPPORTED
            )
        receiver.greeting = str(dialogue.greeting) if dialogue.greeting else None
        receiver.hello = dialogue.hello.lines if dialogue.hello else ()
        receiver.mailmax = mailmax(dialogue.capabilities)
        self._keep_session()

    def _failed(self, why: str, number: int, result: str = "", step: Step | None = None) -> UpstreamError:
        receiver, step = self.receiver, step or self._dialogue.step
        message = f"{step} {receiver.source} -> {receiver.destination}: {why}"
        kind = StaleSession if self._offered and step is Step.TLS and not result else UpstreamError
        return kind(message, step, number, reason=why, tls_result=result)


def _tls_reason(error: ssl.SSLError) -> str:
    return f"TLS handshake failed: {tls_reason(error)}"


def _facts(stream: TlsStream, demand: Demand, known: Known | None) -> TlsFacts:
    """Args:
    known: the session that was offered to the receiver.
    """
    resumed, cipher = known is not None and bool(stream.tls.session_reused), stream.tls.cipher()
    chain = known.chain if known is not None and resumed else stream.chain()
    verdict = judged(stream.turn.key, chain, demand)
    return TlsFacts(stream.tls.version() or "", cipher[0] if cipher else "", verdict, chain, resumed)
