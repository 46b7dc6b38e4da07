"""Message slots that the proxy takes itself: in fair order with everybody's, at their time, and never for nobody."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from proxy.policy.limits import Limits
from proxy.settings import Rate, ThrottleSettings
from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Flow, Places, Ticket
from proxy.throttling.limits import Part
from proxy.throttling.session import Session
from proxy.throttling.throttle import MILLISECOND, SECOND, Key, Limit
from tests.unit.throttling.benches import ALL, KEY, SOURCE, Bench, part
from tests.unit.throttling.oracle import check_windows

MX = "67.195.204.7"
PACE = SECOND // 10


def block(amount: int, seconds: int = 1, name: str = "slow", connections: int = 0) -> ThrottleSettings:
    """`amount` in `seconds`; 0: no rate."""
    return ThrottleSettings(
        name=name,
        source=(),
        destination=(),
        max_concurrent_connections=connections,
        max_delivery_rate=(Rate(amount, seconds),) if amount else (),
        wait=20.0,
    )


class Counters(Bench):
    """A bench where messages are asked for; `uses`: (name, when) of each slot that was used by the proxy."""

    def __init__(self, *blocks: ThrottleSettings) -> None:
        super().__init__()
        self.uses: list[tuple[str, int]] = []
        self.granted: list[MessageTicket] = []
        self.manager.reload(False, Limits(blocks), self.now)

    def ask(self, name: str, *flows: Flow, weight: float = 1.0) -> MessageTicket | None:
        ticket = self.manager.ask_message(name, weight, SOURCE, MX, flows, self.now)
        self.collect()
        return ticket

    def waiting(self, name: str, *flows: Flow, weight: float = 1.0) -> MessageTicket:
        ticket = self.ask(name, *flows, weight=weight)
        assert ticket is not None
        assert not ticket.granted
        return ticket

    def collect(self) -> dict:  # type: ignore[type-arg]
        for ticket in self.manager.take_granted():
            self.granted.append(ticket)
            self.uses.append((ticket.clerk.name, self.now))
        return super().collect()

    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.uses)

    def joined(self, name: str, *limits: Limit, key: Key = KEY, weight: float = 1.0) -> tuple[Session, Flow]:
        session = self.session(name, weight)
        self.register(session, (key, part(*limits)))
        self.collect()
        return session, session.flows[0]

    def empty(self) -> bool:
        """Nothing is remembered of anybody who asked."""
        desk = self.manager._desk
        return not desk.clerks and not len(desk.wheel)


def test_without_a_limit_nothing_is_asked() -> None:
    assert Counters().ask("a") is None
    assert Counters(block(0, connections=5)).ask("a") is None
    bench = Counters()
    _, flow = bench.joined("a")
    assert bench.ask("a", flow) is None


def test_an_idle_throttle_gives_at_once_and_then_at_its_pace() -> None:
    bench = Counters(block(10))
    first = bench.ask("a")
    assert first is not None
    assert first.granted
    begin = bench.now
    for _ in range(100):
        bench.waiting("a")
    bench.run(10 * SECOND + 10 * MILLISECOND)
    assert len(bench.uses) >= 100
    times = [at for _, at in bench.uses]
    assert all(later - earlier >= PACE for earlier, later in pairwise(times))
    assert times[1] <= begin + PACE + MILLISECOND


def test_under_a_registered_throttle_a_slot_is_kept_until_its_time() -> None:
    """It is given out ahead, as to sessions, and used neither early nor, with a fine wheel, much later."""
    bench = Counters()
    _, flow = bench.joined("a", Limit(10, 1))
    bench.ask("a", flow)
    bench.waiting("a", flow)
    begin = bench.now
    bench.run(PACE - 1)
    assert len(bench.uses) == 1
    bench.run(2 * MILLISECOND)
    assert [at - begin for _, at in bench.uses[1:]] == [PACE]


def test_instances_take_turns_whatever_the_others_have_waiting() -> None:
    bench = Counters(block(10))
    for _ in range(50):
        bench.ask("a")
    for _ in range(3):
        bench.waiting("b")
    bench.run(SECOND)
    assert [name for name, _ in bench.uses[1:7]].count("b") == 3


def test_weights_hold() -> None:
    bench = Counters(block(100))
    for _ in range(400):
        bench.ask("a", weight=3.0)
        bench.ask("b")
    bench.run(2 * SECOND)
    counts = bench.counts()
    assert counts["a"] == pytest.approx(3 * counts["b"], abs=6)


def test_sessions_and_the_desk_stand_in_the_same_queue() -> None:
    """`a` sends by its session and through the proxy; both together have what `b`'s session has."""
    bench = Counters()
    first, flow = bench.joined("a", Limit(100, 1))
    second, _ = bench.joined("b", Limit(100, 1))
    bench.want(first, 10_000)
    bench.want(second, 10_000)
    for _ in range(1_000):
        bench.ask("a", flow)
    bench.run(10 * SECOND)
    alone, own = bench.got[second], bench.got[first]
    desk = bench.counts()["a"]
    assert alone + own + desk == pytest.approx(1_000, abs=10)
    assert own + desk == pytest.approx(alone, abs=5)
    assert desk > 100


def test_who_has_no_session_shares_with_those_who_have() -> None:
    bench = Counters()
    session, flow = bench.joined("a", Limit(100, 1))
    bench.want(session, 10_000)
    for _ in range(1_000):
        bench.ask("b", flow)
    bench.run(4 * SECOND)
    assert bench.counts()["b"] == pytest.approx(bench.got[session], abs=6), "its permits come 30 ms ahead"


def test_several_paths_are_passed_together() -> None:
    bench = Counters()
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(50, 1))), (ALL, part(Limit(10, 1))), id=0)
    bench.register(session, (Key(SOURCE, "third"), part(Limit(5, 1))), id=1)
    flows = (session.flows[0], session.flows[1])
    for _ in range(100):
        bench.ask("a", *flows)
    bench.run(4 * SECOND)
    assert bench.counts()["a"] == pytest.approx(21, abs=1)


# --- who has gone ---


def test_a_slot_that_comes_when_its_asker_has_gone_goes_to_the_next() -> None:
    bench = Counters()
    session, flow = bench.joined("b", Limit(10, 1))
    bench.ask("a", flow)
    gone = bench.waiting("a", flow)
    bench.run(PACE - 20 * MILLISECOND)  # the slot has been given out, its time has not come
    assert gone.clerk.slots
    bench.want(session, 1)
    assert bench.got.get(session, 0) == 0
    bench.manager.cancel_message(gone, bench.now)
    bench.collect()
    assert bench.got[session] == 1, "the same slot, in the same call"
    bench.run(10 * SECOND)
    assert bench.empty()
    assert len(bench.uses) == 1


def test_a_slot_that_was_told_of_too_late_goes_to_the_next() -> None:
    bench = Counters()
    _, flow = bench.joined("b", Limit(10, 1))
    granted = bench.ask("a", flow)
    other = bench.waiting("b", flow)
    assert granted is not None
    bench.manager.cancel_message(granted, bench.now)
    bench.collect()
    assert other.granted


@pytest.mark.parametrize("blocks", [(block(10),), ()], ids=["block", "registered"])
def test_calling_off_leaves_nothing_behind(blocks: tuple[ThrottleSettings, ...]) -> None:
    bench = Counters(*blocks)
    session, flow = bench.joined("n", Limit(10, 1))
    flows = () if blocks else (flow,)
    rng = random.Random(3)
    tickets = [ticket for index in range(200) if (ticket := bench.ask(f"i{index % 7}", *flows)) is not None]
    rng.shuffle(tickets)
    for ticket in tickets:
        bench.manager.cancel_message(ticket, bench.now)
        bench.run(rng.choice((0, MILLISECOND, 20 * MILLISECOND)))
    bench.manager.bye(session, bench.now)
    bench.run(10 * SECOND)
    assert bench.empty()
    assert bench.manager.active_throttles(bench.now) == 0
    assert not bench.manager.throttles
    assert not bench.manager._registry._paths


def test_asking_and_giving_up_again_and_again_grows_nothing() -> None:
    bench = Counters(block(1, 3600))
    bench.ask("a")
    bench.waiting("other")
    for _ in range(1_000):
        bench.manager.cancel_message(bench.waiting("a"), bench.now)
        bench.run(10 * MILLISECOND)
    throttle = next(iter(bench.manager.blocks.throttles()))
    assert throttle.slots is not None
    assert len(throttle.slots.queue) <= 2


def test_a_slot_that_we_are_too_late_for_is_lost_and_another_one_asked_for() -> None:
    bench = Counters()
    _, flow = bench.joined("a", Limit(10, 1))
    bench.ask("a", flow)
    ticket = bench.waiting("a", flow)
    bench.run(PACE - 20 * MILLISECOND)
    bench.now += 300 * MILLISECOND  # nobody turned the wheels meanwhile; a permit lives for 100 ms
    bench.manager.advance(bench.now)
    bench.collect()
    assert ticket.granted
    assert ticket.slot is not None
    assert ticket.slot >= bench.now - 100 * MILLISECOND


# --- refusals and reloads ---


def test_the_refusal_says_which_throttle_and_when_ones_turn_would_come() -> None:
    bench = Counters(block(6, 60))
    bench.ask("a")
    tickets = [bench.waiting(name) for name in "abc"]
    refusal = bench.manager.refusal(tickets[2], bench.now)
    assert refusal.throttle == "slow"
    assert refusal.retry_after == pytest.approx(30, abs=1)
    assert bench.manager.wait_of(tickets[0]) == 20.0


def test_a_block_that_goes_lets_all_go() -> None:
    bench = Counters(block(1, 3600))
    bench.ask("a")
    ticket = bench.waiting("a")
    bench.manager.reload(False, Limits(()), bench.now)
    bench.collect()
    assert ticket.granted
    bench.run(SECOND)
    assert bench.empty()


def test_a_block_that_is_raised_is_noticed_by_those_who_wait() -> None:
    bench = Counters(block(1, 3600))
    bench.ask("a")
    for _ in range(5):
        bench.waiting("a")
    bench.manager.reload(False, Limits((block(3600, 3600),)), bench.now)
    bench.run(10 * SECOND)
    assert len(bench.uses) == 6


def test_limits_that_go_with_their_session_hold_nobody() -> None:
    bench = Counters()
    session, flow = bench.joined("a", Limit(1, 3600))
    bench.ask("b", flow)
    ticket = bench.waiting("b", flow)
    bench.manager.bye(session, bench.now)
    bench.run(SECOND)
    assert ticket.granted
    bench.run(2 * 3600 * SECOND)
    assert bench.empty()
    assert not bench.manager.throttles


# --- connections beside messages ---


def test_connections_and_messages_of_one_block_take_turns() -> None:
    bench = Counters(block(10))
    waiting: list[Ticket] = []
    for index in range(100):
        bench.ask("smtp")
        answer = bench.manager.admit(f"tcp{index % 3}", 1.0, SOURCE, MX, (), bench.now)
        if isinstance(answer, Ticket):
            waiting.append(answer)
    bench.run(5 * SECOND)
    connections = sum(ticket.places is not None for ticket in waiting)
    assert connections == pytest.approx(len(bench.uses), abs=2)
    assert connections + len(bench.uses) == pytest.approx(50, abs=2)


def test_a_connection_whose_messages_count_takes_no_slot_and_waits_for_none() -> None:
    bench = Counters(block(1, 3600, connections=2))
    assert isinstance(bench.manager.admit("tcp", 1.0, SOURCE, MX, (), bench.now), Places)
    assert isinstance(bench.manager.admit("tcp", 1.0, SOURCE, MX, (), bench.now), Ticket), "no slot for an hour"
    held = bench.manager.admit("smtp", 1.0, SOURCE, MX, (), bench.now, rated=False)
    assert isinstance(held, Places)
    assert isinstance(bench.manager.admit("smtp", 1.0, SOURCE, MX, (), bench.now, rated=False), Ticket), "two places"
    bench.waiting("smtp")


# --- chance ---


@pytest.mark.parametrize("seed", range(12))
def test_no_window_holds_more_than_the_limit(seed: int) -> None:
    """Sessions and the desk on a strict limit, with called-off tickets, returns, lost sessions and late wake-ups."""
    rng = random.Random(seed)
    bench = Counters()
    limit = Limit(60, 60, rng.choice((1, 1, 5)))
    session, flow = bench.joined("n", limit)
    tickets: list[MessageTicket] = []
    permits: list[int] = []
    for _ in range(400):
        dice = rng.random()
        if dice < 0.5:
            ticket = bench.ask(rng.choice("nab"), flow)
            if ticket is not None and not ticket.granted:
                tickets.append(ticket)
        elif dice < 0.7 and tickets:
            ticket = tickets.pop(rng.randrange(len(tickets)))
            if not ticket.granted:
                bench.manager.cancel_message(ticket, bench.now)
        elif dice < 0.8:
            bench.want(session, rng.randrange(5))
        else:
            bench.now += rng.choice((0, 100 * MILLISECOND))
        for _ in range(rng.choice((1, 40))):
            before = bench.got.get(session, 0)
            bench.run(100 * MILLISECOND)
            # The session uses each permit as late as it may.
            permits += [bench.now + SECOND // 4] * (bench.got.get(session, 0) - before)
    assert len(bench.uses) > 50
    check_windows(sorted(permits + [at for _, at in bench.uses]), 60 * SECOND, 60)


def test_a_part_without_rates_is_none_of_it() -> None:
    bench = Counters()
    session = bench.session("a")
    bench.register(session, (KEY, Part((), 3)))
    assert bench.ask("a", session.flows[0]) is None
