"""`--ping`: connects to a proxy as an MTA would, and says in one line each what it found, or what is wrong.

It opens a channel and closes it again: that needs the secret like everything else, and disturbs nobody, since a channel
takes no name away from a running MTA. Plain blocking sockets; runs on the MTA's machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import NamedTuple

from proxy.errors import ConfigError, PeerError, UsageError, VersionMismatch
from proxy.protocols.native.auth import NO_CERTIFICATE, ClientHandshake, RefusedByProxy, certificate_hash
from proxy.protocols.native.messages import Kind
from proxy.settings import Settings

EX_OK, EX_UNAVAILABLE, EX_NOPERM = 0, 69, 77

DEFAULT_PORT = 807
DEFAULT_INSTANCE = "ping"
_TIMEOUT = 10.0
#: Codes with which a proxy says that it will not have us, whenever we come.
_NOT_US = frozenset({"bad_credentials", "name_in_use", "refused"})


class NoAnswer(Exception):
    """What is wrong, as one line; `exit_code` is 69 or 77."""

    def __init__(self, message: str, exit_code: int = EX_UNAVAILABLE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Target(NamedTuple):
    """Whom to ping, and as whom."""

    host: str
    port: int
    instance: str
    secret: bytes
    tls: bool

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def target(address: str, instance: str | None, settings: Settings) -> Target:
    """What the flags and the configuration mean.

    Args:
        address: a host name or IP address, perhaps with a port; IPv6 addresses in brackets.
        instance: None: one that can be proven with what is configured.

    Raises:
        UsageError: not an address. ConfigError: no secret for it.
    """
    host, port = _split(address)
    blocks = {block.name: block.auth_shared_secret for block in settings.instance if block.auth_shared_secret}
    if instance is None:
        instance = DEFAULT_INSTANCE if settings.auth_shared_secret else next(iter(blocks), DEFAULT_INSTANCE)
    secrets = blocks.get(instance) or settings.auth_shared_secret
    if not secrets:
        raise ConfigError("auth_shared_secret: --ping needs the secret that the proxy has; it stands nowhere")
    return Target(host, port, instance, secrets[0], settings.listen_tls)


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = address, str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise UsageError("--ping: not HOST, HOST:PORT or [IPv6]:PORT", "command line")
    return host, int(port)


def run(to: Target, say: Callable[[str], None], complain: Callable[[str], None]) -> int:
    """Ping once.

    Args:
        say, complain: take a line for stdout, for stderr.

    Returns:
        0: all is well; 69: no use of this proxy as things are; 77: it does not want us.
    """
    try:
        with _connect(to) as sock:
            sock.settimeout(_TIMEOUT)
            say(f"tcp: connected to {to} from {_named(sock.getsockname())}")
            stream, certificate = _start_tls(to, sock, say)
            with stream:
                _authenticate(to, stream, certificate, say)
    except NoAnswer as error:
        complain(f"greenarrow_proxy: ping {to}: {error}")
        return error.exit_code
    return EX_OK


def _connect(to: Target) -> socket.socket:
    try:
        return socket.create_connection((to.host, to.port), _TIMEOUT)
    except ConnectionRefusedError:
        raise NoAnswer("connection refused: nothing listens there, or a packet filter says so") from None
    except TimeoutError:
        raise NoAnswer("no answer to the connect: a packet filter drops it, or the address is wrong") from None
    except OSError as error:
        raise NoAnswer(f"cannot connect: {error.strerror or error}") from None


def _start_tls(to: Target, sock: socket.socket, say: Callable[[str], None]) -> tuple[socket.socket, bytes]:
    if not to.tls:
        say("tls: none (listen_tls no)")
        return sock, NO_CERTIFICATE
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the secret proves whose certificate it is
    own = sock.getsockname()[0]
    try:
        stream = context.wrap_socket(sock)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError):
        raise _closed_at_once(to, own) from None
    except TimeoutError:
        raise NoAnswer("connected, but no TLS: it does not answer; is this the native listener?") from None
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
            raise NoAnswer(
                "it does not speak TLS: the proxy has listen_tls no (then ping with --listen-tls=no), "
                "or this is not its native listener"
            ) from None
        raise NoAnswer(f"TLS failed: {error.reason or error.strerror}") from None
    certificate = certificate_hash(stream.getpeercert(binary_form=True) or b"")
    cipher = stream.cipher()
    say(f"tls: {stream.version()} {cipher[0] if cipher else ''}, certificate sha256 {certificate.hex()}")
    return stream, certificate


def _authenticate(to: Target, sock: socket.socket, certificate: bytes, say: Callable[[str], None]) -> None:
    handshake = ClientHandshake(
        Kind.CHANNEL,
        to.instance,
        to.secret,
        run_id=os.urandom(16),
        nonce=os.urandom(32),
        certificate=certificate,
    )
    own = sock.getsockname()[0]
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked_at = time.monotonic()
        sock.sendall(handshake.start())
        round_trip = 0.0
        while handshake.welcome is None:
            data = sock.recv(65536)
            if not data:
                if handshake.version or to.tls:
                    raise NoAnswer("it closed the connection during authentication")
                raise _closed_at_once(to, own)
            answer = handshake.receive(data)
            if answer:
                round_trip = time.monotonic() - asked_at
                say(f"protocol: version {handshake.version}")
                sock.sendall(answer)
    except RefusedByProxy as refusal:
        raise _refused(refusal) from None
    except VersionMismatch as error:
        raise NoAnswer(str(error)) from None
    except PeerError as error:
        if handshake.version:  # it has answered as a native listener does
            raise NoAnswer(str(error), EX_NOPERM) from None
        raise NoAnswer(f"what answers is not a native listener ({error})") from None
    except TimeoutError:
        raise NoAnswer("connected, but it does not answer; is this the native listener?") from None
    except OSError as error:
        if isinstance(error, ConnectionError) and not handshake.version and not to.tls:
            raise _closed_at_once(to, own) from None  # it closed before it read: that arrives as a reset
        raise NoAnswer(f"the connection broke: {error.strerror or error}") from None
    welcome = handshake.welcome
    say(f"authentication: the proxy knows the secret, and so do we; instance {to.instance}")
    say(f"software: {welcome.software or 'not told'}, incarnation {welcome.incarnation:08x}")
    say(f"round trip: {round_trip * 1000:.3f}ms")


def _closed_at_once(to: Target, own: str) -> NoAnswer:
    """It closed and said nothing: as it does to a stranger, and as a SOCKS5 listener does to who speaks no SOCKS5."""
    if _speaks_socks5(to):
        return NoAnswer("what answers is a SOCKS5 listener, not the native one (directive listen)")
    return NoAnswer(
        f"it closed the connection without a word: our address, {own} as seen here, is not in its allow_from, "
        "or it is not a native listener",
        EX_NOPERM,
    )


def _speaks_socks5(to: Target) -> bool:
    """Ask again in that language (RFC 1928 section 3); whether it answers in it."""
    with contextlib.suppress(OSError), socket.create_connection((to.host, to.port), _TIMEOUT) as sock:
        sock.settimeout(_TIMEOUT)
        sock.sendall(b"\x05\x02\x00\x02")
        return sock.recv(2)[:1] == b"\x05"
    return False


def _refused(refusal: RefusedByProxy) -> NoAnswer:
    """What the proxy said, and what to do about it."""
    code = refusal.error.code
    hints = {
        "bad_credentials": "; auth_shared_secret differs, or this instance has another one or other addresses there",
        "name_in_use": "; two MTAs have the same name",
    }
    text = f"the proxy says: {refusal.error.message}{hints.get(code, '')} ({code})"
    return NoAnswer(text, EX_NOPERM if code in _NOT_US else EX_UNAVAILABLE)


def _named(address: tuple[str, int]) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
