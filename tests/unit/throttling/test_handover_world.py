"""Managers exchanged at random moments, in a world with faults: no limit is broken, nothing stands still, all is fair.

The oracle knows nothing of the exchange: to it the slots of all managers together are those of one. Broken variants of
the handing over are below, and it has to catch each.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

import pytest

from proxy.throttling import estate
from proxy.throttling.adopting import Adopting
from proxy.throttling.flows import Path, Throttle
from proxy.throttling.handover import Handover
from proxy.throttling.registry import Registry
from proxy.throttling.throttle import AHEAD, SECOND, Past, Window
from tests.unit.throttling.oracle import Violation
from tests.unit.throttling.simulation import MS, PATHS, Client, World, act, make_world, nobody_is_forgotten

Patch = pytest.MonkeyPatch


def walk(seed: int, steps: int, exchanges: float, restarts: bool = False) -> World:
    """A world after random actions, among them exchanges, sometimes 20 in a row; checked to the end."""
    rng = random.Random(seed)
    world = make_world(rng)
    for _ in range(steps):
        if world.rng.random() < exchanges:
            for _ in range(rng.choice((1, 1, 1, 2, 20))):
                world.exchange_manager((0, rng.choice((0, 30 * MS, SECOND))), rng.choice((0, 0, 20 * MS, SECOND)))
                world.run_for(rng.choice((0, 5 * MS, 100 * MS)))
        act(world, rng, restarts)
        if world.manager is not None:
            nobody_is_forgotten(world.manager, world.now)
    world.oracle.finish()
    return world


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_random_worlds(seed: int, restarts: bool) -> None:
    assert len(walk(seed, 300, 0.2, restarts).oracle.uses) > 300


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_worlds() -> None:
    for seed in range(100, 160):
        walk(seed, 400, 0.2, seed % 2 == 0)


# --- nothing stands still ---


def saturated(seed: int, exchanges: int, seconds: int, path: str, back: tuple[int, int] = (0, 0)) -> World:
    """Near clients with more mail than there are slots, and so many exchanges in the time."""
    rng = random.Random(seed)
    world = World(rng)
    world.dawdling = False
    world.clients = [Client(f"mta{index}", index * SECOND, (0, 0)) for index in range(3)]
    world.run_for(120 * SECOND)
    for client in world.clients:
        world.connect(client)
        world.mail(client, path, 10**6)
    moments = sorted(rng.randrange(seconds * SECOND) for _ in range(exchanges))
    began = world.now
    for moment in moments:
        world.run_for(began + moment - world.now)
        world.exchange_manager(back)
    world.run_for(began + seconds * SECOND - world.now)
    world.oracle.finish()
    return world


@pytest.mark.parametrize("path", ["minute", "fast", "burst", "rare"])
def test_the_same_slots_as_if_there_was_no_exchange(path: str) -> None:
    """Instances that are back at once get slot for slot what they had got without; only whose it is may differ."""
    seconds = 120 if path == "fast" else 600
    alone = saturated(1, 0, seconds, path)
    world = saturated(1, 25, seconds, path)
    for name in PATHS[path]:
        slots, expected = sorted(world.oracle.minted[name]), sorted(alone.oracle.minted[name])
        assert len(slots) == len(expected)
        assert max(abs(one - other) for one, other in zip(slots, expected, strict=True)) <= MS


def test_who_is_back_within_a_second_finds_its_share() -> None:
    """Each of three has a third, though they come back in any order."""
    world = saturated(2, 40, 1200, "minute", (0, SECOND))
    assert max(sent := [client.sent for client in world.clients]) - min(sent) <= 4
    full = 1200 * 120 / 60.25
    assert sum(sent) >= full - 40 * 2


# --- frozen and thawed ---


@pytest.mark.parametrize("seed", range(4))
def test_a_frozen_manager_that_is_thawed_is_one_that_stood_still(seed: int) -> None:
    """The limits hold, nobody is forgotten, and what was said meanwhile happens."""
    rng = random.Random(seed)
    world = make_world(rng)
    for _ in range(300):
        manager = world.manager
        if manager is not None and rng.random() < 0.2:
            manager.freeze(world.now)
            for _ in range(rng.randrange(4)):
                act(world, rng, restarts=False)
            list(manager.gather(world.now))
            manager.thaw(world.now)
            world._served()
        act(world, rng, restarts=False)
        if world.manager is not None and not world.manager.frozen:
            nobody_is_forgotten(world.manager, world.now)
    world.oracle.finish()
    assert len(world.oracle.uses) > 300


# --- slots that come back ---


def coming_back(seed: int, rounds: int) -> World:
    """Queues of near clients become empty, permits come back, and somebody wants them again after an exchange."""
    rng = random.Random(seed)
    world = World(rng)
    world.dawdling = False
    world.clients = [Client(f"mta{index}", index * SECOND, (0, 2 * MS)) for index in range(3)]
    world.run_for(120 * SECOND)
    for client in world.clients:
        world.connect(client)
    for _ in range(rounds):
        path = rng.choice(("minute", "burst", "fast"))
        for client in world.clients:
            world.mail(client, path, rng.randrange(1, 40))
        world.run_for(rng.randrange(600 * MS))
        for client in world.clients:
            world.flush(client, path)
        world.run_for(5 * MS)
        for _ in range(rng.choice((0, 1, 1, 3))):
            world.exchange_manager((0, 0))
    world.oracle.finish()
    return world


@pytest.mark.parametrize("seed", range(3))
def test_slots_that_come_back_are_given_once(seed: int) -> None:
    """And they are: others would be minted."""
    world = coming_back(seed, 200)
    minted = sum(map(len, (world.oracle.minted[name] for name in ("minute", "burst", "fast"))))
    assert len(world.oracle.granted) > minted + 20


# --- broken variants: the oracle has to catch each ---


def handed_over_as(patch: Patch, change: Callable[[Past, int], Past]) -> None:
    made = Window.handed_over
    patch.setattr(Window, "handed_over", lambda past, now: made(change(past, now), now))


def all_debts_are_forgotten(patch: Patch) -> None:
    handed_over_as(patch, lambda past, now: past._replace(tat=min(past.tat, now), filled_at=min(past.filled_at, now)))


def one_debt_in_ten_is_forgotten(patch: Patch) -> None:
    turns = count()
    handed_over_as(patch, lambda past, now: past if next(turns) % 10 else past._replace(tat=past.filled_at))


def what_was_given_out_ahead_is_forgotten(patch: Patch) -> None:
    handed_over_as(patch, lambda past, now: past._replace(tat=past.tat - AHEAD))


def only_the_first_window_is_handed_over(patch: Patch) -> None:
    take = Adopting._throttle

    def throttle(self: Adopting, record: estate.ThrottleOf) -> None:
        take(self, record)
        for window in self._throttles[-1].windows[1:]:
            window.tat = window.filled_at = 0

    patch.setattr(Adopting, "_throttle", throttle)


def a_slot_that_came_back_is_given_twice(patch: Patch) -> None:
    adopt = Registry.adopt_slots
    patch.setattr(Registry, "adopt_slots", lambda self, throttles, slots: adopt(self, throttles, [*slots, *slots]))


def what_came_back_is_put_off_to_now(patch: Patch) -> None:
    adopt = Registry.adopt_slots

    def later(self: Registry, throttles: tuple[Throttle, ...], slots: list[int]) -> Path:
        return adopt(self, throttles, [max(slot, latest[0]) for slot in slots])

    latest = [0]
    begin = Adopting.begin

    def began(self: Adopting, first: estate.Head) -> None:
        latest[0] = self._now // 1000 * 1000
        begin(self, first)

    patch.setattr(Adopting, "begin", began)
    patch.setattr(Registry, "adopt_slots", later)


def the_one_that_goes_goes_on(patch: Patch) -> None:
    gather = Handover.gather

    def unfrozen(self: Handover, now: int) -> list[bytes]:
        self._held = []
        chunks = list(gather(self, now))
        self._held = None
        return chunks

    patch.setattr(Handover, "freeze", lambda self, now: None)
    patch.setattr(Handover, "gather", unfrozen)


def walk_all() -> None:
    for seed in range(3):
        coming_back(seed, 200)
    for seed in range(6):
        walk(seed, 200, 0.2)


MUTANTS = [
    all_debts_are_forgotten,
    one_debt_in_ten_is_forgotten,
    what_was_given_out_ahead_is_forgotten,
    only_the_first_window_is_handed_over,
    a_slot_that_came_back_is_given_twice,
    what_came_back_is_put_off_to_now,
    the_one_that_goes_goes_on,
]


@pytest.mark.only_python("defects put in the place of functions")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        walk_all()
