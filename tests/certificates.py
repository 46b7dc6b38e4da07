"""Certificates for tests: one authority that clients may trust, and servers of every kind of trustworthiness."""

from __future__ import annotations

import datetime
import functools
import ssl
from collections.abc import Callable

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAME = "mx.example.net"  # the name in the valid certificate


@functools.cache
def authority() -> trustme.CA:
    """The one CA that clients of a test trust: `authority().configure_trust(context)`, or its `cert_pem` in a file."""
    return trustme.CA()


def server_context(certificate: str) -> ssl.SSLContext:
    """A context for `valid`, `expired`, `wrong_name`, `unknown_ca`, `common_name_only` or `self_signed`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate == "self_signed":
        root = trustme.CA()
        with root.cert_pem.tempfile() as cert, root.private_key_pem.tempfile() as key:
            context.load_cert_chain(cert, key)
    else:
        _leaf(certificate).configure_cert(context)
    return context


def pem(certificate: str) -> bytes:
    """Key and certificate of the same names, for a program that reads a file; not `self_signed`."""
    return _leaf(certificate).private_key_and_cert_chain_pem.bytes()


@functools.cache
def _leaf(certificate: str) -> trustme.LeafCert:
    long_ago = datetime.datetime(2001, 1, 1)
    kinds: dict[str, Callable[[], trustme.LeafCert]] = {
        "valid": lambda: authority().issue_cert(NAME, "127.0.0.1", "xn--bcher-kva.example.net"),
        "common_name_only": _without_alternative_names,
        "wrong_name": lambda: authority().issue_cert("elsewhere.example.net"),
        "expired": lambda: authority().issue_cert(
            NAME, "127.0.0.1", not_before=long_ago, not_after=long_ago + datetime.timedelta(days=1)
        ),
        "unknown_ca": lambda: trustme.CA().issue_cert(NAME, "127.0.0.1"),
    }
    return kinds[certificate]()


def _without_alternative_names() -> trustme.LeafCert:
    """Signed by the authority; the name stands in the subject alone, as it did twenty years ago."""
    signer = authority()
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.load_pem_x509_certificate(signer.cert_pem.bytes())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False)
        .sign(serialization.load_pem_private_key(signer.private_key_pem.bytes(), None), hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    return trustme.LeafCert(key_pem, certificate.public_bytes(serialization.Encoding.PEM), [])
