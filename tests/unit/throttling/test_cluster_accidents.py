"""Never over the limit, whatever dies: every accident, judged by sliding windows in true time.

Each world has a strict limit, and senders that always have more. After the accident the limit must be used again. Of a
few messages a minute one too many shows, of thousands a small part too many. The judge is judged by mutants: one of the
script, or of what decides, has to break either.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.settings import Rate
from proxy.throttling import cluster
from proxy.throttling.leasing import Leased
from proxy.throttling.membership import Clock
from tests.unit.throttling import accidents
from tests.unit.throttling.accidents import ACCIDENTS, Accident
from tests.unit.throttling.fake_store import SOURCE
from tests.unit.throttling.oracle import SECOND, Violation
from tests.unit.throttling.proxies import World, block

FEW, SOME, MANY = 4, 120, 3000
#: What a proxy that starts while nobody can tell it of the others goes by is configured; see docs/throttling.md.
KNOWN_ONLY_BY_THE_STORE = accidents.proxies_killed_while_alone

Patch = pytest.MonkeyPatch


def go_through(
    accident: Accident, seed: int, proxies: int = 2, members: int = 0, source: str = SOURCE, amount: int = SOME
) -> None:
    """The accident, and what must be true of it.

    Raises:
        Violation: too many went, or, when all was over, too few.
    """
    world = World(seed, [block(Rate(amount, 60))], proxies, members, source)
    world.run(12 if amount > FEW else 100)
    accident(world)
    world.run(30)
    world.judge(amount, 60)
    possible = amount / 60.8 * 10
    if amount > FEW and len(world.sent(world.now - 10 * SECOND)) < 0.9 * possible - 1:
        raise Violation(f"of {possible:.0f} in the last ten seconds only {len(world.sent(world.now - 10 * SECOND))}")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda accident: accident.__name__)
def test_no_window_sees_more_whatever_happens(accident: Accident, seed: int) -> None:
    go_through(accident, seed)


@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda accident: accident.__name__)
def test_no_window_sees_more_with_more_proxies_than_configured(accident: Accident) -> None:
    if accident is not KNOWN_ONLY_BY_THE_STORE:
        go_through(accident, 3, proxies=3, members=2)


@pytest.mark.parametrize("accident", [accidents.one_is_parted, accidents.copy_promoted, accidents.clock_set])
def test_not_even_one_too_many(accident: Accident) -> None:
    for seed in range(6):
        go_through(accident, seed, amount=FEW)


def test_calls_that_are_carried_out_late_mean_nothing() -> None:
    go_through(accidents.calls_held_up, 1, amount=MANY)


@pytest.mark.parametrize("seed", [4, 5, 6])
def test_no_window_sees_more_after_one_accident_upon_another(seed: int) -> None:
    go_through(accidents.everything, seed, proxies=3)


def test_a_call_that_is_carried_out_late_changes_nothing() -> None:
    world = World(1, [block(Rate(SOME, 60))])
    world.run(5)
    store, before = world.store, world.store.snapshot()[0]
    late = (world.now + store.ahead) // 1000 - 1
    members, limit, places = cluster.MEMBERS, b"{ga:yahoo:192.0.2.1}:m:60", b"{ga:yahoo:192.0.2.1}:m:p"
    word = before[limit][b"word"]
    home = before[members][b"home"]
    calls: list[tuple[bytes, tuple[bytes | int, ...]]] = [
        (members, (b"meet", b"proxy0", b"another", b"here", late, home, b"w", b"", 2, 0)),
        (limit, (b"slots", b"proxy0", late, word, 100, 10**9, 500_000, 1)),
        (places, (b"places", b"proxy0", late, word, b"run", 0, 1, 1, 1, 10, 5, 1, 0, b"+proxy0")),
    ]
    for key, arguments in calls:
        assert store.run([key], arguments)[1] == 1
        after = store.snapshot()[0]
        assert {name: fields for name, fields in after.items() if fields} == before


def test_who_is_one_too_many_has_no_share_before_all_know_of_it() -> None:
    """Two of two have been told so; a third gets its share when both have been told that they are three."""
    store = World(1, []).store

    def meet(name: str) -> int:
        reply = store.run([cluster.MEMBERS], (b"meet", name.encode(), b"r", b"here", 0, b"h", b"w", b"", 2, 0))
        members = dict(zip(reply[3::4], reply[6::4], strict=True))
        return members[name.encode()]

    assert [meet("a"), meet("b")] == [2, 2]
    assert [meet("c"), meet("a"), meet("c"), meet("b"), meet("c")] == [0, 3, 0, 3, 3]


def test_fewer_proxies_than_configured_leave_the_share_of_the_others() -> None:
    world = World(7, [block(Rate(600, 60))], proxies=2, members=3)
    world.run(130)
    world.judge(600, 60)
    assert 390 <= len(world.sent(world.now - 60 * SECOND)) <= 400


def test_without_the_store_each_has_its_share() -> None:
    world = World(8, [block(Rate(600, 60))], proxies=3)
    world.run(10)
    for line in accidents.lines(world):
        line.cut = True
    world.run(90)
    assert all(proxy.cluster.alone for proxy in world.proxies)
    counts = world.counts(world.now - 60 * SECOND)
    assert all(0.98 * 200 <= count <= 200 for count in counts.values())


def test_a_limit_smaller_than_the_members_stands_still_without_the_store() -> None:
    world = World(9, [block(Rate(2, 60))], proxies=3)
    world.run(130)
    before = len(world.sent())
    assert before >= 2
    for line in accidents.lines(world):
        line.cut = True
    world.run(10)
    since = world.now
    world.run(120)
    assert not world.sent(since)


# --- mutants of the script ---


def changed(old: str, new: str) -> str:
    assert SOURCE.count(old) >= 1, old
    return SOURCE.replace(old, new)


#: Name → the changed script, an accident that shows it, and of how many a minute.
SCRIPTS: dict[str, tuple[str, Accident, int]] = {
    "tat_refunded": (
        changed("'tat', whole(window.tat),", "'tat', whole(window.tat - (given < most and window.interval or 0)),"),
        accidents.nothing,
        SOME,
    ),
    "tat_forgotten": (changed("'tat', whole(window.tat),", "'tat', whole(now),"), accidents.nothing, SOME),
    "epoch_ignored": (
        changed("if state.word == word then\n      tat", "if state.word then\n      tat").replace(
            "state.home ~= home", "not state.home"
        ),
        accidents.copy_promoted,
        FEW,
    ),
    "new_key_is_empty": (
        changed("tat = now + math.max(ahead, ELSEWHERE) + burst * interval", "tat = now"),
        accidents.memory_flushed,
        SOME,
    ),
    "too_short_a_time_to_live": (changed("/ 1000 + KEEP)", "/ 1000000)"), accidents.nothing, SOME),
    "debt_forgiven_by_another_interval": (
        changed("return now + math.ceil((tat - now) * (new / old)) + 1", "return now"),
        accidents.one_is_parted,
        FEW,
    ),
}


def show(accident: Accident, amount: int, source: str = SOURCE) -> None:
    for seed in range(6):
        go_through(accident, seed, source=source, amount=amount)
        go_through(accident, seed, proxies=3, source=source, amount=amount)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_mutant_of_the_script_is_caught(name: str) -> None:
    source, accident, amount = SCRIPTS[name]
    with pytest.raises(Violation):
        show(accident, amount, source)


# --- mutants of what decides ---


def clock_trusted(patch: Patch) -> None:
    check = Clock.check

    def trusting(self: Clock, time: int, sent: int, received: int) -> bool:
        if not check(self, time, sent, received):
            check(self, time, sent, received)
        return True

    patch.setattr(Clock, "check", trusting)


def nothing_kept_for_the_silent(patch: Patch) -> None:
    patch.setattr(cluster, "left_for", lambda limit, members, configured, age: limit.amount)


def slots_of_a_share_are_not_told(patch: Patch) -> None:
    come_together = cluster.Cluster._come_together

    def silently(self: cluster.Cluster, now: int) -> list[Leased]:
        for throttle in self.throttles:
            throttle.alone_until = None
        return come_together(self, now)

    patch.setattr(cluster.Cluster, "_come_together", silently)


def share_begins_full(patch: Patch) -> None:
    go_alone = Leased.go_alone
    patch.setattr(Leased, "go_alone", lambda self, told, since, now: go_alone(self, told, since - 60 * SECOND, now))


def shares_are_whole(patch: Patch) -> None:
    go_alone = Leased.go_alone
    patch.setattr(Leased, "go_alone", lambda self, told, since, now: go_alone(self, 1, since, now))


DECIDING: list[tuple[Callable[[Patch], None], Accident, int]] = [
    (clock_trusted, accidents.clock_set, FEW),
    (nothing_kept_for_the_silent, accidents.one_is_parted, SOME),
    (slots_of_a_share_are_not_told, accidents.one_is_parted, FEW),
    (share_begins_full, accidents.one_is_parted, FEW),
    (shares_are_whole, accidents.store_away, SOME),
]


@pytest.mark.only_python("defects put in the place of functions")
@pytest.mark.parametrize(("mutant", "accident", "amount"), DECIDING, ids=[mutant[0].__name__ for mutant in DECIDING])
def test_a_mutant_of_what_decides_is_caught(
    mutant: Callable[[Patch], None], accident: Accident, amount: int, monkeypatch: Patch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(Violation):
        show(accident, amount)
