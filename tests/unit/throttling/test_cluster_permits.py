"""Permits of several proxies: instances use leased slots up to the last moment of their slack."""

from __future__ import annotations

import pytest

from proxy.throttling.leasing import Leased
from proxy.throttling.limits import Part
from proxy.throttling.session import Session
from proxy.throttling.throttle import Key, Limit, interval
from tests.unit.throttling import accidents
from tests.unit.throttling.oracle import SECOND, Rule, check_slots
from tests.unit.throttling.proxies import MS, Proxy, World

LIMITS = (Limit(300, 60), Limit(30_000, 3600, 5))


class Instance:
    """Always has messages, and uses each permit at any moment of its life, nearly always the last."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy, self.world = proxy, proxy.world
        self.slots: list[int] = []
        self.uses: list[int] = []
        self.got = 0
        self.life = 0
        self.session: Session | None = None
        self.step()

    def step(self) -> None:
        proxy, world = self.proxy, self.world
        if proxy.alive:
            now = proxy.clock(world.now)
            if self.session is None or self.life != proxy.life:
                self.life, self.got = proxy.life, 0
                self.session = proxy.manager.hello(f"mta-{proxy.name}", b"run", "192.0.2.9", 1.0, now)
                proxy.manager.ping(self.session, now // 1000, now)
                key = Key("192.0.2.1", "rule")
                proxy.manager.register(self.session, 1, [(key, Part(LIMITS, cluster=True))], now)
            proxy.manager.ping(self.session, now // 1000, now)
            proxy.manager.demand(self.session, 1, 100, self.got, 0, 0, 0, now)
            self.take(now)
        world.at(world.now + 20 * MS, self.step)

    def take(self, now: int) -> None:
        proxy, world = self.proxy, self.world
        assert self.session is not None
        out = proxy.manager.take(self.session, now)
        if out.ping is not None:
            proxy.manager.pong(self.session, out.ping, 0, now)
        for grant in out.grants:
            self.got += grant.n
            for number in range(grant.n):
                slot = world.now + (grant.first_offset_us + number * grant.step_us) * 1000
                self.slots.append(slot)
                late = grant.slack_us * 1000
                self.uses.append(
                    max(world.now, slot + (late if world.rng.random() < 0.8 else world.rng.randrange(late)))
                )


def judge(instances: list[Instance]) -> list[int]:
    """Nobody shares arithmetic with the program here but the slack, which REG's LIMIT says: half a second."""
    uses = sorted(at for each in instances for at in each.uses)
    for limit in LIMITS:
        last = 0
        for number, at in enumerate(uses):
            while last < len(uses) and uses[last] < at + limit.seconds * SECOND:
                last += 1
            assert last - number <= limit.amount, (last - number, limit)
    return uses


@pytest.mark.parametrize(
    "accident",
    [
        accidents.nothing,
        accidents.one_is_parted,
        accidents.store_away_by_moments,
        accidents.copy_promoted,
        accidents.clock_set,
        accidents.proxies_killed_while_alone,
    ],
    ids=lambda accident: accident.__name__,
)
def test_permits_used_late_exceed_nothing(accident: accidents.Accident) -> None:
    world = World(1, [])
    instances = [Instance(proxy) for proxy in world.proxies]
    world.run(12)
    accident(world)
    world.run(40)
    judge(instances)
    since = world.now - 20 * SECOND
    least = 0.8 * 300 / 60 * 20  # the minute's limit is the lower one
    assert sum(at >= since for each in instances for at in each.uses) >= least


def test_the_slots_of_both_proxies_are_those_of_one() -> None:
    """While all is well: given out in true time as one proxy alone would, each of the two windows."""
    world = World(2, [])
    instances = [Instance(proxy) for proxy in world.proxies]
    world.run(100)
    slots = sorted(slot for each in instances for slot in each.slots)
    for limit in LIMITS:
        # A reply is under way for up to 2 ms, by which a slot may come later, and the next one not.
        loose = Rule(limit.amount, limit.seconds, limit.burst + 1)
        check_slots(slots, loose)
    assert len(slots) >= 0.9 * 300 / 60 * 80


@pytest.mark.only_python("defects put in the place of functions")
def test_a_mutant_that_forgets_the_slack_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Leased, limit: Limit, told: int, amount: int) -> tuple[int, int]:
        return interval(Limit(amount, limit.seconds), 0), 1

    monkeypatch.setattr(Leased, "spacing", forgetful)
    world = World(1, [])
    instances = [Instance(proxy) for proxy in world.proxies]
    world.run(140)
    with pytest.raises(AssertionError, match=r"30[1-9]"):
        judge(instances)
