"""Connection places: all or none, fair lines, advice, hand-over, the proxy's own throttles, debts."""

from __future__ import annotations

import random
from ipaddress import ip_network

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.policy.limits import Limits
from proxy.settings import Rate, ThrottleSettings
from proxy.throttling.advice import NO_CAP
from proxy.throttling.core import SWEEP
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.session import Session
from proxy.throttling.throttle import LATENESS, SECOND, Key, Limit
from tests.unit.throttling.benches import ALL, KEY, OTHER, SOURCE, Bench, part
from tests.unit.throttling.oracle import Rule, check_windows

MS = 1_000_000
MX = "67.195.204.7"


class Doors(Bench):
    """A bench whose sessions open connections."""

    def joined(self, name: str, places: int, weight: float = 1.0) -> Session:
        session = self.session(name, weight)
        self.register(session, (KEY, part(places=places)))
        self.collect()
        return session

    def open(self, session: Session, *ids: int) -> Places | Ticket:
        flows = self.manager.flows(session, ids or (0,))
        return self.manager.admit(session.name, session.weight, SOURCE, MX, flows, self.now)

    def opened(self, session: Session, *ids: int) -> Places:
        answer = self.open(session, *ids)
        assert isinstance(answer, Places)
        return answer

    def waiting(self, session: Session, *ids: int) -> Ticket:
        answer = self.open(session, *ids)
        assert isinstance(answer, Ticket)
        assert answer.places is None
        return answer

    def stranger(self, owner: str, source: str = SOURCE, destination: str = MX, weight: float = 1.0) -> Places | Ticket:
        return self.manager.admit(owner, weight, source, destination, (), self.now)

    def close(self, places: Places | None) -> list[Ticket]:
        assert places is not None
        return self.manager.release(places, self.now)

    def used(self, key: Key = KEY) -> int:
        return self.manager.throttles[key].used


@pytest.fixture
def doors() -> Doors:
    return Doors()


def test_without_limits_everybody_gets_in(doors: Doors) -> None:
    session = doors.joined("a", 0)
    places = [doors.opened(session) for _ in range(50)]
    assert doors.used() == 50
    assert doors.manager.active_throttles(doors.now) == 1
    for each in places:
        assert doors.close(each) == []
    assert (doors.used(), doors.manager.active_throttles(doors.now)) == (0, 0)


def test_over_the_limit_waits_and_a_close_lets_in(doors: Doors) -> None:
    session = doors.joined("a", 2)
    first, second = doors.opened(session), doors.opened(session)
    ticket, later = doors.waiting(session), doors.waiting(session)
    assert doors.close(first) == [ticket]
    assert isinstance(ticket.places, Places)
    assert doors.close(second) == [later]
    assert doors.used() == 2


def test_a_socket_closed_twice_frees_one_place(doors: Doors) -> None:
    session = doors.joined("a", 1)
    places = doors.opened(session)
    tickets = [doors.waiting(session), doors.waiting(session)]
    assert doors.close(places) == tickets[:1]
    assert doors.close(places) == []
    assert doors.used() == 1


def test_a_cancelled_request_lets_the_next_in(doors: Doors) -> None:
    session = doors.joined("a", 1)
    places = doors.opened(session)
    first, second = doors.waiting(session), doors.waiting(session)
    assert doors.manager.cancel(first, doors.now) == []
    assert doors.manager.cancel(first, doors.now) == []
    assert doors.close(places) == [second]


def test_cancelling_what_got_in_meanwhile_gives_the_place_on(doors: Doors) -> None:
    session = doors.joined("a", 1)
    places = doors.opened(session)
    first, second = doors.waiting(session), doors.waiting(session)
    assert doors.close(places) == [first]
    assert doors.manager.cancel(first, doors.now) == [second]
    assert doors.used() == 1


def test_all_throttles_of_a_path_or_none(doors: Doors) -> None:
    session = doors.session("a")
    doors.register(session, (KEY, part(places=5)), (ALL, part(places=1)), id=0)
    doors.register(session, (OTHER, part(places=5)), (ALL, part(places=1)), id=1)
    places = doors.opened(session, 0)
    ticket = doors.waiting(session, 1)
    assert (doors.used(KEY), doors.used(OTHER), doors.used(ALL)) == (1, 0, 1)
    assert doors.manager.refusal(ticket, doors.now).throttle == ALL.name
    assert doors.close(places) == [ticket]
    assert (doors.used(KEY), doors.used(OTHER), doors.used(ALL)) == (0, 1, 1)


def test_a_ticket_that_waits_elsewhere_does_not_keep_others_out(doors: Doors) -> None:
    session = doors.session("a")
    doors.register(session, (KEY, part(places=1)), (ALL, part(places=3)), id=0)
    doors.register(session, (OTHER, part(places=9)), (ALL, part(places=3)), id=1)
    doors.opened(session, 0)
    doors.waiting(session, 0)
    doors.opened(session, 1)
    last = doors.opened(session, 1)
    first = doors.waiting(session, 1)
    second = doors.waiting(session, 0)  # behind the other in the line of its own rule
    assert doors.close(last) == [first]
    assert second.places is None


def test_fewest_places_first(doors: Doors) -> None:
    a, b = doors.joined("a", 4), doors.joined("b", 4)
    held = [doors.opened(a) for _ in range(4)]
    for _ in range(3):
        doors.waiting(a)
        doors.waiting(b)
    assert [doors.close(each)[0].owner for each in held] == ["b", "b", "a", "a"]


def test_weights_of_places(doors: Doors) -> None:
    a, b = doors.joined("a", 8, 1.0), doors.joined("b", 8, 3.0)
    held = [doors.opened(a) for _ in range(8)]
    for _ in range(8):
        doors.waiting(a)
        doors.waiting(b)
    for each in held:
        doors.close(each)
    throttle = doors.manager.throttles[KEY]
    assert (throttle.holds("a"), throttle.holds("b")) == (2, 6)


def test_fewer_places_than_instances_go_round(doors: Doors) -> None:
    """C = 2, five instances that always want one more: within five turns each was served twice."""
    sessions = [doors.joined(f"s{index}", 2) for index in range(5)]
    by_name = {session.name: session for session in sessions}
    current = [doors.opened(sessions[0]), doors.opened(sessions[0])]
    for session in sessions:
        for _ in range(3):
            doors.waiting(session)
    served = []
    for _ in range(10):
        (ticket,) = doors.close(current.pop(0))
        assert ticket.places is not None
        current.append(ticket.places)
        served.append(ticket.owner)
        doors.waiting(by_name[ticket.owner])
    assert sorted(served) == sorted(2 * [f"s{index}" for index in range(5)])
    assert all(len(set(served[i : i + 5])) >= 4 for i in range(5))


def test_shares_of_short_sessions_are_fair(doors: Doors) -> None:
    """Everybody wants twenty at once, sessions last a random while: the places are full and divided evenly."""
    rng = random.Random(1)
    sessions = [doors.joined(f"s{index}", 10) for index in range(3)]
    by_name = {session.name: session for session in sessions}
    current: list[Places] = []
    for session in sessions:
        for _ in range(20):
            answer = doors.open(session)
            if isinstance(answer, Places):
                current.append(answer)
    held = dict.fromkeys(by_name, 0)
    for turn in range(600):
        places = current.pop(rng.randrange(len(current)))
        for ticket in doors.close(places):
            assert ticket.places is not None
            current.append(ticket.places)
        doors.waiting(by_name[places.owner])
        assert doors.used() == 10
        if turn >= 50:
            for each in current:
                held[each.owner] += 1
    shares = list(held.values())
    assert sum(shares) ** 2 / (3 * sum(share * share for share in shares)) >= 0.999


def test_a_session_that_dies_keeps_its_places_until_the_socket_is_closed(doors: Doors) -> None:
    a, b = doors.joined("a", 1), doors.joined("b", 1)
    places = doors.opened(a)  # connecting
    ticket = doors.waiting(b)
    doors.manager.lost(a, doors.now)
    doors.run(30 * SECOND)
    assert ticket.places is None
    assert doors.close(places) == [ticket]


def test_places_outlive_the_throttles_last_session(doors: Doors) -> None:
    session = doors.joined("a", 1)
    places = doors.opened(session)
    doors.manager.bye(session, doors.now)
    doors.run(20 * SECOND)
    again = doors.joined("a", 1)
    ticket = doors.waiting(again)  # the old socket still counts
    assert doors.close(places) == [ticket]


def test_the_key_goes_with_the_last_place(doors: Doors) -> None:
    session = doors.joined("a", 1)
    places = doors.opened(session)
    doors.manager.bye(session, doors.now)
    doors.run(20 * SECOND)
    assert KEY in doors.manager.throttles
    doors.close(places)
    assert KEY not in doors.manager.throttles


def test_c_lowered_below_what_is_open(doors: Doors) -> None:
    session = doors.joined("a", 4)
    held = [doors.opened(session) for _ in range(4)]
    doors.register(session, (KEY, part(places=2)))
    ticket = doors.waiting(session)
    assert doors.close(held[0]) == []
    assert doors.close(held[1]) == []
    assert doors.close(held[2]) == [ticket]


def test_c_raised_lets_in_at_once(doors: Doors) -> None:
    session = doors.joined("a", 1)
    doors.opened(session)
    tickets = [doors.waiting(session) for _ in range(3)]
    doors.register(session, (KEY, part(places=3)))
    assert doors.manager.take_admitted() == tickets[:2]


def test_paused_waits_until_it_is_not(doors: Doors) -> None:
    session = doors.joined("a", 3)
    doors.register(session, (KEY, part(places=3, paused=True)))
    ticket = doors.waiting(session)
    assert "paused" in str(doors.manager.refusal(ticket, doors.now))
    doors.register(session, (KEY, part(places=3)))
    assert doors.manager.take_admitted() == [ticket]


def test_paused_and_cancelled(doors: Doors) -> None:
    session = doors.joined("a", 3)
    doors.register(session, (KEY, part(places=3, paused=True)))
    ticket = doors.waiting(session)
    doors.manager.cancel(ticket, doors.now)
    doors.register(session, (KEY, part(places=3)))
    assert (doors.manager.take_admitted(), doors.used()) == ([], 0)


def test_unknown_path(doors: Doors) -> None:
    with pytest.raises(KeyError):
        doors.open(doors.joined("a", 1), 7)


def test_refusal_names_the_throttle_and_when_to_come_back(doors: Doors) -> None:
    session = doors.joined("a", 1)
    doors.opened(session)
    error = doors.manager.refusal(doors.waiting(session), doors.now)
    assert str(error) == "throttle yahoo for 192.0.2.1: 1 of 1 connections are in use; try again in 10 s"
    assert (error.throttle, error.retry_after, error.retry) == ("yahoo", 10.0, True)


# --- cached connections ---


def test_a_cached_connection_is_handed_over_between_two_paths(doors: Doors) -> None:
    a, b = doors.session("a"), doors.session("b")
    doors.register(a, (KEY, part(places=1)), (ALL, part(places=1)))
    doors.register(b, (OTHER, part(places=1)), (ALL, part(places=1)))
    old = doors.opened(a)
    flows = doors.manager.flows(b, (0,))
    new = doors.manager.swap(old, "b", 1.0, SOURCE, MX, flows, doors.now)
    assert new is not None
    assert (doors.used(KEY), doors.used(OTHER), doors.used(ALL)) == (0, 1, 1)
    assert doors.manager.throttles[ALL].held == {"b": 1}
    assert doors.close(old) == []  # those places are no longer this record's
    assert doors.used(ALL) == 1
    doors.close(new)
    assert doors.used(ALL) == 0


def test_no_hand_over_into_a_full_throttle(doors: Doors) -> None:
    a, b = doors.session("a"), doors.session("b")
    doors.register(a, (KEY, part(places=1)))
    doors.register(b, (OTHER, part(places=1)))
    old = doors.opened(a)
    doors.opened(b)
    assert doors.manager.swap(old, "b", 1.0, SOURCE, MX, doors.manager.flows(b, (0,)), doors.now) is None
    assert (doors.used(KEY), old.open) == (1, True)


def test_a_hand_over_frees_the_old_path_for_those_who_wait(doors: Doors) -> None:
    a, b = doors.session("a"), doors.session("b")
    doors.register(a, (KEY, part(places=1)))
    doors.register(b, (OTHER, part(places=1)))
    old = doors.opened(a)
    ticket = doors.waiting(a)
    assert doors.manager.swap(old, "b", 1.0, SOURCE, MX, doors.manager.flows(b, (0,)), doors.now) is not None
    assert doors.manager.take_admitted() == [ticket]


def test_a_cached_connection_gives_way(doors: Doors) -> None:
    """An OPEN waits: it says for what, the cached one under that limit is told, closes, and the OPEN gets in."""
    a, b = doors.joined("a", 1), doors.joined("b", 1)
    cached = doors.opened(a)
    assert not doors.manager.wanted(cached)
    ticket = doors.waiting(b)
    assert doors.manager.wanted(cached)
    assert doors.manager.take_blocked() == list(cached.throttles)
    assert doors.close(cached) == [ticket]
    assert not doors.manager.wanted(ticket.places)  # type: ignore[arg-type]


# --- advice ---


def advice(doors: Doors, session: Session) -> list[int]:
    return [cap for _, cap in doors.caps.pop(session, [])]


def test_advice_for_many_throttles_is_worked_out_some_at_a_time(doors: Doors) -> None:
    session = doors.session("a")
    count = 3 * SWEEP
    for id in range(count):
        doors.register(session, (Key(SOURCE, f"rule{id}"), part(places=1)), id=id)
    doors.run(SECOND)
    adviser = doors.manager._adviser
    assert not adviser.wheel, "nobody is there: there is nothing to advise"
    for id in range(count):
        doors.opened(session, id)
        doors.waiting(session, id)
    doors.now += SECOND
    rounds = []
    while any(len(throttle.terms.advice or ()) == 0 for throttle in doors.manager.throttles.values()):
        assert doors.manager.next_wakeup() < doors.now, "at once"
        before = len(session.caps)
        doors.manager.advance(doors.now)
        rounds.append(len(session.caps) - before)
    assert rounds == [SWEEP] * 3


def test_advice_comes_and_is_lifted(doors: Doors) -> None:
    a, b = doors.joined("a", 4), doors.joined("b", 4)
    held = [doors.opened(a) for _ in range(4)]
    doors.run(SECOND)
    assert advice(doors, a) == []
    tickets = [doors.waiting(b), doors.waiting(b)]
    doors.run(100 * MS)
    assert (advice(doors, a), advice(doors, b)) == ([2], [2])
    for each in held[:2]:
        doors.close(each)
    doors.run(100 * MS)
    assert all(ticket.places for ticket in tickets)
    assert (advice(doors, a), advice(doors, b)) == ([NO_CAP], [NO_CAP])


def test_advice_up_down_up(doors: Doors) -> None:
    a, b = doors.joined("a", 8), doors.joined("b", 8)
    for _ in range(8):
        doors.opened(a)
    tickets = [doors.waiting(b) for _ in range(4)]
    doors.run(SECOND)
    for ticket in tickets[1:]:
        doors.manager.cancel(ticket, doors.now)
    doors.run(SECOND)
    again = [doors.waiting(b) for _ in range(3)]
    doors.run(SECOND)
    assert advice(doors, a) == [4, 7, 4]
    for ticket in again:
        doors.manager.cancel(ticket, doors.now)
    doors.manager.cancel(tickets[0], doors.now)
    doors.run(SECOND)
    assert advice(doors, a) == [NO_CAP]


def test_no_advice_for_a_difference_of_one_within_ten_seconds(doors: Doors) -> None:
    a, b = doors.joined("a", 8), doors.joined("b", 8)
    for _ in range(8):
        doors.opened(a)
    doors.waiting(b)
    doors.waiting(b)
    doors.run(SECOND)
    assert advice(doors, a) == [6]
    doors.waiting(b)
    doors.run(8 * SECOND)
    assert advice(doors, a) == []
    doors.run(3 * SECOND)
    assert advice(doors, a) == [5]


def test_long_data_past_the_advice_is_left_alone(doors: Doors) -> None:
    """A session that gives nothing back keeps what it has, and comes last from then on."""
    a, b = doors.joined("a", 2), doors.joined("b", 2)
    held = [doors.opened(a), doors.opened(a)]
    doors.waiting(a)
    ticket = doors.waiting(b)
    doors.run(300 * SECOND)
    assert all(each.open for each in held)
    assert doors.close(held[0]) == [ticket]


def test_the_remainder_of_the_advice_rotates(doors: Doors) -> None:
    """C = 1 for two: each is advised to have it in turn."""
    a, b = doors.joined("a", 1), doors.joined("b", 1)
    doors.opened(a)
    doors.waiting(b)
    doors.run(60 * SECOND)
    assert set(advice(doors, a)) == {0, 1}
    assert set(advice(doors, b)) == {0, 1}


def test_advice_is_divided_among_the_paths_of_a_session(doors: Doors) -> None:
    a, b = doors.session("a"), doors.session("b")
    for id, key in enumerate((KEY, OTHER)):
        doors.register(a, (key, part()), (ALL, part(places=8)), id=id)
    doors.register(b, (ALL, part(places=8)))
    for id in (0, 0, 0, 0, 0, 0, 1, 1):
        doors.opened(a, id)
    for _ in range(8):
        doors.waiting(b)
    doors.collect()
    doors.run(100 * MS)
    assert sorted(doors.caps[a]) == [(0, 2), (1, 2)]
    assert doors.caps[b] == [(0, 4)]


# --- messages without a permit ---


def audited(enforce: bool) -> tuple[Doors, Session, Places]:
    doors = Doors()
    doors.manager.enforce = enforce
    session = doors.session("a")
    doors.register(session, (KEY, part(Limit(10, 1))))
    doors.want(session, 3)
    doors.run(250 * MS)  # one of the three is still good
    return doors, session, doors.opened(session)


def test_messages_with_permits_are_not_remarked() -> None:
    doors, session, places = audited(True)
    assert doors.mails(places, 1) == 0
    doors.want(session, 1)
    doors.run(100 * MS)
    assert doors.mails(places, 1) == 0
    assert (doors.manager.unpermitted, doors.manager.take_notices()) == (0, [])


def test_permits_that_have_lapsed_are_no_credit() -> None:
    """200 messages in a second went by unnoticed at 20/s: now each of them waits for a slot of its own."""
    doors = Doors()
    session = doors.session("a")
    doors.register(session, (KEY, part(Limit(20, 1))))
    doors.want(session, 200)
    doors.run(11 * SECOND)
    places = doors.opened(session)
    assert doors.got[session] == 200
    late = doors.mails(places, 200)
    assert late >= 195
    assert doors.manager.unpermitted == 0
    assert [remark.notice for remark in doors.manager.take_notices()] == ["late"]
    assert doors.mails(places, 1) == 0
    assert doors.manager.unpermitted == 1, "there is nothing left that it could be late for"


def test_what_lapsed_long_ago_is_nothing() -> None:
    doors, _, places = audited(False)
    doors.run(301 * SECOND)
    assert doors.mails(places, 1) == 0
    assert doors.manager.unpermitted == 1


def test_a_message_in_vain_gives_its_permit_back() -> None:
    doors, _, places = audited(False)
    mail = doors.manager.mail(places, doors.now)
    assert not mail.late
    doors.manager.in_vain(mail, doors.now)
    assert doors.mails(places, 1) == 0
    late = doors.manager.mail(places, doors.now)
    assert late.late
    doors.manager.in_vain(late, doors.now)
    assert doors.mails(places, 3) == 2
    assert doors.manager.unpermitted == 1


def test_a_permit_that_a_message_has_used_cannot_be_returned() -> None:
    """It would be given out a second time."""
    doors, session, places = audited(False)
    other = doors.session("b")
    doors.register(other, (KEY, part(Limit(10, 1))))
    doors.mails(places, 1)
    doors.want(other, 1)
    before = doors.run(0)
    doors.manager.give_back(session, 0, 2, 1, doors.now)
    assert (before, doors.run(0)) == ({}, {})


def test_messages_without_are_counted_and_told_once_a_minute() -> None:
    doors, session, places = audited(False)
    for _ in range(10):
        doors.mails(places, 1)
    assert (doors.manager.unpermitted, session.unpermitted) == (7, 7)
    late, remark = doors.manager.take_notices()
    assert (late.notice, late.instance) == ("late", "a")
    assert (remark.notice, remark.instance) == ("unpermitted", "a")
    doors.run(60 * SECOND)
    doors.mails(places, 1)
    assert len(doors.manager.take_notices()) == 1
    doors.opened(session)  # counted, not enforced


def test_returned_permits_do_not_count() -> None:
    doors, _, places = audited(False)
    doors.want(doors.manager.sessions["a"], 1)
    doors.collect()
    doors.manager.give_back(doors.manager.sessions["a"], 0, 3, 1, doors.now)
    doors.mails(places, 4)
    assert doors.manager.unpermitted == 1


def test_enforced_the_next_open_waits_until_the_debt_is_paid() -> None:
    doors, session, places = audited(True)
    doors.run(SECOND)
    doors.mails(places, 8)
    ticket = doors.waiting(session)
    assert "4 messages were sent without a permit" in str(doors.manager.refusal(ticket, doors.now))
    assert doors.run(350 * MS) == {}  # its slots pay the debt
    assert ticket.places is None
    doors.run(250 * MS)
    assert doors.manager.take_admitted() == [ticket]
    doors.want(session, 1)
    doors.run(SECOND)
    assert doors.got[session] == 4


def test_a_reconnect_does_not_pay_the_debt() -> None:
    doors, session, places = audited(True)
    doors.mails(places, 8)
    doors.manager.lost(session, doors.now)
    again = doors.session("a")
    doors.register(again, (KEY, part(Limit(10, 1))))
    ticket = doors.waiting(again)
    doors.run(300 * MS)
    assert ticket.places is None
    doors.run(400 * MS)
    assert doors.manager.take_admitted() == [ticket]


def test_without_a_rate_limit_nobody_needs_a_permit(doors: Doors) -> None:
    session = doors.joined("a", 5)
    doors.mails(doors.opened(session), 100)
    assert doors.manager.unpermitted == 0


# --- the proxy's own throttles ---


def block(name: str = "yahoo", **fields: object) -> ThrottleSettings:
    values: dict[str, object] = {
        "source": (),
        "destination": (ip_network("67.195.204.0/24"),),
        "max_concurrent_connections": 0,
        "max_delivery_rate": (),
        "wait": 20.0,
    }
    return ThrottleSettings(name=name, **{**values, **fields})  # type: ignore[arg-type]


def test_no_block_no_cost(doors: Doors) -> None:
    assert not doors.manager.blocks
    answer = doors.stranger("s")
    assert isinstance(answer, Places)
    assert answer.throttles == ()


def test_own_throttle_counts_each_source_address_by_itself(doors: Doors) -> None:
    doors.manager.reload(False, Limits((block(max_concurrent_connections=1),)), doors.now)
    first = doors.stranger("s")
    ticket = doors.stranger("s")
    assert isinstance(ticket, Ticket)
    assert isinstance(doors.stranger("s", source="192.0.2.2"), Places)
    assert isinstance(doors.stranger("s", destination="98.136.96.1"), Places)
    assert isinstance(first, Places)
    assert doors.manager.wait_of(ticket) == 20.0
    assert str(doors.manager.refusal(ticket, doors.now)) == (
        "throttle yahoo for 192.0.2.1: 1 of 1 connections are in use; try again in 10 s"
    )
    assert doors.close(first) == [ticket]


def test_an_instances_throttle_with_the_name_of_a_block_is_not_that_block(doors: Doors) -> None:
    doors.manager.reload(
        False, Limits((block(KEY.name, destination=(), max_concurrent_connections=9, wait=0.5),)), doors.now
    )
    session = doors.joined("a", 1)
    doors.opened(session)
    own = doors.manager.admit("b", 1.0, SOURCE, "198.51.100.1", (), doors.now)
    assert isinstance(own, Places)
    ticket = doors.waiting(session)
    assert ticket.blocker is doors.manager.throttles[KEY]
    assert doors.manager.wait_of(ticket) == 0.5  # its destination is in the block as well
    ticket.throttles = tuple(throttle for throttle in ticket.throttles if not throttle.counts)
    assert doors.manager.wait_of(ticket) is None


def test_who_finds_no_place_hears_when_those_before_will_have_had_theirs(doors: Doors) -> None:
    """One place, each user keeps it for 3 s, four wait: with nobody served yet nobody can tell, then it is the pace."""
    doors.manager.reload(False, Limits((block(max_concurrent_connections=1),)), doors.now)
    held = doors.stranger("s")
    assert isinstance(held, Places)
    waiting = [doors.stranger(f"w{index}") for index in range(4)]
    last = waiting[-1]
    assert isinstance(last, Ticket)
    assert doors.manager.refusal(last, doors.now).retry_after == 10.0
    for left in (3, 2, 1):
        doors.run(3 * SECOND)
        (taken,) = doors.close(held)
        assert taken.places is not None
        held = taken.places
        assert doors.manager.refusal(last, doors.now).retry_after == 3.0 * left
    doors.run(10_000 * SECOND)
    assert doors.manager.refusal(last, doors.now).retry_after == 60.0


def test_own_throttle_for_a_source(doors: Doors) -> None:
    doors.manager.reload(
        False,
        Limits((block(source=(ip_network("192.0.2.0/30"),), destination=(), max_concurrent_connections=1),)),
        doors.now,
    )
    assert isinstance(doors.stranger("s"), Places)
    assert isinstance(doors.stranger("s", destination="2001:db8::1"), Ticket)
    assert isinstance(doors.stranger("s", source="192.0.2.9"), Places)


def test_own_throttle_is_a_ceiling_for_sessions_too(doors: Doors) -> None:
    session = doors.joined("a", 5)
    doors.manager.reload(False, Limits((block(max_concurrent_connections=2),)), doors.now)
    doors.opened(session)
    assert isinstance(doors.stranger("s"), Places)
    ticket = doors.waiting(session)
    assert doors.manager.refusal(ticket, doors.now).throttle == "yahoo"
    assert doors.used() == 1


def test_own_rate_counts_connections(doors: Doors) -> None:
    doors.manager.reload(False, Limits((block(max_delivery_rate=(Rate(360, 3600),)),)), doors.now)
    assert isinstance(doors.stranger("s"), Places)
    ticket = doors.stranger("s")
    assert isinstance(ticket, Ticket)
    error = doors.manager.refusal(ticket, doors.now)
    assert (error.throttle, error.retry_after) == ("yahoo", pytest.approx(10.0, abs=0.001))
    assert "next connection in 10.0 s" in str(error)
    doors.run(10 * SECOND - MS)
    assert ticket.places is None
    doors.run(2 * MS)
    assert doors.manager.take_admitted() == [ticket]


def test_a_reload_looks_at_some_throttles_at_a_time(doors: Doors) -> None:
    """One for each of 250 source addresses: nobody who waits is forgotten, who comes finds the new limit."""
    doors.manager.reload(False, Limits((block(max_concurrent_connections=1),)), doors.now)
    sources = [f"192.0.2.{number}" for number in range(250)]
    for source in sources:
        assert isinstance(doors.stranger("a", source=source), Places)
    waiting = [doors.stranger("b", source=source) for source in sources]
    doors.manager.reload(False, Limits((block(max_concurrent_connections=3),)), doors.now)
    let_in = [len(doors.manager.take_admitted())]
    while doors.manager.next_wakeup() == 0:
        doors.manager.advance(doors.now)
        let_in.append(len(doors.manager.take_admitted()))
    assert let_in[0] == SWEEP
    assert max(let_in) <= SWEEP
    assert all(isinstance(ticket, Ticket) and ticket.places is not None for ticket in waiting)
    doors.manager.reload(False, Limits((block(max_concurrent_connections=2),)), doors.now)
    assert doors.manager.next_wakeup() == 0
    assert isinstance(doors.stranger("c", source=sources[-1]), Ticket)


def test_own_rate_after_a_restart_waits_its_interval() -> None:
    doors = Doors()
    doors.manager = type(doors.manager)(1, doors.now, blocks=Limits((block(max_delivery_rate=(Rate(1, 3600),)),)))
    ticket = doors.stranger("s")
    assert isinstance(ticket, Ticket)
    doors.run(3599 * SECOND)
    assert ticket.places is None
    doors.run(2 * SECOND)
    assert ticket.places is not None


def test_own_rate_is_used_up_to_the_full(doors: Doors) -> None:
    doors.manager.reload(False, Limits((block(max_delivery_rate=(Rate(20, 1),)),)), doors.now)
    admitted = 0
    for _ in range(500):
        doors.stranger("s")
    for _ in range(10):
        doors.run(SECOND)
        admitted += len(doors.manager.take_admitted())
    assert 198 <= admitted <= 201


@pytest.mark.parametrize(("rate", "late"), [(500, 9), (100, 9), (2000, 9), (50_000, 5)])
def test_a_fast_rate_is_reached_though_the_hub_is_late(doors: Doors, rate: int, late: int) -> None:
    """Each turn comes `late` ms after it was asked for; none is lost, and each window holds what the slack allows."""
    doors.manager.reload(False, Limits((block(max_delivery_rate=(Rate(rate, 1),)),)), doors.now)
    for index in range(rate * 2):
        doors.stranger(f"s{index % 7}")
    doors.manager.take_admitted()
    begin, times = doors.now, []
    while doors.now < begin + SECOND:
        doors.now = max(doors.now, doors.manager.next_wakeup() or 0) + late * MS
        doors.manager.advance(doors.now)
        times += [doors.now] * len(doors.manager.take_admitted())
    assert len(times) >= 0.99 * rate
    check_windows(times, SECOND, Rule(rate, 1, 1, 0, LATENESS).most(SECOND))


def test_a_rate_of_connections_per_minute_stays_strict(doors: Doors) -> None:
    """The lateness is paid for with the interval."""
    doors.manager.reload(False, Limits((block(max_delivery_rate=(Rate(6000, 60),)),)), doors.now)
    for index in range(9000):
        doors.stranger(f"s{index % 3}")
    times = [doors.now] * (1 + len(doors.manager.take_admitted()))
    end = doors.now + 70 * SECOND
    late = 0
    while doors.now < end:
        late = (late + 7) % 10
        doors.now = max(doors.now, doors.manager.next_wakeup() or 0) + late * MS
        doors.manager.advance(doors.now)
        times += [doors.now] * len(doors.manager.take_admitted())
    check_windows(times, 60 * SECOND, 6000)
    assert len(times) >= 0.999 * 6000 * 70 / 60


def test_fair_among_instances_with_weights(doors: Doors) -> None:
    doors.manager.reload(False, Limits((block(max_delivery_rate=(Rate(20, 1),)),)), doors.now)
    for _ in range(200):
        doors.stranger("light")
    for _ in range(200):
        doors.stranger("heavy", weight=3.0)
    doors.run(4 * SECOND)
    owners = [ticket.owner for ticket in doors.manager.take_admitted()]
    assert owners.count("heavy") == pytest.approx(3 * owners.count("light"), abs=4)


def test_reload_changes_limits_and_keeps_places(doors: Doors) -> None:
    doors.manager.reload(False, Limits((block(max_concurrent_connections=2),)), doors.now)
    held = [doors.stranger("s"), doors.stranger("s")]
    ticket = doors.stranger("s")
    doors.manager.reload(False, Limits((block(max_concurrent_connections=1),)), doors.now)
    assert isinstance(held[0], Places)
    assert doors.close(held[0]) == []
    doors.manager.reload(True, Limits((block(max_concurrent_connections=2),)), doors.now)
    assert doors.manager.take_admitted() == [ticket]
    assert doors.manager.enforce
    again = doors.stranger("s")
    doors.manager.reload(False, Limits(()), doors.now)  # the block is gone: nobody waits for it
    assert doors.manager.take_admitted() == [again]
    assert isinstance(doors.stranger("s"), Places)


# --- anything, in any order ---

ACTIONS = st.lists(
    st.tuples(st.sampled_from(("open", "close", "cancel", "swap", "cap", "wait")), st.integers(0, 10**6)), max_size=80
)


@settings(max_examples=150)
@example([("open", 0)] * 5 + [("cap", 0)])
@given(ACTIONS)
def test_books_are_right_after_each_call(actions: list[tuple[str, int]]) -> None:
    """Never over a limit that was not lowered, no place lost, and nobody waits who could get in."""
    doors = Doors()
    caps = {KEY: 3, OTHER: 2, ALL: 4}
    sessions = [doors.session(name) for name in "abc"]
    paths = [(KEY, ALL), (OTHER, ALL), (OTHER,)]

    def register() -> None:
        for session in sessions:
            for id, keys in enumerate(paths):
                doors.register(session, *[(key, part(places=caps[key])) for key in keys], id=id)

    register()
    held: list[Places] = []
    tickets: list[Ticket] = []
    for what, dice in actions:
        if what == "open":
            answer = doors.open(sessions[dice % 3], dice // 3 % 3)
            if isinstance(answer, Places):
                held.append(answer)
            else:
                tickets.append(answer)
        elif what == "close" and held:
            doors.close(held.pop(dice % len(held)))
        elif what == "cancel" and tickets:
            doors.manager.cancel(tickets.pop(dice % len(tickets)), doors.now)
        elif what == "swap" and held:
            session = sessions[dice % 3]
            flows = doors.manager.flows(session, (dice // 3 % 3,))
            old = held[dice % len(held)]
            new = doors.manager.swap(old, session.name, 1.0, SOURCE, MX, flows, doors.now)
            if new is not None:
                held[held.index(old)] = new
        elif what == "cap":
            caps[(KEY, OTHER, ALL)[dice % 3]] = dice // 3 % 5  # 0: unlimited
            register()
        elif what == "wait":
            doors.run(dice * 1000)
        held += [ticket.places for ticket in tickets if ticket.places is not None]
        tickets = [ticket for ticket in tickets if ticket.places is None]
        doors.manager.take_admitted()
        for key, throttle in doors.manager.throttles.items():
            mine = [each for each in held if throttle in each.throttles]
            assert throttle.used == len(mine) == sum((throttle.held or {}).values())
            line = throttle.line  # an empty one only while a place here is kept for one who waits elsewhere
            assert line is None or (throttle.full() and line.size) or (line.claim in tickets and not line.size), key
        assert all(not ticket.places and ticket.blocker for ticket in tickets)
    for each in held:
        doors.close(each)
    while any(ticket.places is not None for ticket in tickets):
        for ticket in tickets:
            if ticket.places is not None:
                doors.close(ticket.places)
        tickets = [ticket for ticket in tickets if ticket.places is None or ticket.places.open]
    assert tickets == []
    assert all(throttle.used == 0 and throttle.line is None for throttle in doors.manager.throttles.values())


def test_a_place_that_comes_free_goes_to_who_needs_no_slot_though_there_is_none(doors: Doors) -> None:
    """Connections whose messages are counted: the rate is the messages' business, the place goes on at once."""
    block = ThrottleSettings(
        name="b", source=(), destination=(), max_concurrent_connections=1, max_delivery_rate=(Rate(1, 3600),), wait=20.0
    )
    manager = doors.manager
    manager.reload(False, Limits((block,)), doors.now)
    doors.run(3700 * SECOND)
    first = manager.admit("a", 1.0, SOURCE, MX, (), doors.now, rated=False)
    assert isinstance(first, Places)
    asked = manager.ask_message("a", 1.0, SOURCE, MX, (), doors.now)
    assert asked is None or asked.granted, "the hour's only slot"
    second = manager.admit("b", 1.0, SOURCE, MX, (), doors.now, rated=False)
    assert isinstance(second, Ticket)
    assert manager.release(first, doors.now) == [second]
    assert second.places is not None
