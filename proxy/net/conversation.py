"""Waiting reads and writes on a stream, for greenlets that set something up or take it down.

Each tries first and waits then (see `relay`), and lets others run when its turn is over (see `turns`). Deadlines are
the caller's: one alarm, or one `gevent.Timeout`, around a phase. Relays in progress do not use this.
"""

from __future__ import annotations

import errno
import functools
import os
from _socket import MSG_MORE, SHUT_WR
from time import monotonic
from typing import Final

from proxy.errors import Overloaded
from proxy.net.alarm import TimeIsUp
from proxy.net.apart import Apart
from proxy.net.framed import FramedStream
from proxy.net.relay import HEARD, UNSURE, Engine, RawSocket
from proxy.net.tls import PlainStream, Stream, TlsStream
from proxy.net.turns import TurnOver, rest
from proxy.policy.turns import READ, Turn

READ_SIZE: Final = 16384
#: A client that is told why its connection ends gets this long, and may send this much, until it has read it and
#: closed.
FAREWELL_SECONDS = 2.0
_FAREWELL_BYTES: Final = 65536


def watch_over(engine: Engine, sock: RawSocket) -> None:
    """Register a socket with the engine.

    Raises:
        Overloaded: no memory, or more sockets than one user may watch (fs.epoll.max_user_watches, epoll_ctl(2)).
    """
    try:
        engine.register(sock.fileno())
    except OSError as error:
        number = error.errno or 0
        why = "more than fs.epoll.max_user_watches" if number == errno.ENOSPC else os.strerror(number)
        raise Overloaded(f"no socket more can be watched: {why}") from None


def receive(engine: Engine, stream: Stream | FramedStream, size: int = READ_SIZE, look: bool = True) -> bytes:
    """Wait for bytes; b"" at the end of the file. Who calls this for a peer that never lets it wait takes turns.

    Args:
        look: there may be something to read; else it is known that an event will tell of what comes, and the read that
            would find nothing is saved. See `may_wait`.

    Raises:
        OSError: the connection is broken.
    """
    turn, events = stream.turn, 0
    while True:
        if not turn.spend(READ, monotonic()):
            rest_for(turn)
        elif not look:
            events = engine.wait(stream.socket.fileno())
            turn.begin(monotonic())
        look = True
        try:
            data = stream.recv(size)
        except TurnOver:
            turn.end()
        except BlockingIOError:
            look = False
        else:
            if events & UNSURE and isinstance(stream, PlainStream):
                stream.drained = False  # no other event will tell of the end
            return data


def may_wait(stream: Stream) -> bool:
    """Whether `receive` need not look first, for who has come from it or from a connect, and has not waited since."""
    return isinstance(stream, PlainStream) and stream.drained


def rest_for(turn: Turn) -> None:
    """The turn is over: let others run until the next one of its key."""
    rest(turn.key)
    turn.begin(monotonic())


def shake_hands(engine: Engine, stream: TlsStream, threads: Apart | None = None) -> None:
    """Wait until the handshake is done. A step of it may take milliseconds, so each has a turn of its own.

    Args:
        threads: where OpenSSL is to compute meanwhile.

    Raises:
        ssl.SSLError: it failed. OSError: the connection broke or was closed in the middle.
    """
    run = functools.partial(threads.call, stream.turn.key) if threads is not None else None
    while True:
        rest_for(stream.turn)
        try:
            if stream.handshake(run) if run is not None else stream.handshake():
                return
        except TurnOver:
            continue
        engine.wait(stream.socket.fileno())


def send_all(engine: Engine, stream: Stream | FramedStream, data: bytes) -> bool:
    """Wait until the kernel has taken all of it; whether that had to be waited for.

    Raises:
        OSError: the connection is broken.
    """
    waited = False
    while data or stream.unsent:
        try:
            if data:
                sent = stream.send(data)
                data = data[sent:]
            else:
                stream.flush()
            if not stream.unsent:
                continue
        except BlockingIOError:
            pass
        engine.wait(stream.socket.fileno())
        waited = True
    return waited


def farewell(engine: Engine, stream: Stream, data: bytes, missed: bool = True) -> None:
    """Say the last word (perhaps none) and wait a little until it is read; the caller closes.

    Args:
        missed: something may have come of which no event will tell.

    A plain close with bytes unread in our buffer would be a reset, and a reset takes the last word away from the peer.
    """
    alarm = engine.alarms.start(FAREWELL_SECONDS)
    try:
        if isinstance(stream, TlsStream):
            send_all(engine, stream, data)
            stream.finish()
            send_all(engine, stream, b"")
        elif data:
            _say_last(engine, stream, data)
        stream.socket.shutdown(SHUT_WR)
        if not missed:
            while not engine.wait(stream.socket.fileno()) & HEARD:
                pass
        left = _FAREWELL_BYTES
        while left > 0:
            received = receive(engine, stream)
            if not received:
                return
            left -= len(received)
    except OSError:
        pass
    except TimeIsUp as up:
        if up.alarm is not alarm:
            raise
    finally:
        alarm.cancel()


def _say_last(engine: Engine, stream: PlainStream, data: bytes) -> None:
    """In one segment with the end that follows at once (send(2))."""
    try:
        sent = stream.socket.send(data, MSG_MORE)
        data = data[sent:]
    except BlockingIOError:
        pass
    send_all(engine, stream, data)
