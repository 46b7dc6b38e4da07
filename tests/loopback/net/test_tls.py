"""`TlsStream` on real sockets: closing in both directions, peers that close badly; and the listener's certificate."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from proxy.net import identities
from proxy.net.conversation import receive, send_all
from proxy.net.identities import ServerIdentity
from proxy.net.relay import Engine, RawSocket
from proxy.net.tls import PlainStream, TlsStream
from proxy.protocols.native.auth import certificate_hash
from tests.loopback.net.relays import tcp_pair, until


@pytest.fixture(scope="module")
def identity() -> ServerIdentity:
    return identities.generated_identity("proxy.example.com")


class Pair:
    """Two streams that have shaken hands, each on a registered raw socket."""

    def __init__(self, identity: ServerIdentity, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        self.engine = Engine()
        left, right = (_raw(end) for end in socket.socketpair(socket.AF_UNIX))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if version is ssl.TLSVersion.TLSv1_2 else identity.context
        if server is not identity.context:
            trustme.CA().issue_cert("a.example").configure_cert(server)
            server.maximum_version = version
        self.near = TlsStream(left, context, server_side=False)
        self.far = TlsStream(right, server, server_side=True)
        done = [False, False]
        while not all(done):
            done = [ready or stream.handshake() for stream, ready in zip(self.streams, done, strict=True)]
        for stream in self.streams:
            self.engine.register(stream.socket.fileno())

    @property
    def streams(self) -> tuple[TlsStream, TlsStream]:
        return self.near, self.far

    def close(self) -> None:
        for stream in self.streams:
            self.engine.close(stream.socket)
        self.engine.stop()


def _raw(sock: socket.socket) -> RawSocket:
    sock.setblocking(False)
    return RawSocket(sock.family, sock.type, 0, sock.detach())


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
def pair(request: pytest.FixtureRequest, identity: ServerIdentity) -> Iterator[Pair]:
    pair = Pair(identity, request.param)
    yield pair
    pair.close()


def test_bytes_arrive_in_records(pair: Pair) -> None:
    payload = os.urandom(100_000)
    assert pair.near.send(payload[:50_000]) == 50_000
    received = b""
    while len(received) < 50_000:
        received += receive(pair.engine, pair.far, 65536)
    assert received == payload[:50_000]
    with pytest.raises(BlockingIOError):
        pair.far.recv(65536)


def test_a_record_from_an_older_read_does_not_hide_what_came_since(pair: Pair) -> None:
    """The edge for what came since is used up by whoever was woken by it: only a read of the socket finds it."""
    pair.near.send(b"a" * 100)
    pair.near.send(b"b" * 100)
    assert pair.far.recv(65536) == b"a" * 100  # both records were read from the socket
    pair.near.send(b"c" * 100)
    assert pair.far.recv(65536) == b"b" * 100
    assert not pair.far.drained
    assert pair.far.recv(65536) == b"c" * 100
    assert pair.far.drained


def test_a_full_socket_takes_no_more_until_it_has_room(pair: Pair) -> None:
    payload, sent = os.urandom(65536), 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += pair.near.send(payload)
    assert pair.near.unsent
    received = 0
    while received < sent:
        received += len(receive(pair.engine, pair.far, 65536))
        pair.near.flush()
    assert received == sent
    assert not pair.near.unsent


def test_closing_one_direction_leaves_the_other(identity: ServerIdentity) -> None:
    pair = Pair(identity)
    pair.near.finish()
    assert receive(pair.engine, pair.far) == b""
    pair.far.send(b"a late reply")
    pair.far.finish()
    assert receive(pair.engine, pair.near) == b"a late reply"
    assert receive(pair.engine, pair.near) == b""
    pair.close()


def test_closing_does_not_lose_what_the_peer_has_said(identity: ServerIdentity) -> None:
    """Several records have been read from the socket, and only one of them has been asked for."""
    pair = Pair(identity)
    for text in (b"one", b"two", b"three"):
        pair.far.send(text)
    assert receive(pair.engine, pair.near, 65536) == b"one"
    pair.near.finish()
    assert receive(pair.engine, pair.near, 65536) == b"two"
    assert receive(pair.engine, pair.near, 65536) == b"three"
    assert receive(pair.engine, pair.far) == b""
    pair.close()


def test_a_peer_that_closes_without_a_word(pair: Pair) -> None:
    pair.far.send(b"221 bye")
    pair.far.socket.close()
    assert receive(pair.engine, pair.near) == b"221 bye"
    assert receive(pair.engine, pair.near) == b""
    assert pair.near.recv(10) == b""


def test_a_peer_that_resets(identity: ServerIdentity) -> None:
    peer, raw = tcp_pair()
    engine = Engine()
    engine.register(raw.fileno())
    stream = TlsStream(raw, identity.context, server_side=True)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    with pytest.raises(ConnectionResetError):
        until(stream.handshake)
    engine.close(raw)
    engine.stop()


def test_bytes_that_are_not_tls(pair: Pair) -> None:
    pair.near.socket.send(b"\x17\x03\x03\x00\x20" + bytes(32))
    with pytest.raises(ssl.SSLError):
        receive(pair.engine, pair.far)


class _KeyUpdates:
    """Stands for OpenSSL under a peer who asks for key updates without end: each read makes an answer and no byte."""

    def __init__(self, answers: ssl.MemoryBIO) -> None:
        self._answers = answers

    def pending(self) -> int:
        return 0

    def read(self, _size: int) -> bytes:
        self._answers.write(bytes(22))
        raise ssl.SSLWantReadError


def test_a_peer_who_asks_for_key_updates_and_reads_no_answer(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    while not pair.near.unsent:
        pair.near.send(bytes(65536))  # it reads nothing
    monkeypatch.setattr(pair.near, "tls", _KeyUpdates(pair.near._outgoing))
    for _ in range(3000):
        pair.far.socket.send(bytes(5))
        with pytest.raises(BlockingIOError):
            pair.near.recv(65536)
        if pair.near._outgoing.pending > 16384:
            break
    else:
        pytest.fail("so many are not kept")
    pair.far.socket.send(bytes(5))
    before = pair.near._outgoing.pending
    with pytest.raises(BlockingIOError):
        pair.near.recv(65536)
    assert pair.near.socket.recv(5) == bytes(5), "what it sends stays in the kernel"
    assert pair.near._outgoing.pending <= before + 22


class _Counted:
    """An object of OpenSSL's whose reads are counted."""

    def __init__(self, tls: ssl.SSLObject) -> None:
        self._tls = tls
        self.reads = 0

    def pending(self) -> int:
        return self._tls.pending()

    def read(self, size: int) -> bytes:
        self.reads += 1
        return self._tls.read(size)


def test_openssl_is_asked_for_bytes_when_it_may_have_some(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says by an exception that it has none, which costs more than all else of a short read."""
    for stream in (pair.near, pair.far):  # tickets, if there are any
        with pytest.raises(BlockingIOError):
            stream.recv(100)
    counted = _Counted(pair.near.tls)
    monkeypatch.setattr(pair.near, "tls", counted)
    for text in (b"one", b"two"):
        pair.far.send(text)
        assert pair.near.recv(100) == text
    assert counted.reads == 2
    pair.far.send(b"three and four")
    assert (pair.near.recv(5), pair.near.recv(100)) == (b"three", b" and four")
    assert counted.reads == 4
    pair.far.finish()
    assert [pair.near.recv(100) for _ in range(3)] == [b""] * 3


def test_a_plain_stream_has_the_same_shape() -> None:
    peer, raw = tcp_pair()
    engine = Engine()
    engine.register(raw.fileno())
    stream = PlainStream(raw)
    send_all(engine, stream, b"hello")
    assert peer.recv(10) == b"hello"
    stream.finish()
    assert peer.recv(10) == b""
    peer.sendall(b"late")
    assert receive(engine, stream) == b"late"
    engine.close(raw)
    engine.stop()


# -- the listener's certificate ----------------------------------------------------------------------------------------


def files(tmp_path: Path, chain: bytes, key: bytes) -> tuple[str, str]:
    paths = tmp_path / "cert.pem", tmp_path / "key.pem"
    paths[0].write_bytes(chain)
    paths[1].write_bytes(key)
    return str(paths[0]), str(paths[1])


def test_the_hash_is_the_leafs(tmp_path: Path) -> None:
    leaf = trustme.CA().create_child_ca().issue_cert("proxy.example.com")
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    identity = identities.load_identity(*files(tmp_path, chain, leaf.private_key_pem.bytes()))
    der = ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())
    assert identity.certificate == certificate_hash(der)
    pair = Pair(identity)
    assert certificate_hash(pair.near.tls.getpeercert(binary_form=True) or b"") == identity.certificate
    pair.close()


def test_a_generated_certificate_touches_no_disk_and_is_each_time_another() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert identities.generated_identity("x").certificate != identities.generated_identity("x" * 300).certificate
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_are_of_no_use(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    leaf, other = (trustme.CA().issue_cert("a.example") for _ in range(2))
    chain = leaf.cert_chain_pems[0].bytes()
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    for certificate, private in ((chain, other.private_key_pem.bytes()), (chain, b""), (b"", b""), (chain, locked)):
        with pytest.raises(identities.UnfitIdentity):
            identities.load_identity(*files(tmp_path, certificate, private))
    with pytest.raises(identities.UnfitIdentity, match="nowhere: No such file"):
        identities.load_identity(str(tmp_path / "nowhere"), str(tmp_path / "key.pem"))
