"""Parts of several processes make one, whoever is added to whom first; and the one is what one process would know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.trouble import LATELY
from proxy.status.parts import (
    CachedPart,
    CachePart,
    Details,
    DoorPart,
    Failing,
    FailingPart,
    Part,
    PeerPart,
    PoolPart,
    ProcessPart,
    RefusedPart,
    SpanPart,
    decode,
    encode,
    failing_in_a_row,
    merge,
)

_NAMES = st.sampled_from(("a", "b", "c"))
_COUNTS = st.integers(0, 1000)
#: Whole seconds: sums of fractions depend on their order in the last digit, and that is not what is tested.
_TIMES = st.integers(1, 2000).map(float)


def in_order(part: Part) -> Part:
    """Rows of a table have none of their own."""
    if part.details is not None:
        part.details.cache.keys.sort()
    return part


def tables(values: Any = _COUNTS) -> Any:
    return st.dictionaries(_NAMES, values, max_size=3)


@st.composite
def runs(draw: Callable[[Any], Any]) -> FailingPart:
    since = draw(_TIMES)
    return FailingPart(since, since + draw(st.integers(0, 100)), draw(st.integers(1, 9)))


_PEERS = st.builds(
    PeerPart,
    opened=_COUNTS,
    failed=tables(),
    deferred=_COUNTS,
    rejected=_COUNTS,
    recent=st.dictionaries(st.integers(0, 60), st.integers(1, 9), max_size=4),
    good_at=_TIMES,
    # As a process says it: one run at the most, behind what went well.
    failing=st.lists(runs(), max_size=1),
    last=_NAMES,
    last_at=_TIMES,
).map(lambda peer: peer if not peer.failing or peer.failing[0].until >= peer.good_at else PeerPart())
_SPAN = st.builds(SpanPart, st.lists(_COUNTS, min_size=3, max_size=3), _TIMES)
_REFUSED = st.builds(
    RefusedPart,
    recent=st.dictionaries(st.integers(0, 60), st.integers(1, 9), max_size=4),
    times=st.tuples(_TIMES, st.integers(0, 900)).map(lambda each: [(each[0], each[0] + each[1])]),
    last=_NAMES,
    last_at=_TIMES,
)


def cached(name: str) -> Any:
    words = *(name, "192.0.2.9:25", "mx.example", "none", ""), False
    return st.builds(lambda *counts: CachedPart(*words, *counts), _COUNTS, _COUNTS, _TIMES, _TIMES)


_MAYBE = st.one_of(st.none(), _TIMES)
_CACHES = st.builds(
    CachePart,
    held=_COUNTS,
    opened_at=_TIMES,
    first_opened=_MAYBE,
    idle_since=_MAYBE,
    sources=tables(),
    keys=st.fixed_dictionaries({}, optional={name: cached(name) for name in "abc"}).map(lambda keys: [*keys.values()]),
    keys_left_out=_COUNTS,
)
_DETAILS = st.builds(
    Details,
    cache=_CACHES,
    instances=tables(),
    active_sources=tables(),
    receivers=tables(_PEERS),
    sources=tables(_PEERS),
    gone=tables(_TIMES),
    refused=tables(_REFUSED),
)
_DOORS = st.fixed_dictionaries(
    {}, optional={name: st.builds(DoorPart, st.just(name), st.just("socks5"), _COUNTS, st.booleans()) for name in "ab"}
)
_PROCESSES = st.builds(
    ProcessPart, number=st.integers(0, 9), pid=st.integers(1, 99), version=st.just("1"), started=_TIMES, cpu=_TIMES
)
PARTS = st.builds(
    Part,
    processes=st.lists(_PROCESSES, max_size=2, unique_by=lambda each: (each.number, each.pid)).map(
        lambda found: sorted(found, key=lambda each: (each.number, each.pid))
    ),
    counters=st.fixed_dictionaries({"bytes_up": _COUNTS, "ended": tables()}),
    spans=st.fixed_dictionaries({}, optional={"turn": _SPAN, "tls": _SPAN}),
    doors=_DOORS,
    pool=st.builds(PoolPart, held=_COUNTS, offered=_COUNTS, hits=_COUNTS, misses=_COUNTS, discards=tables()),
    cpu=_TIMES,
    lost=_COUNTS,
    active=_COUNTS,
    cached=_COUNTS,
    open=_COUNTS,
    newcomers=_COUNTS,
    newcomers_dropped=_COUNTS,
    channels=_COUNTS,
    dialogues=_COUNTS,
    highest=_COUNTS,
    details=st.one_of(st.none(), _DETAILS),
)


@given(PARTS, PARTS)
def test_it_does_not_matter_who_is_added_to_whom(a: Part, b: Part) -> None:
    if {(each.number, each.pid) for each in a.processes} & {(each.number, each.pid) for each in b.processes}:
        b.processes = []  # nobody is two
    assert in_order(merge([a, b])) == in_order(merge([b, a]))


@given(PARTS, PARTS, PARTS)
def test_it_does_not_matter_who_are_added_first(a: Part, b: Part, c: Part) -> None:
    one, other = in_order(merge([merge([a, b]), c])), in_order(merge([a, merge([b, c])]))
    assert one == other == in_order(merge([a, b, c]))


@given(PARTS)
def test_nothing_is_added_by_who_knows_nothing(a: Part) -> None:
    assert merge([a, Part()]) == merge([Part(), a]) == merge([a]) == a
    assert merge([]) == Part()


@given(PARTS, PARTS)
def test_what_is_added_up_stays_as_it_is_and_survives_the_link(a: Part, b: Part) -> None:
    before = encode(a), encode(b)
    both = merge([a, b])
    assert (encode(a), encode(b)) == before
    if both.processes:
        assert decode(encode(both)) == both


@pytest.mark.parametrize("data", [encode(Part()), b"\x80", b"\xc1", b""])
def test_what_is_of_nobody_is_no_part(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(data)


@given(st.lists(PARTS, max_size=4))
def test_what_is_counted_is_the_sum(parts: list[Part]) -> None:
    both = merge(parts)
    for name in ("cpu", "lost", "active", "cached", "open", "newcomers", "newcomers_dropped", "channels", "dialogues"):
        assert getattr(both, name) == sum(getattr(part, name) for part in parts)
    assert both.counters.get("bytes_up", 0) == sum(part.counters["bytes_up"] for part in parts)  # type: ignore[misc]
    assert both.highest == max((part.highest for part in parts), default=0)
    for name in "abc":
        tables_ = [part.counters["ended"] for part in parts]
        assert both.counters.get("ended", {}).get(name, 0) == sum(t.get(name, 0) for t in tables_)  # type: ignore[union-attr]


def test_a_listener_is_closing_when_nobody_listens_there_any_more() -> None:
    def part(closing: bool) -> Part:
        return Part(doors={"x": DoorPart("x", "socks5", 1, closing)})

    assert merge([part(True), part(True)]).doors["x"] == DoorPart("x", "socks5", 2, True)
    assert merge([part(True), part(False)]).doors["x"].closing is False


def run(since: float, until: float, count: int, **more: Any) -> Part:
    peer = PeerPart(failing=[FailingPart(since, until, count)], last_at=until, **more)
    return Part(details=Details(receivers={"mx": peer}))


def good(at: float) -> Part:
    return Part(details=Details(receivers={"mx": PeerPart(good_at=at)}))


def failures(*parts: Part) -> Failing | None:
    details = merge(parts).details
    assert details is not None
    return failing_in_a_row(details.receivers["mx"])


def test_failures_of_all_are_in_a_row_until_something_goes_well_anywhere() -> None:
    assert failures(run(10, 20, 3), run(15, 30, 2)) == Failing(10, 5)
    assert failures(run(10, 20, 3), run(15, 30, 2), good(31)) is None
    assert failures(run(10, 20, 3), good(25), run(26, 30, 2)) == Failing(26, 2)
    assert failures(run(10, 20, 3), good(9)) == Failing(10, 3)


def test_of_failures_around_something_good_those_behind_it_count() -> None:
    # 9 in all: 5 before 100 s, 4 in the half minutes that begin at 120 and 150 s.
    part = run(10, 160, 9, recent={0: 2, 3: 3, 4: 1, 5: 3})
    assert failures(part, good(100)) == Failing(100, 4)
    assert failures(part, good(155)) == Failing(155, 1)  # at least the last one
    assert failures(part, good(161)) is None


@pytest.mark.parametrize("pause", [LATELY - 1, LATELY])
def test_requests_are_refused_since_the_first_of_all_without_a_pause(pause: int) -> None:
    def part(since: float, until: float) -> Part:
        return Part(details=Details(refused={"x": RefusedPart(times=[(since, until)], last_at=until)}))

    details = merge([part(1000.0 + pause, 2000.0), part(500.0, 1000.0)]).details
    assert details is not None
    times = details.refused["x"].times
    assert times[-1] == ((500.0, 2000.0) if pause < LATELY else (1000.0 + pause, 2000.0))
