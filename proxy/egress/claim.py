"""The places that a fresh connection is made with: given back by an attempt that fails, had anew for the next one.

An object, and not functions within a function: compiled, those refer to each other by what they share, and only the
garbage collector would free them.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.egress.keeper import Keeper
from proxy.errors import UpstreamError
from proxy.net.tls import Stream
from proxy.throttling.flows import Places


class Claim:
    """Those of one connection; what `open_receiver` tells, it is told.

    Args:
        places: for the first attempt.
        again: makes up for an attempt that failed, and has places for the next one; or raises.

    Attributes:
        places: at the moment. asked_with: those of the last attempt, given back or not.
    """

    __slots__ = ("_again", "_keeper", "asked_with", "places")

    def __init__(self, keeper: Keeper, places: Places | None, again: Callable[[UpstreamError], Places | None]) -> None:
        self.places = places
        self.asked_with = places
        self._keeper = keeper
        self._again = again

    def failed(self, stream: Stream) -> None:
        """No session came up on this connection."""
        places, self.places = self.places, None
        self._keeper.close_early(stream, places)

    def once_more(self, error: UpstreamError) -> None:
        """Another attempt is made, in clear or without an old TLS session.

        Raises:
            Throttled: there are no places in time.
        """
        self.places = self.asked_with = self._again(error)
