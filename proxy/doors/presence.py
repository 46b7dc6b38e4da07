"""Whether a client that has made its request is still there, while something is waited for on its behalf.

A reset is plain. A FIN is not: whoever has died looks like a client that has said all it has to say and waits for the
replies. In SMTP the receiver speaks first; so one that has sent more than its request is believed to wait, and one that
has not gets a second, in which a receiver that is at hand answers.
"""

from __future__ import annotations

import contextlib
from _socket import MSG_PEEK
from collections.abc import Callable, Iterator
from select import EPOLLERR, EPOLLHUP, EPOLLRDHUP
from typing import Any

from gevent import get_hub, getcurrent

from proxy.net.peer import has_gone
from proxy.net.relay import GONE, Engine, RawSocket

#: Seconds for which a connect goes on for a half-closed client that has said nothing beyond its request.
HALF_CLOSED = 1.0
_RESET = EPOLLERR | EPOLLHUP


class _Watch:
    """One wait."""

    def __init__(self, has_said_more: Callable[[], bool], half_closed: float, thrown: type[Exception]) -> None:
        self._has_said_more = has_said_more
        self._half_closed = half_closed
        self._thrown = thrown
        self._greenlet: Any = getcurrent()
        self._loop: Any = get_hub().loop
        self._timer: Any = None
        self._waiting = True

    def event(self, events: int) -> None:
        """Of the client; called in the hub."""
        if not (events & GONE and self._waiting):
            return
        if events & _RESET:
            self._greenlet.throw(self._thrown())
        elif self._timer is None:
            self._timer = self._loop.timer(self._half_closed)
            self._timer.start(self._leave)

    def _leave(self) -> None:
        if self._waiting and not self._has_said_more():
            self._greenlet.throw(self._thrown())

    def over(self) -> None:
        self._waiting = False
        if self._timer is not None:
            self._timer.close()


def _is_waiting(sock: RawSocket) -> bool:
    try:
        return bool(sock.recv(1, MSG_PEEK))
    except OSError:
        return False


@contextlib.contextmanager
def while_client_stays(
    engine: Engine,
    sock: RawSocket,
    early: bytes,
    half_closed: float = HALF_CLOSED,
    thrown: type[Exception] = ConnectionResetError,
    noted: Callable[[int], None] | None = None,
    missed: bool = True,
    more: Callable[[], bool] | None = None,
) -> Iterator[None]:
    """A client that goes away ends what is waited for within.

    Args:
        sock: the client's, registered with the engine.
        early: what came behind its request and is to be passed on.
        half_closed: seconds that one which has closed only its sending side, and said nothing more, may stay.
        noted: is told of every event, and of those afterwards. missed: an event may have gone by before.
        more: whether it has said more by now, where the socket alone does not tell (TLS).

    Raises:
        `thrown`: the client is gone.
    """
    has_said_more = more or (lambda: _is_waiting(sock))
    watch, fd = _Watch(lambda: bool(early) or has_said_more(), half_closed, thrown), sock.fileno()

    def event(events: int) -> None:
        if noted is not None:
            noted(events)
        watch.event(events)

    engine.watch(fd, event)
    # With its request, so no event will tell; matters only to who has to wait.
    if missed and has_gone(sock):
        get_hub().loop.run_callback(event, EPOLLRDHUP)
    try:
        yield
    finally:
        watch.over()
        engine.watch(fd, noted)
