"""Places of several proxies that one of them does not use any more go to who wants them, and nobody's are forgotten."""

from __future__ import annotations

import pytest

from tests.unit.throttling.proxies import MS, Proxy, World, block

PLACES = 5


def cap(proxy: Proxy) -> int:
    (throttle,) = proxy.cluster.throttles
    return throttle.cap_here


def want_all(world: World, proxy: Proxy, until: int) -> None:
    """It opens whatever it may, again and again."""
    if world.now < until:
        proxy.open()
        world.at(world.now + 20 * MS, lambda: want_all(world, proxy, until))


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("lost", [0.0, 1.0])
def test_places_that_nobody_uses_any_more_go_to_who_wants_them(lost: float, forgotten: bool) -> None:
    """Though replies are lost, and though the throttle is forgotten where it was used."""
    world = World(1, [block(places=PLACES)])
    first, second = world.proxies
    want_all(world, first, world.now + 15 * 10**9)
    world.run(15)
    assert cap(first) == PLACES - 1, "but for the one that nobody is without"
    first.line.lose_reply = lost
    while first.places:
        first.close()
    (throttle,) = first.cluster.throttles
    if forgotten:
        first.cluster.drop(throttle)
    world.run(0.2)  # two calls
    first.line.lose_reply = 0.0
    want_all(world, second, world.now + 15 * 10**9)
    world.run(15)
    assert cap(second) == PLACES - 1
    assert throttle.cap_here == 1
    assert len(first.cluster.throttles) == (not forgotten)
