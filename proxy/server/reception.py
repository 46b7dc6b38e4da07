"""Accepted connections: each goes to its door's greenlet, or is told that there are too many.

What is accepted when there are as many as there may be is refused in its own protocol, a few at a time. Listening is
`listener`'s, who is let in is the doors'.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import monotonic
from typing import Any

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
_REFUSALS_AT_A_TIME = 32
#: Cached connections given up when there is no descriptor for a client.
_SHED_WHEN_SHORT = 32
#: Seconds between two lines about accept errors; all are counted.
_ACCEPT_LINE_EVERY = 1.0

ServeStatus = Callable[[Door, RawSocket, tuple[Any, ...]], bool]


class Reception:
    """Where all listeners hand in what they have accepted.

    Args:
        services: those of the moment.
        open_connections: how many clients are connected.
        serve_status: takes what the status listener has accepted.

    Attributes:
        limit: `max_connections` in force.
    """

    def __init__(
        self, services: Callable[[], Services], open_connections: Callable[[], int], serve_status: ServeStatus
    ) -> None:
        self._services = services
        self._open_connections = open_connections
        self._serve_status = serve_status
        self.limit = 0
        self._places_left = 0
        self._refusing = 0
        self._next_accept_line = 0.0

    def set_limit(self, limit: int) -> None:
        """`max_connections` is this from now on."""
        self.limit = limit
        self._places_left = 0

    def admit(self, listener: Listener, sock: RawSocket, address: tuple[Any, ...]) -> bool:
        """Serve one accepted connection, or refuse it when there are too many; see `listener.Admit`."""
        door, services = listener.door, self._services()
        if door.protocol == STATUS:
            return self._serve_status(door, sock, address)
        if self._may_enter() or services.newcomers.make_way(address[0]):
            if door.protocol == "native":
                return services.crew.run(self._native, door, sock, address)
            return services.crew.run(front.serve, services, door, sock, address)
        if self._refusing < _REFUSALS_AT_A_TIME:
            return services.crew.run(self._refuse, door, sock, address)
        services.counters.refused.count(Overloaded.code)
        sock.close()
        return True

    def _may_enter(self) -> bool:
        """Take one of the places left. Those that became free meanwhile are counted only when these are used up."""
        if self._places_left <= 0:
            self._places_left = self.limit - self._open_connections()
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
