"""Slots that are told to another process: on a busy machine they may come there when their time is over."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import gevent
import pytest

from proxy.egress.admission import Admission
from proxy.egress.branch import Branches
from proxy.egress.clock import clock_ns
from proxy.egress.office import Applicant
from proxy.egress.remote import Remote, RemoteSlot
from proxy.egress.switch import Switch
from proxy.policy.limits import Limits
from proxy.protocols import seam
from proxy.settings import Rate, ThrottleSettings
from proxy.throttling.desk import MessageTicket
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import LATENESS, MILLISECOND, SECOND

WHO = Applicant("a", 1.0, "127.0.0.1", "127.0.0.2")


class Clock:
    """What both ends take for the time."""

    def __init__(self) -> None:
        self.now = clock_ns()

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Ends:
    """A manager and one that asks it; what they say is carried by hand."""

    def __init__(self, clock: Clock) -> None:
        everywhere = (ip_network("127.0.0.0/8"),)
        block = ThrottleSettings(
            name="one",
            source=(),
            destination=everywhere,
            max_concurrent_connections=0,
            max_delivery_rate=(Rate(10, 1),),
            wait=60.0,
        )
        self.limits = Limits((block,))
        self.clock = clock
        self.admission = Admission(Manager(1, clock(), False, self.limits), lambda *missing: False, clock)
        self.switch = Switch(self.admission)
        self.to_master: list[Any] = []
        self.to_worker: list[Any] = []
        self.branch = Branches(self.switch).open(self.to_worker.append)
        self.late: list[Any] = []
        self.remote = Remote(
            self.to_master.append, lambda: self.limits, lambda throttle, count: 0, clock, self.late.append
        )
        clock.now += 5 * SECOND  # the dead time of a start

    def up(self) -> list[Any]:
        """To the manager; what it was."""
        said, self.to_master[:] = list(self.to_master), []
        for record in said:
            self.branch.hear(record)
        return said

    def down(self) -> list[Any]:
        said, self.to_worker[:] = list(self.to_worker), []
        for record in said:
            gevent.get_hub().loop.run_callback(self.remote.hear, record)  # as a link does
        gevent.sleep(0)
        gevent.sleep(0)
        return said


@pytest.fixture
def ends(clock: Clock) -> Iterator[Ends]:
    ends = Ends(clock)
    yield ends
    ends.admission.stop()


def test_a_slot_that_comes_in_time_is_used_at_once(ends: Ends) -> None:
    told: list[Any] = []
    ends.remote.ask_slot(WHO, 60.0, told.append)
    ends.up()
    ends.down()
    assert told == [None]
    assert not ends.to_master


def test_a_slot_that_comes_late_is_put_off_before_it_is_used(ends: Ends, clock: Clock) -> None:
    told: list[Any] = []
    slot = ends.remote.ask_slot(WHO, 60.0, told.append)
    ends.up()
    clock.now += 3 * SECOND // 10
    ends.down()
    assert not told
    assert [type(each) for each in ends.up()] == [seam.PutOff]
    clock.now += MILLISECOND
    ends.down()
    assert told == [None]
    assert slot is not None
    assert slot.last == clock.now - MILLISECOND + LATENESS  # as of the moment at which it was put off

    told.clear()
    ends.remote.ask_slot(WHO, 60.0, told.append)  # the next one comes an interval after it
    ends.up()
    ends.down()
    assert not told
    clock.now += SECOND // 10 - 2 * MILLISECOND
    ends.admission._ring()
    ends.down()
    assert not told
    clock.now += 2 * MILLISECOND
    ends.admission._ring()
    gevent.sleep(0)
    ends.down()
    assert told == [None]


def test_a_slot_that_comes_late_again_and_again_is_used_at_last(ends: Ends, clock: Clock) -> None:
    told: list[Any] = []
    ends.remote.ask_slot(WHO, 60.0, told.append)
    ends.up()
    for _ in range(3):
        clock.now += 3 * LATENESS
        ends.down()
        assert not told
        assert [type(each) for each in ends.up()] == [seam.PutOff]
    clock.now += 3 * LATENESS
    ends.down()
    assert told == [None]


def test_a_slot_that_comes_much_too_late_is_asked_for_again(ends: Ends, clock: Clock) -> None:
    told: list[Any] = []
    ends.remote.ask_slot(WHO, 60.0, told.append)
    ends.up()
    clock.now += 2 * SECOND
    ends.down()
    ends.up()
    ends.down()
    assert not told
    assert [type(each) for each in ends.up()] == [seam.Ask]
    ends.down()
    assert told == [None]


def test_who_calls_off_while_it_is_put_off_is_told_nothing(ends: Ends, clock: Clock) -> None:
    told: list[Any] = []
    slot = ends.remote.ask_slot(WHO, 60.0, told.append)
    ends.up()
    clock.now += 3 * SECOND // 10
    ends.down()
    ends.remote.cancel_message(slot)
    ends.up()
    ends.down()
    assert not told
    assert not ends.up()


def test_a_slot_of_who_waited_over_a_change_is_the_new_manager_s(ends: Ends, clock: Clock) -> None:
    """It is told with its last moment, and put off there."""
    ends.admission.manager.freeze(clock())
    told: list[Any] = []
    slot = ends.remote.ask_slot(WHO, 60.0, told.append)
    ends.up()
    asked: list[Any] = []
    away = Remote(asked.append, lambda: ends.limits, lambda throttle, count: 0, clock)
    ends.switch.hand_over(away)
    assert [type(each) for each in asked] == [seam.Ask]
    away.hear(seam.Granted(asked[0].id, clock.now + 7))
    ends.down()
    assert told == [None]
    assert isinstance(slot, RemoteSlot)
    assert slot.last == clock.now + 7

    clock.now += 100
    held = next(iter(ends.branch._told.values()))
    assert not isinstance(held, MessageTicket)
    greenlet = gevent.spawn(ends.switch.put_off, held)
    gevent.sleep(0)
    assert [type(each) for each in asked[1:]] == [seam.PutOff]
    gevent.get_hub().loop.run_callback(away.hear, seam.Yes(asked[1].id, True, clock.now + 9))  # as a link does
    assert greenlet.get(timeout=30)
