"""What a limit is worth while instances go from one proxy to another: no manager knows of the other.

docs/library.md, "Several proxies", and docs/ha.md promise what stands here.
"""

from __future__ import annotations

import pytest

from proxy.throttling.throttle import SECOND, Limit
from tests.unit.throttling.benches import KEY, MS, Bench, part

MINUTE = 60 * SECOND
LIMIT = 60  # a minute


class Proxy:
    """A manager, and an instance that wants as much as it can get while it is there; `sent` has the slots' times."""

    def __init__(self, burst: int) -> None:
        self.bench = Bench()
        self.burst = burst
        self.sent: list[int] = []

    def stay(self, until: int) -> None:
        """The instance comes, and when the burst is there it sends all it may, and says BYE at last."""
        bench = self.bench
        session = bench.session("mta")
        bench.got.pop(session, None)
        bench.register(session, (KEY, part(Limit(LIMIT, 60, self.burst))))
        bench.now += 30 * SECOND
        while bench.now < until:
            bench.manager.ping(session, bench.now // 1000, bench.now)
            bench.manager.pong(session, bench.now // 1000, 0, bench.now)
            bench.want(session, 1000)
            self._note()
            wake = bench.manager.next_wakeup()
            bench.now = min(until, bench.now + 500 * MS if wake is None else max(wake, bench.now + 1))
            bench.manager.advance(bench.now)
        bench.manager.bye(session, bench.now)

    def wait(self, until: int) -> None:
        """Nobody is there."""
        while self.bench.now < until:
            self.bench.now = min(until, self.bench.now + SECOND)
            self.bench.manager.advance(self.bench.now)
            self.bench.collect()

    def _note(self) -> None:
        for records in self.bench.collect().values():
            for record in records:
                first = self.bench.now + record.first_offset_us * 1000
                self.sent += [first + number * record.step_us * 1000 for number in range(record.n)]


def most(sent: list[int]) -> int:
    """The most slots in any minute."""
    return max(sum(begin <= slot < begin + MINUTE for slot in sent) for begin in sent)


@pytest.mark.parametrize("burst", [1, 20])
@pytest.mark.parametrize("before", [31, 45, 60, 89, 180])
def test_a_move_costs_one_burst_in_a_window(burst: int, before: int) -> None:
    """The dearest move is one soon after a burst: then there is another one."""
    first, second = Proxy(burst), Proxy(burst)
    moves = first.bench.now + before * SECOND
    first.stay(moves)
    second.wait(moves - 30 * SECOND)
    second.stay(moves + 3 * MINUTE)
    assert most(first.sent) <= LIMIT
    assert most(second.sent) <= LIMIT
    both = sorted(first.sent + second.sent)
    assert most(both) <= LIMIT + burst
    if burst == 20 and before == 60:
        assert most(both) > LIMIT + burst - 5, "it does cost that much"


def test_two_moves_within_a_window_cost_two() -> None:
    burst = 20
    first, second = Proxy(burst), Proxy(burst)
    away, back = first.bench.now + 3 * MINUTE, first.bench.now + 3 * MINUTE + 20 * SECOND
    first.stay(away)
    second.wait(away)
    second.stay(back)
    first.wait(back)
    first.stay(back + 2 * MINUTE)
    both = sorted(first.sent + second.sent)
    assert most(both) <= LIMIT + 2 * burst


def test_each_at_another_is_twice_the_limit() -> None:
    first, second = Proxy(1), Proxy(1)
    until = first.bench.now + 3 * MINUTE
    first.stay(until)
    second.stay(until)
    assert 2 * LIMIT - 2 <= most(sorted(first.sent + second.sent)) <= 2 * LIMIT
