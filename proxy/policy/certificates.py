"""What a receiver's certificate has to prove, and the pure half of judging it: names (RFC 6125, RFC 8461 section 4.1)
and TLSA records (RFC 6698, RFC 7671, RFC 7672).

Whether a chain leads to an authority is `net.certificates`'. Words for what was wrong are those of RFC 8460 section
4.3, so that an MTA can write them into its report as they are.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Result(enum.StrEnum):
    """Result types of RFC 8460 section 4.3; `NONE`: nothing was wrong."""

    NONE = ""
    STARTTLS_NOT_SUPPORTED = "starttls-not-supported"
    HOST_MISMATCH = "certificate-host-mismatch"
    EXPIRED = "certificate-expired"
    NOT_TRUSTED = "certificate-not-trusted"
    VALIDATION_FAILURE = "validation-failure"
    TLSA_INVALID = "tlsa-invalid"
    DNSSEC_INVALID = "dnssec-invalid"
    DANE_REQUIRED = "dane-required"


class Tlsa(NamedTuple):
    """One TLSA record (RFC 6698 section 2.1): `data` is the certificate, the key, or a digest of one of them."""

    usage: int
    selector: int
    matching: int
    data: bytes


#: Certificate usages: an authority of the receiver's own, and the receiver's own certificate. The two others lean on
#: public authorities and are of no use for SMTP (RFC 7672 section 3.1.3).
DANE_TA, DANE_EE = 2, 3
_WHOLE_CERTIFICATE, _PUBLIC_KEY = 0, 1
#: Matching type → digest; 0 is the thing itself.
_DIGESTS = {1: "sha256", 2: "sha512"}


class Demand(NamedTuple):
    """What the certificate has to prove.

    Args:
        names: host names of which it has to carry one; an IP address stands for itself; `*.example.net` for each host
            right under that domain. Without any, no name is compared.
        authority: whether an authority that we trust has to have signed it.
        tlsa: the receiver's records, by which alone it is judged if one of them is usable (RFC 7672 section 2.2).
    """

    names: tuple[str, ...] = ()
    authority: bool = False
    tlsa: tuple[Tlsa, ...] = ()

    @property
    def mandatory(self) -> bool:
        """Whether a session in clear, or with a certificate that proves nothing, is worse than none."""
        return self.authority or bool(self.tlsa)

    @property
    def binding(self) -> bool:
        """Whether there is something to prove: records that are all unusable ask for TLS alone (RFC 7672 2.2)."""
        return self.authority or bool(usable(self.tlsa))

    @property
    def word(self) -> str:
        """What a connection proved, for the pool: one that proved less never serves who demands more."""
        if not self.mandatory:
            return ""
        records = "".join(sorted(f"{r.usage} {r.selector} {r.matching} {r.data.hex()}\n" for r in self.tlsa))
        digest = hashlib.sha256("\n".join([*self.names, records]).encode()).hexdigest()[:32]
        return f"{'verify' if self.authority else 'dane'} {digest}"


def client_names(certificate: Mapping[str, Any] | None) -> list[str]:
    """The host names of a client's proven certificate, as `ssl` gives it; its common name where it has none.

    None of them is a wildcard: an instance is one. None longer than an instance's name may be.
    """
    if not certificate:
        return []
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    if not names:
        names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return [name.lower() for name in names if re.fullmatch(r"[!-~]{1,64}", name) and "*" not in name]


def usable(records: Iterable[Tlsa]) -> tuple[Tlsa, ...]:
    """Those that an SMTP client can use (RFC 7672 section 3.1): the others are as if they were not there."""
    return tuple(record for record in records if _is_usable(record))


def _is_usable(record: Tlsa) -> bool:
    if record.usage not in (DANE_TA, DANE_EE) or record.selector not in (_WHOLE_CERTIFICATE, _PUBLIC_KEY):
        return False
    if record.matching == 0:
        return bool(record.data)
    digest = _DIGESTS.get(record.matching)
    return digest is not None and len(record.data) == hashlib.new(digest).digest_size


def matches(record: Tlsa, certificate: bytes, public_key: bytes) -> bool:
    """Whether a usable record is about this certificate (both in DER; the key as SubjectPublicKeyInfo)."""
    what = certificate if record.selector == _WHOLE_CERTIFICATE else public_key
    if record.matching:
        what = hashlib.new(_DIGESTS[record.matching], what).digest()
    return hmac.compare_digest(what, record.data)


def name_fits(wanted: str, presented: str) -> bool:
    """Whether a name of the certificate is the one that is wanted.

    A `*` stands for the whole leftmost label, on either side, and for one label only (RFC 6125 section 6.4.3).
    """
    wanted, presented = _plain(wanted), _plain(presented)
    if not wanted or not presented:
        return False
    if wanted == presented:
        return True
    for pattern, name in ((presented, wanted), (wanted, presented)):
        first, _, rest = name.partition(".")
        if pattern.startswith("*.") and "." in rest and first != "*" and pattern[2:] == rest:
            return True
    return False


def _plain(name: str) -> str:
    return name.lower().removesuffix(".")
