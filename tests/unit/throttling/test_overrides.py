"""What an operator sets by hand: a pause, lower limits, for a time, of an instance's rules and of throttle blocks."""

from __future__ import annotations

import pytest

from proxy.policy.limits import Limits
from proxy.settings import ThrottleSettings
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.limits import Effective
from proxy.throttling.overrides import Override, Overrides
from proxy.throttling.session import Session
from proxy.throttling.throttle import SECOND, Key, Limit
from tests.unit.throttling.benches import KEY, SOURCE, Bench, count, part

HOURLY = Limit(100, 3600)


def override(name="yahoo", source="", pause=False, places=0, limits=(), until=100 * SECOND):
    return Override(name, source, pause, places, limits, until)


FULL = Effective((HOURLY,), 5)


def applied(*overrides, terms=FULL, key=KEY):
    all_ = Overrides()
    for each in overrides:
        all_.add(each)
    return all_.apply(key, terms)


@pytest.mark.parametrize(
    ("said", "terms", "found"),
    [
        ({"places": 2}, Effective((), 5), Effective((), 2)),
        ({"places": 9}, Effective((), 5), Effective((), 5)),
        ({"places": 9}, Effective((), 0), Effective((), 9)),
        ({}, Effective((HOURLY,), 5), Effective((HOURLY,), 5)),
        ({"limits": (Limit(10, 3600),)}, Effective((HOURLY,), 0), Effective((Limit(10, 3600),), 0)),
        ({"limits": (Limit(1000, 3600),)}, Effective((HOURLY,), 0), Effective((HOURLY,), 0)),
        ({"limits": (Limit(3, 60),)}, Effective((HOURLY,), 0), Effective((Limit(3, 60), HOURLY), 0)),
        ({"limits": (Limit(5, 60),)}, Effective((Limit(60, 60, 20),), 0), Effective((Limit(5, 60, 1),), 0)),
        ({"limits": (Limit(5, 60, 9),)}, Effective((Limit(60, 60, 20),), 0), Effective((Limit(5, 60, 4),), 0)),
    ],
)
def test_never_more_than_there_would_be_without(said, terms, found) -> None:
    assert applied(override(**said), terms=terms) == (found, 0)


def test_the_least_of_all_that_hold() -> None:
    mine, others = override(places=3, source="192.0.2.1"), override(places=1, source="192.0.2.2")
    assert applied(override(places=4), mine, others)[0].places == 3
    assert applied(others, override("gmail", places=1)) == (Effective((HOURLY,), 5), 0)


def test_a_pause_closes_until_its_end() -> None:
    assert applied(override(pause=True, until=7 * SECOND)) == (Effective((HOURLY,), 5), 7 * SECOND)


def test_of_two_pauses_the_last_end_counts() -> None:
    mine, all_ = override(pause=True, source=SOURCE, until=9 * SECOND), override(pause=True, until=7 * SECOND)
    assert applied(mine, all_)[1] == applied(all_, mine)[1] == 9 * SECOND


def test_another_one_of_the_same_kind_takes_the_place_of_the_first() -> None:
    all_ = Overrides()
    all_.add(override(places=2))
    paused = all_.add(override(pause=True))
    all_.add(override(places=3))
    assert [each.places for _, each in all_.items()] == [0, 3]
    assert [each.pause for each in all_.end(lambda number, _: number == paused)] == [True]
    assert all_.expire(99 * SECOND, 10) == []
    assert [each.places for each in all_.expire(101 * SECOND, 10)] == [3]
    assert not all_


# --- by the whole manager ---


class Steered(Bench):
    """Sessions under two rules, and an operator."""

    def steer(self, said: Override) -> int:
        number = self.manager.set_by_hand(said._replace(until=self.now + said.until), self.now)
        self.run(SECOND)
        return number

    def hungry(self, name: str, *parts: object) -> Session:
        session = self.session(name)
        self.register(session, (KEY, part(*parts)))  # type: ignore[arg-type]
        self.want(session, 10_000)
        self.run(SECOND)
        return session

    def granted(self, span: int) -> int:
        """Messages in so much time, whose demand does not end."""
        total = sum(count(self.run(span)).values())
        for session in self.manager.sessions.values():
            self.want(session, 10_000)
        return total


@pytest.mark.parametrize("limits", [(Limit(60, 60),), ()], ids=["limited", "unlimited"])
def test_a_paused_rule_gives_nothing_until_the_pause_is_over(limits: tuple[Limit, ...]) -> None:
    bench = Steered()
    bench.hungry("a", *limits)
    bench.granted(SECOND)
    bench.steer(override(pause=True, until=100 * SECOND))
    assert bench.granted(90 * SECOND) == 0
    assert bench.granted(40 * SECOND) >= 20


def test_a_pause_that_is_ended_by_hand_and_one_of_another_source() -> None:
    bench = Steered()
    bench.hungry("a", Limit(60, 60))
    bench.steer(override(pause=True, until=1000 * SECOND, source="192.0.2.99"))
    assert bench.granted(10 * SECOND) >= 9
    number = bench.steer(override(pause=True, until=1000 * SECOND, source=SOURCE))
    assert bench.granted(50 * SECOND) == 0
    assert bench.manager.end_by_hand(lambda each, _: each == number, bench.now) == 1
    assert bench.granted(10 * SECOND) >= 9


def test_a_lower_rate_for_a_time_and_who_comes_meanwhile() -> None:
    bench = Steered()
    bench.hungry("a", Limit(600, 60))
    bench.steer(override(limits=(Limit(60, 60),), until=100 * SECOND))
    bench.hungry("b", Limit(600, 60))
    assert bench.granted(50 * SECOND) <= 51
    bench.run(60 * SECOND)
    assert bench.granted(50 * SECOND) >= 400


def test_fewer_places_and_none_while_paused() -> None:
    bench = Steered()
    session = bench.session("a")
    bench.register(session, (KEY, part(places=5)))
    bench.run(SECOND)
    flows = bench.manager.flows(session, (0,))

    def admitted() -> Places | Ticket:
        return bench.manager.admit("a", 1.0, SOURCE, "198.51.100.7", flows, bench.now)

    bench.steer(override(places=1, until=500 * SECOND))
    first = admitted()
    assert isinstance(first, Places)
    second = admitted()
    assert isinstance(second, Ticket)
    bench.steer(override(pause=True, until=100 * SECOND))
    bench.manager.release(first, bench.now)
    bench.run(50 * SECOND)
    assert second.places is None
    error = bench.manager.refusal(second, bench.now)
    assert "paused by hand" in str(error)
    bench.run(60 * SECOND)
    assert second.places is not None
    assert isinstance(third := admitted(), Ticket)
    bench.run(500 * SECOND)
    assert third.places is not None


def test_blocks_are_paused_and_limited_as_well() -> None:
    block = ThrottleSettings(
        name="yahoo", source=(), destination=(), max_concurrent_connections=0, max_delivery_rate=(), wait=20.0
    )
    bench = Steered()
    bench.manager.reload(False, Limits((block,)), bench.now)

    def admitted() -> Places | Ticket:
        return bench.manager.admit("a", 1.0, SOURCE, "198.51.100.7", (), bench.now)

    first = admitted()
    assert isinstance(first, Places)
    bench.steer(override(places=1, until=1000 * SECOND))
    second = admitted()
    assert isinstance(second, Ticket)
    bench.steer(override(pause=True, until=100 * SECOND))
    bench.manager.release(first, bench.now)
    bench.manager.reload(False, Limits((block,)), bench.now)
    bench.run(50 * SECOND)
    assert second.places is None
    assert bench.manager.wait_of(second) == 0.0
    bench.run(60 * SECOND)
    assert second.places is not None


@pytest.mark.parametrize("source", ["", SOURCE])
def test_many_throttles_are_reached_in_turns(source: str) -> None:
    bench = Steered()
    session = bench.session("a")
    for number in range(3000):
        bench.register(session, (Key(SOURCE, f"rule-{number}"), part(Limit(60, 60))), id=number)
    bench.register(session, (KEY, part(Limit(60, 60))), id=5000)
    bench.run(SECOND)
    bench.manager.set_by_hand(override(pause=True, until=bench.now + 100 * SECOND, source=source), bench.now)
    turns = 0
    while bench.manager.next_wakeup() == 0:
        turns += 1
        bench.manager.advance(bench.now)
        bench.collect()
    assert turns >= 15
    assert bench.manager.throttles[KEY].closed_until
    assert not bench.manager.throttles[Key(SOURCE, "rule-7")].closed_until
