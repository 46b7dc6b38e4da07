"""The place book by itself, step by step: hand-overs, what is kept for whom, who goes before whom, what is told."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.throttling.flows import Flow, Path, Places, Receiver, Terms, Throttle, Ticket
from proxy.throttling.places import PlaceBook
from proxy.throttling.throttle import SECOND, Key, Limit
from tests.unit.throttling.benches import SOURCE


def throttle(name: str, cap: int = 1, rate: Limit | None = None, connections: bool = False) -> Throttle:
    """One with places, or, with a rate, one that counts connections; its first slot is there at 0."""
    made = Throttle(Key(SOURCE, name), counts=rate is not None)
    made.cap = cap
    made.connections = connections
    if rate is not None:
        made.limit_to((rate,), -1000 * SECOND, 0)
    return made


def flow(*throttles: Throttle) -> Flow:
    return Flow(Receiver("instance", 1.0), 0, Path(throttles))


class Book:
    """One whose flows are shut by putting them into a set."""

    def __init__(self) -> None:
        self.closed: set[Flow] = set()
        self._book = PlaceBook(self.closed.__contains__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._book, name)

    def ask(
        self, owner: str, *throttles: Throttle, now: int = 0, rated: bool = True, flows: tuple[Flow, ...] = ()
    ) -> Places | Ticket:
        return self._book.admit(owner, 1.0, throttles, flows, now, rated)

    def gets(self, owner: str, *throttles: Throttle, now: int = 0, rated: bool = True) -> Places:
        answer = self.ask(owner, *throttles, now=now, rated=rated)
        assert isinstance(answer, Places)
        return answer

    def waits(self, owner: str, *throttles: Throttle, now: int = 0, flows: tuple[Flow, ...] = ()) -> Ticket:
        answer = self.ask(owner, *throttles, now=now, flows=flows)
        assert isinstance(answer, Ticket)
        return answer


@pytest.fixture
def book() -> Book:
    return Book()


def test_who_got_in_waits_for_nothing(book: Book) -> None:
    a = throttle("a")
    held, waiting = book.gets("x", a), book.waits("y", a)
    assert (waiting.waiting, waiting.blocker) == (True, a)
    book.release(held, 0)
    assert (waiting.waiting, waiting.blocker, waiting.places is not None) == (False, None, True)


# --- hand-overs ---


def test_nothing_is_handed_over_that_was_closed_meanwhile(book: Book) -> None:
    a = throttle("a")
    old = book.gets("x", a)
    book.release(old, 0)
    assert book.swap(old, "y", 1.0, (a,), (), 0) is None
    assert a.used == 0


def test_nothing_is_handed_over_to_who_is_held_back(book: Book) -> None:
    """One of its flows is enough."""
    a, b = throttle("a"), throttle("b")
    old, flows = book.gets("x", a), (flow(b), flow(b))
    book.closed.add(flows[1])
    assert book.swap(old, "y", 1.0, (b,), flows, 0) is None
    assert (a.used, b.used, old.open) == (1, 0, True)
    book.closed.clear()
    assert book.swap(old, "y", 1.0, (b,), flows, 0) is not None


def test_nothing_is_handed_over_where_one_of_several_throttles_is_full(book: Book) -> None:
    a, b, c = throttle("a"), throttle("b"), throttle("c")
    old = book.gets("x", a)
    book.gets("y", b)
    assert book.swap(old, "z", 1.0, (b, c), (), 0) is None
    assert (a.used, b.used, c.used) == (1, 1, 0)


def test_a_hand_over_goes_behind_those_in_line_as_who_comes_anew_does(book: Book) -> None:
    """There is room for more since a moment, and nobody was let in yet."""
    a, b = throttle("a"), throttle("b")
    old = book.gets("x", a)
    book.gets("y", b)
    book.waits("y", b)
    b.cap = 5
    assert book.swap(old, "z", 1.0, (b,), (), 0) is None
    book.waits("z", b)


def test_a_hand_over_takes_a_slot_of_its_new_path_but_of_none_for_new_connections(book: Book) -> None:
    a, paced, fresh = throttle("a"), throttle("p", 0, Limit(1, 10)), throttle("f", 0, Limit(1, 10), connections=True)
    book.gets("z", fresh)
    old = book.gets("x", a)
    new = book.swap(old, "y", 1.0, (paced, fresh), (), 0)
    assert new is not None
    assert (paced.taken, fresh.taken) == (1, 1)
    assert book.swap(book.gets("x", a), "y", 1.0, (paced,), (), 0) is None


# --- slots of connections ---


def test_a_connection_takes_a_slot_if_nothing_else_is_said() -> None:
    paced = throttle("p", 0, Limit(1, 10))
    PlaceBook(lambda flow: False).admit("x", 1.0, (paced,), (), 0)
    assert paced.taken == 1


def test_who_needs_no_slot_passes_those_who_wait_for_one(book: Book) -> None:
    paced, a = throttle("p", 0, Limit(1, 10)), throttle("a", 9)
    book.gets("x", paced)
    waiting = book.waits("x", paced)
    book.gets("y", paced, rated=False)
    assert book.swap(book.gets("y", a), "y", 1.0, (paced,), (), 0, rated=False) is not None
    assert waiting.places is None


def test_who_needs_one_does_not_though_its_time_has_come(book: Book) -> None:
    """The wheel has not turned yet; whoever has fewest places stands in line as well."""
    paced, a = throttle("p", 0, Limit(1, 10)), throttle("a")
    book.gets("x", paced)
    waiting = book.waits("x", paced)
    book.waits("y", paced, now=10 * SECOND)
    assert book.swap(book.gets("y", a), "y", 1.0, (paced,), (), 10 * SECOND) is None
    book.pump(paced, 10 * SECOND)
    assert waiting.places is None  # y has fewer
    assert [ticket.owner for ticket in book.admitted] == ["y"]


def test_a_slot_is_there_within_its_microsecond(book: Book) -> None:
    paced = throttle("p", 0, Limit(1, 10))
    book.gets("x", paced)
    slot = paced.earliest(0)
    book.cancel(book.waits("x", paced, now=slot - 1000), 0)
    book.gets("x", paced, now=slot - 999)


def test_a_slot_is_kept_for_who_waits_for_slots_only(book: Book) -> None:
    first, second = throttle("1", 0, Limit(1, 10)), throttle("2", 0, Limit(1, 10))
    book.gets("x", first)
    book.gets("x", second, now=5 * SECOND)
    both = book.waits("z", first, second, now=6 * SECOND)
    book.pump(first, 10 * SECOND)
    assert both.blocker is second
    late = book.waits("y", first, now=10 * SECOND)
    book.gets("y", first, now=10 * SECOND, rated=False)
    book.pump(second, 15 * SECOND)
    assert both.places is not None
    assert late.places is None


def test_no_slot_is_kept_for_who_waits_for_a_place_too(book: Book) -> None:
    """It may take its time."""
    first, second, full = throttle("1", 0, Limit(1, 10)), throttle("2", 0, Limit(1, 10)), throttle("f")
    for each, now in ((first, 0), (second, 5 * SECOND), (full, 0)):
        book.gets("x", each, now=now)
    both = book.waits("z", first, second, full, now=6 * SECOND)
    book.pump(first, 10 * SECOND)
    assert both.blocker is second
    book.gets("y", first, now=10 * SECOND)


# --- what is kept ---


def test_a_place_is_kept_though_nobody_stands_in_line_there(book: Book) -> None:
    a, b = throttle("a"), throttle("b")
    held = [book.gets("x", a), book.gets("x", b)]
    both = book.waits("z", a, b)
    book.release(held[0], 0)
    assert a.line is not None
    assert (a.line.size, a.line.claim, both.blocker) == (0, both, b)
    book.waits("y", a)
    book.release(held[1], 0)
    assert both.places is not None


def test_one_place_is_kept_and_not_all(book: Book) -> None:
    """Who comes anew stands behind nobody, and has the others; so has who is handed a connection."""
    a, b, c = throttle("a", 3), throttle("b"), throttle("c")
    held = [book.gets("x", a) for _ in range(3)]
    book.gets("x", b)
    book.waits("z", a, b)
    for each in held:
        book.release(each, 0)
    book.gets("y", a)
    assert book.swap(book.gets("y", c), "y", 1.0, (a,), (), 0) is not None
    book.waits("y", a)


def test_nothing_is_kept_where_there_is_no_limit(book: Book) -> None:
    a, free, b = throttle("a"), throttle("free", 0), throttle("b")
    held = book.gets("x", a)
    book.gets("x", b)
    book.waits("z", a, free, b)
    book.release(held, 0)
    book.gets("y", free)


def test_who_has_had_all_its_turns_says_where_places_are_wanted(book: Book) -> None:
    a, b, c = throttle("a"), throttle("b"), throttle("c")
    held = book.gets("x", a)
    for each in (b, c):
        book.gets("x", each)
    book.waits("z", a, b, c)
    assert list(book.blocked) == [a]
    book.blocked.clear()
    book.release(held, 0)
    assert set(book.blocked) == {b, c}


def crossed(book: Book, *more: Throttle) -> tuple[Ticket, Ticket, list[Throttle], list[Places]]:
    """Two that want the middle, the old one with left and the young one with right, and who holds the three."""
    row = [throttle(name) for name in ("left", "middle", "right")]
    held = [book.gets("x", each) for each in row]
    for each in more:
        book.gets("x", each)
    left, middle, right = row
    return book.waits("old", left, middle), book.waits("young", right, *more, middle), row, held


def test_who_gives_up_what_was_kept_for_it_gives_up_all(book: Book) -> None:
    old, young, (_, middle, right), held = crossed(book)
    book.release(held[2], 0)
    book.waits("y", right)  # kept for the young one
    book.release(held[0], 0)
    assert middle.line is not None
    assert (middle.line.claim, young.blocker) == (old, middle)
    assert right.line is None
    assert [ticket.owner for ticket in book.admitted] == ["y"]


def test_who_came_later_stands_where_it_is_kept_for_who_came_first(book: Book) -> None:
    old, young, (_, middle, right), held = crossed(book, throttle("more"))
    book.release(held[0], 0)
    book.release(held[2], 0)
    assert middle.line is not None
    assert (middle.line.claim, young.blocker) == (old, middle)
    book.gets("y", right)  # nothing is kept for the young one
    book.cancel(young, 0)
    assert middle.line.claim is old


def test_who_is_held_back_begins_anew_with_its_turns(book: Book) -> None:
    a, b = throttle("a"), throttle("b")
    held = [book.gets("x", a), book.gets("x", b)]
    mine = flow(a, b)
    both = book.waits("z", a, b, flows=(mine,))
    book.release(held[0], 0)
    other = book.waits("y", a)
    book.closed.add(mine)
    book.shut(mine, 0)
    assert book.admitted == [other]
    waiting = book.waits("y", a)
    book.release(held[1], 0)
    assert (both.blocker, both.turns, mine.gated) == (mine, frozenset(), [both])
    book.closed.clear()
    book.retry(mine, 0)
    assert both.blocker is a
    assert waiting.blocker is a


def test_a_place_is_not_kept_for_who_is_held_back(book: Book) -> None:
    """And is, when it is another's flow that is."""
    a, b = throttle("a"), throttle("b")
    held = book.gets("x", a)
    book.gets("x", b)
    mine, other = flow(a, b), flow(a)
    book.waits("z", a, b, flows=(mine,))
    book.release(held, 0)
    book.closed.add(other)
    book.shut(other, 0)
    book.cancel(book.waits("y", a), 0)
    book.closed.add(mine)
    book.gets("y", a)


# --- nested limits ---


@pytest.mark.parametrize("apart", [None, "before", "after"])
def test_what_comes_free_together_is_not_kept_apart(book: Book, apart: str | None) -> None:
    """All who hold the rule hold the address: its place comes with the rule's. Not if one holds the rule alone."""
    address, rule, more = throttle("address", 4), throttle("rule", 2), throttle("more", 9)
    for when in ("before", None, "after"):
        if when is None or when == apart:
            book.gets("x", *((address,) if when is None else ()), rule)
    if apart is None:
        book.gets("x", address, rule)
    leaving = book.gets("x", address)
    while not address.full():
        book.gets("x", address)
    waiting = book.waits("z", address, rule, more)
    book.release(leaving, 0)
    assert waiting.blocker is rule
    assert isinstance(book.ask("y", address), Places if apart is None else Ticket)


def test_what_comes_free_together_is_known_when_some_have_left(book: Book) -> None:
    address, rule = throttle("address", 3), throttle("rule", 2)
    first, _, leaving = book.gets("x", address, rule), book.gets("x", address, rule), book.gets("x", address)
    book.release(first, 0)
    book.gets("x", address, rule)
    waiting = book.waits("z", address, rule)
    book.release(leaving, 0)
    assert waiting.blocker is rule
    book.gets("y", address)


# --- what happens elsewhere ---


def test_what_is_kept_is_free_for_others_when_its_ticket_cannot_use_it_any_more(book: Book) -> None:
    """The rule closes, and its places come with the address's: who waits for the address alone gets in at once."""
    address, rule, third = throttle("address", 2), throttle("rule", 2), throttle("third")
    leaving = book.gets("x", address)
    for path in ((address, rule), (third,)):
        book.gets("x", *path)
    book.waits("z", address, rule, third)
    book.release(leaving, 0)
    other = book.waits("y", address)
    rule.closed_until = 3600 * SECOND
    book.pump(rule, 0)
    assert book.admitted == [other]


def test_who_needs_no_slot_gets_in_when_the_one_before_it_gives_up(book: Book) -> None:
    fast = throttle("fast", 1, Limit(1, 30))
    held = book.gets("x", fast)
    first, second = book.waits("z", fast), book.ask("y", fast, rated=False)
    book.release(held, 0)
    assert not book.admitted
    book.cancel(first, 0)
    assert book.admitted == [second]


# --- what is told ---


def test_a_line_that_moved_is_told_and_one_that_ended(book: Book) -> None:
    a = throttle("a")
    held = book.gets("x", a)
    first, second = book.waits("y", a), book.waits("y", a)
    book.crowded.clear()
    book.release(held, 0)
    assert list(book.crowded) == [a]
    book.crowded.clear()
    book.idle.clear()
    book.cancel(second, 0)
    assert (list(book.crowded), list(book.idle), a.line) == ([a], [a], None)
    book.crowded.clear()
    book.cancel(first, 0)
    assert not book.crowded
    book.pump(a, 0)
    assert not book.crowded


def test_a_place_that_comes_back_is_told_where_there_is_advice(book: Book) -> None:
    a, terms = throttle("a", 2), Terms()
    held = [book.gets("x", a), book.gets("x", a)]
    book.release(held[0], 0)
    a.terms = terms
    book.gets("x", a)
    book.release(held[1], 0)
    assert not book.crowded
    terms.advice = {}
    book.release(book.gets("x", a), 0)
    assert list(book.crowded) == [a]
