"""The guard itself: that it names what goes on, and nothing that ends or waits for work."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest
from gevent.event import Event

from proxy.net.crew import Crew
from tests.loopback import leftovers


@pytest.fixture
def go(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """What a test leaves waits for this."""
    monkeypatch.setattr(leftovers, "_PATIENCE", 0.01)
    go = Event()
    yield go
    go.set()


def test_a_greenlet_that_waits_is_told_once_with_its_place(go: Event) -> None:
    before = leftovers.now()
    gevent.spawn(go.wait)
    (told,) = leftovers.left_since(before)
    assert "Event.wait" in told
    assert not leftovers.left_since(before)


def test_one_that_has_not_begun(go: Event) -> None:
    before = leftovers.now()
    later = gevent.spawn_later(3600.0, go.wait)
    (told,) = leftovers.left_since(before)
    assert "Greenlet" in told
    later.kill()


def test_a_crew_at_work_and_not_one_that_waits_for_work(go: Event) -> None:
    before, crew = leftovers.now(), Crew()
    crew.run(lambda: None)
    gevent.sleep(0)
    assert not leftovers.left_since(before)
    crew.run(go.wait)
    (told,) = leftovers.left_since(before)
    assert "Crew._worker" in told


def test_what_was_there_before_and_what_ends(go: Event) -> None:
    gevent.spawn(go.wait)
    gevent.sleep(0)
    before = leftovers.now()
    gevent.spawn(gevent.sleep, 0.001)
    assert not leftovers.left_since(before)


def test_work_of_a_crew_can_be_ended(go: Event) -> None:
    before, crew = leftovers.now(), Crew()
    crew.run(go.wait)
    gevent.sleep(0)
    leftovers.end_work_of_crews()
    assert not leftovers.left_since(before)
    assert not crew.busy


def test_a_timer(go: Event) -> None:
    before, timer = leftovers.now(), gevent.get_hub().loop.timer(3600.0)
    timer.start(go.set)
    assert leftovers.left_since(before) == ["1 timers or descriptors that the loop watches"]
    timer.close()
    assert not leftovers.left_since(before)
