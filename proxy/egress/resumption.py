"""TLS sessions that receivers have handed out (tickets, session ids), for the next connection to the same receiver.

A resumed handshake costs a fraction of a full one, on both sides, and shows no certificates. So these are kept with the
session, and judged anew by whoever resumes it, as if they had just come: a record or an authority that has gone since
holds. And never across a border: a session is for the source, the receiver, the name and the demand that it was had
with. Pure: time is an argument, in seconds of a clock that never goes back.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from proxy.model import Endpoint

#: Sessions that are kept, and of one address: whoever hands out long ones fills no more than that.
MOST = 2048
MOST_OF_ONE = 64
#: Seconds that one is used at the most, whatever the receiver says (RFC 8446 section 4.6.1 allows a week).
LONGEST = 3600.0
#: Bytes of TLS's own records since the handshake, and of certificates, of a connection whose session is kept. Two
#: tickets have 500.
LARGEST = 16_384


class Terms(NamedTuple):
    """Whose session it is.

    Args:
        name: that was asked for (SNI).
        profile: what TLS may be. proof: what had to be proven.
    """

    source: str
    destination: Endpoint
    name: str
    profile: Any
    proof: str


class Known(NamedTuple):
    """One session.

    Args:
        session: OpenSSL's. context: that it belongs to; it works with no other.
        chain: the certificates that were shown when it began, in DER.
    """

    session: Any
    context: Any
    chain: tuple[bytes, ...]


class Sessions:
    """All of them; those that were kept last are at the end."""

    def __init__(self, most: int = MOST, most_of_one: int = MOST_OF_ONE) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._known: OrderedDict[Terms, tuple[float, Known]] = OrderedDict()
        self._of_address: dict[str, OrderedDict[Terms, None]] = {}  # those that were kept last at the end

    def __len__(self) -> int:
        return len(self._known)

    def get(self, terms: Terms, context: object, now: float) -> Known | None:
        """One that may be resumed; it stays here for others."""
        found = self._known.get(terms)
        if found is None:
            return None
        if now < found[0] and found[1].context is context:
            return found[1]
        self.forget(terms)
        return None

    def keep(self, terms: Terms, known: Known, seconds: float, now: float) -> None:
        """Keep it for so long, instead of an older one."""
        self.forget(terms)
        host = terms.destination.host
        if len(self._of_address.get(host, ())) >= self._most_of_one:
            self.forget(next(iter(self._of_address[host])))
        self._known[terms] = now + min(seconds, LONGEST), known
        self._of_address.setdefault(host, OrderedDict())[terms] = None
        if len(self._known) > self._most:
            self.forget(next(iter(self._known)))

    def forget(self, terms: Terms) -> None:
        """A handshake with it failed, or what it stands for proves too little."""
        if self._known.pop(terms, None) is not None:
            host = terms.destination.host
            del self._of_address[host][terms]
            if not self._of_address[host]:
                del self._of_address[host]
