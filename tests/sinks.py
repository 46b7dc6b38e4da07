"""Who receives behind the proxy: real SMTP servers on loopback addresses, and raw servers that do what a test says.

`Sink` is aiosmtpd, an SMTP server that others wrote; it keeps each message byte for byte. `Raw` gives each accepted
socket to a function of the test, in a thread. A misbehaving SMTP server with a script is `mx.Mx`.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from tests.certificates import server_context

Address = tuple[str, int]
GREETING = b"220 mx\r\n"


class Received(NamedTuple):
    """One message: its bytes with dots unstuffed, from where it came, and its envelope."""

    content: bytes
    peer: Address
    mail_from: str
    rcpt_tos: tuple[str, ...]


class Sink:
    """aiosmtpd on port 0 of `host`, or the given one; a context manager. `messages` in the order of their arrival.

    Args:
        starttls: offered, with the certificate `valid` of `certificates`.
    """

    def __init__(
        self, host: str = "127.0.0.2", size_limit: int = 64 * 1024 * 1024, port: int = 0, starttls: bool = False
    ) -> None:
        self.messages: list[Received] = []
        self.peers: list[Address] = []
        self._host = host
        self._size_limit = size_limit
        self._port = port
        self._tls = server_context("valid") if starttls else None

    def __enter__(self) -> Sink:
        # The controller asks its port by connecting to it; our own socket knows.
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.create_server((self._host, self._port), family=family)
        self.endpoint: Address = listener.getsockname()[:2]
        self._controller = _Controller(self, listener, self._size_limit, self._tls)
        self._controller.start()
        self.peers.clear()  # its own look at the port
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.stop()

    # -- aiosmtpd's hooks

    async def handle_EHLO(
        self, server: SMTP, session: Session, envelope: Envelope, hostname: str, responses: list[str]
    ) -> list[str]:
        session.host_name = hostname
        self.peers.append(session.peer[:2])
        return responses

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        content = envelope.content or b""
        assert isinstance(content, bytes)
        self.messages.append(Received(content, session.peer[:2], envelope.mail_from or "", tuple(envelope.rcpt_tos)))
        return f"250 2.0.0 kept as {len(self.messages)}"


class _Controller(Controller):
    """Serves on a socket that is bound already."""

    def __init__(self, sink: Sink, listener: socket.socket, size_limit: int, tls: ssl.SSLContext | None) -> None:
        self._listener = listener
        super().__init__(
            sink,
            *listener.getsockname()[:2],
            data_size_limit=size_limit,
            enable_SMTPUTF8=True,
            ident="sink",
            tls_context=tls,
        )

    def _create_server(self) -> Any:
        return self.loop.create_server(self._factory_invoker, sock=self._listener)


class Raw:
    """Accepts on port 0 of `host`, and runs `serve(socket)` for each connection in a thread of its own.

    A socket that `serve` leaves open stays open until the end. Attributes: `sockets`, `peers`, `errors` (what escaped
    from `serve`, OSErrors aside), all in the order of accepting.

    Args:
        serve: what to do with a connection; None: nothing, just hold it.
        receive_buffer: SO_RCVBUF of the accepted sockets, for a window that closes soon.
    """

    def __init__(
        self,
        serve: Callable[[socket.socket], object] | None = None,
        host: str = "127.0.0.2",
        receive_buffer: int = 0,
        backlog: int = 1024,
    ) -> None:
        self.sockets: list[socket.socket] = []
        self.peers: list[Address] = []
        self.errors: list[BaseException] = []
        self._serve = serve
        self._threads: list[threading.Thread] = []
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=backlog)
        if receive_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.endpoint: Address = self._listener.getsockname()[:2]

    @property
    def connects(self) -> int:
        return len(self.sockets)

    def __enter__(self) -> Raw:
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(30)
        self._listener.close()
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "a server's connection does not end"
        for sock in self.sockets:
            sock.close()
        assert not self.errors, self.errors

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                return
            self.peers.append(peer[:2])
            self.sockets.append(sock)
            if self._serve is not None:
                thread = threading.Thread(target=self._run, args=(sock,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self, sock: socket.socket) -> None:
        assert self._serve is not None
        try:
            self._serve(sock)
        except OSError:
            pass
        except BaseException as error:
            self.errors.append(error)


def echo(sock: socket.socket) -> None:
    """Send back what comes; end when the client has ended."""
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def greet(sock: socket.socket) -> None:
    """Say `220 mx` and wait for the client's end."""
    sock.sendall(GREETING)
    while sock.recv(65536):
        pass
    sock.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def closed_port(host: str = "127.0.0.2"):  # type: ignore[no-untyped-def]
    """An address on which nothing listens: bound, so that nobody else gets it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.bind((host, 0))
        yield sock.getsockname()[:2]


@contextlib.contextmanager
def deaf_port() -> Iterator[Address]:
    """An address that answers no SYN: the accept queue is full and nobody accepts."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.3", 0), backlog=0))
        for _ in range(10):
            sock = stack.enter_context(socket.socket())
            sock.settimeout(0.2)
            try:
                sock.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()
