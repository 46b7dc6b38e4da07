"""TLS with a client that has just connected: look what it speaks, and shake hands in the clients' thread.

The deadline, and the bound on how many are at it, are the door's.
"""

from __future__ import annotations

import ssl
from _socket import MSG_PEEK
from typing import Final

from proxy.errors import PeerError
from proxy.net.apart import for_clients
from proxy.net.conversation import shake_hands
from proxy.net.relay import Engine, RawSocket
from proxy.net.tls import TlsStream
from proxy.protocols.recognise import wrong_door

#: The first byte of a TLS connection: a handshake record (RFC 8446 section 5.1).
_TLS_RECORD: Final = b"\x16"
#: Bytes that are looked at to say what a client speaks who is wrong here.
_ENOUGH_TO_KNOW: Final = 64


def first_bytes(engine: Engine, sock: RawSocket) -> bytes:
    """Look without taking them; b"": it closed without a byte.

    Raises:
        OSError: the client is gone.
    """
    while True:
        try:
            return sock.recv(_ENOUGH_TO_KNOW, MSG_PEEK)
        except BlockingIOError:
            engine.wait(sock.fileno())


def speaks_tls(first: bytes) -> bool:
    """Whether a client begins so with TLS."""
    return first[:1] == _TLS_RECORD


def begin_tls(
    engine: Engine, sock: RawSocket, context: ssl.SSLContext, host: str, first: bytes, directive: str
) -> TlsStream:
    """The stream, with the handshake done.

    Args:
        host: where the client comes from: whoever floods us with handshakes waits for its own.
        first: what it begins with. directive: why TLS is expected here, for people.

    Raises:
        PeerError: it speaks something else, or TLS that cannot be had. ConnectionError: it is gone.
    """
    if not speaks_tls(first):
        raise PeerError(f"the client does not speak TLS, this listener does ({directive}){wrong_door(first, 'TLS')}")
    stream = TlsStream(sock, context, server_side=True)
    stream.turn.key = host
    try:
        shake_hands(engine, stream, for_clients())
    except ConnectionError:
        raise
    except OSError as error:
        raise PeerError(f"no TLS: {getattr(error, 'reason', None) or error.strerror or 'closed'}") from None
    return stream
