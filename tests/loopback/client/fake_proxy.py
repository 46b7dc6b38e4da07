"""The proxy's side of the native protocol, played by threads, for tests of the client library.

It knows the protocol through `ServerHandshake` and the codec only, and does what a test tells it to: how OPENs are
answered, and what the receiver behind them says. All that came is kept in lists for the test to look at.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable

import trustme

from proxy.errors import PeerError, ProxyError
from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from proxy.protocols.native.auth import NO_CERTIFICATE, ChannelKey, ServerHandshake, certificate_hash

SECRET = b"correct horse battery staple, 32+"
DESTINATION = ("198.51.100.7", 25)
INCARNATION = 0x0543B19C


def opened(reused: bool = False, **fields: object) -> m.Opened:
    return m.Opened(
        reused,
        m.Address(*DESTINATION),
        m.Address("192.0.2.1", 40112),
        greeting=b"220 mx.example.net ESMTP",
        ehlo=[b"mx.example.net", b"SIZE 1000000", b"8BITMIME", b"AUTH PLAIN"],
        **fields,
    )


class Receiver:
    """An SMTP server after EHLO, in memory. `replies`: for verbs that shall be answered otherwise."""

    def __init__(self, replies: dict[str, bytes] | None = None, greets_with: list[bytes] | None = None) -> None:
        self.replies = replies or {}
        self.greets_with = greets_with or []  # frames, sent unasked
        self.lines: list[bytes] = []
        self.messages: list[bytes] = []
        self._buffer = b""
        self._body: bytes | None = None

    def feed(self, data: bytes) -> list[bytes]:
        """Frames to answer with."""
        self._buffer += data
        out: list[bytes] = []
        while b"\r\n" in self._buffer:
            line, self._buffer = self._buffer.split(b"\r\n", 1)
            out += self._line(line)
        return out

    def _line(self, line: bytes) -> list[bytes]:
        if self._body is not None:
            if line != b".":
                self._body += line + b"\r\n"
                return []
            self.messages.append(self._body)
            self._body = None
            return [native.encode_data(b"250 2.0.0 queued\r\n")]
        self.lines.append(line)
        verb = line.split(b" ")[0].upper().decode()
        if verb in self.replies:
            return [self.replies[verb]]
        if verb == "DATA":
            self._body = b""
            return [native.encode_data(b"354 go ahead\r\n")]
        if verb == "QUIT":
            return [native.encode_data(b"221 bye\r\n"), native.encode(m.Eof())]
        return [native.encode_data(b"250 ok\r\n")]


class Dead(Receiver):
    """A shared connection that has died: says its last frames whatever it is asked, then nothing."""

    def __init__(self, *last_words: bytes) -> None:
        super().__init__(greets_with=list(last_words))

    def feed(self, data: bytes) -> list[bytes]:
        self.lines.append(data)
        return []


class FakeProxy:
    """Listens on 127.0.0.1. `with FakeProxy() as proxy: Session(proxy.address, …)`."""

    def __init__(self, tls: bool = True, announce: bool = True) -> None:
        self.announce = announce  # send CERT
        self.secrets: list[bytes] = [SECRET]
        self.answers: deque[m.Opened | m.Failed | Callable[[m.Open], bytes | None]] = deque()
        self.receivers: deque[Receiver] = deque()
        self.opens: list[m.Open] = []
        self.ends: list[m.End] = []
        self.entered: list[tuple[m.Kind, bool]] = []  # kind, in one flight
        self.runs: list[bytes] = []
        self.session_messages: list[m.Message] = []
        self.welcome_session: Callable[[Conn], None] | None = None
        self.answers_pings = True
        self.sessions: list[Conn] = []
        self.channels: list[Conn] = []
        self.keys: dict[bytes, ChannelKey] = {}
        self.refuse: ProxyError | None = None  # whoever authenticates
        self.context: ssl.SSLContext | None = None
        self.certificate = NO_CERTIFICATE
        if tls:
            self.new_certificate()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._threads: list[threading.Thread] = []
        self._closing = False

    def new_certificate(self) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("proxy.invalid")
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.num_tickets = 0
        issued.configure_cert(self.context)
        der = ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())
        self.certificate = certificate_hash(der)

    def __enter__(self) -> FakeProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop_all()
        for thread in list(self._threads):
            thread.join(30)
            assert not thread.is_alive(), "a thread of the fake proxy hangs"

    def drop_all(self) -> None:
        for conn in [*self.sessions, *self.channels]:
            conn.close()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        conn = None
        try:
            with contextlib.suppress(OSError, PeerError):
                certificate = self.certificate
                if self.context is not None:
                    sock = self.context.wrap_socket(sock, server_side=True)
                conn = Conn(self, sock, certificate)
                conn.serve()
        finally:
            sock.close()


class Conn:
    """One connection at the fake proxy."""

    def __init__(self, proxy: FakeProxy, sock: socket.socket, certificate: bytes) -> None:
        self.proxy = proxy
        self.sock = sock
        self._certificate = certificate
        self._handshake = ServerHandshake(
            lambda instance: proxy.secrets, proxy.keys.get, nonce=os.urandom(32), certificate=certificate
        )

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(frames))

    def serve(self) -> None:
        try:
            while self._handshake.peer is None:
                data = self.sock.recv(65536)
                if not data:
                    return
                self.sock.sendall(self._handshake.receive(data))
            if self.proxy.refuse is not None:
                raise self.proxy.refuse
        except ProxyError as error:
            self.send(native.error_frame(error))
            return
        peer = self._handshake.peer
        self.proxy.entered.append((peer.kind, peer.one_flight))
        self.proxy.runs.append(peer.run_id)
        if peer.kind is m.Kind.SESSION:
            self._session()
        else:
            self._channel()

    def _frames(self):
        decoder = self._handshake.decoder
        while True:
            while (frame := decoder.next_frame()) is not None:
                yield frame
            data = self.sock.recv(65536)
            if not data:
                return
            decoder.receive(data)

    def _session(self) -> None:
        proxy, peer = self.proxy, self._handshake.peer
        key_id, key = b"", b""
        if proxy.context is not None:
            key_id, key = os.urandom(8), os.urandom(32)
            proxy.keys[key_id] = ChannelKey(peer.instance, peer.run_id, peer.version, key)
        proxy.sessions.append(self)  # before the client can know of it
        self.send(self._handshake.welcome(INCARNATION, key_id=key_id, key=key))
        if proxy.announce and proxy.context is not None:
            self.send(native.encode(s.Cert(INCARNATION, [proxy.certificate])))
        if proxy.welcome_session is not None:
            proxy.welcome_session(self)
        for frame in self._frames():
            message = native.decode(frame, native.SESSION_FROM_CLIENT)
            proxy.session_messages.append(message)
            if isinstance(message, s.Ping) and proxy.answers_pings:
                self.send(native.encode(s.Pong(message.incarnation, message.t, 0)))
            if isinstance(message, s.Bye):
                return

    def _channel(self) -> None:
        proxy = self.proxy
        proxy.channels.append(self)
        if not self._handshake.peer.one_flight:
            self.send(self._handshake.welcome(INCARNATION))
        receiver: Receiver | None = None
        for frame in self._frames():
            if frame[0] == native.DATA:
                assert receiver is not None
                self.send(*receiver.feed(bytes(frame[1])))
                continue
            message = native.decode(frame, native.CHANNEL_FROM_CLIENT)
            if isinstance(message, m.Open):
                proxy.opens.append(message)
                answer = proxy.answers.popleft() if proxy.answers else opened()
                if callable(answer):
                    data = answer(message)
                    if data is None:
                        return
                    self.send(data)
                    continue
                self.send(native.encode(answer))
                if isinstance(answer, m.Opened):
                    receiver = proxy.receivers.popleft() if proxy.receivers else Receiver()
                    self.send(*receiver.greets_with)
            elif isinstance(message, m.End):
                proxy.ends.append(message)
                receiver = None
                self.send(native.encode(m.Ended(message.keep, "kept" if message.keep else "not_offered")))
            else:
                self.send(native.encode(m.Eof()))  # EOF: the receiver closes, too
