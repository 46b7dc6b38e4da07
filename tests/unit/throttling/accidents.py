"""What happens to stores, proxies and the ways between them, while a world goes on."""

from __future__ import annotations

from collections.abc import Callable

from tests.unit.throttling.oracle import SECOND
from tests.unit.throttling.proxies import MS, Line, Proxy, World

Accident = Callable[[World], None]
HOUR = 3600 * SECOND


def nothing(world: World) -> None:
    world.run(60)


def store_away(world: World) -> None:
    for line in lines(world):
        line.cut = True
    world.run(40)
    for line in lines(world):
        line.cut = False
    world.run(20)


def store_away_by_moments(world: World) -> None:
    for _ in range(12):
        for line in lines(world):
            line.cut = True
        world.run(world.rng.uniform(0.1, 2.5))
        for line in lines(world):
            line.cut = False
        world.run(world.rng.uniform(0.1, 4))


def one_is_parted(world: World) -> None:
    """The others go on with the store, it goes on alone, and it comes back."""
    for _ in range(3):
        line = world.rng.choice(world.proxies).line
        line.cut = True
        world.run(world.rng.uniform(0.4, 40))
        line.cut = False
        world.run(world.rng.uniform(0.1, 20))


def memory_flushed(world: World) -> None:
    for _ in range(6):
        world.store.flush()
        world.run(world.rng.uniform(0.01, 10))


def old_memory_loaded(world: World) -> None:
    """Started anew with what was saved a while ago."""
    for number in range(3):
        saved = world.store.snapshot()
        world.run(world.rng.uniform(1, 20))
        world.store.restart(saved, f"again{number}")
        world.run(world.rng.uniform(1, 10))


def copy_promoted(world: World) -> None:
    """A replica that lags becomes master; the proxies find it one after the other, and meanwhile both are masters."""
    for number in range(3):
        saved = world.store.snapshot()
        world.run(world.rng.uniform(0.1, 20))
        copy = world.new_store()
        copy.restart(saved, f"copy{number}")
        copy.ahead = world.store.ahead + world.rng.randint(-30, 30) * MS
        for proxy in world.proxies:
            proxy.line.store = copy
            world.run(world.rng.uniform(0.01, 15))
        world.store = copy
        world.run(5)


def clock_set(world: World) -> None:
    for step in (40 * SECOND, HOUR, -HOUR, -HOUR, 10 * SECOND, SECOND, -SECOND, HOUR):
        world.store.ahead += step
        world.run(world.rng.uniform(0.05, 12))


def clock_set_and_memory_flushed(world: World) -> None:
    """All replace the epoch at once."""
    for _ in range(4):
        world.store.ahead += world.rng.choice((HOUR, -HOUR))
        world.store.flush()
        world.run(world.rng.uniform(0.2, 8))


def replies_lost(world: World) -> None:
    """Carried out, and nobody knows."""
    for line in lines(world):
        line.lose_reply = 0.3
    world.run(60)
    for line in lines(world):
        line.lose_reply = 0.0


def requests_lost(world: World) -> None:
    for line in lines(world):
        line.lose_request = 0.3
    world.run(60)
    for line in lines(world):
        line.lose_request = 0.0


def calls_late(world: World) -> None:
    """A slow network, or a store that stops for seconds: what it carries out late was given up long before."""
    for most in (60, 150, 400, 3000):
        for line in lines(world):
            line.delay = (MS, most * MS)
        world.run(20)
    for line in lines(world):
        line.delay = (MS, 2 * MS)
    world.run(10)


def calls_held_up(world: World) -> None:
    """Again and again one proxy's calls are carried out when it has gone on alone."""
    line = world.proxies[0].line
    for _ in range(20):
        line.delay = (1_500 * MS, 1_600 * MS)
        world.run(2)
        line.delay = (MS, 2 * MS)
        world.run(1)


def proxies_killed(world: World) -> None:
    for _ in range(4):
        restart(world, world.rng.choice(world.proxies), world.rng.uniform(0.05, 10))
        world.run(world.rng.uniform(0.1, 10))


def proxies_killed_while_alone(world: World) -> None:
    for line in lines(world):
        line.cut = True
    world.run(20)
    for proxy in world.proxies:
        restart(world, proxy, world.rng.uniform(0.05, 3))
    world.run(world.rng.uniform(0.1, 20))
    for line in lines(world):
        line.cut = False
    world.run(20)


def everything(world: World) -> None:
    for _ in range(6):
        world.rng.choice(ACCIDENTS)(world)


def lines(world: World) -> list[Line]:
    return [proxy.line for proxy in world.proxies]


def restart(world: World, proxy: Proxy, down: float) -> None:
    proxy.kill()
    world.run(down)
    proxy.start()


ACCIDENTS: list[Accident] = [
    nothing,
    store_away,
    store_away_by_moments,
    one_is_parted,
    memory_flushed,
    old_memory_loaded,
    copy_promoted,
    clock_set,
    clock_set_and_memory_flushed,
    replies_lost,
    requests_lost,
    calls_late,
    calls_held_up,
    proxies_killed,
    proxies_killed_while_alone,
]
