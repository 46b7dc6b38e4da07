"""A receiving SMTP server that misbehaves on command: plain threads and sockets, for tests against real sockets.

Its job is to do exactly what a test says at exactly the step it says, and to remember what it saw. It is no model of
good SMTP, and it knows nothing of the proxy. Use:

    with Mx(script={"rcpt": [usual, say(b"421 4.3.2 going down\\r\\n", close)]}) as mx:
        ...connect to mx.endpoint...
        wait_for(lambda: mx.messages)
    assert mx.messages[0].peer[0] == "127.0.0.9"

**Steps** are `greeting`, `tls` (the handshake), `body` (the first bytes of a message came), `dot` (the message is
whole) and each verb in small letters: `ehlo`, `helo`, `starttls`, `mail`, `rcpt`, `data`, `rset`, `noop`, `quit` ...

**A script** maps steps to a behaviour, or to a list of them: one for each time the step comes up in a session, and the
usual one afterwards. To treat sessions differently, give a function from the session's number (from 0) to a script.

**A behaviour** is a function of the session and the usual reply; those below are ready. What follows a step depends on
what was really said: message data is read after a 354, TLS begins after a 220 to STARTTLS (bytes behind that 220 are an
injection), the session ends after `close` and `reset`, or after a 221 to QUIT.

**Certificates** are those of `tests.certificates`; a client trusts `authority()`.

While a session waits for bytes, the test can make it act: `mx.sessions[0].act(say(b"421 idle\\r\\n", close))`.
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from tests.certificates import NAME, server_context

EXTENSIONS = ("PIPELINING", "8BITMIME", "SIZE 10240000", "SMTPUTF8")
_END = b"\r\n.\r\n"
_LINGER_RESET = struct.pack("ii", 1, 0)


class Message(NamedTuple):
    """What came between the 354 and the final dot, dot-stuffed as on the wire, without the CRLF.CRLF at its end."""

    wire: bytes
    session: int
    peer: tuple[str, int]
    mail: bytes  # the MAIL command
    rcpts: tuple[bytes, ...]
    encrypted: bool
    accepted: bool  # whether the final dot was answered with 2xx; false until it is

    @property
    def content(self) -> bytes:
        """The message itself, dots unstuffed, ending in CRLF."""
        lines = (self.wire + b"\r\n").split(b"\r\n")
        return b"\r\n".join(line[1:] if line.startswith(b".") else line for line in lines)


class Over(Exception):
    """The session has ended; the text says how."""


# -- behaviours --------------------------------------------------------------------------------------------------------

Behaviour = Callable[["Session", bytes], None]


def usual(session: Session, reply: bytes) -> None:
    """What a good server says."""
    session.send(reply)


def say(data: bytes, *then: Behaviour) -> Behaviour:
    """These bytes instead, and then the other behaviours (which see them as the usual ones)."""

    def behave(session: Session, reply: bytes) -> None:
        session.send(data)
        for behaviour in then:
            behaviour(session, data)

    return behave


def twice(session: Session, reply: bytes) -> None:
    """Two replies for one command."""
    session.send(reply * 2)


def trickle(session: Session, reply: bytes) -> None:
    """One byte a segment."""
    for at in range(len(reply)):
        session.send(reply[at : at + 1])
    session.last = reply


def late(gate: threading.Event) -> Behaviour:
    """The usual reply, when the test sets the gate."""

    def behave(session: Session, reply: bytes) -> None:
        session.wait_for_gate(gate)
        session.send(reply)

    return behave


def stall(session: Session, reply: bytes) -> None:
    """Nothing, and nothing is read any more (the window closes), until the server stops."""
    session.wait_for_gate(threading.Event())


def mute(session: Session, reply: bytes) -> None:
    """No reply; reading goes on."""


def garbage(session: Session, reply: bytes) -> None:
    """A line that is no reply, with control characters, escapes and bytes that are not UTF-8."""
    session.send(b"\x00\xff\xfe\x1b[31mgarbage\x07\r\n")


def flood(session: Session, reply: bytes) -> None:
    """A line that does not end."""
    while True:
        session.send(b"250-" + b"x" * 60_000)


def close(session: Session, reply: bytes) -> None:
    """FIN. Bytes of the client's that were not read make the kernel send RST instead."""
    raise Over("closed")


def reset(session: Session, reply: bytes) -> None:
    """RST."""
    session.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    raise Over("reset")


def half_close(session: Session, reply: bytes) -> None:
    """FIN, but reading goes on to the client's end; what came is in `session.rest`."""
    socket.socket.shutdown(session.sock, socket.SHUT_WR)
    while session.receive():
        pass
    raise Over("eof")


# -- the server --------------------------------------------------------------------------------------------------------

Script = Mapping[str, Any]


class Session:
    """One accepted connection. Tests read its fields and call `act`; everything else is for behaviours.

    Attributes:
        number: which connection it is, from 0.
        peer, local: the addresses of both ends.
        commands: the command lines as they came, without the line end.
        rest: bytes that came and were not understood as commands or message data (after a half-close, before TLS).
        encrypted, server_name: whether TLS is on, and the name that the client asked for (SNI).
        client_certificate: in DER, where `prepare` had it asked for.
        resumed: its TLS session was one that an earlier connection had.
        ended: None while it runs; then `eof`, `quit`, `closed`, `reset`, `stopped`, or the error.
    """

    def __init__(self, mx: Mx, sock: socket.socket, number: int, script: Script) -> None:
        self.is_open = True
        self.mx = mx
        self.sock = sock
        self.number = number
        self.peer: tuple[str, int] = sock.getpeername()[:2]
        self.local: tuple[str, int] = sock.getsockname()[:2]
        self.commands: list[bytes] = []
        self.rest = b""
        self.encrypted = False
        self.resumed = False
        self.client_certificate: bytes | None = None
        self.server_name: str | None = None
        self.ended: str | None = None
        self.last = b""  # what was sent last: decides what follows
        self._script = script
        self._seen: dict[str, int] = {}
        self._buffer = bytearray()
        self._mail = b""
        self._rcpts: list[bytes] = []
        self._orders: queue.SimpleQueue[Behaviour] = queue.SimpleQueue()
        self._bell, self._button = socket.socketpair()
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)
        self._poll.register(sock, select.POLLIN)  # TLS will have the same descriptor

    def act(self, behaviour: Behaviour) -> None:
        """Does this as soon as the session waits for bytes of the client (at once when it is idle)."""
        self._orders.put(behaviour)
        with contextlib.suppress(OSError):  # it has ended
            self._button.send(b"!")

    # -- for behaviours

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)
        self.last = data

    def receive(self) -> bytes:
        """Waits for bytes, which go into the buffer (b"": the client's end); does what `act` orders meanwhile."""
        while not (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()):
            ready = self._poll.poll(self.mx.idle_timeout and self.mx.idle_timeout * 1000)
            if not ready:
                self.send(b"421 4.4.2 idle too long\r\n")
                raise Over("closed")
            if self._bell.fileno() not in dict(ready):
                break
            self._bell.recv(1)
            self._orders.get()(self, b"")
        data = self.sock.recv(65536)
        self._buffer += data
        return data

    def wait_for_gate(self, gate: threading.Event) -> None:
        while not gate.wait(0.02):
            if self.mx.stopping:
                raise Over("stopped")

    # -- the thread

    def run(self) -> None:
        try:
            self._serve()
        except Over as over:
            ended = str(over)
        except OSError as error:
            ended = "stopped" if self.mx.stopping else f"{type(error).__name__}: {error}"
        self.rest += bytes(self._buffer)
        self.is_open = False  # before the FIN, which others may see before this thread goes on
        for sock in (self.sock, self._bell, self._button):
            sock.close()
        self.ended = ended

    def _serve(self) -> NoReturn:
        if self.mx.implicit_tls:
            self._start_tls()
        self._step("greeting", b"220 %s ESMTP\r\n" % NAME.encode())
        while True:
            line = self._line()
            self.commands.append(line)
            verb = (line.split(None, 1) or [b""])[0].decode("ascii", "replace").lower()
            self._step(verb, self._reply_to(verb, line))
            if verb == "quit" and self.last.startswith(b"221"):
                raise Over("quit")
            if verb == "starttls" and self.last.startswith(b"220"):
                self.rest += bytes(self._buffer)
                self._buffer.clear()
                self._start_tls()
            if verb == "data" and self.last.startswith(b"354"):
                self._read_message()

    def _step(self, step: str, reply: bytes) -> None:
        self.last = b""
        behaviour = self._script.get(step, usual)
        if isinstance(behaviour, list):
            count = self._seen[step] = self._seen.get(step, 0) + 1
            behaviour = behaviour[count - 1] if count <= len(behaviour) else usual
        behaviour(self, reply)

    def _reply_to(self, verb: str, line: bytes) -> bytes:
        if verb in ("ehlo", "helo"):
            offers = [*self.mx.extensions, *(["STARTTLS"] if self.mx.starttls and not self.encrypted else [])]
            lines = [NAME, *(offers if verb == "ehlo" else [])]
            marks = ["-"] * (len(lines) - 1) + [" "]
            return "".join(f"250{mark}{text}\r\n" for mark, text in zip(marks, lines, strict=True)).encode()
        if verb == "mail":
            self._mail, self._rcpts = line, []
        elif verb == "rcpt":
            self._rcpts.append(line)
        elif verb == "rset":
            self._mail, self._rcpts = b"", []
        elif verb == "starttls" and (self.encrypted or not self.mx.starttls):
            return b"502 5.5.1 not offered\r\n"
        replies = {
            "data": b"354 End data with <CR><LF>.<CR><LF>\r\n" if self._rcpts else b"503 5.5.1 no recipient\r\n",
            "quit": b"221 2.0.0 bye\r\n",
            "starttls": b"220 2.0.0 go ahead\r\n",
        }
        known = ("mail", "rcpt", "rset", "noop")
        return replies.get(verb, b"250 2.0.0 ok\r\n" if verb in known else b"502 5.5.2 not recognised\r\n")

    def _line(self) -> bytes:
        return self._until(b"\r\n")

    def _until(self, mark: bytes) -> bytes:
        """Everything before the mark, which is swallowed."""
        start = 0
        while (at := self._buffer.find(mark, start)) < 0:
            start = max(len(self._buffer) - len(mark) + 1, 0)
            if not self.receive():
                raise Over("eof")
        found = bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]
        return found

    def _read_message(self) -> None:
        if "body" in self._script:
            if not self._buffer and not self.receive():
                raise Over("eof")
            self._step("body", b"")
        self._buffer[:0] = b"\r\n"  # the line end of DATA may be the first half of CRLF.CRLF
        wire = self._until(_END)[2:]
        message = Message(wire, self.number, self.peer, self._mail, tuple(self._rcpts), self.encrypted, False)
        with self.mx.lock:
            place = len(self.mx.messages)
            self.mx.messages.append(message)
        self._step("dot", b"250 2.0.0 queued as %d\r\n" % place)
        self.mx.messages[place] = message._replace(accepted=self.last.startswith(b"2"))

    def _start_tls(self) -> None:
        if "tls" in self._script:
            self._step("tls", b"")
        self.sock = sock = self.mx.context().wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
        if self.mx.stopping:  # what was shut down may have been the old socket, which has no descriptor any more
            raise Over("stopped")
        self.mx.shaking[sock] = self
        try:
            sock.do_handshake()
        finally:
            del self.mx.shaking[sock]
        self.encrypted, self.resumed = True, bool(sock.session_reused)
        self.client_certificate = sock.getpeercert(binary_form=True)
        with self.mx.lock:
            self.mx.handshakes += 1


class Mx:
    """The server; a context manager that ends every session and thread on leaving.

    Args:
        script: see the head of this file.
        host: the address to listen on; any of 127.0.0.0/8 or ::1.
        starttls: whether it is offered. A refusal is `script={"starttls": say(b"454 ...")}`, a broken handshake
            `{"tls": garbage}` (or `close`, `stall`), an injection `{"starttls": say(b"220 go\\r\\n250 me\\r\\n")}`.
        implicit_tls: TLS before the greeting, as on port 465.
        prepare: changes the TLS context before it is used.
        certificate: see `server_context`.
        extensions: what EHLO offers beside STARTTLS, e.g. "LIMITS MAILMAX=2".
        idle_timeout: seconds until an idle session is told 421 and closed; None: never.
        backlog: of the listener. port: 0: any.

    Attributes:
        sessions: of all connections so far, in order.
        messages: in the order in which their final dot came.
        connects, handshakes: how many connections were accepted, how many TLS handshakes finished.
    """

    def __init__(
        self,
        script: Script | Callable[[int], Script] | None = None,
        *,
        host: str = "127.0.0.1",
        starttls: bool = False,
        implicit_tls: bool = False,
        prepare: Callable[[ssl.SSLContext], object] = id,
        certificate: str = "valid",
        extensions: tuple[str, ...] = EXTENSIONS,
        idle_timeout: float | None = None,
        backlog: int = 128,
        port: int = 0,
    ) -> None:
        self.script = script or {}
        self.starttls = starttls
        self.implicit_tls = implicit_tls
        self.prepare = prepare
        self.certificate = certificate
        self.extensions = extensions
        self.idle_timeout = idle_timeout
        self.lock = threading.Lock()
        self.stopping = False
        self.sessions: list[Session] = []
        self.messages: list[Message] = []
        self.handshakes = 0
        self.shaking: dict[object, Session] = {}  # a client may know of its failure before our handshake returns
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._threads: list[threading.Thread] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=backlog)
        self.endpoint: tuple[str, int] = self._listener.getsockname()[:2]
        self.host, self.port = self.endpoint

    @property
    def connects(self) -> int:
        return len(self.sessions)

    @property
    def open(self) -> int:
        """How many connections there are, by our own count: each from its accept until we close it."""
        return sum(session.is_open for session in list(self.sessions))

    @property
    def running(self) -> int:
        """How many sessions have not ended."""
        return sum(session.ended is None for session in list(self.sessions))

    def __enter__(self) -> Mx:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the accept, which a close would not
        self._threads[0].join()
        self._listener.close()
        for session in self.sessions:
            session.act(close)
            with contextlib.suppress(OSError):
                # Beneath TLS, and awake even a send that the client does not read.
                socket.socket.shutdown(session.sock, socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join(30)
            assert not thread.is_alive(), "a session does not end"

    def context(self) -> ssl.SSLContext:
        """One for each certificate, so that sessions can be resumed."""
        with self.lock:
            context = self._contexts.get(self.certificate)
            if context is None:
                context = self._contexts[self.certificate] = server_context(self.certificate)
                context.sni_callback = self._note_server_name
                self.prepare(context)
            return context

    def _note_server_name(self, sock: object, name: str | None, _context: object) -> None:
        self.shaking[sock].server_name = name

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            number = len(self.sessions)
            script = self.script(number) if callable(self.script) else self.script
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                session = Session(self, sock, number, script)
            except OSError:  # gone already
                sock.close()
                continue
            self.sessions.append(session)
            self._start(session.run)

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self._threads.append(thread)
        thread.start()
