"""Back-off of the proxy's own throttles by what receivers reply: when it begins, what holds meanwhile, how it ends."""

from __future__ import annotations

from itertools import pairwise

import pytest

from proxy.policy.limits import Limits
from proxy.settings import BackoffSettings, Rate, ThrottleSettings
from proxy.throttling import backoff
from proxy.throttling.desk import MessageTicket
from proxy.throttling.flows import Places, Throttle, Ticket
from proxy.throttling.manager import SWEEP, Manager
from proxy.throttling.registry import Remark
from proxy.throttling.throttle import MILLISECOND, SECOND, TICK, Key

START = 100_000 * SECOND
MINUTE = 60 * SECOND
SAID = "421 4.7.0 [TSS04] deferred\nsee https://example.com"
QUARTER = BackoffSettings(on=("421",), percent=25, return_after=3600.0)
PAUSE = BackoffSettings(on=("5.7.1 .*blocked",), pause=True, return_after=21600.0)
BLOCKED = "550 5.7.1 you are blocked"


def block(*rules: BackoffSettings, name: str = "yahoo", **fields: object) -> ThrottleSettings:
    values: dict[str, object] = {
        "source": (),
        "destination": (),
        "max_concurrent_connections": 0,
        "max_delivery_rate": (),
        "wait": 20.0,
    }
    return ThrottleSettings(name=name, backoff=rules, **{**values, **fields})  # type: ignore[arg-type]


FULL: dict[str, object] = {
    "max_concurrent_connections": 20,
    "max_delivery_rate": (Rate(60, 60), Rate(2000, 3600)),
    "max_connection_rate": (Rate(8, 1),),
}


class House:
    """A manager, its clock, and what comes of each connection and message."""

    def __init__(self, *blocks: ThrottleSettings) -> None:
        self.manager = Manager(1, START - 90_000 * SECOND, blocks=Limits(blocks))
        self.now = START

    def reload(self, *blocks: ThrottleSettings) -> None:
        self.manager.reload(False, Limits(blocks), self.now)
        self.pass_by(TICK)

    def open(self, source: str = "192.0.2.1", owner: str = "a", rated: bool = False) -> Places | Ticket:
        return self.manager.admit(owner, 1.0, source, "198.51.100.1", (), self.now, rated)

    def opened(self, source: str = "192.0.2.1", owner: str = "a") -> Places:
        places = self.open(source, owner)
        assert isinstance(places, Places)
        return places

    def mail(self, owner: str = "a", source: str = "192.0.2.1") -> MessageTicket | None:
        return self.manager.ask_message(owner, 1.0, source, "198.51.100.1", (), self.now)

    def reply(self, places: Places, text: str = SAID) -> None:
        self.manager.replied(places, text, self.now)

    def pass_by(self, span: int) -> None:
        end = self.now + span
        while (due := self.manager.next_wakeup()) is not None and due <= end:
            self.now = max(self.now, due)
            self.manager.advance(self.now)
        self.now = end
        self.manager.advance(self.now)

    def throttle(self, source: str = "192.0.2.1", connections: bool = False) -> Throttle:
        (found,) = [
            each
            for each in self.manager.blocks.throttles()
            if each.key.source == source and each.connections is connections
        ]
        return found

    def limits(self, source: str = "192.0.2.1", connections: bool = False) -> list[tuple[int, int]]:
        windows = self.throttle(source, connections).windows
        return [(window.limit.amount, window.limit.seconds) for window in windows]

    def told(self) -> list[Remark]:
        return self.manager.take_notices()


def test_a_reply_slows_down_all_limits_of_what_counts_by_itself_for_everybody_at_once() -> None:
    house = House(block(QUARTER, **FULL))
    places, other = house.opened(owner="a"), house.opened("192.0.2.2", owner="b")
    house.reply(places, "250 2.0.0 accepted 421")
    house.reply(places, "451 4.7.1 not that one")
    assert (house.limits(), house.throttle().cap) == ([(60, 60), (2000, 3600)], 20)
    house.reply(places)
    assert (house.limits(), house.throttle().cap) == ([(15, 60), (500, 3600)], 5)
    assert house.limits(connections=True) == [(2, 1)]
    assert (house.limits("192.0.2.2"), house.throttle("192.0.2.2").cap) == ([(60, 60), (2000, 3600)], 20)
    assert house.told() == [
        Remark(
            "backoff",
            "a",
            "yahoo for 192.0.2.1: 25 % of each limit, for 3600 s",
            "421 4.7.0 [TSS04] deferred see https://example.com",
        )
    ]
    house.reply(other)
    assert house.throttle("192.0.2.2").cap == 5


def test_who_waited_already_waits_for_the_slower_slots() -> None:
    """Three instances ask at once; the reply comes while they wait, and none of them passes beyond the lower rate."""
    house = House(block(QUARTER, per=("nothing",), max_delivery_rate=(Rate(60, 60),), wait=None))
    places = house.opened(owner="a")
    first = house.mail("a")
    assert first is not None
    assert first.granted
    house.manager.take_granted()
    waiting = [house.mail(owner) for owner in "abcabc"]
    house.reply(places)
    times: list[int] = []
    for _ in range(300):
        house.pass_by(100 * MILLISECOND)
        times += [house.now for _ in house.manager.take_granted()]
    assert len(times) == len(waiting)
    assert times[0] >= START + 4 * SECOND - 10 * MILLISECOND
    assert all(later - sooner >= 4 * SECOND - 110 * MILLISECOND for sooner, later in pairwise(times))


def test_over_lets_so_many_replies_pass() -> None:
    rule = BackoffSettings(on=("421",), over=Rate(2, 60), percent=50)
    house = House(block(rule, **FULL))
    places = house.opened()

    def after(*pauses: int) -> bool:
        for pause in pauses:
            house.pass_by(pause * SECOND)
            house.reply(places)
        return house.throttle().cap == 10

    assert not after(0, 0)
    assert not after(60, 30), "the first two are a minute ago or longer"
    assert after(29)
    house.pass_by(2 * 3600 * SECOND)
    assert house.throttle().cap == 20
    assert not after(0, 0), "each of them counts once"


def test_replies_that_have_slowed_down_once_do_not_make_it_longer() -> None:
    house = House(block(BackoffSettings(on=("421",), over=Rate(2, 60), percent=50, return_after=600.0), **FULL))
    places = house.opened()
    for _ in range(3):
        house.reply(places)
    house.pass_by(30 * SECOND)
    house.reply(places)
    house.pass_by(655 * SECOND)
    assert house.throttle().cap > 10, "it rises: the fourth one was the first of others"


def test_it_ends_by_time_and_the_limits_rise_by_tenths() -> None:
    house = House(block(QUARTER, **FULL))
    house.reply(house.opened())
    house.told()
    seen = []
    house.pass_by(3600 * SECOND - TICK)
    for _ in range(10):
        seen.append(house.throttle().cap)
        house.pass_by(MINUTE)
    assert seen == [5, 5, 7, 9, 11, 13, 15, 17, 19, 20]
    assert house.limits() == [(60, 60), (2000, 3600)]
    assert house.told() == [Remark("backoff", "", "yahoo for 192.0.2.1 has its own limits again", calm=True)]
    assert len(house.manager.blocks.backoffs) == 0


def test_a_reply_during_a_back_off_begins_it_anew() -> None:
    house = House(block(QUARTER, **FULL))
    places = house.opened()
    house.reply(places)
    house.pass_by(3000 * SECOND)
    house.reply(places, "421 4.7.0 again")
    house.pass_by(3000 * SECOND)
    assert house.throttle().cap == 5
    house.pass_by(900 * SECOND)  # it rises
    house.reply(places)
    assert house.throttle().cap == 5
    assert len(house.told()) == 1, "it is one back-off"


def test_of_several_the_least_holds_and_each_has_its_own_end() -> None:
    house = House(block(QUARTER, BackoffSettings(on=("TSS04",), rate=Rate(6, 60), return_after=600.0), **FULL))
    places = house.opened()
    house.reply(places, "451 4.7.0 TSS04")
    assert (house.limits(), house.throttle().cap) == ([(6, 60), (2000, 3600)], 20)
    assert house.limits(connections=True) == [(8, 1)]
    house.reply(places)
    assert [remark.detail.partition(": ")[2] for remark in house.told()] == [
        "6 messages in 60 s, for 600 s",
        "25 % of each limit, for 3600 s",
    ]
    assert house.manager.blocks.backoffs.begun == 1
    assert (house.limits(), house.throttle().cap) == ([(6, 60), (500, 3600)], 5)
    house.pass_by(1300 * SECOND)
    assert house.limits() == [(15, 60), (500, 3600)]


def test_of_several_the_least_holds_whichever_came_first() -> None:
    half = BackoffSettings(on=("TSS04",), percent=50, return_after=3600.0)
    for replies in ((SAID, "451 4.7.0 TSS04"), ("451 4.7.0 TSS04", SAID)):
        house = House(block(QUARTER, half, **FULL))
        places = house.opened()
        for reply in replies:
            house.reply(places, reply)
        assert (house.throttle().cap, house.limits()) == (5, [(15, 60), (500, 3600)])


def test_of_several_pauses_the_last_end_counts() -> None:
    short = BackoffSettings(on=("TSS04",), pause=True, return_after=60.0)
    house = House(block(PAUSE, short, **FULL))
    places = house.opened()
    house.reply(places, BLOCKED)
    house.reply(places, "451 4.7.0 TSS04")
    assert house.throttle().closed_until == house.now + 21600 * SECOND


def test_one_that_begins_anew_after_its_end_by_hand_has_its_own_end() -> None:
    key, backoffs = Key("192.0.2.1", "yahoo"), backoff.Backoffs()
    backoffs.strike(key, [QUARTER], SAID, "a", START)
    assert backoffs.end(["yahoo"], "was ended by hand", START) == 1
    backoffs.strike(key, [QUARTER], SAID, "a", START)
    now = START
    while len(backoffs):
        now = max(now, backoffs.wheel.next_wakeup() or now)
        backoffs.expire(now, SWEEP)
    assert [remark.detail for remark in backoffs.remarks][-1] == "yahoo for 192.0.2.1 has its own limits again"


def test_a_rate_of_its_own_where_the_block_has_none() -> None:
    house = House(block(BackoffSettings(on=("4.",), rate=Rate(6, 60))))
    places = house.opened()
    assert house.mail() is None
    house.reply(places)
    assert house.limits() == [(6, 60)]
    assert house.mail() is not None
    house.pass_by(1200 * SECOND)
    assert house.limits() == []


@pytest.mark.parametrize("fields", [FULL, {}], ids=["with limits", "without any"])
def test_a_pause_refuses_at_once_and_who_waits_gets_in_at_its_end(fields: dict[str, object]) -> None:
    house = House(block(PAUSE, **fields))
    places = house.opened()
    house.reply(places, BLOCKED)
    door, message = house.open(owner="b"), house.mail("c")
    assert isinstance(door, Ticket)
    assert isinstance(message, MessageTicket)
    assert house.manager.wait_of(door) == house.manager.wait_of(message) == 0.0
    for ticket in (door, message):
        error = house.manager.refusal(ticket, house.now)
        assert error.retry_after == pytest.approx(21600)
        assert str(error) == (
            "throttle yahoo for 192.0.2.1: paused after a reply of the receiver; try again in 21600 s"
        )
    house.manager.release(places, house.now)
    house.pass_by(21600 * SECOND - 2 * TICK)
    assert door.places is None
    assert not message.granted
    house.pass_by(3 * TICK)
    assert door.places is not None
    assert message.granted
    assert house.throttle().cap == (2 if fields else 0), "a tenth"
    house.pass_by(10 * MINUTE)
    assert house.limits() == ([(60, 60), (2000, 3600)] if fields else [])


def test_it_is_ended_by_hand() -> None:
    house = House(block(PAUSE, QUARTER, **FULL), block(QUARTER, name="other", **FULL))
    places = house.opened()
    house.reply(places, BLOCKED)
    house.reply(places)
    waiting = house.open(owner="b")
    house.told()
    assert isinstance(waiting, Ticket)
    assert house.manager.end_backoff("yahoo", house.now) == 1
    house.pass_by(SECOND)
    assert waiting.places is not None
    yahoo, other = (each for each in house.manager.blocks.throttles() if not each.connections)
    assert (yahoo.cap, other.cap) == (20, 5)
    assert [remark.detail for remark in house.told()] == ["yahoo for 192.0.2.1 was ended by hand"]
    assert house.manager.end_backoff("yahoo", house.now) == 0
    assert house.manager.end_backoff("nothing", house.now) is None
    house.reply(places, BLOCKED)


def test_what_has_only_been_counted_is_forgotten_without_a_word() -> None:
    rule = BackoffSettings(on=("421",), over=Rate(1, 3600), percent=25)
    house = House(block(rule, **FULL))
    places = house.opened()
    house.reply(places)
    assert house.manager.end_backoff("yahoo", house.now) == 0
    house.pass_by(TICK)
    assert house.told() == [], "it had its own limits all the time"
    house.reply(places)
    assert house.throttle().cap == 20, "the first one is forgotten"
    house.reply(places)
    assert house.throttle().cap == 5


def test_a_reload_keeps_it_while_the_block_has_any_rule() -> None:
    house = House(block(QUARTER, **FULL))
    house.reply(house.opened())
    house.reload(block(PAUSE, **FULL | {"max_concurrent_connections": 40}))
    assert house.throttle().cap == 10
    house.told()
    house.reload(block(**FULL))
    assert house.throttle().cap == 20
    assert [remark.detail for remark in house.told()] == ["yahoo for 192.0.2.1 has no rule for a back-off any more"]


def test_a_reload_keeps_what_has_been_counted() -> None:
    rule = BackoffSettings(on=("421",), over=Rate(2, 60), percent=50)
    house = House(block(rule, **FULL))
    places = house.opened()
    house.reply(places)
    house.reply(places)
    house.reload(block(rule, **FULL))
    house.reply(places)
    assert house.throttle().cap == 10


def test_a_shadow_counts_what_it_would_have_held_back() -> None:
    house = House(block(PAUSE, enforce=False, **FULL))
    places = house.opened()
    house.reply(places, BLOCKED)
    assert isinstance(house.open(owner="b"), Places)
    assert house.mail() is None
    shadow = house.throttle().shadow
    assert shadow is not None
    assert (shadow.waited, shadow.refused) == (1, 1)
    assert house.manager.blocks.backoffs.of(house.throttle().key) is not None


def test_an_idle_throttle_is_forgotten_and_its_back_off_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.throttling.blocks.MAX_REMEMBERED", 2)
    house = House(block(QUARTER, max_concurrent_connections=20))
    places = house.opened()
    house.reply(places)
    house.manager.release(places, house.now)
    for number in range(2, 6):
        house.opened(f"192.0.2.{number}")
    assert not [each for each in house.manager.blocks.throttles() if each.key.source == "192.0.2.1"]
    house.opened()
    assert house.throttle().cap == 5


def test_what_is_remembered_is_bounded_and_nobody_is_left_slow_by_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff, "MOST_KEYS", 3)
    house = House(block(QUARTER, max_concurrent_connections=20))
    for number in range(1, 6):
        house.reply(house.opened(f"192.0.2.{number}"))
    assert [house.throttle(f"192.0.2.{number}").cap for number in range(1, 6)] == [20, 20, 5, 5, 5]
    assert len(house.manager.blocks.backoffs) == 3


def test_many_come_back_in_turns() -> None:
    house = House(block(QUARTER, max_concurrent_connections=20))
    many = [f"10.0.{number // 256}.{number % 256}" for number in range(3 * SWEEP)]
    for source in many:
        house.reply(house.opened(source))
    assert len(house.told()) == 10, "and ten lines tell of it"

    def slow() -> int:
        return sum(throttle.cap == 5 for throttle in house.manager.blocks.throttles())

    assert house.manager.end_backoff("yahoo", house.now) == len(many)
    assert slow() >= 2 * SWEEP
    turns = 1
    while slow():
        before = slow()
        house.manager.advance(house.now)
        assert before - slow() <= SWEEP
        turns += 1
    assert turns == 3
