"""TLS on raw sockets: contexts, the certificate made in memory, and a stream that never blocks.

A context is built once (0.2 to 20 ms each). A certificate that the operator did not give is made at start and handed to
OpenSSL through a memfd: nothing touches the disk. `TlsStream` has the same shape as `PlainStream`, so that who moves
bytes need not know which it holds. Waiting is the caller's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import ssl
import warnings
from _socket import SHUT_WR
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxy.net.relay import RawSocket
from proxy.net.turns import TurnOver
from proxy.policy.turns import Turn
from proxy.protocols.native.auth import certificate_hash

_T = TypeVar("_T")
#: Ciphertext read or written in one call.
_CHUNK = 65536
#: Plaintext given to OpenSSL in one call: four whole records.
_WRITE_CHUNK = 4 * 16384
#: Records of TLS's own, and bytes of them, that are taken in one call: a key update costs 8 to 15 µs, a ticket 4.
_RECORDS_A_CALL = 32
_BYTES_A_CALL = 4096
#: Bytes of such records since the last byte of plaintext. Who sends more wants to keep us busy: the usual is two
#: tickets behind the handshake, and a key update every few gigabytes.
_MOST_SILENT = 65536
#: The same in a handshake, which may carry a long chain of certificates.
_MOST_IN_HANDSHAKE = 4 * _MOST_SILENT
_HEADER = 5  # of a record (RFC 8446 section 5.1)
#: Answers to key updates that may wait for a peer who reads nothing; then nothing is read from it either.
_MOST_ANSWERS = 16384
#: Bytes of a certificate or key file; a chain has some thousands.
_LONGEST_PEM = 1 << 20
_LIFETIME = timedelta(days=3650)
#: Receivers that do not know RFC 5746 (renegotiation, which we never do); `ssl` names it from Python 3.12 on.
_LEGACY_SERVER_CONNECT = 0x4
#: `_ssl.ENCODING_DER`.
_DER = 2


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """What this proxy shows as a TLS server.

    Args:
        context: for the native listener. certificate: the SHA-256 of the leaf certificate's DER form.
        mta_context: the same for MTAs that say STARTTLS, which may be older.
        pem: certificates and key.
    """

    context: ssl.SSLContext
    certificate: bytes
    mta_context: ssl.SSLContext
    pem: bytes = field(repr=False)


def generated_identity(host_name: str, now: datetime | None = None) -> ServerIdentity:
    """A self-signed certificate (P-256) that lives in memory only; the handshake binds it to the shared secret."""
    now = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host_name[:64] or "greenarrow_proxy")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _LIFETIME)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return _identity(pem)


class UnfitIdentity(Exception):
    """The operator's certificate or key is of no use; says which file, and why.

    Attributes:
        directive: the one that names the file.
    """

    def __init__(self, directive: str, message: str) -> None:
        super().__init__(message)
        self.directive = directive


def load_identity(certificate_file: str, key_file: str) -> ServerIdentity:
    """The operator's certificate chain and key; a start, a reload and a check all come here, so they say the same.

    Raises:
        UnfitIdentity: a file cannot be read, holds something else, or the key does not fit the certificate.
    """
    return _load(_identity, certificate_file, key_file, "tls_certificate_file", "tls_private_key_file")


def _load(
    make: Callable[[bytes], _T], certificate_file: str, key_file: str, certificate_directive: str, key_directive: str
) -> _T:
    """Reads both files.

    Args:
        make: from certificates and key in PEM to what is wanted.

    Raises:
        UnfitIdentity: as `load_identity`.
    """
    certificates = _pem(certificate_directive, certificate_file, b"CERTIFICATE-----", "certificate")
    key = _pem(key_directive, key_file, b"PRIVATE KEY-----", "private key")
    if b"BEGIN ENCRYPTED PRIVATE KEY" in key or b"Proc-Type: 4,ENCRYPTED" in key:
        why = "the key has a password, and nobody is asked for it; `openssl pkey -in FILE -out NEW` takes it off"
        raise UnfitIdentity(key_directive, f"{key_file}: {why}")
    try:
        return make(certificates + b"\n" + key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            message = f"{key_file}: this key does not belong to the certificate in {certificate_file}"
            raise UnfitIdentity(key_directive, message) from None
        why = (error.reason or "not readable as PEM").replace("_", " ").lower()
    except ValueError:
        why = "not readable as PEM"
    raise UnfitIdentity(certificate_directive, f"{certificate_file} and {key_file}: {why}")


def _pem(directive: str, path: str, wanted: bytes, name: str) -> bytes:
    """A file's content, if it has in it what is wanted.

    Raises:
        UnfitIdentity: it has not, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST_PEM)
    except OSError as error:
        raise UnfitIdentity(directive, f"{path}: {error.strerror}") from None
    if wanted in content:
        return content
    swapped = b"-----BEGIN " in content and name == "certificate" and b"PRIVATE KEY-----" in content
    swapped |= name == "private key" and b"CERTIFICATE-----" in content
    other = "private key" if name == "certificate" else "certificate"
    hint = f"; it has a {other}: are the two files swapped?" if swapped else ""
    raise UnfitIdentity(directive, f"{path}: there is no {name} (PEM) in it{hint}")


def _identity(pem: bytes) -> ServerIdentity:
    """From certificates (the leaf first) and a key. Read once, so that what is shown is what was hashed."""
    contexts = [_server_context(ssl.TLSVersion.TLSv1_3), _server_context(ssl.TLSVersion.TLSv1_2)]
    leaf = x509.load_pem_x509_certificates(pem)[0]
    _show(contexts, pem)
    digest = certificate_hash(leaf.public_bytes(serialization.Encoding.DER))
    return ServerIdentity(contexts[0], digest, contexts[1], pem)


def _server_context(minimum: ssl.TLSVersion) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = minimum
    context.num_tickets = 0  # a resumed handshake costs no less here, and channels live long
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # else OpenSSL sends an alert behind it, and nothing any more
    return context


def door_context(identity: ServerIdentity, client_ca_file: str | None) -> ssl.SSLContext:
    """For the standard doors with TLS.

    Args:
        client_ca_file: authorities; a client may show a certificate of theirs.

    Raises:
        UnfitIdentity: that file is of no use.
    """
    context = _server_context(ssl.TLSVersion.TLSv1_2)
    _show([context], identity.pem)
    if client_ca_file is None:
        return context
    directive = "tls_client_ca_file"
    authorities = _pem(directive, client_ca_file, b"CERTIFICATE-----", "certificate")
    try:
        context.load_verify_locations(cadata=authorities.decode("ascii", "replace"))
    except ssl.SSLError as error:
        why = (error.reason or "not readable as PEM").replace("_", " ").lower()
        raise UnfitIdentity(directive, f"{client_ca_file}: {why}") from None
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _show(contexts: Iterable[ssl.SSLContext], pem: bytes) -> None:
    """Have these show certificates, the leaf first, and prove them with the key behind them."""
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem)
        for context in contexts:
            # A key with a password is an error, not a question on the terminal.
            context.load_cert_chain(f"/proc/self/fd/{fd}", password="")
    finally:
        os.close(fd)


class ClientIdentity(NamedTuple):
    """What this proxy shows to a receiver that asks for a certificate.

    Args:
        pem: certificates and key. digest: of both, to tell one from another.
    """

    pem: bytes
    digest: str

    def __repr__(self) -> str:
        return f"ClientIdentity({self.digest})"


def load_client_identity(certificate_file: str, key_file: str) -> ClientIdentity:
    """The operator's certificate and key towards receivers, fit for every context that may show them.

    Raises:
        UnfitIdentity: as `load_identity`.
    """

    def make(pem: bytes) -> ClientIdentity:
        identity = ClientIdentity(pem, hashlib.sha256(pem).hexdigest()[:16])
        for strict in (True, False):
            _show([client_context.__wrapped__(Profile(strict))], pem)
        return identity

    return _load(make, certificate_file, key_file, "tls_client_certificate_file", "tls_client_private_key_file")


class Profile(NamedTuple):
    """What TLS with a receiver may be.

    Args:
        strict: somebody leans on it. Else weak TLS is better than none (RFC 7435), as Postfix and Exim have it.
        minimum: the oldest version, a key of `MINIMA`; empty: what is usual. With one older than TLS 1.2 weak TLS is
            taken by whoever leans on it, too.
        ciphers: OpenSSL's words for those of TLS 1.2 and older; empty: what is usual.
        identity: what is shown to a receiver that asks; None: nothing.
    """

    strict: bool = False
    minimum: str = ""
    ciphers: str = ""
    identity: ClientIdentity | None = None


MINIMA = {
    "TLSv1": ssl.TLSVersion.TLSv1,
    "TLSv1.1": ssl.TLSVersion.TLSv1_1,
    "TLSv1.2": ssl.TLSVersion.TLSv1_2,
    "TLSv1.3": ssl.TLSVersion.TLSv1_3,
}
_OLD = frozenset({"TLSv1", "TLSv1.1"})
#: Ciphers by name, and minus or plus words of OpenSSL's; nothing that changes the level of security (@SECLEVEL).
_CIPHERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+!:")


@lru_cache(maxsize=256)
def client_context(profile: Profile) -> ssl.SSLContext:
    """For TLS to a receiver. It verifies nothing: `certificates` judges afterwards what was shown.

    Raises:
        ValueError: no such version or ciphers.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.options |= ssl.OP_NO_RENEGOTIATION  # in the middle of a write we could not read
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # as for servers
    if not profile.strict or profile.minimum in _OLD:
        context.options &= ~(ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1)
        context.options |= _LEGACY_SERVER_CONNECT
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # so old is what many receivers have
            context.minimum_version = ssl.TLSVersion.TLSv1
        context.set_ciphers("DEFAULT@SECLEVEL=0")
    if profile.minimum:
        if profile.minimum not in MINIMA:
            raise ValueError(f"{profile.minimum}: not one of {', '.join(MINIMA)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = MINIMA[profile.minimum]
    if profile.ciphers:
        try:
            if not _CIPHERS.issuperset(profile.ciphers):
                raise ssl.SSLError
            context.set_ciphers(f"{profile.ciphers}:!eNULL:!aNULL")
        except ssl.SSLError:
            raise ValueError(f"{profile.ciphers}: no ciphers that OpenSSL knows") from None
    if profile.identity is not None:
        _show([context], profile.identity.pem)
    return context


@lru_cache(maxsize=1)
def proven_context() -> ssl.SSLContext:
    """For TLS to another proxy, whose certificate is proven by the shared secret and not by who signed it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class NoPlaintext(OSError):
    """The peer sends TLS's own messages for ever, and nothing in them."""

    def __init__(self) -> None:
        super().__init__(errno.EPROTO, "too much TLS without a byte of content")


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
        *("_at", "_ciphertext", "_in_record", "_incoming", "_outgoing", "_record", "_silent", "_took_all", "_unfed"),
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
        for _ in range(_RECORDS_A_CALL):
            try:
                data = self.tls.read(size)
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
                self._ciphertext = self._ciphertext[self.socket.send(self._ciphertext) :]
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
