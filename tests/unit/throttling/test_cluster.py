"""Several proxies and one store when all is well: the limit holds and is used, shares are fair, calls are few."""

from __future__ import annotations

from itertools import pairwise

import pytest

from proxy.policy.limits import Limits
from proxy.settings import Rate
from proxy.throttling.cluster import Cluster
from proxy.throttling.flows import Throttle
from proxy.throttling.leasing import Leased
from proxy.throttling.limits import Part
from proxy.throttling.manager import Manager
from proxy.throttling.session import Session
from proxy.throttling.throttle import Key, Limit
from tests.unit.throttling.oracle import SECOND
from tests.unit.throttling.proxies import MS, RECEIVER, World, block, jain

MINUTE, HOUR = 60, 3600


@pytest.mark.parametrize("proxies", [1, 2, 3])
def test_a_strict_limit_is_kept_and_used(proxies: int) -> None:
    world = World(proxies, [block(Rate(3000, HOUR))], proxies)
    world.run(HOUR + 60)
    since = world.now - HOUR * SECOND
    world.judge(3000, HOUR)
    assert len(world.sent(since)) >= 0.99 * 3000


@pytest.mark.parametrize("rate", [Rate(600, MINUTE), Rate(100, 10), Rate(300, 1)])
@pytest.mark.parametrize("proxies", [2, 3])
def test_equal_demand_gets_equal_parts_in_ten_seconds(proxies: int, rate: Rate) -> None:
    world = World(proxies, [block(rate)], proxies)
    for number, proxy in enumerate(world.proxies):
        proxy.hungry = 500
        proxy.line.delay = (MS // 10, (1 + 12 * number) * MS)  # some are nearer than others
    world.run(10)
    for _ in range(5):
        since = world.now
        world.run(10)
        assert jain(list(world.counts(since).values())) >= 0.99
    assert len(world.sent(world.now - 10 * SECOND)) >= 0.97 * 10 * rate.amount / rate.seconds


def test_what_one_does_not_want_is_the_others() -> None:
    world = World(5, [block(Rate(600, MINUTE))])
    world.proxies[0].hungry = 0
    world.run(130)
    counts = world.counts(world.now - MINUTE * SECOND)
    assert counts["proxy0"] == 0
    assert 590 <= counts["proxy1"] <= 600


def test_calls_are_few() -> None:
    world = World(6, [block(Rate(6000, MINUTE)), block(Rate(60, 1), name="other")])
    world.run(30)
    for proxy in world.proxies:
        at = proxy.calls
        assert all(later - earlier >= 50 * MS for earlier, later in pairwise(at))
        assert 5 * 30 <= len(at) <= 20 * 30


def test_one_sender_that_asks_for_one_at_a_time_does_not_wait_for_a_call_each_time() -> None:
    world = World(7, [block(Rate(100, 1))])
    for proxy in world.proxies:
        proxy.hungry = 1
    world.run(20)
    assert len(world.sent(world.now - 10 * SECOND)) >= 900


# --- instances' throttles ---


def register(manager: Manager, now: int, cluster: bool, name: str = "rule") -> Session:
    session = manager.hello("mta", b"run", "192.0.2.9", 1.0, now)
    manager.ping(session, now // 1000, now)
    part = Part((Limit(600, MINUTE),), cluster=cluster)
    manager.register(session, 1, [(Key("192.0.2.1", name), part)], now)
    return session


def test_an_instance_needs_a_store_for_what_is_for_all_proxies() -> None:
    now = 10_000 * SECOND
    for cluster in (None, Cluster("p", "r", 2, lambda: "w", now)):
        if cluster is not None:
            cluster.store = False
        manager = Manager(1, now, cluster=cluster)
        with pytest.raises(ValueError, match="no throttle_store"):
            register(manager, now, True)
        assert not manager.throttles


def test_a_throttle_has_one_scope() -> None:
    now = 10_000 * SECOND
    manager = Manager(1, now, cluster=Cluster("p", "r", 2, lambda: "w", now))
    session = register(manager, now, True)
    assert isinstance(manager.throttles[Key("192.0.2.1", "rule")], Leased)
    part = Part((Limit(600, MINUTE),))
    with pytest.raises(ValueError, match="has scope cluster"):
        manager.register(session, 2, [(Key("192.0.2.1", "rule"), part)], now)
    manager.register(session, 2, [(Key("192.0.2.1", "other"), part)], now)
    assert type(manager.throttles[Key("192.0.2.1", "other")]) is Throttle


def test_a_throttle_that_is_forgotten_is_asked_for_no_more() -> None:
    now = 10_000 * SECOND
    cluster = Cluster("p", "r", 2, lambda: "w", now)
    manager = Manager(1, now, cluster=cluster)
    session = register(manager, now, True)
    assert len(cluster.throttles) == 1
    manager.bye(session, now)
    manager.advance(now + SECOND)
    assert not cluster.throttles


def test_thousands_of_throttles_go_on_alone_in_turns() -> None:
    """And those first that somebody waits under."""
    now = 10_000 * SECOND
    cluster = Cluster("p", "r", 2, lambda: "w", now)
    manager = Manager(1, now, blocks=Limits([block(Rate(600, MINUTE))]), cluster=cluster)
    for number in range(2_500):
        manager.admit("mta", 1.0, f"192.0.{number // 250}.{number % 250}", RECEIVER, (), now, False)
    manager.ask_message("mta", 1.0, "192.0.20.9", RECEIVER, (), now)
    now += SECOND
    parted = []
    for _ in range(3):
        manager.ask_store(now, lambda key: "")
        parted.append({throttle.key.source for throttle in cluster.throttles if throttle.alone is not None})
    assert [len(each) for each in parted] == [1_000, 2_000, 2_501]
    assert "192.0.20.9" in parted[0]


def test_who_has_left_in_order_leaves_its_part_to_the_others() -> None:
    """Three where two are configured are three; when one has said that it goes, they are two again."""
    world = World(8, [block(Rate(600, MINUTE))], proxies=3, members=2)
    world.run(5)
    assert all(proxy.cluster.total == 3 for proxy in world.proxies)
    world.proxies[2].cluster.leave()
    world.run(1)
    world.proxies[2].kill()
    world.run(60)
    assert all(proxy.cluster.total == 2 for proxy in world.proxies[:2])
    assert len(world.sent(world.now - 10 * SECOND)) >= 0.95 * 100
    world.judge(600, MINUTE)
