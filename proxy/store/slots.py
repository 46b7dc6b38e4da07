"""Which server of a cluster has a key: hash slots, MOVED and ASK, CLUSTER SLOTS. Pure.

See https://valkey.io/topics/cluster-spec/: CRC-16/XMODEM of the key, or of what stands between its first { and the next
}, modulo 16384.
"""

from __future__ import annotations

import binascii
import re
from typing import Any, NamedTuple

from proxy.errors import PeerError
from proxy.store.wire import ErrorReply

SLOTS = 16384
_REDIRECT = re.compile(r"[A-Z]+ ([0-9]{1,5}) (\S*):([0-9]{1,5})( .*)?")


class Redirect(NamedTuple):
    """MOVED or ASK: another server has this slot, for good or for this one call."""

    slot: int
    server: tuple[str, int]
    for_good: bool


def slot_of(key: bytes) -> int:
    """The slot of a key."""
    _, opening, rest = key.partition(b"{")
    tag, closing, _ = rest.partition(b"}")
    hashed = tag if opening and closing and tag else key
    return binascii.crc_hqx(hashed, 0) % SLOTS


def redirect_of(reply: Any, asked: str) -> Redirect | None:
    """`MOVED 3999 127.0.0.1:6381`; without a host it is the one that was asked. None: it is none, or makes no sense."""
    if not isinstance(reply, ErrorReply) or reply.code not in ("MOVED", "ASK"):
        return None
    match = _REDIRECT.fullmatch(reply.text)
    if match is None or int(match[1]) >= SLOTS or not 1 <= int(match[3]) <= 65535:
        return None
    return Redirect(int(match[1]), (match[2].strip("[]") or asked, int(match[3])), reply.code == "MOVED")


class Map:
    """Slot → server, as ranges; what MOVED says goes before."""

    def __init__(self) -> None:
        self._servers: list[tuple[str, int] | None] = [None] * SLOTS

    @classmethod
    def of(cls, reply: Any, asked: str) -> Map:
        """From the answer to CLUSTER SLOTS; the first server of each range is its master.

        Args:
            asked: the host that was asked: a server may not know its own address.

        Raises:
            PeerError: the answer makes no sense.
        """
        found = cls()
        try:
            for first, last, (host, port, *_), *_ in reply:
                name = host.decode() if host else asked
                if not 0 <= first <= last < SLOTS or not 1 <= port <= 65535:
                    raise ValueError
                server = (asked if name == "?" else name, port)
                found._servers[first : last + 1] = [server] * (last - first + 1)
        except (TypeError, ValueError, AttributeError):
            raise PeerError("CLUSTER SLOTS: an answer that is none") from None
        return found

    def __getitem__(self, slot: int) -> tuple[str, int] | None:
        return self._servers[slot]

    def move(self, slot: int, server: tuple[str, int]) -> None:
        self._servers[slot] = server

    @property
    def servers(self) -> list[tuple[str, int]]:
        """All that have a slot."""
        return [server for server in dict.fromkeys(self._servers) if server is not None]

    @property
    def uncovered(self) -> int:
        """Slots that nobody has."""
        return self._servers.count(None)
