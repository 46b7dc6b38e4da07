"""From a configured server to a `Link` that is logged in: name, connect, TLS, AUTH, database, what it says of itself.

Every step has words for what may be wrong with it. Names are looked up in real threads, so that a DNS that hangs stops
nobody. RESP2 is spoken (no HELLO): nothing of ours needs more, every engine and every proxy before one knows it, and
servers say nothing unasked in it.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gevent import Timeout

from proxy.errors import Overloaded
from proxy.net.apart import Apart, for_receivers
from proxy.net.conversation import shake_hands, watch_over
from proxy.net.identities import StoreTls
from proxy.net.relay import IPPROTO_TCP, TCP_NODELAY, Engine, RawSocket, keep_alive
from proxy.net.tls import PlainStream, Stream, TlsStream
from proxy.settings import StoreSettings
from proxy.store.link import Link
from proxy.store.servers import Server, Trouble, info_fields, server_of
from proxy.store.wire import ErrorReply, command

#: Seconds for all of it with one server.
WITHIN = 3.0
#: Of them for a handshake: who speaks no TLS may wait for more.
_HANDSHAKE = 2.0
#: What we are called in CLIENT LIST.
NAME = b"greenarrow_proxy"
#: What is asked of a server, at first and now and then.
INFO = [command(b"INFO", section) for section in (b"server", b"replication", b"memory")]
#: Seconds after which the kernel gives up a server that acknowledges nothing.
_KEEP_ALIVE = 10.0
_STREAM = socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
#: For names: a resolver that hangs keeps these, and nothing else.
_threads = Apart(2)

Address = tuple[int, Any]  # family, what connect() takes


class Credentials(NamedTuple):
    """How to log in; nobody: not at all."""

    user: str | None = None
    password: str | None = None

    def __repr__(self) -> str:
        return "Credentials(…)"

    @property
    def secrets(self) -> list[str]:
        """What must not be shown."""
        return [self.password] if self.password else []

    @property
    def command(self) -> list[bytes]:
        if self.password is None:
            return []
        words = [self.password.encode()] if self.user is None else [self.user.encode(), self.password.encode()]
        return [command(b"AUTH", *words)]


class Dialler(NamedTuple):
    """How servers are reached.

    Args:
        context: of TLS; None: in clear.
        clock: nanoseconds of CLOCK_BOOTTIME.
    """

    engine: Engine
    context: ssl.SSLContext | None
    credentials: Credentials
    database: int
    clock: Callable[[], int]

    def reach(self, server: tuple[str, int] | str) -> Link:
        """Connected, with TLS if wanted, not logged in. A text is the path of a socket.

        Raises:
            Trouble: step `resolve`, `connect` or `tls`.
        """
        where = name_of(server)
        trouble: Trouble | None = None
        for address in _addresses(server, where):
            try:
                stream = self._stream(address, server, where)
                return Link(self.engine, stream, where, self.clock, self.credentials.secrets)
            except Trouble as failed:
                trouble = trouble or failed
        raise trouble or Trouble("resolve", where, "the name has no address")

    def log_in(self, link: Link) -> Server:
        """AUTH, database, and what it is.

        Raises:
            Trouble: step `auth`, `select` or `info`.
        """
        login = self.credentials.command
        select = [command(b"SELECT", self.database)] if self.database else []
        told = [command(b"CLIENT", b"SETNAME", NAME), command(b"PING")]
        replies = link.ask([*login, *select, *told, *INFO], WITHIN, "login")
        if login and isinstance(reply := replies.pop(0), ErrorReply):
            raise link.refusal("auth", reply)
        if select and isinstance(reply := replies.pop(0), ErrorReply):
            raise link.refusal("auth" if reply.code == "NOAUTH" else "select", reply)
        _, ping, *sections = replies
        if isinstance(ping, ErrorReply) and ping.code in ("NOAUTH", "LOADING"):
            raise link.refusal("auth" if ping.code == "NOAUTH" else "info", ping)
        return read_info(link, sections)

    def connect(self, server: tuple[str, int] | str) -> tuple[Link, Server]:
        """Reached and logged in, all of it `WITHIN`.

        Raises:
            Trouble: why not.
        """
        where, link = name_of(server), None
        timer = Timeout.start_new(WITHIN)
        try:
            link = self.reach(server)
            found = self.log_in(link), link
        except BaseException as error:
            step = "connect" if link is None else "login"
            trouble = error if isinstance(error, Trouble) else Trouble(step, where, f"no answer within {WITHIN:g} s")
            if link is not None:
                link.close(trouble)
            if error is timer:
                raise trouble from None
            raise
        finally:
            timer.close()
        return found[1], found[0]

    def _stream(self, address: Address, server: tuple[str, int] | str, where: str) -> Stream:
        family, target = address
        sock = _socket(family, where)
        try:
            _connect(self.engine, sock, target, where)
            if family != socket.AF_UNIX:
                sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
                keep_alive(sock, _KEEP_ALIVE)
            if self.context is None:
                return PlainStream(sock)
            stream = TlsStream(sock, self.context, server_side=False, name=server[0])
            stream.turn.key = where
            _shake(self.engine, stream, where)
            return stream
        except BaseException:
            self.engine.close(sock)
            raise


def dialler_of(engine: Engine, settings: StoreSettings, tls: StoreTls | None, clock: Callable[[], int]) -> Dialler:
    """How the servers of a store are reached."""
    context = tls.context if tls is not None else None
    return Dialler(engine, context, Credentials(settings.user, settings.password), settings.database, clock)


def towards_sentinels(dialler: Dialler, settings: StoreSettings) -> Dialler:
    """How its Sentinels are: they are told their own password, else what the server is told."""
    own = settings.sentinel_password
    return dialler if own is None else dialler._replace(credentials=Credentials(None, own))


def name_of(server: tuple[str, int] | str) -> str:
    """As messages say it."""
    if isinstance(server, str):
        return server
    host, port = server
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_info(link: Link, sections: Sequence[Any]) -> Server:
    """The answers to `INFO`.

    Raises:
        Trouble: they are none.
    """
    fields: dict[str, str] = {}
    for section in sections:
        if not isinstance(section, bytes):
            raise link.refusal("info", section)
        fields |= info_fields(section)
    server = server_of(fields)
    if server.mode == "sentinel":
        raise Trouble("role", link.where, "it is a Sentinel: write redis+sentinel://HOST/SERVICE")
    if not server.role or not (server.run_id or server.replication_id):
        raise Trouble("info", link.where, "INFO says no role, or no run_id: is this Valkey or Redis?")
    return server


def _addresses(server: tuple[str, int] | str, where: str) -> list[Address]:
    if isinstance(server, str):
        return [(socket.AF_UNIX, server)]
    host, port = server
    try:
        flags = socket.AI_NUMERICHOST
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror:
        try:
            found = _threads.call(host, socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
        except OSError as error:
            raise Trouble("resolve", where, error.strerror or "the name has no address") from None
    return [(family, address) for family, _, _, _, address in found]


def _socket(family: int, where: str) -> RawSocket:
    try:
        return RawSocket(family, _STREAM, 0)
    except OSError as error:
        raise Trouble("connect", where, os.strerror(error.errno or 0), error.errno or 0) from None


def _connect(engine: Engine, sock: RawSocket, target: Any, where: str) -> None:
    number = sock.connect_ex(target)
    try:
        watch_over(engine, sock)
    except Overloaded as error:
        raise Trouble("connect", where, str(error)) from None
    while number in (errno.EINPROGRESS, errno.EALREADY):
        engine.wait(sock.fileno())
        number = sock.connect_ex(target)
    if number not in (0, errno.EISCONN):
        raise Trouble("connect", where, os.strerror(number), number)


def _shake(engine: Engine, stream: TlsStream, where: str) -> None:
    timer = Timeout.start_new(_HANDSHAKE)
    try:
        shake_hands(engine, stream, for_receivers())
    except Timeout as fired:
        if fired is not timer:
            raise
        raise Trouble("tls", where, f"no handshake within {_HANDSHAKE:g} s") from None
    except ssl.SSLCertVerificationError as error:
        raise Trouble("tls", where, f"its certificate is not accepted: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise Trouble("tls", where, f"TLS: {error.reason or error.strerror or 'it failed'}") from None
    except OSError as error:
        number = error.errno or 0
        raise Trouble("tls", where, os.strerror(number) if number else "closed in the handshake", number) from None
    finally:
        timer.close()
