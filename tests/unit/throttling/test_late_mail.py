"""A link between an MTA and the proxy that stalls, and what the receiver sees: the bound holds at the receiver.

The MTA keeps every rule: it has a permit for each message and looks at it right before MAIL. What it has written then
stands in the link, and arrives at once when the link goes on. Pure, in virtual time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

import pytest

from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Places
from proxy.throttling.lease import Demand, Lease
from proxy.throttling.limits import Part
from proxy.throttling.manager import Manager
from proxy.throttling.session import Output
from proxy.throttling.throttle import SECOND, Key, Limit
from tests.unit.throttling.oracle import check_windows

MS = 1_000_000
DELAY = 2 * MS
SOURCE, MX = "192.0.2.1", "198.51.100.1"


class Link:
    """One direction of a connection: in order, and when it is frozen not before it thaws."""

    def __init__(self) -> None:
        self.frozen_until = 0
        self._last = 0

    def arrival(self, now: int) -> int:
        self._last = max(self._last, now + DELAY, self.frozen_until)
        return self._last


class World:
    """One proxy and MTAs with more mail than the limit, each message on a connection of its own.

    Args:
        gate: whether the proxy holds a MAIL that comes too late.
    """

    def __init__(self, limit: Limit, mtas: int = 1, gate: bool = True) -> None:
        self.now = 100_000 * SECOND
        self.begin = self.now
        self.manager = Manager(1, self.now - 50_000 * SECOND)
        self.gate = gate
        self.sent: list[int] = []
        self.waiting: dict[MessageTicket, None] = {}
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self.mtas = [Mta(self, f"mta{index}", limit) for index in range(mtas)]

    def at(self, when: int, what: Callable[[], None]) -> None:
        heappush(self._events, (max(when, self.now), next(self._order), what))

    def run(self, seconds: float) -> None:
        end = self.now + int(seconds * SECOND)
        while True:
            due = self._events[0][0] if self._events else end + 1
            wake = self.manager.next_wakeup()
            if wake is not None and wake <= min(due, end):
                self.now = max(self.now, wake)
                self.manager.advance(self.now)
            elif due <= end:
                self.now, _, what = heappop(self._events)
                what()
            else:
                break
            self.settle()
        self.now = end

    def settle(self) -> None:
        for session in self.manager.take_ready():
            output = self.manager.take(session, self.now)
            mta = next(each for each in self.mtas if each.session is session)
            self.at(mta.down.arrival(self.now), lambda mta=mta, output=output: mta.hear(output))  # type: ignore[misc]
        for ticket in self.manager.take_granted():
            if ticket in self.waiting:
                del self.waiting[ticket]
                self.sent.append(self.now)

    def mail(self, places: Places) -> None:
        """A MAIL arrives at the proxy."""
        late = self.manager.mail(places, self.now).late
        ticket = None
        if late and self.gate:
            ticket = self.manager.ask_message(places.owner, 1.0, SOURCE, MX, late, self.now)
        if ticket is None:
            self.sent.append(self.now)
        else:
            self.waiting[ticket] = None
        self.settle()

    def worst(self, window: int) -> int:
        return max(bisect_left(self.sent, at + window) - index for index, at in enumerate(self.sent))


class Mta:
    """Keeps its permits in a `Lease`, pings each second, and writes a MAIL as soon as a permit allows it."""

    def __init__(self, world: World, name: str, limit: Limit) -> None:
        self.world = world
        self.up, self.down, self.channels = Link(), Link(), Link()
        self.lease, self.demand = Lease(), Demand()
        manager, now = world.manager, world.now
        self.session = manager.hello(name, b"run", name, 1.0, now)
        manager.ping(self.session, now // 1000, now)
        manager.register(self.session, 0, [(Key(SOURCE, "rule"), Part((limit,)))], now)
        places = manager.admit(name, 1.0, SOURCE, MX, manager.flows(self.session, (0,)), now)
        assert isinstance(places, Places)
        self.places = places
        self.ping()

    def tell(self, what: Callable[[], None]) -> None:
        self.world.at(self.up.arrival(self.world.now), what)

    def ping(self) -> None:
        world, t = self.world, self.world.now // 1000
        self.tell(lambda: world.manager.ping(self.session, t, world.now))
        world.at(world.now + SECOND, self.ping)

    def hear(self, output: Output) -> None:
        world = self.world
        if output.ping is not None:
            t = output.ping
            self.tell(lambda: world.manager.pong(self.session, t, 0, world.now))
        for limit in output.limits:
            self.lease.slack_us = limit.slack_us
        for grant in output.grants:
            self.lease.granted(
                grant.n, grant.first_offset_us, grant.step_us, output.ping_t, output.hold_us, world.now, world.now
            )
        self.work()

    def work(self) -> None:
        world, now = self.world, self.world.now
        while (permit := self.lease.take(now)) is not None:
            assert permit.usable(now)
            world.at(self.channels.arrival(now), lambda: world.mail(self.places))
        due = self.lease.next_at(now)
        if due is not None:
            world.at(due, self.work)
        want, got = max(0, 1000 - self.lease.at_hand(now)), self.lease.got
        if (at := self.demand.due_at(want, got, now)) is not None and at <= now:
            self.demand.sent(want, got, now)
            self.tell(lambda: world.manager.demand(self.session, 0, want, got % 2**32, 0, 0, 0, world.now))


#: Limit, seconds for which the link is frozen, whether all of it (then the permits stop, too) or only the channels, and
#: what the receiver would see, at the least, if nothing were held.
STALLS = [
    (Limit(600, 60), 3.0, "all", 0),
    (Limit(600, 60), 3.0, "channels", 616),
    (Limit(600, 60), 10.0, "channels", 690),
    (Limit(60, 60), 30.0, "channels", 85),
    (Limit(1200, 60, 10), 4.0, "channels", 1250),
]


@pytest.mark.parametrize(("limit", "seconds", "what", "without"), STALLS)
@pytest.mark.parametrize("mtas", [1, 3])
def test_a_stalled_link_releases_no_burst_at_the_receiver(
    limit: Limit, seconds: float, what: str, without: int, mtas: int
) -> None:
    for gate in (True, False):
        world = World(limit, mtas, gate)
        world.run(61 if limit.amount < 1000 else 33)
        for mta in world.mtas:
            for link in (mta.channels, mta.up, mta.down) if what == "all" else (mta.channels,):
                link.frozen_until = world.now + int(seconds * SECOND)
        world.run(130)
        worst = world.worst(60 * SECOND)
        if gate:
            check_windows(world.sent, 60 * SECOND, limit.amount)
            assert worst >= 0.99 * (limit.amount - limit.burst + 1), "and what can be used is"
            assert not world.manager.unpermitted
        else:
            assert worst >= without, "this link does not stall, or the test sees nothing"


def test_what_waits_behind_a_stall_comes_in_fair_order_and_all_of_it() -> None:
    """One of two MTAs stalls for ten seconds: its late messages take turns with the other's permits."""
    world = World(Limit(600, 60), 2)
    world.run(61)
    world.mtas[0].channels.frozen_until = world.now + 10 * SECOND
    world.run(11)
    behind = len(world.waiting)
    assert behind > 40
    before = world.mtas[1].lease.got
    world.run(10)
    other = world.mtas[1].lease.got - before
    assert other == pytest.approx(50, abs=4), "as if nobody had been late"
    world.run(60)
    check_windows(world.sent, 60 * SECOND, 600)


def test_a_little_jitter_costs_nothing() -> None:
    world = World(Limit(600, 60))
    for _ in range(100):
        world.mtas[0].channels.frozen_until = world.now + 20 * MS
        world.run(0.5)
    assert world.manager._audit.late == 0
    check_windows(world.sent, 60 * SECOND, 600)
