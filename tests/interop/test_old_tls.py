"""Receivers with old TLS, by OpenSSL's own server: opportunistic TLS takes what they have, as Postfix and Exim do
(RFC 7435); where something has to be proven it does not."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.certificates import NAME
from tests.independent_client import OPENED, channel
from tests.peers import free_port, listening, program
from tests.program import Proxy
from tests.waiting import wait_for

#: What the server is told → how it looks to us.
SERVERS = {
    "TLS 1.0": (["-tls1"], "TLSv1"),
    "TLS 1.1": (["-tls1_1"], "TLSv1.1"),
    "RSA key exchange, GCM": (["-tls1_2", "-cipher", "AES128-GCM-SHA256:@SECLEVEL=0"], "TLSv1.2"),
    "RSA key exchange, CBC": (["-tls1_2", "-cipher", "AES128-SHA:@SECLEVEL=0"], "TLSv1.2"),
    "ECDHE with SHA-1": (["-tls1_2", "-cipher", "ECDHE-RSA-AES128-SHA:@SECLEVEL=0"], "TLSv1.2"),
    "a key of 1024 bits": (["-tls1_2", "-cipher", "DEFAULT:@SECLEVEL=0"], "TLSv1.2"),
}


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


@contextmanager
def s_server(tmp_path: Path, words: list[str], bits: int) -> Iterator[tuple[tuple[str, int], subprocess.Popen[bytes]]]:
    """`openssl s_server`: TLS from the first byte; its standard input and output are what it says and hears."""
    openssl = program("openssl")
    key = rsa.generate_private_key(65537, bits)
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    request = ["-subj", "/CN=mx.example.net", "-key", str(tmp_path / "key.pem"), "-days", "2"]
    made = [openssl, "req", "-x509", "-new", *request, "-out", str(tmp_path / "cert.pem")]
    subprocess.run(made, check=True, capture_output=True)
    port = free_port("127.0.0.1")
    if not any("-cipher" in word for word in words):
        words = [*words, "-cipher", "DEFAULT:@SECLEVEL=0"]
    command = [openssl, "s_server", "-accept", f"127.0.0.1:{port}", "-quiet", *words]
    command += ["-cert", str(tmp_path / "cert.pem"), "-key", str(tmp_path / "key.pem")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            assert server.stdin is not None
            wait_for(lambda: listening(("127.0.0.1", port)), what="the server listens")
            yield ("127.0.0.1", port), server
        finally:
            server.kill()


def greet(server: subprocess.Popen[bytes]) -> None:
    """Says what a receiver says until the session is up."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(b"220 mx.example.net ESMTP\r\n")
    server.stdin.flush()
    while b"EHLO" not in server.stdout.readline():
        pass
    server.stdin.write(b"250 mx.example.net\r\n")
    server.stdin.flush()


@pytest.mark.parametrize("kind", SERVERS)
def test_whatever_it_has(proxy: Proxy, tmp_path: Path, kind: str) -> None:
    words, version = SERVERS[kind]
    bits = 1024 if "bits" in kind else 2048
    with s_server(tmp_path, words, bits) as (address, server), channel(proxy.native) as peer:
        peer.say_open(address, ehlo_name="mta.example.com", tls="implicit")
        greet(server)
        answer, fields = peer.hear()
        assert answer == OPENED, fields
        assert fields[7][0] == version


@pytest.mark.parametrize("kind", ["TLS 1.0", "TLS 1.1", "a key of 1024 bits"])
def test_not_where_something_has_to_be_proven(proxy: Proxy, tmp_path: Path, kind: str) -> None:
    words, _ = SERVERS[kind]
    wanted = {"ehlo_name": "mta.example.com", "tls": "implicit", "tls_server_name": NAME, "tls_verify": True}
    bits = 1024 if "bits" in kind else 2048
    with s_server(tmp_path, words, bits) as (address, _server), channel(proxy.native) as peer:
        assert peer.failed(address, **wanted)[0] == "tls"
