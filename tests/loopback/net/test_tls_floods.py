"""A TLS peer that feeds us for ever and says nothing: what is done in one call, in one turn and in all, by counting."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator

import gevent
import pytest

from proxy.errors import NoPlaintext
from proxy.net import tls
from proxy.net.conversation import receive, shake_hands
from proxy.net.relay import Engine, RawSocket
from proxy.net.tls import TlsStream
from proxy.net.turns import TurnOver, turns
from tests.certificates import server_context
from tests.tls_records import KeyLog, Records


class Flooded:
    """A stream of ours, `side` of the handshake, and the other side's hand on the wire."""

    def __init__(self, side: str) -> None:
        self.engine = Engine()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.raw = RawSocket(ours.family, ours.type, 0, ours.detach())
        self.engine.register(self.raw.fileno())
        self.wire = theirs
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
        server = server_context("valid")
        server.num_tickets = 0
        we_serve = side == "SERVER"
        self.stream = TlsStream(self.raw, server if we_serve else client, server_side=we_serve)
        with KeyLog(client if we_serve else server) as log:
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            peer = (client if we_serve else server).wrap_bio(incoming, outgoing, server_side=not we_serve)
            done = [False, False]
            while not all(done):
                done[0] = done[0] or self.stream.handshake()
                with contextlib.suppress(ssl.SSLWantReadError):
                    peer.do_handshake()
                    done[1] = True
                if outgoing.pending:
                    theirs.send(outgoing.read())
                with contextlib.suppress(BlockingIOError):
                    incoming.write(theirs.recv(65536))
            self.records: Records = log.records(peer, "CLIENT" if we_serve else "SERVER")

    def close(self) -> None:
        self.engine.close(self.raw)
        self.wire.close()
        self.engine.stop()


@pytest.fixture(params=["SERVER", "CLIENT"])
def flooded(request: pytest.FixtureRequest) -> Iterator[Flooded]:
    flooded = Flooded(request.param)
    yield flooded
    flooded.close()


#: What a peer may send without a byte of content: name → function of its records and a count of bytes.
FLOODS: dict[str, Callable[[Records, int], bytes]] = {
    "key updates": lambda records, size: records.key_updates(size // 27),
    "key updates to be answered": lambda records, size: records.key_updates(size // 27, answer=True),
    "tickets": lambda records, size: records.tickets(size // 40, at_a_time=1),
    "tickets that share records": lambda records, size: records.tickets(size // 19),
    "empty records": lambda records, size: b"".join(records.data(b"") for _ in range(size // 22)),
}
#: Our side, and what it may be sent: a client sends no tickets.
PAIRS = [
    (side, flood) for side in ("SERVER", "CLIENT") for flood in FLOODS if side == "CLIENT" or "tickets" not in flood
]


@pytest.mark.parametrize(("flooded", "flood"), PAIRS, indirect=["flooded"])
def test_one_call_takes_a_bounded_bite(flooded: Flooded, flood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    feed = TlsStream._feed

    def counted(stream: TlsStream) -> None:
        before = stream._at
        feed(stream)
        fed.append(stream._at - before)

    monkeypatch.setattr(TlsStream, "_feed", counted)
    flooded.wire.send(FLOODS[flood](flooded.records, 40_000))
    with pytest.raises((TurnOver, ssl.SSLError)):  # OpenSSL itself ends what is empty
        flooded.stream.recv(65536)
    assert len(fed) <= tls._RECORDS_A_CALL
    assert sum(fed[:-1]) <= tls._BYTES_A_CALL


@pytest.mark.parametrize(("flooded", "flood"), PAIRS, indirect=["flooded"])
def test_it_is_an_error_in_the_end(flooded: Flooded, flood: str) -> None:
    flooded.wire.send(FLOODS[flood](flooded.records, 200_000))
    calls: list[None] = []
    with pytest.raises((NoPlaintext, ssl.SSLError)) as error:
        _call_on(flooded, calls)
    if error.type is NoPlaintext:
        assert flooded.stream._silent <= tls._MOST_SILENT + 16_700
        assert len(calls) >= 4


def _call_on(flooded: Flooded, calls: list[None]) -> None:
    while True:
        calls.append(None)
        with pytest.raises(TurnOver):
            flooded.stream.recv(65536)
        with contextlib.suppress(BlockingIOError):
            flooded.wire.recv(65536)  # or its answers would stop us


def test_others_run_in_between(flooded: Flooded) -> None:
    """Each of them gets a turn for each of the flooded one's."""
    flooded.wire.send(flooded.records.key_updates(2400) + flooded.records.data(b"word"))
    before, ticks = turns().rounds, []

    def other() -> None:
        while not reader.ready():
            ticks.append(turns().rounds)
            gevent.sleep(1e-9)

    reader = gevent.spawn(receive, flooded.engine, flooded.stream)
    meanwhile = gevent.spawn(other)
    assert reader.get(timeout=30) == b"word"
    meanwhile.join()
    assert turns().rounds - before >= 2400 // tls._RECORDS_A_CALL // 2
    assert len(set(ticks)) >= turns().rounds - before - 1


def test_content_in_between_keeps_the_connection(flooded: Flooded) -> None:
    """A peer that also says something is served as long as it likes, in turns."""
    for _ in range(5):
        flooded.wire.send(flooded.records.key_updates(2000) + flooded.records.data(b"word"))
        assert receive(flooded.engine, flooded.stream) == b"word"


def test_what_comes_cut_in_pieces_is_one(flooded: Flooded) -> None:
    """Records are cut out of reads that end anywhere, in the middle of a header too."""
    wire = b"".join(flooded.records.data(b"%d" % number) + flooded.records.key_updates(1) for number in range(20))
    heard, sent = b"", 0
    for size in (1, 2, 3, 4, 5, 6, 7, 11, 100):
        flooded.wire.send(wire[sent : sent + size])
        sent += size
        heard += _all(flooded.stream)
    flooded.wire.send(wire[sent:])
    heard += _all(flooded.stream)
    assert heard == b"".join(b"%d" % number for number in range(20))


def _all(stream: TlsStream) -> bytes:
    heard = b""
    while True:
        try:
            heard += stream.recv(65536)
        except BlockingIOError:
            return heard


def test_a_header_that_is_cut_by_the_end_of_the_file(flooded: Flooded) -> None:
    flooded.wire.send(flooded.records.data(b"last") + b"\x17\x03")
    flooded.wire.shutdown(socket.SHUT_WR)
    assert flooded.stream.recv(100) == b"last"
    assert flooded.stream.recv(100) == b""
    assert flooded.stream.recv(100) == b""


def test_a_handshake_that_does_not_end() -> None:
    """A TLS 1.2 server may send HelloRequests for ever; a client that shakes hands has to ignore them (RFC 5246
    section 7.4.1.1), OpenSSL without a limit of its own."""
    engine = Engine()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    raw = RawSocket(ours.family, ours.type, 0, ours.detach())
    engine.register(raw.fileno())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    stream = TlsStream(raw, context, server_side=False)
    flood = b"\x16\x03\x03\x40\x00" + bytes(4) * 4096
    sender = gevent.spawn(_repeat, theirs, flood)
    with pytest.raises(NoPlaintext), gevent.Timeout(20):
        shake_hands(engine, stream)
    sender.kill()
    engine.close(raw)
    theirs.close()
    engine.stop()


def _repeat(sock: socket.socket, data: bytes) -> None:
    for _ in range(100):
        try:
            sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            gevent.sleep(0.001)
        except OSError:
            return
