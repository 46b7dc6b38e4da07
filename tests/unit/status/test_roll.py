"""Workers come and go, and what they have counted stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.trouble import MOST
from proxy.stats import MAX_NAMES, OTHER
from proxy.status.parts import Details, DoorPart, FailingPart, Part, PeerPart, PoolPart, ProcessPart, SpanPart, merge
from proxy.status.roll import Roll


def part(count: int = 1, **more: object) -> Part:
    return Part(counters={"bytes_up": count, "ended": {"done": count}}, **more)  # type: ignore[arg-type]


def total(roll: Roll) -> object:
    return merge(roll.parts()).counters.get("bytes_up", 0)


def test_the_last_word_of_each_counts() -> None:
    roll = Roll()
    roll.heard(1, part(5))
    roll.heard(2, part(7))
    roll.heard(1, part(6))
    assert total(roll) == 13


def test_what_the_dead_have_counted_stays_and_what_they_had_open_does_not() -> None:
    roll = Roll()
    before = part(
        5,
        processes=[ProcessPart(1, 99, "1", 0.0)],
        spans={"turn": SpanPart([1, 2], 3.0)},
        doors={"x": DoorPart("x", "socks5", 4)},
        pool=PoolPart(held=3, offered=9, hits=2, misses=1, discards={"dead": 4}),
        cpu=1.5,
        lost=2,
        open=4,
        active=4,
        cached=3,
        newcomers=1,
        newcomers_dropped=8,
        highest=51,
        details=Details(instances={"mta": 4}, receivers={"mx": PeerPart(opened=3)}, gone={"192.0.2.1": 1.0}),
    )
    roll.heard(1, before)
    roll.gone(1)
    after = merge(roll.parts())
    assert after == part(
        5,
        spans={"turn": SpanPart([1, 2], 3.0)},
        pool=PoolPart(offered=9, hits=2, misses=1, discards={"dead": 4}),
        cpu=1.5,
        lost=2,
        newcomers_dropped=8,
        highest=51,
        details=Details(receivers={"mx": PeerPart(opened=3)}),
    )
    assert roll.highest() == 51


def test_a_worker_that_never_said_anything_leaves_nothing() -> None:
    roll = Roll()
    roll.gone(3)
    assert merge(roll.parts()) == Part()


@given(st.lists(st.tuples(st.sampled_from(("say", "die")), st.integers(1, 3), st.integers(1, 50)), max_size=30))
def test_sums_never_go_back(events: list[tuple[str, int, int]]) -> None:
    roll, counted, last = Roll(), {1: 0, 2: 0, 3: 0}, 0
    for what, who, more in events:
        if what == "die":
            roll.gone(who)
            counted[who] = 0
        else:
            counted[who] += more
            roll.heard(who, part(counted[who]))
        now = total(roll)
        assert isinstance(now, int)
        assert now >= last
        last = now
    assert last == sum(more for what, _, more in events if what == "say")


def test_details_are_remembered_while_none_are_said() -> None:
    roll = Roll()
    roll.heard(1, part(1, details=Details(instances={"mta": 4})))
    roll.heard(1, part(2))
    assert roll.parts()[0] == part(2, details=Details(instances={"mta": 4}))


def test_of_many_dead_no_more_is_remembered_than_of_one() -> None:
    roll = Roll()
    for number in range(5):
        names = {f"name{number}-{each}": 1 for each in range(MAX_NAMES)}
        at = 1000.0 * number
        peers = {
            f"mx{number}-{each}": PeerPart(failing=[FailingPart(at, at + each, 1)], last_at=at + each)
            for each in range(MOST)
        }
        peers["always"] = PeerPart(failing=[FailingPart(at, at + 900, 2)], last_at=at + 900)
        roll.heard(1, Part(counters={"ended": names}, details=Details(receivers=peers)))
        roll.gone(1)
    gone = merge(roll.parts())
    table = gone.counters["ended"]
    assert isinstance(table, dict)
    assert len(table) == MAX_NAMES + 1
    assert sum(table.values()) == 5 * MAX_NAMES
    assert table[OTHER] == 4 * MAX_NAMES
    assert gone.details is not None
    assert len(gone.details.receivers) == MOST
    assert gone.details.receivers["always"].failing == [FailingPart(0.0, 4900.0, 10)]
