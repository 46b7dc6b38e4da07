"""`tls` blocks on the real program: in mode smtp, where nobody else says anything, and under native OPENs."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.certificates import NAME, authority, pem
from tests.clients import Refused, send, socks5
from tests.dns_server import DnsServer
from tests.independent_client import channel
from tests.mx import Mx, close, say
from tests.program import Proxy

EHLO = "client.example"
SMTP = f"""\
mode smtp
source here {{
    ip 127.0.0.5
    ehlo {EHLO}
}}
"""
HERE = "destination 127.0.0.0/8"


@pytest.fixture
def trusted(tmp_path: Path) -> dict[str, str]:
    authority().cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}


def block(*lines: str, name: str = "t") -> str:
    return f"tls {name} {{\n" + "".join(f"    {line}\n" for line in lines) + "}\n"


def delivered(proxy: Proxy, mx: Mx) -> bool:
    """Whether a message gets through, in a session of its own."""
    try:
        with socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as sock:
            return send(sock, b"x\r\n")[0] == 250
    except (Refused, OSError, AssertionError):
        return False


# --- levels that need no DNS ---


@pytest.mark.parametrize(
    ("lines", "certificate", "gets_through"),
    [
        (["level verify", f"names {NAME}"], "valid", True),
        (["level verify", "names *.example.net"], "valid", True),
        (["level verify", "names mx.example.org"], "valid", False),
        (["level verify", f"names {NAME}"], "expired", False),
        (["level verify", f"names {NAME}"], "self_signed", False),
        (["level verify"], "valid", True),  # without a name it is the address, which is in this certificate
        (["level verify"], "wrong_name", False),
        (["level required"], "self_signed", True),
        (["level opportunistic"], "expired", True),
        (["min TLSv1.3"], "self_signed", True),
    ],
)
def test_level_and_names(trusted: dict[str, str], lines: list[str], certificate: str, gets_through: bool) -> None:
    with Mx(starttls=True, certificate=certificate) as mx, Proxy(SMTP + block(HERE, *lines), environ=trusted) as proxy:
        assert delivered(proxy, mx) is gets_through
        assert [message.encrypted for message in mx.messages] == [True] * gets_through
        assert mx.connects == 1, "never a second one in clear"
        proxy.wait_line(r"^connection .* tls=TLSv1.3 " if gets_through else r"^failed .*tls_result=certificate-")


def test_a_level_that_is_not_there_to_be_had(trusted: dict[str, str]) -> None:
    with Mx() as mx, Proxy(SMTP + block(HERE, "level required"), environ=trusted) as proxy:
        assert not delivered(proxy, mx)
        proxy.wait_line("^failed .*tls_result=starttls-not-supported")
    with Mx(starttls=True) as mx, Proxy(SMTP + "smtp_tls required\n" + block(HERE, "level none")) as proxy:
        assert delivered(proxy, mx)
        assert not mx.messages[0].encrypted, "a block goes before smtp_tls"


def test_the_first_block_that_fits_and_a_reload(trusted: dict[str, str]) -> None:
    strict = block(HERE, "level verify", "names other.example.org", name="strict")
    lax = block(HERE, "level required", name="lax")
    with Mx(starttls=True) as mx, Proxy(SMTP + lax + strict, environ=trusted) as proxy:
        assert delivered(proxy, mx)
        proxy.hup(SMTP + strict + lax)
        assert not delivered(proxy, mx), "nor by the connection that was kept: it has proved less"
        proxy.hup(SMTP + lax + strict)
        assert delivered(proxy, mx)


def test_what_openssl_does_not_know_is_a_mistake_with_its_line() -> None:
    bad = SMTP + block(HERE, "ciphers NO-SUCH-CIPHER")
    with Proxy(bad, ready=False, exit_code=78) as proxy:
        proxy.wait_exit()
        assert proxy.matching(r"greenarrow_proxy.conf:\d+: tls: t: ciphers: NO-SUCH-CIPHER")
    with Proxy(SMTP) as proxy:
        assert "NO-SUCH-CIPHER: no ciphers that OpenSSL knows" in "\n".join(proxy.bad_hup(bad))


# --- DANE ---


def tlsa(certificate: str) -> str:
    key = x509.load_pem_x509_certificates(pem(certificate))[0].public_key()
    return "3 1 1 " + hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


class Zone:
    """A signed zone with one MX host, which is `mx`."""

    def __init__(self, mx: Mx, records: list[str] | None = None) -> None:
        self.host, self.at = f"{NAME}.", f"_{mx.port}._tcp.{NAME}."
        zone = {"example.net.": {"MX": [f"10 {NAME}."]}, self.host: {"A": [mx.host]}}
        if records is not None:
            zone[self.at] = {"TLSA": records}
        self.dns = DnsServer(zone)
        self.dns.secure |= {*zone, self.at}

    def __enter__(self) -> Zone:
        self.dns.__enter__()
        self.text = f"dns_server {self.dns.endpoint}\ndns_trust_ad yes\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.dns.__exit__()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def dane(stack: ExitStack, level: str = "dane", certificate: str = "self_signed") -> tuple[Mx, Zone, str]:
    """A receiver, its zone without records, and the configuration of mode smtp."""
    mx = stack.enter_context(Mx(starttls=True, certificate=certificate))
    zone = stack.enter_context(Zone(mx))
    return mx, zone, SMTP + zone.text + block("domain example.net", f"level {level}")


def test_dane_in_mode_smtp_from_the_first_session_on(stack: ExitStack) -> None:
    mx, zone, text = dane(stack, certificate="wrong_name")
    zone.dns.records[zone.at] = {"TLSA": [tlsa("valid"), tlsa("wrong_name")]}
    proxy = stack.enter_context(Proxy(text))
    assert delivered(proxy, mx)
    proxy.wait_line("^connection .*certificate=dane")
    assert mx.sessions[0].server_name == NAME


def test_dane_that_does_not_fit_is_no_session(stack: ExitStack) -> None:
    mx, zone, text = dane(stack, certificate="wrong_name")
    zone.dns.records[zone.at] = {"TLSA": [tlsa("valid")]}
    proxy = stack.enter_context(Proxy(text))
    assert not delivered(proxy, mx)
    assert mx.connects == 1, "none in clear behind it"
    proxy.wait_line("^failed .*tls_result=tlsa-invalid")


def test_no_records_is_opportunistic_and_dane_only_is_none(stack: ExitStack) -> None:
    mx, zone, text = dane(stack)
    proxy = stack.enter_context(Proxy(text))
    assert delivered(proxy, mx)
    assert mx.messages[0].encrypted
    assert zone.dns.asked[zone.at, "TLSA"] == 1
    proxy.hup(text.replace("level dane", "level dane-only"))
    assert not delivered(proxy, mx)
    proxy.wait_line("^failed .*tls_result=dane-required .*tls t: .* no signed TLSA record")


def test_what_cannot_be_found_out_is_no_session(stack: ExitStack) -> None:
    mx, zone, text = dane(stack, certificate="valid")
    zone.dns.codes[zone.at] = 2
    proxy = stack.enter_context(Proxy(text))
    assert not delivered(proxy, mx)
    assert mx.connects == 0, "not even a connection"
    proxy.wait_line("^failed .*tls_result=dnssec-invalid .*SERVFAIL")


# --- native OPENs ---


def test_an_open_that_demands_nothing(trusted: dict[str, str]) -> None:
    text = block(HERE, "level verify", f"names {NAME}")
    with Proxy(text, environ=trusted) as proxy, channel(proxy.native) as peer:
        with Mx(starttls=True, certificate="wrong_name") as mx:
            for mode in ("opportunistic", "required"):
                failed = peer.failed(mx.endpoint, ehlo_name=EHLO, tls=mode)
                assert (failed[0], failed[9]) == ("tls", "certificate-host-mismatch")
            assert peer.opened(mx.endpoint, ehlo_name=EHLO, tls="none")[7] is None, "the client's word"
            peer.finish()
            own = {"tls_server_name": "elsewhere.example.net", "tls_verify": True}
            assert peer.opened(mx.endpoint, ehlo_name=EHLO, tls="required", **own)[7][2] is True
            peer.finish()
        with Mx(implicit_tls=True, certificate="wrong_name") as mx:
            assert peer.failed(mx.endpoint, ehlo_name=EHLO, tls="implicit")[9] == "certificate-host-mismatch"
        with Mx(starttls=True) as mx:
            assert peer.opened(mx.endpoint, ehlo_name=EHLO, tls="opportunistic")[7][2] is True


def test_a_block_never_asks_for_less_but_where_tls_was_only_welcome() -> None:
    with Proxy(block(HERE, "level none")) as proxy, channel(proxy.native) as peer, Mx(starttls=True) as mx:
        assert peer.opened(mx.endpoint, ehlo_name=EHLO, tls="opportunistic")[7] is None
        peer.finish()
        assert peer.opened(mx.endpoint, ehlo_name=EHLO, tls="required")[7][0] == "TLSv1.3"


def test_dane_for_an_open_that_says_its_mx(stack: ExitStack) -> None:
    mx = stack.enter_context(Mx(starttls=True, certificate="wrong_name"))
    zone = stack.enter_context(Zone(mx, records=[tlsa("wrong_name")]))
    proxy = stack.enter_context(Proxy(zone.text + block("level dane")))
    peer = stack.enter_context(channel(proxy.native))
    opened = peer.opened(mx.endpoint, ehlo_name=EHLO, tls="opportunistic", mx=NAME)
    assert (opened[7][2:4], opened[7][6]) == ([True, "ok"], "dane")
    peer.finish()
    broken = stack.enter_context(Mx({"starttls": say(b"454 4.7.0 not now\r\n")}, starttls=True))
    zone.dns.records[f"_{broken.port}._tcp.{NAME}."] = {"TLSA": [tlsa("wrong_name")]}
    zone.dns.secure.add(f"_{broken.port}._tcp.{NAME}.")
    failed = peer.failed(broken.endpoint, ehlo_name=EHLO, tls="opportunistic", mx=NAME)
    assert (failed[0], failed[9]) == ("starttls", "starttls-not-supported")


# --- sessions of TLS that go on ---


def test_a_resumed_session_is_told(trusted: dict[str, str]) -> None:
    text = SMTP + "reuse_connections no\nlisten_status 127.0.1.9:0\n" + block(HERE, "level verify", f"names {NAME}")
    with Mx(starttls=True) as mx, Proxy(text, environ=trusted) as proxy:
        for resumed in ("no", "yes"):
            assert delivered(proxy, mx)
            proxy.wait_line(f"^connection .*certificate=authority .*resumed={resumed}$")
        assert [session.resumed for session in mx.sessions] == [False, True]
        host, port = proxy.door("status")
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        assert "greenarrow_proxy_tls_sessions_resumed_total 1.0" in lines
        assert 'greenarrow_proxy_tls_sessions_total{certificate="authority"} 2.0' in lines


def test_a_resumed_handshake_that_breaks_is_followed_by_a_full_one(trusted: dict[str, str]) -> None:
    text = SMTP + "reuse_connections no\n"
    with (
        Mx(lambda number: {"tls": close} if number == 1 else {}, starttls=True) as mx,
        Proxy(text, environ=trusted) as proxy,
    ):
        assert delivered(proxy, mx)
        assert delivered(proxy, mx)
        assert [message.encrypted for message in mx.messages] == [True, True]
        assert [session.resumed for session in mx.sessions] == [False, False, False]
