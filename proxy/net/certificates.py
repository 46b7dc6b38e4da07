"""Judges the certificates that a receiver shows: the chain by OpenSSL, names and TLSA records by `policy.certificates`.

The handshake itself verifies nothing: so TLS that was only welcome can be judged as well, without failing, and what was
demanded is judged by the same code (RFC 7672 asks for judgements that a handshake's own cannot make). A verdict costs
up to 0.25 ms, more with long keys, so each distinct chain is judged once in a while, in a thread (`apart`).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import ssl
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any, Literal, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PSS, PKCS1v15
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import crypto

from proxy.net.apart import for_receivers
from proxy.policy.certificates import DANE_EE, DANE_TA, Demand, Result, Tlsa, matches, name_fits, usable

#: Certificates of a chain that are looked at; bytes of all of them together.
MOST_CERTIFICATES = 10
MOST_BYTES = 65_536
#: Verdicts that are remembered, and for how many seconds: a certificate expires in the meantime, but not by much.
_MOST_REMEMBERED = 1024
_REMEMBERED = 300.0
#: Bits of a key that count as proof where the operator's OpenSSL says nothing else (its level 2, 112 bits).
_LEAST_RSA, _LEAST_EC = 2048, 224
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")
#: Files of authorities, and bytes of each, that are read.
_MOST_FILES = 1000
_LONGEST_FILE = 16 << 20
#: OpenSSL's X509_V_ERR_…: expired; and nobody known has signed it.
_EXPIRED = 10
_UNKNOWN = frozenset({2, 18, 19, 20, 21, 27})


class Verdict(NamedTuple):
    """What a chain proves.

    Args:
        verified: all that was demanded; where nothing was, what would have been usual: an authority and the name.
        result: what is wrong, or `NONE`.
        why: the same for people; `ok` if nothing is.
        by: `dane`, `authority`, or empty when not verified.
        key: of the leaf, `RSA 2048`. subject: of the leaf, as RFC 4514 writes it.
    """

    verified: bool
    result: Result
    why: str
    by: Literal["", "authority", "dane"] = ""
    key: str = ""
    subject: str = ""


class Authorities:
    """Those that we trust. It takes 5 ms and more to make them, so a program that serves has a thread do it.

    Args:
        pem: certificates.
    """

    def __init__(self, pem: bytes) -> None:
        self.store = crypto.X509Store()
        for block in _PEM.findall(pem):
            with contextlib.suppress(crypto.Error):  # one that nobody can read is trusted by nobody
                self.store.add_cert(crypto.load_certificate(crypto.FILETYPE_PEM, block))


def read_authorities() -> bytes:
    """The system's, or those that SSL_CERT_FILE and SSL_CERT_DIR name; empty: there are none."""
    paths: Any = ssl.get_default_verify_paths()  # declared as strings, and None where there is no such file
    files = [Path(paths.cafile)] if paths.cafile else []
    if not files and paths.capath:
        files = sorted(Path(paths.capath).iterdir())[:_MOST_FILES]
    pem = b""
    for file in files:
        with contextlib.suppress(OSError):  # a link that leads nowhere; nobody is trusted for it
            pem += file.read_bytes()[:_LONGEST_FILE]
    return pem


class Judge:
    """Remembers its verdicts. Safe in any thread, as long as only the hub's calls `remembered` and `remember`."""

    def __init__(self, authorities: Authorities) -> None:
        self._authorities = authorities
        self._verdicts: OrderedDict[bytes, tuple[float, Verdict]] = OrderedDict()

    def remembered(self, question: bytes, now: float) -> Verdict | None:
        """The verdict on the same `question`, if it is fresh.

        Args:
            now: seconds of a monotonic clock.
        """
        known = self._verdicts.get(question)
        return known[1] if known is not None and now < known[0] else None

    def remember(self, question: bytes, verdict: Verdict, now: float) -> None:
        """Keep it for a while."""
        self._verdicts[question] = now + _REMEMBERED, verdict
        self._verdicts.move_to_end(question)
        if len(self._verdicts) > _MOST_REMEMBERED:
            self._verdicts.popitem(last=False)

    def judge(self, chain: Sequence[bytes], demand: Demand, when: datetime | None = None) -> Verdict:
        """What the chain proves.

        Args:
            chain: as the receiver sent it, in DER, its own certificate first.
            when: the time to judge by, for tests; None: now.
        """
        if not chain:
            return Verdict(False, Result.VALIDATION_FAILURE, "no certificate")
        if len(chain) > MOST_CERTIFICATES or sum(map(len, chain)) > MOST_BYTES:
            return Verdict(False, Result.VALIDATION_FAILURE, "the chain of certificates is too long")
        try:
            parsed = [x509.load_der_x509_certificate(der) for der in chain]
            case = _Case(chain, parsed, demand, when, self._authorities)
            return case.verdict()._replace(key=case.key, subject=parsed[0].subject.rfc4514_string()[:200])
        except (ValueError, TypeError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
            return Verdict(False, Result.VALIDATION_FAILURE, f"a certificate cannot be read: {error}"[:200])


#: Whoever judges now; made when first asked for, or handed in by a reload.
_judges: list[Judge] = []


def use_judge(judge: Judge) -> None:
    """Have this one judge from now on."""
    _judges[:] = [judge]


def judged(key: Hashable, chain: Sequence[bytes], demand: Demand) -> Verdict:
    """The verdict on a chain, remembered or new. May wait for a thread.

    Args:
        key: for whom; see `Apart.call`.
    """
    if not _judges:
        use_judge(Judge(Authorities(read_authorities())))
    judge, asked = _judges[0], question(chain, demand)
    verdict = judge.remembered(asked, monotonic())
    if verdict is None:
        verdict = for_receivers().call(key, judge.judge, chain, demand)
        judge.remember(asked, verdict, monotonic())
    return verdict


def question(chain: Sequence[bytes], demand: Demand) -> bytes:
    """Names a chain and what it has to prove."""
    digest = hashlib.sha256(repr(demand).encode())
    for der in chain:
        digest.update(hashlib.sha256(der).digest())
    return digest.digest()


class _Case:
    """One chain before the judge."""

    def __init__(
        self,
        chain: Sequence[bytes],
        parsed: list[x509.Certificate],
        demand: Demand,
        when: datetime | None,
        authorities: Authorities,
    ) -> None:
        self._chain = chain
        self._parsed = parsed
        self._demand = demand
        self._when = when
        self._authorities = authorities
        self.key = _key_words(parsed[0])

    def verdict(self) -> Verdict:
        records = usable(self._demand.tlsa)
        if records:
            return self._by_dane(records)
        failed = self._path(self._authorities.store) or self._named()
        if failed is not None:
            return failed
        if not self._demand.names:
            return Verdict(False, Result.NONE, "trusted, but there is no name to compare")
        return Verdict(True, Result.NONE, "ok", "authority")

    # ---------------------------------------------------------------- DANE

    def _by_dane(self, records: tuple[Tlsa, ...]) -> Verdict:
        """RFC 7672 section 3.1: any record may match."""
        leaf = self._parsed[0]
        for record in records:
            if record.usage == DANE_EE and matches(record, self._chain[0], _spki(leaf)):
                return Verdict(True, Result.NONE, "ok", "dane")  # neither names nor dates count (section 3.1.1)
        failed = Verdict(False, Result.TLSA_INVALID, "no TLSA record fits the certificates")
        for record in records:
            if record.usage != DANE_TA:
                continue
            anchor = self._anchor(record)
            if anchor is None:
                continue
            wrong = self._path(anchor) or self._named()
            if wrong is None:
                return Verdict(True, Result.NONE, "ok", "dane")
            failed = wrong
        return failed

    def _anchor(self, record: Tlsa) -> crypto.X509Store | None:
        """A store that trusts nobody but what the record is about, if that is in the chain or is the record itself."""
        for der, parsed in zip(self._chain, self._parsed, strict=True):
            if matches(record, der, _spki(parsed)):
                return _store_of(der)
        if record.matching == 0 and record.selector == 0:
            return _store_of(record.data)
        if record.matching == 0:  # a bare key, whose certificate need not be sent (RFC 7671 section 5.2.2)
            for der, parsed in zip(self._chain, self._parsed, strict=True):
                if _signed_with(parsed, record.data):
                    return _store_of(der)
        return None

    # ---------------------------------------------------------------- the path

    def _path(self, store: crypto.X509Store) -> Verdict | None:
        """What is wrong between the leaf and those who are trusted; None: nothing."""
        if self._when is not None:  # else OpenSSL asks the clock: the store is many threads' and is not changed
            store.set_time(self._when.replace(tzinfo=None))
        certificates = [crypto.X509.from_cryptography(parsed) for parsed in self._parsed]
        context = crypto.X509StoreContext(store, certificates[0], chain=certificates[1:])
        try:
            verified = context.get_verified_chain()
        except crypto.X509StoreContextError as error:
            number, _, message = error.errors
            return Verdict(False, _result(number), f"certificate not accepted: {message}")
        weak = self._weakness([certificate.to_cryptography() for certificate in verified])
        if weak:
            return Verdict(False, Result.VALIDATION_FAILURE, f"certificate not accepted: {weak}")
        return None

    def _weakness(self, path: list[x509.Certificate]) -> str:
        try:
            usage = path[0].extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            usage = None
        allowed = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE)
        if usage is not None and not any(use in allowed for use in usage):
            return "its key is not for servers"
        for certificate in path:
            key = certificate.public_key()
            if isinstance(key, rsa.RSAPublicKey | dsa.DSAPublicKey) and key.key_size < _LEAST_RSA:
                return f"a key of {key.key_size} bits is too short"
            if isinstance(key, ec.EllipticCurvePublicKey) and key.key_size < _LEAST_EC:
                return f"a key of {key.key_size} bits is too short"
        for certificate in path[:-1]:  # nobody asks how an anchor is signed
            digest = certificate.signature_hash_algorithm
            if digest is not None and digest.name in ("md5", "sha1"):
                return f"a signature over {digest.name.upper()} proves nothing"
        return ""

    # ---------------------------------------------------------------- the name

    def _named(self) -> Verdict | None:
        """What is wrong about the names; None: nothing. The subject's common name is none (RFC 8461 section 4.1)."""
        wanted = self._demand.names
        if not wanted:
            return None
        try:
            names = self._parsed[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            presented = []
        else:
            presented = names.get_values_for_type(x509.DNSName)
            presented += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
        if any(name_fits(name, has) for name in wanted for has in presented):
            return None
        why = f"certificate not accepted: it is not for {' or '.join(wanted)}"
        if presented:
            why += f", but for {', '.join(presented[:5])}"
        return Verdict(False, Result.HOST_MISMATCH, why[:400])


def _result(number: int) -> Result:
    if number == _EXPIRED:
        return Result.EXPIRED
    return Result.NOT_TRUSTED if number in _UNKNOWN else Result.VALIDATION_FAILURE


def _store_of(der: bytes) -> crypto.X509Store:
    store = crypto.X509Store()
    store.add_cert(crypto.X509.from_cryptography(x509.load_der_x509_certificate(der)))
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    return store


def _spki(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _signed_with(certificate: x509.Certificate, spki: bytes) -> bool:
    """Whether the key signed the certificate."""
    key, parameters = load_der_public_key(spki), certificate.signature_algorithm_parameters
    signed, digest = certificate.tbs_certificate_bytes, certificate.signature_hash_algorithm
    try:
        if isinstance(key, rsa.RSAPublicKey) and digest is not None and isinstance(parameters, PKCS1v15 | PSS):
            key.verify(certificate.signature, signed, parameters, digest)
        elif isinstance(key, ec.EllipticCurvePublicKey) and isinstance(parameters, ec.ECDSA):
            key.verify(certificate.signature, signed, parameters)
        elif isinstance(key, ed25519.Ed25519PublicKey | ed448.Ed448PublicKey):
            key.verify(certificate.signature, signed)
        else:
            return False
    except InvalidSignature:
        return False
    return True


def _key_words(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"EC {key.curve.name}"
    return type(key).__name__.removesuffix("PublicKey").lstrip("_")
