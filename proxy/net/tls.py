"""TLS on raw sockets: a stream that never blocks.

`TlsStream` has the same shape as `PlainStream`, so that who moves bytes need not know which it holds. Waiting is the
caller's; contexts come from `contexts`.
"""

from __future__ import annotations

import contextlib
import ssl
from _socket import SHUT_WR
from collections.abc import Callable
from typing import Any, Final

from proxy.errors import NoPlaintext
from proxy.net.relay import RawSocket
from proxy.net.turns import TurnOver
from proxy.policy.turns import Turn

#: Ciphertext read or written in one call.
_CHUNK: Final = 65536
#: Plaintext given to OpenSSL in one call: four whole records.
_WRITE_CHUNK: Final = 4 * 16384
#: Records of TLS's own, and bytes of them, that are taken in one call: a key update costs 8 to 15 µs, a ticket 4.
_RECORDS_A_CALL: Final = 32
_BYTES_A_CALL: Final = 4096
#: Bytes of such records since the last byte of plaintext. Who sends more wants to keep us busy: the usual is two
#: tickets behind the handshake, and a key update every few gigabytes.
_MOST_SILENT: Final = 65536
#: The same in a handshake, which may carry a long chain of certificates.
_MOST_IN_HANDSHAKE: Final = 4 * _MOST_SILENT
_HEADER: Final = 5  # of a record (RFC 8446 section 5.1)
#: Answers to key updates that may wait for a peer who reads nothing; then nothing is read from it either.
_MOST_ANSWERS: Final = 16384
#: `_ssl.ENCODING_DER`.
_DER: Final = 2


class PlainStream:
    """A raw socket with the shape of a stream. `turn`: that of whoever serves this peer."""

    __slots__ = ("drained", "socket", "turn")

    #: Whether bytes wait here that the kernel has not taken yet.
    unsent = False

    def __init__(self, socket: RawSocket) -> None:
        self.socket = socket
        #: Whether the last `recv` took all that had come, so that an event will tell of more: nobody need try again.
        self.drained = False
        self.turn = Turn()

    def recv(self, size: int) -> bytes:
        """Up to `size` bytes; b"" at the end of the file.

        Raises:
            BlockingIOError: nothing now. OSError: the connection is broken.
            TurnOver: there is more, and nothing in it so far; no edge will tell of it.
        """
        data = self.socket.recv(size)
        self.drained = len(data) < size
        return data

    def send(self, data: bytes | memoryview) -> int:
        """Send what can be sent now; how many bytes that was.

        Raises:
            BlockingIOError: nothing now. OSError: the connection is broken.
        """
        return self.socket.send(data)

    def flush(self) -> None:
        """Nothing is ever held back here."""

    def finish(self) -> None:
        """Say that no more bytes will come.

        Raises:
            OSError: the connection is broken.
        """
        self.socket.shutdown(SHUT_WR)


def tls_reason(error: ssl.SSLError) -> str:
    """OpenSSL's word for what went wrong; the system's sentence, where it has none."""
    return str(getattr(error, "reason", None) or error.strerror)


def _here(work: Callable[[], None]) -> None:
    work()


class TlsStream:
    """TLS over a raw, non-blocking socket. See `PlainStream` for the contract.

    One `recv` may need no system call, since several records can have come in one read: so read until BlockingIOError
    before waiting for an edge. `send` takes plaintext only when no older ciphertext is held back.

    OpenSSL reads on until it has a byte of plaintext, and a peer need never send one. So it is given one record at a
    time, and only some that bring nothing in one call.

    Args:
        socket: connected; stays the caller's to close.
        tls: an object on two memory BIOs.
        session: of an earlier connection, that the peer may resume.

    Attributes:
        own_bytes: of the peer's records since the handshake that brought no plaintext: tickets, key updates.
    """

    __slots__ = (
        *(
            "_at",
            "_ciphertext",
            "_ended",
            "_in_record",
            "_incoming",
            "_outgoing",
            "_record",
            "_silent",
            "_took_all",
            "_unfed",
        ),
        *("own_bytes", "socket", "tls", "turn"),
    )

    def __init__(
        self,
        socket: RawSocket,
        context: ssl.SSLContext,
        server_side: bool,
        name: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self.socket = socket
        self.own_bytes = 0
        self.turn = Turn()
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._took_all = False  # the last read of the socket was a short one
        self._ended = False  # the peer will say nothing more
        self._unfed = memoryview(b"")  # read from the socket; from `_at` on OpenSSL has not seen it
        self._at = 0
        self._record = 0  # size of the record that it was given last, of which `_in_record` bytes are still to come
        self._in_record = 0
        self._silent = 0  # bytes of records that brought no plaintext, since the last that did
        self._ciphertext = memoryview(b"")  # read from the BIO, not yet taken by the kernel
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side, name, session)

    @property
    def drained(self) -> bool:
        return self._took_all and self._at == len(self._unfed) and not self._incoming.pending and not self.tls.pending()

    @property
    def unsent(self) -> bool:
        return bool(self._ciphertext) or self._outgoing.pending > 0

    def handshake(self, run: Callable[[Callable[[], None]], None] = _here) -> bool:
        """Go on with the handshake; whether it is done. If not, wait for the socket and call again.

        Args:
            run: calls OpenSSL, perhaps in a thread; nobody may touch this stream until it is back.

        Raises:
            ssl.SSLError: it failed, perhaps with a certificate that is not accepted.
            OSError: the connection broke or was closed in the middle.
            TurnOver: as for `recv`.
        """
        before = self._silent
        for _ in range(_RECORDS_A_CALL):
            try:
                run(self.tls.do_handshake)
            except ssl.SSLWantReadError:
                self.flush()
                self._look_for_progress(before, _MOST_IN_HANDSHAKE)
                try:
                    self._feed()
                except BlockingIOError:
                    return False
                continue
            except ssl.SSLError:
                self._flush_alert()
                raise
            self.flush()
            self._silent = self._record = 0
            return True
        raise TurnOver

    def chain(self) -> tuple[bytes, ...]:
        """The certificates that the peer has sent, in DER, its own first."""
        tls: Any = self.tls
        try:
            sent = tls.get_unverified_chain()  # from Python 3.13 on
        except AttributeError:
            sent = tls._sslobj.get_unverified_chain()
        return tuple(each if isinstance(each, bytes) else each.public_bytes(_DER) for each in sent or ())

    def recv(self, size: int) -> bytes:
        self._took_all = False  # an older read of the socket says nothing about what has come since
        before = self._silent
        records = _RECORDS_A_CALL
        if not (self._incoming.pending or self._outgoing.pending or self._ended or self.tls.pending()):
            self._feed()  # OpenSSL has nothing to give: it would only say so, by an exception
            records -= 1
        for _ in range(records):
            try:
                data = self.tls.read(size)
                self._ended = not data
                self.own_bytes += self._silent
                self._silent = self._record = 0
                return data
            except ssl.SSLWantReadError:
                if self._outgoing.pending:
                    self.flush()  # an answer to a key update
                    if self._outgoing.pending > _MOST_ANSWERS:
                        raise BlockingIOError from None
                self._look_for_progress(before, _MOST_SILENT)
                self._feed()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                # Many a receiver ends with a FIN and no close_notify. SMTP has its own ends: nothing hangs on that one.
                self._ended = True
                return b""
        raise TurnOver

    def _look_for_progress(self, before: int, most: int) -> None:
        """Count the record that OpenSSL has just had, if it has had the whole of it.

        Raises:
            TurnOver: enough for one call, which began with `before` bytes. NoPlaintext: and for good.
        """
        if self._in_record:
            return
        self._silent += self._record
        self._record = 0
        if self._silent > most:
            raise NoPlaintext
        if self._silent - before > _BYTES_A_CALL:
            raise TurnOver

    def _feed(self) -> None:
        """Give OpenSSL the next record, or as much of it as there is.

        Raises:
            BlockingIOError: nothing now. OSError: the connection is broken.
        """
        while True:
            ready = len(self._unfed) - self._at
            if not self._in_record and ready >= _HEADER:
                length = self._unfed[self._at + 3 : self._at + _HEADER]
                self._record = self._in_record = _HEADER + int.from_bytes(length, "big")
            if self._in_record and ready:
                size = min(self._in_record, ready)
                self._incoming.write(self._unfed[self._at : self._at + size])
                self._at += size
                self._in_record -= size
                return
            if not self._read_socket():
                return

    def send(self, data: bytes | memoryview) -> int:
        if self.unsent:
            self.flush()
            if self.unsent:
                raise BlockingIOError
        written = self.tls.write(data[:_WRITE_CHUNK])
        self.flush()
        return written

    def flush(self) -> None:
        """Hand ciphertext to the kernel, as much as it takes."""
        while True:
            if not self._ciphertext:
                if not self._outgoing.pending:
                    return
                self._ciphertext = memoryview(self._outgoing.read())
            try:
                sent = self.socket.send(self._ciphertext)
                self._ciphertext = self._ciphertext[sent:]
            except BlockingIOError:
                return

    def finish(self) -> None:
        """Send close_notify; TLS 1.3 lets the other direction go on, and so do we (no FIN)."""
        unread = self._incoming.read()  # unwrap looks for the peer's close_notify, and would stumble over data
        with contextlib.suppress(ssl.SSLError):
            self.tls.unwrap()
        if unread:
            self._incoming.write(unread)
        self.flush()

    def _read_socket(self) -> bool:
        """Behind what OpenSSL has not seen yet, which is less than a header; False: the end of the file."""
        data = self.socket.recv(_CHUNK)
        self._took_all = len(data) < _CHUNK
        self._unfed = memoryview(bytes(self._unfed[self._at :]) + data)
        self._at = 0
        if data:
            return True
        self._incoming.write(self._unfed)
        self._at = len(self._unfed)
        self._incoming.write_eof()
        return False

    def _flush_alert(self) -> None:
        """Tell the peer why, if it still listens."""
        with contextlib.suppress(OSError):
            self.flush()


Stream = PlainStream | TlsStream
