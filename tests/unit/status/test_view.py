"""The operator's view against a manager and a pool whose state is known: every figure, every bound, every step."""

from __future__ import annotations

import dataclasses
import ipaddress
from types import SimpleNamespace

import msgspec
import pytest

from proxy.egress.pool import Entry, Pool, PoolKey
from proxy.errors import BadCredentials, Step, UpstreamError
from proxy.model import Discard, Endpoint, TlsMode
from proxy.policy.directory import Book
from proxy.policy.limits import Limits
from proxy.policy.trouble import Troubles
from proxy.settings import Rate as BlockRate
from proxy.settings import ThrottleSettings
from proxy.spans import Spans
from proxy.stats import COUNTED, Backlog, Counters, Flow, ManagerFigures, SessionFigures
from proxy.status import metrics, page, terminal
from proxy.status.gather import MOST_KEYS, Gauged, counted, details
from proxy.status.names import block_rows
from proxy.status.parts import DoorPart, merge
from proxy.status.parts import Part as Known
from proxy.status.rows import Overview, Program, Rate, Status, ThrottleRow
from proxy.status.spelled import (
    between,
    block_limits,
    held_by,
    holds_for,
    limits_text,
    means,
    next_slot,
    throttle_state,
    trouble_text,
)
from proxy.status.throttles import MOST_INSTANCES, SAMPLE, STEP, Meter
from proxy.status.view import MOST_PEERS, MOST_SESSIONS, Sources, overview, survey
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.limits import BackoffRule, Mode, Part
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import SECOND, Key, Limit

SOURCE = "192.0.2.1"
KEY = Key(SOURCE, "yahoo")
POOL = SimpleNamespace(
    reuse_connections=True,
    reuse_connections_max_idle=1000.0,
    reuse_connections_max_age=1000.0,
    reuse_connections_max_messages=1000,
    reuse_connections_max_errors=1000,
    reuse_connections_max_cached=100_000,
    reuse_connections_max_cached_per_destination=100_000,
)


def run(steps):
    """The result, and how many times the work stopped to let others run."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value, count
        count += 1


class House:
    """A manager long after its start, an empty pool, and a view of them."""

    def __init__(self, blocks=()):
        self.now = 100_000 * SECOND
        self.manager = Manager(7, self.now - 50_000 * SECOND, blocks=Limits(blocks))
        self.pool = Pool(POOL)
        self.counters = Counters()
        self.troubles = Troubles()
        self.meter = Meter()
        self.figures = ()
        self.names = {}
        self.standing = ()

    def session(self, name, *parts, id=0):
        session = self.manager.hello(name, b"1", f"{name}.example", 1.0, self.now)
        self.manager.ping(session, self.now // 1000, self.now)
        for number, (key, part) in enumerate(parts, id):
            self.manager.register(session, number, [(key, part)], self.now)
        return session

    def open(self, session, id=0, destination="198.51.100.1"):
        flows = self.manager.flows(session, [id])
        return self.manager.admit(session.name, 1.0, SOURCE, destination, flows, self.now)

    def part(self, now=500.0):
        part = counted(self.counters, Spans(), self.pool, Gauged(active=3, channels=1))
        part.doors = {"807": DoorPart("127.0.0.1:807", "native", 2)}
        part.open = 2
        part.details, _ = run(details(self.pool, self.troubles, self.standing, now))
        return part

    def sources(self, others=()):
        return Sources(
            Program("1.2", "0543b19c", 5.0, "python", "python"),
            merge([self.part(), *others]),
            100,
            ManagerFigures("0543b19c", 1, tuple(self.figures)),
            self.manager,
            lambda host: host not in self.troubles.gone,
            "proxy-1",
            "2026-01-02T03:04:05+00:00",
            name_of_source=lambda address: self.names.get(address, ""),
        )

    def view(self, most=500) -> Status:
        view, _ = run(survey(self.sources(), self.meter, 500.0, self.now, most))
        # What is shown survives the wire; equality holds field by field.
        assert msgspec.json.decode(msgspec.json.encode(view), type=Status) == view
        return view

    def throttle(self, name="yahoo") -> ThrottleRow:
        (row,) = [row for row in self.view().throttles if row.name == name]
        return row


def block(name, places=0, *rates):
    return ThrottleSettings(
        name=name,
        source=(),
        destination=(ipaddress.ip_network("198.51.100.0/24"),),
        max_concurrent_connections=places,
        max_delivery_rate=tuple(BlockRate(*rate) for rate in rates),
        wait=20.0,
    )


def hourly(amount, places=0, mode=Mode.AVERAGE, **more):
    return Part((Limit(amount, 3600),), places, mode, **more)


# --- throttles ---


@pytest.mark.parametrize(
    ("parts", "how", "limits", "places"),
    [
        ([hourly(100, 5)], "one instance", [Rate(100, 3600)], 5),
        ([hourly(100, 4), hourly(300, 8)], "average of 2", [Rate(200, 3600)], 6),
        ([hourly(100, 4, Mode.SUM), hourly(300, 8, Mode.SUM)], "sum of 2", [Rate(400, 3600)], 12),
        ([hourly(100, 4, Mode.SUM), hourly(300)], "lower of sum (1) and average (1)", [Rate(100, 3600)], 4),
        ([hourly(100, paused=True), hourly(300)], "one instance, 1 paused", [Rate(300, 3600)], None),
        ([Part()], "one instance", [], None),
    ],
)
def test_limits_in_force_and_how_they_came_about(parts, how, limits, places):
    house = House()
    for number, part in enumerate(parts):
        house.session(f"mta-{number}", (KEY, part))
    row = house.throttle()
    assert (row.source, row.kind, row.reconciled, row.limits, row.places) == (SOURCE, "instances", how, limits, places)
    for instance, part in zip(row.instances, parts, strict=True):
        assert instance.limits == [Rate(*limit) for limit in part.limits]
        assert (instance.places or 0, instance.mode, instance.paused) == (part.places, part.mode, part.paused)
        assert instance.connected


def test_places_lines_shares_and_demand_of_each_instance():
    house = House()
    one, two = (house.session(name, (KEY, hourly(3600, 4))) for name in ("a", "b"))
    held = [house.open(one) for _ in range(4)]
    waiting = [house.open(two) for _ in range(3)]
    assert all(isinstance(each, Places) for each in held)
    assert all(isinstance(each, Ticket) for each in waiting)
    house.manager.demand(two, 0, 10, 0, 10, 0, 0, house.now)
    house.now += SECOND // 10
    house.manager.advance(house.now)
    row = house.throttle()
    granted = row.taken
    assert granted >= 1
    assert (row.used, row.places, row.place_use, row.waiting, row.demand) == (4, 4, 1.0, 3, 10 - granted)
    a, b = row.instances
    assert (a.name, a.used, a.waiting, a.share, a.demand) == ("a", 4, 0, 2, 0)
    assert (b.name, b.used, b.waiting, b.share, b.demand) == ("b", 0, 3, 2, 10 - granted)
    assert 0 < row.next_slot <= 1.1
    house.manager.release(held[0], house.now)
    row = house.throttle()
    assert [(each.used, each.waiting) for each in row.instances] == [(3, 0), (1, 2)]


def test_a_paused_instance_and_the_requests_that_wait_for_it():
    house = House()
    session = house.session("a", (KEY, hourly(100, paused=True)))
    assert isinstance(house.open(session), Ticket)
    row = house.throttle()
    assert (row.state, row.reconciled, row.waiting) == ("paused", "no instance, 1 paused", 1)
    assert (row.instances[0].paused, row.instances[0].waiting) == (True, 1)


def test_an_instance_that_is_gone_is_shown_as_long_as_its_part_counts():
    house = House()
    stays = house.session("a", (KEY, hourly(100)))
    gone = house.session("b", (KEY, hourly(300)))
    house.manager.lost(gone, house.now)
    row = house.throttle()
    assert [(each.name, each.connected) for each in row.instances] == [("a", True), ("b", False)]
    assert row.reconciled == "average of 2"
    house.now += 12 * SECOND
    stays.pong_at = house.now
    house.manager.advance(house.now)
    assert [each.name for each in house.throttle().instances] == ["a"]


def test_backoff_and_the_way_back():
    house = House()
    session = house.session("a", (KEY, hourly(1000, backoff=BackoffRule(50, None, 60 * SECOND))))
    house.manager.outcome(session, 0, 0, 1, 0, True, house.now)
    house.now += 10 * SECOND
    row = house.throttle()
    assert (row.state, row.backoff, row.limits) == ("backoff", 50.0, [Rate(500, 3600)])
    house.now += 60 * SECOND
    assert house.throttle().state == "rising"


def test_the_proxys_own_throttles():
    house = House([block("big", 2, (60, 60))])
    places = house.manager.admit("10.0.0.1", 1.0, SOURCE, "198.51.100.9", (), house.now)
    assert isinstance(places, Places)
    assert isinstance(house.manager.admit("10.0.0.2", 1.0, SOURCE, "198.51.100.9", (), house.now), Ticket)
    row = house.throttle("big")
    assert (row.kind, row.reconciled, row.limits, row.places) == ("proxy", "throttle block", [Rate(60, 60)], 2)
    assert (row.used, row.waiting, row.taken) == (1, 1, 1)
    assert [(each.name, each.used, each.waiting) for each in row.instances] == [("10.0.0.1", 1, 0), ("10.0.0.2", 0, 1)]
    assert row.instances[0].mode == ""


def test_use_of_a_rate_is_that_of_the_last_minute_or_two():
    house = House()
    session = house.session("a", (KEY, hourly(3600)))
    assert house.throttle().rate_use is None, "nothing to compare with"
    granted = 0
    for _ in range(60):
        house.manager.demand(session, 0, 10, granted, 10, 0, 0, house.now)
        house.now += SECOND
        house.manager.advance(house.now)
        house.manager.ping(session, house.now // 1000, house.now)
        session.pong_at = house.now
        granted += sum(grant.n for grant in house.manager.take(session, house.now).grants)
    assert house.throttle().rate_use == pytest.approx(1.0, abs=0.05)
    house.manager.demand(session, 0, 0, granted, 0, 0, 0, house.now)
    house.now += SAMPLE - SECOND
    assert house.throttle().rate_use == pytest.approx(0.5, abs=0.05)
    house.now += SECOND
    assert house.throttle().rate_use == 0.0


def test_without_a_rate_there_is_no_next_slot():
    house = House()
    house.session("a", (KEY, Part((), 5)), (Key(SOURCE, "free"), Part()), (Key(SOURCE, "slow"), hourly(60)))
    assert (house.throttle().next_slot, next_slot(house.throttle())) == (None, "")
    assert (house.throttle("slow").next_slot, next_slot(house.throttle("slow"))) == (0.0, "now")
    assert house.throttle("free").rate_use is None


# --- bounds and order ---


def test_who_is_waited_for_comes_first_then_the_busiest_and_the_rest_is_counted():
    house = House()
    keys = [Key(SOURCE, f"rule-{number:04}") for number in range(3 * STEP)]
    session = house.session("a", *[(key, hourly(100, 2)) for key in keys])
    opened = [house.open(session, 700) for _ in range(5)], [house.open(session, 3), house.open(session, 3)]
    assert opened
    house.open(session, 1400)
    view = house.view(most=4)
    assert [row.name for row in view.throttles[:3]] == ["rule-0700", "rule-0003", "rule-1400"]
    assert (len(view.throttles), view.throttles_left_out) == (4, 3 * STEP - 4)
    assert view.manager.known == 3 * STEP
    assert house.view(most=10_000).throttles_left_out == 0


def test_equals_keep_an_order_so_that_the_page_does_not_jump():
    house = House()
    house.session("a", *[(Key(SOURCE, f"rule-{number:02}"), hourly(100)) for number in range(50)])
    assert [row.name for row in house.view().throttles] == [f"rule-{number:02}" for number in range(50)]


def test_what_is_looked_for_is_found_among_all_and_the_others_are_not_looked_at():
    house = House()
    house.names["192.0.2.9"] = "vmta9"
    parts = [(Key("192.0.2.9" if n == 30 else SOURCE, f"rule-{n:03}"), hourly(100)) for n in range(40)]
    house.session("one", *parts[:20])
    house.session("two", *parts[20:], id=100)

    def found(wanted, most=500):
        house.meter.turn()
        view, _ = run(survey(house.sources(), house.meter, 500.0, house.now, most, wanted))
        return sorted(row.name for row in view.throttles), view.throttles_left_out

    assert found("Rule-03") == ([f"rule-{n:03}" for n in range(30, 40)], 0)
    assert found("VMTA9") == found("192.0.2.9") == (["rule-030"], 0)
    assert found("two") == ([f"rule-{n:03}" for n in range(20, 40)], 0)
    assert found("two", most=5)[1] == 15
    assert found("nowhere") == ([], 0)


def test_a_look_at_some_throttles_does_not_spoil_the_use_of_rates():
    house = House()
    house.session("one", (KEY, hourly(3600)), (Key(SOURCE, "other"), hourly(3600)))
    house.view()
    house.now += 10 * SECOND
    run(survey(house.sources(), house.meter, 500.0, house.now, wanted="other"))
    assert house.throttle("yahoo").rate_use == 0.0


def test_looking_for_something_stops_often_too():
    house = House()
    house.session("one", *[(Key(SOURCE, f"rule-{n:04}"), hourly(100)) for n in range(2 * STEP)])
    _, whole = run(survey(house.sources(), house.meter, 500.0, house.now, 0))
    _, found = run(survey(house.sources(), house.meter, 500.0, house.now, 0, "nowhere"))
    assert found >= 2 * STEP * 5 // STEP - 1 > whole


def test_the_work_stops_often_and_lets_the_world_change():
    house = House()
    count = 5 * STEP
    session = house.session("a", *[(Key(SOURCE, f"rule-{number}"), hourly(100)) for number in range(count)])
    steps = survey(house.sources(), house.meter, 500.0, house.now)
    next(steps)
    house.manager.bye(session, house.now)
    for _ in range(count // 100 + 1):
        house.manager.advance(house.now)
    view, stops = run(steps)
    assert stops >= count / STEP
    assert view.throttles_left_out == count - len(view.throttles)
    assert house.view().throttles == []


def test_a_throttle_with_very_many_flows_is_added_up_in_steps():
    house = House()
    session = house.session("a")
    for number in range(3 * STEP):
        house.manager.register(session, number, [(KEY, hourly(100)), (Key(SOURCE, f"r{number}"), Part())], house.now)
        house.manager.demand(session, number, 2, 0, 2, 0, 0, house.now)
    view, stops = run(survey(house.sources(), house.meter, 500.0, house.now, most=1))
    (row,) = view.throttles
    assert row.demand == 2 * 3 * STEP - row.taken
    assert stops >= 3 + 3


def test_only_so_many_instances_of_a_throttle_are_listed_but_all_count():
    house = House([block("big", 0)])
    for number in range(MOST_INSTANCES + 7):
        house.manager.admit(f"10.0.0.{number}", 1.0, SOURCE, "198.51.100.9", (), house.now)
    row = house.throttle("big")
    assert (row.used, len(row.instances), row.instances_left_out) == (MOST_INSTANCES + 7, MOST_INSTANCES, 7)


# --- the rest ---


def test_sessions_with_queues_and_what_was_sent_without_a_permit():
    house = House()
    session = house.session("a", (KEY, hourly(100)), (Key(SOURCE, "b"), hourly(100)))
    session.unpermitted = 3
    house.figures = (
        SessionFigures("a", 65.0, 0.00025, 1.0, Backlog(5, 1, 2), Flow(1, 2, 3), Flow(4, 5, 6)),
        SessionFigures("gone", 1.0, 0.0, 0.0),
    )
    view = house.view()
    row, other = view.sessions
    assert (row.name, row.address, row.connected, row.ping, row.ping_age) == ("a", "a.example", 65.0, 0.00025, 1.0)
    assert (row.ram, row.bounce, row.disk, row.paths, row.without_permit) == (5, 1, 2, 2, 3)
    assert (row.forward.entering, row.forward.leaving, row.back.parked) == (1, 2, 6)
    assert (other.name, other.address, other.paths) == ("gone", "", 0)
    assert (view.manager.ram, view.manager.bounce, view.manager.disk) == (5, 1, 2)
    house.figures = [SessionFigures(str(number), 1.0, 0.0, 0.0) for number in range(MOST_SESSIONS + 2)]
    view = house.view()
    assert (len(view.sessions), view.sessions_left_out, view.manager.sessions) == (MOST_SESSIONS, 2, MOST_SESSIONS + 2)


def cached(number, destination="198.51.100.1", tenant="", opened_at=400.0):
    key = PoolKey(SOURCE, Endpoint(destination, 25), "mta.example.com", TlsMode.REQUIRED, "mx", "dane", tenant=tenant)
    return Entry(number, key, opened_at, messages=2)


def test_the_pool_by_key_with_ages_reasons_and_ratio():
    house = House()
    house.counters.reused, house.counters.fresh = 1, 3
    house.pool.offer(cached(1, opened_at=400.0), 440.0)
    house.pool.offer(cached(2, opened_at=450.0), 460.0)
    house.pool.offer(cached(3, "198.51.100.2", tenant="user@example.com"), 480.0)
    house.pool.decline(Discard.NOT_OFFERED)
    assert house.pool.take(cached(3, "198.51.100.2", tenant="user@example.com").key, 490.0).entry
    assert not house.pool.take(cached(3, "198.51.100.3").key, 490.0).entry
    house.pool.offer(cached(4, "198.51.100.2", tenant="user@example.com"), 495.0)
    view = house.view()
    pool = view.pool
    assert (pool.held, pool.offered, pool.hits, pool.misses, pool.reuse_ratio) == (3, 5, 1, 1, 0.25)
    assert pool.discards == {"not_offered": 1}
    assert (pool.oldest, pool.longest_idle, pool.mean_age) == (100.0, 60.0, pytest.approx(250 / 3))
    first, second = pool.keys
    assert (first.source, first.destination, first.tls, first.tls_server_name) == (
        *(SOURCE, "198.51.100.1:25", "required", "mx"),
    )
    assert (first.connections, first.messages, first.oldest, first.idle, first.tenant) == (2, 4, 100.0, 60.0, False)
    assert (second.connections, second.tenant) == (1, True)
    assert b"user@example" not in msgspec.json.encode(view), "a tenant may be a user's name"


def test_many_cached_connections_are_looked_at_in_steps_and_listed_in_part():
    house = House()
    for number in range(3 * STEP):
        house.pool.offer(cached(number, f"198.51.{number // 250}.{number % 250}"), 450.0)
    _, stops = run(details(house.pool, house.troubles, (), 500.0))
    view, _ = run(overview(house.sources(), 500.0))
    assert (view.pool.held, len(view.pool.keys), view.pool.keys_left_out) == (3 * STEP, MOST_KEYS, 3 * STEP - MOST_KEYS)
    assert stops >= 3


def test_nothing_yet():
    view, _ = run(overview(House().sources(), 500.0))
    assert isinstance(view, Overview)
    assert (view.pool.reuse_ratio, view.pool.oldest, view.pool.keys, view.sessions) == (None, 0.0, [], [])


def test_every_counter_is_shown():
    house = House()
    house.counters.accepted.count("socks5")
    house.counters.bytes_up = 7
    counters = house.view().counters
    assert counters.keys() == {*COUNTED, "messages_without_permit", "backoffs"}
    assert (counters["accepted"], counters["bytes_up"]) == ({"socks5": 1}, 7)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (Rate(1000, 3600), "1000/hr"),
        (Rate(50, 60), "50/min"),
        (Rate(10, 1, 3), "10/s (burst 3)"),
        (Rate(7, 86400), "7/day"),
        (Rate(9, 600), "9/600s"),
    ],
)
def test_how_a_rate_is_spelled(rate, text):
    assert str(rate) == text


# --- trouble ---


def kinds(view: Status) -> list[str]:
    return [row.kind for row in view.trouble]


def test_no_trouble() -> None:
    house = House()
    assert house.view().trouble == []
    house.troubles.failed(SOURCE, Endpoint("198.51.100.1", 25), UpstreamError("refused", Step.CONNECT), 499.0)
    assert house.view().trouble == [], "one failure is none"


def test_receivers_and_sources_with_trouble() -> None:
    house = House()
    for number in range(MOST_PEERS + 10):
        for _ in range(3):
            house.troubles.over(SOURCE, Endpoint("198.51.100.1", number), "421 4.7.0 not now", False, 440.0)
    house.troubles.over("192.0.2.2", Endpoint("198.51.100.9", 25), "450 later", True, 440.0)
    house.troubles.source_gone("192.0.2.3", 490.0)
    view = house.view()
    assert (len(view.receivers), view.receivers_left_out) == (MOST_PEERS, 11)
    assert {row.failing for row in view.receivers} == {60.0}
    assert [(row.name, row.present, row.absent) for row in view.sources] == [
        ("192.0.2.3", False, 10.0),
        (SOURCE, True, None),
        ("192.0.2.2", True, None),
    ]
    assert kinds(view) == ["source_missing", "sources_failing", "receivers_failing"]
    missing, source, receivers = view.trouble
    assert trouble_text(missing) == "source 192.0.2.3 is not on this machine (for 10s)"
    assert (source.recent, source.since) == (180, 60.0)
    assert "421 4.7.0 not now" in receivers.text
    assert receivers.text.startswith("50 receivers refuse or fail")


def test_trouble_that_is_over_is_not_told() -> None:
    house = House()
    for _ in range(5):
        house.troubles.failed("", Endpoint("198.51.100.1", 25), UpstreamError("refused", Step.CONNECT), 10.0)
        house.troubles.refuse(BadCredentials("no"), 10.0)
    assert kinds(house.view()) == [], "500 is more than five minutes later"
    for _ in range(5):
        house.troubles.refuse(BadCredentials("wrong secret of mta-1"), 480.0)
    (row,) = house.view().trouble
    assert (row.kind, row.recent, row.since) == ("bad_credentials", 5, 20.0)
    assert "wrong secret of mta-1" in row.text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({}, ""),
        ({"state": "paused", "demand": 1}, "pause"),
        ({"state": "backoff", "waiting": 1}, "back-off"),
        ({"places": 2, "used": 2, "waiting": 1, "next_slot": 3.0}, "places"),
        ({"places": 2, "used": 1, "demand": 1, "next_slot": 3.0}, "rate"),
        ({"demand": 1, "next_slot": 0.0}, "other limits"),
    ],
)
def test_held_by(row: dict, expected: str) -> None:
    assert held_by(ThrottleRow(SOURCE, "x", "proxy", "", **row)) == expected


def test_a_shadow_says_what_it_would_have_held_back_and_a_row_what_counts_by_itself():
    blocks = [
        dataclasses.replace(block("shy", 1), enforce=False, per=("receiver",)),
        dataclasses.replace(block("paced"), max_connection_rate=(BlockRate(5, 1),), per=("nothing",)),
    ]
    world = House(blocks)
    for _ in range(3):
        world.manager.admit("a", 1.0, "192.0.2.1", "198.51.100.1", (), world.now)
        world.now += SECOND
    rows = {row.name: row for row in world.view().throttles}
    assert throttle_state(rows["shy"]) == "shadow: would have waited 2 times"
    assert between(rows["shy"]) == "to 198.51.100.1"
    assert between(rows["paced (connections)"]) == "all"
    assert limits_text(rows["paced (connections)"].limits, None) == "5/s"


def test_sources_are_told_by_name_too():
    """Also in metrics, where each address has one name: no more series than without."""
    world = House([block("yahoo", 1)])
    world.names = {SOURCE: "vmta1"}
    world.manager.admit("a", 1.0, SOURCE, "198.51.100.1", (), world.now)
    for source in (SOURCE, "192.0.2.2"):
        world.counters.sources_accepted.count(source, 3)
    view = world.view()
    (row,) = view.throttles
    assert (row.source, row.source_name, between(row)) == (SOURCE, "vmta1", "192.0.2.1 (vmta1)")
    assert {source.name: source.source_name for source in view.sources} == {SOURCE: "vmta1", "192.0.2.2": ""}
    assert "192.0.2.1 (vmta1)" in "".join(page.pieces(view))
    assert "192.0.2.1 (vmta1)" in "\n".join(terminal.lines(view))
    figures = [
        line
        for line in metrics.render(view, Known()).decode().splitlines()
        if "source_messages_accepted_total{" in line
    ]
    assert figures == [
        'greenarrow_proxy_source_messages_accepted_total{source="192.0.2.1",source_name="vmta1"} 3.0',
        'greenarrow_proxy_source_messages_accepted_total{source="192.0.2.2",source_name=""} 3.0',
    ]


def test_a_message_that_waits_in_the_proxy_is_told():
    """Under each of its throttles: nobody else says that it waits."""
    limited = dataclasses.replace(block("paced"), max_delivery_rate=(BlockRate(1, 3600),), per=("nothing",))
    world = House([limited])
    for name in ("box7", "box7", "box8"):
        world.manager.ask_message(name, 1.0, SOURCE, "198.51.100.1", (), world.now)
    (row,) = world.view().throttles
    assert {each.name: each.demand for each in row.instances} == {"box7": 1, "box8": 1}
    assert (row.demand, held_by(row)) == (2, "rate")


def test_blocks_are_told_as_configured_and_those_with_names_first():
    blocks = [block(f"plain{number}", 2) for number in range(3)]
    named = dataclasses.replace(
        block("yahoo", 20, (2000, 3600)),
        destination=(),
        domain=("yahoo.com",),
        source=(ipaddress.ip_network("192.0.2.1"), "vmta1"),
        instance=tuple(f"box{number}" for number in range(10)),
        max_connection_rate=(BlockRate(5, 1),),
        per=("source", "receiver"),
        enforce=False,
    )
    rows, left_out = run(block_rows([*blocks, named], Book()))[0]
    assert ([row.name for row in rows], left_out) == (["yahoo", "plain0", "plain1", "plain2"], 0)
    assert block_limits(rows[0]) == "2000/hr, 20 connections, 5/s new connections (shadow mode)"
    boxes = ", ".join(f"box{number}" for number in range(8))
    assert holds_for(rows[0]) == (
        f"to yahoo.com from 192.0.2.1, vmta1 asked for by {boxes}, 2 more, counted per source and receiver"
    )
    assert (block_limits(rows[1]), means(rows[1])) == ("2 connections", "")
