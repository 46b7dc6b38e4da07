"""The end of an SMTP session on a channel in which the proxy took part: END comes, or it is waited for in vain."""

from __future__ import annotations

import gevent
import pytest

from proxy.doors.native.dialogue import await_end
from proxy.doors.native.link import ClientGone
from proxy.net.framed import FramedStream
from proxy.net.relay import Engine
from proxy.net.tls import PlainStream
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from tests.loopback.net.relays import close_peers, tcp_pair, until

EOF, DATA = frames.encode(m.Eof()), frames.encode_data(b"late")


@pytest.fixture
def channel():
    """The client's socket, the engine, our end."""
    engine = Engine()
    client, ours = tcp_pair("127.0.0.1")
    client.settimeout(30)
    engine.register(ours.fileno())
    decoder = frames.FrameDecoder(frames.MAX_PAYLOAD)
    yield client, engine, FramedStream(PlainStream(ours), decoder, frames.CHANNEL_FROM_CLIENT)
    engine.close(ours)
    engine.stop()
    close_peers()


@pytest.mark.parametrize("said", [b"", EOF, DATA, DATA + EOF])
def test_an_end_that_never_comes_is_not_waited_for_for_ever(channel, said):
    client, engine, stream = channel
    client.sendall(said)
    waits = gevent.spawn(await_end, engine, stream, 0.05)
    with pytest.raises(ClientGone, match="half_close_timeout"):
        waits.get(timeout=30)
    assert client.recv(100) == EOF
    until(lambda: not engine.alarms._buckets, what="no deadline is left")


@pytest.mark.parametrize("said", [b"", EOF, DATA, DATA + EOF])
def test_an_end_calls_the_deadline_off(channel, said):
    client, engine, stream = channel
    waits = gevent.spawn(await_end, engine, stream, 60.0)
    assert client.recv(100) == EOF
    client.sendall(said + frames.encode(m.End(True, 1)))
    waits.get(timeout=30)
    assert stream.word == m.End(True, 1)
    assert not any(engine.alarms._buckets.values())
