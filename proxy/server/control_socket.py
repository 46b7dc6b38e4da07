"""The control socket over the life of the program: opened, kept at a reload, handed on to whoever replaces us.

What is said on it is `control.door`'s.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import gevent.socket

from proxy.control import door
from proxy.control.house import House
from proxy.server.orders import Handed
from proxy.settings import Settings


class Prepared(NamedTuple):
    """`sock`: a new one, if another than the present is wanted. `gid`: of the group that may change something."""

    sock: gevent.socket.socket | None
    gid: int | None

    def close(self) -> None:
        """It is not wanted after all."""
        if self.sock is not None:
            self.sock.close()


class ControlSocket:
    """There is one at the most.

    Args:
        house: what is commanded. lent: a descriptor of the reserve.
        inherited: the socket at this path that the process before us has handed over, if any.
    """

    def __init__(
        self,
        house: House,
        lent: Callable[[], AbstractContextManager[None]],
        inherited: Callable[[str], socket.socket | None],
    ) -> None:
        self._house = house
        self._lent = lent
        self._inherited = inherited
        self._door: door.ControlDoor | None = None

    def prepare(self, settings: Settings) -> Prepared:
        """What can fail.

        Raises:
            ConfigError: there is no such group, or the socket cannot be had.
        """
        path, gid = settings.control_socket, None
        if path is None:
            return Prepared(None, None)
        with self._lent():
            gid = door.gid_of(path, settings.control_group)
        if self._door is not None and self._door.path == path:
            return Prepared(None, gid)
        if (handed := self._inherited(path)) is not None:
            return Prepared(gevent.socket.socket(fileno=handed.detach()), gid)
        with self._lent():
            return Prepared(door.listen(path, settings.control_socket_mode, gid), gid)

    def take(self, settings: Settings, prepared: Prepared) -> None:
        """Put it in force. Nothing here can fail."""
        if self._door is not None and self._door.path != settings.control_socket:
            self.close()
        if prepared.sock is not None and settings.control_socket is not None:
            self._door = door.ControlDoor(prepared.sock, settings.control_socket, prepared.gid, self._house)
        elif self._door is not None:
            self._door.apply(settings.control_socket_mode, prepared.gid)

    def handed(self) -> list[tuple[Handed, int]]:
        """What another process takes over."""
        return [] if self._door is None else [(Handed("control", path=self._door.path), self._door.fileno())]

    def close(self, forget: bool = True) -> None:
        """See `ControlDoor.close`."""
        if self._door is not None:
            self._door.close(forget)
            self._door = None
