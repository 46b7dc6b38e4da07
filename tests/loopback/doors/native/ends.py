"""Both ends of a session on a channel, as the program has them, of streams that a test has at hand."""

from __future__ import annotations

from proxy.doors.native.entrance import Guest
from proxy.egress.receiver import Receiver
from proxy.model import Endpoint
from proxy.net.tls import Stream
from proxy.protocols.native import frames
from proxy.protocols.native.auth import ServerHandshake

CLIENT = Endpoint("127.0.0.1", 9)


def guest(stream: Stream) -> Guest:
    """A client that has been let in; frames may be as long as they are after that."""
    handshake = ServerHandshake(lambda instance: (), lambda key_id: None, nonce=bytes(32))
    handshake.decoder = frames.FrameDecoder(frames.MAX_PAYLOAD)
    return Guest(1, stream, CLIENT, handshake)


def receiver(stream: Stream) -> Receiver:
    return Receiver(stream, "127.0.0.5", Endpoint("127.0.0.2", 25), Endpoint("127.0.0.5", 2525), 0.0, 60.0)
