"""Waiting reads and writes on a stream, for greenlets that set something up or take it down.

Each tries first and waits then (see `relay`). Deadlines are the caller's: one `gevent.Timeout` around a phase. Relays
in progress do not use this.
"""

from __future__ import annotations

import select
from _socket import SHUT_WR

from gevent import Timeout

from proxy.net.framed import FramedStream
from proxy.net.relay import Engine, RawSocket
from proxy.net.tls import Stream

READ_SIZE = 16384
#: A client that is told why its connection ends gets this long, and may send this much, until it has read it and
#: closed.
FAREWELL_SECONDS = 2.0
_FAREWELL_BYTES = 65536


def receive(engine: Engine, stream: Stream | FramedStream, size: int = READ_SIZE) -> bytes:
    """Wait for bytes; b"" at the end of the file.

    Raises:
        OSError: the connection is broken.
    """
    while True:
        try:
            return stream.recv(size)
        except BlockingIOError:
            engine.wait(stream.socket.fileno())


def send_all(engine: Engine, stream: Stream | FramedStream, data: bytes) -> None:
    """Wait until the kernel has taken all of it.

    Raises:
        OSError: the connection is broken.
    """
    while data or stream.unsent:
        try:
            if data:
                data = data[stream.send(data) :]
            else:
                stream.flush()
            if not stream.unsent:
                continue
        except BlockingIOError:
            pass
        engine.wait(stream.socket.fileno())


def has_gone(sock: RawSocket) -> bool:
    """Whether the peer has closed, at least its sending side; what it sent before may still be unread."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def farewell(engine: Engine, stream: Stream, data: bytes) -> None:
    """Say the last word (perhaps none) and wait a little until it is read; the caller closes.

    A plain close with bytes unread in our buffer would be a reset, and a reset takes the last word away from the peer.
    """
    timer = Timeout.start_new(FAREWELL_SECONDS)
    try:
        send_all(engine, stream, data)
        stream.finish()
        send_all(engine, stream, b"")
        stream.socket.shutdown(SHUT_WR)
        left = _FAREWELL_BYTES
        while left > 0:
            received = receive(engine, stream)
            if not received:
                return
            left -= len(received)
    except OSError:
        pass
    except Timeout as fired:
        if fired is not timer:
            raise
    finally:
        timer.close()
