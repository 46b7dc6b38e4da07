"""Workers come and go, and what they have counted stays."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.trouble import MOST
from proxy.stats import MAX_NAMES, OTHER
from proxy.status.colleagues import Member
from proxy.status.parts import Details, DoorPart, FailingPart, Part, PeerPart, PoolPart, ProcessPart, SpanPart, merge
from proxy.status.roll import Roll


def part(count: int = 1, **more: object) -> Part:
    return Part(counters={"bytes_up": count, "ended": {"done": count}}, **more)  # type: ignore[arg-type]


def roll_of(*workers: int) -> Roll:
    roll = Roll(100, "1", 0.0)
    for who in workers:
        roll.begun(who, 100 + who, "1", 10.0)
    return roll


def total(roll: Roll) -> object:
    return merge(roll.parts()).counters.get("bytes_up", 0)


def test_the_last_word_of_each_counts() -> None:
    roll = roll_of(1, 2)
    roll.heard(1, part(5), 11.0)
    roll.heard(2, part(7), 11.0)
    roll.heard(1, part(6), 12.0)
    assert total(roll) == 13


def test_what_the_dead_have_counted_stays_and_what_they_had_open_does_not() -> None:
    roll = roll_of(1)
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
    roll.heard(1, before, 11.0)
    roll.died(1, "killed", 12.0)
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
    roll = roll_of(3)
    roll.died(3, "killed", 11.0)
    assert merge(roll.parts()) == Part()


@given(st.lists(st.tuples(st.sampled_from(("say", "die")), st.integers(1, 3), st.integers(1, 50)), max_size=30))
def test_sums_never_go_back(events: list[tuple[str, int, int]]) -> None:
    roll, counted, last = roll_of(1, 2, 3), {1: 0, 2: 0, 3: 0}, 0
    for what, who, more in events:
        if what == "die":
            roll.died(who, "killed", 11.0)
            roll.heard(who, part(7), 11.0)  # a last word that comes too late is no word of the next one
            roll.begun(who, 200, "1", 12.0)
            counted[who] = 0
        else:
            counted[who] += more
            roll.heard(who, part(counted[who]), 13.0)
        now = total(roll)
        assert isinstance(now, int)
        assert now >= last
        last = now
    assert last == sum(more for what, _, more in events if what == "say")


def test_who_they_are() -> None:
    roll = roll_of(2, 1)
    roll.heard(2, Part(), 20.0)
    roll.died(2, "killed by signal 9", 21.0)
    assert roll.members() == [
        Member(0, "master", 100, "1", 0.0),
        Member(1, "worker", 101, "1", 10.0, heard_at=10.0),
        Member(2, "worker", 0, "1", 10.0, 1, "killed by signal 9", (21.0,), 20.0),
    ]
    roll.begun(2, 202, "2", 22.0)
    roll.leaves(1)
    assert roll.members()[1:] == [
        Member(1, "leaving", 101, "1", 10.0, heard_at=10.0),
        Member(2, "worker", 202, "2", 22.0, 1, "killed by signal 9", (21.0,), 22.0),
    ]
    roll.ended(1)
    roll.ended(1)
    assert [member.number for member in roll.members()] == [0, 2]


def test_one_that_was_replaced_is_one_row_with_its_workers() -> None:
    roll = roll_of(1)
    several = [ProcessPart(number, 70 + number, "0", 5.0 + number, 1.5, 10, 20, 3, 100, 2) for number in (2, 0, 1)]
    roll.heard(1, part(processes=several), 11.0)
    (one,) = roll.parts()[0].processes
    assert one == ProcessPart(1, 101, "0", 5.0, 4.5, 30, 60, 9, 300, 6)
    assert several[0].cpu == 1.5, "what was handed in stays as it is"


def test_the_times_of_many_deaths_are_not_all_remembered() -> None:
    roll = roll_of(1)
    for at in range(1000):
        roll.died(1, "killed", float(at))
        roll.begun(1, 101, "1", float(at))
    member = roll.members()[1]
    assert (member.restarts, len(member.deaths), member.deaths[-1]) == (1000, 16, 999.0)


def test_details_are_remembered_while_none_are_said() -> None:
    roll = roll_of(1)
    roll.heard(1, part(1, details=Details(instances={"mta": 4})), 11.0)
    roll.heard(1, part(2), 12.0)
    assert roll.parts()[0] == part(2, details=Details(instances={"mta": 4}))


def test_of_many_dead_no_more_is_remembered_than_of_one() -> None:
    roll = roll_of()
    for number in range(5):
        roll.begun(1, 101, "1", 10.0)
        names = {f"name{number}-{each}": 1 for each in range(MAX_NAMES)}
        at = 1000.0 * number
        peers = {
            f"mx{number}-{each}": PeerPart(failing=[FailingPart(at, at + each, 1)], last_at=at + each)
            for each in range(MOST)
        }
        peers["always"] = PeerPart(failing=[FailingPart(at, at + 900, 2)], last_at=at + 900)
        roll.heard(1, Part(counters={"ended": names}, details=Details(receivers=peers)), 11.0)
        roll.died(1, "killed", 12.0)
    gone = merge(roll.parts())
    table = gone.counters["ended"]
    assert isinstance(table, dict)
    assert len(table) == MAX_NAMES + 1
    assert sum(table.values()) == 5 * MAX_NAMES
    assert table[OTHER] == 4 * MAX_NAMES
    assert gone.details is not None
    assert len(gone.details.receivers) == MOST
    assert gone.details.receivers["always"].failing == [FailingPart(0.0, 4900.0, 10)]
