"""What is gathered of several processes is what one process would know, whatever happened in which of them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.egress.pool import Entry, Pool, PoolKey
from proxy.errors import BadCredentials, Step, UpstreamError
from proxy.model import Discard, Ending, Endpoint, TlsMode
from proxy.policy.trouble import LATELY, Troubles, lately
from proxy.spans import Spans
from proxy.stats import Counters, Standing
from proxy.status.gather import Gauged, counted, details
from proxy.status.parts import Part, PeerPart, failing_in_a_row, merge
from tests.unit.status.test_view import POOL, House, run

MX, OTHER = Endpoint("198.51.100.7", 25), Endpoint("198.51.100.8", 25)
SOURCE = "192.0.2.1"
REFUSED = UpstreamError("connect: refused", Step.CONNECT, errno.ECONNREFUSED)
NOW = 2000.0


class Process:
    """What one process counts in."""

    def __init__(self) -> None:
        self.counters, self.spans, self.troubles, self.pool = Counters(), Spans(), Troubles(), Pool(POOL)
        self.connections: list[Standing] = []

    def part(self) -> Part:
        part = counted(self.counters, self.spans, self.pool, Gauged(active=len(self.connections)))
        part.details, _ = run(details(self.pool, self.troubles, self.connections, NOW))
        return part


class Event(NamedTuple):
    """Something that happens at a time, in one of the processes."""

    at: float
    process: int
    what: str
    number: int


EVENTS = st.lists(
    st.builds(
        Event,
        st.integers(1000, int(NOW)).map(float),
        st.integers(0, 2),
        st.sampled_from(("failed", "refused", "good", "bad", "no_login", "accepted", "held", "reused", "open")),
        st.integers(0, 9),
    ),
    max_size=40,
    unique_by=lambda event: event.at,  # which of two was first is known to one process only
).map(sorted)


def happen(process: Process, event: Event, serial: int) -> None:
    """Each event has words of its own: so it shows whose are the last."""
    mx = (MX, OTHER)[event.number % 2]
    if event.what == "failed":
        error = UpstreamError(f"connect: refused {serial}", Step.CONNECT, errno.ECONNREFUSED)
        process.troubles.failed(SOURCE, mx, error, event.at)
        process.counters.failed.count("connect")
    elif event.what == "bad":
        process.troubles.over(SOURCE, mx, f"421 4.7.0 no {serial}", False, event.at, event.number)
    elif event.what == "good":
        process.troubles.over(SOURCE, mx, "", True, event.at)
        process.counters.ended.count(Ending.CLIENT_CLOSED)
        process.spans.bytes.observe(float(event.number))
    elif event.what == "no_login":
        process.troubles.refuse(BadCredentials(f"no {serial}"), event.at)
    elif event.what == "accepted":
        process.counters.accepted.count("socks5")
        process.counters.bytes_up += event.number
    elif event.what == "held":
        key = PoolKey(SOURCE, mx, "mx.example", TlsMode.NONE)
        process.pool.offer(Entry(serial, key, event.at - event.number, event.number), event.at)
    elif event.what == "reused":
        process.pool.take(PoolKey(SOURCE, mx, "mx.example", TlsMode.NONE), event.at)
    elif event.what == "open":
        instance = f"mta-{event.number}"
        client = Endpoint("10.0.0.5", 1)
        process.connections.append(Standing(serial, instance, "socks5", client, SOURCE, mx, "relay", event.at))


def know_of_each_other(processes: list[Process]) -> None:
    """What `server.questions` sees to."""
    for process in processes:
        for other in processes:
            other.troubles.receivers.expect(process.troubles.receivers)
            other.troubles.sources.expect(process.troubles.sources)


def exactly(part: Part) -> Part:
    """What is the same however it is spread: without the runs of failures, and what was never in trouble."""
    assert part.details is not None
    for peers in (part.details.receivers, part.details.sources):
        for peer in peers.values():
            peer.failing, peer.good_at = [], 0.0
            peer.recent = {0: lately(peer.recent, NOW)}
    for refused in part.details.refused.values():
        refused.recent = {0: lately(refused.recent, NOW)}
        refused.times = []
    part.details.cache.keys.sort()
    return part


def runs(part: Part) -> dict[str, Any]:
    assert part.details is not None
    peers: dict[str, PeerPart] = part.details.receivers | part.details.sources
    return {name: failing_in_a_row(peer) for name, peer in peers.items()}


@given(EVENTS)
@example([Event(at, process, "no_login", 0) for at, process in ((1000.0, 0), (1200.0, 1), (1400.0, 0))])
@example([Event(1000.0, 0, "failed", 0), Event(1001.0, 1, "good", 0), Event(1100.0, 0, "failed", 0)])
def test_the_sum_of_the_parts_is_what_one_process_would_know(events: list[Event]) -> None:
    one, several = Process(), [Process(), Process(), Process()]
    for serial, event in enumerate(events):
        where = several[event.process]
        if event.what == "reused":  # a connection is found where it is: which worker that is, is settled beforehand
            where = several[0]
        happen(one, event, serial)
        happen(several[0] if event.what == "held" else where, event, serial)
        know_of_each_other(several)
    whole, parts = one.part(), merge(process.part() for process in several)
    expected, found = runs(whole), runs(parts)
    for name, run_ in expected.items():
        if run_ is None:
            assert found[name] is None
        else:  # not later than the first failure, and not more than there were
            assert found[name].since <= run_.since
            assert 1 <= found[name].failures <= run_.failures
    assert whole.details is not None
    assert parts.details is not None
    for code, refused in whole.details.refused.items():  # of one process a time is forgotten after a pause of its own
        assert refused.times[-1][0] <= parts.details.refused[code].times[-1][0] <= NOW
    assert exactly(parts) == exactly(whole)


@given(EVENTS)
def test_runs_are_exact_where_each_receiver_has_one_process(events: list[Event]) -> None:
    one, several = Process(), [Process(), Process()]
    for serial, event in enumerate(events):
        happen(one, event, serial)
        happen(several[event.number % 2], event, serial)
    whole, parts = one.part(), merge(process.part() for process in several)
    assert whole.details is not None
    assert parts.details is not None
    for name, peer in whole.details.receivers.items():
        assert failing_in_a_row(parts.details.receivers[name]) == failing_in_a_row(peer)


def test_the_cache_and_its_counts() -> None:
    process = Process()
    key = PoolKey(SOURCE, MX, "mx.example", TlsMode.NONE, tenant="somebody")
    process.pool.offer(Entry(1, key, 100.0, 3), 110.0)
    process.pool.offer(Entry(2, key, 90.0, 4), 120.0)
    process.pool.decline(Discard.MAX_AGE)
    part = process.part()
    assert part.details is not None
    cache, (row,) = part.details.cache, part.details.cache.keys
    assert (part.pool.held, part.pool.offered, part.pool.discards) == (2, 3, {str(Discard.MAX_AGE): 1})
    assert (cache.held, cache.opened_at, cache.first_opened, cache.idle_since) == (2, 190.0, 90.0, 110.0)
    assert cache.sources == {SOURCE: 2}
    assert (row.connections, row.messages, row.opened_at, row.idle_since, row.tenant) == (2, 7, 90.0, 110.0, True)


def test_keys_that_look_the_same_and_are_not_have_two_rows() -> None:
    process = Process()
    for number, tenant in enumerate(("one", "two")):
        key = PoolKey(SOURCE, MX, "mx.example", TlsMode.NONE, tenant=tenant)
        process.pool.offer(Entry(number, key, 100.0), 110.0)
    part = process.part()
    assert part.details is not None
    assert len(part.details.cache.keys) == 2
    both = merge([process.part(), process.part()])
    assert both.details is not None
    assert [row.connections for row in both.details.cache.keys] == [2, 2]


@pytest.mark.parametrize("later", [0.0, LATELY + 60.0])
def test_the_worst_come_first(later: float) -> None:
    house, began = House(), 497.0 - later
    for _ in range(9):
        house.troubles.failed("", OTHER, REFUSED, began)
    house.troubles.over("", OTHER, "", True, began + 1)
    house.troubles.failed("", MX, REFUSED, began + 2)
    assert [row.name for row in house.view().receivers] == [str(MX), str(OTHER)], "failing, or else the latest"


def test_who_failed_long_ago_is_not_among_those_that_fail_now() -> None:
    """More has gone wrong with it in all, but nothing lately."""
    house = House()
    for _ in range(9):
        house.troubles.failed(SOURCE, OTHER, REFUSED, 100.0)
    house.troubles.over(SOURCE, MX, "450 4.2.1 later", True, 500.0, 1)
    found = [(row.name, row.failing is None) for row in house.view().receivers]
    assert found == [(str(MX), True), (str(OTHER), False)]


def test_what_only_others_have_trouble_with_is_no_row() -> None:
    house = House()
    house.troubles.receivers.expect([MX])
    view = house.view()
    assert (view.receivers, view.receivers_left_out) == ([], 0)


def test_details_are_gathered_in_steps() -> None:
    troubles = Troubles()
    for number in range(300):
        troubles.failed(f"192.0.2.{number}", Endpoint("198.51.100.1", number + 1), REFUSED, 1.0)
    found: Callable[[], Any] = lambda: details(Pool(POOL), troubles, (), 2.0)  # noqa: E731
    gathered, stops = run(found())
    assert stops >= 6
    assert (len(gathered.receivers), len(gathered.sources)) == (300, 300)
