"""Whether a client is still there, as seen while something is waited for: what throws, when, and what stays behind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from select import EPOLLHUP, EPOLLIN, EPOLLRDHUP
from types import SimpleNamespace
from typing import Any

import gevent
import pytest

from proxy.doors import presence
from proxy.doors.presence import Presence

SHORT, LONG = 0.001, 3600.0


class Engine:
    """Remembers who looks at each descriptor."""

    def __init__(self) -> None:
        self.watches: list[Any] = []

    def watch(self, _fd: int, callback: Any) -> None:
        self.watches.append(callback)


class House:
    def __init__(self) -> None:
        self.engine: Any = Engine()
        self.sock, self.client = socket.socketpair()
        self.sock.setblocking(False)
        self.noted: list[int] = []

    def stays(self, early: bytes = b"", half_closed: float = SHORT, **words: Any) -> Any:
        """`Presence`, of a client whose events are told by `event`."""
        words = {"missed": False, "noted": self.noted.append, **words}
        return Presence(self.engine, self.sock, early, half_closed, **words)

    def event(self, events: int) -> None:
        """In the hub, as the engine has it."""
        gevent.get_hub().loop.run_callback(self.engine.watches[-1], events)

    def wait(self, *events: int, **words: Any) -> bool:
        """Whether a wait is ended for these events, as soon as may be."""
        with self.stays(**words):
            for each in events:
                self.event(each)
            gevent.sleep(0.05)
            return False
        return True


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.sock.close()
    house.client.close()


def gone(house: House, *events: int, **words: Any) -> bool:
    try:
        return house.wait(*events, **words)
    except ConnectionResetError:
        return True


def test_a_reset_ends_it_at_once_and_a_fin_when_its_time_is_over(house: House) -> None:
    assert gone(house, EPOLLHUP, half_closed=LONG)
    assert not gone(house, EPOLLRDHUP, half_closed=LONG)
    assert gone(house, EPOLLRDHUP)
    assert not gone(house, EPOLLIN)
    assert house.noted == [EPOLLHUP, EPOLLRDHUP, EPOLLRDHUP, EPOLLIN]


def test_who_has_said_more_is_believed_to_wait(house: House) -> None:
    assert not gone(house, EPOLLRDHUP, early=b"EHLO")
    assert not gone(house, EPOLLRDHUP, more=lambda: True)
    house.client.send(b"EHLO")
    assert not gone(house, EPOLLRDHUP)
    assert gone(house, EPOLLRDHUP, more=lambda: False)


def test_what_went_by_before_is_found(house: House) -> None:
    house.client.close()
    assert gone(house, missed=True)
    assert not gone(house, missed=False)


def test_a_second_word_of_the_end_does_not_give_it_more_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[float] = []
    loop = gevent.get_hub().loop

    def timer(seconds: float) -> Any:
        begun.append(seconds)
        return loop.timer(seconds)

    hub = SimpleNamespace(loop=SimpleNamespace(timer=timer, run_callback=loop.run_callback))
    monkeypatch.setattr(presence, "get_hub", lambda: hub)
    assert not gone(house, EPOLLRDHUP, EPOLLRDHUP, EPOLLRDHUP, half_closed=LONG)
    assert begun == [LONG]


def test_nothing_of_it_reaches_whoever_goes_on(house: House) -> None:
    house.client.close()
    with house.stays(missed=True):
        pass  # what it waits for is there; that the client has gone is still to be told
    gevent.sleep(0.05)
    with house.stays():
        house.event(EPOLLRDHUP)
        gevent.sleep(0)
    gevent.sleep(0.05)
    assert house.engine.watches[-1] == house.noted.append, "events are noted as before"
