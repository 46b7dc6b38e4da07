"""Pooled greenlets: work starts at once or in the next turn, and nothing wakes an idle one by mistake."""

from __future__ import annotations

from unittest import mock

import gevent
import pytest
from gevent import get_hub, getcurrent

from proxy.net import crew as crew_module
from proxy.net.crew import Crew
from tests.loopback.net.relays import until


def test_from_a_greenlet_work_starts_in_the_hubs_next_turn_and_the_caller_goes_on() -> None:
    crew, order = Crew(), []
    crew.run(order.append, "work")
    order.append("caller")
    gevent.sleep(0)
    assert order == ["caller", "work"]


def test_from_the_hub_work_starts_at_once() -> None:
    crew, order = Crew(), []

    def callback() -> None:
        crew.run(order.append, "work")
        order.append("callback")

    get_hub().loop.run_callback(callback)
    gevent.sleep(0)
    assert order == ["work", "callback"]


def test_work_waits_for_memory_and_is_done_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, done, answers = Crew(), [], []
    monkeypatch.setattr(crew_module, "greenlet", mock.Mock(side_effect=MemoryError))

    def callback() -> None:
        answers.extend((crew.run(done.append, "first"), crew.run(done.append, "second")))

    get_hub().loop.run_callback(callback)
    gevent.sleep(0)
    crew.run(done.append, "third")
    gevent.sleep(0)
    assert (answers, done) == ([False, False], [])
    monkeypatch.undo()
    until(lambda: len(done) == 3, what="all of it is done")
    assert done == ["first", "second", "third"]


def test_work_that_runs_out_of_memory_is_not_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    crew, begun, told = Crew(), [], []
    monkeypatch.setattr(get_hub(), "handle_error", lambda *what: told.append(what[1]))

    def work() -> None:
        begun.append(1)
        raise MemoryError

    crew.run(work)
    gevent.sleep(0)
    crew.run(begun.append, 2)
    gevent.sleep(0)
    assert (begun, told) == ([1, 2], [MemoryError])


def test_greenlets_are_used_again() -> None:
    crew, seen = Crew(), []
    for _ in range(3):
        crew.run(lambda: seen.append(getcurrent()))
        gevent.sleep(0)
    assert len(set(map(id, seen))) == 1


def test_a_wake_up_meant_for_a_former_life_is_ignored() -> None:
    crew, wakers, done = Crew(), [], []
    crew.run(lambda: wakers.append(getcurrent().switch))
    gevent.sleep(0)
    for stale in ((), (0,), (1, 2)):
        get_hub().loop.run_callback(wakers[0], *stale)
        gevent.sleep(0)
    crew.run(done.append, "still works")
    gevent.sleep(0)
    assert done == ["still works"]
    assert crew.busy == 0


def test_work_that_raises_is_told_and_costs_nobody_else(monkeypatch) -> None:
    crew, told, done = Crew(), [], []
    monkeypatch.setattr(type(get_hub()), "handle_error", lambda self, context, *error: told.append(error[1]))
    crew.run(lambda: 1 / 0)
    gevent.sleep(0)
    crew.run(done.append, "next")
    gevent.sleep(0)
    assert [type(error) for error in told] == [ZeroDivisionError]
    assert done == ["next"]
