"""Ways between workers: a client arrives whole where it belongs, or stays where it came."""

from __future__ import annotations

import contextlib
import os
import socket
from functools import partial

import msgspec
import pytest
from gevent import sleep

from proxy.model import Endpoint
from proxy.net.seam import pair
from proxy.server.neighbours import Neighbours
from tests.waiting import wait_for

until = partial(wait_for, pause=sleep)
SOURCE = "192.0.2.1"


class House:
    """Two workers, and the master's ends of their inboxes."""

    def __init__(self) -> None:
        self.inboxes = [pair() for _ in range(2)]
        self.taken: list[list[object]] = [[], []]
        self.sockets: list[socket.socket] = []
        self.workers = [self.worker(number) for number in range(2)]

    def worker(self, number: int) -> Neighbours:
        """As the master makes one; also in place of another one."""
        inbox, *ways = [
            os.dup(sock.fileno()) for sock in (self.inboxes[number][0], *(each[1] for each in self.inboxes))
        ]
        return Neighbours(number, inbox, ways, partial(self._take, number))

    def _take(self, number: int, passed: bytes, sock: socket.socket) -> None:
        self.sockets.append(sock)
        passed = msgspec.msgpack.decode(passed)
        if passed == "a mistake of ours":
            raise ValueError(passed)
        self.taken[number].append(passed)

    def to(self, number: int) -> Endpoint:
        """A receiver whose connections are held open there, for who asks the other worker."""
        other = self.workers[1 - number]
        for port in range(1, 100):
            endpoint = Endpoint("198.51.100.1", port)
            with _client() as sock:
                if other.pass_on(SOURCE, endpoint, "probe", sock.fileno()):
                    return endpoint
        raise AssertionError("none of a hundred")

    def close(self) -> None:
        for each in self.workers:
            each.close()
        for sock in (*self.sockets, *(end for ends in self.inboxes for end in ends)):
            with contextlib.suppress(OSError):
                sock.close()


@contextlib.contextmanager
def _client():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield theirs


@pytest.fixture
def house():
    house = House()
    yield house
    house.close()


def test_a_client_arrives_with_all_that_was_said_of_it(house):
    endpoint = house.to(1)
    house.workers[1].begin()
    ours, theirs = socket.socketpair()
    with ours:
        assert house.workers[0].pass_on(SOURCE, endpoint, {"all": "of it"}, theirs.fileno())
        theirs.close()
        until(lambda: {"all": "of it"} in house.taken[1], what="it is there")
        ours.sendall(b"?")
        assert house.sockets[-1].recv(1) == b"?"


def test_both_workers_mean_the_same_one(house):
    endpoints = [Endpoint("198.51.100.1", port) for port in range(1, 50)]
    with _client() as sock:
        stays = [
            {each for each in endpoints if not worker.pass_on(SOURCE, each, "x", sock.fileno())}
            for worker in house.workers
        ]
    assert all(stays)
    assert not stays[0] & stays[1]
    assert stays[0] | stays[1] == set(endpoints)


def test_what_stands_in_the_inbox_of_one_that_dies_is_the_next_ones(house):
    endpoint = house.to(0)
    with _client() as sock:
        assert house.workers[1].pass_on(SOURCE, endpoint, "waits", sock.fileno())
    house.workers[0].close()
    house.workers[0] = house.worker(0)
    house.workers[0].begin()
    until(lambda: house.taken[0] == ["probe", "waits"], what="the next one has them")


def test_where_an_inbox_is_full_the_client_stays(house):
    endpoint = house.to(0)
    with _client() as sock:
        passed = 0
        while house.workers[1].pass_on(SOURCE, endpoint, "x" * 1000, sock.fileno()):
            passed += 1
            assert passed < 100_000
    house.workers[0].begin()
    until(lambda: len(house.taken[0]) == passed + 1, what="all that were passed on are there")


def test_who_ends_passes_nobody_on_and_takes_who_is_there(house):
    endpoint = house.to(0)
    for each in house.workers:
        each.begin()
        each.stay()
    with _client() as sock:
        assert not house.workers[1].pass_on(SOURCE, endpoint, "x", sock.fileno())
    until(lambda: house.taken[0] == ["probe"], what="it is taken")


def test_a_mistake_with_one_client_costs_no_other(house, capsys):
    endpoint = house.to(0)
    with _client() as sock:
        for passed in ("a mistake of ours", "good"):
            assert house.workers[1].pass_on(SOURCE, endpoint, passed, sock.fileno())
    house.inboxes[0][1].send(b"no client, and no descriptor")
    house.workers[0].begin()
    until(lambda: "good" in house.taken[0], what="the other one is there")
