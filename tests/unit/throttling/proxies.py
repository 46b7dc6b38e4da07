"""Several managers, one store or more, and networks between them that delay, lose and part: a small world in true time.

Nothing is real but the code under test: the managers, what they ask the store for, and the script there. Each proxy has
senders that always have a message (or so many as are said); each message that goes is told to the judge, `judge`, who
knows only true time, and shares no arithmetic with the program.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count

from proxy.policy.limits import Limits
from proxy.settings import Rate, ThrottleSettings
from proxy.throttling.cluster import Answer, Ask, Cluster
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.manager import Manager
from tests.unit.throttling.fake_store import SOURCE, FakeStore
from tests.unit.throttling.oracle import SECOND, check_windows

MS = 1_000_000
LEAVING, RECEIVER = "192.0.2.1", "198.51.100.1"


def block(*rates: Rate, places: int = 0, name: str = "yahoo") -> ThrottleSettings:
    return ThrottleSettings(
        name=name,
        source=(),
        destination=(),
        max_concurrent_connections=places,
        max_delivery_rate=rates,
        wait=None,
        scope="cluster",
    )


class Line:
    """A proxy's way to its store.

    Attributes:
        delay: the least and the most that a request or a reply takes. cut: nothing arrives any more.
        lose_request, lose_reply: parts of the calls.
    """

    def __init__(self, store: FakeStore) -> None:
        self.store = store
        self.delay = (MS // 10, 2 * MS)
        self.cut = False
        self.lose_request = self.lose_reply = 0.0


class Proxy:
    """One manager, its senders and its clock."""

    def __init__(self, world: World, name: str, line: Line, members: int, rules: Limits) -> None:
        self.world, self.name, self.line, self.members, self.rules = world, name, line, members, rules
        self.hungry = 20  # messages that wait at any time
        self.senders = 1
        self.sent: list[int] = []
        self.places: list[Places] = []
        self.waiting = 0  # for a place
        self.calls: list[int] = []
        self.alive = False
        self.life = 0
        self.drift = 0.0  # what its clock gains, as a part
        self.start()

    def clock(self, true: int) -> int:
        return true + int((true - 1_000 * SECOND) * self.drift)

    def start(self) -> None:
        self.life += 1
        self.alive = True
        world = self.world
        run = f"{world.rng.randrange(16**8):08x}"
        now = self.clock(world.now)
        self.cluster = Cluster(self.name, run, self.members, lambda: f"{world.rng.randrange(16**16):016x}", now)
        self.manager = Manager(self.life, now, blocks=self.rules, cluster=self.cluster)
        self.asked = 0
        self.places = []
        self.waiting = 0
        life = self.life
        world.at(world.now + world.rng.randrange(60 * MS), lambda: self._tick(life))
        self.feed()
        self.arm()

    def kill(self) -> None:
        self.alive = False
        self.places = []  # the sockets of a process end with it

    # --- its senders ---

    def feed(self) -> None:
        if not self.alive or not any(block.max_delivery_rate for block in self.rules.blocks.values()):
            return
        while self.asked < self.hungry:
            for owner in range(self.senders):
                ticket = self.manager.ask_message(f"mta{owner}", 1.0, LEAVING, RECEIVER, (), self.clock(self.world.now))
                assert ticket is not None
                self.asked += 1
        self.collect()

    def collect(self) -> None:
        while granted := self.manager.take_granted():
            for _ in granted:
                self.sent.append(self.world.now)
                self.asked -= 1
            if self.asked < self.hungry:
                self.feed()
        self._seat(self.manager.take_admitted())

    def arm(self) -> None:
        due = self.manager.next_wakeup()
        life = self.life
        if due is not None:
            true = self.world.now + max(50_000, int((due - self.clock(self.world.now)) / (1 + self.drift)) + 1)
            if self.world.wake(self, true):
                self.world.at(true, lambda: self._advance(life))

    def _advance(self, life: int) -> None:
        self.world.woken(self)
        if self.alive and life == self.life:
            self.manager.advance(self.clock(self.world.now))
            self.collect()
            self.arm()

    # --- places ---

    def open(self) -> None:
        """A connection more, if nobody waits for one."""
        if not self.alive or self.waiting:
            return
        answer = self.manager.admit("mta", 1.0, LEAVING, RECEIVER, (), self.clock(self.world.now), False)
        if isinstance(answer, Places):
            self.places.append(answer)
        else:
            self.waiting = 1
        self.collect()

    def close(self) -> None:
        """One that is open, whichever."""
        if self.alive and self.places:
            number = self.world.rng.randrange(len(self.places))
            self._seat(self.manager.release(self.places.pop(number), self.clock(self.world.now)))

    def _seat(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            if ticket.places is not None:
                self.waiting = 0
                self.places.append(ticket.places)
        self.world.most_open = max(self.world.most_open, sum(len(proxy.places) for proxy in self.world.proxies))

    # --- the store ---

    def _tick(self, life: int) -> None:
        if not self.alive or life != self.life:
            return
        now = self.clock(self.world.now)
        if now < self.cluster.due(now):
            self.world.at(self.world.now + 20 * MS, lambda: self._tick(life))
            return
        line, store, world = self.line, self.line.store, self.world
        self.calls.append(world.now)
        asks = self.manager.ask_store(now, lambda key: "" if line.cut else store.identity)
        self.collect()
        rng = world.rng
        timeout = world.now + 100 * MS
        answered = [False]

        def give_up() -> None:
            if not answered[0]:
                answered[0] = True
                self._answered(life, asks, [Answer(None)] * len(asks), now)

        def execute() -> None:
            if line.cut or line.store is not store:
                return
            identity = store.identity
            values = [store.run(ask.keys, ask.arguments) for ask in asks]
            if rng.random() >= line.lose_reply:
                world.at(world.now + rng.randint(*line.delay), lambda: receive(values, identity))

        def receive(values: list[object], identity: str) -> None:
            if not answered[0] and not line.cut:
                answered[0] = True
                received = self.clock(world.now)
                self._answered(life, asks, [Answer(value, received, identity) for value in values], now)

        world.at(timeout, give_up)
        if not line.cut and rng.random() >= line.lose_request:
            world.at(world.now + rng.randint(*line.delay), execute)

    def _answered(self, life: int, asks: Sequence[Ask], answers: Sequence[Answer], sent: int) -> None:
        if not self.alive or life != self.life:
            return
        self.manager.store_answered(asks, answers, sent, self.clock(self.world.now))
        self.collect()
        self.arm()
        self._tick(life)


class World:
    """True time, the stores and the proxies."""

    def __init__(
        self, seed: int, blocks: Sequence[ThrottleSettings], proxies: int = 2, members: int = 0, source: str = SOURCE
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 1_000 * SECOND
        self.most_open = 0
        self.proxies: list[Proxy] = []
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._wakes: dict[Proxy, int] = {}
        self.source = source
        self.store = self.new_store()
        self.rules = Limits(blocks)
        self.members = members or proxies
        self.proxies += [
            Proxy(self, f"proxy{number}", Line(self.store), self.members, self.rules) for number in range(proxies)
        ]

    def new_store(self) -> FakeStore:
        return FakeStore(lambda: self.now, self.source)

    def at(self, when: int, what: Callable[[], None]) -> None:
        heappush(self._events, (max(when, self.now), next(self._order), what))

    def wake(self, proxy: Proxy, when: int) -> bool:
        if self._wakes.get(proxy, when + 1) <= when:
            return False
        self._wakes[proxy] = when
        return True

    def woken(self, proxy: Proxy) -> None:
        self._wakes.pop(proxy, None)

    def run(self, seconds: float) -> None:
        end = self.now + int(seconds * SECOND)
        while self._events and self._events[0][0] <= end:
            self.now, _, what = heappop(self._events)
            what()
        self.now = end

    # --- the judge ---

    def sent(self, since: int = 0) -> list[int]:
        return sorted(at for proxy in self.proxies for at in proxy.sent if at >= since)

    def judge(self, amount: int, seconds: int, latest: int | None = None) -> None:
        """No window holds more than the limit; `latest`: of a nominal one, what it may hold."""
        check_windows(self.sent(), seconds * SECOND, latest if latest is not None else amount)

    def counts(self, since: int = 0) -> Counter[str]:
        return Counter({proxy.name: sum(at >= since for at in proxy.sent) for proxy in self.proxies})


def jain(counts: Sequence[int]) -> float:
    """Jain's index of fairness: 1 when all are equal."""
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))
