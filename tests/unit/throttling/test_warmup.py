"""Warm-up of the proxy's own throttles: which figure holds on which day, and what it leaves alone."""

from __future__ import annotations

from proxy.settings import Rate, WarmupSettings
from proxy.status.spelled import throttle_state
from proxy.throttling.throttle import SECOND, Limit
from proxy.throttling.warmup import limit_on, number_of
from tests.unit.status.test_view import House as View
from tests.unit.throttling.test_backoff import QUARTER, House, block

DAYS = WarmupSettings(figures=(50, 100, 200), first_day=1000)
DAY = 86_400


def test_the_figure_of_the_day() -> None:
    assert [number_of(DAYS, day) for day in (0, 999, 1000, 1001, 1002, 1003, 9999)] == [1, 1, 1, 2, 3, 0, 0]
    assert [limit_on(DAYS, day) for day in (0, 1000, 1002, 1003)] == [
        (Limit(50, DAY),),
        (Limit(50, DAY),),
        (Limit(200, DAY),),
        (),
    ]
    assert limit_on(None, 1000) == ()


def test_it_holds_beside_the_other_limits_of_messages_and_ends_with_its_last_day() -> None:
    house = House(block(warmup=DAYS, max_delivery_rate=(Rate(60, 3600),), max_connection_rate=(Rate(5, 1),)))
    house.opened()
    assert house.limits() == [(60, 3600), (50, DAY)], "nobody has said which day it is"
    house.manager.turn_day(1001, house.now)
    assert house.limits() == [(60, 3600), (100, DAY)]
    assert house.limits(connections=True) == [(5, 1)]
    house.opened("192.0.2.9")
    assert house.limits("192.0.2.9") == [(60, 3600), (100, DAY)]
    house.manager.turn_day(1003, house.now)
    assert house.limits() == [(60, 3600)]


def test_many_throttles_follow_the_calendar_in_turns() -> None:
    house = House(block(warmup=DAYS))
    for number in range(250):
        house.opened(f"10.0.0.{number}")
    house.manager.turn_day(1001, house.now)
    late = [each for each in house.manager.blocks.throttles() if each.windows[0].limit.amount == 50]
    assert len(late) == 150
    house.pass_by(SECOND)
    assert {each.windows[0].limit.amount for each in house.manager.blocks.throttles()} == {100}


def test_a_back_off_slows_it_down_too() -> None:
    house = House(block(QUARTER, warmup=DAYS))
    places = house.opened()
    house.manager.turn_day(1002, house.now)
    house.reply(places)
    assert house.limits() == [(50, DAY)]
    house.manager.turn_day(1001, house.now)
    assert house.limits() == [(25, DAY)]


def test_the_status_says_which_day_it_is() -> None:
    view = View([block(warmup=DAYS)])
    view.manager.admit("a", 1.0, "192.0.2.1", "198.51.100.1", (), view.now)
    view.manager.turn_day(1001, view.now)
    assert throttle_state(view.throttle()) == "warm-up day 2 of 3"
    assert str(view.throttle().limits[0]) == "100/day"
    view.manager.turn_day(1003, view.now)
    assert throttle_state(view.throttle()) == ""
