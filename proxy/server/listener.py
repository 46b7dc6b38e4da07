"""A listening socket that never stops listening.

Accepted sockets stay raw and go to pooled greenlets (`Crew`); they inherit the listener's TCP options, which saves six
system calls a connection. An accept error (EMFILE, ECONNABORTED …) backs off and goes on, where gevent's stock server
prints a traceback. Who may connect and what is spoken is not known here.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from gevent import get_hub

from proxy.errors import ProxyError
from proxy.model import Endpoint, canonical_ip
from proxy.net.relay import IPPROTO_TCP, TCP_NODELAY, RawSocket, keep_alive
from proxy.net.sockets import Accept, accept
from proxy.services import Door

_BACKLOG: Final = 4096
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78  # linux/in.h, linux/in6.h; no privilege is needed
#: Errors of one connection, not of the listener: the next accept may work at once (accept(2)).
_THIS_CONNECTION_ONLY: Final = frozenset({errno.ECONNABORTED, errno.EPROTO, errno.EINTR, errno.EPERM})
#: So many of them running are the listener's all the same: a packet filter may say EPERM for ever.
_FAILURES_A_TURN: Final = 64
#: Connections accepted in one turn of the loop at the most, and turns running after which that becomes twice as many.
_MOST_A_TURN: Final = 64
_FULL_TURNS: Final = 4
#: Seconds of a pause after an error, which grows.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.01, 1.0
_READ: Final = 1

#: Takes an accepted, non-blocking socket; must not raise or wait. False: there is no memory to serve it now.
Admit = Callable[["Listener", RawSocket, tuple[Any, ...]], bool]


class ListenError(ProxyError):
    """A listening socket cannot be had; the message tells the operator what to do."""

    code = "cannot_listen"


def open_sockets(endpoint: Endpoint, count: int) -> list[socket.socket]:
    """So many of them for one address: the kernel shares out who connects (SO_REUSEPORT).

    Such sockets would be let in beside those of another program of ours, and take half of its clients: so the address
    is asked for as a single socket asks for it, first.

    Raises:
        ListenError: see `open_socket`.
    """
    if count == 1:
        return [open_socket(endpoint)]
    open_socket(endpoint, listens=False).close()
    sockets = [open_socket(endpoint, shared=True)]
    try:
        where = Endpoint(endpoint.host, endpoint_of(sockets[0]).port)
        sockets += [open_socket(where, shared=True) for _ in range(count - 1)]
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def open_socket(endpoint: Endpoint, shared: bool = False, listens: bool = True) -> socket.socket:
    """A listening, non-blocking socket; IPv6 ones serve IPv6 only.

    The address need not be on this machine yet: at boot, and where it moves between machines, it comes when it comes.

    Args:
        shared: beside others of the same address. listens: or is only bound.

    Raises:
        ListenError: the address is taken or not permitted.
    """
    sock = socket.socket(socket.AF_INET6 if endpoint.is_ipv6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if endpoint.is_ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        # For those who come from now on, whoever will accept them, and whenever that begins.
        sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        sock.bind(endpoint)
        if listens:
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on {endpoint}: {_advice(error, endpoint)}") from None
    return sock


def _advice(error: OSError, endpoint: Endpoint) -> str:
    text = os.strerror(error.errno or 0)
    if error.errno == errno.EADDRINUSE:
        return f"{text}; 'ss -ltnp sport = :{endpoint.port}' shows the program that has it"
    if error.errno == errno.EACCES:
        return f"{text}; a port below 1024 needs root or CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{text}; no interface of this machine has {endpoint.host}"
    return text


class Listener:
    """One listening socket and the door behind it.

    Args:
        sock: bound and listening.
        door: its protocol and count of open connections.
        admit: see there.
        accept_failed: is told each accept error that made the listener back off.

    Attributes:
        spare: gives descriptors that are held back, if this listener may have one of them when there is no other.
        take: lets one client in, as `sockets.Accept`.
    """

    def __init__(
        self, sock: socket.socket, door: Door, admit: Admit, accept_failed: Callable[[Listener, OSError], None]
    ) -> None:
        sock.setblocking(False)
        self.socket: Any = sock
        self.door = door
        self.closed = False
        self.spare: Callable[[], AbstractContextManager[None]] | None = None
        self.loop: Any = get_hub().loop
        self.take: Accept = accept
        self._admit = admit
        self._accept_failed = accept_failed
        self._watcher: Any = None  # while we accept
        self._timer: Any = None  # while we back off
        self._pause = _SHORTEST_PAUSE
        self._at_once = 1  # let in in one turn
        self._full = 0  # turns running in which so many came
        self._turn = 0  # of the loop, in which we accepted last

    def set_options(self, idle_timeout: float) -> None:
        """What accepted sockets inherit and a reload may change."""
        keep_alive(self.socket, idle_timeout)

    def start_accepting(self) -> None:
        """Let clients in from now on; also a second time."""
        if self._watcher is None and not self.closed:
            self._watcher = self.loop.io(self.socket.fileno(), _READ)
            self._watcher.start(self._let_in)

    def stop_accepting(self) -> None:
        """What waits stays in the kernel's queue."""
        for watcher in (self._watcher, self._timer):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._watcher = self._timer = None

    def close(self) -> None:
        """Stop listening; also a second time."""
        self.closed = True
        self.stop_accepting()
        self.socket.close()

    def finish(self) -> None:
        """Stop listening; clients that the kernel has already let in are served, where a close would reset them."""
        while (accepted := self.accept()) is not None:
            self._hand_over(*accepted)
        self.close()

    def _let_in(self) -> None:
        """Somebody has come.

        An accept that finds nobody costs more than one that finds somebody, and the loop calls again while somebody
        waits. So one is let in; after some turns running in which that was not enough, two, then four ...
        """
        turn: int = self.loop.iteration
        if turn != self._turn + 1:
            self._at_once, self._full = 1, 0
        self._turn = turn
        try:
            for _ in range(self._at_once):
                accepted = self.accept()
                if accepted is None:
                    self._at_once, self._full = 1, 0
                    return
                self._hand_over(accepted[0], accepted[1])
            self._full += 1
            if self._full == _FULL_TURNS:
                self._at_once, self._full = min(2 * self._at_once, _MOST_A_TURN), 0
        except Exception:  # a bug of ours: it must not cost the watcher
            self.loop.handle_error(self, *sys.exc_info())

    def accept(self) -> tuple[RawSocket, tuple[Any, ...]] | None:
        """One connection, its socket and its address; None when there is none, or after an error."""
        for left in range(_FAILURES_A_TURN - 1, -1, -1):
            try:
                accepted = self._accept()
                self._pause = _SHORTEST_PAUSE
                return accepted
            except BlockingIOError:
                return None
            except OSError as error:
                if left and error.errno in _THIS_CONNECTION_ONLY:
                    continue
                self._back_off(error)
                return None
        raise AssertionError("the last failure backs off")

    def _accept(self) -> tuple[RawSocket, tuple[Any, ...]]:
        try:
            return self.take(self.socket)
        except OSError as error:
            if self.spare is None or error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        with self.spare():
            return self.take(self.socket)

    def _hand_over(self, sock: RawSocket, address: tuple[Any, ...]) -> None:
        if not self._admit(self, sock, address):
            self._back_off(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))

    def _back_off(self, error: OSError) -> None:
        """Stop accepting for a moment, twice as long each time; what waits stays in the kernel's queue."""
        self._accept_failed(self, error)
        self.stop_accepting()
        self._timer = self.loop.timer(self._pause)
        self._timer.start(self.start_accepting)
        self._pause = min(_LONGEST_PAUSE, self._pause * 2)


def endpoint_of(sock: socket.socket) -> Endpoint:
    """The address that a socket really listens on."""
    name = sock.getsockname()
    return Endpoint(canonical_ip(name[0].partition("%")[0]), name[1])
