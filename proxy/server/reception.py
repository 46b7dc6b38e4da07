"""Accepted connections: each goes to its door's greenlet, or is told that there are too many.

What is accepted when there are as many as there may be is refused in its own protocol, a few at a time. Where several
processes share `max_connections`, a client for whom this one has no seat waits until it has asked for more
(`policy.seats`). Listening is `listener`'s, who is let in is the doors'.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

from gevent import get_hub

from proxy.doors import front
from proxy.doors.native import entrance
from proxy.doors.native.channel import Channel
from proxy.doors.native.control import Control
from proxy.errors import Overloaded
from proxy.log import lines as log
from proxy.net.relay import RawSocket
from proxy.protocols.native.messages import Kind
from proxy.server.listener import Listener
from proxy.server.listeners import STATUS
from proxy.services import Door, Services

#: Connections over the limit that are told so at a time; the rest are closed without a word.
_REFUSALS_AT_A_TIME: Final = 32
#: Clients that wait for a seat of another process; the rest are refused.
_MOST_WAITING: Final = 1024
#: Cached connections given up when there is no descriptor for a client.
_SHED_WHEN_SHORT: Final = 32
#: Seconds between two lines about accept errors; all are counted.
_ACCEPT_LINE_EVERY: Final = 1.0

ServeStatus = Callable[[Door, RawSocket, tuple[Any, ...]], bool]


class Reception:
    """Where all listeners hand in what they have accepted.

    Args:
        services: those of the moment.
        open_connections: how many clients are connected.
        serve_status: takes what the status listener has accepted.
        ask: for so many seats more, where they are shared; answered by `lent`. Must not wait.

    Attributes:
        limit: `max_connections` in force.
    """

    def __init__(
        self,
        services: Callable[[], Services],
        open_connections: Callable[[], int],
        serve_status: ServeStatus,
        ask: Callable[[int], object] = lambda count: None,
    ) -> None:
        self._services = services
        self._open_connections = open_connections
        self._serve_status = serve_status
        self._ask = ask
        self.limit = 0
        self._seats = 0  # ours
        self._shared = False
        self._asks = False
        self._waiting: deque[tuple[Door, RawSocket, tuple[Any, ...]]] = deque()
        self._places_left = 0
        self._refusing = 0
        self._next_accept_line = 0.0

    def set_limit(self, limit: int, shared: bool = False) -> None:
        """`max_connections` is this from now on.

        Args:
            shared: with other processes: what we may have of it is `lent`.
        """
        self.limit = limit
        if not shared:
            self._seats = limit
        elif not self._shared:
            self._seats, self._asks = 0, False
        self._shared = shared
        self._places_left = 0
        get_hub().loop.run_callback(self._seat_those_who_wait)  # only what the hub begins is counted at once
        if shared and self._open_connections() > self._seats:
            self._ask_for_more()

    # ---------------------------------------------------------------- seats that are shared

    def lent(self, count: int) -> None:
        """So many more may be open here; fewer, if it is negative. 0, and nothing else, is a refusal."""
        if not self._shared:
            return
        self._seats += count
        self._places_left = 0
        if count >= 0:
            self._asks = False
        if not count:
            self._turn_away_those_who_wait()
        else:
            self._seat_those_who_wait()

    def give_back(self) -> int:
        """Half of those that are free are another process's now; how many."""
        if not self._shared:
            return 0
        count = (max(0, self._seats - self._open_connections()) + 1) // 2
        self._seats -= count
        self._places_left = 0
        return count

    def alone(self) -> None:
        """Nobody answers any more."""
        self._ask = lambda count: None
        self._turn_away_those_who_wait()

    def _ask_for_more(self) -> None:
        if not self._asks:
            self._asks = True
            self._ask(len(self._waiting) + max(0, self._open_connections() - self._seats))

    def _seat_those_who_wait(self) -> None:
        while self._waiting and self._may_enter():
            self._serve(*self._waiting.popleft())
        if self._waiting:
            self._ask_for_more()

    def _turn_away_those_who_wait(self) -> None:
        while self._waiting:
            self._serve_or_refuse(*self._waiting.popleft())

    # ---------------------------------------------------------------- who comes

    def admit(self, listener: Listener, sock: RawSocket, address: tuple[Any, ...]) -> bool:
        """Serve one accepted connection, or refuse it when there are too many; see `listener.Admit`."""
        door = listener.door
        if door.protocol == STATUS:
            return self._serve_status(door, sock, address)
        if self._places_left > 0 and not self._waiting:  # as `_may_enter`, and nearly always
            self._places_left -= 1
            return self._serve(door, sock, address)
        if not self._waiting and self._may_enter():
            return self._serve(door, sock, address)
        if self._shared and len(self._waiting) < _MOST_WAITING:
            self._waiting.append((door, sock, address))
            self._ask_for_more()
            return True
        return self._serve_or_refuse(door, sock, address)

    def _serve(self, door: Door, sock: RawSocket, address: tuple[Any, ...]) -> bool:
        services = self._services()
        if door.protocol == "native":
            return services.crew.run(self._native, door, sock, address)
        return services.crew.run(front.serve, services, door, sock, address)

    def _serve_or_refuse(self, door: Door, sock: RawSocket, address: tuple[Any, ...]) -> bool:
        services = self._services()
        if self._may_enter() or services.newcomers.make_way(address[0]):
            return self._serve(door, sock, address)
        if self._refusing < _REFUSALS_AT_A_TIME:
            return services.crew.run(self._refuse, door, sock, address)
        services.counters.refused.count(Overloaded.code)
        sock.close()
        return True

    def _may_enter(self) -> bool:
        """Take one of the places left. Those that became free meanwhile are counted only when these are used up."""
        if self._places_left <= 0:
            self._places_left = self._seats - self._open_connections()
        self._places_left -= 1
        return self._places_left >= 0

    def _native(self, door: Door, sock: RawSocket, address: tuple[Any, ...]) -> None:
        """One native connection: who is it, and is it a session or a channel?"""
        services = self._services()
        door.open_connections += 1
        try:
            guest = entrance.enter(services, door, sock, address)
            if guest is None or guest.handshake.peer is None:
                return
            serve = Channel if guest.handshake.peer.kind is Kind.CHANNEL else Control
            serve(self._services, door, guest).serve()
        finally:
            door.open_connections -= 1
            services.engine.close(sock)

    def _refuse(self, door: Door, sock: RawSocket, address: tuple[Any, ...]) -> None:
        services = self._services()
        self._refusing += 1
        try:
            refusal = Overloaded(f"max_connections ({self.limit}) are open")
            if door.protocol == "native":
                entrance.enter(services, door, sock, address, refusal)
                services.engine.close(sock)
            else:
                front.serve(services, door, sock, address, refusal)
        finally:
            self._refusing -= 1

    def accept_failed(self, listener: Listener, error: OSError) -> None:
        """An accept error that made a listener back off."""
        services, now = self._services(), monotonic()
        text = os.strerror(error.errno or 0)
        services.counters.accept_errors += 1
        services.troubles.accept_failed(text, now)
        services.keeper.shed(_SHED_WHEN_SHORT)
        if now < self._next_accept_line:  # with one descriptor free now and then, every second accept fails
            return
        self._next_accept_line = now + _ACCEPT_LINE_EVERY
        log.note(log.Event.ACCEPT, log.ERROR, f"accept on {listener.door.endpoint}: {text}; trying again soon")
