"""One authenticated connection to the proxy: TCP, TLS, proof, frames; blocking, usable by several threads.

TLS runs over memory buffers with a lock around each step and not over `ssl.SSLSocket`: that one must not be read and
written by two threads at once. What the frames mean is `session`'s and `channel`'s business.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from greenarrow_proxy_client.errors import ProxyRejected, ProxyUnavailable
from proxy.errors import PeerError
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.protocols.native.auth import NO_CERTIFICATE, ClientHandshake, RefusedByProxy, certificate_hash

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

_CHUNK = 65536
_RESET = struct.pack("ii", 1, 0)
#: linux/sockios.h: bytes that were not sent yet, those that were not acknowledged not counted.
_SIOCOUTQNSD = 0x894B


@dataclass(frozen=True, slots=True)
class Account:
    """How to reach the proxy, and who we are.

    Args:
        address: the proxy's host (name or IP address) and port.
        secret: the shared secret.
        instance: this MTA's name.
        run_id: 16 random bytes, drawn once for each `Session`.
        timeout: seconds for connecting and authenticating, and for sending when the proxy does not read.
        context: None: no TLS.
    """

    address: tuple[str, int]
    secret: bytes
    instance: str
    run_id: bytes
    timeout: float
    context: ssl.SSLContext | None = field(repr=False)


def _unsent_bytes(sock: socket.socket) -> int:
    """Bytes that were given to the kernel and not yet sent; 0 where there is no such question (Linux has it)."""
    if fcntl is None or not sys.platform.startswith("linux"):
        return 0
    try:
        return int.from_bytes(fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD, bytes(4)), sys.byteorder)
    except (OSError, ValueError):  # it is closed
        return 0


def tls_context() -> ssl.SSLContext:
    """For a proxy whose certificate is proven by the shared secret and not by who signed it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class Wire:
    """Bytes over TCP, in clear."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.certificate = NO_CERTIFICATE
        self._writing = threading.Lock()
        self._stuck = False

    def read(self, timeout: float | None) -> bytes:
        """At most 64 KB; b"" when the proxy has closed.

        Raises:
            TimeoutError: nothing came within `timeout` seconds. OSError: the connection broke.
        """
        wait_readable(self.sock, timeout)
        return self.sock.recv(_CHUNK)

    def write(self, data: bytes) -> None:
        """Send everything.

        Raises:
            OSError: the connection broke or takes nothing; it is of no use any more.
        """
        with self._writing:
            self._send(data)

    def _send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError:
            self._stuck = True
            raise

    @property
    def unsent(self) -> bool:
        """Whether the proxy takes no more: bytes lie in our kernel, or a write did not come to its end."""
        return self._stuck or _unsent_bytes(self.sock) > 0

    def close(self) -> None:
        """Close; whoever waits in `read` wakes up. A second time does nothing.

        With bytes unsent it is a reset: else the kernel would go on trying to bring them to somebody who takes nothing,
        and the proxy would hold the receiver's connection, and its place, for minutes.
        """
        with contextlib.suppress(OSError):
            if self.unsent:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class TlsWire(Wire):
    """Bytes over TLS."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, deadline: float) -> None:
        super().__init__(sock)
        self._state = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)
        while not self._step(self._tls.do_handshake):
            self._feed(deadline - time.monotonic())
        self.certificate = certificate_hash(self._tls.getpeercert(binary_form=True) or b"")

    def read(self, timeout: float | None) -> bytes:
        received: list[bytes] = []
        try:
            while not self._step(lambda: received.append(self._tls.read(_CHUNK))):
                self._feed(timeout)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return b""  # what was cut short is told by the frames
        return received[0]

    def write(self, data: bytes) -> None:
        with self._writing:
            for at in range(0, len(data), _CHUNK):
                with self._state:
                    self._tls.write(data[at : at + _CHUNK])
                    ciphertext = self._outgoing.read()
                self._send(ciphertext)

    def _step(self, call: Callable[[], Any]) -> bool:
        """One step of the TLS machine; False: it wants more from the peer."""
        done = True
        with self._state:
            try:
                call()
            except ssl.SSLWantReadError:
                done = False
        if self._outgoing.pending:
            with self._writing:
                with self._state:
                    ciphertext = self._outgoing.read()
                self._send(ciphertext)
        return done

    def _feed(self, timeout: float | None) -> None:
        wait_readable(self.sock, timeout)
        data = self.sock.recv(_CHUNK)
        with self._state:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()


def wait_readable(sock: socket.socket, timeout: float | None) -> None:
    """Wait for something to read. Not by the socket's own timeout: that one is for writing.

    Raises:
        TimeoutError: nothing came. ConnectionResetError: another thread has closed it.
    """
    fd = sock.fileno()
    if fd < 0:
        raise ConnectionResetError("closed on this side")
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(None if timeout is None else max(0.0, timeout * 1000)):
        raise TimeoutError("timed out")


class Link:
    """A connection on which the proxy is known to be the proxy, or will be by its certificate.

    Attributes:
        certificate: SHA-256 of the certificate that it showed, `NO_CERTIFICATE` without TLS.
        welcome: what the proxy said after authentication in full; None before.
    """

    def __init__(self, account: Account) -> None:
        """Connect; TLS is up afterwards, nobody has proven anything.

        Raises:
            ProxyUnavailable: it cannot be reached.
        """
        self._account = account
        self._deadline = time.monotonic() + account.timeout
        self.welcome: m.Welcome | None = None
        self.version = frames.VERSIONS[1]
        self.decoder = frames.FrameDecoder()
        try:
            sock = socket.create_connection(account.address, timeout=account.timeout)
        except OSError as error:
            raise unavailable(account, error) from None
        try:
            _set_options(sock)
            self._wire = TlsWire(sock, account.context, self._deadline) if account.context else Wire(sock)
        except OSError as error:
            sock.close()
            raise unavailable(account, error) from None
        self.certificate = self._wire.certificate

    def authenticate(self, kind: m.Kind) -> m.Welcome:
        """Prove who we are, and see it proven who the proxy is.

        Raises:
            ProxyRejected: it does not want us. ProxyUnavailable: it is gone, or it is not the proxy.
        """
        account = self._account
        handshake = ClientHandshake(
            kind,
            account.instance,
            account.secret,
            run_id=account.run_id,
            nonce=os.urandom(32),
            certificate=self.certificate,
        )
        out = handshake.start()
        try:
            while True:
                if out:
                    self._wire.write(out)
                data = self._wire.read(self._deadline - time.monotonic())
                if not data:
                    raise ConnectionResetError("closed during authentication")
                out = handshake.receive(data)
                if handshake.welcome is not None:
                    break
        except RefusedByProxy as error:
            self.close()
            raise ProxyRejected(error.error) from None
        except (OSError, PeerError) as error:
            self.close()
            raise unavailable(account, error) from None
        self.welcome, self.version, self.decoder = handshake.welcome, handshake.version, handshake.decoder
        return handshake.welcome

    def next_frame(self, timeout: float | None) -> frames.Frame | None:
        """The next frame; None when the proxy has closed.

        Raises:
            TimeoutError: it did not come within `timeout` seconds; frames stay whole, call again.
            OSError, PeerError: the connection is of no use any more.
        """
        while (frame := self.decoder.next_frame()) is None:
            data = self._wire.read(timeout)
            if not data:
                return None
            self.decoder.receive(data)
        return frame

    def send(self, data: bytes) -> None:
        """Send whole frames.

        Raises:
            OSError: the connection is of no use any more.
        """
        self._wire.write(data)

    @property
    def unsent(self) -> bool:
        """Whether the proxy takes no more of what was sent."""
        return self._wire.unsent

    def limit_sending(self, timeout: float | None) -> None:
        """Seconds that one `send` of at most a frame may take from now on; None: any time."""
        self._wire.sock.settimeout(timeout)

    def close(self) -> None:
        """Close; whoever waits for a frame wakes up. A second time does nothing."""
        self._wire.close()


def _set_options(sock: socket.socket) -> None:
    """Small frames at once; a proxy that is gone without a word is noticed after two minutes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def unavailable(account: Account, error: Exception) -> ProxyUnavailable:
    """The failure to tell for a connection that did not come about, or broke."""
    host, port = account.address
    return ProxyUnavailable(f"proxy {host}:{port}: {error}", getattr(error, "errno", None) or 0)
