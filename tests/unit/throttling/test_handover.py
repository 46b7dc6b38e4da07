"""From one manager to another, step by step: what is carried over, what a frozen one does, what thawing undoes."""

from __future__ import annotations

import pytest

from proxy.policy.limits import Limits
from proxy.settings import BackoffSettings, Rate, ThrottleSettings
from proxy.throttling.backoff import Backoffs
from proxy.throttling.cluster import Cluster
from proxy.throttling.desk import MessageTicket
from proxy.throttling.estate import Unreadable
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.handover import THAWED, Frozen
from proxy.throttling.leasing import Leased
from proxy.throttling.limits import BackoffRule, Mode
from proxy.throttling.manager import Manager
from proxy.throttling.overrides import Override
from proxy.throttling.session import LEASE, PongRecord, Session
from proxy.throttling.throttle import AHEAD, MILLISECOND, SECOND, Key, Limit, Past, Window, interval
from tests.unit.throttling.benches import ALL, KEY, OTHER, SOURCE, Bench, count, part
from tests.unit.throttling.heirs import heir_of, read
from tests.unit.throttling.test_backoff import House, block

MX = "198.51.100.1"
HOURLY, MINUTELY = Limit(60, 3600), Limit(60, 60)
QUARTER = BackoffSettings(on=("421",), percent=25, return_after=3600.0)
FEW = BackoffSettings(on=("450",), over=Rate(2, 300), pause=True, return_after=600.0)


class Succession(Bench):
    """One that is exchanged for another."""

    def __init__(self, *blocks: ThrottleSettings, enforce: bool = False) -> None:
        super().__init__()
        self.rules = Limits(blocks)
        self.manager = Manager(7, self.now - 50_000 * SECOND, enforce, self.rules)
        self.held: dict[int, Places] = {}

    def exchange(self) -> Manager:
        """The one that was before."""
        former = self.manager
        self.manager, self.held = heir_of(former, self.now, self.rules)
        return former

    def open(self, owner: str = "a", session: Session | None = None) -> Places | Ticket:
        flows = self.manager.flows(session, [0]) if session is not None else ()
        return self.manager.admit(owner, 1.0, SOURCE, MX, flows, self.now)

    def opened(self, owner: str = "a", session: Session | None = None) -> Places:
        places = self.open(owner, session)
        assert isinstance(places, Places)
        return places

    def limits(self, key: Key = KEY) -> list[Limit]:
        return [window.limit for window in self.manager.throttles[key].windows]


# --- rates ---


def test_a_rate_goes_on_where_it_was() -> None:
    """After a restart it would be an hour without a message; and 1 an hour is not 2."""
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(HOURLY)))
    bench.want(session, 100)
    assert count(bench.run(150 * SECOND)) == {"a": 3}
    bench.exchange()
    again = bench.session("a")
    bench.register(again, (KEY, part(HOURLY)))
    bench.want(again, 100)
    assert count(bench.run(600 * SECOND)) == {"a": 10}


def test_the_dormant_length_of_a_limit_is_remembered() -> None:
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(HOURLY)))
    bench.want(session, 100)
    bench.run(SECOND)
    bench.register(session, (KEY, part(MINUTELY)))
    debt = bench.manager.throttles[KEY].debt_until()
    (dormant,) = bench.manager.throttles[KEY].dormant
    bench.exchange()
    assert bench.manager.throttles[KEY].debt_until() == debt
    assert bench.manager.throttles[KEY].dormant[0].past() == dormant.past()


def test_what_was_given_out_ahead_is_not_given_again_and_changed_limits_come_after_it() -> None:
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(20, 1))))
    bench.want(session, 100)
    bench.run(SECOND)
    former = bench.manager.throttles[KEY]
    former.opens = bench.now + AHEAD
    bench.exchange()
    throttle = bench.manager.throttles[KEY]
    assert (throttle.earliest(bench.now), throttle.opens) == (former.earliest(bench.now), former.opens)
    assert (throttle.taken, throttle.slack) == (former.taken, former.slack)


def test_where_another_version_spaces_slots_otherwise_what_is_owed_is_owed_in_slots() -> None:
    """As by any change of terms: three of its intervals of 2 s are three of ours of a second, and the fill is one."""
    limit = Limit(600, 600, 2)
    own = interval(limit, 2 * SECOND)
    past = Past(limit, 2 * SECOND, 2 * own, 100 * SECOND + 8 * own, 100 * SECOND + 2 * own)
    window = Window.handed_over(past, 100 * SECOND)
    assert (window.limit, window.slack, window.interval, window.tau) == (limit, 2 * SECOND, own, own)
    assert (window.filled_at, window.tat) == (100 * SECOND + own, 100 * SECOND + 4 * own)
    same = past._replace(interval=own)
    assert Window.handed_over(same, 100 * SECOND).past() == same


def test_the_parts_of_all_stay_until_they_are_back() -> None:
    bench = Succession()
    sessions = {name: bench.session(name) for name in "abc"}
    for session in sessions.values():
        bench.register(session, (KEY, part(MINUTELY, mode=Mode.SUM, places=2)))
    bench.manager.lost(sessions["c"], bench.now)
    bench.run(4 * SECOND)
    bench.exchange()
    assert (bench.limits(), bench.manager.throttles[KEY].cap) == ([Limit(180, 60)], 6)
    back = bench.session("a")
    bench.register(back, (KEY, part(MINUTELY, mode=Mode.SUM, places=2)))
    bench.run(LEASE - 3 * SECOND)
    assert bench.limits() == [Limit(120, 60)]  # that of c has gone when it would have
    bench.run(4 * SECOND)
    assert bench.limits() == [Limit(60, 60)]


def test_limits_that_come_later_are_no_news_to_who_has_been_there_all_the_time() -> None:
    bench = Succession()
    bench.exchange()
    session = bench.session("a")
    bench.register(session, (KEY, part(HOURLY)))
    bench.want(session, 1)
    assert count(bench.collect()) == {"a": 1}


def test_a_backoff_of_instances_goes_on_and_ends() -> None:
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(MINUTELY, backoff=BackoffRule(50, None, 300 * SECOND, 50))))
    bench.manager.outcome(session, 0, 0, 19, 0, False, bench.now)  # one more, and it is too many
    bench.exchange()
    session = bench.session("a")
    bench.register(session, (KEY, part(MINUTELY, backoff=BackoffRule(50, None, 300 * SECOND, 50))))
    bench.manager.outcome(session, 0, 0, 1, 0, False, bench.now)
    assert bench.limits() == [Limit(30, 60)]
    bench.exchange()
    assert bench.limits() == [Limit(30, 60)]
    session = bench.session("a")
    bench.register(session, (KEY, part(MINUTELY, backoff=BackoffRule(50, None, 300 * SECOND, 50))))
    bench.run(300 * SECOND)
    assert bench.limits() == [Limit(30, 60)]
    bench.run(301 * SECOND)
    assert bench.limits() == [Limit(60, 60)]


def test_what_nobody_names_is_forgotten_when_its_debt_is_paid() -> None:
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(HOURLY)), (ALL, part(MINUTELY)))
    bench.want(session, 1)
    bench.run(SECOND)
    bench.manager.bye(session, bench.now)
    bench.exchange()
    assert set(bench.manager.throttles) == {KEY, ALL}
    bench.run(5 * SECOND)
    assert set(bench.manager.throttles) == {KEY}
    assert bench.manager.active_throttles(bench.now) == 1
    bench.run(65 * SECOND)
    assert set(bench.manager.throttles) == set()
    assert bench.manager.active_throttles(bench.now) == 0


# --- fairness ---


def test_whose_turn_it_is_stays_so_whoever_comes_back_first() -> None:
    """At 1 an hour a turn that was lost would be an hour, and who comes back first might win each time."""
    bench = Succession()
    got: dict[str, int] = {}
    bench.run(SECOND)
    for _ in range(9):
        sessions = [bench.session(name) for name in "ab"]
        for session in sessions:
            bench.register(session, (KEY, part(HOURLY)))
            bench.want(session, 50, 0)
        for name, n in count(bench.run(61 * SECOND)).items():
            got[name] = got.get(name, 0) + n
        bench.exchange()
    assert got == {"a": 5, "b": 5} or sorted(got.values()) == [4, 5], got


def test_what_is_remembered_of_turns_has_an_end() -> None:
    bench = Succession()
    sessions = [bench.session(name) for name in "ab"]
    for session in sessions:
        bench.register(session, (KEY, part(HOURLY, places=1)))
        bench.want(session, 50, 0)
    bench.opened(session=sessions[0])
    bench.open("b", sessions[1])
    bench.exchange()
    manager = bench.manager
    assert (set(manager._dispenser.former), set(manager._book.former)) == ({manager.throttles[KEY]},) * 2
    bench.run(LEASE + 2 * SECOND)
    assert (manager._dispenser.former, manager._book.former) == ({}, {})


def test_who_was_served_last_is_last_in_the_line_again() -> None:
    bench = Succession(block(max_concurrent_connections=1))
    for _ in range(3):
        places = bench.opened("first")
        for owner in "ab":
            bench.open(owner)
        (ticket,) = bench.manager.release(places, bench.now)
        assert ticket.owner == "a"
        former = bench.exchange()
        assert ticket.places is not None
        held = bench.held.pop(ticket.places.number)
        assert former.throttles == {}
        tickets = [bench.open(owner) for owner in "ab"]  # in the order in which they stood, and a has just been served
        (ticket,) = bench.manager.release(held, bench.now)
        assert ticket.owner == "b"
        for each in tickets:
            assert isinstance(each, Ticket)
            bench.manager.cancel(each, bench.now)
        bench.run(LEASE + 2 * SECOND)


# --- permits ---


def permitted(enforce: bool = True, limit: Limit = MINUTELY) -> tuple[Succession, Places]:
    """An instance with a connection and one permit in its hand."""
    bench = Succession(enforce=enforce)
    session = bench.session("a")
    bench.register(session, (KEY, part(limit)))
    places = bench.opened("a", session)
    bench.want(session, 1)
    assert count(bench.collect()) == {"a": 1}
    return bench, places


def test_a_permit_that_is_used_after_the_change_is_a_permit_once() -> None:
    bench, places = permitted()
    bench.exchange()
    held = bench.held[places.number]
    assert bench.mails(held, 1) == 0
    assert bench.manager.unpermitted == 0
    assert bench.mails(held, 1) == 0
    assert bench.manager.unpermitted == 1


def test_a_permit_that_has_lapsed_explains_a_late_mail_after_the_change() -> None:
    bench, places = permitted()
    bench.run(SECOND)
    bench.exchange()
    assert bench.mails(bench.held[places.number], 1) == 1
    assert bench.manager.unpermitted == 0


def test_what_was_granted_without_a_limit_may_be_used_after_the_change() -> None:
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part()))
    places = bench.opened("a", session)
    bench.want(session, 10)
    bench.collect()
    bench.exchange()
    other = bench.session("b")
    bench.register(other, (KEY, part(MINUTELY)))
    assert bench.mails(bench.held[places.number], 10) == 0
    assert bench.manager.unpermitted == 0


@pytest.mark.parametrize("back", [True, False])
def test_a_message_without_a_permit_is_paid_for_after_the_change(back: bool) -> None:
    """Whether its instance is back or not, and also what was owed before it."""
    bench, places = permitted(limit=Limit(20, 1))
    bench.mails(places, 3)
    bench.exchange()
    if back:
        session = bench.session("a")
        bench.register(session, (KEY, part(Limit(20, 1))))
    bench.mails(bench.held[places.number], 1)
    if not back:
        session = bench.session("a")
        bench.register(session, (KEY, part(Limit(20, 1))))
    (flow,) = bench.manager.flows(session, [0])
    assert flow.fine == 3
    bench.manager.bye(session, bench.now)
    bench.exchange()
    session = bench.session("a")
    bench.register(session, (KEY, part(Limit(20, 1))))
    (flow,) = bench.manager.flows(session, [0])
    assert flow.fine == 3
    bench.run(SECOND)
    assert flow.fine == 0


def test_nobody_is_accused_for_the_time_before_the_first_of_them() -> None:
    bench = Succession()
    bench.manager = Manager(7, bench.now)
    session = bench.session("a")
    bench.register(session, (KEY, part(MINUTELY)))
    places = bench.opened("a", session)
    bench.exchange()
    bench.mails(bench.held[places.number], 1)
    assert bench.manager.unpermitted == 0
    bench.run(3 * SECOND)
    bench.mails(bench.held[places.number], 1)
    assert bench.manager.unpermitted == 1


def test_a_slot_that_came_back_goes_to_somebody_once() -> None:
    bench = Succession()
    sessions = {name: bench.session(name) for name in "ab"}
    for session in sessions.values():
        bench.register(session, (KEY, part(MINUTELY)))
    bench.want(sessions["a"], 1)
    (grant,) = bench.collect()["a"]
    bench.manager.give_back(sessions["a"], 0, 0, 1, bench.now)
    bench.exchange()
    bench.exchange()
    session = bench.session("b")
    bench.register(session, (KEY, part(MINUTELY)))
    bench.want(session, 2)
    (again,) = bench.collect()["b"]
    assert (again.n, again.first_offset_us) == (1, grant.first_offset_us)


def test_a_slot_that_came_back_is_void_when_slack_grows() -> None:
    """It was spaced for the smaller one."""
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(MINUTELY)))
    bench.want(session, 1)
    bench.collect()
    bench.manager.give_back(session, 0, 0, 1, bench.now)
    bench.exchange()
    throttle = bench.manager.throttles[KEY]
    (path,) = bench.manager._registry.paths()
    bench.manager._registry.stretch(path, SECOND, bench.now)
    assert (path.returned, throttle.slack) == (None, SECOND // 2)
    bench.run(LEASE + 2 * SECOND)
    assert list(bench.manager._registry.paths()) == []


def test_what_had_not_left_yet_is_given_out_again() -> None:
    """Here since the instance takes no frames; and what is kept for a message whose time has not come."""
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(MINUTELY)))
    bench.want(session, 1)
    bench.manager.ask_message("b", 1.0, "", "", bench.manager.flows(session, [0]), bench.now)
    bench.manager.freeze(bench.now)
    slots = [slot for record in read(bench.manager.gather(bench.now)).records for slot in getattr(record, "slots", [])]
    assert slots == [bench.now]


# --- places ---


def test_places_stay_until_who_has_the_sockets_gives_them_back() -> None:
    bench = Succession(block(max_concurrent_connections=2))
    first, second = bench.opened(), bench.opened("b")
    number = first.number
    for _ in range(3):
        bench.exchange()
        assert sorted(bench.held) == sorted([number, second.number])
        (throttle,) = bench.manager.blocks.throttles()
        assert (throttle.used, throttle.held) == (2, {"a": 1, "b": 1})
        ticket = bench.open("c")
        assert isinstance(ticket, Ticket)
        bench.manager.cancel(ticket, bench.now)
        number, second = bench.held[number].number, bench.held[second.number]
    waiting = bench.open("c")
    (first,) = [places for places in bench.held.values() if places.number == number]
    assert bench.manager.wanted(first)
    assert bench.manager.release(first, bench.now) == [waiting]
    assert bench.manager.release(first, bench.now) == []
    assert isinstance(bench.open("c"), Ticket)


def test_places_of_a_session_that_is_back_are_advised_about_as_one_owners() -> None:
    bench = Succession()
    sessions = {name: bench.session(name) for name in "ab"}
    for session in sessions.values():
        bench.register(session, (KEY, part(places=4)))
    places = [bench.opened("a", sessions["a"]) for _ in range(4)]
    bench.exchange()
    sessions = {name: bench.session(name) for name in "ab"}
    for session in sessions.values():
        bench.register(session, (KEY, part(places=4)))
    assert isinstance(bench.open("b", sessions["b"]), Ticket)
    bench.run(SECOND)
    assert bench.manager.swap(bench.held[places[0].number], "b", 1.0, SOURCE, MX, (), bench.now) is not None
    assert bench.manager.throttles[KEY].used == 4


def test_places_under_a_throttle_that_was_forgotten_meanwhile_are_handed_over() -> None:
    """Their flows were looked up before its session ended, and it was made anew since."""
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(places=2)), (ALL, part(places=3)))
    flows = bench.manager.flows(session, [0])
    bench.manager.bye(session, bench.now)
    bench.run(SECOND)
    other = bench.session("b")
    bench.register(other, (ALL, part(places=3)))
    places = bench.manager.admit("a", 1.0, SOURCE, MX, flows, bench.now)
    second = bench.opened("b", other)
    assert isinstance(places, Places)
    bench.exchange()
    assert (set(bench.held), set(bench.manager.throttles)) == ({places.number, second.number}, {ALL})
    assert bench.manager.throttles[ALL].used == 1
    for each in bench.held.values():
        bench.manager.release(each, bench.now)
    assert bench.manager.throttles[ALL].used == 0


def test_a_throttle_is_as_along_as_its_places() -> None:
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(places=2)), (ALL, part(places=3)))
    bench.opened("a", session)
    bench.exchange()
    throttles = bench.manager.throttles
    assert throttles[KEY].along == throttles[ALL].along == (throttles[KEY], throttles[ALL])


# --- the proxy's own ---


def test_blocks_go_on_where_they_were_and_new_settings_hold() -> None:
    rules = block(max_delivery_rate=(Rate(60, 3600),), max_connection_rate=(Rate(1, 60),))
    bench = Succession(rules)
    assert bench.opened("a")
    ticket = bench.manager.ask_message("a", 1.0, SOURCE, MX, (), bench.now)
    assert ticket is not None
    slots = sorted(each.earliest(bench.now) for each in bench.manager.blocks.throttles())
    bench.exchange()
    assert sorted(each.earliest(bench.now) for each in bench.manager.blocks.throttles()) == slots
    bench.run(SECOND)
    assert sorted(each.earliest(bench.now - SECOND) for each in bench.manager.blocks.throttles()) == slots
    bench.rules = Limits((block(max_delivery_rate=(Rate(120, 3600),)),))
    bench.exchange()
    bench.run(SECOND)
    limits = [[window.limit for window in each.windows] for each in bench.manager.blocks.throttles()]
    assert sorted(limits) == [[], [Limit(120, 3600)]]


def test_places_of_a_throttle_that_proxies_share_stay_and_its_slots_are_the_stores() -> None:
    """The next process asks the store for itself, and gives nothing before it has an answer."""
    rules = Limits((block(scope="cluster", max_concurrent_connections=3, max_delivery_rate=(Rate(60, 60),)),))

    def proxy(run: str, now: int) -> Manager:
        return Manager(1, now, blocks=rules, cluster=Cluster("p", run, 2, lambda: "0" * 16, now))

    bench = Succession()
    former = proxy("1", bench.now)
    assert former.ask_message("a", 1.0, SOURCE, MX, (), bench.now) is not None
    (throttle,) = former.blocks.throttles()
    assert isinstance(throttle, Leased)
    throttle.set_places(3)
    places = former.admit("a", 1.0, SOURCE, MX, (), bench.now, rated=False)
    assert isinstance(places, Places)
    former.freeze(bench.now)
    heir = proxy("2", bench.now)
    held = heir.adopt(read(former.gather(bench.now)), bench.now)
    (again,) = heir.blocks.throttles()
    assert isinstance(again, Leased)
    assert (again.used_here, again.holds("a"), again.in_hand) == (1, 1, 0)
    ticket = heir.ask_message("a", 1.0, SOURCE, MX, (), bench.now)
    assert ticket is not None
    assert not ticket.granted
    heir.release(held[places.number], bench.now)
    assert (again.used_here, again.limits, again.all_places) == (0, (MINUTELY,), 3)


def house_of(*rules: BackoffSettings) -> House:
    return House(block(*rules, max_delivery_rate=(Rate(60, 60),), max_concurrent_connections=20))


def succeeded(house: House, *rules: BackoffSettings) -> House:
    blocks = block(*rules, max_delivery_rate=(Rate(60, 60),), max_concurrent_connections=20)
    house.manager, house.held = heir_of(house.manager, house.now, Limits((blocks,)))  # type: ignore[attr-defined]
    house.pass_by(MILLISECOND)
    return house


def test_a_back_off_goes_on_begins_anew_with_the_next_reply_and_ends() -> None:
    house = house_of(QUARTER)
    house.reply(house.opened())
    house.pass_by(1800 * SECOND)
    house = succeeded(house, QUARTER)
    assert house.limits() == [(15, 60)]
    ((key, slowdown),) = house.manager.blocks.backoffs.active()
    assert (str(key), [cause.instance for cause in slowdown.causes]) == ("yahoo for 192.0.2.1", ["a"])
    assert slowdown.causes[0].reply.startswith("421 4.7.0")
    house.pass_by(1700 * SECOND)
    assert house.limits() == [(15, 60)]
    house.reply(house.opened())
    assert len(slowdown.causes) == 1, "it is the same rule"
    house.pass_by(3599 * SECOND)
    assert house.limits() == [(15, 60)]
    house.pass_by(601 * SECOND)
    assert house.limits() == [(60, 60)]
    assert house.manager.blocks.backoffs.begun == 1


def test_replies_that_were_let_pass_count_on_and_a_pause_pauses() -> None:
    house = house_of(FEW)
    for _ in range(2):
        house.reply(house.opened(), "450 busy")
    house = succeeded(house, FEW)
    house.reply(house.opened(), "450 busy")
    assert isinstance(house.open(), Ticket)
    house = succeeded(house, FEW)
    assert isinstance(house.open(), Ticket)
    house.pass_by(1201 * SECOND)
    assert isinstance(house.open(), Places)


def test_a_back_off_is_over_where_its_block_has_no_rule_for_one_any_more() -> None:
    house = house_of(QUARTER)
    house.reply(house.opened())
    assert house.limits() == [(15, 60)]
    assert succeeded(house).limits() == [(60, 60)]


def test_the_keys_that_were_told_something_the_longest_time_ago_go_first_afterwards() -> None:
    house = house_of(QUARTER)
    for source in ("192.0.2.9", "192.0.2.1", "192.0.2.5"):
        house.reply(house.opened(source))
    keys = [key for key, _ in house.manager.blocks.backoffs.everything()]
    assert [key for key, _ in succeeded(house, QUARTER).manager.blocks.backoffs.everything()] == keys
    assert isinstance(house.manager.blocks.backoffs, Backoffs)


def test_what_was_set_by_hand_keeps_its_number_and_its_end() -> None:
    bench = Succession(block(max_concurrent_connections=5))
    places = bench.opened()
    bench.manager.set_by_hand(Override("gmail", "", False, 1, (), bench.now + 5 * SECOND, "x"), bench.now)
    number = bench.manager.set_by_hand(
        Override("yahoo", SOURCE, False, 1, (MINUTELY,), bench.now + 100 * SECOND, "trouble"), bench.now
    )
    bench.manager.set_by_hand(Override("aol", "", True, 0, (), bench.now + 100 * SECOND), bench.now)
    bench.manager.end_by_hand(lambda each, _: each == 3, bench.now)
    known = bench.manager.overrides.items()
    bench.exchange()
    assert bench.manager.overrides.items() == known
    assert isinstance(bench.open("b"), Ticket)
    assert bench.manager.set_by_hand(Override("aol", "", True, 0, (), bench.now + SECOND), bench.now) == 4
    bench.run(6 * SECOND)
    assert [each for each, _ in bench.manager.overrides.items()] == [number]
    bench.manager.release(bench.held[places.number], bench.now)
    bench.run(100 * SECOND)
    assert bench.manager.overrides.items() == []
    assert isinstance(bench.open("c"), Places)


def test_a_pause_by_hand_pauses_instances_too() -> None:
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part()))
    bench.manager.set_by_hand(Override("yahoo", "", True, 0, (), bench.now + 60 * SECOND), bench.now)
    bench.run(MILLISECOND)
    bench.exchange()
    session = bench.session("a")
    bench.register(session, (KEY, part()))
    bench.want(session, 5)
    assert count(bench.run(59 * SECOND)) == {}
    assert count(bench.run(2 * SECOND)) == {"a": 5}


def test_what_was_ended_by_hand_just_before_is_over() -> None:
    """It reaches the throttles by and by, and has not reached them yet."""
    bench = Succession()
    session = bench.session("a")
    keys = [Key(SOURCE, f"rule{number}") for number in range(40)]
    for id, key in enumerate(keys):
        bench.register(session, (key, part(places=9)), id=id)
        bench.manager.set_by_hand(Override(key.name, "", False, 1, (), bench.now + 60 * SECOND), bench.now)
    bench.run(SECOND)
    bench.manager.end_by_hand(lambda number, override: True, bench.now)
    assert {each.cap for each in bench.manager.throttles.values()} != {9}
    bench.exchange()
    bench.exchange()
    bench.run(SECOND)
    assert {each.cap for each in bench.manager.throttles.values()} == {9}


def test_figures_go_on() -> None:
    bench, places = permitted(enforce=False)
    bench.mails(places, 3)
    places.carried(3, 2, 1)
    bench.exchange()
    carried = bench.manager.throttles[KEY].carried
    assert carried is not None
    assert (carried.accepted, carried.deferred, carried.rejected) == (3, 2, 1)
    assert bench.manager.unpermitted == 2
    assert bench.manager.incarnation == 7


# --- frozen ---


def test_a_frozen_one_gives_nothing_and_asks_for_no_time() -> None:
    bench = Succession(block(max_concurrent_connections=1, max_delivery_rate=(Rate(600, 60),)))
    session = bench.session("a")
    bench.register(session, (KEY, part(MINUTELY, places=1)))
    places = bench.opened()
    waiting = bench.open("b")
    bench.want(session, 50)
    bench.collect()
    bench.manager.freeze(bench.now)
    bench.manager.freeze(bench.now + 1)
    bench.now += 5 * SECOND
    assert bench.manager.next_wakeup() is None
    bench.manager.advance(bench.now)
    bench.want(session, 60)
    assert bench.collect() == {}
    assert bench.manager.take(session, bench.now).grants == []
    assert bench.manager.release(places, bench.now) == []
    assert bench.manager.heir(places, bench.now) is None
    assert bench.manager.swap(places, "c", 1.0, SOURCE, MX, (), bench.now) is None
    asked = bench.open("c")
    assert isinstance(asked, Ticket)
    assert bench.manager.refusal(asked, bench.now).throttle == "yahoo"
    message = bench.manager.ask_message("c", 1.0, SOURCE, MX, (), bench.now)
    assert isinstance(message, MessageTicket)
    assert not message.granted
    assert bench.manager.take_granted() == bench.manager.take_admitted() == []
    assert isinstance(waiting, Ticket)
    assert waiting.places is None


def test_a_frozen_one_answers_pings_and_nobody_is_lost_by_it() -> None:
    """What was to be sent when it froze is sent afterwards."""
    bench = Succession()
    session = bench.session("a")
    bench.register(session, (KEY, part(MINUTELY)))
    bench.want(session, 1)
    bench.manager.freeze(bench.now)
    bench.now += 20 * SECOND
    bench.manager.ping(session, 77, bench.now)
    assert bench.manager.take_ready() == [session]
    output = bench.manager.take(session, bench.now + 2000)
    assert (output.pongs[-1], output.ping, output.limits, output.grants) == (PongRecord(77, 2), None, [], [])
    bench.manager.thaw(bench.now)
    assert count(bench.run(SECOND)) == {"a": 1}
    assert session.end is None


def test_much_that_was_said_is_done_in_steps_and_what_comes_then_is_behind_it() -> None:
    bench = Succession(block(max_concurrent_connections=1))
    places = bench.opened("first")
    bench.manager.freeze(bench.now)
    tickets = [bench.open(f"owner{number}") for number in range(2 * THAWED + 1)]
    bench.manager.release(places, bench.now)
    bench.manager.thaw(bench.now)
    assert (bench.manager.frozen, bench.manager.next_wakeup()) == (False, 0)
    last = bench.open("last")
    assert isinstance(last, Ticket)
    bench.manager.advance(bench.now)
    assert bench.manager.next_wakeup() == 0
    assert bench.manager.take_admitted() == []
    bench.manager.advance(bench.now)
    assert bench.manager.next_wakeup() != 0
    assert bench.manager.take_admitted() == [tickets[0]]
    (throttle,) = bench.manager.blocks.throttles()
    assert throttle.line is not None
    assert throttle.line.size == 2 * THAWED + 1
    assert last.blocker is throttle


def test_frozen_again_before_all_is_done_it_does_that_first() -> None:
    bench = Succession(block(max_concurrent_connections=1))
    places = bench.opened("first")
    bench.manager.freeze(bench.now)
    for number in range(THAWED):
        bench.open(f"owner{number}")
    bench.manager.release(places, bench.now)
    bench.manager.thaw(bench.now)
    with pytest.raises(ValueError, match="a manager that goes on"):
        bench.manager.gather(bench.now)
    bench.exchange()
    (throttle,) = bench.manager.blocks.throttles()
    assert (throttle.used, throttle.held) == (1, {"owner0": 1})


@pytest.mark.parametrize("before", [True, False])
def test_who_asks_a_frozen_one_and_leaves_has_not_asked(before: bool) -> None:
    """A place and a slot; and who had asked before, and leaves meanwhile."""
    rules = block(max_concurrent_connections=2, max_delivery_rate=(Rate(60, 60),))
    bench = Succession(rules)
    bench.manager.ask_message("a", 1.0, SOURCE, MX, (), bench.now)
    places = bench.manager.admit("a", 1.0, SOURCE, MX, (), bench.now, rated=False)
    bench.manager.admit("b", 1.0, SOURCE, MX, (), bench.now, rated=False)
    known = [bench.manager.admit("a", 1.0, SOURCE, MX, (), bench.now, rated=False)] if before else []
    messages = [bench.manager.ask_message("a", 1.0, SOURCE, MX, (), bench.now)] if before else []
    assert len(bench.manager.take_granted()) == 1
    bench.manager.freeze(bench.now)
    tickets = known or [bench.manager.admit("c", 1.0, SOURCE, MX, (), bench.now, rated=False)]
    messages = messages or [bench.manager.ask_message("c", 1.0, SOURCE, MX, (), bench.now)]
    last = bench.manager.ask_message("a", 1.0, SOURCE, MX, (), bench.now)
    for ticket, message in zip(tickets, messages, strict=True):
        assert isinstance(ticket, Ticket)
        assert message is not None
        assert bench.manager.cancel(ticket, bench.now) == []
        bench.manager.cancel_message(message, bench.now)
    assert isinstance(places, Places)
    bench.manager.release(places, bench.now)
    bench.manager.thaw(bench.now)
    assert bench.manager.take_admitted() == []
    (throttle,) = bench.manager.blocks.throttles()
    assert (throttle.used, throttle.line) == (1, None)
    bench.run(SECOND + MILLISECOND)
    assert bench.manager.take_granted() == [last]
    assert throttle.taken == 2
    bench.run(5 * SECOND)
    assert (throttle.taken, throttle.slots, bench.manager._desk.clerks) == (2, None, {})


@pytest.mark.parametrize(
    "call",
    [
        lambda manager, now: manager.set_by_hand(Override("a", "", True, 0, (), now), now),
        lambda manager, now: manager.end_by_hand(lambda number, override: True, now),
        lambda manager, now: manager.end_backoff("a", now),
        lambda manager, now: manager.reload(True, Limits(()), now),
    ],
)
def test_what_an_operator_does_meanwhile_is_refused(call) -> None:
    bench = Succession()
    bench.manager.freeze(bench.now)
    with pytest.raises(Frozen, match="in a moment"):
        call(bench.manager, bench.now)
    bench.manager.thaw(bench.now)
    call(bench.manager, bench.now)


def test_one_that_goes_on_cannot_be_gathered() -> None:
    bench = Succession()
    with pytest.raises(ValueError, match="a manager that goes on"):
        bench.manager.gather(bench.now)


def test_it_is_gathered_once() -> None:
    bench = Succession()
    for _ in range(2):
        bench.manager.freeze(bench.now)
        list(bench.manager.gather(bench.now))
        with pytest.raises(ValueError, match="would be lost"):
            bench.manager.gather(bench.now)
        bench.manager.thaw(bench.now)


def test_what_closed_before_it_was_gathered_is_closed() -> None:
    bench, places = permitted()
    bench.manager.freeze(bench.now)
    assert len(bench.manager.mail(places, bench.now).spent) == 1
    bench.manager.release(places, bench.now)
    bench.exchange()
    assert (bench.manager.throttles[KEY].used, bench.held) == (0, {})
    session = bench.session("a")
    bench.register(session, (KEY, part(MINUTELY)))
    bench.mails(bench.opened("a", session), 1)
    assert bench.manager.unpermitted == 1


def test_nothing_of_another_machines_clock_is_adopted() -> None:
    bench = Succession()
    bench.manager.freeze(bench.now)
    estate = read(bench.manager.gather(bench.now))
    with pytest.raises(Unreadable, match="another machine"):
        Manager(1, 0).adopt(estate, bench.now - 1)


def test_what_happens_meanwhile_reaches_the_next() -> None:
    """A permit is used, one in vain, a message without one, a socket is closed, a receiver replies."""
    rules = block(QUARTER, max_concurrent_connections=4)
    bench = Succession(rules, enforce=True)
    session = bench.session("a")
    bench.register(session, (OTHER, part(Limit(3, 60, 2))))
    first, second = bench.opened("a", session), bench.opened("b")
    bench.run(120 * SECOND)
    bench.want(session, 2)
    assert count(bench.collect()) == {"a": 2}
    bench.manager.freeze(bench.now)
    chunks = list(bench.manager.gather(bench.now))
    used = [bench.manager.mail(first, bench.now) for _ in range(3)]
    assert [len(each.spent) for each in used] == [1, 1, 0]
    bench.manager.in_vain(used[1], bench.now)
    bench.manager.release(second, bench.now)
    bench.manager.replied(first, "421 later", bench.now)
    heir = Manager(0, bench.now, True, Limits((rules,)))
    held = heir.adopt(read(chunks), bench.now)
    (chunk,) = bench.manager.meanwhile()
    heir.adopt_meanwhile(chunk, held, bench.now)
    assert bench.manager.meanwhile() == []
    assert set(held) == {first.number}
    (throttle,) = heir.blocks.throttles()
    assert (throttle.used, throttle.cap) == (1, 1)
    bench.manager = heir
    back = bench.session("a")
    bench.register(back, (OTHER, part(Limit(3, 60, 2))))
    (flow,) = heir.flows(back, [0])
    assert flow.fine == 1
    assert bench.mails(held[first.number], 1) == 0
    assert flow.fine == 1
    bench.mails(held[first.number], 1)
    assert flow.fine == 2


def test_a_damaged_word_of_what_happened_meanwhile_does_nothing() -> None:
    bench, places = permitted()
    bench.exchange()
    with pytest.raises(Unreadable):
        bench.manager.adopt_meanwhile(b"\x91\x92\x12", bench.held, bench.now)
    assert set(bench.held) == {places.number}
