"""Real threads beside the hub: what they return and raise, who is next, and what becomes of those who give up."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import gevent
import pytest
from gevent import Timeout

from proxy.net.apart import Apart


def test_the_hub_goes_on_meanwhile() -> None:
    apart, go, seen = Apart(1), threading.Event(), []
    waiting = gevent.spawn(lambda: seen.append(apart.call("a", lambda: (go.wait(30), threading.get_ident())[1])))
    gevent.sleep(0)
    assert not seen
    go.set()  # said by the hub, which so was not held up
    waiting.get(timeout=30)
    assert seen
    assert seen[0] != threading.get_ident()


@pytest.mark.parametrize("error", [ValueError("what was wrong"), OSError(5, "broken")])
def test_what_the_work_raises_is_raised_and_not_printed(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        Apart(1).call("a", work)
    assert caught.value is error
    gevent.sleep(0)
    assert capfd.readouterr().err == ""


def test_one_with_much_work_makes_others_wait_for_one_piece_of_it() -> None:
    apart, go, done = Apart(1), threading.Event(), []
    first = gevent.spawn(apart.call, "busy", go.wait, 30)
    gevent.sleep(0)
    rest = [gevent.spawn(apart.call, "busy", done.append, number) for number in range(5)]
    rest.append(gevent.spawn(apart.call, "other", done.append, "other"))
    gevent.sleep(0)
    assert len(apart) == 6
    go.set()
    gevent.joinall([first, *rest], timeout=30, raise_error=True)
    assert done == [0, "other", 1, 2, 3, 4]


def test_who_gives_up_in_the_line_or_at_work_takes_nothing_along() -> None:
    apart, go = Apart(1), threading.Event()
    at_work = gevent.spawn(_give_up, apart, go.wait)
    gevent.sleep(0)
    in_line = [gevent.spawn(_give_up, apart, go.wait) for _ in range(3)]
    gevent.joinall([at_work, *in_line], timeout=30, raise_error=True)
    assert len(apart) == 0
    waiting = gevent.spawn(apart.call, "a", lambda: "done")  # behind the work that nobody waits for any more
    gevent.sleep(0)
    assert len(apart) == 1
    go.set()
    assert waiting.get(timeout=30) == "done"
    assert apart.call("a", lambda: "again") == "again"


def _give_up(apart: Apart, work: object) -> None:
    with pytest.raises(Timeout), Timeout(0.001):
        apart.call("a", work, 30)  # type: ignore[arg-type]


def test_who_is_killed_when_its_turn_has_just_come_hands_it_on() -> None:
    apart, go = Apart(1), threading.Event()
    tasks, pool = [], apart._pool
    apart._pool = SimpleNamespace(spawn=lambda *what: tasks.append(pool.spawn(*what)) or tasks[-1])
    first = gevent.spawn(apart.call, "a", go.wait, 30)
    gevent.sleep(0)
    (task,) = tasks
    second = gevent.spawn(apart.call, "a", lambda: "second")
    gevent.sleep(0)
    third = gevent.spawn(apart.call, "a", lambda: "third")
    gevent.sleep(0)
    task.rawlink(lambda _: second.throw(gevent.GreenletExit))  # its turn has come just then, and it has not run
    go.set()
    assert third.get(timeout=30) == "third"
    first.join(30)
    assert apart.call("a", lambda: "again") == "again"
