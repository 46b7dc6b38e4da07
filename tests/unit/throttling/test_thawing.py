"""A manager that was frozen and is thawed is as one whose process stood still: the same calls, at the end of that time.

Two managers are told the same. One of them is frozen for a while and gathered; the other one hears what was said in
that time when it is over. Then all that they would leave to another has to be the same, and so is what they give next.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from proxy.policy.limits import Limits
from proxy.settings import BackoffSettings, Rate
from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.limits import BackoffRule
from proxy.throttling.manager import Manager
from proxy.throttling.session import GrantRecord, Session
from proxy.throttling.throttle import MILLISECOND, SECOND, Key, Limit
from tests.unit.throttling.benches import SOURCE, Bench, part
from tests.unit.throttling.heirs import picture, read
from tests.unit.throttling.test_backoff import block

MX = "198.51.100.1"
RULES = Limits(
    (
        block(
            BackoffSettings(on=("421",), percent=50, return_after=5.0),
            max_delivery_rate=(Rate(40, 10),),
            max_concurrent_connections=5,
        ),
    )
)
KEYS = [Key(SOURCE, f"rule{number}") for number in range(4)]
LIMITS = [(Limit(20, 10),), (Limit(60, 60, 5),), (Limit(5, 1), Limit(30, 60)), ()]
#: What is said by a number that tells which of all sessions, places or tickets is meant.
Call = tuple[str, int, int]


class Twin(Bench):
    """One of two; equal calls do the same."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = Manager(7, self.now - 50_000 * SECOND, True, RULES)
        self.sessions: list[Session] = [self.session(name) for name in "abc"]
        self.places: list[Places] = []
        self._fresh: list[Places] = []
        self.asked: list[Places | Ticket] = []
        self.messages: list[MessageTicket] = []
        self._open(0, 0)  # the throttles of a block begin when they are first asked for, frozen or not
        for session in self.sessions:
            for id in range(4):
                self.say(("register", self.sessions.index(session), id))

    def say(self, call: Call) -> None:
        what, which, number = call
        getattr(self, f"_{what}")(which, number)

    def settle(self) -> dict[str, list[GrantRecord]]:
        self._let_in(self.manager.take_admitted())
        self.places += sorted(self._fresh, key=lambda places: places.number)  # in the order in which they were given
        self._fresh.clear()
        return self.collect()

    def _let_in(self, tickets: list[Ticket]) -> None:
        self._fresh += [each.places for each in tickets if each.places is not None]

    def left(self) -> list[str]:
        """All that it would leave; it is thawed again."""
        self.manager.freeze(self.now)
        told = picture(read(self.manager.gather(self.now)))
        self.manager.thaw(self.now)
        return told

    def _register(self, which: int, number: int) -> None:
        session, keys = self.sessions[which % 3], [KEYS[number % 4], KEYS[number % 3]]
        limits = [LIMITS[(number // 4 + KEYS.index(key)) % 4] for key in dict.fromkeys(keys)]
        parts = [(key, part(*own, places=3)) for key, own in zip(dict.fromkeys(keys), limits, strict=True)]
        self.register(session, *parts, id=number % 4)

    def _unregister(self, which: int, number: int) -> None:
        self.manager.unregister(self.sessions[which % 3], number % 4, self.now)

    def _demand(self, which: int, number: int) -> None:
        self.manager.demand(self.sessions[which % 3], number % 4, number, 0, 0, 0, 0, self.now)

    def _give_back(self, which: int, number: int) -> None:
        self.manager.give_back(self.sessions[which % 3], number % 4, number, 2, self.now)

    def _outcome(self, which: int, number: int) -> None:
        self.manager.outcome(self.sessions[which % 3], number % 4, 1, number, 0, number % 5 == 0, self.now)

    def _slow(self, which: int, number: int) -> None:
        rule = BackoffRule(50, None, number * SECOND, 50)
        self.register(self.sessions[which % 3], (KEYS[0], part(*LIMITS[0], backoff=rule)), id=0)

    def _leave(self, which: int, number: int) -> None:
        session = self.sessions[which % 3]
        self.manager.bye(session, self.now)
        again = self.sessions[which % 3] = self.session(session.name, run=b"2")
        self.register(again, (KEYS[1], part(*LIMITS[1])), id=1)

    def _open(self, which: int, number: int) -> None:
        session = self.sessions[which % 3]
        flow = session.flows.get(number % 4)
        flows = (flow,) if flow is not None and number % 2 else ()
        answer = self.manager.admit(session.name, 1.0, SOURCE, MX, flows, self.now, rated=number % 3 == 0)
        self.asked.append(answer)
        if isinstance(answer, Places):
            self._fresh.append(answer)

    def _close(self, which: int, number: int) -> None:
        if which < len(self.places):
            self._let_in(self.manager.release(self.places[which], self.now))

    def _replied(self, which: int, number: int) -> None:
        if which < len(self.places):
            self.manager.replied(self.places[which], "421 not now", self.now)

    def _give_up(self, which: int, number: int) -> None:
        """Of all that have asked: one that has got in by now closes its connection."""
        if which < len(self.asked):
            one = self.asked[which]
            give = self.manager.release if isinstance(one, Places) else self.manager.cancel
            self._let_in(give(one, self.now))  # type: ignore[operator]

    def _message(self, which: int, number: int) -> None:
        ticket = self.manager.ask_message("abcd"[which % 4], 1.0, SOURCE, MX, (), self.now)
        if ticket is not None:
            self.messages.append(ticket)

    def _day(self, which: int, number: int) -> None:
        self.manager.turn_day(number, self.now)


SAYINGS = ["demand", "give_back", "outcome", "open", "replied", "message", "day", "close", "give_up"]
REGISTERING = ["register", "unregister", "slow", "leave"]


def draw(rng: random.Random, twin: Twin, frozen: bool) -> list[Call]:
    """Some calls. Those in a freeze name no place and no path that is said in the same freeze: the other twin has not
    made it yet."""
    registering = rng.random() < 0.5
    sayings = SAYINGS + REGISTERING * registering
    known = {"close": len(twin.places), "replied": len(twin.places), "give_up": len(twin.asked)}
    calls = []
    for _ in range(rng.randrange(12)):
        what, number = rng.choice(sayings), rng.randrange(1, 20)
        if frozen and registering and what == "open":
            number &= ~1  # without a path
        calls.append((what, rng.randrange(max(1, known.get(what, 4))), number))
    return calls


def both(twins: tuple[Twin, Twin], do: Callable[[Twin], object]) -> None:
    one, other = [do(twin) for twin in twins]
    assert one == other


@pytest.mark.parametrize("seed", range(40))
def test_frozen_and_thawed_is_as_if_it_stood_still(seed: int) -> None:
    rng = random.Random(seed)
    twins = one, other = Twin(), Twin()
    for _ in range(12):
        for call in draw(rng, one, frozen=False):
            for twin in twins:
                twin.say(call)
        span = rng.randrange(2 * SECOND)
        both(twins, lambda twin, span=span: (twin.run(span), twin.settle()))  # type: ignore[misc]
        assert one.left() == other.left()
        calls = draw(rng, one, frozen=True)
        one.manager.freeze(one.now)
        for call in calls:
            one.now += 7 * MILLISECOND
            one.say(call)
        list(one.manager.gather(one.now))
        other.now = one.now
        one.manager.thaw(one.now)
        for call in calls:
            other.say(call)
        for twin in twins:
            twin.manager.advance(twin.now)
        both(twins, Twin.settle)
        assert one.left() == other.left()
