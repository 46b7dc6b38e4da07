"""An SMTP connection to a receiver, brought up as a client asked: bind, connect, greeting, EHLO, TLS, EHLO.

Runs in the greenlet of whoever wants the connection, under that one's deadline; `smtp.ClientDialogue` decides what to
say next. The result can be used by one client after another. Who may ask for it, and who keeps it, is decided
elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import ssl
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

from gevent import Timeout

from proxy.egress import upstream
from proxy.errors import Step, UpstreamError
from proxy.model import Endpoint, TlsMode
from proxy.net import tls
from proxy.net.conversation import receive, send_all
from proxy.net.relay import Engine, keep_alive
from proxy.net.tls import PlainStream, Stream, TlsStream
from proxy.protocols.smtp.dialogue import ClientDialogue, Then, mailmax
from proxy.throttling.flows import Places


class Wish(NamedTuple):
    """What a client wants the session to be.

    `ehlo_name` None: none at all, the proxy stays out of the dialogue. `tls_server_name`: as `server_name` has it.
    """

    ehlo_name: str | None
    tls: TlsMode
    tls_server_name: str
    tls_verify: bool


class TlsFacts(NamedTuple):
    """What TLS with the receiver came to; `certificate` is the leaf's DER form."""

    version: str
    cipher: str
    verified: bool
    verdict: str
    certificate: bytes


@dataclass(slots=True, eq=False)
class Receiver:
    """One connection to a receiver.

    Args:
        opened_at: when it was connected, on the monotonic clock, in seconds.
        messages: MAIL commands over all its users.
        greeting: code and text; None without a dialogue.
        hello: the texts of the lines of the last reply to EHLO.
        tls: None: in clear.
        mailmax: MAIL commands that the receiver takes, if it said so.
        place: what it holds under the throttles.
        idle_timeout: seconds, for `guard`.
        guarded: it was called.
    """

    stream: Stream
    source: str
    destination: Endpoint
    local: Endpoint
    opened_at: float
    idle_timeout: float
    greeting: str | None = None
    hello: tuple[str, ...] = ()
    tls: TlsFacts | None = None
    mailmax: int | None = None
    messages: int = 0
    place: Places | None = None
    guarded: bool = False

    def guard(self) -> None:
        """Have TCP watch over a dead peer (`relay.keep_alive`), once. For those that live long: it is five system
        calls, and until then there is a deadline."""
        if not self.guarded:
            self.guarded = True
            with contextlib.suppress(OSError):  # it is broken: whoever uses it next will see
                keep_alive(self.stream.socket, self.idle_timeout)


def open_receiver(
    engine: Engine, wish: Wish, source: str, destination: Endpoint, seconds: tuple[float, float], idle_timeout: float
) -> Receiver:
    """Connect and bring the session up.

    Args:
        seconds: for the connect alone, and for all of it.

    Raises:
        UpstreamError: with the step that failed; a deadline is ETIMEDOUT at the step it was in.
        Overloaded: no descriptor.
    """
    ends_at = monotonic() + seconds[1]
    try:
        return _attempt(engine, wish, source, destination, seconds, idle_timeout)
    except UpstreamError as error:
        left = ends_at - monotonic()
        if error.step is not Step.TLS or wish.tls is not TlsMode.OPPORTUNISTIC or wish.tls_verify or left <= 0:
            raise
        # Opportunistic means: rather in clear than not at all (RFC 7435). That connection is spoilt, so a fresh one.
        plain = wish._replace(tls=TlsMode.NONE)
        return _attempt(engine, plain, source, destination, (min(seconds[0], left), left), idle_timeout)


def _attempt(
    engine: Engine, wish: Wish, source: str, destination: Endpoint, seconds: tuple[float, float], idle_timeout: float
) -> Receiver:
    opened_at = monotonic()
    sock = upstream.bind(source)
    try:
        upstream.connect(engine, sock, source, destination, seconds[0])
        local = upstream.local_endpoint(sock)
        receiver = Receiver(PlainStream(sock), source, destination, local, opened_at, idle_timeout)
        if wish.ehlo_name is not None:
            bring_up = _BringUp(engine, receiver, wish, wish.ehlo_name)
            bring_up.run(max(seconds[1] - (monotonic() - opened_at), 0.001))
        return receiver
    except BaseException:
        engine.close(sock)
        raise


class _BringUp:
    """Does what the dialogue says until the session is up."""

    def __init__(self, engine: Engine, receiver: Receiver, wish: Wish, ehlo_name: str) -> None:
        self._engine = engine
        self._receiver = receiver
        self._wish = wish
        self._dialogue = ClientDialogue(ehlo_name, wish.tls, str(receiver.destination))

    def run(self, seconds: float) -> None:
        """Bring the session up within `seconds`.

        Raises:
            UpstreamError: the step, and the errno or the receiver's reply.
        """
        timer = Timeout.start_new(seconds)
        try:
            self._converse()
        except ssl.SSLError as error:
            raise self._failed(_tls_reason(error), 0) from None
        except OSError as error:
            number = error.errno or errno.ECONNRESET
            raise self._failed(os.strerror(number), number) from None
        except Timeout as fired:
            if fired is not timer:
                raise
            raise self._failed(f"no answer within {seconds:.0f}s", errno.ETIMEDOUT) from None
        finally:
            timer.close()
        self._note_result()

    def _converse(self) -> None:
        dialogue = self._dialogue
        action = dialogue.begin()
        while action.then is not Then.DONE:
            if action.send:
                send_all(self._engine, self._receiver.stream, action.send)
            if action.then is Then.START_TLS:
                self._start_tls()
                action = dialogue.tls_started()
                continue
            data = receive(self._engine, self._receiver.stream)
            if not data:
                raise dialogue.eof()
            action = dialogue.receive(data)

    def _start_tls(self) -> None:
        wish, receiver = self._wish, self._receiver
        # Without a name there is still the address, which a certificate may carry; unverified, it is not sent as SNI.
        name = wish.tls_server_name or (receiver.destination.host if wish.tls_verify else None)
        context = tls.client_context(wish.tls_verify)
        try:
            stream = TlsStream(receiver.stream.socket, context, server_side=False, name=name)
        except ValueError:
            raise self._failed(f"{name} cannot be a TLS server name", 0) from None
        while not stream.handshake():
            self._engine.wait(stream.socket.fileno())
        receiver.stream = stream
        receiver.tls = _facts(stream, wish.tls_verify)

    def _note_result(self) -> None:
        receiver, dialogue = self._receiver, self._dialogue
        receiver.greeting = str(dialogue.greeting) if dialogue.greeting else None
        receiver.hello = dialogue.hello.lines if dialogue.hello else ()
        receiver.mailmax = mailmax(dialogue.capabilities)

    def _failed(self, why: str, number: int) -> UpstreamError:
        receiver, step = self._receiver, self._dialogue.step
        return UpstreamError(f"{step} {receiver.source} -> {receiver.destination}: {why}", step, number)


def _tls_reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    return f"TLS handshake failed: {error.reason or error.strerror}"


def _facts(stream: TlsStream, verified: bool) -> TlsFacts:
    cipher = stream.tls.cipher()
    return TlsFacts(
        version=stream.tls.version() or "",
        cipher=cipher[0] if cipher else "",
        verified=verified,
        verdict="ok" if verified else "not checked",
        certificate=stream.tls.getpeercert(binary_form=True) or b"",
    )
