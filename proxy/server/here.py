"""What operators may ask and tell this one process about its connections.

The process with the control socket asks itself so, and a worker answers its master so (`questions`): there is one way
to list, to find and to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import monotonic
from typing import TypeVar

from proxy.config.values import parse_endpoint
from proxy.control import watching
from proxy.control.watching import Watching
from proxy.log import outputs
from proxy.model import Ending
from proxy.net.turns import Breather, rest
from proxy.policy.logins import Entry
from proxy.services import HostedConnection, Services
from proxy.stats import Standing
from proxy.status import gather
from proxy.status.parts import Part
from proxy.status.rows import ConnectionRow

#: Looks at many things of one caller, where others take turns.
_KEY = "control"
_Thing = TypeVar("_Thing")


class Here:
    """One process.

    Args:
        services: those of the moment. part: what the process knows, without details.

    Attributes:
        watching: whose steps are written into the log for a time.
    """

    def __init__(self, services: Callable[[], Services], part: Callable[[], Part]) -> None:
        self.services = services
        self.watching = Watching()
        self._part = part

    def part(self, detailed: bool = True) -> Part:
        """What it knows; with the details it is made in turns."""
        part = self._part()
        if detailed:
            services, connections = self.services(), list(self.services().instances.connections)
            standing = (each.standing() for each in connections)
            steps = gather.details(services.keeper.pool, services.troubles, standing, monotonic())
            while True:
                try:
                    next(steps)
                except StopIteration as done:
                    part.details = done.value
                    break
                rest(_KEY)
        return part

    def trouble(self) -> tuple[set[str], set[str]]:
        """Receivers and source addresses with which something has gone wrong, here or elsewhere."""
        troubles = self.services().troubles
        return {str(name) for name in troubles.receivers}, set(troubles.sources)

    def expect(self, receivers: Iterable[str], sources: Iterable[str]) -> None:
        """Something has gone wrong with these elsewhere; see `trouble.Table.expect`."""
        troubles = self.services().troubles
        troubles.receivers.expect(map(parse_endpoint, receivers))
        troubles.sources.expect(sources)

    def connections(self) -> list[ConnectionRow]:
        """Clients' connections as they stand, the oldest first; in turns."""
        now = monotonic()
        standing = sorted((each for _, each in self._standing()), key=lambda each: each.started)
        return [_row(each, now) for each in in_turns(standing)]

    def events(self) -> list[outputs.Recent]:
        """What was logged lately, the newest last."""
        return outputs.recent()

    def logins(self) -> list[Entry]:
        """Who has proven a name with which secret."""
        return self.services().instances.logins.entries()

    def drop_cached(self, source: str) -> int:
        """Close held-open connections that leave from an address; how many."""
        return self.services().keeper.forsake(source)

    def close(self, number: int) -> bool:
        """End a client's connection; False: there is none of this number. Looks in turns."""
        for connection, standing in self._standing():
            if standing.number == number:
                connection.cut(Ending.CLOSED_BY_OPERATOR)
                return True
        return False

    def log_verbose(self, wanted: Mapping[str, str], seconds: float, id: str) -> None:
        """Write the steps of these connections into the log for so long, as another process has been told to."""
        self.watching.begin(wanted, seconds, "", id)

    def log_less(self, id: str | None) -> int:
        """End one of these, or all; how many there were."""
        return self.watching.end(id)

    def tell(self, wanted: Mapping[str, str], say: Callable[[list[str]], bool]) -> Callable[[], None]:
        """See `watching.tell`."""
        return watching.tell(wanted, say)

    def _standing(self) -> Iterator[tuple[HostedConnection, Standing]]:
        """All in turns, but those that have ended meanwhile."""
        connections = self.services().instances.connections
        for connection in in_turns(list(connections)):
            if connection in connections and (standing := connection.standing()) is not None:
                yield connection, standing


def in_turns(things: Sequence[_Thing]) -> Iterator[_Thing]:
    """With all else in between."""
    breathe = Breather(_KEY)
    for thing in things:
        breathe()
        yield thing


def _row(standing: Standing, now: float) -> ConnectionRow:
    return ConnectionRow(
        id=standing.number,
        state=standing.state,
        age=now - standing.started,
        instance=standing.instance,
        protocol=standing.protocol,
        client=str(standing.client),
        source=standing.source,
        destination=str(standing.destination or ""),
    )
