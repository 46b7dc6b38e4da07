"""Which receivers' TLS is broken: those whose handshake has failed twice running are greeted in clear for a while.

For opportunistic TLS only, which takes a session in clear rather than none (RFC 7435): without this each message to
such a receiver costs two connections, and under a rate of one connection a minute none would ever get through. One
failure alone says nothing: the next session tries again, and so does each when the time is up. Pure: time is an
argument, in seconds of a clock that never goes back.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from proxy.model import Endpoint

#: Seconds that a receiver is remembered, from its last failure.
MEMORY = 600.0
#: Receivers that are remembered; beyond that the one whose failure is longest ago is forgotten.
MOST = 1024
_FAILURES = 2


@dataclass(slots=True)
class _Record:
    failures: int
    why: str
    until: float


class BrokenTls:
    """Receivers whose handshake has failed, by address and port."""

    def __init__(self, memory: float = MEMORY, most: int = MOST) -> None:
        self._memory = memory
        self._most = most
        self._records: OrderedDict[Endpoint, _Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def failed(self, destination: Endpoint, why: str, now: float) -> None:
        """A handshake failed; one that failed long ago does not count with it."""
        record = self._records.pop(destination, None)
        before = record.failures if record is not None and now < record.until else 0
        self._records[destination] = _Record(before + 1, why, now + self._memory)
        if len(self._records) > self._most:
            self._records.popitem(last=False)

    def worked(self, destination: Endpoint) -> None:
        """A handshake succeeded."""
        self._records.pop(destination, None)

    def why(self, destination: Endpoint, now: float) -> str:
        """Why TLS need not be tried; empty: it is to be tried."""
        record = self._records.get(destination)
        if record is None:
            return ""
        if now >= record.until:
            del self._records[destination]
            return ""
        return record.why if record.failures >= _FAILURES else ""
