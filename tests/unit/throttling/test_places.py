"""Fairness of connection places where requests need places of several throttles: nobody starves in any topology.

The same random topologies and the same oracle as for slots (`test_topologies`), and broken variants that it must catch;
and what the counts of a flow must keep through all of it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from proxy.throttling.flows import Places, Throttle, Ticket
from proxy.throttling.line import Line as Queue
from proxy.throttling.line import Request
from proxy.throttling.places import PlaceBook
from proxy.throttling.throttle import SECOND, Limit
from tests.unit.throttling.benches import MS, SOURCE, Bench, Key, part
from tests.unit.throttling.crowds import Crowd, check_places, judge_places, measured_places
from tests.unit.throttling.topologies import Line, Topology, Unfair, fair_shares

Patch = pytest.MonkeyPatch


def topology(places: dict[str, int], *lines: tuple[str, str], **weights: float) -> Topology:
    """Lines as (session, "throttle throttle")."""
    made = [Line(session, tuple(names.split())) for session, names in lines]
    limits = {name: Limit(count, 1) for name, count in places.items()}
    return Topology(limits, made, {line.session: weights.get(line.session, 1.0) for line in made})


@pytest.mark.parametrize("seed", range(0, 24, 4))
def test_everybody_gets_places(seed: int) -> None:
    """The promise for every topology: a third of max-min, or of the least share where sessions have several paths."""
    check_places(range(seed, seed + 4))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_crowds() -> None:
    check_places(range(100, 400), 20)


def test_who_would_come_next_is_who_does_and_asking_changes_nothing(monkeypatch: Patch) -> None:
    """In the random crowds, each time that places come free: nothing is said, or the truth; and mostly it is said."""
    release = PlaceBook.release
    told: Counter[str] = Counter()

    def ask_and_release(book: PlaceBook, places: Places, now: int) -> None:
        if places.open:
            heir, known = book.heir(places, now), len(book.admitted)
            release(book, places, now)
            admitted = book.admitted[known:]
            assert heir is None or heir is admitted[0]
            told["said" if heir else "not said" if admitted else "nobody"] += 1

    plain = [measured_places(one, seed, 5) for seed, one in enumerate(crossings())]
    monkeypatch.setattr(PlaceBook, "release", ask_and_release)
    assert [measured_places(one, seed, 5) for seed, one in enumerate(crossings())] == plain
    check_places(range(12))
    assert told["said"] > 5 * told["not said"], told
    assert told["nobody"], told


def crossings() -> list[Topology]:
    return [
        topology({"r1": 2, "r2": 2}, ("a", "r1"), ("b", "r2"), ("z", "r1 r2")),
        topology({"t": 6}, ("a", "t"), ("b", "t"), ("c", "t"), a=4.0, b=0.5, c=0.5),
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("places", [1, 2, 5])
def test_who_needs_two_places_gets_as_many_as_those_who_need_one(places: int, seed: int) -> None:
    """a under one rule, b under another, z under both: half of each rule's places for everybody.

    A single place has to stand empty until the other one comes free: that is what it costs not to starve.
    """
    crossing = topology({"r1": places, "r2": places}, ("a", "r1"), ("b", "r2"), ("z", "r1 r2"))
    held = measured_places(crossing, seed, 20)
    share = places / 2 * 20 * SECOND
    assert min(held.values()) >= (0.9 if places > 1 else 0.7) * share
    assert max(held.values()) <= (1.1 if places > 1 else 1.3) * share


@pytest.mark.parametrize("seed", range(3))
def test_requests_of_one_session_do_not_pass_each_other(seed: int) -> None:
    """Those that had their turn at t1 went before the older ones of the same session at t2, which got nothing."""
    crossing = topology({"t0": 1, "t1": 2, "t2": 1}, ("s", "t1"), ("z", "t0 t2"), ("z", "t1 t2"), z=2.0)
    _, apart, together = measured_places(crossing, seed, 20, 0.1).values()
    assert apart == pytest.approx(0.5 * 20 * SECOND, rel=0.3)
    assert together == pytest.approx(0.5 * 20 * SECOND, rel=0.3)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_kept_at_the_address_for_who_waits_for_a_rule_below_it(seed: int) -> None:
    """Whoever leaves the rule leaves the address, too: the place is there when it is needed, and not empty before."""
    both = [(name, "addr rule") for name in ("a", "b", "d")]
    alone = [(name, "addr") for name in ("c", "e", "f")]
    nested = topology({"addr": 3, "rule": 2}, *both, *alone, a=4.0, b=4.0, d=2.0, f=0.5)
    held = measured_places(nested, seed, 20)
    assert sum(held.values()) >= 0.97 * 3 * 20 * SECOND
    judge_places(held, {line: share / 2 for line, share in fair_shares(nested).items()}, 20)


def test_a_small_weight_gets_its_part_of_a_single_place() -> None:
    """The next whole place is more than it will ever get: it comes when so many turns have passed."""
    held = measured_places(topology({"t": 1}, ("a", "t"), ("b", "t"), a=4.0, b=0.5), 1, 30)
    a, b = held.values()
    assert b / (a + b) == pytest.approx(1 / 9, abs=0.03)


def test_weights_with_few_places() -> None:
    """6 places, 2:1:1: 3, 1.5 and 1.5, compared after adding one (before it: 2.4, 2.0, 1.6)."""
    held = measured_places(topology({"t": 6}, ("a", "t"), ("b", "t"), ("c", "t"), a=2.0), 1, 30)
    assert [count / 30 / SECOND for count in held.values()] == pytest.approx([3, 1.5, 1.5], rel=0.06)


def test_a_place_is_kept_for_who_has_had_all_turns_and_given_up_when_it_leaves() -> None:
    throttles = {name: Throttle(Key(SOURCE, name)) for name in "ab"}
    book = PlaceBook(lambda flow: False)
    for throttle in throttles.values():
        throttle.cap = 1
    a, b = throttles.values()
    first = book.admit("one", 1.0, (a,), (), 0)
    other = book.admit("two", 1.0, (b,), (), 0)
    both = book.admit("both", 1.0, (a, b), (), 0)
    later = book.admit("later", 1.0, (a,), (), 0)
    assert isinstance(first, Places)
    assert isinstance(other, Places)
    assert isinstance(both, Ticket)
    assert isinstance(later, Ticket)
    book.release(first, 0)
    assert (book.admitted, a.used) == ([], 0)  # kept until the place at b comes free
    book.cancel(both, 0)
    assert book.admitted == [later]
    assert a.line is None
    assert b.line is None


def test_who_came_first_goes_first_where_two_want_to_keep_the_same() -> None:
    """a and b cross at the middle: who came later gives up what was kept for it, and comes next."""
    left, middle, right = (Throttle(Key(SOURCE, name)) for name in ("left", "middle", "right"))
    book = PlaceBook(lambda flow: False)
    for throttle in (left, middle, right):
        throttle.cap = 1
    held = [book.admit(f"user{index}", 1.0, (each,), (), 0) for index, each in enumerate((left, middle, right))]
    old = book.admit("old", 1.0, (left, middle), (), 0)
    young = book.admit("young", 1.0, (right, middle), (), 0)
    assert isinstance(old, Ticket)
    assert isinstance(young, Ticket)
    users = [each for each in held if isinstance(each, Places)]
    book.release(users[2], 0)  # right is kept for the young one, and the middle
    book.release(users[0], 0)  # left is kept for the old one, and the middle
    assert book.admitted == []
    book.release(users[1], 0)
    assert book.admitted == [old]
    assert old.places is not None
    book.release(old.places, 0)
    assert book.admitted == [old, young]


def test_a_paused_flow_keeps_nothing() -> None:
    """A place is kept for an instance; it pauses, and the others may have it."""
    bench = Bench()
    manager = bench.manager
    sessions = {name: bench.session(name) for name in ("a", "b", "z")}
    keys = {name: Key(SOURCE, name) for name in ("r1", "r2")}
    for name, session in sessions.items():
        bench.register(session, *[(key, part(places=1)) for key in keys.values()][: 2 if name == "z" else 1])
    bench.register(sessions["b"], (keys["r2"], part(places=1)), id=1)

    def admit(name: str, id: int) -> Places | Ticket:
        session = sessions[name]
        return manager.admit(name, 1.0, SOURCE, "198.51.100.1", manager.flows(session, (id,)), bench.now)

    first, second = admit("a", 0), admit("b", 1)
    assert isinstance(first, Places)
    assert isinstance(second, Places)
    waiting = admit("z", 0)
    again = admit("a", 0)
    assert isinstance(waiting, Ticket)
    assert isinstance(again, Ticket)
    assert manager.release(first, bench.now) == []  # kept for z
    bench.register(sessions["z"], *[(key, part(places=1, paused=True)) for key in keys.values()])
    third = admit("a", 0)
    assert isinstance(third, Ticket)
    assert manager.cancel(third, bench.now) == [again]


# --- what must hold at any time ---


@pytest.mark.parametrize("seed", range(4))
def test_counts_of_a_flow_are_what_it_has(seed: int) -> None:
    """Open and waiting connections of each flow, and the throttles' lists of who has any, through whatever happens."""
    rng = random.Random(seed)
    bench = Bench()
    manager = bench.manager
    sessions = [bench.session(f"s{index}") for index in range(3)]
    paths = (("r1", "addr"), ("r2", "addr"), ("r1", "r2"))

    def register(index: int, id: int, paused: bool = False) -> None:
        parts = [(Key(SOURCE, name), part(places=3 + (name == "addr"), paused=paused)) for name in paths[id]]
        bench.register(sessions[index], *parts, id=id)

    for index in range(3):
        for id in range(3):
            register(index, id)
    held: list[Places] = []
    tickets: list[Ticket] = []
    for _ in range(600):
        index, id, what = rng.randrange(3), rng.randrange(3), rng.randrange(6)
        session = sessions[index]
        if what in (0, 1):
            answer = manager.admit(session.name, 1.0, SOURCE, "198.51.100.1", manager.flows(session, (id,)), bench.now)
            if isinstance(answer, Places):
                held.append(answer)
            else:
                tickets.append(answer)
        elif what == 2 and held:
            manager.release(held.pop(rng.randrange(len(held))), bench.now)
        elif what == 3 and tickets:
            manager.cancel(tickets.pop(rng.randrange(len(tickets))), bench.now)
        elif what == 4:
            register(index, id, paused=rng.random() < 0.5)
        elif what == 5 and held:
            old = held[rng.randrange(len(held))]
            new = manager.swap(old, session.name, 1.0, SOURCE, "198.51.100.1", manager.flows(session, (id,)), bench.now)
            if new is not None:
                held[held.index(old)] = new
        manager.take_admitted()
        held += [ticket.places for ticket in tickets if ticket.places is not None]
        tickets = [ticket for ticket in tickets if ticket.places is None]
        opened = Counter(flow for places in held for flow in places.flows)
        waiting = Counter(flow for ticket in tickets for flow in ticket.flows)
        for flow in [flow for each in sessions for flow in each.flows.values()]:
            assert (flow.places, flow.waiting_places) == (opened[flow], waiting[flow])
            for throttle in flow.path.throttles:
                assert throttle.terms is not None
                assert (flow in (throttle.terms.users or {})) == bool(opened[flow] or waiting[flow])
        for throttle in manager.throttles.values():
            assert throttle.used == sum(throttle in places.throttles for places in held)
        bench.run(rng.randrange(20 * MS))


# --- broken variants ---


def nothing_is_kept(patch: Patch) -> None:
    patch.setattr(PlaceBook, "_claim", lambda self, ticket, now: None)


def what_is_kept_is_taken(patch: Patch) -> None:
    patch.setattr(PlaceBook, "_full", lambda self, throttle, now, ticket=None, rated=True: throttle.full())


def weights_ignored(patch: Patch) -> None:
    init = Request.__init__
    patch.setattr(Request, "__init__", lambda self, owner, weight: init(self, owner, 1.0))


def whoever_is_first_by_name(patch: Patch) -> None:
    patch.setattr(Queue, "_first", lambda self, meter: min(self._owners, default=None))


def small_weights_wait_for_a_whole_place(patch: Patch) -> None:
    patch.setattr(Queue, "_overdue", lambda self, meter: None)


def turns_taken_from_elsewhere_do_not_count(patch: Patch) -> None:
    """Who gets in by its turn at another throttle is not seen by the line here."""
    patch.setattr(Queue, "got_in", lambda self, ticket: None)


MUTANTS = [
    nothing_is_kept,
    what_is_kept_is_taken,
    weights_ignored,
    whoever_is_first_by_name,
    small_weights_wait_for_a_whole_place,
    turns_taken_from_elsewhere_do_not_count,
]


def cross_and_check() -> None:
    crossing = topology({"r1": 2, "r2": 2}, ("a", "r1"), ("b", "r2"), ("z", "r1 r2"))
    promised = {line: share / 2 for line, share in fair_shares(crossing).items()}
    judge_places(measured_places(crossing, 1, 20), promised, 20)
    weighted = topology({"t": 6}, ("a", "t"), ("b", "t"), ("c", "t"), a=4.0, b=0.5, c=0.5)
    promised = {line: share / 2 for line, share in fair_shares(weighted).items()}
    judge_places(measured_places(weighted, 1, 20), promised, 20)
    check_places(range(12))


@pytest.mark.only_python("defects put in the place of functions")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mutant(monkeypatch)
    monkeypatch.setattr(Crowd, "check", lambda self: None)  # fairness alone
    with pytest.raises(Unfair):
        cross_and_check()


def test_what_the_variants_break_holds() -> None:
    cross_and_check()
