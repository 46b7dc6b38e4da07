"""The control socket where all descriptors are in use, and with callers who only take up room."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import gevent
import msgspec
import pytest
from gevent import socket

from proxy.control import door
from proxy.server.process import Reserve
from proxy.throttling.handover import Frozen


@pytest.fixture
def no_more_descriptors() -> Iterator[object]:
    """Call it, and every descriptor is in use until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def now() -> None:
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))

    yield now
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_reserve_is_not_lent_while_nobody_calls(no_more_descriptors) -> None:
    """Linux says EMFILE before it looks whether anybody is there: whoever then waits with the reserve lent loses it."""
    reserve = Reserve()
    lent = 0

    @contextmanager
    def spare() -> Iterator[None]:
        nonlocal lent
        with reserve.lent():
            lent += 1
            try:
                yield
            finally:
                lent -= 1

    path = f"@control-door-{os.getpid()}"
    house: Any = SimpleNamespace(spare=spare)
    caller = socket.socket(socket.AF_UNIX)
    listening = door.listen(path, "0600", None)
    gevent.sleep(0)
    no_more_descriptors()
    control = door.ControlDoor(listening, path, None, house)
    with caller:
        for _ in range(5):
            gevent.sleep(0)
            assert not lent
        caller.connect("\0" + path[1:])
        caller.sendall(b"nonsense\n")
        with gevent.Timeout(30):
            assert caller.recv(1000)
        for _ in range(5):
            gevent.sleep(0)
            assert not lent
    control.close()
    while listening.fileno() >= 0:
        gevent.sleep(0)


ADMINS = 4711


class Room:
    """A control socket whose callers are whom the test wants them to be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, house: Any) -> None:
        self.path = f"@control-room-{os.getpid()}"
        self.callers: list[bool] = []
        monkeypatch.setattr(door.ControlDoor, "_caller", lambda _, sock: self._caller())
        house.spare = nullcontext
        self.listening = door.listen(self.path, "0600", None)
        self.control = door.ControlDoor(self.listening, self.path, ADMINS, house)
        self._sockets: list[Any] = []

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()
        for each in self._sockets:
            each.close()
        with gevent.Timeout(30):
            while self.listening.fileno() >= 0 or self.control._open:
                gevent.sleep(0)

    def _caller(self) -> door.Caller:
        return door.Caller(1, 1, frozenset({ADMINS} if self.callers.pop(0) else {ADMINS + 1}))

    def call(self, may_change: bool) -> Any:
        self.callers.append(may_change)
        caller = socket.socket(socket.AF_UNIX)
        self._sockets.append(caller)
        caller.settimeout(30)
        caller.connect("\0" + self.path[1:])
        with gevent.Timeout(30):
            while self.callers:
                gevent.sleep(0)
        return caller


def ask(caller: Any, *words: str) -> bytes:
    with suppress(OSError):
        caller.sendall(msgspec.json.encode({"command": words}) + b"\n")
        return bytes(caller.recv(100_000))
    return b""


def test_who_may_only_look_keeps_nobody_out_who_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    with Room(monkeypatch, SimpleNamespace()) as room:
        lookers = [room.call(False) for _ in range(door._MOST)]
        assert all(ask(each, "help") for each in lookers)
        assert not ask(room.call(False), "help"), "one too many"
        assert ask(room.call(True), "help")
        lookers.pop().close()
        with gevent.Timeout(30):
            while not ask(room.call(False), "help"):
                gevent.sleep(0)


def test_who_is_in_the_group_no_more_changes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[object] = []
    house = SimpleNamespace(stop=lambda: stopped.append(None), changed=lambda: None)
    with Room(monkeypatch, house) as room:
        admin, other = room.call(True), room.call(False)
        assert b"not_allowed" in ask(other, "stop")
        room.control.apply("0600", ADMINS + 1)
        assert b"not_allowed" in ask(admin, "stop")
        assert not stopped
        assert b"stopping" in ask(other, "stop")
        room.control.apply("0600", None)
        assert b"not_allowed" in ask(other, "stop")
    assert len(stopped) == 1


def test_whoever_is_told_no_again_and_again_does_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[object] = []
    monkeypatch.setattr(door.log, "note", lambda *words, **fields: lines.append(fields))
    with Room(monkeypatch, SimpleNamespace()) as room:
        other = room.call(False)
        for _ in range(30):
            assert b"not_allowed" in ask(other, "stop")
    assert len(lines) == 10


def test_who_does_not_take_its_answers_is_given_up_and_looks_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def trace(wanted: object, seconds: float) -> Iterator[list[str]]:
        try:
            while True:
                yield ["x" * 10_000]
        finally:
            ended.append(seconds)

    monkeypatch.setattr(door, "_TAKEN_WITHIN", 0.05)
    with Room(monkeypatch, SimpleNamespace(trace=trace)) as room:
        room.call(False).sendall(b'{"command":["trace"]}\n')
        with gevent.Timeout(30):
            while not ended or room.control._open:
                gevent.sleep(0.01)


def test_what_the_throttles_cannot_do_now_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process is about to take them over."""

    def frozen(*_: object) -> None:
        raise Frozen("another process takes over")

    house = SimpleNamespace(end_backoff=frozen, end_by_hand=frozen, is_throttle=lambda name: True)
    with Room(monkeypatch, house) as room:
        for words in (("backoff", "end", "one"), ("resume", "throttle", "one")):
            answer = msgspec.json.decode(ask(room.call(True), *words))
            assert (answer["code"], answer["error"]) == ("not_now", "another process takes over")
