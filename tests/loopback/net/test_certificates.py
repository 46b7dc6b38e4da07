"""The verdicts on chains of certificates, as a table: what RFC 6125, RFC 7671, RFC 7672 and RFC 8461 say of each.

Rows are chains, columns are demands; a cell is the result word of RFC 8460, `ok` for a proof, and `-` where nothing
was wrong and nothing was proven.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from proxy.net.certificates import Authorities, Judge, question, read_authorities
from proxy.policy.certificates import Demand, Tlsa

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
NAME = "mx.example.net"

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class Made(NamedTuple):
    certificate: x509.Certificate
    key: Key

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def spki(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def make(
    subject: str,
    issuer: Made | None = None,
    *,
    names: list[str] | None = None,
    ips: list[str] | None = None,
    ca: bool = False,
    key: Key | None = None,
    begins: dt.datetime = NOW - DAY,
    ends: dt.datetime = NOW + DAY,
    use: x509.ObjectIdentifier | None = None,
) -> Made:
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    signer = issuer.key if issuer is not None else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject if issuer is not None else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if issuer is not None:
        builder = builder.add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False
        )
    alternatives: list[x509.GeneralName] = [x509.DNSName(each) for each in names or ()]
    alternatives += [x509.IPAddress(ipaddress.ip_address(each)) for each in ips or ()]
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    if use is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    digest = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return Made(builder.sign(signer, digest), key)


ROOT = make("root", ca=True)
STRANGER = make("another root", ca=True)
MIDDLE = make("intermediate", ROOT, ca=True)
LATE_MIDDLE = make("intermediate", ROOT, ca=True, ends=NOW - DAY / 2)
MUCH = 365 * DAY
NO_CA = make("no authority", ROOT)


@functools.cache
def chain(kind: str) -> tuple[Made, ...]:
    """The chain as a receiver sends it."""
    leaf: Callable[..., Made] = functools.partial(make, NAME, names=[NAME])
    kinds: dict[str, Callable[[], tuple[Made, ...]]] = {
        "valid": lambda: (leaf(ROOT),),
        "with root": lambda: (leaf(ROOT), ROOT),
        "intermediate": lambda: (leaf(MIDDLE), MIDDLE),
        "intermediate missing": lambda: (leaf(MIDDLE),),
        "intermediate expired": lambda: (leaf(LATE_MIDDLE), LATE_MIDDLE),
        "signed by no authority": lambda: (leaf(NO_CA), NO_CA),
        "expired": lambda: (leaf(ROOT, begins=NOW - MUCH, ends=NOW - DAY),),
        "not yet": lambda: (leaf(ROOT, begins=NOW + DAY, ends=NOW + MUCH),),
        "self-signed": lambda: (leaf(),),
        "unknown authority": lambda: (leaf(STRANGER), STRANGER),
        "wrong name": lambda: (make(NAME, ROOT, names=["elsewhere.example.org"]),),
        "common name alone": lambda: (make(NAME, ROOT),),
        "wildcard": lambda: (make(NAME, ROOT, names=["*.example.net"]),),
        "wildcard of two labels": lambda: (make(NAME, ROOT, names=["*.net"]),),
        "address": lambda: (make(NAME, ROOT, names=["other.example.net"], ips=["192.0.2.25"]),),
        "rsa": lambda: (leaf(ROOT, key=rsa.generate_private_key(65537, 2048)),),
        "rsa 1024": lambda: (leaf(ROOT, key=rsa.generate_private_key(65537, 1024)),),
        "ed25519": lambda: (leaf(ROOT, key=ed25519.Ed25519PrivateKey.generate()),),
        "for clients": lambda: (leaf(ROOT, use=ExtendedKeyUsageOID.CLIENT_AUTH),),
        "for servers": lambda: (leaf(ROOT, use=ExtendedKeyUsageOID.SERVER_AUTH),),
        "none": lambda: (),
    }
    return kinds[kind]()


def _sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


WRONG = b"w" * 32

#: Column → the demand on a chain.
DEMANDS: dict[str, Callable[[tuple[Made, ...]], Demand]] = {
    "no name": lambda made: Demand(),
    "name": lambda made: Demand((NAME,), True),
    "pattern": lambda made: Demand(("*.example.net", "mail.example.com"), True),
    "3 1 1": lambda made: Demand((NAME,), False, (Tlsa(3, 1, 1, _sha(made[0].spki)),)),
    "3 0 2": lambda made: Demand((NAME,), False, (Tlsa(3, 0, 2, hashlib.sha512(made[0].der).digest()),)),
    "wrong 3": lambda made: Demand((NAME,), False, (Tlsa(3, 1, 1, WRONG),)),
    "rollover": lambda made: Demand((NAME,), False, (Tlsa(3, 1, 1, WRONG), Tlsa(3, 1, 1, _sha(made[0].spki)))),
    "2 0 1": lambda made: Demand((NAME,), False, (Tlsa(2, 0, 1, _sha(made[-1].der)),)),
    "2 1 1": lambda made: Demand((NAME,), False, (Tlsa(2, 1, 1, _sha(made[-1].spki)),)),
    "unusable": lambda made: Demand((NAME,), True, (Tlsa(0, 1, 1, WRONG), Tlsa(3, 1, 9, b"x"))),
}
OK, BARE = "ok", "-"
EXPIRED, HOST, TRUST = "certificate-expired", "certificate-host-mismatch", "certificate-not-trusted"
BAD, TLSA = "validation-failure", "tlsa-invalid"

COLUMNS = ("no name", "name", "pattern", "3 1 1", "3 0 2", "wrong 3", "rollover", "2 0 1", "2 1 1", "unusable")
#: With a 2 x x the last certificate of the chain is the anchor.
TABLE = {
    "valid": (BARE, OK, OK, OK, OK, TLSA, OK, OK, OK, OK),
    "with root": (BARE, OK, OK, OK, OK, TLSA, OK, OK, OK, OK),
    "intermediate": (BARE, OK, OK, OK, OK, TLSA, OK, OK, OK, OK),
    "intermediate missing": (TRUST, TRUST, TRUST, OK, OK, TLSA, OK, OK, OK, TRUST),
    "intermediate expired": (EXPIRED, EXPIRED, EXPIRED, OK, OK, TLSA, OK, EXPIRED, EXPIRED, EXPIRED),
    "signed by no authority": (BAD, BAD, BAD, OK, OK, TLSA, OK, BAD, BAD, BAD),
    "expired": (EXPIRED, EXPIRED, EXPIRED, OK, OK, TLSA, OK, EXPIRED, EXPIRED, EXPIRED),
    "not yet": (BAD, BAD, BAD, OK, OK, TLSA, OK, BAD, BAD, BAD),
    "self-signed": (TRUST, TRUST, TRUST, OK, OK, TLSA, OK, OK, OK, TRUST),
    "unknown authority": (TRUST, TRUST, TRUST, OK, OK, TLSA, OK, OK, OK, TRUST),
    "wrong name": (BARE, HOST, HOST, OK, OK, TLSA, OK, HOST, HOST, HOST),
    "common name alone": (BARE, HOST, HOST, OK, OK, TLSA, OK, HOST, HOST, HOST),
    "wildcard": (BARE, OK, OK, OK, OK, TLSA, OK, OK, OK, OK),
    "wildcard of two labels": (BARE, HOST, HOST, OK, OK, TLSA, OK, HOST, HOST, HOST),
    "address": (BARE, HOST, OK, OK, OK, TLSA, OK, HOST, HOST, HOST),
    "rsa": (BARE, OK, OK, OK, OK, TLSA, OK, OK, OK, OK),
    "rsa 1024": (BAD, BAD, BAD, OK, OK, TLSA, OK, BAD, BAD, BAD),
    "ed25519": (BARE, OK, OK, OK, OK, TLSA, OK, OK, OK, OK),
    "for clients": (BAD, BAD, BAD, OK, OK, TLSA, OK, BAD, BAD, BAD),
    "for servers": (BARE, OK, OK, OK, OK, TLSA, OK, OK, OK, OK),
}
CELLS = [(kind, column, cell) for kind, cells in TABLE.items() for column, cell in zip(COLUMNS, cells, strict=True)]


@pytest.fixture(scope="module")
def judge() -> Judge:
    """Trusts ROOT alone."""
    return Judge(Authorities(ROOT.certificate.public_bytes(Encoding.PEM)))


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_where_authorities_come_from(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nothing"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "nothing"))
    assert read_authorities() == b""
    file = tmp_path / "0.pem"
    rubbish = b"words\n-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    file.write_bytes(rubbish + ROOT.certificate.public_bytes(Encoding.PEM))
    (tmp_path / "1.pem").symlink_to("nowhere")
    monkeypatch.setenv(name, str(file if name == "SSL_CERT_FILE" else tmp_path))
    found = Judge(Authorities(read_authorities()))
    assert found.judge([each.der for each in chain("valid")], Demand((NAME,), True), NOW).verified


@pytest.mark.parametrize(("kind", "column", "cell"), CELLS, ids=[f"{kind}, {column}" for kind, column, _ in CELLS])
def test_the_verdict(judge: Judge, kind: str, column: str, cell: str) -> None:
    made = chain(kind)
    verdict = judge.judge([each.der for each in made], DEMANDS[column](made), NOW)
    assert (OK if verdict.verified else verdict.result or BARE) == cell, verdict
    assert verdict.by == (("dane" if column[0] in "23wr" else "authority") if verdict.verified else "")
    assert "\n" not in verdict.why


def test_each_column_is_a_demand() -> None:
    assert tuple(DEMANDS) == COLUMNS


def test_addresses_are_names_too(judge: Judge) -> None:
    ders = [each.der for each in chain("address")]
    assert judge.judge(ders, Demand(("192.0.2.25",), True), NOW).verified
    assert judge.judge(ders, Demand(("192.0.2.26",), True), NOW).result == HOST


def test_an_anchor_that_the_receiver_does_not_send_stands_in_its_record(judge: Judge) -> None:
    ders = [chain("unknown authority")[0].der]
    for data, selector in ((STRANGER.der, 0), (STRANGER.spki, 1)):
        demand = Demand((NAME,), False, (Tlsa(2, selector, 0, data),))
        assert judge.judge(ders, demand, NOW).verified
    for data, selector in ((ROOT.der, 0), (ROOT.spki, 1)):
        demand = Demand((NAME,), False, (Tlsa(2, selector, 0, data),))
        assert not judge.judge(ders, demand, NOW).verified


def test_a_key_in_place_of_a_record_s_certificate_is_no_error_of_ours(judge: Judge) -> None:
    made = chain("valid")
    for data in (b"\x30\x00", b"\xff" * 500, b"x"):
        for selector in (0, 1):
            demand = Demand((NAME,), False, (Tlsa(2, selector, 0, data),))
            verdict = judge.judge([made[0].der], demand, NOW)
            assert not verdict.verified
            assert verdict.result in (TLSA, BAD)


@pytest.mark.parametrize("ders", [[], [b""], [b"\x30\x00"], [b"x" * 100], [b"x"] * 11, [b"x" * 70_000]])
def test_rubbish_proves_nothing(judge: Judge, ders: list[bytes]) -> None:
    assert judge.judge(ders, Demand((NAME,), True), NOW)[:2] == (False, BAD)


def test_verdicts_are_remembered_for_a_while_and_not_too_many(judge: Judge) -> None:
    ders = [chain("valid")[0].der]
    asked = question(ders, Demand((NAME,), True))
    assert asked != question(ders, Demand((NAME,), False)) != question([*ders, ROOT.der], Demand((NAME,), False))
    verdict = judge.judge(ders, Demand((NAME,), True), NOW)
    assert judge.remembered(asked, 0.0) is None
    judge.remember(asked, verdict, 0.0)
    assert judge.remembered(asked, 299.0) == verdict
    assert judge.remembered(asked, 300.0) is None
    for number in range(1024):
        judge.remember(number.to_bytes(2, "big"), verdict, 1000.0)
    assert judge.remembered(asked, 1.0) is None


def test_what_is_told_of_the_certificate(judge: Judge) -> None:
    verdict = judge.judge([chain("rsa")[0].der], Demand((NAME,), True), NOW)
    assert (verdict.key, verdict.subject) == ("RSA 2048", f"CN={NAME}")
    assert judge.judge([chain("ed25519")[0].der], Demand(), NOW).key == "Ed25519"
    assert judge.judge([chain("valid")[0].der], Demand(), NOW).key == "EC secp256r1"
