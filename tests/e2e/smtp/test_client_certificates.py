"""Certificates that receivers are shown: whose, who asks for them, and what becomes of files that are wrong."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tests.clients import send, socks5
from tests.independent_client import channel
from tests.mx import Mx
from tests.program import Proxy
from tests.sharing import cached

CA = trustme.CA()
EHLO = "client.example"  # what tests.clients.Smtp says


class Files:
    """Certificates of our own, by name: `NAME.crt` and `NAME.key`, each for a host `NAME.example.org`."""

    def __init__(self, directory: Path, *names: str) -> None:
        self.directory = directory
        for name in names:
            self.make(name)

    def make(self, name: str) -> None:
        leaf = CA.issue_cert(f"{name}.example.org")
        leaf.cert_chain_pems[0].write_to_path(str(self.directory / f"{name}.crt"))
        leaf.private_key_pem.write_to_path(str(self.directory / f"{name}.key"))
        (self.directory / f"{name}.key").chmod(0o600)

    def der(self, name: str) -> bytes:
        return x509.load_pem_x509_certificate((self.directory / f"{name}.crt").read_bytes()).public_bytes(Encoding.DER)

    def lines(self, name: str, indent: str = "") -> str:
        path = self.directory / name
        return f"{indent}tls_client_certificate_file {path}.crt\n{indent}tls_client_private_key_file {path}.key\n"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path, "all", "five")


def asks(how: ssl.VerifyMode) -> object:
    def prepare(context: ssl.SSLContext) -> None:
        CA.configure_trust(context)
        context.verify_mode = how

    return prepare


@pytest.fixture
def mx() -> Iterator[Mx]:
    with Mx(starttls=True, prepare=asks(ssl.CERT_REQUIRED)) as mx:  # type: ignore[arg-type]
        yield mx


def text(files: Files, own: str = "five") -> str:
    """All show one certificate, and a source its own."""
    block = f"source here {{\n    ip 127.0.0.5, 127.0.0.6\n{files.lines(own, '    ')}}}\n"
    return "mode smtp\nreuse_connections no\n" + files.lines("all") + block


def shown(proxy: Proxy, mx: Mx, source: str) -> bytes | None:
    """What the receiver sees of a client that leaves from there."""
    with socks5(proxy.socks5, mx.endpoint, source) as sock:
        assert send(sock, b"x\r\n")[0] == 250
    return mx.sessions[-1].client_certificate


def test_by_source_and_for_all_others(files: Files, mx: Mx) -> None:
    with Proxy(text(files)) as proxy:
        assert shown(proxy, mx, "127.0.0.5") == files.der("five")
        assert shown(proxy, mx, "127.0.0.6") == files.der("five")
        assert shown(proxy, mx, "127.0.0.7") == files.der("all")
        with channel(proxy.native) as peer:
            peer.opened(mx.endpoint, source="127.0.0.5", ehlo_name="mta.example.com", tls="required")
            assert mx.sessions[-1].client_certificate == files.der("five")
        assert not any(session.resumed for session in mx.sessions[:1])


def test_a_reload_reads_them_again_and_a_tls_session_is_never_gone_on_in_as_somebody_else(files: Files, mx: Mx) -> None:
    with Proxy(text(files)) as proxy:
        first = shown(proxy, mx, "127.0.0.5")
        assert shown(proxy, mx, "127.0.0.5") == first
        assert mx.sessions[-1].resumed
        files.make("five")
        proxy.hup()
        assert shown(proxy, mx, "127.0.0.5") == files.der("five") != first
        assert not mx.sessions[-1].resumed


def test_a_shared_connection_is_for_who_appears_as_the_same(files: Files, mx: Mx) -> None:
    sharing = (
        text(files)
        .replace("reuse_connections no\n", "")
        .replace("source here {\n", f"source here {{\n    ehlo {EHLO}\n")
    )
    with Proxy(sharing) as proxy:
        first = shown(proxy, mx, "127.0.0.5")
        cached(proxy, 1, mx)
        assert shown(proxy, mx, "127.0.0.5") == first
        assert mx.connects == 1
        cached(proxy, 1, mx)
        files.make("five")
        proxy.hup()
        assert shown(proxy, mx, "127.0.0.5") == files.der("five") != first
        assert mx.connects == 2


def test_a_receiver_that_does_not_ask_sees_none(files: Files) -> None:
    with Mx(starttls=True) as mx, Proxy(text(files)) as proxy:
        assert shown(proxy, mx, "127.0.0.5") is None
        assert mx.sessions[0].encrypted


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_who_has_none_for_a_receiver_that_insists(version: ssl.TLSVersion) -> None:
    """In TLS 1.3 the receiver says so behind the handshake; it is a failure of TLS all the same."""

    def prepare(context: ssl.SSLContext) -> None:
        asks(ssl.CERT_REQUIRED)(context)  # type: ignore[operator]
        context.maximum_version = version

    with Mx(starttls=True, prepare=prepare) as mx, Proxy("mode smtp\n") as proxy, channel(proxy.native) as peer:
        wanted = {"ehlo_name": "mta.example.com", "source": "127.0.0.5"}
        failed = peer.failed(mx.endpoint, tls="required", **wanted)
        assert (failed[0], failed[9]) == ("tls", "validation-failure")
        opened = peer.opened(mx.endpoint, tls="opportunistic", **wanted)
        assert (opened[7], opened[10]) == (None, "validation-failure")
        assert "TLS handshake failed" in opened[9]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("key", "this key does not belong to the certificate"),
        ("absent", "No such file"),
        ("swapped", "are the two files swapped"),
    ],
)
def test_files_that_are_of_no_use_are_a_mistake_at_the_block(files: Files, what: str, message: str) -> None:
    good = text(files)
    bad = {
        "key": good.replace("five.key", "all.key"),
        "absent": good.replace("five.crt", "none.crt"),
        "swapped": good.replace("five.crt", "x").replace("five.key", "five.crt").replace("/x\n", "/five.key\n"),
    }[what]
    with Proxy(bad, ready=False, exit_code=78) as proxy:
        proxy.wait_exit()
        assert proxy.matching(rf"greenarrow_proxy.conf:\d+: source: here: tls_client_.*: .*{message}")
    with Proxy(good) as proxy:
        assert message in "\n".join(proxy.bad_hup(bad))


def test_one_of_the_two_is_a_mistake(files: Files) -> None:
    lines = files.lines("all").splitlines(True)
    for more in (lines[0], f"source here {{\n    ip 127.0.0.5\n    {lines[1]}}}\n"):
        with Proxy(more, ready=False, exit_code=78) as proxy:
            proxy.wait_exit()
            assert proxy.matching("is missing: the two go together")
