"""TLS to receivers that others wrote: Postfix, which has OpenSSL, and Exim, which has GnuTLS.

What is demanded of their certificates, by OPEN and by `tls` blocks with DNS; old and new versions; sessions that go on;
what they see of a client's certificate, by their own logs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import smtplib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests import peers
from tests.certificates import NAME, authority, pem
from tests.clients import send, socks5
from tests.dns_server import DnsServer
from tests.independent_client import Peer, channel
from tests.interop import test_postfix as postfix
from tests.interop.test_exim import user  # noqa: F401 (a fixture)
from tests.interop.test_shared_receivers import EXIM
from tests.peers import Daemon
from tests.program import Proxy
from tests.waiting import wait_for

EHLO = "mta.example.com"
SOURCE = "127.0.0.5"
MTAS = trustme.CA()


class Receiver(NamedTuple):
    """A running receiver. `log`: what it has written so far."""

    endpoint: tuple[str, int]
    log: Callable[[], str]


@contextlib.contextmanager
def postfix_smtpd(directory: Path, version: str, ask: bool) -> Iterator[Receiver]:
    postfix.needed()
    host = peers.address()
    endpoint = host, peers.free_port(host)
    more = f"smtpd_tls_security_level = may\nsmtpd_tls_chain_files = {directory}/certificate.pem\n"
    more += f"smtpd_tls_loglevel = 1\nsmtpd_tls_CAfile = {directory}/mtas.pem\n"
    if version:
        more += f"smtpd_tls_protocols = {version}\n"
    if ask:
        more += "smtpd_tls_ask_ccert = yes\n"
    with postfix.running("[127.0.0.1]:9", more, endpoint) as (_, log):
        yield Receiver(endpoint, lambda: log.read_text() if log.exists() else "")


@contextlib.contextmanager
def exim(directory: Path, version: str, ask: bool) -> Iterator[Receiver]:
    host = peers.address()
    endpoint = host, peers.free_port(host)
    more = "log_selector = +tls_cipher +tls_peerdn +tls_resumption +smtp_connection\n"
    more += f"tls_verify_certificates = {directory}/mtas.pem\ntls_resumption_hosts = *\n"
    if version:
        more += f"tls_require_ciphers = {version}\n"
    if ask:
        more += "tls_try_verify_hosts = *\n"
    text = EXIM.format(directory=directory, host=endpoint[0], port=endpoint[1]).replace("begin acl", f"{more}begin acl")
    text = text.replace("log_selector = +smtp_connection +incoming_port +tls_cipher\n", "")
    (directory / "exim.conf").write_text(text)
    for path in directory.iterdir():
        path.chmod(0o644)
    log = directory / "mainlog"
    with Daemon(peers.program("exim4"), "-C", directory / "exim.conf", "-bdf", listens=endpoint):
        yield Receiver(endpoint, lambda: log.read_text() if log.exists() else "")


MAKERS = {"postfix": postfix_smtpd, "exim": exim}
#: How each is told to speak one version only.
VERSIONS = {
    ("postfix", "TLSv1"): "!SSLv3, !TLSv1.1, !TLSv1.2, !TLSv1.3",
    ("postfix", "TLSv1.2"): "!SSLv3, !TLSv1, !TLSv1.1, !TLSv1.3",
    ("postfix", "TLSv1.3"): ">=TLSv1.3",
    ("exim", "TLSv1"): "NORMAL:-VERS-ALL:+VERS-TLS1.0:%COMPAT",
    ("exim", "TLSv1.2"): "NORMAL:-VERS-ALL:+VERS-TLS1.2",
    ("exim", "TLSv1.3"): "NORMAL:-VERS-ALL:+VERS-TLS1.3",
}

Start = Callable[..., Receiver]


@pytest.fixture
def start(user: str) -> Iterator[Start]:  # noqa: F811
    with contextlib.ExitStack() as stack:

        def start(kind: str, certificate: str = "valid", version: str = "", ask: bool = False) -> Receiver:
            mine = user if kind == "exim" and os.getuid() == 0 else None
            directory = stack.enter_context(peers.directory(mine))
            (directory / "certificate.pem").write_bytes(pem(certificate))
            MTAS.cert_pem.write_to_path(str(directory / "mtas.pem"))
            return stack.enter_context(MAKERS[kind](directory, VERSIONS.get((kind, version), ""), ask))

        yield start


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("trust") / "ca.pem"
    authority().cert_pem.write_to_path(str(path))
    return {"SSL_CERT_FILE": str(path)}


@pytest.fixture(scope="module")
def proxy(trusted: dict[str, str]) -> Iterator[Proxy]:
    with Proxy(environ=trusted) as proxy:
        yield proxy


@pytest.fixture
def peer(proxy: Proxy) -> Iterator[Peer]:
    with channel(proxy.native) as peer:
        yield peer


def record(certificate: str) -> list[object]:
    key = x509.load_pem_x509_certificates(pem(certificate))[0].public_key()
    return [3, 1, 1, hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("certificate", ["valid", "wrong_name", "expired", "unknown_ca"])
def test_what_is_demanded_of_their_certificates(peer: Peer, start: Start, kind: str, certificate: str) -> None:
    there = start(kind, certificate).endpoint
    wanted = {"ehlo_name": EHLO, "tls": "required", "tls_server_name": NAME}
    good = certificate == "valid"
    for demand in ({"tls_verify": True}, {"tls_names": [NAME]}, {"tlsa": [record(certificate)]}):
        if good or "tlsa" in demand:
            assert peer.opened(there, **wanted, **demand)[7][2] is True
            peer.finish()
        else:
            assert peer.failed(there, **wanted, **demand)[9].startswith("certificate-")
    wrong = record("valid" if not good else "expired")
    assert peer.failed(there, **wanted, tlsa=[wrong])[9] == "tlsa-invalid"
    assert peer.opened(there, **wanted)[7][2] is good, "judged, and used all the same"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1.2", "TLSv1.3"])
def test_the_versions_that_they_have(peer: Peer, start: Start, kind: str, version: str) -> None:
    """Old TLS is taken where nothing is to be proven, and not where something is."""
    there = start(kind, version=version).endpoint
    wanted = {"ehlo_name": EHLO, "tls": "required", "tls_server_name": NAME}
    assert peer.opened(there, **wanted)[7][0] == version
    peer.finish()
    if version == "TLSv1":
        assert peer.failed(there, **wanted, tls_verify=True)[0] == "tls"
    else:
        assert peer.opened(there, **wanted, tls_verify=True)[7][0] == version


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_their_sessions_go_on(proxy: Proxy, start: Start, kind: str, version: str) -> None:
    """Exim hands out tickets if it is told to (`tls_resumption_hosts`)."""
    receiver = start(kind, version=version)
    mark = len(proxy.lines)
    for resumed in ("no", "yes"):
        with channel(proxy.native) as peer:
            peer.opened(receiver.endpoint, ehlo_name=EHLO, tls="required", tls_server_name=NAME, tls_verify=True)
            peer.finish()
        told = f"^connection .* tls={version} .*certificate=authority .*resumed={resumed}$"
        proxy.wait_line(told, since=mark)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_they_see_of_a_client_s_certificate(start: Start, tmp_path: Path, kind: str) -> None:
    leaf = MTAS.issue_cert("mail1.example.org", common_name="mail1.example.org")
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "crt"))
    leaf.private_key_pem.write_to_path(str(tmp_path / "key"))
    (tmp_path / "key").chmod(0o600)
    files = f"tls_client_certificate_file {tmp_path}/crt\n    tls_client_private_key_file {tmp_path}/key\n"
    receiver = start(kind, ask=True)
    text = f"mode smtp\nsource here {{\n    ip {SOURCE}\n    {files}}}\n"
    with Proxy(text) as proxy, socks5(proxy.socks5, receiver.endpoint, SOURCE) as sock:
        assert send(sock, b"Subject: x\r\n\r\nx\r\n")[0] == 250
    seen = {"postfix": "Trusted TLS connection established from", "exim": "CV=yes"}[kind]
    wait_for(lambda: seen in receiver.log(), what=seen)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("fits", [True, False])
def test_dane_by_a_block_in_mode_smtp(start: Start, kind: str, fits: bool) -> None:
    """The whole way: MX, address and TLSA from a server that checks DNSSEC, by the name that the receiver has."""
    receiver = start(kind, "unknown_ca")
    host, port = receiver.endpoint
    usage, selector, matching, digest = record("unknown_ca" if fits else "valid")
    assert isinstance(digest, bytes)
    at = f"_{port}._tcp.{NAME}."
    zone = {
        "example.net.": {"MX": [f"10 {NAME}."]},
        f"{NAME}.": {"A": [host]},
        at: {"TLSA": [f"{usage} {selector} {matching} {digest.hex()}"]},
    }
    with DnsServer(zone) as dns:
        dns.secure |= set(zone)
        text = f"mode smtp\ndns_server {dns.endpoint}\ndns_trust_ad yes\ntls signed {{\n    domain example.net\n"
        with Proxy(f"{text}    level dane\n}}\n") as proxy:
            with socks5(proxy.socks5, receiver.endpoint, SOURCE) as sock:
                if fits:
                    assert send(sock, b"Subject: x\r\n\r\nx\r\n")[0] == 250
                else:
                    with pytest.raises(smtplib.SMTPServerDisconnected):
                        send(sock, b"Subject: x\r\n\r\nx\r\n")
            proxy.wait_line("^connection .*certificate=dane" if fits else "^failed .*tls_result=tlsa-invalid")
