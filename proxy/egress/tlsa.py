"""TLSA records of MX hosts, asked for when a connection needs them, and remembered for their TTL.

What to ask, and what answers mean, is decided in `policy.dane`. Whoever needs records waits for them, in its own
greenlet and time; the questions are asked in threads (`apart`), once for all who want the same. A look-up that failed
is not tried again for a moment: it takes a thread for seconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

import gevent
from gevent.event import AsyncResult

from proxy.egress.look_ups import AT_ONCE, PATIENCE, ask, resolver_of
from proxy.model import Endpoint
from proxy.net.apart import Apart
from proxy.policy.dane import Found, look_up
from proxy.policy.directory import LONGEST, SHORTEST, Reply

#: Hosts that are remembered.
MOST = 4096
#: Seconds that a failure is.
FAILED = 5.0
#: Of the patience for one question: one look-up has up to four of them.
_TIMES = 4


class Who(NamedTuple):
    """Whose records."""

    host: str
    port: int


class TlsaLookUps:
    """All of them. Belongs to the hub's thread.

    Args:
        patience: seconds for one question.
    """

    def __init__(self, clock: Callable[[], float] = monotonic, patience: float = PATIENCE) -> None:
        self._clock, self._patience = clock, patience
        self._apart = Apart(AT_ONCE)
        self._server: Endpoint | None = None
        self._known: OrderedDict[Who, tuple[float, Found]] = OrderedDict()
        self._asked: dict[Who, AsyncResult[Found]] = {}

    def __len__(self) -> int:
        return len(self._known)

    def use(self, server: Endpoint | None) -> None:
        """Ask this server from now on; what another one has said is forgotten."""
        if server != self._server:
            self._server = server
            self._known.clear()
            self._asked.clear()  # who waits has its answer still

    def get(self, host: str, port: int, seconds: float) -> Found:
        """The records of a host, remembered or asked for; waits for so long at the most."""
        who = Who(host, port)
        known = self._known.get(who)
        if known is not None and self._clock() < known[0]:
            return known[1]
        asked = self._asked.get(who)
        if asked is None:
            asked = self._asked[who] = AsyncResult()
            gevent.spawn(self._look_up, who, asked)
        found: Found | None = asked.wait(max(seconds, 0.001))
        return found or Found(failure=f"TLSA of {host}: no answer in time")

    def _look_up(self, who: Who, asked: AsyncResult[Found]) -> None:
        server = self._server
        try:
            found = self._apart.call(who, _conduct, who, server, self._patience)
        except Exception as error:  # no thread can be had; who asks the next time would wait for nobody
            found = Found(failure=f"TLSA of {who.host}: {error}")
        if self._asked.get(who) is asked:  # else another server is in force
            del self._asked[who]
            keep = FAILED if found.failure else min(LONGEST, max(SHORTEST, found.ttl))
            self._known[who] = self._clock() + keep, found
            self._known.move_to_end(who)
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        asked.set(found)


# --- in a thread ---


def _conduct(who: Who, server: Endpoint | None, patience: float) -> Found:
    """One look-up, from the first question to the answer. Touches nothing of the program's."""
    try:
        resolver = resolver_of(server, patience)
        ends = monotonic() + _TIMES * patience
        course = look_up(*who)
        question = next(course)
        while True:
            left = ends - monotonic()
            reply = ask(resolver, question, left) if left > 0 else Reply(failure=f"{question.name}: no time is left")
            question = course.send(reply)
    except StopIteration as end:
        found: Found = end.value
        return found
    except Exception as error:  # of the library, which nobody would see in a thread
        return Found(failure=f"TLSA of {who.host}: {str(error) or type(error).__name__}")
