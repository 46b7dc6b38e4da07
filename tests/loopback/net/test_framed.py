"""A stream in DATA frames: what is said between them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from socket import SHUT_WR

import gevent
import pytest

from proxy.egress.via import Channel
from proxy.model import Endpoint
from proxy.net.framed import FramedStream
from proxy.net.relay import Engine
from proxy.net.tls import PlainStream
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from tests.loopback.net.relays import close_peers, read_all, tcp_pair, until

PROBE = frames.encode(m.Probe())
Pair = tuple[gevent.socket.socket, FramedStream, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The other end, and a channel's."""
    engine = Engine()
    peer, ours = tcp_pair(buffers=4096)
    engine.register(ours.fileno())
    channel = Channel(engine, Endpoint("192.0.2.1", 125), PlainStream(ours), frames.FrameDecoder())
    yield peer, channel.stream, channel
    engine.close(ours)
    engine.stop()
    close_peers()


def test_a_probe_between_bytes_is_none_of_them(pair: Pair) -> None:
    peer, stream, _ = pair
    peer.sendall(frames.encode_data(b"one") + PROBE + frames.encode_data(b"two") + PROBE)
    received = b""

    def receive() -> bool:
        nonlocal received
        with contextlib.suppress(BlockingIOError):
            received += stream.recv(100)
        return received == b"onetwo"

    until(receive, what="all of it")
    with pytest.raises(BlockingIOError):
        stream.recv(100)
    assert stream.word is None


def test_a_probe_in_front_of_ended_is_passed_over(pair: Pair) -> None:
    peer, stream, channel = pair
    peer.sendall(PROBE * 2 + frames.encode(m.Ended(False, "not_offered")))
    assert channel.end()
    assert stream.word is None
    assert peer.recv(100) == frames.encode(m.End(False))


def test_whoever_reads_nothing_is_not_probed_without_end(pair: Pair) -> None:
    peer, stream, _ = pair
    stream.probe()
    assert peer.recv(100) == PROBE
    while not stream.unsent:
        stream.send(bytes(65536))
    left = len(stream._out)
    for _ in range(100):
        stream.probe()
    assert len(stream._out) == left, "nor while bytes wait for it here"
    stream._out = b""
    for _ in range(100):
        stream.probe()
    assert not stream.unsent, "nor while they wait in the kernel"
    stream.socket.shutdown(SHUT_WR)
    assert PROBE not in read_all(peer)
