"""The throttle manager: sessions, limits of several instances, demand, grants, returns, backoff, figures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from proxy.errors import NameInUse
from proxy.policy.limits import Limits
from proxy.protocols.native.auth import Fences
from proxy.throttling import registry
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.limits import BackoffRule, Effective, Mode, Part, reconcile
from proxy.throttling.session import End, GrantRecord, Session
from proxy.throttling.throttle import SECOND, TICK, Key, Limit
from tests.unit.throttling.benches import ALL, KEY, MS, OTHER, SOURCE, Bench, count, part


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- grants ---


def test_an_idle_throttle_grants_in_the_same_call(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(350, 3600))))
    bench.collect()
    bench.want(session, 5)
    assert bench.collect() == {"a": [GrantRecord(0, 1, 0, 0, 2_000_000)]}


def test_slots_come_at_their_pace_and_a_tick_ahead(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(10, 1))))
    bench.collect()
    bench.want(session, 1000)
    assert count(bench.collect()) == {"a": 1}
    assert count(bench.run(10 * SECOND)) == {"a": 100}
    assert bench.manager.active_throttles(bench.now) == 1


def test_grants_echo_the_clients_ping(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(10, 1))))
    bench.now += 40 * MS
    bench.want(session, 1)
    output = bench.output(session)
    assert (output.ping_t, output.hold_us) == ((bench.now - 40 * MS) // 1000, 40_000)
    assert [limit.slack_us for limit in output.limits] == [100_000]


def test_without_a_limit_everything_is_granted(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part()))
    bench.want(session, 10**6)
    assert bench.collect() == {"a": [GrantRecord(0, 10**6, 0, 0, 2_000_000)]}


def test_demand_that_crosses_a_grant_is_not_granted_twice(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(1000, 1))))
    bench.want(session, 10)
    bench.run(SECOND)
    assert bench.got[session] == 10
    bench.want(session, 4, got=6)  # sent before the last four arrived
    assert bench.run(SECOND) == {}
    bench.want(session, 4, got=10)
    assert count(bench.run(SECOND)) == {"a": 4}


def test_want_zero_with_grants_in_flight(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(100, 1))))
    bench.want(session, 10**6)
    bench.run(SECOND)
    bench.want(session, 0, got=3)
    assert bench.run(SECOND) == {}


def test_counters_wrap(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(1000, 1))))
    session.flows[0].granted = bench.got[session] = 2**32 - 3
    bench.want(session, 10)
    assert count(bench.run(SECOND)) == {"a": 10}
    bench.want(session, 5, got=4)  # 2**32 + 4: three of the ten are under way
    assert count(bench.run(SECOND)) == {"a": 2}
    bench.manager.give_back(session, 0, 2**32 - 1, 3, bench.now)  # old slots: accepted or forgotten, never an error


def test_more_got_than_granted_gains_nothing(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(1000, 1))))
    bench.want(session, 5, got=10**6)
    assert count(bench.run(SECOND)) == {"a": 5}


def test_a_path_takes_from_all_its_throttles_or_none(bench: Bench) -> None:
    """Four paths below one limit for the address: it holds for all together, and each has its own."""
    session = bench.session("a")
    for id in range(4):
        bench.register(session, (Key(SOURCE, f"rule{id}"), part(Limit(10, 1))), (ALL, part(Limit(20, 1))), id=id)
        bench.want(session, 10**6, id=id)
    grants = bench.run(10 * SECOND)["a"]
    for id in range(4):
        assert sum(grant.n for grant in grants if grant.id == id) == pytest.approx(50, abs=2)
    assert sum(grant.n for grant in grants) == pytest.approx(200, abs=2)


def test_a_path_that_is_held_up_elsewhere_does_not_hold_up_others(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(1, 3600))), (ALL, part(Limit(20, 1))), id=0)
    bench.register(session, (OTHER, part(Limit(100, 1))), (ALL, part(Limit(20, 1))), id=1)
    bench.want(session, 100, id=0)
    bench.want(session, 10**6, id=1)
    grants = bench.run(10 * SECOND)["a"]
    assert sum(grant.n for grant in grants if grant.id == 0) == 1
    assert sum(grant.n for grant in grants if grant.id == 1) >= 198


@pytest.mark.parametrize(("sessions", "paths"), [(1, 10), (5, 10), (3, 2)])
def test_paths_that_share_a_throttle_waste_none_of_it(bench: Bench, sessions: int, paths: int) -> None:
    """The rules together allow as much as the address: slots must be taken in their order, or most are skipped."""
    for index in range(sessions):
        session = bench.session(f"s{index}")
        for id in range(paths):
            rule = (Key(SOURCE, f"rule{id}"), part(Limit(1000 // paths, 1)))
            bench.register(session, rule, (ALL, part(Limit(1000, 1))), id=id)
            bench.want(session, 10**6, id=id)
    bench.run(SECOND)
    shares = count(bench.run(5 * SECOND))
    assert sum(shares.values()) >= 5000 * 0.99
    assert max(shares.values()) - min(shares.values()) <= 0.02 * 5000 / sessions


# --- fairness ---


def saturated(bench: Bench, weights: Sequence[float]) -> list[int]:
    for index, weight in enumerate(weights):
        session = bench.session(f"s{index}", weight)
        bench.register(session, (KEY, part(Limit(100, 1))))
        bench.want(session, 10**6)
    shares = count(bench.run(20 * SECOND))
    return [shares[f"s{index}"] for index in range(len(weights))]


def test_equal_shares(bench: Bench) -> None:
    shares = saturated(bench, [1.0] * 7)
    assert max(shares) - min(shares) <= 5  # the first one was alone for five slots
    assert sum(shares) >= 2000


def test_weights(bench: Bench) -> None:
    light, heavy = saturated(bench, [1.0, 3.0])
    assert heavy == pytest.approx(3 * light, abs=12)


def test_weights_have_bounds(bench: Bench) -> None:
    light, heavy = saturated(bench, [1e-9, 1e9])
    assert light == pytest.approx(heavy / 256, abs=6)  # it was alone for five slots


def test_each_of_n_gets_one_of_n_slots(bench: Bench) -> None:
    """In the order of the slots, any five in a row belong to five sessions."""
    for index in range(5):
        session = bench.session(f"s{index}")
        bench.register(session, (KEY, part(Limit(40, 1))))
        bench.want(session, 1000)
    order: list[tuple[int, str]] = []
    bench.collect()
    for _ in range(200):
        bench.now += TICK
        bench.manager.advance(bench.now)
        for name, grants in bench.collect().items():
            for grant in grants:
                order += [
                    (bench.now + (grant.first_offset_us + i * grant.step_us) * 1000, name) for i in range(grant.n)
                ]
    names = [name for _, name in sorted(order)]
    assert len(names) >= 150
    assert all(len(set(names[i : i + 5])) == 5 for i in range(len(names) - 5))


def test_two_paths_of_one_session_are_one_session(bench: Bench) -> None:
    greedy, modest = bench.session("greedy"), bench.session("modest")
    for id in range(4):
        bench.register(greedy, (ALL, part(Limit(100, 1))), (Key(SOURCE, f"r{id}"), part()), id=id)
        bench.want(greedy, 10**6, id=id)
    bench.register(modest, (ALL, part(Limit(100, 1))))
    bench.want(modest, 10**6)
    shares = count(bench.run(10 * SECOND))
    assert shares["greedy"] == pytest.approx(shares["modest"], abs=5)


def test_joining_again_and_again_gains_nothing(bench: Bench) -> None:
    """Demand that flaps between zero and much: no turns are saved up and none are won."""
    flapping, steady = bench.session("flapping"), bench.session("steady")
    for session in (flapping, steady):
        bench.register(session, (KEY, part(Limit(100, 1))))
        bench.want(session, 10**6)
    totals = {"flapping": 0, "steady": 0}
    for _ in range(200):
        bench.want(flapping, 0)
        bench.want(flapping, 10**6)
        for name, n in count(bench.run(50 * MS)).items():
            totals[name] += n
    assert totals["flapping"] <= totals["steady"] + 5


def test_a_hoarder_gets_its_share_and_no_more(bench: Bench) -> None:
    """It asks for everything and uses nothing; the other has half of the slots, as if it were honest."""
    hoarder, honest = bench.session("hoarder"), bench.session("honest")
    for session in (hoarder, honest):
        bench.register(session, (KEY, part(Limit(100, 1))))
        bench.want(session, 2**32 - 1)
    shares = count(bench.run(10 * SECOND))
    assert abs(shares["honest"] - shares["hoarder"]) <= 5


# --- returns ---


def two(bench: Bench, limit: Limit) -> tuple[Session, Session]:
    a, b = bench.session("a"), bench.session("b")
    for session in (a, b):
        bench.register(session, (KEY, part(limit)))
    bench.collect()
    return a, b


def test_a_returned_slot_goes_to_another_as_it_is(bench: Bench) -> None:
    a, b = two(bench, Limit(60, 60))
    bench.want(a, 1)
    granted = bench.collect()["a"][0]
    bench.want(b, 1)
    assert bench.collect() == {}
    bench.now += 10 * MS
    bench.manager.give_back(a, 0, 0, 1, bench.now)
    again = bench.collect()["b"][0]
    assert again.first_offset_us == granted.first_offset_us - 10_000  # the same instant
    assert bench.run(900 * MS) == {}  # and nothing was refunded


def test_a_slot_is_returned_once(bench: Bench) -> None:
    a, b = two(bench, Limit(60, 60))
    bench.want(a, 1)
    bench.collect()
    bench.want(b, 5)
    for _ in range(3):
        bench.manager.give_back(a, 0, 0, 1, bench.now)
    assert count(bench.collect()) == {"b": 1}


def test_what_is_not_held_cannot_be_returned(bench: Bench) -> None:
    a, b = two(bench, Limit(60, 60))
    bench.want(a, 1)
    bench.collect()
    bench.want(b, 5)
    for first, n in ((1, 1), (2**32 - 1, 1), (5, 2**31), (2**31, 7)):
        bench.manager.give_back(a, 0, first, n, bench.now)
    bench.manager.give_back(b, 0, 0, 1, bench.now)  # a's slot, not b's
    bench.manager.give_back(a, 99, 0, 1, bench.now)  # a path that is not registered
    assert bench.collect() == {}


def test_a_slot_that_is_nearly_too_old_is_not_given_out_again(bench: Bench) -> None:
    a, b = two(bench, Limit(60, 60))
    bench.want(a, 1)
    bench.collect()
    bench.want(b, 1)
    bench.now += 250 * MS - TICK + 1  # slack 250 ms, and a tick must be left
    bench.manager.give_back(a, 0, 0, 1, bench.now)
    assert bench.collect() == {}


def test_part_of_a_run_comes_back(bench: Bench) -> None:
    a, b = two(bench, Limit(1000, 1))
    bench.want(a, 10)
    bench.run(20 * MS)
    assert bench.got[a] == 10
    bench.manager.give_back(a, 0, 4, 3, bench.now)
    bench.manager.give_back(a, 0, 9, 1, bench.now)
    bench.manager.give_back(a, 0, 2, 5, bench.now)  # 4, 5 and 6 were returned before
    bench.want(b, 6)
    grants = bench.collect()["b"]
    assert sum(grant.n for grant in grants) == 6


def test_returned_slots_wait_for_demand(bench: Bench) -> None:
    a, b = two(bench, Limit(60, 60))
    bench.want(a, 1)
    bench.collect()
    bench.manager.give_back(a, 0, 0, 1, bench.now)
    bench.want(b, 1)
    assert count(bench.collect()) == {"b": 1}


def test_returned_slots_go_to_who_still_stands_in_the_queue(bench: Bench) -> None:
    """Its queue was empty for a moment, and nobody had come to its place in the throttle's meanwhile."""
    a = two(bench, Limit(60, 60))[0]
    bench.want(a, 3)
    assert count(bench.collect()) == {"a": 1}
    bench.want(a, 0)
    bench.manager.give_back(a, 0, 0, 1, bench.now)
    bench.want(a, 1)
    assert count(bench.collect()) == {"a": 1}


def test_slots_of_a_lost_session_are_not_given_out_again(bench: Bench) -> None:
    a, b = two(bench, Limit(60, 60))
    bench.want(a, 1)
    bench.collect()
    bench.manager.lost(a, bench.now)
    bench.manager.give_back(a, 0, 0, 1, bench.now)
    bench.want(b, 1)
    assert bench.run(900 * MS) == {}
    assert count(bench.run(200 * MS)) == {"b": 1}


# --- who gets none ---


def test_a_slow_consumer_gets_no_grants_and_costs_nobody(bench: Bench) -> None:
    slow, quick = two(bench, Limit(100, 1))
    bench.manager.congest(slow, True, bench.now)
    bench.want(slow, 10**6)
    bench.want(quick, 10**6)
    shares = count(bench.run(5 * SECOND))
    assert "slow" not in shares
    assert shares["b"] >= 499
    bench.manager.congest(slow, False, bench.now)
    assert slow in bench.manager.take_ready()  # what gathered meanwhile is to be fetched
    shares = count(bench.run(5 * SECOND))
    assert shares["a"] == pytest.approx(shares["b"], abs=2)


def test_a_client_that_never_pings_gets_nothing(bench: Bench) -> None:
    session = bench.manager.hello("a", b"1", "a.example", 1.0, bench.now)
    bench.register(session, (KEY, part(Limit(100, 1))))
    bench.want(session, 10)
    assert bench.run(2 * SECOND) == {}
    bench.manager.ping(session, 1, bench.now)
    assert count(bench.run(SECOND)) == {"a": 10}


def test_no_grants_after_three_seconds_dead_after_five(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(10, 1))))
    bench.collect()
    bench.quiet.add(session)
    bench.want(session, 10**6)
    assert count(bench.run(3 * SECOND))["a"] >= 29
    assert "a" not in count(bench.run(1900 * MS))
    assert bench.manager.take_ended() == []
    bench.run(2 * SECOND)
    assert bench.manager.take_ended() == [session]
    assert session.end is End.SILENT
    assert bench.manager.sessions == {}


def test_late_pongs_bring_a_session_back(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(10, 1))))
    bench.collect()
    bench.quiet.add(session)
    bench.want(session, 10**6)
    bench.run(4 * SECOND)
    bench.manager.pong(session, bench.now // 1000 - 500, 0, bench.now)
    bench.quiet.clear()
    assert count(bench.run(2 * SECOND))["a"] >= 19


def test_a_pong_from_the_future_measures_nothing(bench: Bench) -> None:
    session = bench.session("a")
    bench.run(SECOND)
    seen = session.pong_at
    bench.now += SECOND
    bench.manager.pong(session, bench.now // 1000 + 5_000_000, 0, bench.now)
    assert session.pong_at == seen


# --- sessions ---


def test_a_new_run_takes_the_name_and_the_old_one_stays_out() -> None:
    bench, fences = Bench(), Fences()
    fences.claim("a", b"one", "10.0.0.1")
    old = bench.session("a", run=b"one")
    bench.register(old, (KEY, part(Limit(60, 60))))
    bench.want(old, 100)
    fences.claim("a", b"two", "10.0.0.2")
    new = bench.session("a", run=b"two")
    assert (old.end, bench.manager.take_ended()) == (End.FENCED, [old])
    assert bench.manager.sessions == {"a": new}
    with pytest.raises(NameInUse, match=r"10\.0\.0\.2"):
        fences.claim("a", b"one", "10.0.0.1")
    bench.want(old, 100)
    assert "a" not in count(bench.run(3 * SECOND))


def test_the_same_run_reconnects(bench: Bench) -> None:
    old = bench.session("a")
    bench.register(old, (KEY, part(Limit(60, 60))))
    new = bench.session("a")
    bench.register(new, (KEY, part(Limit(60, 60))))
    assert old.end is End.REPLACED
    bench.want(new, 2)
    assert count(bench.run(2 * SECOND)) == {"a": 2}


def test_flapping_does_not_empty_a_debt(bench: Bench) -> None:
    """A 1/min limit, and an instance that comes and goes all the time: one a minute."""
    total = 0
    for index in range(60):
        session = bench.session("a", run=bytes([index]))
        bench.register(session, (KEY, part(Limit(1, 60))))
        bench.want(session, 5)
        total += sum(count(bench.run(SECOND)).values())
        if index % 2:
            bench.manager.bye(session, bench.now)
        else:
            bench.manager.lost(session, bench.now)
    assert total == 1


def test_a_key_is_forgotten_when_its_debt_is_paid_and_not_before(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(60, 3600))))
    bench.want(session, 1)
    bench.collect()
    bench.manager.bye(session, bench.now)
    throttles = bench.manager.throttles
    bench.run(59 * SECOND)
    assert KEY in throttles
    assert bench.manager.active_throttles(bench.now) == 1
    bench.run(3 * SECOND)
    assert KEY not in throttles
    assert bench.manager.active_throttles(bench.now) == 0
    bench.run(300 * SECOND)  # for so long a MAIL may be under way with the permit, which has lapsed
    assert bench.manager.next_wakeup() is None  # nothing is scanned while idle


def test_a_session_names_so_many_throttles_and_no_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_NAMED", 5)
    a, b = bench.session("a"), bench.session("b")
    few, keys = part(Limit(100, 1)), [Key(SOURCE, str(number)) for number in range(6)]
    bench.register(a, *[(key, few) for key in keys[:4]], id=0)
    bench.register(a, (keys[0], few), id=1)  # named twice, counted twice
    for id, fresh in ((2, keys[5]), (3, keys[0])):
        with pytest.raises(ValueError, match=r"more than 5 throttles, the limit .* bind an id that is not needed"):
            bench.register(a, (fresh, few), id=id)
    with pytest.raises(ValueError, match="limit for a session"):
        bench.register(a, (keys[4], few), (keys[5], few), id=1)
    assert keys[4] not in bench.manager.throttles
    assert sorted(a.flows) == [0, 1]
    bench.register(b, (keys[5], few), id=0)  # another session's is its own
    bench.register(a, *[(key, part(Limit(50, 1))) for key in keys[:4]], id=0)  # the same again, with other limits
    bench.want(a, 1, id=1)
    assert count(bench.run(SECOND)) == {"a": 1}
    bench.register(a, (keys[0], few), id=0)
    bench.register(a, *[(key, few) for key in keys[:3]], id=2)
    assert a.named == 5


def test_all_sessions_together_have_so_many_throttles(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MAX_THROTTLES", 3)
    a, b = bench.session("a"), bench.session("b")
    few, keys = part(Limit(100, 1)), [Key(SOURCE, str(number)) for number in range(4)]
    for id, key in enumerate(keys[:2]):
        bench.register(a, (key, few), id=id)
    with pytest.raises(ValueError, match="for all instances together"):
        bench.register(b, (keys[2], few), (keys[3], few), id=0)
    bench.register(b, (keys[1], few), (keys[2], few), id=0)
    with pytest.raises(ValueError, match="again when others are gone"):
        bench.register(b, (keys[3], few), id=1)
    bench.register(b, *[(key, few) for key in keys[:3]], id=1)  # these are known
    bench.manager.bye(a, bench.now)
    bench.register(b, (keys[1], few), id=1)
    bench.register(b, (keys[3], few), id=2)
    assert set(bench.manager.throttles) == set(keys[1:])


def test_a_throttle_that_was_never_used_is_forgotten_at_once_and_comes_back_with_its_debt() -> None:
    bench = Bench(age=10 * SECOND)
    session = bench.session("a")
    slow = part(Limit(1, 60))
    for number in range(5):
        bench.register(session, (Key(SOURCE, str(number)), slow))
    assert list(bench.manager.throttles) == [Key(SOURCE, "4")]
    bench.register(session, (KEY, slow))
    bench.register(session, (OTHER, slow))
    bench.register(session, (KEY, slow))
    bench.want(session, 1)
    assert bench.run(49 * SECOND) == {}
    assert count(bench.run(20 * SECOND)) == {"a": 1}  # a minute after the manager's start, as without all that


def test_reregistering_a_path_with_other_throttles(bench: Bench) -> None:
    a, b = two(bench, Limit(60, 60))
    bench.want(a, 10, ram=10)
    bench.collect()
    bench.register(a, (OTHER, part(Limit(60, 60))))
    assert (a.ram, bench.manager.take_admitted()) == (0, [])
    assert bench.run(2 * SECOND) == {}  # the demand was for the old path
    bench.want(a, 1, got=0)
    bench.want(b, 1)
    assert count(bench.run(SECOND)) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [(KEY, part(Limit(5, 60))), (KEY, part(Limit(5, 60)))],
        [(KEY, part(Limit(5, 60, 5)))],
        [(KEY, part(Limit(5, 60), backoff=BackoffRule(rate=Limit(2, 60, 2))))],
    ],
)
def test_bad_registrations_change_nothing(bench: Bench, parts: list[tuple[Key, Part]]) -> None:
    session = bench.session("a")
    with pytest.raises(ValueError, match=r"."):
        bench.register(session, *parts)
    assert bench.manager.throttles == {}
    assert session.flows == {}


def test_many_paths_leave_in_pieces(bench: Bench) -> None:
    session = bench.session("a")
    for id in range(2000):
        bench.register(session, (Key(SOURCE, f"r{id}"), part(Limit(60, 60))), (ALL, part(Limit(900, 60))), id=id)
    bench.manager.bye(session, bench.now)
    assert len(bench.manager.throttles) > 1000
    assert bench.manager.next_wakeup() == 0
    bench.run(SECOND)
    assert bench.manager.throttles == {}


# --- limits of several instances ---

HOUR = 3600


@pytest.mark.parametrize(
    ("parts", "limits", "places", "mixed"),
    [
        ([], (), 0, False),
        ([part(Limit(100, HOUR), places=5)], (Limit(100, HOUR),), 5, False),
        ([part(Limit(100, HOUR), places=5), part(Limit(201, HOUR), places=8)], (Limit(150, HOUR),), 6, False),
        ([part(Limit(100, HOUR), places=5), part()], (Limit(100, HOUR),), 5, False),
        ([part(Limit(100, HOUR), mode=Mode.SUM), part(Limit(50, HOUR), mode=Mode.SUM)], (Limit(150, HOUR),), 0, False),
        ([part(Limit(100, HOUR), mode=Mode.SUM), part(mode=Mode.SUM)], (), 0, False),
        ([part(Limit(2**32 - 1, HOUR), mode=Mode.SUM)] * 2, (Limit(2**32 - 1, HOUR),), 0, False),
        ([part(Limit(100, HOUR), mode=Mode.SUM), part(Limit(80, HOUR))], (Limit(80, HOUR),), 0, True),
        ([part(Limit(100, HOUR), mode=Mode.SUM), part(Limit(800, HOUR))], (Limit(100, HOUR),), 0, True),
        ([part(mode=Mode.SUM), part(Limit(800, HOUR))], (Limit(800, HOUR),), 0, True),
        ([part(Limit(100, HOUR)), part(Limit(900, HOUR), paused=True)], (Limit(100, HOUR),), 0, False),
        ([part(Limit(1, HOUR)), part(Limit(2, HOUR))], (Limit(1, HOUR),), 0, False),
        ([part(Limit(60, 60, 9)), part(Limit(9, 60, 3))], (Limit(34, 60, 3),), 0, False),
        ([part(Limit(9, 60)), part(Limit(100, HOUR))], (Limit(9, 60), Limit(100, HOUR)), 0, False),
    ],
)
def test_reconcile(parts: list[Part], limits: tuple[Limit, ...], places: int, mixed: bool) -> None:
    assert reconcile(parts) == Effective(limits, places, mixed)


def in_force(bench: Bench, session: Session) -> Effective:
    return bench.output(session).limits[-1].throttles[0]


def test_sum_follows_who_is_there(bench: Bench) -> None:
    one = part(Limit(100, HOUR), places=4, mode=Mode.SUM)
    a, b = bench.session("a"), bench.session("b")
    bench.register(a, (KEY, one))
    assert in_force(bench, a) == Effective((Limit(100, HOUR),), 4)
    bench.register(b, (KEY, one))
    assert in_force(bench, a) == Effective((Limit(200, HOUR),), 8)
    bench.manager.bye(b, bench.now)
    assert in_force(bench, a) == Effective((Limit(100, HOUR),), 4)


def test_the_part_of_a_lost_session_stays_for_its_lease(bench: Bench) -> None:
    one = part(Limit(100, HOUR), mode=Mode.SUM)
    a, b = bench.session("a"), bench.session("b")
    bench.register(a, (KEY, one))
    bench.register(b, (KEY, one))
    bench.collect()
    bench.manager.lost(b, bench.now)
    throttle = bench.manager.throttles[KEY]
    bench.run(9 * SECOND)
    assert throttle.windows[0].limit.amount == 200
    bench.run(3 * SECOND)
    assert throttle.windows[0].limit.amount == 100


def test_a_reconnect_within_the_lease_changes_nothing(bench: Bench) -> None:
    one = part(Limit(100, HOUR), mode=Mode.SUM)
    a, b = bench.session("a"), bench.session("b")
    bench.register(a, (KEY, one))
    bench.register(b, (KEY, one))
    bench.collect()
    bench.manager.lost(b, bench.now)
    bench.run(3 * SECOND)
    bench.register(bench.session("b"), (KEY, one))
    bench.run(20 * SECOND)
    assert bench.manager.throttles[KEY].windows[0].limit.amount == 200


def test_mixed_modes_are_told(bench: Bench) -> None:
    a, b = bench.session("a"), bench.session("b")
    bench.register(a, (KEY, part(Limit(100, HOUR), mode=Mode.SUM)))
    bench.register(b, (KEY, part(Limit(80, HOUR))))
    assert "sum or average" in bench.output(a).limits[-1].warning
    assert [remark.notice for remark in bench.manager.take_notices()] == ["mixed_modes"]


def test_paused(bench: Bench) -> None:
    """Pausing is a flag: that instance gets nothing, the others all."""
    a, b = two(bench, Limit(100, 1))
    bench.register(a, (KEY, part(Limit(100, 1), paused=True)))
    bench.want(a, 10**6)
    bench.want(b, 10**6)
    shares = count(bench.run(5 * SECOND))
    assert "a" not in shares
    assert shares["b"] >= 499
    bench.register(a, (KEY, part(Limit(100, 1))))
    shares = count(bench.run(5 * SECOND))
    assert shares["a"] == pytest.approx(shares["b"], abs=2)


def test_a_lower_limit_holds_at_once(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(100, 1))))
    bench.want(session, 10**6)
    bench.run(SECOND)
    bench.register(session, (KEY, part(Limit(10, 1))))
    assert count(bench.run(10 * SECOND))["a"] <= 101


def test_a_higher_limit_wakes_who_waits(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(1, HOUR))))
    bench.want(session, 100)
    bench.run(SECOND)
    bench.register(session, (KEY, part(Limit(100, 1))))
    # The permit of an hour's limit is usable for 2 s, those of a second's are spaced for 0.1 s: 0.9 s are left of that.
    assert count(bench.run(2 * SECOND))["a"] >= 98
    assert bench.got[session] == 100


# --- backoff ---


def backoff_bench(bench: Bench, rule: BackoffRule) -> Session:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(100, 60), places=10, backoff=rule)))
    bench.collect()
    return session


def amount(bench: Bench) -> int:
    return bench.manager.throttles[KEY].windows[0].limit.amount


def test_bad_outcomes_slow_down_for_everybody(bench: Bench) -> None:
    a = backoff_bench(bench, BackoffRule(40, None, 120 * SECOND, 50))
    b = bench.session("b")
    bench.register(b, (KEY, part(Limit(100, 60), places=10)))
    bench.manager.outcome(a, 0, 11, 8, 0, False, bench.now)  # 19: too few to judge
    assert amount(bench) == 100
    bench.manager.outcome(a, 0, 0, 3, 0, False, bench.now)
    assert (amount(bench), bench.manager.throttles[KEY].cap) == (40, 4)
    for session in (a, b):
        limit = bench.output(session).limits[-1]
        assert (limit.throttles[0].limits[0].amount, limit.backoff_ms) == (40, 120_000)
    assert [remark.notice for remark in bench.manager.take_notices()] == ["backoff"]


def test_return_is_additive_ten_percent_a_minute(bench: Bench) -> None:
    session = backoff_bench(bench, BackoffRule(40, None, 120 * SECOND, 50))
    bench.manager.outcome(session, 0, 0, 0, 0, True, bench.now)  # the instance's word
    seen = []
    for _ in range(9):
        seen.append(amount(bench))
        bench.run(60 * SECOND)
    assert seen == [40, 40, 40, 50, 60, 70, 80, 90, 100]
    assert bench.manager.throttles[KEY].terms is not None
    assert bench.manager.throttles[KEY].terms.backoff is None


def test_backoff_to_a_rate(bench: Bench) -> None:
    session = backoff_bench(bench, BackoffRule(1, Limit(5, 60), 60 * SECOND, 0))
    bench.manager.outcome(session, 0, 0, 100, 0, False, bench.now)  # threshold 0: reports alone do nothing
    assert amount(bench) == 100
    bench.manager.outcome(session, 0, 0, 0, 0, True, bench.now)
    assert amount(bench) == 5
    bench.run(600 * SECOND + 5 * SECOND)
    assert amount(bench) == 95
    bench.run(60 * SECOND)
    assert amount(bench) == 100


def test_backoff_to_a_rate_where_there_was_no_limit(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(backoff=BackoffRule(50, Limit(6, 60), 60 * SECOND, 0))))
    bench.collect()
    bench.manager.outcome(session, 0, 0, 0, 0, True, bench.now)
    bench.want(session, 10**6)
    assert count(bench.run(60 * SECOND))["a"] <= 7
    bench.run(700 * SECOND)
    assert bench.manager.throttles[KEY].windows == ()


def test_backoff_with_slots_out(bench: Bench) -> None:
    """Entered and left while permits are out: they stay good, the new pace holds for the rest."""
    session = backoff_bench(bench, BackoffRule(10, None, 10 * SECOND, 0))
    bench.want(session, 10**6)
    bench.run(5 * SECOND)
    bench.manager.outcome(session, 0, 0, 0, 0, True, bench.now)
    assert count(bench.run(9 * SECOND))["a"] <= 2
    bench.run(700 * SECOND)
    assert count(bench.run(60 * SECOND))["a"] == pytest.approx(99, abs=1)


# --- far sessions ---


def test_slack_follows_the_worst_round_trip(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(10, 1))))
    bench.quiet.add(session)
    bench.collect()
    bench.manager.pong(session, bench.now // 1000 - 150_000, 0, bench.now)
    bench.want(session, 100)
    assert bench.manager.throttles[KEY].slack >= 350 * MS
    assert bench.output(session).limits[-1].slack_us >= 350_000


def test_a_session_too_far_away_is_told(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(10, 1))))
    bench.quiet.add(session)
    bench.want(session, 100)
    bench.collect()
    bench.manager.pong(session, bench.now // 1000 - 900_000, 0, bench.now)
    limit = bench.output(session).limits[-1]
    assert limit.slack_us == 500_000
    assert "900 ms is too long" in limit.warning


# --- figures ---


def test_backlog_of_a_session_is_the_sum_of_its_paths(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part()), id=0)
    bench.register(session, (OTHER, part()), id=1)
    bench.manager.demand(session, 0, 1, 0, 5, 6, 7, bench.now)
    bench.manager.demand(session, 1, 1, 0, 10, 20, 30, bench.now)
    bench.manager.demand(session, 0, 0, 0, 1, 0, 2, bench.now)
    bench.now += 5 * SECOND
    assert session.figures(bench.now)[:2] == ("a", 5.0)
    assert session.figures(bench.now)[-3:] == (11, 20, 32)


def test_a_demand_of_an_unknown_path_is_nobodys(bench: Bench) -> None:
    session = bench.session("a")
    bench.want(session, 5, id=3)
    assert bench.run(SECOND) == {}
    assert session.figures(bench.now)[-3:] == (0, 0, 0)


def test_pongs_say_how_long_they_were_held(bench: Bench) -> None:
    session = bench.session("a")
    bench.collect()
    bench.manager.ping(session, 77, bench.now)
    bench.now += 3 * MS
    assert bench.output(session).pongs == [(77, 3000)]


# --- many at once, settings that change, reconnects ---


def test_what_is_due_for_very_many_is_done_in_steps(bench: Bench) -> None:
    """1,000 throttles that fall due in one moment, and the end of their session, keep nobody else waiting."""
    session = bench.session("a")
    for id in range(1000):
        bench.register(session, (Key(SOURCE, f"rule{id}"), part(Limit(1, 60))), id=id)
        bench.want(session, 2, 0, id)
    granted = 0
    end = bench.now + 62 * SECOND
    while (wake := bench.manager.next_wakeup()) is not None and wake <= end:
        bench.now = max(bench.now, wake)
        bench.manager.advance(bench.now)
        while session.parked_records:
            output = bench.output(session)
            granted += len(output.grants)
            assert len(output.grants) <= 500
        bench.collect()
    assert granted == 2000
    bench.manager.lost(session, bench.now)
    before = len(bench.manager.throttles)
    while (wake := bench.manager.next_wakeup()) is not None:
        bench.now = max(bench.now, wake)
        bench.manager.advance(bench.now)
        assert before - len(bench.manager.throttles) <= 300
        before = len(bench.manager.throttles)
    assert before == 0


def test_a_delivery_is_bounded_and_limits_stay_ahead_of_grants(bench: Bench) -> None:
    session = bench.session("a")
    for id in range(1200):
        bench.register(session, (Key(SOURCE, f"rule{id}"), part(Limit(100, 1))), id=id)
        bench.want(session, 1, 0, id)
    limited: set[int] = set()
    granted: list[int] = []
    while session.parked_records:
        output = bench.manager.take(session, bench.now, 500)
        assert len(output.limits) <= 500
        assert len(output.grants) <= 500
        limited |= {record.id for record in output.limits}
        granted += [record.id for record in output.grants]
        assert set(granted) <= limited
    assert sorted(granted) == list(range(1200))


def test_pings_without_end_leave_few_answers(bench: Bench) -> None:
    session = bench.session("a")
    for t in range(1000):
        bench.manager.ping(session, t, bench.now)
    assert [pong.t for pong in bench.output(session).pongs] == list(range(984, 1000))


def test_permits_of_a_session_that_broke_may_be_used_in_the_next(bench: Bench) -> None:
    bench.manager.enforce = True
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(100, 1))))
    bench.want(session, 3)
    assert count(bench.run(50 * MS))["a"] == 3
    bench.manager.lost(session, bench.now)
    again = bench.session("a")
    bench.register(again, (KEY, part(Limit(100, 1))))
    places = bench.manager.admit("a", 1.0, SOURCE, "198.51.100.1", bench.manager.flows(again, (0,)), bench.now)
    assert isinstance(places, Places)
    bench.mails(places, 2)
    assert bench.manager.unpermitted == 0
    bench.mails(places, 2)  # one of them is the third permit's
    assert bench.manager.unpermitted == 1


def test_connections_of_a_session_that_broke_go_on_with_the_permits_of_the_next(bench: Bench) -> None:
    """36 messages were held against an MTA after a reconnect, each of which had its permit."""
    bench.manager.enforce = True
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(100, 1))))
    places = bench.manager.admit("a", 1.0, SOURCE, "198.51.100.1", bench.manager.flows(session, (0,)), bench.now)
    assert isinstance(places, Places)
    bench.manager.lost(session, bench.now)
    again = bench.session("a")
    bench.register(again, (KEY, part(Limit(100, 1))))
    for _ in range(40):
        bench.want(again, 1)
        got = count(bench.run(10 * MS)).get("a", 0)
        assert bench.mails(places, got) == 0
    assert bench.got[again] >= 36
    assert bench.manager.unpermitted == 0
    bench.mails(places, 30)
    assert (bench.manager.unpermitted, again.unpermitted) == (30, 30)
    assert again.flows[0].fine > 20, "the live session pays, not the dead one"


def test_what_a_dead_session_sends_without_a_permit_is_paid_when_it_is_back(bench: Bench) -> None:
    bench.manager.enforce = True
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(10, 1))))
    places = bench.manager.admit("a", 1.0, SOURCE, "198.51.100.1", bench.manager.flows(session, (0,)), bench.now)
    assert isinstance(places, Places)
    bench.manager.lost(session, bench.now)
    bench.mails(places, 5)
    again = bench.session("a")
    bench.register(again, (KEY, part(Limit(10, 1))))
    assert again.flows[0].fine == 4, "one is paid at once"


def test_nobody_is_accused_for_what_an_earlier_manager_has_granted() -> None:
    bench = Bench(age=SECOND)
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(10, 1))))
    places = bench.manager.admit("a", 1.0, SOURCE, "198.51.100.1", bench.manager.flows(session, (0,)), bench.now)
    assert isinstance(places, Places)
    assert bench.mails(places, 3) == 0
    assert bench.manager.unpermitted == 0
    bench.run(2 * SECOND)
    bench.mails(places, 3)
    assert bench.manager.unpermitted == 3


def test_permits_of_a_session_that_ended_well_are_none(bench: Bench) -> None:
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(100, 1))))
    bench.want(session, 3)
    bench.run(SECOND)
    bench.manager.bye(session, bench.now)
    again = bench.session("a")
    bench.register(again, (KEY, part(Limit(100, 1))))
    places = bench.manager.admit("a", 1.0, SOURCE, "198.51.100.1", bench.manager.flows(again, (0,)), bench.now)
    assert isinstance(places, Places)
    bench.mails(places, 2)
    assert bench.manager.unpermitted == 2


def test_a_reload_without_enforcement_pardons(bench: Bench) -> None:
    bench.manager.enforce = True
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(1, 3600))))
    flows = bench.manager.flows(session, (0,))
    places = bench.manager.admit("a", 1.0, SOURCE, "198.51.100.1", flows, bench.now)
    assert isinstance(places, Places)
    bench.mails(places, 5)
    ticket = bench.manager.admit("a", 1.0, SOURCE, "198.51.100.1", flows, bench.now)
    assert isinstance(ticket, Ticket)
    bench.manager.reload(False, Limits(()), bench.now)
    assert bench.manager.take_admitted() == [ticket]


def test_another_weight_holds_from_the_next_permit_on(bench: Bench) -> None:
    one, two = bench.session("a"), bench.session("b")
    for session in (one, two):
        bench.register(session, (KEY, part(Limit(100, 1))))
        bench.want(session, 100_000)
    bench.run(2 * SECOND)
    bench.manager.weigh(one, 3.0)
    shares = count(bench.run(4 * SECOND))
    assert shares["a"] == pytest.approx(300, abs=5)
    assert shares["b"] == pytest.approx(100, abs=5)


def test_pausing_with_mail_waiting_frees_nothing(bench: Bench) -> None:
    """Its part in the limits goes, and it must not be served in between as if there were none."""
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(1, 60))))
    bench.want(session, 100)
    assert count(bench.run(SECOND)) == {"a": 1}
    bench.register(session, (KEY, part(Limit(1, 60), paused=True)))
    assert count(bench.run(300 * SECOND)) == {}
    bench.register(session, (KEY, part(Limit(1, 60))))
    assert count(bench.run(SECOND)) == {"a": 1}
