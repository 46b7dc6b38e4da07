"""Whether a client that has made its request is still there, while something is waited for on its behalf.

A reset is plain. A FIN is not: whoever has died looks like a client that has said all it has to say and waits for the
replies. In SMTP the receiver speaks first; so one that has sent more than its request is believed to wait, and one that
has not gets a second, in which a receiver that is at hand answers.
"""

from __future__ import annotations

from _socket import MSG_PEEK
from collections.abc import Callable
from select import EPOLLERR, EPOLLHUP, EPOLLRDHUP
from typing import Any, Final

from gevent import get_hub, getcurrent

from proxy.net.peer import has_gone
from proxy.net.relay import GONE, Engine, RawSocket

#: Seconds for which a connect goes on for a half-closed client that has said nothing beyond its request.
HALF_CLOSED = 1.0
_RESET: Final = EPOLLERR | EPOLLHUP


class Presence:
    """A client that goes away ends what is waited for within (`with Presence(...):`).

    One is made for every connect and hardly ever has anything to do, so all that it costs is itself: it looks at
    nothing, and makes nothing, until an event tells of an end.

    Args:
        sock: the client's, registered with the engine.
        early: what came behind its request and is to be passed on.
        half_closed: seconds that one which has closed only its sending side, and said nothing more, may stay.
        noted: is told of every event, and of those afterwards. missed: an event may have gone by before.
        more: whether it has said more by now, where the socket alone does not tell (TLS).

    Raises:
        `thrown`: the client is gone.
    """

    __slots__ = (
        *("_early", "_engine", "_fd", "_greenlet", "_half_closed", "_missed", "_more", "_noted", "_sock", "_thrown"),
        *("_timer", "_waiting"),
    )

    def __init__(
        self,
        engine: Engine,
        sock: RawSocket,
        early: bytes,
        half_closed: float = HALF_CLOSED,
        thrown: type[Exception] = ConnectionResetError,
        noted: Callable[[int], None] | None = None,
        missed: bool = True,
        more: Callable[[], bool] | None = None,
    ) -> None:
        self._engine = engine
        self._sock = sock
        self._early = early
        self._half_closed = half_closed
        self._thrown = thrown
        self._noted = noted
        self._missed = missed
        self._more = more
        self._fd: int = sock.fileno()
        self._greenlet: Any = None
        self._timer: Any = None
        self._waiting = True

    def __enter__(self) -> None:
        self._greenlet = getcurrent()
        self._engine.watch(self._fd, self.event)
        # With its request, so no event will tell; matters only to who has to wait.
        if self._missed and has_gone(self._sock):
            get_hub().loop.run_callback(self.event, EPOLLRDHUP)

    def __exit__(self, *_: object) -> None:
        self._waiting = False
        if self._timer is not None:
            self._timer.close()
        self._engine.watch(self._fd, self._noted)

    def event(self, events: int) -> None:
        """Of the client; called in the hub."""
        if self._noted is not None:
            self._noted(events)
        if not (events & GONE and self._waiting):
            return
        if events & _RESET:
            self._greenlet.throw(self._thrown())
        elif self._timer is None:
            self._timer = get_hub().loop.timer(self._half_closed)
            self._timer.start(self._leave)

    def _leave(self) -> None:
        if self._waiting and not self._has_said_more():
            self._greenlet.throw(self._thrown())

    def _has_said_more(self) -> bool:
        return bool(self._early) or (self._more() if self._more is not None else _is_waiting(self._sock))


def _is_waiting(sock: RawSocket) -> bool:
    try:
        return bool(sock.recv(1, MSG_PEEK))
    except OSError:
        return False
