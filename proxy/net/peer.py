"""What the kernel knows of a socket's peer, without reading what the peer has sent."""

from __future__ import annotations

import select
from _socket import socket as RawSocket


def has_gone(sock: RawSocket | int) -> bool:
    """Whether the peer has closed, at least its sending side; what it sent before may still be unread."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))
