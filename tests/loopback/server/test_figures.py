"""What one process says of itself: its costs as the kernel says, its doors, and the lines of status made of that."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxy.model import Endpoint
from proxy.server import figures, vitals
from proxy.server.vitals import Vitals
from proxy.services import Door
from proxy.status.parts import DoorPart, Part


class Spare:
    """Remembers how often it was borrowed."""

    def __init__(self) -> None:
        self.lent = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.lent += 1
        yield


def open_now() -> int:
    return len(os.listdir("/proc/self/fd")) - 1


def test_it_is_what_the_kernel_says() -> None:
    spare = Spare()
    part = Vitals(3, spare).look(7)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert (part.number, part.pid, part.open_connections) == (3, os.getpid(), 7)
    assert part.virtual == pytest.approx(int(status["VmSize"].split()[0]) * 1024, rel=0.1)
    assert part.resident == pytest.approx(int(status["VmRSS"].split()[0]) * 1024, rel=0.1)
    assert 0 <= part.descriptors - open_now() <= 5  # the kernel counts those, too, that others are about to open
    assert part.most_descriptors >= part.descriptors
    assert 0 < part.cpu <= time.process_time()
    assert 0 < time.time() - part.started < 24 * 3600
    assert spare.lent == 0


@pytest.mark.parametrize("size", [None, 0])
def test_descriptors_are_counted_also_where_the_kernel_does_not(size: int | None, monkeypatch: Any) -> None:
    """Before Linux 6.2 the directory has no size."""
    if size is not None:
        monkeypatch.setattr(vitals.os, "stat", lambda path: SimpleNamespace(st_size=size))
    it = Vitals(0, Spare())
    before = it.look(0).descriptors
    more = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    assert it.look(0).descriptors == before + 5
    for fd in more:
        os.close(fd)
    assert it.look(0).descriptors == before


def test_without_a_descriptor_one_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    spare, read = Spare(), vitals._read
    it = Vitals(0, spare)
    monkeypatch.setattr(vitals, "_read", lambda path: read(path) if spare.lent else "".join(fail()))
    assert it.look(0).resident > 0
    assert spare.lent == 1


def fail() -> Iterator[str]:
    raise OSError
    yield ""


def test_without_proc_it_says_nothing_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "_read", lambda path: "".join(fail()))
    part = Vitals(0, Spare()).look(2)
    assert (part.resident, part.virtual, part.started, part.open_connections) == (0, 0, 0.0, 2)


def door(host: str, protocol: str, count: int, secure: bool = False) -> Door:
    it = Door(protocol, Endpoint(host, 25), secure=secure)
    it.open_connections = count
    return it


def test_doors_at_one_address_are_one_line() -> None:
    """A reload has taken one away, or put TLS in front of it, and clients of before are still there."""
    plain, secure = door("127.0.0.1", "socks5", 3), door("127.0.0.1", "socks5", 4, secure=True)
    gone, other = door("127.0.0.2", "socks5", 5), door("127.0.0.1", "proxy_protocol", 6)
    found = figures._doors([secure, other, plain, gone], {id(secure), id(other)})
    assert list(found.values()) == [
        DoorPart("127.0.0.1:25", "socks5", 7, False),
        DoorPart("127.0.0.1:25", "proxy_protocol", 6, False),
        DoorPart("127.0.0.2:25", "socks5", 5, True),
    ]
    lines = [line.text for line in figures.snapshot(Part(doors=found, active=2, cached=1), None).lines()]
    assert lines == [
        "listener(127.0.0.1:25): open_connections=7",
        "listener(127.0.0.1:25): open_connections=6",
        "listener(127.0.0.2:25): open_connections=5",
        "direct_remote_smtp: connections=3(active=2 cached=1)",
    ]
