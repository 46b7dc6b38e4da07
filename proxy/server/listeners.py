"""All listeners: which there should be, opening what is missing, closing what is not wanted any more, and their counts.

A listener is known by its configured address. One that stays is not touched by a reload; one whose protocol changes
keeps its socket. What happens with an accepted connection is `server`'s.

With workers the sockets of the standard doors are opened and *kept* here, one for each worker, and served there: what
stands in the queue of one is not lost when its worker dies, since the next one goes on with it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from proxy.errors import ConfigError
from proxy.log import lines as log
from proxy.model import Breathe, Endpoint, hold_breath
from proxy.server.listener import Admit, Listener, endpoint_of, open_sockets
from proxy.server.systemd import Inherited
from proxy.services import Door
from proxy.settings import Settings

STATUS = "status"
#: Protocols of the doors that workers serve.
_STANDARD = frozenset({"socks5", "proxy_protocol", "redirect"})

#: The sockets of each address that nothing has listened on before: one, or one for each worker.
Opened = dict[Endpoint, list[socket.socket]]
#: Configured address → protocol, and whether clients begin with TLS (native ones: as `listen_tls` says).
Wanted = dict[Endpoint, tuple[str, bool]]


class Handed(Protocol):
    """Sockets that somebody else has opened."""

    def take(self, endpoint: Endpoint, count: int) -> list[socket.socket]:
        """So many for this address; none: there are none (left)."""


class Kept(NamedTuple):
    """A door of the workers, and its sockets, one for each of them."""

    door: Door
    sockets: list[socket.socket]


def close_all(opened: Opened) -> None:
    for sockets in opened.values():
        for sock in sockets:
            sock.close()


class Doors:
    """The listeners in force, and those that were closed and still have connections.

    Args:
        admit, accept_failed: see `Listener`.
        spare: lends a descriptor to the status listener, and to one that is being opened.
        inherited: sockets that were open before we started.
        workers: how many serve the standard doors; 0: they are served here.
        wanted: which doors there should be.
    """

    def __init__(
        self,
        admit: Admit,
        accept_failed: Callable[[Listener, OSError], None],
        spare: Callable[[], AbstractContextManager[None]],
        inherited: Handed,
        workers: int = 0,
        wanted: Callable[[Settings], Wanted] | None = None,
    ) -> None:
        self._admit = admit
        self._accept_failed = accept_failed
        self._spare = spare
        self._inherited = inherited
        self._listeners: dict[Endpoint, Listener] = {}
        self._closed: list[Door] = []
        self._workers = workers
        self._tells = wanted is None  # a worker's are told by the master
        self._wanted = wanted or all_doors
        self._kept: dict[Endpoint, Kept] = {}

    # ---------------------------------------------------------------- changing them

    def open_missing(self, settings: Settings, breathe: Breathe = hold_breath) -> Opened:
        """Sockets for the addresses that nothing listens on yet; all or none.

        Raises:
            ListenError: one of them cannot be had.
        """
        opened: Opened = {}
        try:
            for endpoint, (protocol, _) in self._wanted(settings).items():
                breathe()
                workers = self._workers if protocol in _STANDARD else 0
                if endpoint in (self._listeners if workers else self._kept):
                    raise ConfigError(
                        f"{endpoint} cannot become a {protocol} listener: with workers, only a start or an upgrade can "
                        "exchange one of their doors for one of the others"
                    )
                if endpoint not in self._listeners and endpoint not in self._kept:
                    with self._spare():
                        opened[endpoint] = self._open(endpoint, workers)
        except BaseException:
            close_all(opened)
            raise
        return opened

    def _open(self, endpoint: Endpoint, workers: int) -> list[socket.socket]:
        return self._inherited.take(endpoint, workers or 1) or open_sockets(endpoint, workers or 1)

    def endpoints(self, settings: Settings, opened: Opened) -> Iterator[Endpoint]:
        """Where the doors of new settings will really listen."""
        for endpoint in self._wanted(settings):
            if endpoint in opened:
                yield endpoint_of(opened[endpoint][0])
            else:
                yield self._door(endpoint).endpoint

    def take(self, settings: Settings, opened: Opened, breathe: Breathe = hold_breath) -> None:
        """Put the doors of new settings in force; nothing here can fail. Clients who come in the middle of it wait in
        the kernel's queue, or find the door as it was."""
        wanted = self._wanted(settings)
        for endpoint in set(self._listeners) - set(wanted):
            breathe()
            listener = self._listeners.pop(endpoint)
            self._closed.append(listener.door)
            listener.finish()
        for endpoint in set(self._kept) - set(wanted):
            breathe()
            close_all({endpoint: self._kept.pop(endpoint).sockets})  # the workers have them, too
        for endpoint, (protocol, secure) in wanted.items():
            breathe()
            if self._workers and protocol in _STANDARD:
                self._keep(endpoint, opened.get(endpoint), protocol, secure)
                continue
            if endpoint in opened:
                self._listen(endpoint, opened[endpoint][0], protocol, secure)
            listener = self._listeners[endpoint]
            if (listener.door.protocol, listener.door.secure) != (protocol, secure):
                self._closed.append(listener.door)
                listener.door = Door(protocol, listener.door.endpoint, endpoint, secure)
            listener.spare = self._spare if protocol == STATUS else None
            listener.set_options(settings.idle_timeout)

    def _keep(self, endpoint: Endpoint, sockets: list[socket.socket] | None, protocol: str, secure: bool) -> None:
        if sockets is None:
            sockets = self._kept[endpoint].sockets
        else:
            _tell(endpoint_of(sockets[0]), protocol, secure)
        self._kept[endpoint] = Kept(Door(protocol, endpoint_of(sockets[0]), endpoint, secure), sockets)

    def kept(self, worker: int) -> dict[Endpoint, socket.socket]:
        """The sockets of one worker, from 0, by their configured addresses."""
        return {endpoint: kept.sockets[worker] for endpoint, kept in self._kept.items()}

    def _listen(self, endpoint: Endpoint, sock: socket.socket, protocol: str, secure: bool) -> None:
        door = Door(protocol, endpoint_of(sock), endpoint, secure)
        listener = self._listeners[endpoint] = Listener(sock, door, self._admit, self._accept_failed)
        listener.start_accepting()
        if self._tells:
            _tell(door.endpoint, protocol, secure)

    def sockets(self) -> Iterator[tuple[Endpoint, int, socket.socket]]:
        """All of them, by their configured addresses, counted from 0."""
        for endpoint, listener in self._listeners.items():
            yield endpoint, 0, listener.socket
        for endpoint, kept in self._kept.items():
            for index, sock in enumerate(kept.sockets):
                yield endpoint, index, sock

    def leave(self, ours: Collection[Endpoint] = ()) -> None:
        """Another process listens on the same sockets: what stands in their queues is its own, but for `ours`."""
        for endpoint, listener in self._listeners.items():
            self._closed.append(listener.door)
            if endpoint in ours:
                listener.finish()
            else:
                listener.close()
        for kept in self._kept.values():
            close_all({kept.door.endpoint: kept.sockets})
        self._listeners.clear()
        self._kept.clear()

    def finish(self) -> None:
        """Stop listening, but for the status: it says until the end that we are draining."""
        for listener in self._listeners.values():
            if listener.door.protocol != STATUS:
                listener.finish()
        for kept in self._kept.values():
            close_all({kept.door.endpoint: kept.sockets})

    def close(self) -> None:
        """Stop listening at once, on all of them; also a second time."""
        for listener in self._listeners.values():
            listener.close()

    # ---------------------------------------------------------------- looking at them

    def listening(self) -> list[Door]:
        """The doors that are open; in the order of `all_doors`, as they were at the start."""
        own = [listener.door for listener in self._listeners.values()]
        kept = [each.door for each in self._kept.values()]
        last = [door for door in own if door.protocol == STATUS] if kept else []
        return [*(door for door in own if door not in last), *kept, *last]

    def door_at(self, configured: Endpoint) -> Door | None:
        """The door that is open there."""
        listener = self._listeners.get(configured)
        return listener.door if listener is not None else None

    def _door(self, endpoint: Endpoint) -> Door:
        kept = self._kept.get(endpoint)
        return kept.door if kept is not None else self._listeners[endpoint].door

    def __iter__(self) -> Iterator[Door]:
        """The doors that are open, and the closed ones with connections."""
        yield from self.listening()
        self._closed = [door for door in self._closed if door.open_connections]
        yield from self._closed

    def open_connections(self) -> int:
        """Clients' connections; those who read the status do not count."""
        return sum(door.open_connections for door in self if door.protocol != STATUS)


def all_doors(settings: Settings) -> Wanted:
    """Which there should be."""
    wanted: Wanted = dict.fromkeys(settings.listen, ("native", False))
    wanted |= standard_doors(settings)
    if settings.listen_status is not None:
        wanted[settings.listen_status] = (STATUS, False)
    return wanted


def standard_doors(settings: Settings) -> Wanted:
    """Those of them that workers serve."""
    wanted: Wanted = dict.fromkeys(settings.listen_socks5, ("socks5", False))
    wanted |= dict.fromkeys(settings.listen_proxy_protocol, ("proxy_protocol", False))
    wanted |= dict.fromkeys(settings.listen_socks5_tls, ("socks5", True))
    wanted |= dict.fromkeys(settings.listen_proxy_protocol_tls, ("proxy_protocol", True))
    wanted |= dict.fromkeys(settings.listen_redirect, ("redirect", False))
    return wanted


def close_unclaimed(inherited: Inherited) -> None:
    """Close what systemd opened and the configuration does not name: no client shall hang in a backlog."""
    for endpoint in inherited.left():
        log.note(log.Event.SYSTEMD, log.WARNING, f"the inherited socket {endpoint} is not in the configuration")
    for fd in inherited.unusable:
        log.note(log.Event.SYSTEMD, log.WARNING, f"the inherited descriptor {fd} is not a listening TCP socket")
    inherited.close()


def _tell(endpoint: Endpoint, protocol: str, secure: bool) -> None:
    words = {"tls": "yes"} if secure else {}
    log.note(log.Event.LISTEN, log.INFO, f"listening on {endpoint}", protocol=protocol, **words)
