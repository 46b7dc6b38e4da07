"""The line at one throttle by itself: whose turn is next, how long a small weight waits, what is remembered."""

from __future__ import annotations

import random
from collections import Counter

from proxy.throttling.flows import Throttle
from proxy.throttling.line import Line, Request
from tests.unit.throttling.benches import SOURCE, Key


def at_one_throttle() -> tuple[Throttle, Line[Request]]:
    return Throttle(Key(SOURCE, "t")), Line(0)


def serve(line: Line[Request], meter: Throttle) -> Request | None:
    """Who is next leaves the line."""
    request = line.peek(meter)
    if request is not None:
        line.served(request)
        line.rank(request.owner, meter)
    return request


def test_the_next_in_line_is_the_one_that_a_plain_search_finds() -> None:
    """Ranks change often enough for the heaps to be compacted; they stay small, and the order is the same."""
    rng = random.Random(1)
    meter, line = at_one_throttle()
    names = [f"o{index}" for index in range(9)]
    waiting: Counter[str] = Counter()
    weights = {name: rng.choice((0.5, 1.0, 2.0)) for name in names}
    served = 0
    for _ in range(4000):
        name = rng.choice(names)
        what = rng.randrange(4)
        if what == 0:
            line.add(Request(name, weights[name]), meter)
            waiting[name] += 1
        elif what == 1:
            meter.take_place(name)
            line.rank(name, meter)
        elif what == 2 and meter.holds(name):
            meter.free_place(name)
            line.rank(name, meter)
        elif what == 3 and (request := serve(line, meter)) is not None:
            fewest = min((meter.holds(each) + 1) / weights[each] for each in +waiting)
            overdue = not meter.holds(request.owner) and line._due[request.owner] <= line._clock
            assert overdue or (meter.holds(request.owner) + 1) / weights[request.owner] == fewest
            waiting[request.owner] -= 1
            line.got_in(request)
            served += 1
        assert line.size == waiting.total()
        assert line.waiting() == {each: (count, weights[each]) for each, count in (+waiting).items()}
        assert len(line._heap) <= 65 + 4 * len(names)
    assert served > 500


def test_equals_go_round_however_often_the_line_is_compacted() -> None:
    meter, line = at_one_throttle()
    for turn in range(3):
        for name in ("c", "a", "b"):
            line.add(Request(name, 1.0), meter)
        if turn == 1:
            serve(line, meter)  # c has had a turn more than the others
            for _ in range(200):
                line.rank("a", meter)
    order = [request.owner for request in iter(lambda: serve(line, meter), None)]
    assert order == ["a", "b", "c", "a", "b", "c", "a", "b"]


def turns(line: Line[Request], meter: Throttle, count: int) -> str:
    """The next `count` turns; whoever has had one gets in, leaves soon, and stands here again."""
    owners = ""
    for _ in range(count):
        request = serve(line, meter)
        assert request is not None
        line.got_in(request)
        line.add(Request(request.owner, request.weight), meter)
        owners += request.owner
    return owners


def test_an_owner_without_a_place_waits_for_so_many_turns_as_its_weight_is_a_part_of_all() -> None:
    """A quarter of all weights: four turns of others pass, from its coming and from its own last turn, and no fifth."""
    meter, line = at_one_throttle()
    for name, weight in (("a", 1.5), ("s", 0.5)) * 2:
        line.add(Request(name, weight), meter)
    assert turns(line, meter, 10) == "aaaasaaaas"


def test_a_heap_is_made_anew_when_it_is_long_and_not_before() -> None:
    """64 entries and 4 for each owner; and the turns of those who have left are forgotten with it."""
    meter, line = at_one_throttle()
    gone = Request("gone", 1.0)
    line.add(gone, meter)
    line.remove(gone, meter)
    for name in "abc":
        line.add(Request(name, 1.0), meter)
    while len(line._heap) < 64 + 4 * 3:
        line.rank("a", meter)
        assert "gone" in line._served
    line.rank("a", meter)
    assert sorted(owner for _, _, owner in line._heap) == ["a", "b", "c"]
    assert sorted(line._served) == ["a", "b", "c"]


def test_who_has_a_place_when_its_time_comes_waits_as_long_again() -> None:
    meter, line = at_one_throttle()
    for name, weight in (("a", 1.5), ("s", 0.5)) * 2:
        line.add(Request(name, weight), meter)
    meter.take_place("s")
    assert turns(line, meter, 5) == "aaaaa"  # its time came with the fifth
    meter.free_place("s")
    assert turns(line, meter, 4) == "aaas"


def test_who_leaves_and_comes_back_waits_from_then_on() -> None:
    meter, line = at_one_throttle()
    gone = Request("s", 0.5)
    for request in (Request("a", 1.0), Request("a", 1.0), Request("b", 0.5), gone):
        line.add(request, meter)
    line.remove(gone, meter)
    assert "s" not in turns(line, meter, 10)
    line.add(Request("s", 0.5), meter)
    assert turns(line, meter, 5).count("s") == 1


def test_who_stands_elsewhere_goes_before_those_who_would_have_more() -> None:
    meter, line = at_one_throttle()
    elsewhere = Request("b", 1.0)
    assert line.goes_before(elsewhere, meter)  # nobody stands here
    line.add(Request("a", 1.0), meter)
    assert line.goes_before(elsewhere, meter)  # as many
    meter.take_place("b")
    assert not line.goes_before(elsewhere, meter)
    meter.take_place("a")
    line.rank("a", meter)
    assert line.goes_before(elsewhere, meter)


def test_before_others_of_its_owner_goes_who_came_before_them() -> None:
    meter, line = at_one_throttle()
    first, second, third = (Request("a", 1.0) for _ in range(3))
    first.number, second.number, third.number = 1, 2, 3
    line.add(second, meter)
    assert line.goes_before(first, meter)
    assert not line.goes_before(third, meter)


def test_nobody_goes_before_who_has_waited_for_all_its_turns() -> None:
    meter, line = at_one_throttle()
    for name, weight in (("a", 1.5), ("s", 0.5)) * 2:
        line.add(Request(name, weight), meter)
    assert turns(line, meter, 4) == "aaaa"
    assert not line.goes_before(Request("b", 2.0), meter)  # it would have 0.5 for its weight, s has 2
    assert turns(line, meter, 1) == "s"
    assert line.goes_before(Request("b", 2.0), meter)


def test_how_long_it_takes_is_told_from_the_pace_so_far() -> None:
    meter, line = Throttle(Key(SOURCE, "t")), Line[Request](100)
    for name in "abc":
        line.add(Request(name, 1.0), meter)
    assert line.outlook(400) is None
    for name in "xy":
        line.got_in(Request(name, 1.0))
    assert line.outlook(400) == 300 // 2 * 3


def test_an_owner_whose_first_request_is_taken_back_keeps_its_turn() -> None:
    """Its weight has changed since: its rank is another."""
    meter, line = at_one_throttle()
    first, second = Request("a", 1.0), Request("a", 2.0)
    line.add(first, meter)
    line.add(second, meter)
    line.remove(first, meter)
    assert line.peek(meter) is second
