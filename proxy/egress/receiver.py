"""An SMTP connection to a receiver: what was wished for, what came of it, and when another is tried after a failure.

It can be used by one client after another. How it comes to be is `bring_up`; who keeps it is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
from typing import NamedTuple

from proxy.errors import Step, UpstreamError
from proxy.model import Endpoint, TlsMode, TlsSeen
from proxy.net.certificates import Verdict
from proxy.net.contexts import ClientIdentity, Profile
from proxy.net.relay import keep_alive
from proxy.net.tls import Stream
from proxy.policy.certificates import Demand
from proxy.throttling.flows import Places


class Wish(NamedTuple):
    """What a client wants the session to be.

    Args:
        ehlo_name: None: no session at all, the proxy stays out of the dialogue.
        tls_server_name: as `server_name` has it; empty: none.
        demand: what the receiver's certificate has to prove. minimum, ciphers, identity: see `contexts.Profile`.
    """

    ehlo_name: str | None
    tls: TlsMode
    tls_server_name: str = ""
    demand: Demand = Demand()
    minimum: str = ""
    ciphers: str = ""
    identity: ClientIdentity | None = None

    @property
    def profile(self) -> Profile:
        """What TLS may be."""
        return Profile(self.demand.mandatory, self.minimum, self.ciphers, self.identity)

    @property
    def proof(self) -> str:
        """What TLS had to be, for the pool: who demands more never gets a connection that proved less, and nobody one
        that was had with another's certificate."""
        if not (self.demand.mandatory or self.minimum or self.ciphers or self.identity):
            return ""
        shown = f"as {self.identity.digest}" if self.identity is not None else ""
        return " ".join(filter(None, (self.demand.word, self.minimum, self.ciphers, shown)))


class Limits:
    """How long what may take, in seconds. Never changed.

    Args:
        connect: the TCP connect.
        session: from there until the session is up: the receiver's greeting, its answers, TLS.
        ends_at: on the monotonic clock: nothing of it goes on after that, a second connection in clear included.
    """

    __slots__ = ("connect", "ends_at", "session")

    def __init__(self, connect: float, session: float, ends_at: float) -> None:
        self.connect = connect
        self.session = session
        self.ends_at = ends_at


class TlsFacts(NamedTuple):
    """What TLS with the receiver came to.

    Args:
        verdict: on its certificates. chain: these, in DER, the receiver's own first.
        resumed: an earlier session went on, in which they were shown.
    """

    version: str
    cipher: str
    verdict: Verdict
    chain: tuple[bytes, ...]
    resumed: bool = False

    @property
    def seen(self) -> TlsSeen:
        """For the log."""
        verdict = self.verdict
        certificate = verdict.by or verdict.result or "trusted"
        return TlsSeen(self.version, self.cipher, certificate, verdict.key, verdict.subject, self.resumed)


class InClear(NamedTuple):
    """Why a session is in clear although the receiver offers TLS and the client would have liked it.

    Args:
        cause: `handshake`: it failed; `starttls`: refused; `remembered`: not tried, for it has failed before.
        why: for people; what the receiver said, or what failed. result: in a word of RFC 8460 section 4.3.
    """

    cause: str
    why: str
    result: str


class Receiver:
    """One connection to a receiver.

    Args:
        opened_at: when it was connected, on the monotonic clock, in seconds.
        idle_timeout: seconds, for `guard`.
        place: what it holds under the throttles.

    Attributes:
        greeting: code and text; None without a dialogue.
        hello: the texts of the lines of the last reply to EHLO.
        tls: None: in clear.
        in_clear: what came of TLS that was tried for this connection.
        mailmax: MAIL commands that the receiver takes, if it said so.
        messages: MAIL commands over all its users. errors: replies 5xx over all of them.
        guarded: `guard` was called.
        missed: something may have come of which no event will tell; see `miss`.
    """

    __slots__ = (
        *("destination", "errors", "greeting", "guarded", "hello", "idle_timeout", "in_clear", "local", "mailmax"),
        *("messages", "missed", "opened_at", "place", "source", "stream", "tls"),
    )

    def __init__(
        self,
        stream: Stream,
        source: str,
        destination: Endpoint,
        local: Endpoint,
        opened_at: float,
        idle_timeout: float,
        place: Places | None = None,
    ) -> None:
        self.stream = stream
        self.source = source
        self.destination = destination
        self.local = local
        self.opened_at = opened_at
        self.idle_timeout = idle_timeout
        self.greeting: str | None = None
        self.hello: tuple[str, ...] = ()
        self.tls: TlsFacts | None = None
        self.in_clear: InClear | None = None
        self.mailmax: int | None = None
        self.messages = 0
        self.errors = 0
        self.place = place
        self.guarded = False
        self.missed = True

    def miss(self, _events: int) -> None:
        """An event that nobody acts upon: between the shelf and who watches from then on."""
        self.missed = True

    def guard(self) -> None:
        """Have TCP watch over a dead peer (`relay.keep_alive`), once. For those that live long: it is five system
        calls, and until then there is a deadline."""
        if not self.guarded:
            self.guarded = True
            with contextlib.suppress(OSError):  # it is broken: whoever uses it next will see
                keep_alive(self.stream.socket, self.idle_timeout)


class StaleSession(UpstreamError):
    """The handshake broke in which an earlier TLS session was to go on: a full one may well succeed."""


def may_do_without(wish: Wish) -> bool:
    """Whether the client would rather have a session in clear than none (RFC 7435)."""
    return wish.tls is TlsMode.OPPORTUNISTIC and not wish.demand.mandatory


def is_for_want_of_tls(error: UpstreamError) -> bool:
    """Whether a session failed by its TLS alone: at the handshake, or because STARTTLS was never answered.

    Not by what was said in front of TLS: that may be an attack.
    """
    return error.step is Step.TLS or (error.step is Step.STARTTLS and error.errno == errno.ETIMEDOUT)


def may_try_again(wish: Wish, error: UpstreamError) -> bool:
    """Whether another connection is made: with a full handshake, which proves as much, or in clear if that will do."""
    return isinstance(error, StaleSession) or (may_do_without(wish) and is_for_want_of_tls(error))
