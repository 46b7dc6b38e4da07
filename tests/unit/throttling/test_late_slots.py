"""Slots used later than given out, since a connection had to be made first: the bound holds where they are used."""

from __future__ import annotations

import random
from heapq import heappop, heappush

import pytest

from proxy.settings import Rate
from proxy.throttling.desk import MessageTicket
from proxy.throttling.throttle import LATENESS, MILLISECOND, SECOND
from tests.unit.throttling.oracle import Violation, check_windows
from tests.unit.throttling.test_desk import Counters, block

#: How late, in milliseconds: a connection of the cache, one in the next street, one far away, one that hangs.
LATE = ((0,), (0, 0, 300), (40, 300, 1200), (0, 0, 0, 9_000), (0, 20_000))


class Connecting(Counters):
    """A bench whose messages go when they have a connection, some time after their slot."""

    def __init__(self, rate: Rate, late: tuple[int, ...], seed: int, puts_off: bool = True) -> None:
        super().__init__(block(rate.amount, rate.seconds))
        self.sent: list[int] = []
        self.void = 0
        self._late = late
        self._random = random.Random(seed)
        self._puts_off = puts_off
        self._connecting: list[tuple[int, int, MessageTicket]] = []

    def send(self, seconds: int, crowd: int) -> None:
        """`crowd` messages want to go at any time; the crowd is larger at some times than at others."""
        end, waiting = self.now + seconds * SECOND, 0
        while self.now < end:
            if self._random.random() < 0.9:
                waiting += self._ask_many(crowd - waiting)
            self.run(min(50 * MILLISECOND, end - self.now))
            waiting -= self._connect()
            while self._connecting and self._connecting[0][0] <= self.now:
                self._leave(heappop(self._connecting)[2])

    def _ask_many(self, number: int) -> int:
        waiting = 0
        for _ in range(number):
            ticket = self.ask("ab"[self._random.randrange(2)])
            assert ticket is not None
            if ticket.granted:
                self.granted.append(ticket)
            waiting += 1
        return waiting

    def _connect(self) -> int:
        granted, self.granted = dict.fromkeys(self.granted), []
        for ticket in granted:
            late = self._random.choice(self._late) * MILLISECOND
            if late:
                heappush(self._connecting, (self.now + late, id(ticket), ticket))
            else:
                self.sent.append(ticket.last)
        return len(granted)

    def _leave(self, ticket: MessageTicket) -> None:
        if not self._puts_off or self.manager.put_off(ticket, self.now):
            self.sent.append(self.now)
        else:
            self.void += 1


RATES = (Rate(60, 60), Rate(10, 60), Rate(600, 60), Rate(1, 60), Rate(3600, 60))


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("late", LATE, ids=str)
def test_no_window_holds_more_however_late_they_go(rate: Rate, late: tuple[int, ...]) -> None:
    bench = Connecting(rate, late, 7)
    bench.send(400, 8)
    check_windows(sorted(bench.sent), 60 * SECOND, rate.amount)
    assert not bench.void


def test_a_bench_that_does_not_put_off_breaks_the_bound() -> None:
    bench = Connecting(Rate(60, 60), (0, 0, 0, 9_000), 7, puts_off=False)
    bench.send(400, 8)
    with pytest.raises(Violation):
        check_windows(sorted(bench.sent), 60 * SECOND, 60)


def test_a_late_message_costs_others_no_more_than_it_is_late() -> None:
    """Under one message a minute: 300 ms late is 300 ms, not a minute."""
    bench = Counters(block(1, 60))
    first = bench.ask("a")
    second = bench.waiting("a")
    assert first is not None
    begin = bench.now
    bench.run(300 * MILLISECOND)
    assert bench.manager.put_off(first, bench.now)
    bench.run(58 * SECOND)
    assert not second.granted
    bench.run(3 * SECOND)
    assert second.slot is not None
    assert 60_000 * MILLISECOND < second.last - begin - 300 * MILLISECOND <= 60_100 * MILLISECOND + LATENESS


def test_within_its_slack_a_slot_puts_nothing_off() -> None:
    bench = Counters(block(1, 60))
    first = bench.ask("a")
    assert first is not None
    before = first.last
    bench.run(LATENESS)
    assert bench.manager.put_off(first, bench.now)
    assert first.last == before


def test_after_half_a_window_another_slot_is_needed() -> None:
    bench = Counters(block(1, 60))
    first = bench.ask("a")
    assert first is not None
    bench.run(31 * SECOND)
    assert not bench.manager.put_off(first, bench.now)
