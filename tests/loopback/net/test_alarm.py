"""Coarse deadlines: who gets which, that a cancelled one is silent, and that the timer sleeps when nobody needs it."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest
from gevent import get_hub
from greenlet import greenlet

from proxy.net.alarm import Alarms, TimeIsUp
from tests.waiting import wait_for


@pytest.fixture
def alarms() -> Iterator[Alarms]:
    alarms = Alarms(get_hub().loop)
    yield alarms
    alarms.stop()


def sleeper(alarms: Alarms, seconds: float, told: list[bool]) -> None:
    """Sleeps until its alarm; tells whether it was its own."""
    alarm = alarms.start(seconds)
    try:
        gevent.sleep(30)
    except TimeIsUp as fired:
        told.append(fired.alarm is alarm)
    finally:
        alarm.cancel()


def test_each_gets_its_own_in_time(alarms: Alarms) -> None:
    told: list[bool] = []
    sleepers = [gevent.spawn(sleeper, alarms, seconds, told) for seconds in (0.05, 0.05, 0.12, 0.0)]
    gevent.joinall(sleepers, raise_error=True, timeout=10)
    assert told == [True] * 4


def test_never_too_early(alarms: Alarms) -> None:
    loop = get_hub().loop
    alarms.start(0.25)
    begun = loop.now()
    with pytest.raises(TimeIsUp):
        gevent.sleep(30)
    loop.update_now()
    assert loop.now() - begun >= 0.25


def test_a_cancelled_one_is_silent_and_the_timer_stops(alarms: Alarms) -> None:
    alarm = alarms.start(0.05)
    alarm.cancel()
    alarm.cancel()
    assert alarms._timer.active
    wait_for(lambda: not alarms._timer.active, pause=gevent.sleep)
    told: list[bool] = []
    gevent.spawn(sleeper, alarms, 0.01, told)
    wait_for(lambda: told == [True], pause=gevent.sleep)


def test_what_one_lets_out_does_not_keep_the_others_waiting(alarms: Alarms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_hub(), "handle_error", lambda *_: None)

    def careless() -> None:
        alarms.start(0.05)
        gevent.sleep(30)

    told: list[bool] = []
    for _ in range(3):
        get_hub().loop.run_callback(greenlet(careless, get_hub()).switch)
        gevent.spawn(sleeper, alarms, 0.05, told)
    wait_for(lambda: told == [True] * 3, pause=gevent.sleep)
