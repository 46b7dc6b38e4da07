"""What the proxy shows of itself in TLS: the operator's certificates and keys, or one made in memory at start.

A file that is of no use is `UnfitIdentity`, with words for the operator; a start, a reload and a check all come here,
so they say the same. What TLS may be besides is `contexts`'.
"""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxy.net.contexts import ClientIdentity, Profile, client_context, server_context, show
from proxy.protocols.native.auth import certificate_hash

_T = TypeVar("_T")
#: Bytes of a certificate or key file; a chain has some thousands.
_LONGEST_PEM = 1 << 20
_LIFETIME = timedelta(days=3650)


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
    return identity_of(pem)


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
    return _load(identity_of, certificate_file, key_file, "tls_certificate_file", "tls_private_key_file")


def load_client_identity(certificate_file: str, key_file: str) -> ClientIdentity:
    """The operator's certificate and key towards receivers, fit for every context that may show them.

    Raises:
        UnfitIdentity: as `load_identity`.
    """

    def make(pem: bytes) -> ClientIdentity:
        identity = ClientIdentity(pem, hashlib.sha256(pem).hexdigest()[:16])
        for strict in (True, False):
            show([client_context.__wrapped__(Profile(strict))], pem)
        return identity

    return _load(make, certificate_file, key_file, "tls_client_certificate_file", "tls_client_private_key_file")


def door_context(identity: ServerIdentity, client_ca_file: str | None) -> ssl.SSLContext:
    """For the standard doors with TLS.

    Args:
        client_ca_file: authorities; a client may show a certificate of theirs.

    Raises:
        UnfitIdentity: that file is of no use.
    """
    context = server_context(ssl.TLSVersion.TLSv1_2)
    show([context], identity.pem)
    if client_ca_file is None:
        return context
    _trust(context, "tls_client_ca_file", client_ca_file)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


@dataclass(frozen=True, slots=True)
class StoreTls:
    """What TLS to the throttle store is.

    Args:
        digest: of what is trusted and shown; two with the same one are the same.
    """

    context: ssl.SSLContext = field(compare=False, repr=False)
    digest: str


def store_tls(ca_file: str | None, certificate_file: str | None, key_file: str | None) -> StoreTls:
    """For TLS to the throttle store, whose certificate has to be one of its name.

    Args:
        ca_file: authorities; None: those of the system.
        certificate_file, key_file: what is shown, since such servers usually want to see one; None: nothing.

    Raises:
        UnfitIdentity: a file is of no use.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    digest = hashlib.sha256()
    if ca_file is None:
        context.load_default_certs()
    else:
        digest.update(_trust(context, "throttle_store_tls_ca_file", ca_file))
    if certificate_file is not None and key_file is not None:

        def make(pem: bytes) -> bytes:
            show([context], pem)
            return pem

        directives = ("throttle_store_tls_certificate_file", "throttle_store_tls_private_key_file")
        digest.update(_load(make, certificate_file, key_file, *directives))
    return StoreTls(context, digest.hexdigest())


def _trust(context: ssl.SSLContext, directive: str, path: str) -> bytes:
    """Have it trust the authorities in a file; what is in the file.

    Raises:
        UnfitIdentity: the file is of no use.
    """
    authorities = _pem(directive, path, b"CERTIFICATE-----", "certificate")
    try:
        context.load_verify_locations(cadata=authorities.decode("ascii", "replace"))
    except ssl.SSLError as error:
        why = str(getattr(error, "reason", None) or "not readable as PEM").replace("_", " ").lower()
        raise UnfitIdentity(directive, f"{path}: {why}") from None
    return authorities


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
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            message = f"{key_file}: this key does not belong to the certificate in {certificate_file}"
            raise UnfitIdentity(key_directive, message) from None
        why = str(getattr(error, "reason", None) or "not readable as PEM").replace("_", " ").lower()
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


def identity_of(pem: bytes) -> ServerIdentity:
    """From certificates (the leaf first) and a key. Read once, so that what is shown is what was hashed."""
    contexts = [server_context(ssl.TLSVersion.TLSv1_3), server_context(ssl.TLSVersion.TLSv1_2)]
    leaf = x509.load_pem_x509_certificates(pem)[0]
    show(contexts, pem)
    digest = certificate_hash(leaf.public_bytes(serialization.Encoding.DER))
    return ServerIdentity(contexts[0], digest, contexts[1], pem)
