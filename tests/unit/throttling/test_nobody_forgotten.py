"""Random walks over the place book: after each call nobody stands in a line whose turn it is and who could go on.

What is kept for one ticket is free for others while it could not be used: so a throttle may open for those in its line
by what happens at another one. Whatever happened, the call in which it did has looked at all of them.
"""

from __future__ import annotations

import random

import pytest

from proxy.throttling.flows import Flow, Path, Places, Receiver, Throttle, Ticket
from proxy.throttling.places import PlaceBook
from proxy.throttling.throttle import SECOND, Key, Limit
from tests.unit.throttling.benches import MS, SOURCE

STEPS = 400


class Walk:
    """A few throttles with places, some of which count connections too, and whoever asks for some of them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 1_000 * SECOND
        self.closed: set[Flow] = set()
        self.book = PlaceBook(lambda flow: flow in self.closed)
        self.throttles = [self._throttle(f"t{index}") for index in range(4)]
        self.flows = [
            Flow(Receiver(owner, 1.0), id, Path(self._some())) for id, owner in enumerate(("a", "b", "c") * 2)
        ]
        self.held: list[Places] = []
        self.waiting: dict[Ticket, None] = {}

    def _throttle(self, name: str) -> Throttle:
        counts = self.rng.random() < 0.4
        made = Throttle(Key(SOURCE, name), counts=counts)
        made.cap = self.rng.choice((1, 2, 3)) if not counts or self.rng.random() < 0.5 else 0
        if counts:
            made.limit_to((Limit(self.rng.choice((2, 5, 20)), 1),), 0, 0)
        return made

    def _some(self) -> tuple[Throttle, ...]:
        return tuple(self.rng.sample(self.throttles, self.rng.choice((1, 2, 2, 3))))

    def step(self) -> str:
        """Something happens; what, for whoever reads of a failure."""
        what = self.rng.choice(("ask", "ask", "ask", "release", "release", "swap", "cancel", "hold", "pause", "later"))
        getattr(self, f"_{what}")()
        admitted, self.book.admitted = self.book.admitted, []
        for ticket in admitted:
            del self.waiting[ticket]
            if ticket.places is not None:
                self.held.append(ticket.places)
        return what

    def _ask(self) -> None:
        if len(self.waiting) > 12:
            return
        flow = self.rng.choice(self.flows)
        answer = self.book.admit(
            flow.receiver.name, 1.0, flow.path.throttles, (flow,), self.now, self.rng.random() < 0.8
        )
        if isinstance(answer, Places):
            self.held.append(answer)
        else:
            self.waiting[answer] = None

    def _release(self) -> None:
        if self.held:
            self.book.release(self.held.pop(self.rng.randrange(len(self.held))), self.now)

    def _swap(self) -> None:
        if not self.held:
            return
        index, flow = self.rng.randrange(len(self.held)), self.rng.choice(self.flows)
        new = self.book.swap(
            self.held[index], flow.receiver.name, 1.0, flow.path.throttles, (flow,), self.now, self.rng.random() < 0.8
        )
        if new is not None:
            self.held[index] = new

    def _cancel(self) -> None:
        if self.waiting:
            ticket = self.rng.choice(list(self.waiting))
            del self.waiting[ticket]
            self.book.cancel(ticket, self.now)

    def _hold(self) -> None:
        """A flow is held back, or no longer."""
        flow = self.rng.choice(self.flows)
        if flow in self.closed:
            self.closed.discard(flow)
            self.book.retry(flow, self.now)
        else:
            self.closed.add(flow)
            self.book.shut(flow, self.now)

    def _pause(self) -> None:
        """A throttle is closed by a reply, or its time is over."""
        throttle = self.rng.choice(self.throttles)
        throttle.closed_until = 0 if throttle.closed_until else self.now + 3600 * SECOND
        self.book.pump(throttle, self.now)

    def _later(self) -> None:
        self.now += self.rng.choice((1, 50, 300)) * MS
        for throttle in self.book.wheel.expire(self.now):
            self.book.pump(throttle, self.now)

    def forgotten(self) -> list[tuple[str, str]]:
        """Where it is somebody's turn who could go on, and whose."""
        found = [(throttle.key.name, self.book._next_under(throttle, self.now)) for throttle in self.throttles]
        return [(name, ticket.owner) for name, ticket in found if ticket is not None]


@pytest.mark.parametrize("seed", [*range(40), 204, 382, 522])
def test_nobody_is_forgotten_whose_turn_it_is(seed: int) -> None:
    walk = Walk(seed)
    for index in range(STEPS):
        what = walk.step()
        assert not walk.forgotten(), f"after step {index}, {what}"
