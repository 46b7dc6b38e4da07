"""A client, the mediator and receivers without sockets: what the tests of mode smtp's dialogue play with.

`World` does what the mediator wants, at once or when the test says so, and passes bytes in pieces of any size. Its
receivers are SMTP servers of a few lines that number what they say, so that no reply can be taken for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from proxy.errors import ProxyError, Step, Throttled, UpstreamError
from proxy.model import Discard
from proxy.protocols.smtp.mediator import Mediator
from proxy.protocols.smtp.states import State, Want

HOST = "proxy.example"
NAME = "mail.example.com"
GREETING = "220 mx.example.net ESMTP"
HELLO = ("mx.example.net", "PIPELINING", "SIZE 1000", "8BITMIME", "STARTTLS", "CHUNKING", "AUTH PLAIN")


class Mx:
    """One connection's receiver, behind its EHLO.

    Args:
        number: of the connection; every reply names it.
        say: verb → what it says instead, `None`: it closes.
    """

    def __init__(self, number: int, say: dict[bytes, list[bytes | None]] | None = None) -> None:
        self.number = number
        self.say = say if say is not None else {}
        self.commands: list[bytes] = []
        self.messages: list[bytes] = []
        self.received = b""
        self.closed = False
        self._buffer = b""
        self._body: bytes | None = None
        self._mail = False
        self._replies = 0

    def receive(self, data: bytes) -> bytes:
        """What it answers."""
        self.received += data
        self._buffer += data
        answer = b""
        while not self.closed and (step := self._step()) is not None:
            answer += step
        return answer

    def _step(self) -> bytes | None:
        if self._body is not None:
            whole = self._body + self._buffer
            end = whole.find(b"\r\n.\r\n")
            if end < 0:
                self._body, self._buffer = whole, b""
                return None
            self.messages.append(whole[2 : end + 2])
            self._body, self._buffer, self._mail = None, whole[end + 5 :], False
            return self._reply(b".", b"250")
        line, mark, rest = self._buffer.partition(b"\r\n")
        if not mark:
            return None
        self._buffer = rest
        self.commands.append(line)
        verb = (line.split(None, 1) or [b""])[0].upper()
        return self._answer(verb)

    def _answer(self, verb: bytes) -> bytes:
        usual = {b"MAIL": b"250", b"RCPT": b"250" if self._mail else b"503", b"RSET": b"250", b"NOOP": b"250"}
        usual |= {b"DATA": b"354" if self._mail else b"503", b"VRFY": b"252", b"AUTH": b"334"}
        said = self._reply(verb, usual.get(verb, b"502"))
        if verb == b"MAIL":
            self._mail = said.startswith(b"250")
        elif verb == b"RSET":
            self._mail = False
        elif verb == b"DATA" and said.startswith(b"354"):
            self._body = b"\r\n"
        return said

    def _reply(self, verb: bytes, usual: bytes) -> bytes:
        script = self.say.get(verb)
        said = script.pop(0) if script else b""
        if said is None:
            self.closed = True
            return b""
        self._replies += 1
        if said:
            self.closed = said.startswith(b"421")
            return said
        return b"%s-%s\r\n%s %d.%d\r\n" % (usual, verb, usual, self.number, self._replies)


class World:
    """The mediator and what is around it.

    Args:
        scripts: what the receivers of one connection after the other say; see `Mx`.
        reused: the first connection was somebody else's before.
        shared: connections may change.
        slots: for each MAIL in order: None, it may go, or the refusal. When used up, all may go.
        hello: the lines of each connection's EHLO, the last one's for all later ones.
        left: MAIL commands that each connection takes.
        late: so many times a connection comes too late for its message's slot.
        preview: there is no place for the first connection; what the client is told at EHLO instead.
    """

    def __init__(
        self,
        scripts: list[dict[bytes, list[bytes | None]]] | None = None,
        *,
        reused: bool = False,
        shared: bool = True,
        slots: list[ProxyError | None] | None = None,
        hello: list[tuple[str, ...]] | None = None,
        left: int | None = None,
        late: int = 0,
        greeting: str = GREETING,
        automatic: bool = True,
        preview: tuple[str, ...] = (),
        **options: bool,
    ) -> None:
        self.mediator = Mediator(HOST, **options)
        self.scripts = list(scripts or [])
        self.reused = reused
        self.shared = shared
        self.slots = list(slots or [])
        self.hellos = list(hello or [HELLO])
        self.left = left
        self.late = late
        self.greeting = greeting
        self.automatic = automatic  # do what is wanted as soon as it is
        self.preview = preview
        self.refuse: ProxyError | None = None  # the next connection, or bring-up
        self.mxs: list[Mx] = []
        self.client_sees = b""
        self.towards_mediator = b""  # said by the receiver, not yet read
        self.verdicts: list[Discard | None] = []  # of connections that were left, in order
        self.names: list[str | None] = []
        self.wants: list[Want] = []
        self.over = False
        if not preview:
            self._connect(reused)

    # -- what happens

    def say(self, data: bytes, size: int | None = None) -> bytes:
        """The client sends; what it sees then, when all is quiet."""
        before = len(self.client_sees)
        for at in range(0, len(data), size or max(len(data), 1)):
            self.give(data[at : at + (size or len(data))])
        self.settle(size)
        return self.client_sees[before:]

    def give(self, data: bytes) -> None:
        """These bytes of the client reach the mediator, if it reads; else they wait in the world's socket."""
        self.waiting = getattr(self, "waiting", b"") + data
        self._let_read()

    def settle(self, size: int | None = None) -> None:
        """Everything that is under way arrives."""
        while self.step(size):
            pass

    def step(self, size: int | None = None) -> bool:
        """One thing happens; False: nothing was left to happen."""
        moved = self._pump()
        if self.mediator.want is not None and self.automatic and not self.over:
            self.do()
            return True
        if self.towards_mediator:
            cut = size or len(self.towards_mediator)
            piece, self.towards_mediator = self.towards_mediator[:cut], self.towards_mediator[cut:]
            self.mediator.receiver(piece)
            self._pump()
            return True
        if self.mediator.attached and self.mxs[-1].closed and not self.over and not self._told_end:
            self._told_end = True
            self.mediator.receiver_done()
            self._pump()
            return True
        return moved or self._let_read()

    def do(self) -> None:
        """What the mediator wants."""
        self._pump()
        want = self.mediator.want
        assert want is not None
        self.wants.append(want)
        _DO[want](self)
        self._pump()

    # -- inside

    def _connect(self, reused: bool = False) -> None:
        self.mxs.append(Mx(len(self.mxs), self.scripts.pop(0) if self.scripts else None))
        self.towards_mediator = b""
        self._told_end = False
        self.present_reused = reused

    def _pump(self) -> bool:
        mediator = self.mediator
        moved = bool(mediator.to_client or mediator.to_receiver)
        self.client_sees += b"".join(mediator.to_client)
        mediator.to_client.clear()
        data = b"".join(mediator.to_receiver)
        mediator.to_receiver.clear()
        if data:
            assert mediator.attached, "bytes for no receiver"
            self.towards_mediator += self.mxs[-1].receive(data)
        return moved

    def _let_read(self) -> bool:
        data = getattr(self, "waiting", b"")
        if not data or not self.mediator.reads_client:
            return False
        self.waiting = b""
        self.mediator.client(data)
        self._pump()
        return True

    def _refused(self) -> bool:
        error, self.refuse = self.refuse, None
        if error is not None:
            self.mediator.failed(error)
        return error is not None

    def _greeting(self) -> None:
        if self.preview:
            self.mediator.previewed(self.greeting, self.preview)
        elif not self._refused():
            self.mediator.greeted(self.greeting, self.reused)

    def _hello(self) -> None:
        self.names.append(self.mediator.name)
        if not self._refused():
            hello = self.hellos.pop(0) if len(self.hellos) > 1 else self.hellos[0]
            in_time = not (self.mediator.says_mail and self.late)
            self.late -= not in_time
            self.mediator.attached_to(hello, self.left, self.shared, self.present_reused, in_time)

    def _slot(self) -> None:
        refusal = self.slots.pop(0) if self.slots else None
        if refusal is None:
            self.mediator.slot_granted(False)
        else:
            self.mediator.failed(refusal)

    def _line(self) -> None:
        if self.refuse is None:
            self._connect(reused=False)
        self._hello()

    def _leave(self) -> None:
        self.verdicts.append(self.mediator.verdict)
        self.mediator.left()

    def _end(self) -> None:
        if self.mediator.attached:
            self.verdicts.append(self.mediator.verdict)
        self.over = True

    def _start_tls(self) -> None:
        self.mediator.tls_started()

    @property
    def state(self) -> State:
        return self.mediator.state

    def commands(self) -> Iterator[bytes]:
        """What the receivers were told, but for messages."""
        for mx in self.mxs:
            yield from mx.commands


_DO: dict[Want, Callable[[World], None]] = {
    Want.GREETING: World._greeting,
    Want.HELLO: World._hello,
    Want.SLOT: World._slot,
    Want.LINE: World._line,
    Want.LEAVE: World._leave,
    Want.END: World._end,
    Want.START_TLS: World._start_tls,
}


def opened(**options: object) -> World:
    """A world in which the client has said EHLO."""
    world = World(**options)  # type: ignore[arg-type]
    world.settle()
    world.say(b"EHLO %s\r\n" % NAME.encode())
    world.client_sees = b""
    return world


def throttled(seconds: float = 7.2) -> Throttled:
    return Throttled("full", "yahoo", seconds)


def unreachable() -> UpstreamError:
    return UpstreamError("connect 192.0.2.1 -> 192.0.2.25:25: Connection refused", Step.CONNECT, 111)


def message(number: int, recipients: int = 1) -> bytes:
    """A whole transaction, pipelined as far as a client may that guesses the replies."""
    rcpt = b"RCPT TO:<%d@example.net>\r\n" % number * recipients
    return b"MAIL FROM:<%d@example.com>\r\n%sDATA\r\n..%d\r\n.x\r\n\r\n.\r\n" % (number, rcpt, number)
