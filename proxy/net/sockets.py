"""Sockets as a session's set-up needs them: who was let in, and one that will connect.

A Python socket asks the kernel what it has just been told (getsockname, ioctl), and each call of it is a walk through
the interpreter. `_fastsockets`, if it was built, does the same in C, with an object that is a descriptor and no more.
Tests are the same for both, and so is what they give: a non-blocking socket with the interface of `RawSocket`, to be
closed by whoever has it. What an errno means is not known here.
"""

from __future__ import annotations

import contextlib
from _socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_IP,
    IPPROTO_TCP,
    SO_OOBINLINE,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    TCP_NODELAY,
)
from collections.abc import Callable
from typing import Any, Final

from proxy.net.relay import RawSocket

#: Linux: choose the local port at connect, not at bind: 28,000 connections a source and peer, not 28,000 a source.
_IP_BIND_ADDRESS_NO_PORT: Final = 24

#: Of a listening socket: who has come, and from where (host and port).
Accept = Callable[[Any], tuple[RawSocket, tuple[Any, ...]]]
#: A socket of the family AF_INET or AF_INET6, to be bound and connected: its options are set.
Outgoing = Callable[[int], RawSocket]


def python_accept(listener: Any) -> tuple[RawSocket, tuple[Any, ...]]:
    """See `Accept`.

    Raises:
        OSError: nobody has come (BlockingIOError), or as accept(2) says.
    """
    fd, address = listener._accept()
    sock = RawSocket(listener.family, SOCK_STREAM, 0, fd)
    sock.setblocking(False)
    return sock, address[:2]


def python_outgoing(family: int) -> RawSocket:
    """See `Outgoing`.

    Raises:
        OSError: as socket(2) says. Nothing is left open.
    """
    sock = RawSocket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
    try:
        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        sock.setsockopt(SOL_SOCKET, SO_OOBINLINE, 1)
        sock.setsockopt(IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def family_of(host: str) -> int:
    """Of an address in its canonical form."""
    return AF_INET6 if ":" in host else AF_INET


def _in_use() -> tuple[Accept, Outgoing]:
    with contextlib.suppress(ImportError):
        from proxy.net import _fastsockets

        return _fastsockets.accept, _fastsockets.outgoing
    return python_accept, python_outgoing


accept, outgoing = _in_use()
