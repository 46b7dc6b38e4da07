"""Connection places of several proxies: all together have no more than there are, whatever dies, and all are used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.throttling import accidents
from tests.unit.throttling.fake_store import SOURCE
from tests.unit.throttling.oracle import Violation
from tests.unit.throttling.proxies import MS, World, block

PLACES = 12


def crowd(seed: int, proxies: int = 3, source: str = SOURCE, keen: Callable[[int], float] = lambda n: 0.6) -> World:
    """Connections come and go all the time; `keen`: how often one of a proxy's steps is to open one."""
    world = World(seed, [block(places=PLACES)], proxies, source=source)

    def step(number: int) -> None:
        proxy = world.proxies[number]
        (proxy.open if world.rng.random() < keen(number) else proxy.close)()
        world.at(world.now + world.rng.randrange(1, 60 * MS), lambda: step(number))

    for number in range(proxies):
        world.at(world.now, lambda number=number: step(number))
    return world


def judge(world: World) -> None:
    if world.most_open > PLACES:
        raise Violation(f"{world.most_open} connections at a time, allowed are {PLACES}")


@pytest.mark.parametrize("accident", accidents.ACCIDENTS, ids=lambda accident: accident.__name__)
def test_there_are_never_more_connections_than_places(accident: accidents.Accident) -> None:
    world = crowd(1)
    world.run(5)
    accident(world)
    judge(world)
    world.most_open = 0
    world.run(20)
    judge(world)
    assert world.most_open >= PLACES - 1


def test_places_are_for_who_wants_them() -> None:
    world = crowd(2, keen=lambda number: 0.9 if number == 0 else 0.0)
    world.run(10)
    assert len(world.proxies[0].places) >= PLACES - 2 - 1  # one is kept for each of the others
    judge(world)


def test_who_loses_the_store_goes_on_with_one_place_at_least() -> None:
    world = crowd(3, keen=lambda number: 0.9 if number == 0 else 0.0)
    world.run(10)
    for line in accidents.lines(world):
        line.cut = True
    world.run(5)
    idle = world.proxies[1]
    idle.open()
    assert len(idle.places) == 1
    idle.open()
    assert idle.waiting
    judge(world)


def test_fewer_places_than_proxies_go_round_and_stand_still_without_the_store() -> None:
    world = World(4, [block(places=1)], 2)
    world.run(5)
    a, b = world.proxies
    a.open()
    b.open()
    world.run(3)
    assert len(a.places) + len(b.places) == 1
    first, second = (a, b) if a.places else (b, a)
    first.close()
    world.run(3)
    assert second.places
    assert world.most_open == 1


def changed(old: str, new: str) -> str:
    assert SOURCE.count(old) == 1, old
    return SOURCE.replace(old, new)


MUTANTS = {
    "a_cap_that_fell_counts_at_once": changed("math.max(least, each[4], each[5])", "math.max(least, each[3])"),
    "the_silent_hold_nothing": changed("held = held + math.max(share, each[4], each[5])", "held = held + 1").replace(
        "away = away + share", ""
    ),
    "a_new_memory_gives_at_once": changed("elseif not young then", "else"),
}  # fmt: skip


def show(source: str) -> None:
    for seed in range(4):
        for accident in (accidents.one_is_parted, accidents.memory_flushed):
            world = crowd(seed, source=source)
            world.run(5)
            accident(world)
            judge(world)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str) -> None:
    with pytest.raises(Violation):
        show(MUTANTS[name])
