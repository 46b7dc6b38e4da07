"""What a channel's end says of itself, on real sockets; the clock is the test's."""

from __future__ import annotations

import pytest

from proxy.doors.native import link as module
from proxy.doors.native.link import Link
from proxy.net.relay import Engine
from proxy.net.tls import PlainStream
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from tests.loopback.doors.native import ends
from tests.loopback.net.relays import close_peers, tcp_pair


@pytest.mark.parametrize(("after", "left_ms"), [(0.0, 20_000), (12.0, 8_000), (21.0, 0)])
def test_a_goaway_that_is_said_late_tells_what_is_left(
    monkeypatch: pytest.MonkeyPatch, after: float, left_ms: int
) -> None:
    """It waits for the end of an OPEN that is served, say: the deadline does not."""
    engine = Engine()
    client, ours = tcp_pair("127.0.0.1")
    engine.register(ours.fileno())
    link = Link(engine, ends.guest(PlainStream(ours)))
    link.goes_at, link.goes_why, link.goes_code = 1020.0, "the proxy is shutting down", "draining"
    monkeypatch.setattr(module, "monotonic", lambda: 1000.0 + after)
    for _ in range(2):  # once is enough
        link.tell_goaway()
    engine.close(ours)
    engine.stop()
    client.settimeout(30)
    decoder = frames.FrameDecoder()
    while data := client.recv(4096):
        decoder.receive(data)
    frame = decoder.next_frame()
    assert frame is not None
    said = frames.decode(frame, frames.CHANNEL_FROM_PROXY)
    assert said == m.Goaway(left_ms, "the proxy is shutting down", "draining")
    assert decoder.next_frame() is None
    close_peers()
