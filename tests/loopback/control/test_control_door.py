"""The control socket where all descriptors are in use."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import gevent
import pytest
from gevent import socket

from proxy.control import door
from proxy.server.process import Reserve


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
        with gevent.Timeout(10):
            assert caller.recv(1000)
        for _ in range(5):
            gevent.sleep(0)
            assert not lent
    control.close()
    while listening.fileno() >= 0:
        gevent.sleep(0)
