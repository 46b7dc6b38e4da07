"""Where a mediated dialogue gets its receiver from: the interface between the dialogue and what is behind it.

Two things implement it: `direct` opens and shares connections of this proxy, an agent asks another proxy for them in
the native protocol. All calls belong to the greenlet of one client and may wait in it, unless they say otherwise; while
one waits, the client's going away is thrown in as an exception, and then nothing may be left held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from proxy.errors import ProxyError
from proxy.model import Discard, Endpoint, TlsSeen
from proxy.net.relay import RawSocket
from proxy.services import Services


class LineStream(Protocol):
    """Bytes to and from a receiver, never waiting; the contract is `net.tls.PlainStream`'s.

    `socket` is registered with the engine, and has an event whenever `recv` or `send` may succeed again.
    """

    socket: RawSocket

    @property
    def unsent(self) -> bool: ...
    @property
    def drained(self) -> bool: ...
    def recv(self, size: int) -> bytes: ...
    def send(self, data: bytes) -> int: ...
    def flush(self) -> None: ...
    def finish(self) -> None: ...


class Line:
    """A connection to a receiver that one dialogue has for itself now.

    Args:
        local: the real local address of its socket.
        reused: somebody else had it before: `greeting` and `hello` are what was said then.
        greeting: code and text of the receiver's greeting, lines joined by LF; None: not read yet.
        hello: the texts of the lines of its last reply to EHLO or HELO; empty: nothing said yet.
        ehlo_name: what it was greeted with.
        shared: it may go to others afterwards, if the dialogue leaves it clean.
        left: MAIL commands that it may still carry; None: any number.
        tls: the version of TLS with the receiver, or ""; `failed`: in clear, though TLS was offered and wanted.
        seen: more about it.
        messages, errors: MAIL commands and replies 5xx of this dialogue on it; `give` and the others count them.
        handle: the egress's own.
    """

    # Written out: of a compiled dataclass this stays interpreted.
    def __init__(
        self,
        stream: LineStream,
        local: Endpoint,
        reused: bool = False,
        greeting: str | None = None,
        hello: tuple[str, ...] = (),
        ehlo_name: str = "",
        shared: bool = False,
        left: int | None = None,
        tls: str = "",
        seen: TlsSeen | None = None,
        handle: Any = None,
    ) -> None:
        self.stream = stream
        self.local = local
        self.reused = reused
        self.greeting = greeting
        self.hello = hello
        self.ehlo_name = ehlo_name
        self.shared = shared
        self.left = left
        self.tls = tls
        self.seen = seen
        self.messages = 0
        self.errors = 0
        self.handle = handle

    def knows(self, name: str) -> bool:
        """Whether its receiver was greeted with this name already, by somebody before."""
        return self.reused and name.lower() == self.ehlo_name.lower()


class TlsAtOnce(ProxyError):
    """Thrown in while the greeting is awaited: the client speaks TLS at once, and waits for none."""

    code = "tls_at_once"


class Preview(NamedTuple):
    """There is no place for a connection now. What the client is told instead, until its first message has one.

    Args:
        local: where the connection will leave from; port 0.
        greeting, hello: as a `Line` has them.
    """

    local: Endpoint
    greeting: str
    hello: tuple[str, ...]


class Egress(Protocol):
    """Connections and slots for one client, on the terms (`policy.modes.Terms`) that it was made with."""

    def connect(self) -> Line | Preview:
        """At the client's CONNECT: an idle connection that can be shared, else TCP to the receiver and no more; without
        waiting for a place.

        Raises:
            ProxyError: what is told to the client in its own protocol, as in mode tcp.
        """

    def greet(self, line: Line) -> None:
        """Read the greeting, however long it takes (`line.greeting`); one that is no 220, too.

        Raises:
            UpstreamError: there was none. `line` is of no more use; but it is after `TlsAtOnce`.
        """

    def hello(self, line: Line, name: str) -> Line:
        """Bring the session up under the client's name: EHLO, STARTTLS, EHLO as the terms say.

        Returns:
            `line`, or another instead: when `line` was somebody else's under another name (it goes back unharmed), or
            when TLS failed and may be done without.

        Raises:
            ProxyError: the receiver's refusal is in `smtp_reply`. There is no line then.
        """

    def preview(self) -> Preview:
        """What to tell a client for whom there is no connection yet. Does not wait."""

    def renew(self, name: str, fresh: bool, patient: bool = True) -> Line:
        """A whole session under the client's name, for a client that has none: an idle one, or a new one.

        Args:
            fresh: a new one, whatever is idle: the last one was found dead.
            patient: wait for its place; else Throttled at once, if there is none.

        Raises:
            ProxyError: as `hello`; Throttled: no place in time.
        """

    def slot(self, waits: Callable[[], None]) -> None:
        """Wait for the slot of one message under every limit that applies.

        Args:
            waits: called when it is not there at once; must not wait.

        Raises:
            Throttled: not in time.
        """

    def redeem(self) -> bool:
        """The message that the last slot was for goes in this moment. If that is later than the slot, the slots to come
        are put off, so that the rate holds where the message goes. Does not wait.

        Returns:
            False: so much later that it needs another slot.
        """

    def refused(self, line: Line, reply: str) -> None:
        """The receiver refused something in the dialogue on `line` (greeting and EHLO are the egress's own). Does not
        wait.

        Args:
            reply: its code and a blank, then its lines, joined by LF.
        """

    def carried(self, line: Line, accepted: int, deferred: int, rejected: int) -> None:
        """What became of the messages on `line`, before it is parted from. Does not wait."""

    def reloaded(self, services: Services) -> None:
        """New settings decide about what `renew` and `slot` are asked for from now on. Does not wait."""

    def lend(self, line: Line, taken: Callable[[], None]) -> None:
        """The client has nothing in progress: whoever waits for a connection may have this one.

        Args:
            taken: called from elsewhere, must not wait: the dialogue is to `give` the line when it runs next.

        Does not wait.
        """

    def keep(self, line: Line) -> None:
        """The client goes on; `lend` is over. Does not wait."""

    def missed(self, line: Line) -> bool:
        """Whether something may have come from its receiver of which no event will tell. Does not wait."""

    def give(self, line: Line, look: bool) -> None:
        """Nothing is in progress, and the tracker has found the line clean: it is for the next one. Does not wait.

        Args:
            look: something may have come of which no event will tell.
        """

    def part(self, line: Line, reason: Discard) -> None:
        """Nothing is in progress, but nobody else may have it: QUIT behind the client's back. Does not wait."""

    def close(self) -> None:
        """`connect` is over, well or not: what was set aside for it is given back. Does not wait."""

    def drop(self, line: Line, reset: bool) -> None:
        """Close at once; with `reset` the receiver sees RST, so that nothing unfinished is taken for a message."""
