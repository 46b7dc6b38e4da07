"""The usual events of a channel's session on real sockets: both forms do the same, and the compiled one without us.

What goes through is cut into pieces anywhere, in the middle of headers too. Both forms must have brought the same bytes
and words to both ends, and counted the same. What it costs is counted, not timed: Python functions and switches.
"""

from __future__ import annotations

import random
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import greenlet
import pytest
from gevent.ssl import SSLSocket

from proxy.doors.native.link import ClientGone, Link
from proxy.doors.native.transfer import Transfer
from proxy.errors import PeerError
from proxy.model import Ending
from proxy.net.relay import Engine, RawSocket
from proxy.net.tls import PlainStream, Stream, TlsStream
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.protocols.smtp.tracker import Tracker
from tests.certificates import authority
from tests.loopback.doors.native.ends import guest, receiver
from tests.loopback.net.relays import ENGINES, LINGER_RESET, close_peers, tcp_pair, until

COMPILED = [engine for engine in ENGINES if engine is not Engine]
END = frames.encode(m.End(True, 1))
MESSAGE = b"\r\n".join([b"a line of a message, as long as they are"] * 500) + b"\r\n.\r\n"
DIALOGUE = [
    (b"", b"220 mx.example.net\r\n"),
    (b"RSET\r\n", b"250 ok\r\n"),
    (b"MAIL FROM:<a@example.com>\r\n", b"250 ok\r\n"),
    (b"RCPT TO:<b@example.net>\r\n", b"250 ok\r\n"),
    (b"DATA\r\n", b"354 go\r\n"),
    (MESSAGE, b"250 queued\r\n"),
]


class Carried:
    """A session between a client and a receiver.

    Args:
        engine: its class. tls: both sides are under TLS.
    """

    def __init__(
        self,
        engine: type[Engine],
        tracker: Tracker | None = None,
        tls: bool = False,
        buffers: int | None = None,
    ) -> None:
        self.engine = engine()
        self.client, ours = tcp_pair("127.0.0.1", buffers)
        self.receiver, theirs = tcp_pair("127.0.0.2", buffers)
        for sock in (self.client, self.receiver):
            sock.settimeout(30)
        for sock in (ours, theirs):
            self.engine.register(sock.fileno())
        self._decoder = frames.FrameDecoder(frames.MAX_PAYLOAD)
        self._heard: list[bytes | m.Message] = []
        streams = [PlainStream(ours), PlainStream(theirs)]
        if tls:
            streams, ends = _tls(self.engine, (self.client, ours), (self.receiver, theirs))
            self.client, self.receiver = ends
        self.streams: list[Any] = streams
        self.ended: PeerError | None = None
        self.link: Link
        self.transfer: Transfer
        self.greenlet = gevent.spawn(self._carry, tracker)
        until(lambda: hasattr(self, "transfer") and self.link.waits, what="the transfer waits")

    def _carry(self, tracker: Tracker | None) -> None:
        client, theirs = self.streams
        self.link = Link(self.engine, guest(client))
        self.transfer = Transfer(self.link, receiver(theirs), tracker)
        try:
            self.transfer.carry()
        except PeerError as error:
            self.ended = error

    def hears(self) -> bytes | m.Message:
        """The next piece or word that the client gets."""
        while (frame := self._decoder.next_frame()) is None:
            data = self.client.recv(100_000)
            assert data, "the channel was closed"
            self._decoder.receive(data)
        is_data = frame[0] == frames.DATA
        return bytes(frame[1]) if is_data else frames.decode(frame, frames.CHANNEL_FROM_PROXY)

    def hears_data(self, expected: bytes) -> None:
        got = b""
        while len(got) < len(expected):
            piece = self.hears()
            assert isinstance(piece, bytes)
            got += piece
        assert got == expected

    def gets(self, expected: bytes) -> None:
        """The receiver gets just this."""
        got = b""
        while len(got) < len(expected):
            got += self.receiver.recv(len(expected) - len(got))
        assert got == expected

    def talk(self) -> None:
        """A dialogue of one message; who looks at it has heard the greeting before."""
        for question, answer in DIALOGUE[1 if self.transfer.tracker else 0 :]:
            if question:
                self.client.sendall(frames.encode_data(question))
                self.gets(question)
            self.receiver.sendall(answer)
            self.hears_data(answer)

    def close(self) -> None:
        self.greenlet.join(timeout=30)
        assert self.greenlet.successful()
        for stream in self.streams:
            self.engine.close(stream.socket)
        self.engine.stop()
        self.client.close()
        self.receiver.close()
        close_peers()


def _tls(engine: Engine, *pairs: tuple[Any, RawSocket]) -> tuple[list[Stream], list[Any]]:
    """Both pairs under TLS, ours as a server and as a client."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority().issue_cert("localhost").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    streams: list[Stream] = []
    ends: list[Any] = []
    for number, (theirs, ours) in enumerate(pairs):
        is_server = number == 0
        stream = TlsStream(ours, server if is_server else client, is_server)
        context = client if is_server else server

        def shake(stream: TlsStream = stream) -> None:
            while not stream.handshake():
                engine.wait(stream.socket.fileno())

        ours_is_up = gevent.spawn(shake)
        end = SSLSocket(sock=theirs, server_side=not is_server, _context=context)
        ours_is_up.get(timeout=30)
        streams.append(stream)
        ends.append(end)
    return streams, ends


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> type[Engine]:
    kind: type[Engine] = request.param
    return kind


@pytest.mark.parametrize("tls", [False, True], ids=["in clear", "tls"])
@pytest.mark.parametrize("seed", range(12))
def test_bytes_cut_anywhere_arrive_in_both_forms(engine: type[Engine], seed: int, tls: bool) -> None:
    draw = random.Random(seed)
    tracked = draw.random() < 0.5
    carried = Carried(engine, Tracker() if tracked else None, tls)
    up, down = 0, 0
    for _ in range(draw.randrange(5, 25)):
        said = [draw.randbytes(draw.choice([1, 2, 7, 100, 4000, 65536])) for _ in range(draw.randrange(1, 4))]
        wire = b"".join(frames.encode_data(each) for each in said)
        cuts = sorted(draw.randrange(len(wire) + 1) for _ in range(draw.randrange(4)))
        words = b"".join(said)
        for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
            carried.client.sendall(wire[start:end])
            gevent.idle()  # a read of its own, as a rule
        carried.gets(words)
        up += len(words)
        answer = draw.randbytes(draw.choice([1, 5, 70, 3000, 65536, 70_000]))
        carried.receiver.sendall(answer)
        carried.hears_data(answer)
        down += len(answer)
    carried.client.sendall(END)
    carried.close()
    assert (carried.transfer.up, carried.transfer.down, carried.ended) == (up, down, None)
    assert carried.transfer.end == m.End(True, 1)
    assert carried.link.moved > up + down
    if not tls:
        assert carried.link.moved >= 2 * (up + down)


@pytest.mark.parametrize("side", ["client", "receiver"])
def test_who_takes_nothing_stops_the_other_and_nothing_is_lost(engine: type[Engine], side: str) -> None:
    carried = Carried(engine, buffers=20_000)
    data = random.Random(1).randbytes(3_000_000)
    sender = carried.client if side == "receiver" else carried.receiver
    wire = frames.encode_data(data) if side == "receiver" else data
    sending = gevent.spawn(sender.sendall, wire)
    until(lambda: carried.transfer.blocked or carried.link.blocked, what="a side is full")
    assert carried.link.holds + len(carried.transfer._held) <= 3 * 65536
    (carried.gets if side == "receiver" else carried.hears_data)(data)
    sending.get(timeout=30)
    carried.client.sendall(END)
    carried.close()
    assert (carried.transfer.up, carried.transfer.down)[side == "client"] == len(data)


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (frames.encode_data(b"x") + frames.encode(m.End(True, 1)), ""),
        (frames.encode_data(b"x") + b"\0\0\0\0\x13", "DATA frame without a byte"),
        (frames.encode_data(b"x") + b"\0\1\0\1\x13", "frame of type 0x13 with 65537 bytes"),
        (frames.encode_data(b"x") + b"\0\0\0\1\x77\x90", "frame of type 0x77 is not allowed here"),
        (frames.encode_data(b"x") + frames.encode(m.Eof()) + frames.encode_data(b"y"), "DATA after EOF"),
    ],
    ids=["end", "empty", "too long", "unknown", "after the end"],
)
@pytest.mark.parametrize("cut", [0, 3, 8])
def test_what_is_no_data_is_the_greenlets(engine: type[Engine], wire: bytes, why: str, cut: int) -> None:
    """Behind DATA that goes on, whole or cut in a header."""
    carried = Carried(engine)
    carried.client.sendall(wire[:cut])
    gevent.idle()
    carried.client.sendall(wire[cut:])
    if not why:
        carried.gets(b"x")
    carried.close()
    assert str(carried.ended or "").startswith(why)
    assert (carried.ended is None) == (not why)


def test_half_a_header_is_given_back(engine: type[Engine]) -> None:
    """It has come while the hub moves the bytes; then the greenlet looks around."""
    carried = Carried(engine)
    carried.talk()
    frame, before = frames.encode_data(b"NOOP\r\n"), carried.transfer.moved
    carried.client.sendall(frame[:3])
    until(lambda: carried.transfer.moved == before + 3, what="half of it was read")
    carried.link.wake()
    gevent.sleep(0)
    gevent.sleep(0)
    carried.client.sendall(frame[3:])
    carried.gets(b"NOOP\r\n")
    carried.client.sendall(frames.encode(m.End(False, 0)))
    carried.close()


@pytest.mark.parametrize("who", ["client", "receiver"])
@pytest.mark.parametrize("reset", [False, True])
def test_an_end_of_a_side_is_told_the_same(engine: type[Engine], who: str, reset: bool) -> None:
    carried = Carried(engine)
    carried.client.sendall(frames.encode_data(b"x"))
    carried.gets(b"x")
    leaver = carried.client if who == "client" else carried.receiver
    if reset:
        leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    else:
        leaver.sendall(frames.encode_data(b"last") if who == "client" else b"last")
    leaver.close()
    if who == "receiver":
        heard = [carried.hears() for _ in range(1 if reset else 2)]
        carried.client.sendall(END)
        aborted = m.Aborted("upstream_failed", 104, "Connection reset by peer")
        assert heard == ([aborted] if reset else [b"last", m.Eof()])
    elif not reset:
        carried.gets(b"last")
    carried.close()
    assert isinstance(carried.ended, ClientGone) == (who == "client")
    assert carried.transfer.broken == (Ending.UPSTREAM_RESET if (who, reset) == ("receiver", True) else None)
    assert carried.transfer.receiver_done == (who == "receiver")


@contextmanager
def counted(of: Carried) -> Iterator[dict[str, int]]:
    """Calls of our Python functions, and switches to the session's greenlet."""
    counts, test = {"calls": 0, "switches": 0, "tracker": 0}, gevent.getcurrent()

    def profile(frame: Any, event: str, argument: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and "/proxy/" in name and gevent.getcurrent() is not test:
            counts["tracker" if "/proxy/protocols/smtp/" in name else "calls"] += 1

    def switched(event: str, switch: tuple[Any, Any]) -> None:
        sys.setprofile(profile)  # greenlets have one each
        counts["switches"] += switch[1] is of.greenlet

    before = greenlet.settrace(switched)
    sys.setprofile(profile)
    try:
        yield counts
    finally:
        greenlet.settrace(before)
        sys.setprofile(None)


#: Calls of our functions for a dialogue of eleven steps, the tracker's not counted: one for each piece of the client's
#: that is looked at, and one for the end. Under TLS each step is a read and a write of the stream, six calls each.
BOUNDS = {(False, False): 1, (False, True): 1 + 5, (True, False): 130, (True, True): 130}


@pytest.mark.skipif(not COMPILED, reason="the relay was not compiled")
@pytest.mark.parametrize("tracked", [False, True], ids=["not looked at", "tracked"])
@pytest.mark.parametrize("tls", [False, True], ids=["in clear", "tls"])
def test_a_dialogue_needs_no_greenlet_and_hardly_any_python(tls: bool, tracked: bool) -> None:
    tracker = Tracker() if tracked else None
    carried = Carried(COMPILED[0], tracker, tls)
    with counted(carried) as counts:
        carried.talk()
        if not tls:  # OpenSSL has an alert to say where there was no close_notify
            carried.receiver.shutdown(socket.SHUT_WR)
            assert carried.hears() == m.Eof()
    print(f"\n{counts}")
    assert counts["switches"] == 0
    assert counts["calls"] <= BOUNDS[tls, tracked], counts
    if tracker is not None:
        assert (tracker.accepted, tracker.verdict()) == (1, None)
    carried.client.sendall(END)
    carried.close()


def test_nothing_is_left_of_a_session(engine: type[Engine]) -> None:
    """No cycle that only the garbage collector would find."""
    carried = Carried(engine)
    carried.talk()
    carried.client.sendall(END)
    carried.close()
    assert carried.transfer._shortcut is None
    transfer = carried.transfer
    del carried.transfer
    assert sys.getrefcount(transfer) == 2, "it and the argument of this very call"
