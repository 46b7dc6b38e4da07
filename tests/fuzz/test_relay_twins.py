"""Both relay engines side by side: whatever the peers of a relay do, they see and its owner is told the same with each.

A schedule is a list of acts. Each is done to both relays before the next one; what is heard is waited for at both, and
bytes that nobody has asked for yet stay under way, in whatever buffers there are. Counts of a relay that is reset while
bytes are under way depend on the moment, and so does who has closed first where both do; all else does not.
"""

from __future__ import annotations

import random
import socket
from typing import Any, NamedTuple

import gevent
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from proxy.model import Ending
from proxy.net import relay
from tests.loopback.net.relays import ENGINES, Relayed, close_peers, open_descriptors, reset, until

pytestmark = [
    pytest.mark.either_form("both engines at once"),
    pytest.mark.skipif(len(ENGINES) < 2, reason="only one engine was built"),
]
_STREAM = random.Random(3).randbytes(1 << 16)
_IDLE, _HALF_CLOSED = 10.0, 5.0
_CLEAN = {Ending.CLIENT_CLOSED, Ending.UPSTREAM_CLOSED}


class Setting(NamedTuple):
    """What both engines and relays are given; `reply` is what the receiver begins with."""

    early: int = 0
    reply: bytes = b""
    buffers: int | None = None
    reads_a_turn: int = 16
    max_pipes: int = 32


class Act(NamedTuple):
    """`by` the client or the receiver: send so many bytes, hear so many more, say FIN, reset. Or time passes."""

    kind: str
    by_client: bool = True
    size: int = 0


def stream(first: bytes, start: int, end: int) -> bytes:
    """Bytes of what a peer says: `first`, and then the same again and again."""
    at = max(start - len(first), 0) % len(_STREAM)
    size = max(end - max(start, len(first)), 0)
    return first[start:end] + (_STREAM * (size // len(_STREAM) + 2))[at : at + size]


class Peer:
    """One end of one relay.

    Attributes:
        told: bytes that it was told to send, whether the kernel has taken them or not.
    """

    def __init__(self, sock: Any, first: bytes = b"", sent: int = 0) -> None:
        self.sock = sock
        self.first = first
        self.told = self._sent = sent
        self.received = bytearray()
        self.wants_fin = self.saw_end = self.over = self._said_fin = False
        sock.settimeout(0)

    def push(self) -> None:
        """Say as much of what it was told to as the kernel takes."""
        try:
            while self._sent < self.told and not self.over:
                self._sent += self.sock.send(stream(self.first, self._sent, min(self.told, self._sent + 100_000)))
            if self.wants_fin and not self._said_fin and not self.over:
                self._said_fin = True
                self.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            self.over = True

    def pull(self, most: int) -> None:
        """Hear until so many bytes are there in all."""
        try:
            while not (self.over or self.saw_end) and len(self.received) < most:
                self.received += self.sock.recv(min(most - len(self.received), 65536))
        except BlockingIOError:
            pass
        except OSError:
            self.over = True

    def look_for_end(self) -> None:
        try:
            if not (self.over or self.saw_end):
                self.saw_end = self.sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            pass
        except OSError:
            self.over = True

    def reset(self) -> None:
        self.over = True
        reset(self.sock)


class Twin:
    """A relay of one of the two engines, and its peers."""

    def __init__(self, kind: type[relay.Engine], setting: Setting) -> None:
        self.engine = kind()
        self.engine.reads_a_turn = setting.reads_a_turn
        self.engine.max_pipes = setting.max_pipes
        self.engine.half_close_timeout = _HALF_CLOSED
        self.relayed = Relayed(self.engine, stream(b"", 0, setting.early), _IDLE, setting.buffers)
        self.owner = self.relayed.owner
        self.client = Peer(self.relayed.client, sent=setting.early)
        self.receiver = Peer(self.relayed.upstream, setting.reply)
        self.directions = (self.client, self.receiver), (self.receiver, self.client)

    def peers(self, act: Act) -> tuple[Peer, Peer]:
        """Whose act it is, and the other one."""
        return self.directions[not act.by_client]

    def has_heard(self, listener: Peer, speaker: Peer, total: int) -> bool:
        speaker.push()
        listener.pull(total)
        return len(listener.received) >= total

    def is_calm(self) -> bool:
        """Nothing is under way: all that was said is heard, ends too."""
        for speaker, listener in self.directions:
            if not self.has_heard(listener, speaker, speaker.told):
                return False
            if speaker.wants_fin:
                listener.look_for_end()
                if not listener.saw_end:
                    return False
        return not (self.client.wants_fin and self.receiver.wants_fin) or bool(self.owner.told)

    def close(self) -> None:
        self.engine.stop()
        assert self.engine.faults == 0
        assert self.engine.pairs == 0


class Twins:
    """Both of them, and what is known of both."""

    def __init__(self, setting: Setting) -> None:
        self.both = [Twin(kind, setting) for kind in ENGINES]
        self.now = 0.0
        self.is_over = False

    def act(self, act: Act) -> None:
        if self.is_over:
            return
        getattr(self, f"_{act.kind}")(act)

    def _send(self, act: Act) -> None:
        for twin in self.both:
            speaker, _ = twin.peers(act)
            if not speaker.wants_fin:
                speaker.told += act.size
                speaker.push()

    def _hear(self, act: Act) -> None:
        for twin in self.both:
            listener, speaker = twin.peers(act)
            total = min(len(listener.received) + act.size, speaker.told)
            until(lambda: twin.has_heard(listener, speaker, total), what=f"{twin.engine.name}: {total} bytes")  # noqa: B023

    def _fin(self, act: Act) -> None:
        """The other one has said so before, and it may be under way: then it is not known which is seen first."""
        for twin in self.both:
            speaker, _ = twin.peers(act)
            speaker.wants_fin = True
            speaker.push()
        if all(peer.wants_fin for peer in (self.both[0].client, self.both[0].receiver)):
            self._compare(_CLEAN if not self._was_calm_before(act) else None)

    def _was_calm_before(self, act: Act) -> bool:
        return all(twin.peers(act)[0].saw_end for twin in self.both)

    def _wait_until_calm(self) -> None:
        for twin in self.both:
            until(twin.is_calm, what=f"{twin.engine.name}: nothing is under way")

    def _compare(self, endings: set[Ending] | None = None) -> None:
        """The relays end by themselves; in the same way, or in one of these."""
        self._wait_until_calm()
        told = [twin.owner.ending() for twin in self.both]
        self.is_over = True
        if endings is None:
            assert told[0] == told[1]
        else:
            assert {ending for ending, _, _ in told} <= endings
            assert told[0][1:] == told[1][1:]
        assert told[0][1:] == (self.both[0].client.told, self.both[0].receiver.told)

    def _reset(self, act: Act) -> None:
        """Of even size: while bytes may be under way."""
        calm = act.size % 2 == 1
        if calm:
            self._wait_until_calm()
        for twin in self.both:
            twin.peers(act)[0].reset()
        told = [twin.owner.ending() for twin in self.both]
        self.is_over = True
        assert told[0][0] == told[1][0] == (Ending.CLIENT_RESET if act.by_client else Ending.UPSTREAM_RESET)
        if calm:
            assert told[0] == told[1]
            assert told[0][1:] == (self.both[0].client.told, self.both[0].receiver.told)

    def _pass(self, act: Act) -> None:
        """So many seconds, after all that was said is heard."""
        self._wait_until_calm()
        self.now += act.size
        for twin in self.both:
            for _ in twin.engine.sweep(self.now):
                pass
        told = [twin.owner.told for twin in self.both]
        assert told[0] == told[1]
        self.is_over = bool(told[0])

    def finish(self) -> None:
        if not self.is_over:
            for act in (Act("fin"), Act("fin", by_client=False)):
                self._wait_until_calm()
                if not self.both[0].peers(act)[0].wants_fin:
                    self.act(act)

    def check_bytes(self) -> None:
        for twin in self.both:
            for speaker, listener in twin.directions:
                assert listener.received == stream(speaker.first, 0, len(listener.received))
            if twin.receiver.first[:1] in (b"4", b"5"):
                assert twin.owner.first == stream(twin.receiver.first, 0, len(twin.owner.first))
                assert twin.owner.first or not twin.client.received


_SIZES = st.sampled_from([1, 2, 100, 5000, 65536, 65537, 300_001, 600_000])
_ACTS = st.builds(
    Act, st.sampled_from(["send", "send", "send", "hear", "hear", "fin", "reset", "pass"]), st.booleans(), _SIZES
)
_PASSING = st.builds(Act, st.just("pass"), st.just(True), st.sampled_from([1, 4, 6, 11]))
_SETTINGS = st.builds(
    Setting,
    st.sampled_from([0, 1, 70_000]),
    st.sampled_from([b"", b"421 go\r\n", b"220 mx\r\n", b"4", b"50"]),
    st.sampled_from([None, 32768]),
    st.sampled_from([1, 2, 16]),
    st.sampled_from([0, 1, 32]),
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(setting=_SETTINGS, acts=st.lists(_ACTS.filter(lambda act: act.kind != "pass") | _PASSING, max_size=14))
@example(
    Setting(buffers=32768), [Act("send", size=1_000_000), Act("fin"), Act("hear", False, 5000), Act("reset", False, 2)]
)
@example(Setting(early=70_000), [Act("fin"), Act("pass", size=1), Act("pass", size=6)])
@example(Setting(), [Act("pass", size=1), Act("pass", size=11)])
def test_both_engines_do_the_same(setting: Setting, acts: list[Act]) -> None:
    gevent.sleep(0)  # the hub has descriptors of its own from its first turn on
    before = open_descriptors()
    twins = Twins(setting)
    try:
        for act in acts:
            twins.act(act)
        twins.finish()
        twins.check_bytes()
    finally:
        for twin in twins.both:
            twin.close()
        close_peers()
    until(lambda: open_descriptors() <= before, what="all is closed")
