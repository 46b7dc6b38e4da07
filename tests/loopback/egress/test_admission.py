"""Waiting for a place in a greenlet: woken in order, given up in time, never woken for something else."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import ClassVar

import gevent
import pytest

from proxy.egress.admission import Admission, Client
from proxy.egress.asking import wait_for_place, wait_for_slot
from proxy.egress.clock import clock_ns
from proxy.egress.office import Applicant
from proxy.errors import Throttled
from proxy.policy.limits import Limits
from proxy.settings import BackoffSettings
from proxy.throttling.flows import Places, Throttle
from proxy.throttling.limits import Part
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import LATENESS, SECOND, Key, Limit
from tests.waiting import wait_for

SOURCE, DESTINATION = "192.0.2.1", "198.51.100.1"


@dataclasses.dataclass
class Block:
    name: str = "narrow"
    source: tuple = ()
    destination: tuple = ()
    max_concurrent_connections: int = 1
    max_delivery_rate: tuple = ()
    wait: float = 30.0
    domain: tuple = ()
    mx: tuple = ()
    instance: tuple = ()
    per: tuple = ("source",)
    max_connection_rate: tuple = ()
    backoff: tuple = ()
    warmup: None = None
    enforce: bool = True
    scope: str = "proxy"


class Office:
    """An admission with one block, and its calls; `ways`: connections that give way when asked."""

    opened: ClassVar[list[Admission]] = []

    def __init__(self, *blocks):
        self.ways = []
        self.it = Admission(Manager(1, clock_ns() - 10_000 * SECOND, blocks=Limits(blocks)), self._yield)
        self.opened.append(self.it)

    def __getattr__(self, name):
        return getattr(self.it, name)

    def _yield(self, throttle, missing):
        if not self.ways:
            return False
        self.leave(self.ways.pop())
        return True

    def ask(self, owner="a", seconds=20.0, key=None):
        return wait_for_place(self.it, Applicant(owner, 1.0, SOURCE, DESTINATION), seconds, key)

    def waits(self, *args, **options):
        """A greenlet that stands in the line."""
        size = self.waiters.for_places
        greenlet = gevent.spawn(self.ask, *args, **options)
        wait_for(lambda: self.waiters.for_places > size, pause=gevent.sleep)
        return greenlet


@pytest.fixture(autouse=True)
def _offices_are_closed():
    yield
    while Office.opened:
        Office.opened.pop().stop()


def test_without_a_throttle_nothing_is_asked():
    office = Office()
    assert office.ask() is None
    office.leave(None)
    assert not office.wanted(None)


def test_one_after_the_other():
    office = Office(Block())
    held = office.ask("c")
    greenlets = {owner: office.waits(owner) for owner in ("b", "a")}
    assert office.wanted(held)
    for owner in ("b", "a"):
        office.leave(held)
        held = greenlets.pop(owner).get(timeout=30)
        assert isinstance(held, Places)
        assert all(not other.ready() for other in greenlets.values())
    office.leave(held)
    assert not office.waiters.for_places
    assert not office.waiters._awaited


def test_time_is_up_by_the_shorter_of_client_and_block():
    for block, seconds in (
        (Block(wait=0.05), 20.0),
        (Block(), 0.05),
        (Block(wait=None), 0.05),
        (Block(wait=0.0), 20.0),
    ):
        office = Office(block)
        held = office.ask()
        with pytest.raises(Throttled) as caught:
            office.ask("b", seconds)
        assert (caught.value.throttle, caught.value.retry_after) == ("narrow", 10.0)
        office.leave(held)
        assert isinstance(office.ask("b"), Places), "who gave up is not in the way"


@pytest.mark.only_python("what a throttle hands out is noted in its place")
def test_a_fast_rate_loses_no_slot_to_late_wake_ups(monkeypatch):
    """500 a second: each slot is one interval after the last, unless the loop itself was later than it may be."""
    office = Office(Block(max_concurrent_connections=0, max_delivery_rate=(Limit(500, 1),)))
    taken = []
    take = Throttle.take_slot
    monkeypatch.setattr(
        Throttle, "take_slot", lambda self, slot: (taken.append((slot, clock_ns())), take(self, slot))[1]
    )

    waiting = [gevent.spawn(lambda: office.leave(office.ask())) for _ in range(300)]
    gevent.joinall(waiting, timeout=60, raise_error=True)
    assert len(taken) == 300
    for (before, _), (slot, now) in pairwise(taken):
        assert slot == before + SECOND // 500 or now > before + SECOND // 500 + LATENESS


def test_who_is_killed_gives_up_its_turn():
    office = Office(Block())
    held = office.ask()
    first, second = office.waits("b"), office.waits("c")
    first.kill()
    office.leave(held)
    assert isinstance(second.get(timeout=30), Places)


def test_a_wake_up_is_only_a_hint():
    """Whoever wakes it for something else has not told it anything."""
    office = Office(Block())
    held = office.ask()
    waiting = office.waits("b")
    gevent.get_hub().loop.run_callback(waiting.switch)
    gevent.sleep(0)
    gevent.sleep(0)
    assert not waiting.ready()
    office.leave(held)
    assert isinstance(waiting.get(timeout=30), Places)


def test_admitted_in_the_last_moment_is_admitted():
    """The timer of one who waits fires after its place came and before it runs: it has the place."""
    office = Office(Block())
    held = office.ask()
    waiting = office.waits("b", 0.05)

    def late():
        end = clock_ns() + SECOND // 10
        while clock_ns() < end:  # the loop is busy until after the deadline, and then lets the place go
            pass
        office.leave(held)

    gevent.get_hub().loop.run_callback(late)
    try:
        places = waiting.get(timeout=30)
    except Throttled:
        places = office.ask("b")  # the timer was first: then the place is free
    assert isinstance(places, Places)
    office.leave(places)
    assert isinstance(office.ask("c"), Places)


def test_a_wake_up_that_comes_late_wakes_nobody_else():
    """The greenlet that was to be woken sleeps elsewhere by then: gevent's own waiting must not be disturbed."""
    office = Office(Block())
    held = office.ask()

    def ask_and_sleep():
        with pytest.raises(ZeroDivisionError):
            office.ask("b")
        gevent.sleep(0.05)
        return "slept"

    greenlet = gevent.spawn(ask_and_sleep)
    wait_for(lambda: office.waiters.for_places, pause=gevent.sleep)
    gevent.get_hub().loop.run_callback(greenlet.throw, ZeroDivisionError)
    office.leave(held)  # it is to be woken, but by then it waits for something else
    assert greenlet.get(timeout=30) == "slept"


def test_a_cached_connection_gives_way():
    office = Office(Block())
    office.ways.append(office.ask("cached"))
    assert isinstance(office.ask("b"), Places)
    assert not office.ways


def test_a_place_goes_with_its_connection_to_who_wants_just_that():
    office = Office(Block())
    held = office.ask("a", key="here")
    other = office.waits("b", key="there")
    assert office.awaited("there")
    assert not office.awaited("here")
    assert office.pass_on(held, "here") is False
    gevent.sleep(0)
    assert not other.ready(), "the socket is still open"
    office.leave(held)
    held = other.get(timeout=30)
    same = office.waits("c", key="there")
    assert office.pass_on(held, "there") is True
    assert isinstance(same.get(timeout=30), Places)


def test_a_rate_lets_in_when_its_time_has_come():
    office = Office(Block(max_concurrent_connections=0, max_delivery_rate=(Limit(20, 1),)))
    begin = clock_ns()
    for _ in range(4):
        office.leave(office.ask())
    assert clock_ns() - begin >= 3 * SECOND // 20


# --- messages ---


def slow(amount=20, seconds=1, wait=30.0):
    return Block("slow", max_concurrent_connections=0, max_delivery_rate=(Limit(amount, seconds),), wait=wait)


class Messages(Office):
    """`answers`: (who, refusal) in the order in which they were told."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.answers = []

    def order(self, owner, seconds=20.0):
        answer = lambda refusal: self.answers.append((owner, refusal))  # noqa: E731
        ticket = self.ask_slot(Applicant(owner, 1.0, SOURCE, DESTINATION), seconds, answer)
        return None if ticket is None or ticket.granted else ticket

    def send(self, owner, seconds=20.0):
        wait_for_slot(self.it, Applicant(owner, 1.0, SOURCE, DESTINATION), seconds, lambda: None)
        return "sent"

    def is_empty(self):
        waiters = self.waiters
        return not waiters.for_slots and not waiters.for_places and not len(waiters.deadlines)


def test_messages_wait_for_their_slots_in_greenlets_and_without():
    office = Messages(slow())
    begin = clock_ns()
    assert office.send("a") == "sent", "the first one at once"
    greenlets = [gevent.spawn(office.send, "a") for _ in range(2)]
    gevent.sleep(0)
    ticket = office.order("b")
    assert ticket is not None
    assert office.answers == []
    assert [each.get(timeout=30) for each in greenlets] == ["sent", "sent"]
    wait_for(lambda: office.answers == [("b", None)], pause=gevent.sleep)
    assert clock_ns() - begin >= 3 * SECOND // 20
    assert office.is_empty()
    office.cancel_message(ticket)  # after the answer this is nothing


def test_without_a_throttle_a_message_is_not_asked_for():
    office = Messages()
    assert office.order("a") is None
    assert Messages(Block()).order("a") is None, "this block has places only"
    assert office.answers == []


def test_a_message_that_waited_too_long_is_told_which_throttle_and_when():
    for seconds, wait in ((0.02, 30.0), (30.0, 0.02), (0.0, 30.0)):
        office = Messages(slow(1, 3600, wait))
        assert office.order("a") is None
        office.order("a", seconds)
        with pytest.raises(Throttled) as caught:
            office.send("b", seconds)
        assert caught.value.throttle == "slow"
        assert 3500 < caught.value.retry_after < 2 * 3600 + 1
        wait_for(lambda office=office: office.answers, pause=gevent.sleep)
        assert isinstance(office.answers[0][1], Throttled)
        assert office.is_empty()


def test_who_gives_up_at_any_point_leaves_the_slot_to_the_next():
    office = Messages(slow())
    office.send("a")
    killed = gevent.spawn(office.send, "a")
    gevent.sleep(0)
    gone = office.order("b")
    greenlet = gevent.spawn(office.send, "c")
    gevent.sleep(0)
    killed.kill()
    office.cancel_message(gone)
    assert greenlet.get(timeout=30) == "sent"
    assert office.answers == []
    assert office.is_empty()


@pytest.mark.only_python("something comes between the calls of the timer")
def test_called_off_between_the_slot_and_its_being_told():
    """The slot has come in this turn of the loop; its asker goes in the same one and hears nothing more."""
    office = Messages(slow())
    office.send("a")
    ticket = office.order("a")
    advance, office.manager.advance = office.manager.advance, None

    def advance_and_cancel(now):
        advance(now)
        if ticket.granted:
            gevent.get_hub().loop.run_callback(office.cancel_message, ticket)

    # The timer's own settling comes behind: the answer stands in line behind the cancelling.
    office.manager.advance = advance_and_cancel
    wait_for(lambda: not office.waiters.for_slots, pause=gevent.sleep)
    gevent.sleep(0.01)
    assert office.answers == []
    assert office.is_empty()


@pytest.mark.only_python("turns are counted in the place of a method")
def test_many_whose_time_is_up_together_are_told_in_turns(monkeypatch):
    office = Messages(Block(wait=0.0), slow(1, 3600, 0.0))
    held = office.ask("a")  # the place, and the slot of this hour
    turns = []
    time_out = office.it._time_out

    def counted(now):
        before = len(office.waiters.deadlines)
        time_out(now)
        turns.append(before - len(office.waiters.deadlines))

    monkeypatch.setattr(office.it, "_time_out", counted)
    greenlets = [gevent.spawn(office.ask, f"owner{index % 7}") for index in range(100)]
    for index in range(100):
        office.order(f"owner{index % 7}")
    for greenlet in greenlets:
        with pytest.raises(Throttled):
            greenlet.get(timeout=30)
    wait_for(lambda: len(office.answers) == 100, pause=gevent.sleep)
    assert max(turns) <= 20
    assert sum(turns) == 200
    assert office.is_empty()
    office.leave(held)


class Listener(Client):
    def __init__(self, office, session):
        self.outputs = []
        self.reasons = []
        self._office, self._session = office, session
        office.clients[session] = self

    def deliver(self):
        self.outputs.append(self._office.manager.take(self._session, clock_ns()))

    def ended(self, reason):
        self.reasons.append(reason)


@pytest.mark.only_python("a client of the test's own")
def test_the_timer_rings_for_whoever_is_due():
    """Slots come at their time, pings each second; a silent session is ended, all by one timer."""
    office = Office()
    manager = office.manager
    session = manager.hello("a", b"run", "host", 1.0, clock_ns())
    listener = Listener(office, session)
    manager.ping(session, 1, clock_ns())
    manager.register(session, 1, [(Key(SOURCE, "t"), Part((Limit(50, 1),)))], clock_ns())
    manager.demand(session, 1, 10, 0, 0, 0, 0, clock_ns())
    office.settle()
    granted = lambda: sum(grant.n for output in listener.outputs for grant in output.grants)  # noqa: E731
    wait_for(lambda: granted() == 10, pause=gevent.sleep)
    assert any(output.ping is not None for output in listener.outputs)
    wait_for(lambda: listener.reasons == ["silent"], pause=gevent.sleep)
    assert office.clients == {}


PAUSE = BackoffSettings(on=("421",), pause=True, return_after=3600.0)
SAID = "421 4.7.0 not now"


@pytest.mark.parametrize("later", [False, True], ids=["at once", "in the next turn"])
def test_a_reply_that_pauses_is_in_force_before_the_places_are_free_again(later):
    office = Office(Block(backoff=(PAUSE,)))
    held = office.ask()
    patient = office.waits("b")
    office.replied(held, SAID, settle_later=later)
    office.leave(held)
    with pytest.raises(Throttled, match="paused after a reply of the receiver; try again in 3600 s"):
        office.ask("c")
    assert not patient.ready()
    assert office.end_backoff("narrow") == 1
    assert isinstance(patient.get(timeout=30), Places)
    assert office.end_backoff("wide") is None


def test_no_cached_connection_gives_way_in_a_pause():
    """Its place would be nobody's."""
    office = Office(Block(backoff=(PAUSE,)))
    held = office.ask()
    office.ways.append(held)
    office.replied(held, SAID)
    with pytest.raises(Throttled):
        office.ask("b")
    assert office.ways == [held]


def test_where_no_block_listens_a_reply_costs_nothing():
    office = Office(Block())
    office.replied(office.ask(), SAID)
    office.replied(None, SAID)
    assert not office.listens
