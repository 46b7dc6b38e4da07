"""A channel's dialogue on the running program: what is not allowed, what breaks, who is slow, and how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import independent_client as mta
from tests.clients import TIMEOUT, reset, was_reset
from tests.independent_client import Peer, channel, deliver, error_from, error_of, frame, pack, session
from tests.mx import Mx, close, half_close, late, mute, say
from tests.mx import reset as mx_reset
from tests.program import Proxy
from tests.sinks import Raw, closed_port, deaf_port, greet
from tests.waiting import wait_for

EHLO = "mta.example.com"
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def mx() -> Iterator[Mx]:
    with Mx() as mx:
        yield mx


# -- what is not allowed -----------------------------------------------------------------------------------------------

HERE = [["127.0.0.2", 25]]
IDLE = {
    "DATA": frame(mta.DATA, b"MAIL"),
    "EOF": frame(mta.EOF, pack([])),
    "END": frame(mta.END, pack([False, 0])),
    "OPENED": frame(mta.OPENED, pack([])),
    "PING": frame(mta.PING, pack([0, 0])),
    "HELLO": frame(mta.HELLO, pack([2, 1, 1, "x", bytes(16), bytes(32)])),
    "too long": struct.pack(">IB", 65_537, mta.OPEN),
    "no destination": frame(mta.OPEN, pack([None, []])),
    "33 destinations": frame(mta.OPEN, pack([None, HERE * 33])),
    "a name as destination": frame(mta.OPEN, pack([None, [["mx.example.net", 25]]])),
    "an address with a zone": frame(mta.OPEN, pack([None, [["fe80::1%lo", 25]]])),
    "port 0": frame(mta.OPEN, pack([None, [["127.0.0.2", 0]]])),
    "TLS without EHLO": frame(mta.OPEN, pack([None, HERE, None, "required"])),
    "an unknown mode": frame(mta.OPEN, pack([None, HERE, "x", "maybe"])),
    "an EHLO name with a line break": frame(mta.OPEN, pack([None, HERE, "x\r\nRSET"])),
    "no time at all": frame(mta.OPEN, pack([None, HERE, None, "none", None, False, False, [], 0])),
}


@pytest.mark.parametrize("data", IDLE.values(), ids=IDLE)
def test_frames_that_an_idle_channel_does_not_take(proxy: Proxy, data: bytes) -> None:
    with channel(proxy.native) as peer:
        peer.sock.sendall(data)
        assert error_of(peer) == "bad_protocol"


RUNNING = {
    "OPEN": frame(mta.OPEN, pack([None, HERE])),
    "no byte": frame(mta.DATA, b""),
    "too long": struct.pack(">IB", 65_537, mta.DATA),
    "EOF twice": frame(mta.EOF, pack([])) * 2,
    "DATA after EOF": frame(mta.EOF, pack([])) + frame(mta.DATA, b"RSET\r\n"),
    "END twice": frame(mta.END, pack([False])) * 2,
    "DATA after END": frame(mta.END, pack([False])) + frame(mta.DATA, b"RSET\r\n"),
    "END without a word": frame(mta.END, pack([])),
    "LIST": frame(0x2B, pack([0, None])),
}


@pytest.mark.parametrize("data", RUNNING.values(), ids=RUNNING)
def test_frames_that_an_smtp_session_does_not_take(proxy: Proxy, data: bytes) -> None:
    with Mx() as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint)
        peer.sock.sendall(data)
        while (heard := peer.raw())[0] != mta.ERROR:
            assert heard[0] in (mta.DATA, mta.EOF, mta.ENDED)
        assert mta.unpack(heard[1])[0] == "bad_protocol"
        assert peer.closed()
        wait_for(lambda: mx.running == 0)


def test_fields_that_a_later_version_adds(proxy: Proxy, mx: Mx) -> None:
    with channel(proxy.native) as peer:
        more = ["none", None, False, False, [], 10_000, False, False, None, False, False]
        more += [None, None, None, [], [], "", "", False, "later", [1, [2]]]
        peer.say(mta.OPEN, "127.0.0.5", [[*mx.endpoint, "later"]], None, *more)
        peer.expect(mta.OPENED)
        peer.say(mta.EOF, "later")
        peer.say(mta.END, False, 0, False, "later")
        while peer.hear()[0] != mta.ENDED:
            pass


def test_frames_byte_by_byte_and_all_at_once(proxy: Proxy, mx: Mx) -> None:
    request = frame(mta.OPEN, pack(["127.0.0.5", [list(mx.endpoint)]]))
    with channel(proxy.native) as peer:
        for byte in request:
            peer.sock.sendall(bytes((byte,)))
        peer.expect(mta.OPENED)
        peer.sock.sendall(frame(mta.END, pack([False])) + request)  # served after ENDED
        while peer.hear()[0] != mta.ENDED:
            pass
        peer.expect(mta.OPENED)


def kinds_of(piece: bytes) -> list[int]:
    """The types of the frames that came in one piece."""
    kinds = []
    while piece:
        length, kind = struct.unpack_from(">IB", piece)
        assert len(piece) >= 5 + length
        kinds.append(kind)
        piece = piece[5 + length :]
    return kinds


def end_and_open(mx: Mx, keep: bool = False) -> bytes:
    return frame(mta.END, pack([keep])) + frame(mta.OPEN, pack(["127.0.0.5", [list(mx.endpoint)], EHLO]))


@pytest.mark.parametrize("reuse", [False, True])
def test_end_and_the_next_open_are_answered_in_one_piece(proxy: Proxy, mx: Mx, reuse: bool) -> None:
    with channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name=EHLO, reuse=reuse)
        peer.sock.sendall(end_and_open(mx, reuse))
        assert kinds_of(peer.sock.recv(65536)) == [mta.ENDED, mta.OPENED]


def test_ended_does_not_wait_for_a_slow_receiver(proxy: Proxy) -> None:
    """Of the OPEN behind END: that one's answer is still to come."""
    with Mx() as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name=EHLO)
        gate = threading.Event()
        mx.script = {"greeting": late(gate)}
        peer.sock.sendall(end_and_open(mx))
        assert kinds_of(peer.sock.recv(65536)) == [mta.ENDED]
        gate.set()
        peer.expect(mta.OPENED)


def test_half_an_open_behind_end_holds_nothing_up(proxy: Proxy, mx: Mx) -> None:
    flight = end_and_open(mx)
    with channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name=EHLO)
        peer.sock.sendall(flight[:-10])
        assert kinds_of(peer.sock.recv(65536)) == [mta.ENDED]
        peer.sock.sendall(flight[-10:])
        peer.expect(mta.OPENED)


@pytest.mark.parametrize("quit", [True, False])
@pytest.mark.parametrize("raw", [True, False])
def test_quit_is_said_for_a_client_that_asks_for_it(proxy: Proxy, quit: bool, raw: bool) -> None:
    """Behind its back: the receiver answers only when ENDED has come."""
    gate = threading.Event()
    with Mx({"quit": late(gate)}) as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name=None if raw else EHLO)
        if raw:
            peer.hear_until(b"\r\n")
        peer.say(mta.END, False, 0, quit)
        peer.expect(mta.ENDED)
        gate.set()
        wait_for(lambda: mx.sessions and not mx.running)
        assert (b"QUIT" in mx.sessions[0].commands) is quit


def test_quit_is_not_said_behind_the_clients_end(proxy: Proxy) -> None:
    with Mx() as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name=EHLO)
        peer.say(mta.EOF)
        peer.say(mta.END, False, 0, True)
        while peer.hear()[0] != mta.ENDED:
            pass
        wait_for(lambda: mx.sessions and not mx.running)
        assert b"QUIT" not in mx.sessions[0].commands


def test_what_was_refused_leaves_the_channel_as_it_was(proxy: Proxy, mx: Mx) -> None:
    with channel(proxy.native) as peer, closed_port() as nobody:
        for fields, step, code in (
            (peer.failed(mx.endpoint, source="192.0.2.1"), None, "source_not_allowed"),
            (peer.failed(("10.0.0.1", 25)), None, "destination_not_allowed"),
            (peer.failed(proxy.native), None, "destination_not_allowed"),
            (peer.failed(mx.endpoint, source="::1"), None, "family_mismatch"),
            (peer.failed(mx.endpoint, throttles=[1]), None, "unknown_path"),
            (peer.failed(nobody), "connect", "upstream_failed"),
        ):
            assert fields[:2] == [step, code], fields
        assert fields[3] == 111
        assert [attempt[:3] for attempt in fields[8]] == [[list(nobody), "connect", 111]]
        peer.opened(mx.endpoint)


def test_policy_is_asked_for_every_destination_before_anything_is_tried(proxy: Proxy) -> None:
    with Mx() as mx, channel(proxy.native) as peer:
        assert peer.failed(mx.endpoint, ("10.0.0.1", 25))[1] == "destination_not_allowed"
        assert mx.connects == 0


# -- what breaks -------------------------------------------------------------------------------------------------------

Stage = Callable[[Peer, Mx], None]


def _idle(peer: Peer, mx: Mx) -> None:
    pass


def _opening(peer: Peer, mx: Mx) -> None:
    mx.script = {"greeting": mute}
    peer.say_open(mx.endpoint, ehlo_name=EHLO, deadline_ms=600_000)
    wait_for(lambda: mx.sessions)


def _open(peer: Peer, mx: Mx) -> None:
    peer.opened(mx.endpoint)


def _half_a_frame(peer: Peer, mx: Mx) -> None:
    peer.opened(mx.endpoint)
    peer.sock.sendall(struct.pack(">IB", 1000, mta.DATA) + b"EHLO x\r\n")
    wait_for(lambda: mx.sessions and mx.sessions[0].commands)


def _in_a_message(peer: Peer, mx: Mx) -> None:
    peer.opened(mx.endpoint)
    peer.data(b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n")
    peer.hear_until(b"<CR><LF>.<CR><LF>\r\n")
    peer.data(b"Subject: half")


def _half_closed(peer: Peer, mx: Mx) -> None:
    peer.opened(mx.endpoint)
    mx.script = {"ehlo": mute}
    peer.data(b"EHLO x\r\n")
    peer.say(mta.EOF)


def _ended(peer: Peer, mx: Mx) -> None:
    peer.opened(mx.endpoint)
    peer.finish()


STAGES = (_idle, _opening, _open, _half_a_frame, _in_a_message, _half_closed, _ended)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__.strip("_"))
@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["closed", "reset"])
def test_a_channel_that_dies(proxy: Proxy, stage: Stage, leave: Callable[[socket.socket], None]) -> None:
    """Whenever it is, the receiver's connection ends, nothing is delivered, nothing is kept."""
    with Mx() as mx:
        with channel(proxy.native) as peer:
            stage(peer, mx)
            wait_for(lambda: mx.sessions or stage is _idle)  # its thread may be late
            leave(peer.sock)
        wait_for(lambda: mx.running == 0, what="the receiver's connection has ended")
        assert not mx.messages
        proxy.wait_idle()
        if stage in (_open, _half_a_frame, _in_a_message):
            assert re.match("ConnectionResetError|BrokenPipeError", mx.sessions[0].ended or "")


def test_a_client_that_goes_with_its_open(proxy: Proxy) -> None:
    """Its FIN came together with the frame: no further event would tell of it."""
    mark = len(proxy.lines)
    with Mx({"greeting": mute}) as mx:
        with channel(proxy.native, source="127.0.0.71") as peer:  # such lines are limited for each address
            proxy.signal(signal.SIGSTOP)
            peer.say_open(mx.endpoint, ehlo_name=EHLO, deadline_ms=600_000)
        proxy.signal(signal.SIGCONT)
        proxy.wait_line("reason=client_gone", since=mark)
        assert mx.connects == 0
        proxy.wait_idle()


def test_a_client_that_goes_while_the_proxy_connects(proxy: Proxy) -> None:
    """To a receiver that never answers: the attempt ends long before its time."""
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.bind(("127.0.0.2", 0))
        full.listen(0)
        for _ in range(2):  # now the kernel ignores whoever knocks
            knock = waiting.enter_context(socket.socket())
            knock.setblocking(False)
            knock.connect_ex(full.getsockname())
        with channel(proxy.native) as peer:
            peer.say_open(full.getsockname(), deadline_ms=600_000)
            wait_for(lambda: "active=1" in proxy.status()[-1])
        proxy.wait_idle(10)


def test_what_a_client_says_after_the_receivers_fin_changes_nothing(proxy: Proxy) -> None:
    with Mx({"quit": say(b"221 bye\r\n", close)}) as mx, channel(proxy.native) as peer:
        mark = len(proxy.lines)
        peer.opened(mx.endpoint)
        peer.hear_until(b"\r\n")
        peer.data(b"QUIT\r\n")
        peer.expect(mta.DATA)
        peer.expect(mta.EOF)
        for _ in range(3):
            peer.data(b"NOOP\r\n")
        peer.say(mta.EOF)
        assert peer.finish() == [False, "not_offered"]
        proxy.wait_line("^connection .*outcome=upstream_closed", since=mark)


def test_a_receiver_that_resets(proxy: Proxy) -> None:
    with Mx({"noop": mx_reset}) as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint)
        peer.hear_until(b"\r\n")
        peer.data(b"NOOP\r\n")
        assert peer.expect(mta.ABORTED) == ["upstream_failed", 104, "Connection reset by peer"]
        peer.data(b"discarded\r\n")
        assert peer.finish(keep=True) == [False, "not_offered"]
        peer.opened(mx.endpoint)  # the channel is as good as before


def test_a_receiver_that_closes(proxy: Proxy) -> None:
    with Mx({"noop": say(b"421 4.3.2 going down\r\n", close)}) as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint)
        peer.hear_until(b"\r\n")
        peer.data(b"NOOP\r\n")
        assert peer.hear() == (mta.DATA, b"421 4.3.2 going down\r\n")
        peer.expect(mta.EOF)
        assert peer.finish() == [False, "not_offered"]


def test_a_receiver_that_closes_while_the_client_writes(proxy: Proxy) -> None:
    """Its last words come before the news that it takes no more."""

    def refuse(sock: socket.socket) -> None:
        sock.sendall(b"220 mx\r\n")
        sock.recv(10)
        sock.sendall(b"421 no more\r\n")
        sock.close()  # with bytes unread: a reset

    with Raw(refuse) as server, channel(proxy.native) as peer:
        peer.opened(server.endpoint)
        peer.data(os.urandom(MEBIBYTE))
        heard = b""
        while (item := peer.hear())[0] == mta.DATA:
            heard += item[1]
        assert item[0] in (mta.ABORTED, mta.EOF)
        assert heard == b"220 mx\r\n421 no more\r\n"
        peer.finish()


def test_half_closes_in_both_directions(proxy: Proxy) -> None:
    def answer(sock: socket.socket) -> None:
        data = b"".join(iter(lambda: sock.recv(65536), b""))
        sock.sendall(b"got %d" % len(data))
        sock.close()

    with Raw(answer) as server, channel(proxy.native) as peer:
        peer.opened(server.endpoint)
        peer.data(bytes(300_000))
        peer.say(mta.EOF)
        assert peer.hear_until(b"got 300000")
        peer.expect(mta.EOF)
        peer.finish()
    with Mx({"noop": half_close}) as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint)
        peer.hear_until(b"\r\n")
        peer.data(b"NOOP\r\n")
        peer.expect(mta.EOF)
        peer.data(b"still here\r\n")
        peer.finish()
        wait_for(lambda: b"still here" in mx.sessions[0].rest)


# -- who is slow -------------------------------------------------------------------------------------------------------


def _flood(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(bytes(65536))


def _fill(peer: Peer, limit: int = 256 * MEBIBYTE) -> int:
    """Send DATA until nobody takes more; how many bytes went."""
    peer.sock.settimeout(1.0)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < limit:
            peer.sock.sendall(frame(mta.DATA, bytes(65536)))
            sent += 65536
    peer.sock.settimeout(TIMEOUT)
    return sent


def test_a_slow_client_slows_the_receiver_and_fills_no_memory(proxy: Proxy) -> None:
    sent = 0

    def pour(sock: socket.socket) -> None:
        nonlocal sent
        for _ in range(1024):
            sock.sendall(b"x" * 65536)
            sent += 65536
        sock.close()

    with Raw(pour) as server, channel(proxy.native) as peer:
        before = proxy.rss()
        peer.opened(server.endpoint)
        wait_for(lambda: _standing_still(lambda: sent), 30, "the receiver is stopped")
        assert sent < 60 * MEBIBYTE
        assert proxy.rss() - before < 16 * MEBIBYTE
        heard = 0
        while (item := peer.hear())[0] == mta.DATA:
            heard += len(item[1])
        assert (item[0], heard) == (mta.EOF, 64 * MEBIBYTE)


def test_a_slow_receiver_slows_the_client_and_fills_no_memory(proxy: Proxy) -> None:
    with Raw(receive_buffer=65536) as server, channel(proxy.native) as peer:
        before = proxy.rss()
        peer.opened(server.endpoint)
        assert _fill(peer) < 60 * MEBIBYTE
        assert proxy.rss() - before < 16 * MEBIBYTE
        reset(peer.sock)
        proxy.wait_idle()


def test_a_client_that_lives_is_probed_and_loses_nothing() -> None:
    """Its receiver takes nothing for a while, and then all of it. Meanwhile the client sends, and does not read."""
    goes_on = threading.Event()
    came: list[int] = []

    def serve(sock: socket.socket) -> None:
        goes_on.wait(60)
        while data := sock.recv(65536):
            came.append(len(data))

    def send() -> None:
        peer.data(bytes(32 * MEBIBYTE))
        peer.say(mta.END, False, 0)

    with (
        Proxy("listen_tls no\n") as proxy,
        Raw(serve) as server,
        channel(proxy.native, tls=False) as peer,
    ):
        peer.opened(server.endpoint, probes=True)
        peer.sock.settimeout(60)
        sender = threading.Thread(target=send)
        sender.start()
        try:
            assert peer.hear() == (mta.PROBE, [])
        finally:
            goes_on.set()
            sender.join(60)
        while (heard := peer.hear())[0] == mta.PROBE:
            assert heard[1] == []
        assert heard == (mta.ENDED, [False, "not_offered"])
        wait_for(lambda: sum(came) == 32 * MEBIBYTE, 30, "all of it")


def _standing_still(figure: Callable[[], float]) -> bool:
    first = figure()
    threading.Event().wait(0.5)
    return first > 0 and first == figure()


def _choke(proxy: Proxy, peer: Peer) -> None:
    """Wait until not a byte more goes towards a client that reads nothing.

    The kernel tells of room only when a third of the buffer is free, so a writer is poked to use up the rest.
    """
    for _ in range(3):
        wait_for(lambda: _standing_still(proxy.cpu), 30, "nothing moves")
        peer.data(b"x")


def test_who_reads_nothing_does_not_live_for_ever() -> None:
    """The receiver is stopped, no byte moves: `idle_timeout`."""
    with Proxy("idle_timeout 1s\n") as proxy, Raw(_flood) as server, channel(proxy.native) as peer:
        peer.opened(server.endpoint)
        proxy.wait_line(r"^connection .*outcome=(idle_timeout|client_reset)")  # TCP_USER_TIMEOUT is as long
        proxy.wait_idle()


def test_an_idle_channel_is_closed() -> None:
    with Proxy("idle_timeout 1s\n") as proxy, channel(proxy.native) as peer:
        assert error_from(peer)[::2] == ("idle_timeout", True)


def test_tcp_watches_over_a_receiver_that_serves_for_long(mx: Mx) -> None:
    """From the first sweep on, an eighth of `idle_timeout`."""
    host, port = mx.endpoint
    sockets = ["ss", "--tcp", "--options", "--no-header", "--numeric", "state", "established", "dst", f"{host}:{port}"]
    with Proxy("idle_timeout 8s\n") as proxy, channel(proxy.native) as peer:
        peer.opened(mx.endpoint)
        wait_for(lambda: "timer:(keepalive" in subprocess.run(sockets, capture_output=True, text=True).stdout)


def test_who_does_not_even_read_the_answer_to_end() -> None:
    with Proxy("idle_timeout 3s\n") as proxy, Raw(_flood) as server, channel(proxy.native) as peer:
        peer.opened(server.endpoint)
        _choke(proxy, peer)
        peer.say(mta.END, False, 0)
        proxy.wait_line(r"^connection .*outcome=(idle_timeout|client_reset)")  # TCP_USER_TIMEOUT is as long
        proxy.wait_idle()


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "clear"])
def test_an_error_does_not_land_inside_a_frame(tls: bool) -> None:
    """The client reads nothing, so a frame is half sent when it breaks the protocol."""
    with (
        Proxy(f"listen_tls {'yes' if tls else 'no'}\n") as proxy,
        Raw(_flood) as server,
        channel(proxy.native, tls=tls) as peer,
    ):
        peer.opened(server.endpoint)
        _choke(proxy, peer)
        peer.sock.sendall(frame(mta.EOF, pack([])) * 2)
        assert error_from(peer)[:2] == ("bad_protocol", "EOF twice in an SMTP session")


def test_bytes_before_end_are_given_up_after_a_while(proxy: Proxy) -> None:
    with Raw(receive_buffer=4096) as server, channel(proxy.native) as peer:
        peer.opened(server.endpoint)
        payload = bytes(2 * MEBIBYTE)
        peer.data(payload[: MEBIBYTE // 2])
        peer.say(mta.END, False, 0)
        assert peer.expect(mta.ENDED) == [False, "not_offered"]


@pytest.mark.parametrize("end", [b"", frame(mta.END, pack([False]))], ids=["in the middle", "behind END"])
def test_a_client_that_closes_while_the_receiver_takes_nothing(proxy: Proxy, end: bytes) -> None:
    """Its FIN is all that can tell: of what it sent nothing is read any more, END included."""
    with Raw(receive_buffer=4096) as server, channel(proxy.native) as peer:
        peer.opened(server.endpoint)
        mark = len(proxy.lines)
        times_still = 0
        while times_still < 3:  # see `_choke`: the kernels between make room more than once
            peer.data(bytes(10_000 if times_still else 65536))
            wait_for(lambda: not _unread(peer) or _standing_still(lambda: _unread(peer)), 30, "bytes stay or go")
            times_still = times_still + 1 if _unread(peer) else 0
        peer.sock.sendall(end)
        peer.sock.close()
        # The kernel may find room for all of it after all; then END was read, and the end is a good one.
        ended = proxy.wait_line(r"^connection .*outcome=(client_reset|client_closed)", since=mark)[1]
        assert ended == "client_reset" or (end and ended == "client_closed")
        assert was_reset(server.sockets[0]) == (ended == "client_reset")
        proxy.wait_idle()


def _unread(peer: Peer) -> int:
    """Bytes of the client that the proxy's kernel holds for it."""
    own, remote = peer.sock.getsockname(), peer.sock.getpeername()
    wanted = [f"{int.from_bytes(socket.inet_aton(host), 'little'):08X}:{port:04X}" for host, port in (remote, own)]
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return next(int(row[4].partition(":")[2], 16) for row in rows if row[1:3] == wanted)


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_term_is_told_to_every_channel_and_a_message_is_finished() -> None:
    with (
        Proxy("drain_timeout 20s\n") as proxy,
        Mx() as mx,
        channel(proxy.native) as idle,
        channel(proxy.native) as busy,
    ):
        busy.opened(mx.endpoint, ehlo_name=EHLO, reuse=True)
        proxy.term()
        left, reason, code = idle.expect(mta.GOAWAY)
        assert 0 < left <= 20_000
        assert (reason, code) == ("the proxy is shutting down", "draining")
        assert idle.closed()
        assert 0 < busy.expect(mta.GOAWAY)[0] <= 20_000
        deliver(busy, b"Subject: last\r\n")
        assert busy.finish(keep=True, messages=1) == [False, "draining"]
        assert busy.closed()
        idle.sock.close()
        busy.sock.close()
        assert proxy.wait_exit() == 0
        assert len(mx.messages) == 1


def test_no_open_is_served_after_goaway() -> None:
    with Proxy("drain_timeout 20s\n") as proxy, Mx() as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name=EHLO)
        proxy.term()
        peer.expect(mta.GOAWAY)
        peer.sock.sendall(frame(mta.END, pack([False])) + frame(mta.OPEN, pack([None, [list(mx.endpoint)]])))
        assert peer.expect(mta.ENDED) == [False, "not_offered"]
        assert error_from(peer)[::2] == ("draining", True)
        peer.sock.close()
        assert proxy.wait_exit() == 0


def test_who_comes_in_during_a_drain_is_told_at_once() -> None:
    """It had dialled before: no OPEN is served, no permit granted."""
    with (
        Proxy("drain_timeout 20s\n") as proxy,
        Mx() as mx,
        session(proxy.native) as first,
        channel(proxy.native) as busy,
        Peer(proxy.native) as one_flight,
        Peer(proxy.native) as in_full,
        Peer(proxy.native) as second,
    ):
        busy.opened(mx.endpoint, ehlo_name=EHLO)
        in_full.hello(mta.CHANNEL)
        second.hello(mta.SESSION, instance="mta-2")
        proxy.term()
        proxy.wait_line("^drain: ")
        in_full.prove()
        left, reason, code = in_full.expect(mta.GOAWAY)
        assert 0 < left <= 20_000
        assert (reason, code) == ("the proxy is shutting down", "draining")
        assert in_full.closed()
        one_flight.sock.sendall(
            one_flight.channel_auth(first.welcome, 1) + frame(mta.OPEN, pack([None, [list(mx.endpoint)]]))
        )
        assert error_from(one_flight)[::2] == ("draining", True)
        second.prove()
        left = next(fields for kind, fields in iter(second.hear, None) if kind == mta.GOAWAY)[0]
        assert 0 < left <= 20_000
        assert mx.connects == 1
        for peer in (first, busy, one_flight, in_full, second):
            peer.sock.close()
        assert proxy.wait_exit() == 0


def test_an_open_that_waits_at_the_end_is_answered() -> None:
    with Proxy("drain_timeout 500ms\nconnect_timeout 30s\n") as proxy, deaf_port() as silent:
        with channel(proxy.native) as peer:
            peer.sock.sendall(frame(mta.OPEN, pack([None, [list(silent)]])))
            wait_for(lambda: "active=1" in proxy.status()[-1])
            proxy.term()
            answer = peer.expect(mta.FAILED)
            assert answer[1] == "draining"
        assert proxy.wait_exit() == 0


def test_what_does_not_finish_is_cut_off() -> None:
    with Proxy("drain_timeout 500ms\n") as proxy, Mx() as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint)
        peer.hear_until(b"\r\n")
        proxy.term()
        assert peer.expect(mta.GOAWAY)[2] == "draining"
        assert error_from(peer)[::2] == ("draining", True)
        peer.sock.close()
        proxy.wait_line("outcome=drain_timeout")
        assert proxy.wait_exit() == 0
        wait_for(lambda: mx.running == 0)


def test_a_raw_session_knows_no_greeting(proxy: Proxy) -> None:
    with Raw(greet) as server, channel(proxy.native) as peer:
        opened = peer.opened(server.endpoint, reuse=True)
        assert opened[0] is False
        assert opened[1] == list(server.endpoint)
        wait_for(lambda: server.peers)
        assert opened[2] == list(server.peers[0])
        assert opened[5:] == [None, [], None, [], "", ""]
        assert peer.hear_until(b"220 mx\r\n")
        assert peer.finish(keep=True) == [False, "not_offered"]
