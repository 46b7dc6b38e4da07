"""The link between two processes: records in their order whatever their size, descriptors, and ends that misbehave."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import tempfile
from functools import partial
from unittest import mock

import pytest
from gevent import sleep

from proxy.net import seam as module
from proxy.net.seam import Seam, pair
from proxy.protocols import seam
from tests.loopback.net.relays import open_descriptors
from tests.waiting import wait_for

until = partial(wait_for, pause=sleep)


class End:
    """One end, which remembers what it has heard."""

    def __init__(self, sock: socket.socket, is_master: bool) -> None:
        self.heard: list[seam.Record] = []
        self.fds: list[int] = []
        self.datagrams = self.lost = 0
        self.seam = Seam(sock, is_master, self._take, self._gone)

    def _take(self, records, fds):
        self.datagrams += 1
        self.heard += records
        self.fds += fds

    def _gone(self):
        self.lost += 1

    def close(self) -> None:
        self.seam.close()
        for fd in self.fds:
            os.close(fd)


class Link:
    """Both ends. raw: the worker's end is a bare socket."""

    def __init__(self, raw: bool = False) -> None:
        self.before = open_descriptors()
        ours, theirs = pair()
        self.master = End(ours, True)
        self.worker = None if raw else End(theirs, False)
        self.raw = theirs

    def close(self) -> None:
        self.master.close()
        if self.worker is not None:
            self.worker.close()
        else:
            self.raw.close()
        assert open_descriptors() == self.before


@pytest.fixture
def link():
    link = Link()
    yield link
    link.close()


@pytest.fixture
def raw():
    link = Link(raw=True)
    link.raw.setblocking(False)
    yield link
    link.close()


def order(size: int, what: str = "x") -> seam.Order:
    return seam.Order(what, b"z" * size)


def test_what_is_said_in_one_turn_is_one_datagram(link):
    for number in range(100):
        link.worker.seam.say(seam.Leave(number))
    assert not link.master.heard
    until(lambda: len(link.master.heard) == 100, what="all are there")
    assert [record.number for record in link.master.heard] == list(range(100))
    assert link.master.datagrams == 1


@pytest.mark.parametrize("size", [0, seam.DATAGRAM - 20, seam.DATAGRAM, seam.DATAGRAM + 1, 300_000, 40_000_000])
def test_a_record_of_any_size_keeps_its_place(link, size):
    """Also one that is longer than all that may wait."""
    said = [order(1, "a"), order(size, "b"), order(2, "c")]
    for record in said:
        link.master.seam.say(record)
    until(lambda: len(link.worker.heard) == 3, what="all are there")
    assert link.worker.heard == said
    assert not link.worker.fds


def test_many_records_that_do_not_fit_one_datagram(link):
    said = [order(1000, str(number)) for number in range(500)]
    for record in said:
        link.master.seam.say(record)
    until(lambda: len(link.worker.heard) == 500, what="all are there")
    assert link.worker.heard == said


def test_what_may_wait_goes_with_what_is_said_next_in_its_order(link):
    link.worker.seam.say_late(seam.Leave(1))
    link.worker.seam.say_late(seam.Leave(2))
    link.worker.seam.say(seam.Cancel(3))
    until(lambda: link.master.heard, what="it is there")
    assert (link.master.heard, link.master.datagrams) == ([seam.Leave(1), seam.Leave(2), seam.Cancel(3)], 1)


def test_what_may_wait_goes_by_itself_where_nothing_else_is_said(link):
    for number in range(3):
        link.worker.seam.say_late(seam.Leave(number))
        until(lambda number=number: len(link.master.heard) == number + 1, what="it is there")
    assert link.master.heard == [seam.Leave(0), seam.Leave(1), seam.Leave(2)]


def test_what_was_still_waiting_arrives_before_the_end(link):
    link.worker.seam.say_late(seam.Leave(1))
    link.worker.seam.close()
    until(lambda: link.master.lost, what="the end")
    assert link.master.heard == [seam.Leave(1)]


def test_descriptors_keep_their_place_too_and_stay_the_senders(link):
    with tempfile.TemporaryFile() as file:
        file.write(b"content")
        file.flush()
        link.master.seam.say(order(1, "before"))
        link.master.seam.say_with(order(1, "with"), [file.fileno()] * 3)
        link.master.seam.say_with(order(100_000, "long"), [file.fileno()])
        link.master.seam.say(order(1, "behind"))
        assert os.fstat(file.fileno())
    until(lambda: len(link.worker.heard) == 4, what="all are there")
    assert [record.what for record in link.worker.heard] == ["before", "with", "long", "behind"]
    assert len(link.worker.fds) == 4
    assert {os.pread(fd, 10, 0) for fd in link.worker.fds} == {b"content"}
    assert not any(os.get_inheritable(fd) for fd in link.worker.fds)


def test_what_was_said_last_arrives_before_the_end(link):
    link.worker.seam.say(seam.Leave(7))
    link.worker.seam.close()
    until(lambda: link.master.lost, what="its end is seen")
    assert link.master.heard == [seam.Leave(7)]


def test_the_end_is_told_once_and_nothing_said_behind_it_harms(link):
    link.worker.seam.close()
    until(lambda: link.master.lost, what="its end is seen")
    link.master.seam.say(order(1))
    with tempfile.TemporaryFile() as file:
        link.master.seam.say_with(order(1), [file.fileno()])
    sleep(0)
    assert link.master.lost == 1
    assert link.master.seam.closed


@pytest.mark.parametrize(
    "data",
    [
        b"\x00",  # a file that is not there
        b"\xff" * 10,
        b"\x91",  # half a record
        next(seam.encode([order(1)])),  # the master's language
        next(seam.encode([seam.Leave(1)]))[:-1],
        b"x" * 100_000,  # longer than any
    ],
)
def test_garbage_ends_it(raw, data):
    raw.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    raw.raw.send(next(seam.encode([seam.Leave(1)])))
    raw.raw.send(data)
    until(lambda: raw.master.lost, what="it is given up")
    assert raw.master.heard == [seam.Leave(1)]


def test_random_bytes_never_do_more_than_end_it():
    dice = random.Random(18)
    for _ in range(200):
        link = Link(raw=True)
        good = bytearray(next(seam.encode([seam.Enter(1, ("a", 1.0, "b", "c", "d", "e"), 2.0, b"k", True)])))
        for _ in range(dice.randrange(1, 4)):
            good[dice.randrange(len(good))] = dice.randrange(256)
        link.raw.send(bytes(good))
        until(lambda link=link: link.master.lost or link.master.heard, what="it is judged")
        link.close()


def test_one_that_does_not_read_is_given_up(raw, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 1_000_000)
    said = 0
    while not raw.master.lost:
        raw.master.seam.say(order(10_000))
        said += 1
        sleep(0)
        assert said < 1_000
    assert said > 100
    assert raw.master.lost == 1


def test_files_that_wait_count_with_their_size(raw, monkeypatch):
    """Beyond those that the kernel has taken, each as a datagram of one byte."""
    monkeypatch.setattr(module, "MOST_WAITING", 1_000_000)
    said = 0
    while not raw.master.lost:
        raw.master.seam.say(order(40_000))
        said += 1
        sleep(0)
        assert said < 5_000, "files pile up in memory"
    assert raw.master.lost == 1


def test_one_that_reads_late_misses_nothing(raw):
    said = [order(5_000, str(number)) for number in range(1_000)]
    for record in said:
        raw.master.seam.say(record)
    sleep(0)
    assert raw.master.seam.waits > 0
    heard = []
    while len(heard) < len(said):
        with contextlib.suppress(BlockingIOError):
            heard += seam.decode(raw.raw.recv(100_000), False)
        sleep(0)
    assert heard == said
    until(lambda: not raw.master.seam.waits, what="nothing waits")


def test_who_has_no_descriptor_for_what_comes_misses_it_and_nothing_else(link):
    """A worker without a free descriptor says that it cannot have the new doors; it is not lost over it."""
    with tempfile.TemporaryFile() as file:
        link.master.seam.say_with(order(1, "sockets"), [file.fileno()])  # under way with the next system call
        with _no_descriptors():
            until(lambda: link.worker.heard, what="it is heard")
    assert not link.worker.fds
    assert not link.worker.lost
    link.master.seam.say(order(3, "behind"))
    until(lambda: len(link.worker.heard) == 2, what="the link goes on")


@contextlib.contextmanager
def _no_descriptors():
    """None can be had in here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(held[0])


def test_who_has_no_descriptor_for_a_copy_is_told(link):
    with tempfile.TemporaryFile() as file:
        before = open_descriptors()
        with (
            mock.patch.object(module.os, "dup", side_effect=[os.dup(file.fileno()), OSError(24, "none")]),
            pytest.raises(OSError, match="none"),
        ):
            link.master.seam.say_with(order(1), [file.fileno(), file.fileno()])
        assert open_descriptors() == before
    link.master.seam.say(order(1, "goes on"))
    until(lambda: link.worker.heard, what="the link goes on")


def test_a_long_record_without_a_descriptor_for_it_ends_the_link(link):
    with mock.patch.object(module.os, "memfd_create", side_effect=OSError(24, "none")):
        link.master.seam.say(order(1, "short"))
        link.master.seam.say(order(100_000, "long"))
        link.master.seam.say(order(1, "behind"))
        until(lambda: link.master.lost, what="it is given up")
    assert link.master.lost == 1
    until(lambda: link.worker.lost, what="so it is at the other end")
    assert [record.what for record in link.worker.heard] in ([], ["short"])
