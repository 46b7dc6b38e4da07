"""When a client of which nothing is read is probed: step by step, with a clock that moves only in waits."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest

from proxy.doors.native import link as channel_link
from proxy.doors.native import transfer as channel_transfer
from proxy.net import probing
from proxy.net.alarm import Alarm, TimeIsUp
from proxy.policy.idleness import PROBE_AFTER
from proxy.protocols.native import messages as m
from tests.loopback.doors.native.test_transfer_steps import END, MAIL, Gated, Steps

pytestmark = pytest.mark.only_python("streams that do what the test says, a clock of its own")

PROBE = m.Probe()
#: In a `Waits.carry`: the alarm goes off.
RING = object()


class Waits:
    """What happens whenever the transfer waits, one after the other; then all goes on, and the client says END.

    Attributes:
        armed: seconds of each alarm that was set.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.armed: list[float] = []
        self.now = 1000.0
        self._patch = monkeypatch
        self._bucket: dict[Alarm, None] = {}

    def start(self, seconds: float) -> Alarm:
        """As `Alarms.start`."""
        self.armed.append(seconds)
        return Alarm(None, self._bucket)

    def carry(self, steps: Steps, *happens: Any) -> None:
        """Args:
        happens: seconds that pass before a wake-up for nothing, RING, or what the world does, a function.
        """
        left = deque(happens)

        def wait(*_: object) -> None:
            what = left.popleft() if left else lambda: end(steps)
            if what is RING:
                self.now += self.armed[-1]
                raise TimeIsUp(next(iter(self._bucket)))
            if callable(what):
                what()
            else:
                self.now += what

        self._patch.setattr(probing, "monotonic", lambda: self.now)
        self._patch.setattr(channel_transfer, "has_gone", lambda sock: False)
        self._patch.setattr(steps.link, "wait", wait)
        steps.transfer.carry()
        assert not left
        assert not self._bucket, "no alarm is left for what comes next"


def end(steps: Steps) -> None:
    steps.receiver.room = steps.client.room = 10**9
    steps.says(END)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


@pytest.fixture
def steps(waits: Waits) -> Steps:
    return Steps(probes=True, alarms=waits)


def test_a_client_is_probed_as_long_as_its_receiver_takes_nothing(waits: Waits, steps: Steps) -> None:
    steps.block()
    moved = steps.link.moved
    seen: list[int] = []
    waits.carry(steps, RING, RING, RING, lambda: seen.append(steps.link.moved - moved))
    assert steps.heard == [PROBE] * 3
    assert waits.armed == [PROBE_AFTER] * 5
    assert seen == [0], "for idle_timeout nothing has moved"
    assert steps.got == b"held"


def test_a_wake_up_for_nothing_neither_hastens_nor_delays_it(waits: Waits, steps: Steps) -> None:
    steps.block()
    waits.carry(steps, 2.0, 2.0, RING, 0.5)
    assert waits.armed == [5.0, 3.0, 1.0, 5.0, 4.5]
    assert steps.heard == [PROBE]


def test_a_receiver_that_takes_a_byte_now_and_then_is_enough(waits: Waits, steps: Steps) -> None:
    steps.block(b"x" * 20)

    def take() -> None:
        waits.now += 4.9
        steps.receiver.room = 1

    waits.carry(steps, *[take] * 10)
    assert steps.heard == []
    assert waits.armed == [PROBE_AFTER] * 11


def test_what_the_receiver_says_is_as_good_as_a_probe(waits: Waits, steps: Steps) -> None:
    steps.block()

    def speak() -> None:
        waits.now += 4.9
        steps.receiver.incoming.append(b"250 ok\r\n")
        steps.transfer._readable = True

    waits.carry(steps, *[speak] * 3)
    assert steps.heard == [b"250 ok\r\n"] * 3


def test_who_is_read_is_not_probed(waits: Waits, steps: Steps) -> None:
    """A client that thinks, or waits for a reply, for long."""
    steps.says(b"NOOP\r\n")
    waits.carry(steps, 100.0, 100.0)
    assert (steps.heard, waits.armed) == ([], [])


def test_a_client_that_does_not_take_probes_gets_none(waits: Waits) -> None:
    steps = Steps(alarms=waits)
    steps.block()
    waits.carry(steps, 100.0, 100.0)
    assert (steps.heard, waits.armed) == ([], [])


def test_for_a_client_that_does_not_read_either_probes_do_not_pile_up(waits: Waits, steps: Steps) -> None:
    steps.block()
    steps.client.room = 0
    held: list[int] = []
    waits.carry(steps, *[RING] * 20, lambda: held.append(len(steps.link._unsent)))
    assert held == [len(channel_link._PROBE)]
    assert steps.heard == [PROBE]


def test_nor_while_the_kernel_has_something_for_it(waits: Waits, steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_link, "holds_back", lambda sock: True)
    steps.block()
    waits.carry(steps, *[RING] * 3)
    assert steps.heard == []


@pytest.mark.parametrize("full", [True, False])
def test_who_is_not_read_since_its_mail_waits_is_probed_too(waits: Waits, full: bool) -> None:
    gated = Gated(probes=True, alarms=waits)
    gated.hold(b"x" * (channel_transfer._READ_SIZE - len(MAIL) - (not full)))

    def slot() -> None:
        gated.gate.holds = gated.gate.closed = False

    waits.carry(gated, *[RING] * full, slot)
    assert gated.heard == [PROBE] * full
