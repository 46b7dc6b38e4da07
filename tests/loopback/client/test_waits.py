"""Every wait of the library, with others who wait beside and give up at each point: nobody is left asleep.

In virtual time (`stage`): the same threads, the same moments, each time.
"""

from __future__ import annotations

import pytest

from greenarrow_proxy_client import (
    Limits,
    ProxyUnavailable,
    ThrottleRejected,
    ThrottleTimeout,
    control,
    dialogue,
    proxies,
    throttle,
)
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from tests.loopback.client.stage import MS, Stage

INCARNATION = 7
SLACK = 100 * MS
#: A permit arrives this long before it may be used.
AHEAD = 30 * MS


class Proxy:
    """What the dialogue takes for the session's connection: notes what is said, answers when the test lets it."""

    def __init__(self, stage: Stage, paced: int = 0) -> None:
        self.stage = stage
        self.said: list[m.Message] = []
        self.granted = 0
        self.paced = paced
        self._next = 0

    def listen(self, listener: dialogue.Dialogue) -> None:
        self.listener = listener

    def send(self, message: m.Message) -> bool:
        self.said.append(message)
        return True

    @property
    def wants(self) -> list[tuple[int, int]]:
        return [(r.want, r.got_cum) for message in self.said if isinstance(message, s.Demand) for r in message.records]

    def bind(self, path: throttle.Throttle) -> None:
        limit = s.PathLimit(path.id, [s.Effective([s.Rate(1000, 3600, 1)], 20)], SLACK // 1000)
        self.hear(s.Limit(INCARNATION, [limit]))

    def grant(self, path: throttle.Throttle, n: int = 1) -> None:
        self.granted += n
        now_us = self.stage.now // 1000
        self.hear(s.Grant(INCARNATION, now_us, 0, [s.SlotGrant(path.id, n, AHEAD // 1000, 0)]))

    def hear(self, message: m.Message) -> None:
        self.stage.start(lambda: self.listener.received(message, self.stage.now // 1000))

    def serve(self, path: throttle.Throttle, until: int) -> None:
        """One permit each `paced`, as long as one is wanted."""
        while self.stage.now < until:
            self.stage.run_until(min(until, self.stage.now + 5 * MS))
            wanted = self.wants[-1] if self.wants else (0, 0)
            if self.stage.now >= self._next and wanted[0] > self.granted - wanted[1]:
                self._next = self.stage.now + self.paced
                self.grant(path)


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stage = Stage()
        for module in (throttle, dialogue):
            monkeypatch.setattr(module, "threading", self.stage.threading)
            monkeypatch.setattr(module, "clock_ns", lambda: self.stage.now)
        self.proxy = Proxy(self.stage, paced=40 * MS)
        self.dialogue = dialogue.Dialogue(self.proxy)  # type: ignore[arg-type]
        welcome = m.Welcome(b"", INCARNATION)
        self.stage.start(lambda: self.dialogue.connected(welcome))
        self.path = self.dialogue.throttle("192.0.2.1", [Limits("yahoo", ((1000, 3600),))])
        self.begin = self.stage.now

    def waits(self, timeout: float | None = None):
        return self.stage.start(lambda: self.path.acquire(timeout))

    def at(self, milliseconds: float) -> int:
        return self.begin + int(milliseconds * MS)

    def run(self, milliseconds: float) -> None:
        self.stage.run_until(self.at(milliseconds))


@pytest.fixture
def world(monkeypatch):
    world = World(monkeypatch)
    yield world
    world.stage.start(world.dialogue.stop)
    world.stage.settle()


#: The first permit arrives at 20 ms and may be used from 50 ms to 150 ms.
POINTS = [0, 10, 20, 35, 49.999, 50, 51, 149, 150, 151, 300]


@pytest.mark.parametrize("others", [1, 2, 3])
@pytest.mark.parametrize("how", ["times out", "is interrupted"])
@pytest.mark.parametrize("leaves", POINTS)
def test_one_who_gives_up_takes_nobody_with_it(world, leaves, how, others):
    """The first of several who wait leaves at each point of a permit's life; all the others get theirs."""
    world.proxy.bind(world.path)
    first = world.waits(leaves / 1000 if how == "times out" else None)
    rest = [world.waits() for _ in range(others)]
    world.run(20)
    world.proxy.grant(world.path)
    world.run(leaves)
    if how == "is interrupted" and first.result is None:
        world.stage.interrupt(first.thread, InterruptedError())
    world.run(max(leaves, 51))
    assert len([each for each in [first, *rest] if each.result is not None]) == 1, "the permit at hand is used"
    world.proxy.serve(world.path, world.at(2000))
    assert first.result is not None or isinstance(first.error, ThrottleTimeout | InterruptedError)
    assert [each.error for each in rest] == [None] * others
    assert all(each.result is not None for each in rest), "somebody sleeps for ever"


def test_all_give_up_but_the_last(world):
    world.proxy.bind(world.path)
    leaving = [world.waits(at / 1000) for at in POINTS]
    last = world.waits()
    world.run(20)
    world.proxy.grant(world.path)
    world.proxy.serve(world.path, world.at(5000))
    assert last.result is not None
    assert all(each.result is not None or isinstance(each.error, ThrottleTimeout) for each in leaving)


def test_a_permit_that_nobody_came_for_is_no_permit_at_hand(world):
    """It lapses, and another one is asked for, though no thread of the MTA looks."""
    world.proxy.bind(world.path)
    world.path.backlog(ram=1)
    world.run(20)
    assert world.proxy.wants == [(1, 0)]
    world.proxy.grant(world.path)
    world.run(149)
    assert world.proxy.wants == [(1, 0)]
    world.run(155)
    assert world.proxy.wants == [(1, 0), (1, 1)]


def test_permits_that_come_together_wake_as_many(world):
    world.proxy.bind(world.path)
    waiting = [world.waits() for _ in range(5)]
    world.proxy.grant(world.path, 3)
    world.run(60)
    assert sum(each.result is not None for each in waiting) == 3


@pytest.mark.parametrize("leaves", [0, 10, 20, 30])
def test_registered_rejected_or_closed_all_hear_of_it(world, leaves):
    for outcome in ("bound", "rejected", "closed"):
        path = world.dialogue.throttle("192.0.2.1", [Limits(f"{outcome}{leaves}")])
        impatient = world.stage.start(lambda path=path: path.wait_until_registered(leaves / 1000))
        waiting = [world.stage.start(lambda path=path: path.wait_until_registered()) for _ in range(2)]
        acquiring = world.stage.start(lambda path=path: path.acquire())
        world.stage.run_until(world.stage.now + 20 * MS)
        if outcome == "bound":
            world.proxy.bind(path)
            assert [each.result for each in waiting] == [True, True]
        elif outcome == "rejected":
            world.proxy.hear(s.Limit(INCARNATION, [s.PathLimit(path.id, [], warning="no")]))
            assert all(isinstance(each.error, ThrottleRejected) for each in [*waiting, acquiring])
        else:
            world.stage.start(world.dialogue.stop)
            world.stage.settle()
            assert all(isinstance(each.error, ProxyUnavailable) for each in [*waiting, acquiring])
        world.stage.run_until(world.stage.now + 50 * MS)
        assert impatient.result is not None or impatient.error is not None


def test_waiting_for_a_session_that_will_not_come_ends(monkeypatch):
    """Closed, or rejected for good: whoever waits without a limit hears so, and so does who asks later."""
    stage = Stage()
    monkeypatch.setattr(proxies, "threading", stage.threading)
    monkeypatch.setattr(control.Control, "start", lambda self: None)
    account = type("Account", (), {"instance": "mta"})()
    one = proxies.Proxies([account], 0, 5.0)  # type: ignore[list-item]
    waiting = [stage.start(lambda: one.wait_until_up(None)) for _ in range(2)]
    impatient = stage.start(lambda: one.wait_until_up(0.01))
    stage.run_until(stage.now + 20 * MS)
    assert impatient.result is False
    assert [each.result for each in waiting] == [None, None]

    stage.start(lambda: one.all[0].failed(ConnectionResetError("for good"), None))
    stage.settle()
    assert [each.result for each in waiting] == [False, False]
    assert stage.start(lambda: one.wait_until_up(None)).result is False
