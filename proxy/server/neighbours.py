"""The ways between workers: each has an inbox, and all others have a way to it, for clients that belong there.

The inboxes are the master's, who keeps both ends: what stands in one is not lost when its worker dies. Nobody waits for
another: where an inbox is full, the client is served where it came.
"""

from __future__ import annotations

import array
import socket
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import msgspec
from gevent import get_hub

from proxy.log import lines as log
from proxy.model import Endpoint
from proxy.net.relay import RawSocket

#: Clients that are taken in before others have their turn.
_A_TURN = 64
_LONGEST = 65_536

#: Takes over a client, with the bytes of what was said of it. Must not wait.
Take = Callable[[bytes, RawSocket], object]

_encoder = msgspec.msgpack.Encoder()


def holder(source: str, destination: Endpoint, workers: int) -> int:
    """Which of them, counted from 0, has the connections between these addresses in mode smtp."""
    return crc32(f"{source} {destination}".encode()) % workers


class Neighbours:
    """Of one worker. Implements `services.Neighbours`.

    Args:
        own: which worker this is, counted from 0.
        inbox: where clients for us come; ways: to the inboxes of all, ours too.
    """

    def __init__(self, own: int, inbox: int, ways: Sequence[int], take: Take) -> None:
        self._own = own
        self._ways = [socket.socket(fileno=fd) for fd in ways]
        self._inbox = socket.socket(fileno=inbox)
        self._take = take
        self._stays = False
        self._watcher: Any = get_hub().loop.io(inbox, 1)

    def begin(self) -> None:
        """Take over whoever is in the inbox, and who comes."""
        self._watcher.start(self._read)

    def pass_on(self, source: str, destination: Endpoint, passed: object, fd: int) -> bool:
        """See `services.Neighbours`."""
        to = holder(source, destination, len(self._ways))
        if to == self._own or self._stays:
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        data = _encoder.encode(passed)
        try:
            self._ways[to].sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def stay(self) -> None:
        """Pass nobody on any more: the others end, too, and perhaps before they would read it."""
        self._stays = True

    def close(self) -> None:
        """Take nobody over any more, but who is in the inbox: the next one in our place does that."""
        self._watcher.stop()
        self._watcher.close()
        for sock in (self._inbox, *self._ways):
            sock.close()

    def _read(self) -> None:
        for _ in range(_A_TURN):
            try:
                data, ancillary, _, _ = self._inbox.recvmsg(
                    _LONGEST, socket.CMSG_SPACE(4), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError as error:
                log.internal_error("the inbox of a worker", error)
                return
            for _, _, content in ancillary:
                (fd,) = array.array("i", content)
                self._accept(data, fd)

    def _accept(self, data: bytes, fd: int) -> None:
        sock = RawSocket(-1, socket.SOCK_STREAM, 0, fd)  # (of the family that it is)
        try:
            self._take(data, sock)
        except Exception as error:  # a mistake of ours; the others in the inbox are not to wait for ever
            sock.close()
            log.internal_error("a client that was passed on", error)
