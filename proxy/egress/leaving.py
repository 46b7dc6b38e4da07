"""Connections that we have closed and their receivers not yet: each holds its throttle places until it is over there.

A receiver counts a connection until it has seen our FIN and closed its own side. Were a place free at our close, the
next connection would be open there beside the last one: 14 instead of 5, where a receiver took 20 ms to close. So the
place stays taken until the receiver's FIN, for a second at the most (`throttle_close_timeout`): one that never closes
shall not keep a place for ever, and at such a receiver the limit may be passed by those. After a reset nothing is
waited for: there is nothing to come.
"""

from __future__ import annotations

import contextlib
from _socket import SHUT_WR
from collections import Counter, OrderedDict
from functools import partial
from time import monotonic
from typing import Any

from gevent import get_hub

from proxy.egress.office import Office
from proxy.net.relay import Engine, RawSocket
from proxy.net.tls import PlainStream, Stream
from proxy.throttling.flows import Places, Throttle

_READ_SIZE = 65536
#: Reads of what a receiver goes on saying behind our back; who has more to say is not waited for.
_MOST_READS = 16
#: Seconds between two looks at the clock, while there is anybody to wait for.
_TICK = 0.05


class Leaving:
    """All of them, those that left first at the front.

    Args:
        seconds: the longest that a place is held; 0: it is free when we have closed.
    """

    def __init__(self, engine: Engine, office: Office, seconds: float) -> None:
        self.seconds = seconds
        self._engine = engine
        self._office = office
        self._left: OrderedDict[RawSocket, tuple[float, Places]] = OrderedDict()  # until when, and what it holds
        self._reads: Counter[RawSocket] = Counter()
        self._under: Counter[Throttle] = Counter()
        self._timer: Any = get_hub().loop.timer(_TICK, _TICK)

    def __len__(self) -> int:
        return len(self._left)

    def under(self, throttle: Throttle) -> int:
        """Places of this throttle that will be free soon."""
        return self._under[throttle]

    def close(self, stream: Stream, places: Places | None, reset: bool = False) -> None:
        """Close our side; the places are given back when the other one has closed, or at once if nothing is to come."""
        if not reset and not isinstance(stream, PlainStream):
            with contextlib.suppress(OSError):
                stream.finish()
        sock = stream.socket
        if reset or places is None or self.seconds <= 0 or not _sends_fin(sock):
            self._engine.close(sock, reset)
            self._office.leave(places)
            return
        self._left[sock] = monotonic() + self.seconds, places
        self._under.update(places.throttles)
        self._engine.watch(sock.fileno(), partial(self._event, sock))
        self._event(sock, 0)  # it may have closed before
        if self._left and not self._timer.active:
            self._timer.start(self._look_at_the_clock)

    def hurry(self, count: int) -> int:
        """Descriptors are short: close so many for good; how many that were."""
        gone = list(self._left)[:count]
        for sock in gone:
            self._over(sock)
        return len(gone)

    def _event(self, sock: RawSocket, _events: int) -> None:
        """Read on, for what is behind it: the end."""
        if sock not in self._left:
            return
        try:
            while self._reads[sock] < _MOST_READS and sock.recv(_READ_SIZE):
                self._reads[sock] += 1
        except BlockingIOError:
            return
        except OSError:
            pass
        self._over(sock)

    def _over(self, sock: RawSocket) -> None:
        _, places = self._left.pop(sock)
        self._reads.pop(sock, None)
        self._under.subtract(places.throttles)
        for throttle in places.throttles:
            if not self._under[throttle]:
                del self._under[throttle]
        self._engine.close(sock)
        self._office.leave(places)

    def _look_at_the_clock(self) -> None:
        now = monotonic()
        while self._left and next(iter(self._left.values()))[0] <= now:
            self._over(next(iter(self._left)))
        if not self._left:
            self._timer.stop()


def _sends_fin(sock: RawSocket) -> bool:
    try:
        sock.shutdown(SHUT_WR)
    except OSError:  # it is broken, or closed
        return False
    return True
