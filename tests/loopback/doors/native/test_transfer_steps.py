"""A transfer step by step, between two streams that a test scripts: what is read when, what is held, what is told."""

from __future__ import annotations

import errno
import os
import select
import ssl
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from gevent import Timeout

from proxy.doors.native import transfer as channel_transfer
from proxy.doors.native.link import ClientGone, Link, Step
from proxy.doors.native.transfer import Transfer
from proxy.errors import PeerError, Throttled
from proxy.model import Discard, Ending
from proxy.net.relay import GONE, UNSURE, Shortcut
from proxy.net.turns import TurnOver
from proxy.policy.turns import FRAME, READ, WORK, Turn
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.protocols.smtp.tracker import Tracker

pytestmark = pytest.mark.only_python("streams, a gate and trackers that do what the test says")

try:
    from proxy.net import _fastframes
except ImportError:
    FORMS: list[Callable[[Any, Any], Shortcut] | None] = [None]
else:
    FORMS = [None, _fastframes.Shortcut]

IN = select.EPOLLIN  # an event that says nothing but that there is something
OUT, RDHUP = select.EPOLLOUT, select.EPOLLRDHUP


class Stream:
    """Reads what was put into `incoming`, bytes or what is raised; takes so much as there is `room` for."""

    def __init__(self) -> None:
        self.incoming: deque[bytes | Exception] = deque()
        self.room = 10**9
        self.error: OSError | None = None
        self.sent: list[bytes] = []
        self.unsent = False
        self.drained = True
        self.finished = 0
        self.turn = Turn()
        self.socket = SimpleNamespace(fileno=lambda: -1)

    def recv(self, size: int) -> bytes:
        if not self.incoming:
            raise BlockingIOError
        what = self.incoming.popleft()
        if isinstance(what, Exception):
            raise what
        return what

    def send(self, data: bytes) -> int:
        if self.error is not None:
            raise self.error
        count = min(self.room, len(data))
        if not count:
            raise BlockingIOError
        self.room -= count
        self.sent.append(bytes(data[:count]))
        return count

    def finish(self) -> None:
        if self.error is not None:
            raise self.error
        self.finished += 1

    def flush(self) -> None:
        self.unsent = False


class Steps:
    """A transfer whose greenlet is the test's; it never waits.

    Args:
        alarms: for a client that takes probes.
        form: the compiled form of what is done in the hub, if there is one.
    """

    def __init__(
        self,
        tracker: Tracker | None = None,
        reused: bool = False,
        probes: bool = False,
        alarms: Any = None,
        form: Callable[[Any, Any], Shortcut] | None = None,
    ) -> None:
        self.client, self.receiver = Stream(), Stream()
        decoder = frames.FrameDecoder(frames.MAX_PAYLOAD)
        guest: Any = SimpleNamespace(stream=self.client, handshake=SimpleNamespace(decoder=decoder))
        self.engine: Any = SimpleNamespace(wait=lambda fd: None, alarms=alarms, shortcut=form or (lambda *_: None))
        self.link = Link(self.engine, guest)
        self.transfer = Transfer(
            self.link,
            SimpleNamespace(stream=self.receiver),  # type: ignore[arg-type]
            tracker,
            reused,
            probes=probes,
        )

    def says(self, *what: bytes | m.Message) -> None:
        """One read of the client's, and an event: DATA or messages."""
        self.link.readable = True
        self.client.incoming.append(
            b"".join(frames.encode_data(each) if isinstance(each, bytes) else frames.encode(each) for each in what)
        )

    @property
    def heard(self) -> list[bytes | m.Message]:
        """What the client was sent, so far as it took it."""
        decoder = frames.FrameDecoder(frames.MAX_PAYLOAD)
        decoder.receive(b"".join(self.client.sent))
        heard: list[bytes | m.Message] = []
        while (frame := decoder.next_frame()) is not None:
            is_data = frame[0] == frames.DATA
            heard.append(bytes(frame[1]) if is_data else frames.decode(frame, frames.CHANNEL_FROM_PROXY))
        return heard

    @property
    def got(self) -> bytes:
        """What the receiver took."""
        return b"".join(self.receiver.sent)

    def client_event(self, events: int) -> bool:
        """Whether the greenlet has to look around after an event of the client."""
        return self._event("client_event", events)

    def receiver_event(self, events: int) -> bool:
        return self._event("receiver_event", events)

    def _event(self, name: str, events: int) -> bool:
        answers: list[bool] = []
        shortcut = self.engine.shortcut(self.transfer, self.link)

        def step_of(step: Step) -> Callable[[int], None]:
            return lambda events: answers.append(step(events))

        steps = [step_of(self.transfer._client_event), step_of(self.transfer._receiver_event)]
        if shortcut is None:
            steps[name == "receiver_event"](events)
        else:
            shortcut.begin(*steps)
            getattr(shortcut, name)(events)
            shortcut.end()
        return any(answers)

    def block(self, data: bytes = b"held") -> None:
        """The receiver takes no more: these bytes are held back."""
        self.receiver.room = 0
        self.says(data)
        self.transfer._from_client()
        assert self.transfer.blocked


END, EOF = m.End(False, 0), m.Eof()


@pytest.fixture(params=FORMS)
def steps(request: pytest.FixtureRequest) -> Steps:
    return Steps(form=request.param)


@pytest.fixture
def waits(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What was unread, of the client and of the receiver, whenever the transfer waited; then the client says END."""
    noted: list[tuple[int, int]] = []

    def wait(*arguments: object) -> None:
        if arguments[-1] is True:  # it looks, and leaves all that it finds to the greenlet
            return
        noted.append((len(steps.client.incoming), len(steps.receiver.incoming)))
        steps.receiver.room = 10**9
        steps.says(END)
        steps.link.readable = True

    monkeypatch.setattr(steps.link, "wait", wait)
    monkeypatch.setattr(channel_transfer, "has_gone", lambda sock: False)
    return noted


# --- when it waits ---


@pytest.mark.parametrize(("reads", "of_client"), [(9, True), (9, False), (1, True), (1, False)])
def test_nobody_waits_while_one_side_has_something(
    steps: Steps, waits: list[tuple[int, int]], reads: int, of_client: bool
) -> None:
    """Also when it took more than one go, and the other side says nothing: no edge would tell of the rest."""
    for _ in range(reads):
        if of_client:
            steps.says(b"x")
        else:
            steps.receiver.incoming.append(b"x")
    steps.client.drained = steps.receiver.drained = False
    steps.transfer.carry()
    assert waits == [(0, 0)]
    assert (steps.transfer.up, steps.transfer.down) == ((reads, 0) if of_client else (0, reads))


def test_at_end_nothing_is_said_any_more(steps: Steps, waits: list[tuple[int, int]]) -> None:
    steps.link.doom, steps.link.goes_at = Ending.IDLE_TIMEOUT, 0.0
    steps.says(END)
    steps.transfer.carry()
    assert (waits, steps.heard, steps.transfer.end) == ([], [], END)


def test_a_goodbye_is_said_before_it_waits(steps: Steps, waits: list[tuple[int, int]]) -> None:
    steps.link.goes_at, steps.link.goes_why, steps.link.goes_code = 0.0, "restart", "draining"
    steps.transfer.carry()
    assert steps.heard == [m.Goaway(0, "restart", "draining")]
    assert waits == [(0, 0)]


def test_who_is_to_be_cut_off_does_not_wait(steps: Steps, waits: list[tuple[int, int]]) -> None:
    steps.link.doom = Ending.IDLE_TIMEOUT
    with pytest.raises(ClientGone):
        steps.transfer.carry()
    assert waits == []


def test_whose_turn_is_over_rests_and_looks_again(
    steps: Steps, waits: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rests = []

    def rest() -> None:
        rests.append(1)
        steps.link.turn.begin(0.0)
        steps.link.turn._ends = float("inf")
        steps.receiver.incoming.append(b"came meanwhile")

    monkeypatch.setattr(steps.link, "rest", rest)
    steps.transfer._from_receiver()  # nothing is there
    steps.link.turn.end()
    steps.transfer.carry()
    assert (rests, waits) == ([1], [(0, 0)])
    assert steps.heard == [b"came meanwhile"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_client_that_has_gone_is_no_reason_to_stop_while_nothing_is_held(
    steps: Steps, waits: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    monkeypatch.setattr(channel_transfer, "has_gone", lambda sock: gone)
    steps.transfer.carry()
    assert waits == [(0, 0)]


@pytest.mark.parametrize(("gone", "waited"), [(False, 1), (True, 0)])
def test_what_is_held_back_is_pushed_on_when_the_client_has_gone(
    steps: Steps, waits: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, gone: bool, waited: int
) -> None:
    """There may be an END behind it."""
    monkeypatch.setattr(channel_transfer, "has_gone", lambda sock: gone)
    steps.block()
    steps.says(END)
    steps.link.readable = False  # an event went by

    def takes_again(fd: int) -> None:
        steps.receiver.room = 100
        steps.receiver.incoming.append(b"and an answer")

    steps.link.engine.wait = takes_again  # type: ignore[method-assign]
    steps.transfer.carry()
    assert (len(waits), steps.got, steps.transfer.end) == (waited, b"held", END)
    assert steps.heard == [b"and an answer"] * gone


def test_a_receiver_that_takes_nothing_ends_a_client_that_has_gone(
    steps: Steps, waits: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_transfer, "has_gone", lambda sock: True)
    monkeypatch.setattr(steps.transfer, "flush", lambda: False)
    steps.block()
    with pytest.raises(ClientGone):
        steps.transfer.carry()
    assert waits == []


# --- the last push ---


@pytest.mark.parametrize(("refusals", "pushed"), [(0, True), (2, True), (None, False)])
def test_a_last_push_waits_for_the_receiver_but_not_for_ever(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, refusals: int | None, pushed: bool
) -> None:
    timers: list[Timeout] = []

    class Noted(Timeout):  # type: ignore[misc]
        @classmethod
        def start_new(cls, seconds: float) -> Timeout:
            timers.append(Timeout.start_new.__func__(cls, seconds))
            return timers[-1]

    monkeypatch.setattr(channel_transfer, "Timeout", Noted)
    steps.block()
    if refusals == 0:
        steps.receiver.room = 9
    steps.link.readable = False
    count = 0

    def wait(fd: int) -> None:
        nonlocal count
        count += 1
        if refusals is None:
            raise timers[0]
        steps.receiver.room = 9 if count == refusals else 0

    steps.link.engine.wait = wait  # type: ignore[method-assign]
    assert steps.transfer.flush() is pushed
    assert count == (1 if refusals is None else refusals)
    assert steps.link.readable is (refusals != 0)  # events went by
    assert not any(timer.pending for timer in timers)
    steps.transfer.broken = Ending.UPSTREAM_RESET
    assert not steps.transfer.flush()


def test_a_deadline_of_somebody_else_is_not_the_pushs(steps: Steps) -> None:
    steps.block()
    other = Timeout(1000)

    def wait(fd: int) -> None:
        raise other

    steps.link.engine.wait = wait  # type: ignore[method-assign]
    with pytest.raises(Timeout) as raised:
        steps.transfer.flush()
    assert raised.value is other


def test_a_connection_that_breaks_in_the_last_push_has_not_taken_it(steps: Steps) -> None:
    steps.block()

    def breaks(fd: int) -> None:
        steps.receiver.error = ConnectionResetError(errno.ECONNRESET, "")

    steps.link.engine.wait = breaks  # type: ignore[method-assign]
    assert not steps.transfer.flush()


# --- events in the hub ---


def test_what_one_side_says_and_the_other_takes_needs_no_greenlet(steps: Steps) -> None:
    steps.says(b"hello")
    steps.receiver.incoming.append(b"250 ok\r\n")
    assert not steps.client_event(IN)
    assert not steps.receiver_event(IN)
    assert (steps.got, steps.heard) == (b"hello", [b"250 ok\r\n"])
    assert (steps.transfer.up, steps.transfer.down) == (5, 8)
    framing = len(frames.encode_data(b"x")) - 1
    assert steps.transfer.moved == (framing + 5) + 5 + 8 + (framing + 8)  # in and out on either side


@pytest.mark.parametrize("why", ["gone", "client blocked", "receiver blocked"])
def test_an_event_of_the_client_that_is_the_greenlets_reads_nothing(steps: Steps, why: str) -> None:
    if why == "receiver blocked":
        steps.block()
    steps.link.blocked = why == "client blocked"
    steps.says(b"more")
    assert steps.client_event(GONE if why == "gone" else IN)
    assert len(steps.client.incoming) == 1


@pytest.mark.parametrize("why", ["more to read", "frames left", "end", "receiver broke", "receiver is full"])
def test_after_an_event_of_the_client_the_greenlet_looks_for(steps: Steps, why: str) -> None:
    steps.transfer._from_client()  # nothing is there, and no event went by
    if why == "more to read":
        steps.client.drained = False
        for _ in range(2 * channel_transfer._READS_A_SIDE + 1):
            steps.says(b"x")
    elif why == "frames left":
        steps.says(*[b"x"] * WORK)
    elif why == "end":
        steps.says(END)
    else:
        steps.says(b"x")
        steps.receiver.error = ConnectionResetError() if why == "receiver broke" else None
        steps.receiver.room = 0
    assert steps.client_event(IN)
    if why == "frames left":
        assert 0 < len(steps.got) < WORK
    elif why == "more to read":
        assert 0 < len(steps.got) <= 2 * channel_transfer._READS_A_SIDE
    else:
        assert steps.got == b""


@pytest.mark.parametrize("events", [IN | UNSURE, IN | RDHUP])
def test_a_receiver_that_may_have_ended_is_read_up_to_the_end(steps: Steps, events: int) -> None:
    steps.transfer._from_receiver()
    assert not steps.transfer._readable
    steps.receiver.incoming.extend([b"x", b"y"])
    assert not steps.receiver_event(events)
    assert b"".join(each for each in steps.heard if isinstance(each, bytes)) == b"xy"
    assert not steps.transfer.receiver_done, "it was a hint, and nothing more"
    assert (steps.transfer._readable, steps.transfer._missed) == (False, False)


def test_the_last_words_of_a_receiver_and_its_end_are_one_piece(steps: Steps) -> None:
    steps.transfer._from_receiver()
    steps.receiver.incoming.extend([b"221 bye\r\n", b""])
    assert not steps.receiver_event(IN | RDHUP), "no greenlet is needed for that"
    assert (steps.heard, len(steps.client.sent)) == ([b"221 bye\r\n", m.Eof()], 1)
    assert (steps.transfer.receiver_done, steps.transfer.half_closed) == (True, True)
    assert not steps.receiver_event(IN | RDHUP)
    steps.says(b"after it")
    assert not steps.client_event(IN)
    assert steps.got == b"after it"
    assert len(steps.client.sent) == 1


def test_an_end_alone_is_told(steps: Steps) -> None:
    steps.transfer._from_receiver()
    steps.receiver.incoming.append(b"")
    assert not steps.receiver_event(IN | RDHUP)
    assert steps.heard == [m.Eof()]


def test_room_alone_is_no_reason_to_read(steps: Steps) -> None:
    steps.transfer._from_receiver()
    steps.transfer._from_client()
    assert (steps.transfer._readable, steps.link.readable) == (False, False)
    steps.receiver.incoming.append(b"comes with an event of its own")
    steps.client.incoming.append(frames.encode_data(b"so does this"))
    assert not steps.receiver_event(OUT)
    assert not steps.client_event(OUT)
    assert (len(steps.receiver.incoming), len(steps.client.incoming)) == (1, 1)


@pytest.mark.parametrize("side", ["client", "receiver"])
def test_an_event_of_the_receiver_reads_nothing_while_something_is_held(steps: Steps, side: str) -> None:
    if side == "receiver":
        steps.block()
    steps.link.blocked = side == "client"
    steps.client.room = 0 if side == "client" else 10**9
    steps.receiver.incoming.append(b"x")
    assert steps.receiver_event(IN)
    assert len(steps.receiver.incoming) == 1


@pytest.mark.parametrize("why", ["more to read", "reset", "client is full", "tls speaks", "refusing"])
def test_after_an_event_of_the_receiver_the_greenlet_looks_for(steps: Steps, why: str) -> None:
    steps.transfer._from_receiver()
    reads = 2 * channel_transfer._READS_A_SIDE + 1 if why == "more to read" else 1
    steps.receiver.incoming.extend([ConnectionResetError() if why == "reset" else b"x"] * reads)
    steps.receiver.drained = why != "more to read"
    steps.receiver.unsent = why == "tls speaks"
    steps.transfer._refusing, steps.transfer._kept = (True, MAIL) if why == "refusing" else (False, b"")
    steps.client.room = 0 if why == "client is full" else 10**9
    assert steps.receiver_event(IN)
    assert bool(steps.receiver.incoming) == (why == "more to read")


# --- from the client ---


def test_frames_are_sent_on_in_one_and_said_to_have_come(steps: Steps) -> None:
    steps.says(b"a", b"b", b"c")
    assert steps.transfer._from_client()
    assert steps.receiver.sent == [b"abc"]
    assert not steps.transfer._from_client()
    steps.link.decoder.receive(frames.encode_data(b"d"))  # read already
    assert steps.transfer._from_client()
    assert steps.got == b"abcd"


@pytest.mark.parametrize("why", ["end", "full", "turn"])
def test_nothing_more_is_read_behind(steps: Steps, why: str) -> None:
    steps.client.drained = False
    steps.says(END if why == "end" else b"x")
    steps.says(b"more")
    if why == "full":
        steps.receiver.room = 0
    if why == "turn":
        steps.link.turn.left = READ + 3 * FRAME
    assert steps.transfer._from_client()
    assert len(steps.client.incoming) == 1
    assert steps.transfer.end == (END if why == "end" else None)


def test_what_is_held_goes_first_and_nothing_is_read_until_it_has_gone(steps: Steps) -> None:
    steps.block(b"abc")
    steps.receiver.room = 1
    steps.says(b"d")
    assert not steps.transfer._from_client()
    assert (steps.got, len(steps.client.incoming)) == (b"a", 1)
    steps.receiver.room = 9
    assert steps.transfer._from_client()
    assert (steps.got, steps.transfer.blocked, steps.transfer.up) == (b"abcd", False, 4)


@pytest.mark.parametrize("last", [END, EOF])
def test_what_is_said_behind_bytes_that_are_held_is_done_behind_them(steps: Steps, last: m.Message) -> None:
    steps.receiver.room = 1
    steps.says(b"abc", last)
    assert steps.transfer._from_client()
    assert (steps.transfer.end, steps.receiver.finished) == (None, 0)
    steps.receiver.room = 9
    assert steps.transfer._from_client(), "it has come, though nothing was read"
    assert steps.got == b"abc"
    assert (steps.transfer.end, steps.receiver.finished) == ((END, 0) if last == END else (None, 1))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ((EOF, b"x"), "DATA after EOF"),
        ((EOF, EOF), "EOF twice"),
        ((b"abc", EOF, EOF), "EOF twice"),
        ((b"abc", EOF, b"x"), "DATA after EOF"),
        ((m.Open(None, [["192.0.2.2", 25]]),), "OPEN in the middle"),
    ],
)
@pytest.mark.parametrize("room", [10**9, 0])
def test_what_no_client_may_say(steps: Steps, said: tuple[bytes | m.Message, ...], why: str, room: int) -> None:
    """In one read or in several, whether the receiver takes it or not."""
    steps.receiver.room = room

    def serve() -> None:
        for each in said:
            steps.says(each)
            steps.transfer._from_client()
        steps.receiver.room = 10**9
        steps.transfer._from_client()

    with pytest.raises(PeerError, match=why):
        serve()


def test_an_end_that_finds_the_socket_full_is_held_back(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def finish() -> None:
        steps.receiver.unsent = True

    monkeypatch.setattr(steps.receiver, "finish", finish)
    steps.says(EOF)
    steps.transfer._from_client()
    assert (steps.transfer.blocked, steps.transfer.half_closed) == (True, True)
    assert not steps.transfer._from_client()
    assert not steps.transfer.blocked


def test_an_end_that_cannot_be_said_is_a_receiver_that_broke(steps: Steps) -> None:
    steps.receiver.error = ConnectionResetError(errno.ECONNRESET, "")
    steps.says(EOF)
    steps.transfer._from_client()
    assert steps.transfer.broken is Ending.UPSTREAM_RESET


@pytest.mark.parametrize("how", ["write", "read"])
def test_to_a_receiver_that_broke_nothing_is_sent(steps: Steps, how: str) -> None:
    """The client goes on for a while, until it has heard of it."""
    broke = ConnectionResetError(errno.ECONNRESET, "")
    if how == "write":
        steps.receiver.error = broke
        steps.says(b"abc")
        steps.transfer._from_client()
        assert (steps.transfer.blocked, steps.transfer._held) == (False, b"")
        steps.receiver.error = None
    else:
        steps.receiver.incoming.append(broke)
        steps.transfer._from_receiver()
    up = steps.transfer.up
    steps.says(b"more", EOF)
    assert steps.transfer._from_client()
    assert (steps.got, steps.receiver.finished, steps.transfer.up) == (b"", 0, up)
    steps.transfer._held = b"late"
    assert steps.transfer._push()
    assert steps.got == b""


# --- from the receiver ---


class LongTls(ssl.SSLError):
    reason = "x" * 300


ABORTED = m.Aborted("upstream_failed", errno.EPIPE, os.strerror(errno.EPIPE))


@pytest.mark.parametrize(
    ("unread", "heard"),
    [
        ([], [ABORTED]),
        ([b"421 bye\r\n"], [b"421 bye\r\n", ABORTED]),
        ([b"421 bye\r\n", b""], [b"421 bye\r\n", ABORTED]),
    ],
)
def test_a_write_error_is_told_behind_all_that_the_receiver_said(
    steps: Steps, unread: list[bytes], heard: list[object]
) -> None:
    """It may say why; also where no event tells that there is something, or that there is nothing more."""
    steps.transfer._from_receiver()
    steps.receiver.incoming.extend(unread)
    steps.receiver.error = BrokenPipeError(errno.EPIPE, "")
    steps.says(b"x")
    steps.transfer._from_client()
    assert steps.transfer.broken is Ending.UPSTREAM_RESET
    assert steps.transfer._from_receiver()
    assert steps.heard == heard
    assert steps.transfer.receiver_done
    assert not steps.transfer._from_receiver()


def test_a_write_error_behind_its_end_is_nothing_new(steps: Steps) -> None:
    steps.receiver.incoming.append(b"")
    assert steps.transfer._from_receiver()
    steps.receiver.error = BrokenPipeError(errno.EPIPE, "")
    steps.says(b"x")
    steps.transfer._from_client()
    assert (steps.transfer.broken, steps.heard) == (None, [EOF])
    steps.receiver.error = None
    steps.says(b"y", EOF)
    steps.transfer._from_client()
    steps.transfer._held = b"late"
    assert steps.transfer._push()
    assert (steps.got, steps.receiver.finished) == (b"", 0)


@pytest.mark.parametrize(
    ("error", "number", "text"),
    [
        (ConnectionResetError(errno.ECONNRESET, ""), errno.ECONNRESET, os.strerror(errno.ECONNRESET)),
        (OSError(), 0, os.strerror(0)),
        (LongTls(1, ""), 0, "TLS: " + "x" * 195),
    ],
)
def test_how_a_broken_connection_is_told(steps: Steps, error: OSError, number: int, text: str) -> None:
    steps.receiver.incoming.append(error)
    assert steps.transfer._from_receiver()
    assert steps.heard == [m.Aborted("upstream_failed", number, text)]
    assert (steps.transfer.broken, steps.transfer.receiver_done) == (Ending.UPSTREAM_RESET, True)


def test_nothing_is_read_while_the_client_takes_nothing(steps: Steps) -> None:
    steps.receiver.incoming.extend([b"a", b"b"])
    steps.client.room = 3
    assert steps.transfer._from_receiver()
    assert (len(steps.receiver.incoming), steps.link.blocked) == (1, True)
    assert not steps.transfer._from_receiver()
    assert len(steps.receiver.incoming) == 1
    steps.client.room = 100
    assert steps.transfer._from_receiver()
    assert (steps.heard, steps.transfer.down) == ([b"a", b"b"], 2)
    assert steps.link.moved == 2 + len(b"".join(steps.client.sent))


def test_reading_stops_when_the_turn_is_over(steps: Steps) -> None:
    steps.receiver.incoming.extend([b"a", b"b"])
    steps.receiver.drained = False
    steps.link.turn.left = READ + 1
    assert steps.transfer._from_receiver()
    assert (steps.heard, steps.link.turn.over) == ([b"a"], True)
    assert not steps.transfer._from_receiver()
    assert len(steps.receiver.incoming) == 1


def test_a_read_that_takes_too_long_ends_the_turn(steps: Steps) -> None:
    steps.receiver.incoming.extend([b"a", TurnOver(), b"b"])
    steps.receiver.drained = False
    assert steps.transfer._from_receiver()
    assert (steps.heard, steps.link.turn.over, len(steps.receiver.incoming)) == ([b"a"], True, 1)


def test_a_read_of_the_receiver_unblocks_nothing_and_is_told_to_the_tracker() -> None:
    said: list[bytes] = []
    tracker: Any = SimpleNamespace(
        server_bytes=said.append, client_bytes=lambda data: b"", mails_allowed=None, lost=False
    )
    steps = Steps(tracker)
    steps.block()
    steps.receiver.incoming.append(b"250 ok\r\n")
    steps.transfer._from_receiver()
    assert (steps.transfer.blocked, said) == (True, [b"250 ok\r\n"])


def test_a_client_that_takes_nothing_is_read_all_the_same(steps: Steps) -> None:
    steps.client.room = 0
    steps.receiver.incoming.append(b"x")
    steps.transfer._from_receiver()
    assert steps.link.blocked
    steps.says(b"QUIT\r\n")
    steps.transfer._from_client()
    assert steps.got == b"QUIT\r\n"


@pytest.mark.parametrize(
    ("missed", "drained", "again"), [(True, True, True), (False, True, False), (False, False, True)]
)
def test_whether_there_is_more_to_be_read(steps: Steps, missed: bool, drained: bool, again: bool) -> None:
    """A read that brought less than it might have proves it, unless events went by."""
    steps.transfer._missed = missed
    steps.receiver.drained = drained
    steps.receiver.incoming.append(b"a")
    steps.client.room = 0  # and no second read
    steps.transfer._from_receiver()
    assert steps.transfer._readable is again


def test_who_speaks_unasked_on_a_connection_that_was_anothers_is_lost(steps: Steps) -> None:
    for up, heard in ((0, m.Aborted("upstream_failed", errno.EPROTO, os.strerror(errno.EPROTO))), (1, b"x")):
        steps = Steps(reused=True)
        steps.transfer.up = up
        steps.receiver.incoming.append(b"x")
        assert steps.transfer._from_receiver()
        assert steps.heard == [heard]
    steps = Steps()
    steps.receiver.incoming.append(b"220 hello\r\n")
    steps.transfer._from_receiver()
    assert steps.heard == [b"220 hello\r\n"]


# --- what is left behind ---


def test_why_a_connection_cannot_serve_another_client() -> None:
    assert Steps().transfer.unclean() is Discard.NOT_OFFERED
    for field, value, reason in (
        ("receiver_done", True, Discard.PEER_CLOSED),
        ("broken", Ending.UPSTREAM_RESET, Discard.PEER_CLOSED),
        ("_blocked", True, Discard.OUTSTANDING),
        ("_finished", True, Discard.OUTSTANDING),
        ("_kept", b"x", Discard.OUTSTANDING),
        ("_turned_away", SimpleNamespace(in_line=True), Discard.OUTSTANDING),
        ("_turned_away", SimpleNamespace(in_line=False), "the tracker's"),
        ("up", 0, "the tracker's"),
    ):
        tracker: Any = SimpleNamespace(verdict=lambda: "the tracker's", at_rest=True)
        transfer = Steps(tracker).transfer
        setattr(transfer, field, value)
        assert transfer.unclean() == reason
        assert transfer.waits_for_command is (field in ("_kept", "_turned_away", "up"))
        assert transfer.half_closed is (field in ("_finished", "receiver_done"))
    assert not Steps().transfer.waits_for_command
    busy: Any = SimpleNamespace(at_rest=False)
    assert not Steps(busy).transfer.waits_for_command


def test_what_is_unread_and_not_known_of_is_not_asked_for(steps: Steps) -> None:
    """Each read costs a system call."""
    steps.transfer._from_client()
    steps.transfer._from_receiver()
    steps.says(b"x")
    steps.link.readable = False
    steps.receiver.incoming.append(b"x")
    assert not steps.transfer._from_client()
    assert not steps.transfer._from_receiver()
    assert (len(steps.client.incoming), len(steps.receiver.incoming)) == (1, 1)


def test_what_stands_behind_end_is_not_this_sessions(steps: Steps) -> None:
    another = m.Open(None, [m.Address("192.0.2.2", 25)])
    steps.says(END, another)
    steps.transfer._from_client()
    frame = steps.link.decoder.next_frame()
    assert frame is not None
    assert frames.decode(frame, frames.CHANNEL_FROM_CLIENT) == another


def test_frames_that_came_before_are_frames_that_came(steps: Steps) -> None:
    steps.receiver.room = 0
    steps.link.decoder.receive(frames.encode_data(b"x") + frames.encode(END))
    assert steps.transfer._from_client()
    assert steps.transfer.blocked


def test_an_end_behind_bytes_that_nobody_takes_any_more_is_seen_at_once(steps: Steps) -> None:
    steps.transfer.aborted(ConnectionResetError())
    steps.says(b"more", END)
    steps.transfer._from_client()
    assert steps.transfer.end == END


def test_a_last_push_that_goes_at_once_looks_again_as_well(steps: Steps) -> None:
    steps.block()
    steps.receiver.room = 9
    steps.link.readable = steps.transfer._readable = False
    steps.transfer._push_on()
    assert (steps.link.readable, steps.transfer._readable, steps.transfer._missed) == (True, True, True)


def test_what_is_held_for_a_receiver_that_broke_blocks_nobody(steps: Steps) -> None:
    steps.block()
    steps.receiver.incoming.append(ConnectionResetError())
    steps.transfer._from_receiver()
    assert steps.transfer._push()
    assert not steps.transfer.blocked


def test_records_that_tls_still_has_to_send_block(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.receiver, "flush", lambda: None)
    steps.receiver.unsent = True
    steps.says(b"x")
    steps.transfer._from_client()
    assert steps.transfer.blocked
    assert not steps.transfer._push()


# --- behind a MAIL that has to wait ---

MAIL = b"MAIL FROM:<a@example.com>\r\n"


class Gate:
    """Lets pass what a test says."""

    def __init__(self) -> None:
        self.closed = False
        self.refusal: Throttled | None = None
        self.asked: list[str] = []
        self.holds = True

    def mail(self) -> bool:
        self.asked.append("mail")
        self.closed = self.holds
        return not self.holds

    def unseen(self) -> bool:
        self.asked.append("unseen")
        self.closed = self.holds
        return not self.holds


class Gated(Steps):
    """One with a gate; its dialogue begins behind EHLO."""

    def __init__(self, tracker: Any = None, probes: bool = False, alarms: Any = None) -> None:
        self.gate: Any = Gate()
        self.tracker = tracker or Tracker()
        super().__init__(self.tracker, alarms=alarms)
        self.transfer = Transfer(self.link, self.transfer.receiver, self.tracker, gate=self.gate, probes=probes)

    def hold(self, *more: bytes | m.Message) -> None:
        """A MAIL waits, and so does what stands behind it."""
        self.says(MAIL, *more)
        self.transfer._from_client()
        assert self.gate.asked == ["mail"]
        assert self.got == b""


@pytest.fixture
def gated() -> Gated:
    return Gated()


def test_each_mail_is_asked_for_once(gated: Gated) -> None:
    gated.gate.holds = False
    for count in (1, 2, 3):
        gated.says(MAIL + b"RSET\r\n")
        gated.transfer._from_client()
        assert gated.gate.asked == ["mail"] * count
        assert gated.tracker.mails_allowed == count
    assert gated.got == (MAIL + b"RSET\r\n") * 3


def test_what_stands_behind_goes_on_in_order_when_its_slot_has_come(gated: Gated) -> None:
    gated.hold(b"RCPT TO:<b@example.net>\r\n")
    gated.says(b"DATA\r\n", EOF)
    gated.transfer._from_client()
    assert (gated.got, gated.receiver.finished, gated.transfer.half_closed) == (b"", 0, False)
    assert not gated.transfer._from_client()
    gated.gate.closed = False
    assert gated.transfer._from_client()
    assert gated.got == MAIL + b"RCPT TO:<b@example.net>\r\nDATA\r\n"
    assert (gated.receiver.finished, gated.tracker.mails_allowed) == (1, 1)


def test_an_end_ends_the_waiting(gated: Gated) -> None:
    gated.hold(EOF)
    gated.says(END)
    gated.transfer._from_client()
    assert gated.transfer.end == END
    assert gated.transfer.unclean() is Discard.OUTSTANDING


def test_an_end_behind_bytes_that_wait_is_seen_at_once(gated: Gated) -> None:
    gated.hold()
    gated.says(b"RCPT TO:<b@example.net>\r\n", END)
    gated.transfer._from_client()
    assert gated.transfer.end == END


def test_a_slot_that_comes_waits_for_no_reply(gated: Gated) -> None:
    gated.says(b"NOOP\r\n" + MAIL)
    gated.transfer._from_client()
    assert (gated.got, gated.tracker.owes) == (b"NOOP\r\n", True)
    gated.gate.closed = False
    gated.transfer._from_client()
    assert gated.got == b"NOOP\r\n" + MAIL


@pytest.mark.parametrize(("said", "why"), [(b"x", "DATA after EOF"), (EOF, "EOF twice")])
def test_behind_an_eof_that_waits_nothing_may_come(gated: Gated, said: bytes | m.Message, why: str) -> None:
    gated.hold(EOF)
    gated.says(said)
    with pytest.raises(PeerError, match=why):
        gated.transfer._from_client()


def test_a_client_that_has_gone_does_not_wait_for_its_slot(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_transfer, "has_gone", lambda sock: True)
    gated.hold()
    with pytest.raises(ClientGone):
        gated.transfer.carry()


def test_what_waits_does_not_overtake_what_is_held_back(gated: Gated) -> None:
    gated.hold()
    gated.receiver.room = 0
    gated.transfer._held, gated.transfer._blocked = b"NOOP\r\n", True
    gated.gate.closed = False
    assert not gated.transfer._from_client()
    gated.receiver.room = 8
    gated.link.decoder.receive(frames.encode_data(b"RCPT TO:<b@example.net>\r\n"))
    assert gated.transfer._from_client()
    assert (gated.got, gated.transfer.blocked) == (b"NOOP\r\nMA", True)
    assert gated.link.decoder.unread, "nor what stands behind it"
    gated.receiver.room = 1000
    assert gated.transfer._from_client()
    assert gated.got == b"NOOP\r\n" + MAIL + b"RCPT TO:<b@example.net>\r\n"


@pytest.mark.parametrize(("more", "full"), [(-1, False), (0, True)])
def test_behind_a_mail_that_waits_a_read_is_kept_and_no_more(gated: Gated, more: int, full: bool) -> None:
    gated.hold(b"x" * (channel_transfer._READ_SIZE - len(MAIL) + more))
    gated.says(b"y")
    assert gated.transfer._from_client() is not full
    assert len(gated.client.incoming) == full
    gated.link.decoder.receive(frames.encode_data(b"z"))
    assert gated.transfer._from_client() is False
    gated.link.decoder.receive(b"")


THROTTLED = Throttled("throttle t: try again in 5 s", "t", 5.0)


def refused(gated: Gated) -> None:
    """The slot of the MAIL that waits will not come."""
    gated.gate.closed, gated.gate.refusal = False, THROTTLED
    assert gated.transfer._from_client()
    assert gated.gate.refusal is None
    assert gated.transfer.refused == 1


def test_a_refusal_is_told_in_the_receivers_place_and_counted(gated: Gated) -> None:
    gated.hold(b"RCPT TO:<b@example.net>\r\n")
    refused(gated)
    said = b"".join(each for each in gated.heard if isinstance(each, bytes))
    assert [line[:3] for line in said.splitlines()] == [b"451", b"503"]
    moved = gated.link.moved
    gated.client.sent.clear()
    gated.says(b"NOOP\r\n")
    gated.transfer._from_client()
    (noop,) = gated.heard
    framing = len(frames.encode_data(b"x")) - 1
    assert gated.link.moved - moved == (framing + 6) + len(noop) + (framing + len(noop))
    assert gated.got == b""
    gated.gate.holds = False
    gated.says(MAIL)
    gated.transfer._from_client()
    assert gated.got == MAIL, "the next message is the receiver's again"
    gated.says(b"RCPT TO:<b@example.net>\r\n")
    gated.transfer._from_client()
    assert gated.got == MAIL + b"RCPT TO:<b@example.net>\r\n"


def test_nothing_is_read_while_replies_of_ours_wait(gated: Gated) -> None:
    gated.hold()
    gated.client.room = 1
    refused(gated)
    gated.says(b"NOOP\r\n")
    assert not gated.transfer._from_client()
    assert len(gated.client.incoming) == 1


def test_what_can_be_read_in_two_ways_is_answered_by_nobody(gated: Gated) -> None:
    gated.hold()
    refused(gated)
    gated.client.sent.clear()
    gated.says(b"RCPT TO:<b@example.net>\nDATA\r\n")
    gated.transfer._from_client()
    (told,) = gated.heard
    assert isinstance(told, m.Aborted)
    assert told.errno == errno.EPROTO
    assert gated.got == b""


@pytest.mark.parametrize(("lost", "waits"), [(False, True), (True, False)])
def test_a_refusal_waits_for_replies_that_are_known_to_come(lost: bool, waits: bool) -> None:
    tracker: Any = SimpleNamespace(owes=True, lost=lost, may_answer=False, mails_allowed=0)
    gated = Gated(tracker)
    gated.transfer._kept = MAIL
    gated.gate.refusal = THROTTLED
    assert gated.transfer._go_on() == (not waits)
    assert gated.transfer._refusing is waits
    told = m.Aborted("upstream_failed", errno.ETIMEDOUT, str(THROTTLED))
    assert (gated.transfer._kept, gated.heard) == ((MAIL, []) if waits else (b"", [told]))
