"""The office of a worker: what it asks, what it knows without asking, and what it may say later."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import gevent
import pytest

from proxy.egress.office import Applicant
from proxy.egress.remote import Remote
from proxy.policy.limits import Limits
from proxy.protocols import seam
from proxy.settings import ThrottleSettings

NAME = ("", "one", "")


def limits(*destinations: str) -> Limits:
    networks = tuple([ip_network(each) for each in destinations])
    one = ThrottleSettings(
        name="one", source=(), destination=networks, max_concurrent_connections=5, max_delivery_rate=(), wait=60.0
    )
    return Limits((one,) if networks else ())


class Worker:
    """One that hears what the test says; `said` at once, and `late`."""

    def __init__(self) -> None:
        self.limits = limits("127.0.0.2/32")
        self.said: list[Any] = []
        self.late: list[Any] = []
        self.answers: list[Any] = []
        self.remote = Remote(self.said.append, lambda: self.limits, lambda *_: 0, say_late=self.late.append)

    def ask(self, destination: str) -> int | None:
        who = Applicant("a", 1.0, "127.0.0.1", destination)
        return self.remote.ask_place(who, 5.0, lambda refusal, places: self.answers.append(places), None)

    def hear(self, record: seam.FromMaster) -> None:
        gevent.get_hub().loop.run_callback(self.remote.hear, record)
        gevent.sleep(0)

    def places(self, *wanted: int) -> Any:
        id = self.ask("127.0.0.2")
        assert id is not None
        self.hear(seam.Placed(id, id, [NAME], list(wanted)))
        return self.answers.pop()


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_that_a_socket_is_closed_may_be_said_later_unless_somebody_waits(worker: Worker) -> None:
    first, second, third = worker.places(), worker.places(), worker.places(0)
    worker.said.clear()
    worker.remote.leave(third)
    assert (worker.said, worker.late) == ([seam.Leave(third.number)], [])
    worker.hear(seam.Wanted(NAME, False))
    worker.remote.leave(first)
    assert (len(worker.said), worker.late) == (1, [seam.Leave(first.number)])
    worker.hear(seam.Wanted(NAME, True))
    worker.remote.leave(second)
    assert worker.said[1:] == [seam.Leave(second.number)]
    worker.remote.leave(second)
    assert (len(worker.said), len(worker.late)) == (2, 1), "once each"


def test_whether_a_limit_applies_is_remembered_until_a_reload(worker: Worker) -> None:
    assert worker.ask("127.0.0.2") is not None
    assert worker.ask("127.0.0.3") is None
    assert worker.ask("127.0.0.2") is not None
    worker.limits = limits("127.0.0.3/32")
    assert worker.ask("127.0.0.2") is None
    assert worker.ask("127.0.0.3") is not None
    worker.limits = limits()
    assert worker.ask("127.0.0.3") is None
    assert len(worker.said) == 3
