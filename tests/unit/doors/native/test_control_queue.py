"""A session's frames on their way out: order, frames that are half gone, and a kernel that takes what it likes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.doors.native.control_queue import Outgoing


class Kernel:
    """Takes as many bytes as it has room for."""

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.taken = b""
        self.calls = 0
        self.flushed = 0
        self.unsent = False

    def send(self, data: bytes) -> int:
        self.calls += 1
        if self.room == 0:
            raise BlockingIOError
        part = data[: self.room]
        self.room -= len(part)
        self.taken += part
        return len(part)

    def flush(self) -> None:
        self.flushed += 1


def test_frames_leave_in_order_and_the_stream_is_flushed() -> None:
    kernel = Kernel(100)
    outgoing = Outgoing(kernel)
    outgoing.add([b"one", b"two"])
    outgoing.add([b"three"])
    assert len(outgoing.frames) == 3
    outgoing.flush()
    assert (kernel.taken, len(outgoing.frames), kernel.flushed) == (b"onetwothree", 0, 0)
    kernel.unsent = True
    outgoing.flush()
    assert kernel.flushed == 1


def test_short_frames_go_in_one_call_and_a_long_one_by_itself() -> None:
    kernel = Kernel(10**6)
    outgoing = Outgoing(kernel)
    outgoing.add([b"x" * 100] * 16)
    outgoing.flush()
    assert (len(kernel.taken), kernel.calls) == (1600, 1)
    outgoing.add([b"y" * 60_000, b"z", b"z"])
    outgoing.flush()
    assert (len(kernel.taken), kernel.calls) == (61_602, 3)


def test_what_is_urgent_overtakes_all_but_a_frame_that_is_half_gone() -> None:
    kernel = Kernel(2)
    outgoing = Outgoing(kernel)
    outgoing.add([b"AAAA", b"BBBB"])
    outgoing.add_first([b"1"])
    outgoing.flush()
    outgoing.add_first([b"2", b"3"])
    assert (kernel.taken, len(outgoing.frames)) == (b"1A", 4)
    kernel.room = 100
    outgoing.flush()
    assert kernel.taken == b"1AAAA23BBBB"
    outgoing.add_first([b"4"])
    outgoing.flush()
    assert kernel.taken[-1:] == b"4"


def test_a_broken_connection_is_told() -> None:
    class Broken(Kernel):
        def send(self, data: bytes) -> int:
            raise ConnectionResetError

    outgoing = Outgoing(Broken())
    outgoing.add([b"x"])
    with pytest.raises(ConnectionResetError):
        outgoing.flush()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 12))))
def test_frames_stay_whole_whatever_the_kernel_takes(steps: list[tuple[bool, int, int]]) -> None:
    kernel = Kernel()
    outgoing = Outgoing(kernel)
    sizes = {}
    for number, (first, size, room) in enumerate(steps):
        sizes[number] = size
        (outgoing.add_first if first else outgoing.add)([bytes([number]) * size])
        kernel.room = room
        outgoing.flush()
    kernel.room = 10**6
    outgoing.flush()
    runs = [kernel.taken[0:0]]
    for at in range(len(kernel.taken)):
        byte = kernel.taken[at : at + 1]
        runs = [*runs[:-1], runs[-1] + byte] if runs[-1][-1:] in (b"", byte) else [*runs, byte]
    assert {run[0]: len(run) for run in runs if run} == sizes
    assert len(outgoing.frames) == 0


@pytest.mark.parametrize("room", [0, 3, 5, 100])
def test_a_frame_by_itself_is_sent_and_what_the_kernel_does_not_take_is_queued(room: int) -> None:
    kernel = Kernel(room)
    outgoing = Outgoing(kernel)
    outgoing.send([b"alone"])
    assert (kernel.taken, b"".join(outgoing.frames)) == (b"alone"[:room], b"alone"[room:])
    outgoing.add_first([b"1"])
    outgoing.send([b"two"])
    kernel.room = 100
    outgoing.flush()
    assert kernel.taken == {0: b"1alonetwo", 3: b"alone1two", 5: b"alone1two", 100: b"alone1two"}[room]
    assert not outgoing.frames


def test_a_frame_by_itself_does_not_overtake_what_the_stream_holds() -> None:
    kernel = Kernel(100)
    kernel.unsent = True
    outgoing = Outgoing(kernel)
    outgoing.send([b"alone"])
    assert (kernel.taken, kernel.flushed) == (b"alone", 1)
    assert not outgoing.frames
