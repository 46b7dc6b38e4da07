"""Connection places of several proxies: what one does not use the others get, whatever becomes of single calls."""

from __future__ import annotations

import pytest

from proxy.throttling.flows import Places, Ticket
from tests.unit.throttling.proxies import Proxy, World, block

PLACES = 5


def cap(proxy: Proxy) -> int:
    (throttle,) = proxy.cluster.throttles
    return throttle.cap_here


def held(answer: Places | Ticket) -> Places | None:
    return answer if isinstance(answer, Places) else answer.places


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("lost", [0.0, 1.0])
def test_places_that_nobody_uses_any_more_go_to_who_wants_them(lost: float, forgotten: bool) -> None:
    """Though replies are lost, and though the throttle is forgotten where it was used."""
    world = World(1, [block(places=PLACES)])
    first, second = world.proxies
    asked = [first.open() for _ in range(PLACES)]
    world.run(3)
    assert cap(first) == PLACES - 1, "but for the one that nobody is without"
    first.line.lose_reply = lost
    first.places = [each for each in (held(answer) for answer in asked) if each is not None]
    while first.places:
        first.close()
    (throttle,) = first.cluster.throttles
    if forgotten:
        first.cluster.drop(throttle)
    world.run(0.2)  # two calls
    first.line.lose_reply = 0.0
    for _ in range(PLACES):
        second.open()
    world.run(3)
    assert cap(second) == PLACES - 1
    assert throttle.cap_here == 1
    assert len(first.cluster.throttles) == (not forgotten)
