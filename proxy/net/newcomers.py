"""Connections of who has not said yet who it is: they are cut off beyond a limit, fairly by address."""

from __future__ import annotations

import contextlib
from _socket import SHUT_RDWR
from collections.abc import Hashable
from typing import Final

from proxy.net.relay import RawSocket
from proxy.policy.crowd import Crowd

#: Newcomers that an address may have without being in anybody's way.
_FEW: Final = 16


class Newcomers:
    """Connections that may not become too many: beyond the limit one is cut off, as `policy.crowd` has it.

    Who floods us pushes out its own. Only those that must be waited for are entered.
    """

    def __init__(self, limit: int) -> None:
        self.dropped = 0
        self._crowd = Crowd(limit)
        self._sockets: dict[Hashable, RawSocket] = {}

    def __len__(self) -> int:
        return len(self._crowd)

    def __contains__(self, who: Hashable) -> bool:
        return who in self._crowd

    def enter(self, who: Hashable, sock: RawSocket, host: str) -> None:
        """Whoever waits for this socket sees the end of the file when it is cut off.

        Args:
            host: where it comes from.
        """
        self._sockets[who] = sock
        put_out = self._crowd.enter(who, host)
        if put_out is not None:
            self._cut_off(put_out)

    def leave(self, who: Hashable) -> None:
        """Is known now, or gone; also after it was cut off."""
        if self._crowd.leave(who):
            del self._sockets[who]

    def make_way(self, host: str) -> bool:
        """Cut one off for a client from `host`, if one address has so many that this is why there is no room."""
        if self._crowd.most <= max(_FEW, self._crowd.number_of(host) + 1):
            return False
        self._cut_off(self._crowd.put_out())
        return True

    def _cut_off(self, who: Hashable) -> None:
        self.dropped += 1
        with contextlib.suppress(OSError):
            self._sockets.pop(who).shutdown(SHUT_RDWR)
