"""The bytes of a session on a channel, on real sockets: what the steps in the hub must leave to the greenlet."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import gevent
import pytest

from proxy.doors.native import transfer as channel_transfer
from proxy.doors.native.link import Link
from proxy.doors.native.transfer import Transfer
from proxy.net.relay import Engine, RawSocket
from proxy.net.tls import PlainStream
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from tests.loopback.doors.native import ends
from tests.loopback.net.relays import close_peers, tcp_pair, until


class Carried:
    """A transfer that waits for its first event, between a client and a receiver."""

    def __init__(self, stream_of: Callable[[RawSocket], PlainStream] = PlainStream) -> None:
        self.engine = Engine()
        self.client, ours = tcp_pair("127.0.0.1")
        self.receiver, theirs = tcp_pair("127.0.0.2")
        for sock in (ours, theirs):
            self.engine.register(sock.fileno())
        self.guest = ends.guest(PlainStream(ours))
        self.stream = stream_of(theirs)
        self.link: Link | None = None
        self.greenlet = gevent.spawn(self._carry)
        until(lambda: self.link is not None and self.link.waits, what="the transfer waits")

    def _carry(self) -> Transfer:
        self.link = Link(self.engine, self.guest)
        transfer = Transfer(self.link, ends.receiver(self.stream), None)
        transfer.carry()
        return transfer

    def end(self) -> Transfer:
        self.client.sendall(frames.encode(m.End(False, 0)))
        transfer: Transfer = self.greenlet.get(timeout=30)
        self.engine.close(self.guest.stream.socket)
        self.engine.close(self.stream.socket)
        self.engine.stop()
        close_peers()
        return transfer


def test_what_the_last_read_of_a_turn_brought_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_transfer, "_READS_A_SIDE", 1)
    carried = Carried()
    carried.receiver.settimeout(30)
    carried.client.sendall(frames.encode_data(b"one"))
    assert carried.receiver.recv(10) == b"one"
    assert carried.end().up == 3


class HoldsItsEnd(PlainStream):
    """As TLS, when its close_notify finds the socket full."""

    unsent = False
    flushed = False

    def finish(self) -> None:
        self.unsent = True

    def flush(self) -> None:
        self.unsent, self.flushed = False, True


@pytest.mark.only_python("a stream that does what the test says")
def test_an_end_that_the_receiver_did_not_take_at_once_is_pushed_on() -> None:
    carried = Carried(HoldsItsEnd)
    assert isinstance(carried.stream, HoldsItsEnd)
    carried.client.sendall(frames.encode(m.Eof()))
    until(lambda: carried.stream.flushed, what="the held end is pushed on")  # type: ignore[attr-defined]
    assert carried.end().up == 0


@pytest.mark.only_python("methods put in the place of others")
def test_the_timer_of_a_last_push_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would go off in the middle of the channel's next session."""
    transfer, timers, pushed = Carried().end(), [], iter([False, False, True])
    start_new = channel_transfer.Timeout.start_new

    def noted(seconds: float) -> gevent.Timeout:
        timers.append(start_new(seconds))
        return timers[-1]

    monkeypatch.setattr(channel_transfer.Timeout, "start_new", noted)
    monkeypatch.setattr(transfer, "_push", lambda: next(pushed))
    monkeypatch.setattr(transfer, "stream", SimpleNamespace(socket=SimpleNamespace(fileno=lambda: -1)))
    engine = SimpleNamespace(wait=lambda fd: None)
    monkeypatch.setattr(transfer, "_link", SimpleNamespace(engine=engine, look_again=lambda: None))
    assert transfer.flush()
    assert [timer.pending for timer in timers] == [False]
