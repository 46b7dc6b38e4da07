"""What leaves, step by step: without a receiver, with a clock that a test moves."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from proxy.egress import leaving as room
from proxy.egress.leaving import Leaving
from proxy.net.tls import PlainStream
from tests.loopback.houses import places, throttle

T, U = throttle("t"), throttle("u")


class Socket:
    """What its peer says, in reads; then BlockingIOError, or for ever. `errors`: of its shutdowns, one after the
    other."""

    def __init__(self, *said, endless=False, errors=()):
        self.said = list(said)
        self.endless = endless
        self.errors = list(errors)
        self.reads = 0
        self.shutdowns = 0

    def fileno(self):
        return 7

    def shutdown(self, how):
        self.shutdowns += 1
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error

    def recv(self, size):
        self.reads += 1
        if self.endless:
            return b"x"
        if not self.said:
            raise BlockingIOError
        return self.said.pop(0)


def stream_of(*said, **more):
    return PlainStream(Socket(*said, **more))


class Stage:
    def __init__(self, monkeypatch, seconds=1.0):
        self.now = 100.0
        self.closed = []
        self.left = []
        self.starts = 0
        self.leaving = Leaving(
            SimpleNamespace(
                watch=lambda fd, callback: None, close=lambda sock, reset=False: self.closed.append((sock, reset))
            ),
            SimpleNamespace(leave=self.left.append),
            seconds,
        )
        self.leaving._timer = self.timer = SimpleNamespace(active=False, start=self._start, stop=self._stop)
        monkeypatch.setattr(room, "monotonic", lambda: self.now)

    def _start(self, callback):
        self.starts += 1
        self.timer.active = True

    def _stop(self):
        self.timer.active = False

    def close(self, stream, *throttles, reset=False):
        self.leaving.close(stream, places(*throttles), reset)


@pytest.fixture
def stage(monkeypatch):
    return Stage(monkeypatch)


def test_the_end_is_said_once(stage):
    """And after a reset there is nothing to be said."""
    stream = stream_of()
    stage.close(stream, T)
    assert (stream.socket.shutdowns, stage.closed, len(stage.leaving)) == (1, [], 1)
    stream = stream_of()
    stage.close(stream, T, reset=True)
    assert stream.socket.shutdowns == 0
    assert stage.closed == [(stream.socket, True)]


def test_who_cannot_be_told_is_not_waited_for(stage):
    stream = stream_of(errors=[OSError(errno.ENOTCONN, "")] * 2)
    stage.close(stream, T)
    assert (stage.closed, len(stage.left), stream.socket.reads) == ([(stream.socket, False)], 1, 0)


def test_who_goes_on_talking_is_read_so_often_and_no_more(stage):
    stream = stream_of(endless=True)
    stage.close(stream, T)
    assert (stream.socket.reads, stage.closed) == (room._MOST_READS, [(stream.socket, False)])
    assert stage.starts == 0, "nobody is left to wait for"
    stage.leaving._event(stream.socket, 1)  # one that came late
    assert (len(stage.left), stream.socket.reads) == (1, room._MOST_READS)


def test_nothing_is_remembered_of_who_has_left(stage):
    first, second = stream_of(b"221 bye\r\n"), stream_of()
    stage.close(first, T, U)
    stage.close(second, T)
    assert (stage.leaving.under(T), stage.leaving.under(U), stage.leaving.under(throttle("v"))) == (2, 1, 0)
    first.socket.said.append(b"")
    stage.leaving._event(first.socket, 1)
    assert (stage.leaving.under(T), dict(stage.leaving._under)) == (1, {T: 1})
    assert not stage.leaving._reads[first.socket]
    assert stage.leaving.hurry(9) == 1
    assert (dict(stage.leaving._under), len(stage.left)) == ({}, 2)
    assert first.socket not in stage.leaving._reads or not stage.leaving._reads[first.socket]


def test_one_clock_for_all_that_goes_on_while_there_is_one(stage):
    """Were it begun anew with each, it would come to nobody while connections keep on leaving."""
    streams = [stream_of(), stream_of()]
    stage.close(streams[0], T)
    stage.now += 0.25
    stage.close(streams[1], T)
    assert stage.starts == 1
    stage.now = 100.75
    stage.leaving._look_at_the_clock()
    assert (stage.closed, stage.timer.active) == ([], True)
    stage.now = 101.0
    stage.leaving._look_at_the_clock()
    assert (stage.closed, stage.timer.active) == ([(streams[0].socket, False)], True)
    stage.now = 105.0
    stage.leaving._look_at_the_clock()
    assert (len(stage.closed), stage.timer.active) == (2, False)
    stage.close(stream_of(), T)
    assert (stage.starts, stage.timer.active) == (2, True)


def test_half_a_second_is_a_time_too(monkeypatch):
    stage = Stage(monkeypatch, 0.5)
    stage.close(stream_of(), T)
    assert len(stage.leaving) == 1
