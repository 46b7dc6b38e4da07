"""Topologies of connection places: everybody wants more connections than there are places, for random times.

The place book under test runs in virtual time; what each session held is summed up as places times nanoseconds, to be
judged like slots (see `topologies`), with places in the place of messages a second.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from fractions import Fraction
from heapq import heappop, heappush
from itertools import count

from proxy.throttling.flows import Flow, Places, Throttle, Ticket
from proxy.throttling.places import PlaceBook
from proxy.throttling.throttle import SECOND
from tests.unit.throttling.benches import MS, SOURCE, Key
from tests.unit.throttling.topologies import Line, Topology, Unfair, draw, fair_shares, least_shares

#: Connections that each line wants at any time: more than any throttle has places.
EAGER = 12
#: How many a throttle may have.
PLACES = (1, 2, 3, 5, 8)


def _nobody_is_shut(flow: Flow) -> bool:
    return False


class Crowd:
    """Sessions that open as many connections as they are let, keep each for a while, and want the next one at once.

    Attributes:
        held: what each line has had, places times nanoseconds. idle: the same for places that nobody held, by throttle.
    """

    def __init__(self, topology: Topology, seed: int) -> None:
        self.now = 1_000 * SECOND
        self.topology = topology
        self.book = PlaceBook(_nobody_is_shut)
        self.held: dict[Line, int] = dict.fromkeys(topology.lines, 0)
        self._rng = random.Random(seed)
        self._ends: list[tuple[int, int, Line, Places]] = []
        self._order = count()
        self._waiting: dict[Ticket, Line] = {}
        self._throttles = {name: Throttle(Key(SOURCE, name)) for name in topology.limits}
        for name, throttle in self._throttles.items():
            throttle.cap = topology.limits[name].amount
        for line in self._rng.sample(topology.lines * EAGER, len(topology.lines) * EAGER):
            self._ask(line)

    def _ask(self, line: Line) -> None:
        throttles = tuple(self._throttles[name] for name in line.throttles)
        answer = self.book.admit(line.session, self.topology.weights[line.session], throttles, (), self.now)
        if isinstance(answer, Places):
            self._begin(line, answer)
        else:
            self._waiting[answer] = line

    def _begin(self, line: Line, places: Places) -> None:
        span = self._rng.randrange(5 * MS, 60 * MS)
        heappush(self._ends, (self.now + span, next(self._order), line, places))

    def run(self, span: int, patience: float = 0.0) -> dict[Line, int]:
        """What each line held within `span`, as places times nanoseconds.

        Args:
            patience: the chance that somebody who waits gives up when a connection ends, and asks anew.
        """
        end, before = self.now + span, dict(self.held)
        while self._ends[0][0] <= end:
            then, self.now = self.now, self._ends[0][0]
            for _, _, line, _ in self._ends:
                self.held[line] += self.now - then
            _, _, line, places = heappop(self._ends)
            self.book.release(places, self.now)
            if patience and self._rng.random() < patience:
                ticket = self._rng.choice(list(self._waiting))
                asked = self._waiting.pop(ticket)
                self.book.cancel(ticket, self.now)
                self._ask(asked)
            self.collect()
            self._ask(line)
            self.check()
        self.now = end
        return {line: held - before[line] for line, held in self.held.items()}

    def collect(self) -> None:
        admitted, self.book.admitted = self.book.admitted, []
        for ticket in admitted:
            line = self._waiting.pop(ticket, None)
            if ticket.places is not None and ticket.places.open and line is not None:
                self._begin(line, ticket.places)

    def check(self) -> None:
        """Never more than there are, and nobody waits who could get in."""
        for throttle in self._throttles.values():
            users = [line for _, _, line, _ in self._ends if throttle.key.name in line.throttles]
            assert throttle.used == len(users) <= throttle.cap
        for ticket in self._waiting:
            kept = [each.line.claim for each in ticket.throttles if each.line is not None]
            if not any(each.full() for each in ticket.throttles):
                assert any(claim is not None and claim is not ticket for claim in kept), "it could have got in"


def measured_places(topology: Topology, seed: int, seconds: int, patience: float = 0.0) -> dict[Line, int]:
    crowd = Crowd(topology, seed)
    crowd.run(2 * SECOND, patience)
    return crowd.run(seconds * SECOND, patience)


def judge_places(held: dict[Line, int], promised: dict[Line, Fraction], seconds: int) -> None:
    """Whether each held what was promised, but for four connections at the edges of the time.

    Raises:
        Unfair: says who did not.
    """
    for line, share in promised.items():
        if held[line] + 4 * 32 * MS < share * seconds * SECOND:
            raise Unfair(f"{line} held {held[line] / seconds / SECOND:.3f} places, promised were {float(share):.3f}")


def check_places(seeds: Iterable[int], seconds: int = 6) -> None:
    """Topologies with one path a session, and others with several: all shares are kept.

    Raises:
        Unfair: one was not.
    """
    for seed in seeds:
        single = draw(seed, PLACES, 1)
        promised = {line: share / 3 for line, share in fair_shares(single).items()}
        judge_places(measured_places(single, seed, seconds), promised, seconds)
        several = draw(seed, PLACES, 1, several=True)
        promised = {line: share / 3 for line, share in least_shares(several).items()}
        judge_places(measured_places(several, seed, seconds, 0.1), promised, seconds)
