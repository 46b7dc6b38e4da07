"""A script, a call of it, and what became of a call. Pure.

No call is ever repeated after it may have run: one whose answer did not come counts as run (`Fate.LOST`). One of which
no byte has left, and one that the engine refused before its script began, has certainly changed nothing.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass
from typing import Any

from proxy.store.servers import Trouble


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, known to the engine by its SHA-1."""

    source: bytes
    digest: bytes

    @classmethod
    def of(cls, source: bytes) -> Script:
        return cls(source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a script.

    Args:
        keys: all that the script touches; at least one. In a cluster all of them have one hash tag.
        arguments: numbers are sent in decimal.
    """

    keys: tuple[bytes, ...]
    arguments: tuple[bytes | int, ...] = ()


class Fate(enum.Enum):
    """What became of a call."""

    ANSWERED = "answered"  # it ran, and this is what it returned
    REFUSED = "refused"  # the engine said no before the script began: nothing has changed there
    UNSENT = "unsent"  # not a byte of it has left: nothing has changed there
    LOST = "lost"  # it may have run: the answer did not come in time, or was an error out of the middle of the script


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of one call.

    Args:
        value: of the script; integers are int, texts bytes, lists list, nil None. None unless it was answered.
        trouble: what went wrong; None if it was answered.
        sent_ns, received_ns: CLOCK_BOOTTIME before the first byte was sent and after the last one was read. Unless it
            was answered, both are when the call was given up.
        identity: of the server that answered, see `Store.identity`; "" unless it was answered.
    """

    fate: Fate
    value: Any = None
    trouble: Trouble | None = None
    sent_ns: int = 0
    received_ns: int = 0
    identity: str = ""

    @property
    def changed_nothing(self) -> bool:
        """Whether what was asked for is certainly not spent."""
        return self.fate in (Fate.REFUSED, Fate.UNSENT)
