"""Certificates for tests: one authority that clients may trust, and servers of every kind of trustworthiness."""

from __future__ import annotations

import datetime
import functools
import ssl
from collections.abc import Callable

import trustme

NAME = "mx.example.net"  # the name in the valid certificate


@functools.cache
def authority() -> trustme.CA:
    """The one CA that clients of a test trust: `authority().configure_trust(context)`, or its `cert_pem` in a file."""
    return trustme.CA()


def server_context(certificate: str) -> ssl.SSLContext:
    """A context for `valid`, `expired`, `wrong_name`, `unknown_ca` or `self_signed`."""
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
        "valid": lambda: authority().issue_cert(NAME, "127.0.0.1"),
        "wrong_name": lambda: authority().issue_cert("elsewhere.example.net"),
        "expired": lambda: authority().issue_cert(
            NAME, "127.0.0.1", not_before=long_ago, not_after=long_ago + datetime.timedelta(days=1)
        ),
        "unknown_ca": lambda: trustme.CA().issue_cert(NAME, "127.0.0.1"),
    }
    return kinds[certificate]()
