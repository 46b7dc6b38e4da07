"""The throttle core in a simulated network, with time, faults and a naughty client, judged by the slot-level oracle.

Short here; `THROTTLE_SOAK_PERMITS=1000000 pytest -m slow tests/unit/throttling/test_world.py` is the long run.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from proxy.throttling.limits import Part
from proxy.throttling.throttle import SECOND, Key
from tests.unit.throttling.simulation import (
    LIMITS,
    MS,
    PATHS,
    SOURCE,
    Client,
    World,
    act,
    make_world,
    moody_soak,
    nobody_is_forgotten,
    soak,
)

CLIENTS = st.integers(0, 4)
PATH = st.sampled_from(list(PATHS))


class ThrottleMachine(RuleBasedStateMachine):
    """What may happen, in any order; the oracle looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World = make_world(random.Random(0))

    def client(self, index: int) -> Client:
        return self.world.clients[index]

    @rule(index=CLIENTS)
    def connect(self, index: int) -> None:
        self.world.connect(self.client(index))

    @rule(index=CLIENTS, path=PATH, messages=st.sampled_from((1, 7, 300)))
    def mail(self, index: int, path: str, messages: int) -> None:
        if self.client(index).link is None:
            self.world.connect(self.client(index))
        self.world.mail(self.client(index), path, messages)

    @rule(index=CLIENTS, path=PATH)
    def flush(self, index: int, path: str) -> None:
        self.world.flush(self.client(index), path)

    @rule(path=PATH)
    def lie(self, path: str) -> None:
        self.world.lie(self.client(4), path)

    @rule(index=CLIENTS, span=st.sampled_from((20 * MS, 600 * MS, 10 * SECOND)))
    def stop(self, index: int, span: int) -> None:
        self.world.stop(self.client(index), span)

    @rule(index=CLIENTS, span=st.sampled_from((20 * MS, 600 * MS, 6 * SECOND)))
    def stall(self, index: int, span: int) -> None:
        self.world.stall(self.client(index), span)

    @rule(index=CLIENTS)
    def cut(self, index: int) -> None:
        self.world.cut(self.client(index))

    @rule(index=CLIENTS)
    def restart_client(self, index: int) -> None:
        self.world.restart_client(self.client(index))

    @rule(down=st.sampled_from((20 * MS, 2 * SECOND, 3600 * SECOND)))
    def restart_manager(self, down: int) -> None:
        self.world.kill_manager(down)
        self.world.run_for(down)

    @rule(index=CLIENTS)
    def bye(self, index: int) -> None:
        client = self.client(index)
        if client.link is not None:
            self.world.up(client, lambda manager, session: manager.bye(session, self.world.now))

    @rule(index=CLIENTS, paused=st.booleans())
    def pause_fast(self, index: int, paused: bool) -> None:
        parts = [(Key(SOURCE, "fast"), Part(LIMITS["fast"], paused=paused))]
        id = list(PATHS).index("fast")
        self.world.up(self.client(index), lambda manager, session: manager.register(session, id, parts, self.world.now))

    @rule(index=CLIENTS, seed=st.integers(0, 1000))
    def change_mind(self, index: int, seed: int) -> None:
        self.world.rng.seed(seed)
        self.world.change_mind(self.client(index), "moody")
        self.world.mail(self.client(index), "moody", 200)

    @rule(span=st.sampled_from((0, MS, 40 * MS, 700 * MS, 15 * SECOND)))
    def wait(self, span: int) -> None:
        self.world.run_for(span)

    @invariant()
    def figures_are_sums(self) -> None:
        manager = self.world.manager
        for session in manager.sessions.values() if manager is not None else ():
            figures = session.figures(self.world.now)
            assert min(figures[1:]) >= 0
            assert figures.ram == sum(entry >> 64 for entry in session.backlogs.values())

    @invariant()
    def nobody_is_forgotten(self) -> None:
        if self.world.manager is not None:
            nobody_is_forgotten(self.world.manager, self.world.now)

    def teardown(self) -> None:
        self.world.run_for(3 * SECOND)
        self.world.oracle.finish()


ThrottleMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("THROTTLE_EXAMPLES", "60")),
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
TestThrottleMachine = ThrottleMachine.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_random_worlds(seed: int) -> None:
    world = soak(seed, 400)
    assert len(world.oracle.uses) > 500


@pytest.mark.parametrize("seed", range(8))
def test_limits_that_change_all_the_time(seed: int) -> None:
    assert len(moody_soak(seed, 60).oracle.uses) > 200


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak() -> None:
    """At least a million permits (or as many as THROTTLE_SOAK_PERMITS says)."""
    wanted = int(os.environ.get("THROTTLE_SOAK_PERMITS", "1000000"))
    seed = granted = 0
    while granted < wanted:
        seed += 1
        granted += len(soak(10_000 + seed, 1000).oracle.granted)


def saturated(seed: int, seconds: int, clients: list[Client], path: str) -> World:
    """All clients have more mail than the path lets through, on a network without faults."""
    world = World(random.Random(seed))
    world.dawdling = False
    world.clients = clients
    world.run_for(120 * SECOND)  # what a restart costs is over
    for client in clients:
        world.connect(client)
        world.mail(client, path, 10**6)
    world.run_for(seconds * SECOND)
    world.oracle.finish()
    return world


def near(count: int) -> list[Client]:
    return [Client(f"mta{index}", index * SECOND, (MS // 10, MS)) for index in range(count)]


@pytest.mark.parametrize(
    ("path", "seconds", "ceiling"),
    [
        ("fast", 60, 150 * 60),
        # strict: (L-B+1)/L * W/(W+d) of the limit, d = 250 ms
        ("minute", 600, 1200 * 60 / 60.25),
    ],
)
def test_utilisation_under_demand(path: str, seconds: int, ceiling: float) -> None:
    world = saturated(1, seconds, near(3), path)
    assert len(world.oracle.uses) >= ceiling * 0.995


def test_shares_are_equal_within_every_second() -> None:
    """Jain's index of five saturated sessions over each second."""
    world = World(random.Random(2))
    world.dawdling = False
    world.clients = near(5)
    for client in world.clients:
        world.connect(client)
        world.mail(client, "fast", 10**6)
    world.run_for(3 * SECOND)
    for _ in range(5):
        before = [client.sent for client in world.clients]
        world.run_for(SECOND)
        shares = [client.sent - old for client, old in zip(world.clients, before, strict=True)]
        assert sum(shares) ** 2 / (5 * sum(share * share for share in shares)) >= 0.999


def test_a_session_200_ms_away_gets_its_share() -> None:
    clients = near(1)
    clients.append(Client("far", 7 * SECOND, (99 * MS, 101 * MS)))
    saturated(3, 60, clients, "fast")
    total = sum(client.sent for client in clients)
    assert clients[1].sent >= 0.99 * total / 2


@pytest.mark.parametrize(("path", "seconds"), [("fast", 60), ("minute", 900)])
@pytest.mark.parametrize("fault", ["far", "hung"])
def test_what_one_cannot_use_the_others_get(path: str, seconds: int, fault: str) -> None:
    """600 ms away, or with senders that hang: it was half of the limit for ever. And it comes back when it is well."""
    clients = near(2)
    ill = clients[1]
    ill.hung, ill.delay = fault == "hung", ((300 * MS, 301 * MS) if fault == "far" else ill.delay)
    world = saturated(9, seconds // 3, clients, path)  # until it is known
    sent = clients[0].sent
    world.run_for(seconds * SECOND)
    (limit,) = LIMITS[path]
    full = limit.amount * seconds / limit.seconds
    assert clients[0].sent - sent >= 0.95 * full
    ill.hung, ill.delay = False, (MS // 10, MS)
    world.run_for(seconds * SECOND)
    before = [client.sent for client in clients]
    world.run_for(seconds * SECOND)
    gained = [client.sent - old for client, old in zip(clients, before, strict=True)]
    assert min(gained) >= 0.95 * sum(gained) / 2
    assert sum(gained) >= 0.98 * full
    world.oracle.finish()


def test_a_trickle_beside_a_backlog_does_not_wait() -> None:
    """2 messages/s beside 10**6 waiting: equal weights, the backlog is a cap and no weight."""
    clients = near(2)
    world = World(random.Random(4))
    world.dawdling = False
    world.clients = clients
    world.run_for(SECOND)
    for client in clients:
        world.connect(client)
    world.mail(clients[0], "fast", 10**6)
    world.run_for(2 * SECOND)
    waited = []
    for _ in range(20):
        world.mail(clients[1], "fast", 1)
        sent, start = clients[1].sent, world.now
        while clients[1].sent == sent:
            world.run_for(MS)
        waited.append(world.now - start)
        world.run_for(500 * MS)
    assert sorted(waited)[10] <= 50 * MS
    assert max(waited) <= 100 * MS


def test_a_new_backlog_is_served_soon() -> None:
    clients = near(6)
    world = saturated(5, 5, clients[:5], "fast")
    world.clients = clients
    world.connect(clients[5])
    world.run_for(SECOND)
    world.mail(clients[5], "fast", 10**6)
    start = world.now
    while not clients[5].sent:
        world.run_for(MS)
    assert world.now - start <= 100 * MS
    world.run_for(start + 250 * MS - world.now)
    others = [client.sent for client in clients]
    world.run_for(SECOND)
    gained = [client.sent - old for client, old in zip(clients, others, strict=True)]
    assert max(gained) - min(gained) <= 3


def test_a_stopped_mta_uses_no_stale_permit() -> None:
    """SIGSTOP for 10 s in the middle of sending: the oracle sees each use, and sending goes on after it."""
    clients = near(1)
    world = saturated(6, 5, clients, "fast")
    world.stop(clients[0], 10 * SECOND)
    before = clients[0].sent
    world.run_for(10 * SECOND)
    assert clients[0].sent == before
    world.run_for(5 * SECOND)
    assert clients[0].sent > before + 100
    world.oracle.finish()


@pytest.mark.parametrize("blip", [50 * MS, 3 * SECOND])
def test_a_blip_within_and_past_the_slack(blip: int) -> None:
    clients = near(2)
    world = saturated(7, 5, clients, "fast")
    world.stall(clients[0], blip)
    before = clients[0].sent
    world.run_for(blip + 2 * SECOND)
    assert clients[0].sent > before
    world.oracle.finish()


@pytest.mark.parametrize("down", [20 * MS, 2 * SECOND, 3600 * SECOND])
def test_the_manager_dies_in_a_burst(down: int) -> None:
    rng = random.Random(8)
    world = make_world(rng)
    for client in world.clients:
        world.connect(client)
        for path in PATHS:
            world.mail(client, path, 500)
    world.run_for(2 * SECOND)
    world.kill_manager(down)
    world.run_for(down)
    for client in world.clients:
        world.connect(client)
    world.run_for(5 * SECOND)
    for _ in range(30):
        act(world, rng, restarts=False)
    world.oracle.finish()
