"""All listeners: which there should be, opening what is missing, closing what is not wanted any more, and their counts.

A listener is known by its configured address. One that stays is not touched by a reload; one whose protocol changes
keeps its socket. What happens with an accepted connection is `server`'s.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from proxy.log import lines as log
from proxy.model import Breathe, Endpoint, hold_breath
from proxy.server.listener import Admit, Listener, endpoint_of, open_socket
from proxy.server.systemd import Inherited
from proxy.services import Door
from proxy.settings import Settings

STATUS = "status"

Opened = dict[Endpoint, socket.socket]


class Doors:
    """The listeners in force, and those that were closed and still have connections.

    Args:
        admit, accept_failed: see `Listener`.
        spare: lends a descriptor to the status listener, and to one that is being opened.
        inherited: sockets that were open before we started.
    """

    def __init__(
        self,
        admit: Admit,
        accept_failed: Callable[[Listener, OSError], None],
        spare: Callable[[], AbstractContextManager[None]],
        inherited: Inherited,
    ) -> None:
        self._admit = admit
        self._accept_failed = accept_failed
        self._spare = spare
        self._inherited = inherited
        self._listeners: dict[Endpoint, Listener] = {}
        self._closed: list[Door] = []

    # ---------------------------------------------------------------- changing them

    def open_missing(self, settings: Settings, breathe: Breathe = hold_breath) -> Opened:
        """Sockets for the addresses that nothing listens on yet; all or none.

        Raises:
            ListenError: one of them cannot be had.
        """
        opened: Opened = {}
        try:
            for endpoint in _wanted(settings):
                breathe()
                if endpoint not in self._listeners:
                    with self._spare():
                        opened[endpoint] = self._inherited.take(endpoint) or open_socket(endpoint)
        except BaseException:
            for sock in opened.values():
                sock.close()
            raise
        return opened

    def endpoints(self, settings: Settings, opened: Opened) -> Iterator[Endpoint]:
        """Where the doors of new settings will really listen."""
        for endpoint in _wanted(settings):
            known = self._listeners.get(endpoint)
            yield known.door.endpoint if known is not None else endpoint_of(opened[endpoint])

    def take(self, settings: Settings, opened: Opened, breathe: Breathe = hold_breath) -> None:
        """Put the doors of new settings in force; nothing here can fail. Clients who come in the middle of it wait in
        the kernel's queue, or find the door as it was."""
        wanted = _wanted(settings)
        for endpoint in set(self._listeners) - set(wanted):
            breathe()
            listener = self._listeners.pop(endpoint)
            self._closed.append(listener.door)
            listener.finish()
        for endpoint, (protocol, secure) in wanted.items():
            breathe()
            if endpoint in opened:
                self._listen(endpoint, opened[endpoint], protocol, secure)
            listener = self._listeners[endpoint]
            if (listener.door.protocol, listener.door.secure) != (protocol, secure):
                self._closed.append(listener.door)
                listener.door = Door(protocol, listener.door.endpoint, endpoint, secure)
            listener.spare = self._spare if protocol == STATUS else None
            listener.set_options(settings.idle_timeout)

    def _listen(self, endpoint: Endpoint, sock: socket.socket, protocol: str, secure: bool) -> None:
        door = Door(protocol, endpoint_of(sock), endpoint, secure)
        listener = self._listeners[endpoint] = Listener(sock, door, self._admit, self._accept_failed)
        listener.start()
        words = {"tls": "yes"} if secure else {}
        log.note(log.Event.LISTEN, log.INFO, f"listening on {door.endpoint}", protocol=protocol, **words)

    def close_unclaimed(self) -> None:
        """Close what systemd opened and the configuration does not name: no client shall hang in a backlog."""
        for endpoint in self._inherited.left():
            log.note(log.Event.SYSTEMD, log.WARNING, f"the inherited socket {endpoint} is not in the configuration")
        for fd in self._inherited.unusable:
            log.note(log.Event.SYSTEMD, log.WARNING, f"the inherited descriptor {fd} is not a listening TCP socket")
        self._inherited.close()

    def finish(self) -> None:
        """Stop listening, but for the status: it says until the end that we are draining."""
        for listener in self._listeners.values():
            if listener.door.protocol != STATUS:
                listener.finish()

    def close(self) -> None:
        """Stop listening at once, on all of them; also a second time."""
        for listener in self._listeners.values():
            listener.close()

    # ---------------------------------------------------------------- looking at them

    def listening(self) -> list[Door]:
        """The doors that are open."""
        return [listener.door for listener in self._listeners.values()]

    def __iter__(self) -> Iterator[Door]:
        """The doors that are open, and the closed ones with connections."""
        yield from self.listening()
        self._closed = [door for door in self._closed if door.open_connections]
        yield from self._closed

    def open_connections(self) -> int:
        """Clients' connections; those who read the status do not count."""
        return sum(door.open_connections for door in self if door.protocol != STATUS)


def _wanted(settings: Settings) -> dict[Endpoint, tuple[str, bool]]:
    """Configured address → protocol, and whether clients begin with TLS (native ones: as `listen_tls` says)."""
    wanted = dict.fromkeys(settings.listen, ("native", False))
    wanted |= dict.fromkeys(settings.listen_socks5, ("socks5", False))
    wanted |= dict.fromkeys(settings.listen_proxy_protocol, ("proxy_protocol", False))
    wanted |= dict.fromkeys(settings.listen_socks5_tls, ("socks5", True))
    wanted |= dict.fromkeys(settings.listen_proxy_protocol_tls, ("proxy_protocol", True))
    wanted |= dict.fromkeys(settings.listen_redirect, ("redirect", False))
    if settings.listen_status is not None:
        wanted[settings.listen_status] = (STATUS, False)
    return wanted
