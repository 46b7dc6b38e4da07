"""pool: what is handed out, what is closed and why, and that nothing is ever counted wrongly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from proxy.egress.pool import Discarded, Entry, Listed, Pool, PoolKey, Taken
from proxy.model import Discard, Endpoint, TlsMode


@dataclass(frozen=True)
class Settings:
    reuse_connections: bool = True
    reuse_connections_max_idle: float = 30.0
    reuse_connections_max_age: float = 300.0
    reuse_connections_max_messages: int = 100
    reuse_connections_max_errors: int = 5
    reuse_connections_max_cached: int = 1000
    reuse_connections_max_cached_per_destination: int = 10


def limits(**changes) -> Settings:
    return Settings(**{f"reuse_connections_{name}": value for name, value in changes.items()})


MX = Endpoint("198.51.100.25", 25)
KEY = PoolKey("192.0.2.1", MX, "mta.example.org", TlsMode.REQUIRED, "mx.example.net", "name")
OTHER = KEY._replace(destination=Endpoint("198.51.100.26", 25))


class Checked:
    """A pool that looks at its own books after each call: the invariant belongs to the helper, not to each test."""

    def __init__(self, settings: Settings) -> None:
        self._pool: Any = Pool(settings)

    def __len__(self) -> int:
        return len(self._pool)

    def __contains__(self, connection: object) -> bool:
        return connection in self._pool

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._pool, name)
        if not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            try:
                return found(*arguments)
            finally:
                self.check()

        return call

    def check(self) -> None:
        pool = self._pool
        held = set(pool._idle)
        assert set(pool._by_connection.values()) == held
        assert all(entry.connection == name for name, entry in pool._by_connection.items())
        for index, names in (
            (pool._by_key, lambda entry: {entry.key}),
            (pool._by_destination, lambda entry: {entry.key.destination}),
            (pool._by_limit, lambda entry: set(entry.limits)),
        ):
            assert all(index.values()), "an empty queue is left behind"
            expected = {(name, entry) for entry in held for name in names(entry)}
            assert {(name, entry) for name, queue in index.items() for entry in queue} == expected
        for queue in (pool._idle, *pool._by_key.values(), *pool._by_destination.values(), *pool._by_limit.values()):
            idle = [entry.idle_since for entry in queue]
            assert idle == sorted(idle)
        assert held <= {entry for _, _, entry in pool._ages}
        assert len(pool._ages) <= 2 * 1000 + 64
        assert pool.offered == pool.hits + sum(pool.discards.values()) + len(pool)
        assert len(pool) == len(held) <= pool._settings.reuse_connections_max_cached
        most = max(pool.destinations().values(), default=0)
        assert most <= pool._settings.reuse_connections_max_cached_per_destination


def entry(name="c", key=KEY, opened_at=0.0, **more) -> Entry:
    return Entry(name, key, opened_at, **more)


def reasons(discarded) -> list[tuple[object, Discard]]:
    return [(gone.entry.connection, gone.reason) for gone in discarded]


def test_an_offered_connection_is_handed_out_once():
    pool, held = Checked(Settings()), entry()
    assert pool.offer(held, 1.0) == []
    assert pool.take(KEY, 2.0) == Taken(held, [])
    assert pool.take(KEY, 2.0) == Taken(None, [])
    assert (pool.offered, pool.hits, pool.misses) == (1, 1, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"source": "192.0.2.2"},
        {"destination": Endpoint("198.51.100.25", 465)},
        {"destination": Endpoint("198.51.100.24", 25)},
        {"ehlo_name": "other.example.org"},
        {"tls": TlsMode.OPPORTUNISTIC},
        {"tls_server_name": "mx2.example.net"},
        {"tls_demand": "verify 0"},
        {"smtputf8": True},
        {"requiretls": True},
        {"tenant": "customer-7"},
        {"group": ":pool"},
    ],
)
def test_whatever_differs_in_the_key_is_not_shared(change):
    pool = Checked(Settings())
    pool.offer(entry(), 1.0)
    assert pool.take(KEY._replace(**change), 1.0).entry is None
    assert pool.take(KEY, 1.0).entry is not None


def test_the_key_has_no_field_that_the_test_above_forgets():
    assert len(PoolKey._fields) == 10


def test_the_one_used_last_is_handed_out_first():
    pool = Checked(Settings())
    for at, name in enumerate("abc"):
        pool.offer(entry(name), float(at))
    assert [pool.take(KEY, 3.0).entry.connection for _ in "abc"] == ["c", "b", "a"]


def test_a_connection_offered_twice_is_a_mistake_of_the_program():
    pool = Checked(Settings())
    pool.offer(entry("a"), 0.0)
    with pytest.raises(ValueError, match="twice"):
        pool.offer(entry("a", OTHER), 0.0)


# Age before count: a connection over both is discarded for its age.
@pytest.mark.parametrize(
    ("settings", "held", "reason"),
    [
        (Settings(), {"opened_at": -299.0, "messages": 99, "mailmax": 100}, None),
        (Settings(), {"opened_at": -300.0, "messages": 100, "mailmax": 1}, Discard.MAX_AGE),
        (Settings(), {"messages": 100, "mailmax": 1}, Discard.MAX_MESSAGES),
        (Settings(), {"messages": 20, "mailmax": 20}, Discard.PEER_LIMIT),
        (Settings(), {"messages": 19, "mailmax": 20}, None),
        (Settings(), {"errors": 5, "mailmax": 1}, Discard.MAX_ERRORS),
        (Settings(), {"errors": 4}, None),
        (Settings(reuse_connections=False), {}, Discard.DISABLED),
        (limits(max_cached=0), {}, Discard.MAX_CACHED),
        (limits(max_cached_per_destination=0), {}, Discard.MAX_CACHED_PER_DESTINATION),
    ],
)
def test_what_is_not_kept_says_why(settings, held, reason):
    pool = Checked(settings)
    held = entry(**held)
    assert pool.offer(held, 0.0) == ([Discarded(held, reason)] if reason else [])
    assert dict(pool.discards) == ({reason: 1} if reason else {})


def test_over_a_cap_the_one_idle_longest_goes():
    pool = Checked(limits(max_cached=3, max_cached_per_destination=2))
    assert pool.offer(entry("a", OTHER), 0.0) == []
    assert pool.offer(entry("b"), 1.0) == []
    assert pool.offer(entry("c"), 2.0) == []
    assert reasons(pool.offer(entry("d"), 3.0)) == [("b", Discard.MAX_CACHED_PER_DESTINATION)]
    assert reasons(pool.offer(entry("e", KEY._replace(destination=Endpoint("::1", 25))), 4.0)) == [
        ("a", Discard.MAX_CACHED)
    ]


def test_a_destination_is_capped_over_all_its_keys():
    pool = Checked(limits(max_cached_per_destination=1))
    pool.offer(entry("a"), 0.0)
    other_source = KEY._replace(source="192.0.2.2")
    assert reasons(pool.offer(entry("b", other_source), 1.0)) == [("a", Discard.MAX_CACHED_PER_DESTINATION)]


def test_idle_and_age_end_at_their_moment():
    pool = Checked(Settings())
    assert pool.next_expiry() is None
    for name, opened_at, now, end in (("young", 90.0, 100.0, 130.0), ("old", -180.0, 110.0, 120.0)):
        pool.offer(entry(name, opened_at=opened_at), now)
        assert pool.expiry_of(pool.entries()[-1]) == end
    assert pool.next_expiry() == 120.0  # old: connected at -180, 300 s of age
    assert reasons(pool.expire(119.9)) == []
    assert reasons(pool.expire(120.0)) == [("old", Discard.MAX_AGE)]
    assert pool.next_expiry() == 130.0
    assert reasons(pool.expire(130.0)) == [("young", Discard.MAX_IDLE)]
    assert pool.next_expiry() is None


def test_age_counts_from_the_connect_however_often_a_connection_is_used():
    pool, held = Checked(Settings()), entry()
    for at in range(0, 300, 20):
        assert pool.offer(held, float(at)) == []
        assert pool.take(KEY, at + 10.0).entry is held
    assert reasons(pool.offer(held, 300.0)) == [("c", Discard.MAX_AGE)]


def test_take_does_not_wait_for_the_sweep():
    pool = Checked(Settings())
    pool.offer(entry("a", opened_at=0.0), 0.0)
    pool.offer(entry("b", opened_at=-280.0), 1.0)
    taken = pool.take(KEY, 25.0)
    assert taken.entry.connection == "a"
    assert reasons(taken.discarded) == [("b", Discard.MAX_AGE)]
    pool.offer(entry("c", opened_at=20.0), 30.0)
    taken = pool.take(KEY, 60.0)
    assert (taken.entry, reasons(taken.discarded)) == (None, [("c", Discard.MAX_IDLE)])


def test_a_connection_found_dead_is_no_hit():
    pool = Checked(Settings())
    pool.offer(entry("a"), 0.0)
    pool.offer(entry("b"), 1.0)
    dead = pool.take(KEY, 2.0).entry
    assert pool.reject(dead, Discard.PEER_CLOSED) == Discarded(dead, Discard.PEER_CLOSED)
    assert pool.take(KEY, 2.0).entry.connection == "a"
    assert (pool.hits, pool.misses, dict(pool.discards)) == (1, 0, {Discard.PEER_CLOSED: 1})


def test_a_connection_put_back_is_as_idle_as_it_was():
    pool = Checked(Settings())
    for at, name in enumerate("abc"):
        pool.offer(entry(name, KEY if name == "b" else OTHER), float(at))
    taken = pool.take(KEY, 5.0).entry
    assert "b" not in pool
    pool.put_back(taken)
    assert "b" in pool
    assert (taken.idle_since, pool.hits, pool.misses) == (1.0, 0, 1)
    assert reasons(pool.shed(3)) == [(name, Discard.OVERLOADED) for name in "abc"]


def test_the_watch_removes_what_closed_or_spoke():
    pool = Checked(Settings())
    pool.offer(entry("a"), 0.0)
    assert reasons([pool.remove("a", Discard.PEER_SPOKE)]) == [("a", Discard.PEER_SPOKE)]
    assert pool.remove("a", Discard.PEER_SPOKE) is None
    assert pool.discards[Discard.PEER_SPOKE] == 1


def test_a_place_is_given_up_for_whoever_waits_under_the_same_limit():
    pool = Checked(Settings())
    pool.offer(entry("a", limits=("yahoo", "all")), 0.0)
    pool.offer(entry("b", OTHER, limits=("all", "all")), 1.0)
    assert reasons([pool.yield_for("yahoo")]) == [("a", Discard.YIELDED)]
    assert pool.yield_for("yahoo") is None
    assert reasons([pool.yield_for("all")]) == [("b", Discard.YIELDED)]
    assert pool.yield_for("all") is None


def test_places_given_back_are_not_looked_for_any_more():
    pool = Checked(Settings())
    pool.offer(entry("a", limits=("yahoo", "all")), 0.0)
    pool.offer(entry("b", OTHER, limits=("all",)), 1.0)
    pool.promise("a")
    assert pool.yield_for("yahoo") is None
    assert reasons([pool.yield_for("all")]) == [("b", Discard.YIELDED)]
    assert "a" in pool


def test_who_was_promised_a_connection_finds_it_and_no_other():
    """Taking another one would leave the promised one open without a place."""
    pool = Checked(Settings())
    pool.offer(entry("a"), 0.0)
    pool.offer(entry("elsewhere", OTHER), 0.5)
    pool.promise("a")
    pool.promise("elsewhere")
    pool.offer(entry("b"), 1.0)
    assert [pool.take(KEY, 2.0).entry.connection for _ in range(2)] == ["a", "b"]
    assert pool.take(KEY, 2.0).entry is None


def test_out_of_descriptors_those_idle_longest_go():
    pool = Checked(Settings())
    for at, name in enumerate("abc"):
        pool.offer(entry(name), float(at))
    assert reasons(pool.shed(2)) == [("a", Discard.OVERLOADED), ("b", Discard.OVERLOADED)]
    assert reasons(pool.shed(2)) == [("c", Discard.OVERLOADED)]


def test_what_is_found_dead_takes_those_with_it_that_were_idle_longer_on_the_same_way():
    pool = Checked(Settings())
    elsewhere = Endpoint("198.51.100.26", 25)
    changes = [{}, {"tenant": "x"}, {"source": "192.0.2.2"}, {"destination": elsewhere}, {}, {"tenant": "y"}]
    for at, change in enumerate(changes):
        pool.offer(entry(at, key=KEY._replace(**change)), float(at))
    taken = pool.take(KEY, 6.0).entry
    assert taken.connection == 4
    assert pool.reject(taken, Discard.TIMED_OUT).entry is taken
    assert reasons(pool.remove_older(taken, Discard.TIMED_OUT)) == [(0, Discard.TIMED_OUT), (1, Discard.TIMED_OUT)]
    assert [each.connection for each in pool.entries()] == [2, 3, 5]


def test_a_drain_closes_all_and_nothing_is_held_afterwards():
    pool = Checked(Settings())
    pool.offer(entry("a"), 0.0)
    assert reasons(pool.drain()) == [("a", Discard.DRAINING)]
    assert reasons(pool.offer(entry("b"), 1.0)) == [("b", Discard.DRAINING)]


def test_a_reload_gives_up_what_the_new_settings_forbid():
    pool = Checked(Settings())
    for at in range(6):
        pool.offer(entry(at, opened_at=-10.0 * at, messages=at), float(at))
    assert reasons(pool.apply(limits(max_age=50.0, max_messages=3), 5.0)) == [
        (3, Discard.MAX_MESSAGES),
        (4, Discard.MAX_MESSAGES),
        (5, Discard.MAX_AGE),
    ]
    assert reasons(pool.apply(limits(max_cached_per_destination=2), 5.0)) == [(0, Discard.MAX_CACHED_PER_DESTINATION)]
    assert reasons(pool.apply(limits(max_cached=1), 5.0)) == [(1, Discard.MAX_CACHED)]
    assert pool.next_expiry() == 32.0
    pool.apply(limits(max_idle=10.0), 5.0)
    assert pool.next_expiry() == 12.0
    assert reasons(pool.apply(Settings(reuse_connections=False), 5.0)) == [(2, Discard.DISABLED)]


def test_what_never_reached_the_pool_is_counted_too():
    pool = Checked(Settings())
    pool.decline(Discard.IN_DATA)
    assert (pool.offered, dict(pool.discards)) == (1, {Discard.IN_DATA: 1})


def test_the_status_lists_keys_and_destinations():
    pool = Checked(Settings())
    pool.offer(entry("a", opened_at=1.0, messages=3), 2.0)
    pool.offer(entry("b", opened_at=2.0, messages=4), 3.0)
    pool.offer(entry("c", OTHER, opened_at=3.0), 4.0)
    assert pool.listing(10.0) == [Listed(KEY, 2, 7, 9.0), Listed(OTHER, 1, 0, 7.0)]
    assert pool.destinations() == {MX: 2, OTHER.destination: 1}


def test_the_oldest_stays_the_oldest_while_others_come_and_go():
    pool, old = Checked(limits(max_idle=1e6, max_age=1e3)), entry("old")
    pool.offer(entry("young", opened_at=50.0), 50.0)
    for at in range(60, 300):
        pool.offer(old, float(at))
        assert pool.next_expiry() == 1000.0
        assert pool.take(KEY, float(at)).entry is old


def test_rounds_through_the_pool_do_not_pile_up():
    pool, held = Checked(limits(max_age=1e9, max_messages=10**9)), entry()
    for at in range(1000):
        pool.offer(held, float(at))
        pool.take(KEY, float(at))
    assert len(pool._ages) <= 66


KEYS = [KEY, KEY._replace(source="192.0.2.2"), OTHER, OTHER._replace(tenant="t")]


class PoolMachine(RuleBasedStateMachine):
    """Random use; `Checked` asserts the books, this the fate of every connection: taken or discarded, once."""

    out = Bundle("out")

    def __init__(self):
        super().__init__()
        self.settings = limits(max_idle=5.0, max_age=12.0, max_messages=6, max_cached=5, max_cached_per_destination=3)
        self.pool = Checked(self.settings)
        self.now = 0.0
        self.serial = 0
        self.inside: dict[object, Entry] = {}
        self.draining = False

    def gone(self, discarded):
        for each in discarded:
            assert self.inside.pop(each.entry.connection) is each.entry
            if each.reason is Discard.MAX_AGE:
                assert self.now >= each.entry.opened_at + self.settings.reuse_connections_max_age
            if each.reason is Discard.MAX_IDLE:
                assert self.now >= each.entry.idle_since + self.settings.reuse_connections_max_idle

    @rule(target=out, key=st.sampled_from(KEYS), age=st.integers(0, 13), messages=st.integers(0, 6),
          mailmax=st.sampled_from([None, 1, 5]), names=st.lists(st.sampled_from("xy")))  # fmt: skip
    def connect(self, key, age, messages, mailmax, names):
        self.serial += 1
        return Entry(self.serial, key, self.now - age, messages, mailmax, limits=tuple(names))

    @rule(held=consumes(out))
    def offer(self, held):
        self.inside[held.connection] = held
        self.gone(self.pool.offer(held, self.now))
        assert not (self.draining and held.connection in self.inside)

    @rule(target=out, key=st.sampled_from(KEYS), dead=st.booleans(), back=st.booleans())
    def take(self, key, dead, back):
        mine = [held for held in self.inside.values() if held.key == key]
        taken = self.pool.take(key, self.now)
        self.gone(taken.discarded)
        if taken.entry is None:
            assert not any(held.key == key for held in self.inside.values())
            return Entry(None, key, -1e9)
        assert taken.entry.key == key
        assert self.now < taken.entry.opened_at + self.settings.reuse_connections_max_age
        assert taken.entry.idle_since == max(held.idle_since for held in mine if held.connection in self.inside)
        if dead:
            self.gone([self.pool.reject(taken.entry, Discard.PEER_CLOSED)])
            return Entry(None, key, -1e9)
        if back:
            self.pool.put_back(taken.entry)
            return Entry(None, key, -1e9)
        del self.inside[taken.entry.connection]
        taken.entry.messages += 1
        return taken.entry

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def expire(self):
        due = self.pool.next_expiry()
        gone = self.pool.expire(self.now)
        assert bool(gone) == (due is not None and due <= self.now)
        self.gone(gone)
        assert (due := self.pool.next_expiry()) is None or due > self.now

    @rule(name=st.sampled_from("xy"))
    def yield_for(self, name):
        gone = self.pool.yield_for(name)
        assert (gone is None) == (not any(name in held.limits for held in self.inside.values()))
        self.gone([gone] if gone else [])

    @rule(which=st.integers(0, 30))
    def remove(self, which):
        gone = self.pool.remove(which, Discard.PEER_SPOKE)
        assert (gone is None) == (which not in self.inside)
        self.gone([gone] if gone else [])

    @rule(count=st.integers(0, 3))
    def shed(self, count):
        expected = min(count, len(self.inside))
        gone = self.pool.shed(count)
        assert len(gone) == expected
        self.gone(gone)

    @rule(cached=st.integers(0, 6), each=st.integers(0, 4), age=st.integers(1, 14), idle=st.integers(1, 7))
    def reload(self, cached, each, age, idle):
        self.settings = limits(max_idle=float(idle), max_age=float(age), max_messages=6, max_cached=cached,
                               max_cached_per_destination=each)  # fmt: skip
        self.gone(self.pool.apply(self.settings, self.now))

    @rule(really=st.sampled_from([False] * 9 + [True]))
    def drain(self, really):
        if really:
            self.draining = True
            self.gone(self.pool.drain())

    @invariant()
    def nothing_is_lost(self):
        assert {held.connection: held for held in self.pool._idle} == self.inside


PoolMachine.TestCase.settings = hypothesis_settings(max_examples=100, stateful_step_count=40)
TestPoolMachine = PoolMachine.TestCase


def test_what_leaves_from_an_address_that_went_away_is_given_up_and_nothing_else():
    pool = Checked(Settings())
    elsewhere = KEY._replace(source="192.0.2.2")
    for name, key in (("a", KEY), ("b", elsewhere), ("c", OTHER)):
        pool.offer(entry(name, key), 1.0)
    assert reasons(pool.forsake(KEY.source)) == [("a", Discard.SOURCE_GONE), ("c", Discard.SOURCE_GONE)]
    assert pool.forsake(KEY.source) == []
    assert pool.take(elsewhere, 2.0).entry is not None


def test_one_that_was_idle_as_long_as_a_dead_one_is_as_dead():
    pool = Checked(Settings())
    for name, now in (("older", 1.0), ("mate", 2.0), ("dead", 2.0), ("fresher", 3.0)):
        pool.offer(entry(name), now)
    pool.remove("dead", Discard.TIMED_OUT)
    dead = entry("dead", idle_since=2.0)
    assert reasons(pool.remove_older(dead, Discard.TIMED_OUT)) == [
        ("older", Discard.TIMED_OUT),
        ("mate", Discard.TIMED_OUT),
    ]


def test_ages_of_what_has_gone_are_dropped_when_they_are_the_most():
    """At 64 more than twice what is held, not before: it costs a look at all."""
    pool = Checked(Settings())
    pool.offer(entry("stays"), 0.0)
    rounds = entry("rounds")
    for now in range(2 * 2 + 64 - 1):
        pool.offer(rounds, float(now))
        assert len(pool._ages) == now + 2
        assert pool.take(KEY, float(now)).entry is rounds
    pool.offer(rounds, 100.0)
    assert len(pool._ages) == 2
