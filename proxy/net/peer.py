"""What the kernel knows of a socket's peer, without reading what the peer has sent."""

from __future__ import annotations

import fcntl
import select
from _socket import socket as RawSocket

#: linux/sockios.h: bytes that were written and not yet sent.
_SIOCOUTQNSD = 0x894B


def has_gone(sock: RawSocket | int) -> bool:
    """Whether the peer has closed, at least its sending side; what it sent before may still be unread."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def holds_back(sock: RawSocket) -> bool:
    """Whether the kernel has bytes for the peer that it could not send yet: the peer takes nothing, or is slow."""
    try:
        return any(fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD, bytes(4)))
    except (OSError, ValueError):  # it is closed
        return False
