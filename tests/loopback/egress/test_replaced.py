"""A manager whose process is replaced by another one: who asks for what, and of whom, from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import gevent
import pytest

from proxy.doors.native.gate import Gate, Way
from proxy.egress.admission import Admission
from proxy.egress.asking import wait_for_place
from proxy.egress.branch import Branches
from proxy.egress.clock import clock_ns
from proxy.egress.office import Applicant
from proxy.egress.remote import Remote
from proxy.egress.switch import Switch
from proxy.errors import Throttled
from proxy.policy.limits import Limits
from proxy.throttling.estate import Reader
from proxy.throttling.flows import Places
from proxy.throttling.limits import Part
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import SECOND, Key, Limit
from tests.waiting import wait_for

WAY = Way("192.0.2.1", "198.51.100.1")


class Two:
    """A manager with a session that has one permit and one connection, and the one that takes over from it."""

    def __init__(self, stack: ExitStack) -> None:
        self.blocks = Limits(())
        self.old = Manager(1, clock_ns() - 10_000 * SECOND)
        self.new = Manager(0, clock_ns())
        self.here, self.there = (Admission(each, lambda throttle, count: False) for each in (self.old, self.new))
        stack.callback(self.here.stop)
        stack.callback(self.there.stop)
        self.switch = Switch(self.here)
        now = clock_ns()
        session = self.old.hello("a", b"run", "host", 1.0, now)
        self.old.ping(session, 1, now)
        self.old.register(session, 0, [(Key(WAY.source, "rule"), Part((Limit(1, 1),)))], now)
        places = self.old.admit("a", 1.0, WAY.source, WAY.destination, self.old.flows(session, (0,)), now)
        assert isinstance(places, Places)
        self.places = places
        self.session = session
        self.gate = Gate(self.switch, places, WAY, lambda: None)

    def grant(self) -> None:
        """A permit for its instance."""
        self.old.demand(self.session, 0, 1, 0, 0, 0, 0, clock_ns())
        assert self.old.take(self.session, clock_ns()).grants

    def change(self) -> None:
        self.old.freeze(clock_ns())
        reader = Reader()
        for chunk in self.old.gather(clock_ns()):
            reader.feed(chunk)
        held = self.new.adopt(reader.finish(), clock_ns())
        branch = Branches(Switch(self.there)).open(lambda record: remote.hear(record), held)
        later = gevent.get_hub().loop.run_callback  # as over a link
        remote = Remote(lambda record: later(branch.hear, record), lambda: self.blocks, lambda throttle, count: 0)
        self.switch.hand_over(remote)


@pytest.fixture
def two() -> Iterator[Two]:
    with ExitStack() as stack:
        yield Two(stack)


def until(done: Callable[[], object], what: str) -> None:
    wait_for(done, what=what, pause=gevent.sleep)


def test_a_mail_after_the_change_has_the_permit_of_before(two: Two) -> None:
    """It is the new manager that is asked, and accuses nobody who has one."""
    two.grant()
    two.change()
    assert not two.gate.mail(), "it has to be asked, in another process"
    until(lambda: not two.gate.closed, "the answer")
    assert two.gate.refusal is None
    assert two.new.unpermitted == 0
    assert two.old.unpermitted == 0


def test_a_mail_without_a_permit_is_seen_by_the_new_one_alone(two: Two) -> None:
    two.change()
    two.gate.mail()
    until(lambda: not two.gate.closed, "the answer")
    assert two.new.unpermitted == 1
    assert two.old.unpermitted == 0


def test_who_waits_for_places_of_a_path_is_told_to_come_again(two: Two) -> None:
    """Its session is over; and the new manager would not know of the path."""
    said: list[Any] = []

    def wait() -> None:
        try:
            wait_for_place(two.here, Applicant("a", 1.0, WAY.source, WAY.destination, two.places.flows), 60.0)
        except Throttled as error:
            said.append(error)

    two.old.freeze(clock_ns())
    greenlet = gevent.spawn(wait)
    gevent.sleep(0)
    assert not said
    two.change()
    greenlet.join(30)
    assert "has taken over" in str(said[0])
    with pytest.raises(Throttled, match="has taken over"):
        wait_for_place(two.here, Applicant("a", 1.0, WAY.source, WAY.destination, two.places.flows), 60.0)


def test_sessions_are_not_listened_to_until_it_is_known_who_goes_on(two: Two) -> None:
    assert two.here.listens_to_sessions
    two.old.freeze(clock_ns())
    assert not two.here.listens_to_sessions
    two.here.thaw()
    assert two.here.listens_to_sessions
    two.change()
    assert two.here.listens_to_sessions, "to a BYE"


@pytest.mark.only_python("a client of the test's own")
def test_who_was_not_listened_to_is_told_when_it_is_again(two: Two) -> None:
    resumed: list[int] = []

    class Someone:
        def resume(self) -> None:
            resumed.append(1)

        def deliver(self) -> None:
            pass

    two.here.clients[two.session] = Someone()  # type: ignore[assignment]
    two.old.freeze(clock_ns())
    assert not resumed
    two.here.thaw()
    assert resumed


def test_what_is_said_to_one_that_is_gone_is_told_and_not_kept(two: Two) -> None:
    two.change()
    for _ in range(100):
        two.old.demand(two.session, 0, 1, 0, 0, 0, 0, clock_ns())
    two.here.leave(two.places)
    assert two.old._held is not None
    assert two.old._held.calls == []
    assert len(two.old.meanwhile()) == 1, "its place"
