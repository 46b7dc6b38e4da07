"""An MTA's side of the native protocol, written from docs/protocol.md alone: nothing here comes from `proxy`.

It proves that the document is enough, and it is the client of the hostile tests: every frame can be said in any order.
Plain blocking sockets; frames are (type, list of fields), DATA and raw payloads are bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import ssl
import struct
from typing import Any

from tests.clients import TIMEOUT
from tests.program import SECRET

HELLO, CHALLENGE, AUTH, WELCOME, CHANNEL_AUTH, ERROR, GOAWAY = range(1, 8)
OPEN, OPENED, FAILED, DATA, EOF, ABORTED, END, ENDED, PROBE = range(0x10, 0x19)
PING, PONG, CERT = 0x20, 0x21, 0x22
SESSION, CHANNEL = 1, 2
Address = tuple[str, int]


class Closed(Exception):
    """The proxy closed the connection; the argument is what it had begun to say."""


class Told(Exception):
    """The proxy sent ERROR: code, message, retry, retry_after_ms."""


# -- section 3 ---------------------------------------------------------------------------------------------------------


def pack(value: Any) -> bytes:
    """MessagePack, the forms that this protocol needs; the longer ones, which any decoder must take, too."""
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return bytes((value,)) if 0 <= value < 128 else b"\xcf" + struct.pack(">Q", value)
    if isinstance(value, str):
        text = value.encode()
        return b"\xda" + struct.pack(">H", len(text)) + text
    if isinstance(value, bytes):
        return b"\xc5" + struct.pack(">H", len(value)) + value
    return b"\xdc" + struct.pack(">H", len(value)) + b"".join(map(pack, value))


def unpack(data: bytes) -> Any:
    value, rest = _unpack(data)
    assert not rest, "bytes behind the array"
    return value


def _unpack(data: bytes) -> tuple[Any, bytes]:
    kind, rest = data[0], data[1:]
    if kind < 0x80 or kind >= 0xE0:
        return (kind if kind < 0x80 else kind - 256), rest
    if 0xD0 <= kind <= 0xD3:
        size = 1 << (kind - 0xD0)
        return int.from_bytes(rest[:size], "big", signed=True), rest[size:]
    if kind in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[kind], rest
    if kind in (0xCC, 0xCD, 0xCE, 0xCF):
        size = 1 << (kind - 0xCC)
        return int.from_bytes(rest[:size], "big"), rest[size:]
    if kind & 0xE0 == 0xA0 or kind in (0xC4, 0xC5, 0xC6, 0xD9, 0xDA, 0xDB):
        wide = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}.get(kind, 0)
        size = int.from_bytes(rest[:wide], "big") if wide else kind & 0x1F
        content, rest = rest[wide : wide + size], rest[wide + size :]
        return content if 0xC4 <= kind <= 0xC6 else content.decode(), rest
    wide = {0xDC: 2, 0xDD: 4}.get(kind, 0)
    assert wide or kind & 0xF0 == 0x90, hex(kind)
    count = int.from_bytes(rest[:wide], "big") if wide else kind & 0x0F
    items, rest = [], rest[wide:]
    for _ in range(count):
        item, rest = _unpack(rest)
        items.append(item)
    return items, rest


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">IB", len(payload), kind) + payload


# -- sections 2 and 5 --------------------------------------------------------------------------------------------------


def connect(address: Address, tls: bool = True, source: str | None = None) -> tuple[socket.socket, bytes]:
    """A connection, and C, the hash of the certificate that it showed."""
    sock = socket.create_connection(address, TIMEOUT, source_address=(source, 0) if source else None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not tls:
        return sock, bytes(32)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        secure = context.wrap_socket(sock)
    except BaseException:
        sock.close()
        raise
    return secure, hashlib.sha256(secure.getpeercert(binary_form=True) or b"").digest()


def mac(secret: bytes, label: str, *parts: bytes) -> bytes:
    return hmac.digest(secret, f"greenarrow-proxy/1 {label}\0".encode() + b"".join(parts), "sha256")


class Peer:
    """One connection. A context manager."""

    def __init__(self, address: Address, tls: bool = True, source: str | None = None) -> None:
        self.sock, self.certificate = connect(address, tls, source)
        self.welcome: list[Any] = []
        self.transcript = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def say(self, kind: int, *fields: Any) -> bytes:
        """Send a frame, and return its bytes."""
        data = frame(kind, pack(list(fields)))
        self.sock.sendall(data)
        return data

    def data(self, payload: bytes) -> None:
        for at in range(0, len(payload), 65536):
            self.sock.sendall(frame(DATA, payload[at : at + 65536]))

    def raw(self) -> tuple[int, bytes]:
        """The next frame: type and payload.

        Raises:
            Closed.
        """
        header = self._exactly(5)
        length, kind = struct.unpack(">IB", header)
        assert length <= 65536
        return kind, self._exactly(length)

    def hear(self) -> tuple[int, Any]:
        """The next frame, decoded.

        Raises:
            Told: an ERROR. Closed.
        """
        kind, payload = self.raw()
        if kind == DATA:
            return kind, payload
        fields = unpack(payload)
        if kind == ERROR:
            raise Told(*fields)
        return kind, fields

    def expect(self, kind: int) -> list[Any]:
        heard, fields = self.hear()
        assert heard == kind, (hex(heard), fields)
        return fields

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                more = self.sock.recv(size - len(data))
            except OSError:
                more = b""
            if not more:
                raise Closed(data)
            data += more
        return data

    # -- the handshake

    def hello(
        self, kind: int, instance: str = "mta-1", run_id: bytes = bytes(16), versions: tuple[int, int] = (1, 1)
    ) -> None:
        """HELLO, and CHALLENGE heard."""
        self.transcript = self.say(HELLO, kind, *versions, instance, run_id, os.urandom(32))
        heard, payload = self.raw()
        if heard == ERROR:
            raise Told(*unpack(payload))
        assert heard == CHALLENGE
        assert unpack(payload)[0] == 1
        self.transcript += frame(heard, payload)

    def prove(self, secret: str = SECRET) -> list[Any]:
        """AUTH, and a WELCOME whose proof is right."""
        key = secret.encode()
        auth = self.say(AUTH, mac(key, "client", self.certificate, self.transcript))
        self.welcome = self.expect(WELCOME)
        assert self.welcome[0] == mac(key, "server", self.certificate, self.transcript, auth), "not the proxy"
        return self.welcome

    def channel_auth(self, welcome: list[Any], counter: int) -> bytes:
        """The CHANNEL_AUTH frame for the key in a session's WELCOME."""
        key_id, key = welcome[2], welcome[3]
        proof = mac(key, "channel", self.certificate, b"\1", key_id, counter.to_bytes(8, "big"))
        return frame(CHANNEL_AUTH, pack([1, key_id, counter, proof]))

    # -- a channel

    def open(self, *destinations: Address, source: str | None = "127.0.0.5", **more: Any) -> list[Any]:
        """OPEN → the fields of OPENED or FAILED, its type in front."""
        self.say_open(*destinations, source=source, **more)
        kind, fields = self.hear()
        return [kind, *fields]

    def say_open(self, *destinations: Address, source: str | None = "127.0.0.5", **more: Any) -> None:
        defaults = {"ehlo_name": None, "tls": "none", "tls_server_name": None, "tls_verify": False, "reuse": False}
        defaults |= {"throttles": [], "deadline_ms": 10_000, "smtputf8": False, "requiretls": False, "tenant": None}
        defaults |= {"fresh": False, "dialogue": False, "source_name": None, "mx": None, "domain": None}
        defaults |= {"tls_names": [], "tlsa": [], "tls_min": "", "tls_ciphers": "", "probes": False}
        assert set(more) <= set(defaults)
        self.say(OPEN, source, destinations, *(defaults | more).values())

    def opened(self, *destinations: Address, **more: Any) -> list[Any]:
        """OPEN that must work."""
        fields = self.open(*destinations, **more)
        assert fields[0] == OPENED, fields
        return fields[1:]

    def failed(self, *destinations: Address, **more: Any) -> list[Any]:
        """OPEN that must fail."""
        fields = self.open(*destinations, **more)
        assert fields[0] == FAILED, fields
        return fields[1:]

    def hear_until(self, end: bytes) -> bytes:
        """DATA, until it ends so."""
        data = b""
        while not data.endswith(end):
            kind, piece = self.hear()
            assert kind == DATA, (hex(kind), piece, data)
            data += piece
        return data

    def finish(self, keep: bool = False, messages: int = 0) -> list[Any]:
        """END → the fields of ENDED; what comes before it is discarded."""
        self.say(END, keep, messages)
        while (heard := self.hear())[0] != ENDED:
            assert heard[0] in (DATA, EOF, ABORTED, GOAWAY)
        return heard[1]

    def closed(self) -> bool:
        """Whether the proxy closes now, without another word but what an SMTP session may still say."""
        try:
            while self.hear()[0] in (DATA, EOF, ABORTED, GOAWAY, PING, CERT):
                pass
        except Closed:
            return True
        return False


def channel(address: Address, secret: str = SECRET, **more: Any) -> Peer:
    """A channel, authenticated in full."""
    return _authenticated(CHANNEL, address, secret, **more)


def session(address: Address, secret: str = SECRET, **more: Any) -> Peer:
    """A session, authenticated in full; its CERT is not read yet."""
    return _authenticated(SESSION, address, secret, **more)


def _authenticated(
    kind: int,
    address: Address,
    secret: str,
    instance: str = "mta-1",
    run_id: bytes = bytes(16),
    tls: bool = True,
    source: str | None = None,
) -> Peer:
    peer = Peer(address, tls, source)
    try:
        peer.hello(kind, instance, run_id)
        peer.prove(secret)
    except BaseException:
        peer.sock.close()
        raise
    return peer


def error_of(peer: Peer) -> str:
    """The code of the ERROR that comes now, behind what an SMTP session may still say."""
    return str(error_from(peer)[0])


def error_from(peer: Peer) -> tuple[Any, ...]:
    """All of it: code, message, retry, retry_after_ms."""
    try:
        while (heard := peer.hear())[0] in (DATA, EOF, ABORTED, PING, CERT):
            pass
    except Told as told:
        assert peer.closed()
        return told.args
    raise AssertionError(heard)


def deliver(peer: Peer, message: bytes) -> None:
    """One message on an SMTP session that is past EHLO; its bytes as they go over the wire, up to the final dot."""
    for line, code in ((b"MAIL FROM:<a@example.com>", b"250"), (b"RCPT TO:<b@example.net>", b"250"), (b"DATA", b"354")):
        peer.data(line + b"\r\n")
        assert peer.hear_until(b"\r\n").startswith(code)
    peer.data(message + b".\r\n")
    assert peer.hear_until(b"\r\n").startswith(b"250")
