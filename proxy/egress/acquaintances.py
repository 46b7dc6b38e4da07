"""What receivers said when they were last connected to: their greeting, and their reply to EHLO.

A client of mode smtp for whom there is no place now is greeted with it; its first message has a connection that is
looked at again. Nothing hangs on how old it is: a receiver that offers less by then is noticed, and the message put
off. Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from proxy.model import Endpoint, TlsMode

#: Receivers that are remembered; beyond that the one that was met longest ago is forgotten.
MOST = 4096
#: What nobody has to hear from a receiver that says more.
_MOST_TEXT = 4096


class Introduction(NamedTuple):
    """What one receiver said.

    Args:
        greeting: code and text, lines joined by LF. hello: the texts of the lines of its last reply to EHLO or HELO.
    """

    greeting: str
    hello: tuple[str, ...]


class Acquaintances:
    """Receivers by address, port and the TLS that was tried: some offer other things behind it."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._known: OrderedDict[tuple[Endpoint, TlsMode], Introduction] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def met(self, destination: Endpoint, tls: TlsMode, greeting: str, hello: tuple[str, ...]) -> None:
        """A session came up."""
        if len(greeting) + sum(map(len, hello)) > _MOST_TEXT:
            return
        key = destination, tls
        self._known[key] = Introduction(greeting, hello)
        self._known.move_to_end(key)
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def known(self, destination: Endpoint, tls: TlsMode) -> Introduction | None:
        """What it said; None: nobody knows."""
        return self._known.get((destination, tls))
