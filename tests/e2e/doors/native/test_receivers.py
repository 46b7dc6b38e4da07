"""What a channel makes of receivers of every kind: TLS modes, certificates, several destinations, failures."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests import independent_client as mta
from tests.certificates import NAME, authority, pem, server_context
from tests.independent_client import Peer, channel, deliver
from tests.mx import Mx, Session, close, garbage, mute, reset, say
from tests.program import Proxy
from tests.sinks import closed_port

EHLO = "mta.example.com"


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    trusted: Path = tmp_path_factory.mktemp("trust") / "ca.pem"
    authority().cert_pem.write_to_path(str(trusted))
    with Proxy("listen_status 127.0.0.1:0\n", environ={"SSL_CERT_FILE": str(trusted)}) as proxy:
        yield proxy


@pytest.fixture
def peer(proxy: Proxy) -> Iterator[Peer]:
    with channel(proxy.native) as peer:
        yield peer


def leaf(certificate: str) -> str:
    """The SHA-256 of what a server of this kind shows."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_in, client_out = outgoing, incoming
    server = server_context(certificate).wrap_bio(incoming, outgoing, server_side=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    client = context.wrap_bio(client_in, client_out)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    return hashlib.sha256(client.getpeercert(binary_form=True) or b"").hexdigest()


# -- TLS ---------------------------------------------------------------------------------------------------------------

GOOD = ("valid",)
BAD = ("expired", "wrong_name", "unknown_ca", "self_signed")
#: Whether it would have passed where nobody asked, and what was wrong.
JUDGED = {
    "valid": (True, ""),
    "expired": (False, "certificate-expired"),
    "wrong_name": (False, "certificate-host-mismatch"),
    "unknown_ca": (False, "certificate-not-trusted"),
    "self_signed": (False, "certificate-not-trusted"),
}


@pytest.mark.parametrize("certificate", GOOD + BAD)
@pytest.mark.parametrize("mode", ["opportunistic", "required", "implicit"])
def test_unverified_every_certificate_will_do(peer: Peer, mode: str, certificate: str) -> None:
    with Mx(starttls=mode != "implicit", implicit_tls=mode == "implicit", certificate=certificate) as mx:
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO, tls=mode, tls_server_name=NAME)
        version, cipher, verified, verdict, shown, result, by, key, _, issuers = opened[7]
        assert (version, verified, result) == ("TLSv1.3", *JUDGED[certificate])
        assert by == ("authority" if verified else "")
        assert verdict == "ok" if verified else verdict.startswith("certificate not accepted: ")
        assert key == "EC secp256r1"
        assert not issuers
        assert cipher.startswith("TLS_")
        if certificate in ("valid", "expired", "wrong_name"):  # the others are made anew for each server
            assert hashlib.sha256(shown).hexdigest() == leaf(certificate)
        assert opened[5] == f"220 {NAME} ESMTP".encode()
        assert opened[6][0] == NAME.encode()
        assert b"STARTTLS" not in opened[6]
        deliver(peer, b"Subject: inside TLS\r\n")
        peer.finish()
        assert mx.messages[0].encrypted
        assert mx.sessions[0].server_name == NAME
        assert mx.connects == 1


@pytest.mark.parametrize("mode", ["opportunistic", "required", "implicit"])
def test_verified(peer: Peer, mode: str) -> None:
    with Mx(starttls=mode != "implicit", implicit_tls=mode == "implicit") as mx:
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO, tls=mode, tls_server_name=NAME, tls_verify=True)
        assert opened[7][2:4] == [True, "ok"]
        peer.finish()
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO, tls=mode, tls_verify=True)  # by its address
        assert opened[7][2] is True


def test_a_reload_reads_the_authorities_anew(tmp_path: Path) -> None:
    trusted = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(trusted))
    wanted = {"ehlo_name": EHLO, "tls": "required", "tls_server_name": NAME, "tls_verify": True}
    with Mx(starttls=True) as mx, Proxy(environ={"SSL_CERT_FILE": str(trusted)}) as own, channel(own.native) as peer:
        assert peer.failed(mx.endpoint, **wanted)[0] == "tls"
        authority().cert_pem.write_to_path(str(trusted))
        own.hup()
        assert peer.opened(mx.endpoint, **wanted)[7][2] is True


@pytest.mark.parametrize("certificate", BAD)
@pytest.mark.parametrize("mode", ["opportunistic", "required", "implicit"])
def test_a_certificate_that_is_not_accepted(peer: Peer, mode: str, certificate: str) -> None:
    """Whoever demands verification is not served in clear instead, opportunistic or not."""
    reasons = {"expired": "certificate has expired", "wrong_name": f"it is not for {NAME}", "self_signed": "self"}
    with Mx(starttls=mode != "implicit", implicit_tls=mode == "implicit", certificate=certificate) as mx:
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO, tls=mode, tls_server_name=NAME, tls_verify=True)
        assert failed[:2] == ["tls", "upstream_failed"]
        assert "certificate not accepted: " + reasons.get(certificate, "unable to get") in failed[2]
        assert (failed[3], failed[5]) == (0, True)
        assert failed[9] == failed[8][0][5] == JUDGED[certificate][1]
        assert mx.connects == 1


def tlsa(usage: int, selector: int, certificate: str = "valid") -> list[object]:
    """The TLSA record (SHA-256) of what a server of this kind shows."""
    shown = x509.load_pem_x509_certificates(pem(certificate))[0]
    what = shown.public_bytes(Encoding.DER)
    if selector == 1:
        what = shown.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return [usage, selector, 1, hashlib.sha256(what).digest()]


WRONG = [3, 1, 1, bytes(32)]


@pytest.mark.parametrize("certificate", ["valid", "expired", "wrong_name", "unknown_ca"])
@pytest.mark.parametrize("mode", ["opportunistic", "required", "implicit"])
def test_dane(peer: Peer, mode: str, certificate: str) -> None:
    """RFC 7672 section 3.1.1: a record of usage 3 makes the certificate good, whatever else is wrong with it."""
    with Mx(starttls=mode != "implicit", implicit_tls=mode == "implicit", certificate=certificate) as mx:
        records = [WRONG, tlsa(3, 1, certificate)]
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO, tls=mode, tls_server_name=NAME, tlsa=records)
        assert (opened[7][2:4], opened[7][5:7]) == ([True, "ok"], ["", "dane"])
        peer.finish()
        assert mx.sessions[0].server_name == NAME


@pytest.mark.parametrize("mode", ["opportunistic", "required", "implicit"])
def test_dane_that_fails_is_never_in_clear(peer: Peer, mode: str) -> None:
    with Mx(starttls=mode != "implicit", implicit_tls=mode == "implicit") as mx:
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO, tls=mode, tls_server_name=NAME, tlsa=[WRONG])
        assert (failed[0], failed[9]) == ("tls", "tlsa-invalid")
        assert mx.connects == 1
    with Mx() as mx:
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO, tls="opportunistic", tls_server_name=NAME, tlsa=[WRONG])
        assert (failed[0], failed[9]) == ("starttls", "starttls-not-supported")
        assert mx.connects == 1


def test_records_that_are_of_no_use_ask_for_tls_alone(peer: Peer) -> None:
    """RFC 7672 section 2.2."""
    useless = [[1, 1, 1, bytes(32)], [3, 1, 9, b"?"]]
    with Mx(starttls=True, certificate="self_signed") as mx:
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO, tls="opportunistic", tls_server_name=NAME, tlsa=useless)
        assert (opened[7][2], opened[7][5]) == (False, "certificate-not-trusted")
        peer.finish()
    with Mx() as mx:
        assert peer.failed(mx.endpoint, ehlo_name=EHLO, tls="opportunistic", tlsa=useless)[0] == "starttls"


@pytest.mark.parametrize(("names", "good"), [([NAME], True), (["*.example.net"], True), (["mx.example.org"], False)])
def test_mta_sts(peer: Peer, names: list[str], good: bool) -> None:
    """RFC 8461 section 4.1; SNI may be another name."""
    with Mx(starttls=True) as mx:
        wanted = {"ehlo_name": EHLO, "tls": "required", "tls_server_name": "sni.example.net", "tls_names": names}
        if good:
            assert peer.opened(mx.endpoint, **wanted)[7][2] is True
            peer.finish()
        else:
            assert peer.failed(mx.endpoint, **wanted)[9] == "certificate-host-mismatch"
        assert mx.sessions[0].server_name == "sni.example.net"


def test_what_was_proven_is_shared_with_those_who_want_no_more(peer: Peer) -> None:
    demands: list[dict[str, object]] = [
        {},
        {"tls_verify": True},
        {"tls_names": [NAME, "other.example.net"]},
        {"tlsa": [tlsa(3, 1)]},
        {"tlsa": [tlsa(3, 0)]},
        {"tls_min": "TLSv1.3"},
    ]
    with Mx(starttls=True) as mx:
        for _ in range(2):
            for demand in demands:
                peer.opened(mx.endpoint, ehlo_name=EHLO, tls="required", tls_server_name=NAME, reuse=True, **demand)
                deliver(peer, b"Subject: shared\r\n")
                assert peer.finish(keep=True, messages=1)[0] is True
        assert mx.connects == len(demands)


def test_what_tls_has_to_be(peer: Peer) -> None:
    with Mx(starttls=True) as mx:
        opened = peer.opened(
            mx.endpoint, ehlo_name=EHLO, tls="required", tls_min="TLSv1.2", tls_ciphers="ECDHE-ECDSA-AES256-GCM-SHA384"
        )
        assert opened[7][0] == "TLSv1.3", "what ciphers of TLS 1.2 are good is another matter"
        peer.finish()
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO, tls="required", tls_ciphers="NO-SUCH")
        assert (failed[:2], failed[5]) == ([None, "bad_ciphers"], False)


def test_no_starttls(peer: Peer) -> None:
    with Mx() as mx:
        assert peer.opened(mx.endpoint, ehlo_name=EHLO, tls="opportunistic", tls_verify=True)[7] is None
        peer.finish()
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO, tls="required")
        assert (failed[0], failed[9]) == ("starttls", "starttls-not-supported")
        assert "does not offer STARTTLS" in failed[2]


def test_mode_none_does_not_ask_for_it(peer: Peer) -> None:
    with Mx(starttls=True) as mx:
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO)
        assert opened[7] is None
        assert b"STARTTLS" in opened[6]
        assert mx.sessions[0].commands == [b"EHLO " + EHLO.encode()]


def test_starttls_refused(peer: Peer) -> None:
    with Mx({"starttls": say(b"454 4.7.0 not now\r\n")}, starttls=True) as mx:
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO, tls="opportunistic")
        assert (opened[7], opened[9]) == (None, "STARTTLS refused: 454 4.7.0 not now")
        peer.finish()
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO, tls="required")
        assert (failed[0], failed[4]) == ("starttls", b"454 4.7.0 not now")


def no_tls(session: Session, reply: bytes) -> None:
    """An answer to the client's first record that is none."""
    session.receive()
    garbage(session, reply)


@pytest.mark.parametrize("behaviour", [no_tls, close, reset], ids=lambda behaviour: behaviour.__name__)
def test_a_handshake_that_breaks(proxy: Proxy, peer: Peer, behaviour) -> None:
    """Opportunistic: once more in clear, on a new connection (RFC 7435)."""
    with Mx({"tls": behaviour}, starttls=True) as mx:
        mark = len(proxy.lines)
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO, tls="opportunistic")
        assert opened[7] is None
        assert opened[9]
        deliver(peer, b"in clear\r\n")
        peer.finish()
        assert mx.connects == 2
        proxy.wait_line(rf"^failed .* destination=127\.0\.0\.1:{mx.port} .* step=tls ", since=mark)
        proxy.wait_line(rf"^connection .* destination=127\.0\.0\.1:{mx.port} .* tls=failed ", since=mark)
        assert peer.failed(mx.endpoint, ehlo_name=EHLO, tls="required")[0] == "tls"
        assert mx.connects == 3


@pytest.mark.parametrize("mode", ["opportunistic", "required"])
def test_bytes_in_front_of_tls_are_an_injection(peer: Peer, mode: str) -> None:
    with Mx({"starttls": say(b"220 go\r\n250 me\r\n")}, starttls=True) as mx:
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO, tls=mode)
        assert failed[0] == "starttls"
        assert "sent plaintext in front of TLS" in failed[2]


@pytest.mark.parametrize("mode", ["none", "opportunistic", "required"])
@pytest.mark.parametrize(
    "name", [".example.net", "mx..test", "mx example", "*.example.net", "192.0.2.256", "\u202e.test"]
)
def test_a_name_that_cannot_be_one(peer: Peer, mode: str, name: str) -> None:
    """Refused before anything is tried: opportunistic TLS with it would end in clear every time."""
    with Mx(starttls=True) as mx:
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO, tls=mode, tls_server_name=name)
        assert (failed[:2], failed[5]) == ([None, "bad_server_name"], False)
        assert failed[2].startswith(f"tls_server_name {name}: ")
        assert mx.connects == 0


@pytest.mark.parametrize(
    ("name", "sni"),
    [
        (f"{NAME}.", NAME),
        (NAME.upper(), NAME),
        ("bücher.example.net", "xn--bcher-kva.example.net"),
        ("xn--bcher-kva.example.net", "xn--bcher-kva.example.net"),
        ("127.0.0.1", None),
        ("[127.0.0.1]", None),
        ("::ffff:127.0.0.1", None),
    ],
)
def test_names_verify_in_every_spelling(peer: Peer, name: str, sni: str | None) -> None:
    """A dot at the end, capitals, U-labels; an address is verified and is no SNI (RFC 6066 section 3)."""
    with Mx(starttls=True) as mx:
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO, tls="required", tls_server_name=name, tls_verify=True)
        assert opened[7][2] is True
        assert mx.sessions[0].server_name == sni
        peer.finish()


def test_a_common_name_alone_does_not_verify(peer: Peer) -> None:
    """RFC 8461 section 4.1: only the subjectAltName counts."""
    with Mx(starttls=True, certificate="common_name_only") as mx:
        wanted = {"ehlo_name": EHLO, "tls": "required", "tls_server_name": NAME}
        failed = peer.failed(mx.endpoint, **wanted, tls_verify=True)
        assert failed[0] == "tls"
        assert "certificate not accepted: " in failed[2]
        peer.opened(mx.endpoint, **wanted)
        peer.finish()


# -- the dialogue ------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "greeting 421": ({"greeting": say(b"421 4.3.2 busy\r\n", close)}, "greeting", b"421 4.3.2 busy"),
    "greeting 554": ({"greeting": say(b"554-no\r\n554 mail here\r\n")}, "greeting", b"554 no\nmail here"),
    "garbage": ({"greeting": garbage}, "greeting", None),
    "closed": ({"greeting": close}, "greeting", None),
    "EHLO 450": ({"ehlo": say(b"450 4.7.1 who\r\n")}, "ehlo", b"450 4.7.1 who"),
    "EHLO 550": ({"ehlo": say(b"550 5.7.1 not you\r\n")}, "ehlo", b"550 5.7.1 not you"),
    "EHLO closed": ({"ehlo": close}, "ehlo", None),
}


@pytest.mark.parametrize(("script", "step", "reply"), SCRIPTS.values(), ids=SCRIPTS)
def test_a_session_that_does_not_come_up(peer: Peer, script: dict, step: str, reply: bytes | None) -> None:
    with Mx(script) as mx:
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO)
        assert failed[:2] == [step, "upstream_failed"]
        assert (failed[4], failed[5]) == (reply, True)
        assert failed[8] == [[list(mx.endpoint), step, failed[3], reply, failed[2], ""]]


def test_a_reset_and_a_silence(peer: Peer) -> None:
    with Mx({"greeting": reset}) as mx:
        step, number = peer.failed(mx.endpoint, ehlo_name=EHLO)[:4:3]
        assert (step in ("connect", "greeting"), number) == (True, 104)  # it may come before we know of the connection
    with Mx({"ehlo": mute}) as mx:
        failed = peer.failed(mx.endpoint, ehlo_name=EHLO, deadline_ms=300)
        assert failed[:4:3] == ["ehlo", 110]


def test_an_ehlo_reply_that_does_not_fit(peer: Peer) -> None:
    """As long as a reply may be, of bytes that each become four: it is cut, and the session stands."""
    lines = b"".join(b"250-" + b"\xff" * 1000 + b"\r\n" for _ in range(30)) + b"250 END\r\n"
    with Mx({"ehlo": say(lines)}) as mx:
        opened = peer.opened(mx.endpoint, ehlo_name=EHLO)
        assert all(len(line) <= 4096 for line in opened[6])
        assert 0 < sum(map(len, opened[6])) <= 16_384


# -- several destinations ----------------------------------------------------------------------------------------------


def failures(proxy: Proxy) -> Counter[str]:
    """Outgoing connections that did not come to be, by step."""
    with socket.create_connection(proxy.door("status"), timeout=30) as sock:
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    found = re.findall(r'^greenarrow_proxy_failed_total\{step="(\w+)"\} (\d+)', answer, re.M)
    return Counter({step: int(count) for step, count in found})


def test_destinations_are_tried_in_order(proxy: Proxy, peer: Peer) -> None:
    with (
        closed_port() as nobody,
        Mx({"greeting": say(b"421 4.3.2 busy\r\n", close)}) as busy,
        Mx({"ehlo": reset}) as broken,
        Mx() as good,
        Mx() as unused,
    ):
        mark, before = len(proxy.lines), failures(proxy)
        opened = peer.opened(nobody, busy.endpoint, broken.endpoint, good.endpoint, unused.endpoint, ehlo_name=EHLO)
        assert opened[1] == list(good.endpoint)
        tried = [(nobody, "connect"), (busy.endpoint, "greeting"), (broken.endpoint, "ehlo")]
        assert [attempt[:2] for attempt in opened[8]] == [[list(address), step] for address, step in tried]
        assert opened[8][1][3] == b"421 4.3.2 busy"
        peer.finish()
        number = proxy.wait_line(r"^connection id=(\d+) .*outcome=client_closed", since=mark)[1]
        lines = proxy.matching(rf"^failed id={number} instance=mta-1 .* source=127\.0\.0\.5 ", since=mark)
        assert len(lines) == 3
        for line, ((host, port), step) in zip(lines, tried, strict=True):
            assert f" destination={host}:{port} " in line
            assert f" step={step} " in line
        assert failures(proxy) - before == Counter(step for _, step in tried)
        assert (busy.connects, broken.connects, good.connects, unused.connects) == (1, 1, 1, 0)


def test_every_failure_has_its_reason(peer: Peer) -> None:
    with closed_port() as nobody, Mx({"greeting": say(b"421 4.3.2 busy\r\n", close)}) as busy, Mx() as plain:
        failed = peer.failed(nobody, busy.endpoint, plain.endpoint, ehlo_name=EHLO, tls="required")
        assert failed[:2] == ["starttls", "upstream_failed"]
        assert [attempt[:4] for attempt in failed[8]] == [
            [list(nobody), "connect", 111, None],
            [list(busy.endpoint), "greeting", 0, b"421 4.3.2 busy"],
            [list(plain.endpoint), "starttls", 0, None],
        ]


def test_a_5xx_ends_the_attempt(peer: Peer) -> None:
    with Mx({"greeting": say(b"554 5.7.1 no\r\n")}) as no, Mx() as unused:
        failed = peer.failed(no.endpoint, unused.endpoint, ehlo_name=EHLO)
        assert (failed[0], failed[4], len(failed[8])) == ("greeting", b"554 5.7.1 no", 1)
        assert unused.connects == 0


def test_one_deadline_is_shared_by_all(peer: Peer) -> None:
    """The silent ones take their part of it, and leave enough for the last."""
    with Mx({"greeting": mute}) as first, Mx({"greeting": mute}) as second, Mx() as good:
        opened = peer.opened(first.endpoint, second.endpoint, good.endpoint, ehlo_name=EHLO, deadline_ms=1500)
        assert opened[1] == list(good.endpoint)
        failed = peer_failed_after_end(peer, first, second)
        assert [attempt[1:3] for attempt in failed[8]] == [["greeting", 110]] * 2


def peer_failed_after_end(peer: Peer, *silent: Mx) -> list:
    peer.finish()
    return peer.failed(*(mx.endpoint for mx in silent), ehlo_name=EHLO, deadline_ms=400)


def test_a_destination_without_a_route_is_passed_over() -> None:
    """Nor does it spoil the others that the system may have no address of its family."""
    allowed = "allow_destination 127.0.0.0/8, 2001:db8::/32\n"
    with Proxy(allowed) as proxy, channel(proxy.native) as peer, Mx() as mx:
        opened = peer.open(("2001:db8::25", 25), mx.endpoint, source=None, ehlo_name=EHLO, deadline_ms=2000)
        if opened[0] == mta.FAILED:  # a machine with a default IPv6 address that may not be left from
            assert opened[2] == "source_not_allowed"
        else:
            assert opened[2] == list(mx.endpoint)
