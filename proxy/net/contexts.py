"""TLS contexts: what may be spoken with a receiver, with another proxy, and by clients with us.

A context is built once (0.2 to 20 ms each). None of them verifies who a receiver is: see `certificates`. Which
certificate is shown is the operator's and comes from `identities`; it is handed to OpenSSL through a memfd, so that
nothing touches the disk.
"""

from __future__ import annotations

import os
import ssl
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

#: Receivers that do not know RFC 5746 (renegotiation, which we never do); `ssl` names it from Python 3.12 on.
_LEGACY_SERVER_CONNECT = 0x4
MINIMA = {
    "TLSv1": ssl.TLSVersion.TLSv1,
    "TLSv1.1": ssl.TLSVersion.TLSv1_1,
    "TLSv1.2": ssl.TLSVersion.TLSv1_2,
    "TLSv1.3": ssl.TLSVersion.TLSv1_3,
}
_OLD = frozenset({"TLSv1", "TLSv1.1"})
#: Ciphers by name, and minus or plus words of OpenSSL's; nothing that changes the level of security (@SECLEVEL).
_CIPHERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+!:")


class ClientIdentity(NamedTuple):
    """What this proxy shows to a receiver that asks for a certificate.

    Args:
        pem: certificates and key. digest: of both, to tell one from another.
    """

    pem: bytes
    digest: str

    def __repr__(self) -> str:
        return f"ClientIdentity({self.digest})"


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
        show([context], profile.identity.pem)
    return context


@lru_cache(maxsize=1)
def proven_context() -> ssl.SSLContext:
    """For TLS to another proxy, whose certificate is proven by the shared secret and not by who signed it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def server_context(minimum: ssl.TLSVersion) -> ssl.SSLContext:
    """For TLS with whoever connects to us; it has nothing to show yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = minimum
    context.num_tickets = 0  # a resumed handshake costs no less here, and channels live long
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF  # else OpenSSL sends an alert behind it, and nothing any more
    return context


def show(contexts: Iterable[ssl.SSLContext], pem: bytes) -> None:
    """Have these show certificates, the leaf first, and prove them with the key behind them."""
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        os.write(fd, pem)
        for context in contexts:
            # A key with a password is an error, not a question on the terminal.
            context.load_cert_chain(f"/proc/self/fd/{fd}", password="")
    finally:
        os.close(fd)
