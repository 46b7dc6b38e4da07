"""The relay engine on real sockets, each engine that was built: what reaches whom, in which order, and how it ends.

Each trap of docs/performance.md has a test here that fails when its protection is removed; but for the continuation
that overwrites what an event has kept, which takes a rare order of events: tests/fuzz/test_relay_schedules.py finds it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import Timeout, get_hub, getcurrent
from greenlet import greenlet

from proxy.model import Ending
from proxy.net import relay
from proxy.net.peer import has_gone
from proxy.net.relay import RawSocket
from tests.loopback.net.relays import (
    ENGINES,
    Owner,
    Relayed,
    chunks,
    close_peers,
    fill,
    malloced,
    open_descriptors,
    read_all,
    reset,
    run,
    tcp_pair,
    unread,
    until,
    was_reset,
)

SMALL = 8192  # socket buffers that fill soon


@pytest.fixture(params=ENGINES, ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest) -> Iterator[relay.Engine]:
    engine = request.param()
    yield engine
    engine.stop()
    close_peers()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the loop's error handler is told, instead of printing it."""
    told: list[Any] = []
    monkeypatch.setattr(get_hub(), "handle_error", lambda *arguments: told.append(arguments))
    return told


# -------------------------------------------------------------------- how it ends


def test_client_closes_first_and_still_gets_the_reply(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    pair.client.sendall(b"last words")
    pair.client.shutdown(socket.SHUT_WR)
    assert read_all(pair.upstream) == b"last words"
    assert not pair.owner.told
    pair.upstream.sendall(b"a late reply")
    pair.upstream.close()
    assert read_all(pair.client) == b"a late reply"
    assert pair.owner.ending() == (Ending.CLIENT_CLOSED, 10, 12)
    assert engine.pairs == 0


def test_upstream_closes_first_and_still_gets_the_rest(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    pair.upstream.sendall(b"421 bye")
    pair.upstream.shutdown(socket.SHUT_WR)
    assert read_all(pair.client) == b"421 bye"
    pair.client.sendall(b"QUIT")
    pair.client.close()
    assert read_all(pair.upstream) == b"QUIT"
    assert pair.owner.ending() == (Ending.UPSTREAM_CLOSED, 4, 7)


def test_last_words_and_fin_leave_in_one_segment(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    pair.check()
    before = segments_in(pair.client)
    pair.upstream.sendall(b"221 bye")
    pair.upstream.close()  # both are there when the event is looked at
    assert read_all(pair.client) == b"221 bye"
    assert segments_in(pair.client) == before + 1


def test_a_client_that_is_gone_at_the_join(engine: relay.Engine) -> None:
    def before(pair: Relayed) -> None:
        pair.upstream.sendall(b"220 hello")
        gevent.sleep(0.01)  # its event comes, and nobody listens
        reset(pair.client)

    pair = Relayed(engine, before=before, client_registered=True)
    assert pair.owner.ending() == (Ending.CLIENT_RESET, 0, 0)
    assert engine.faults == 0


def segments_in(sock: socket.socket) -> int:
    """tcpi_segs_in of struct tcp_info (linux/tcp.h)."""
    information = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int.from_bytes(information[140:144], sys.byteorder)


@pytest.mark.parametrize("fin", [False, True])
@pytest.mark.parametrize("client_registered", [False, True])
def test_what_came_before_the_join_needs_no_new_event(engine: relay.Engine, client_registered: bool, fin: bool) -> None:
    def before(pair: Relayed) -> None:
        for side, data in ((pair.client, b"c"), (pair.upstream, b"u")):
            side.sendall(data)
            if fin:
                side.shutdown(socket.SHUT_WR)
        gevent.sleep(0.01)  # the events come, and nobody listens

    pair = Relayed(engine, before=before, client_registered=client_registered)
    assert pair.upstream.recv(10) == b"c"
    assert pair.client.recv(10) == b"u"
    if not fin:
        pair.check()
        pair.close()
    assert pair.owner.ending()[1:] == ((1, 1) if fin else (2, 2))


@pytest.mark.parametrize("side", ["client", "upstream"])
def test_reset_stays_a_reset(engine: relay.Engine, side: str) -> None:
    pair = Relayed(engine)
    pair.check()
    one, other = (pair.client, pair.upstream) if side == "client" else (pair.upstream, pair.client)
    reset(one)
    assert was_reset(other)
    assert pair.owner.ending() == (Ending(f"{side}_reset"), 1, 1)


@pytest.mark.parametrize("side", ["client", "upstream"])
def test_reset_after_fin_stays_a_reset(engine: relay.Engine, side: str) -> None:
    pair = Relayed(engine)
    one, other = (pair.client, pair.upstream) if side == "client" else (pair.upstream, pair.client)
    one.shutdown(socket.SHUT_WR)
    assert other.recv(1) == b""
    reset(one)
    assert pair.owner.ending() == (Ending(f"{side}_reset"), 0, 0)
    with pytest.raises(ConnectionError):
        until(lambda: other.send(b"x") and False)


@pytest.mark.parametrize("early", [b"", b"early"])
@pytest.mark.parametrize("side", ["client", "upstream"])
def test_a_reset_right_behind_a_fin(engine: relay.Engine, side: str, early: bytes) -> None:
    """Both in one batch: a read says 0, and no other event comes."""
    pair = Relayed(engine, early)
    one, other = (pair.client, pair.upstream) if side == "client" else (pair.upstream, pair.client)
    one.shutdown(socket.SHUT_WR)
    reset(one)
    ending, _, _ = pair.owner.ending()
    assert ending == f"{side}_reset"
    assert was_reset(other)


@pytest.mark.parametrize("pipes", [0, 1])
@pytest.mark.parametrize("side", ["client", "upstream"])
def test_reset_is_seen_while_the_other_side_reads_nothing(engine: relay.Engine, side: str, pipes: int) -> None:
    engine.max_pipes = pipes
    pair = Relayed(engine)
    one, other = (pair.client, pair.upstream) if side == "client" else (pair.upstream, pair.client)
    from_one = pair.fds[0 if side == "client" else 1]

    def held_back() -> bool:
        """Whether bytes wait in front of the engine, and in its pipe where there is one. Whether bulk that begins to
        flow is spliced depends on how much of it each read finds: what came through is taken, and more is sent."""
        sent = fill(one)
        if unread(from_one) and engine.pipes - engine.free_pipes == pipes:
            return True
        exactly(other, sent)
        return False

    until(held_back)
    reset(one)
    ending, up, down = pair.owner.ending()
    assert ending == f"{side}_reset"
    assert up + down > 65536
    assert was_reset(other)
    assert engine.pipes == 0  # it held a dead connection's bytes


def test_closed_both_ways_is_no_reset_while_bytes_are_held_back(engine: relay.Engine) -> None:
    """After both FINs a socket looks as dead as after a reset (HUP, no peer), with bytes still in it."""
    pair = Relayed(engine)
    pair.upstream.shutdown(socket.SHUT_WR)
    assert pair.client.recv(1) == b""
    sent = fill(pair.client)
    pair.client.close()
    gevent.sleep(0)
    assert len(read_all(pair.upstream)) == sent
    assert pair.owner.ending() == (Ending.UPSTREAM_CLOSED, sent, 0)


def test_upstream_that_dies_with_bytes_held_back_is_the_culprit(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    pair.upstream.shutdown(socket.SHUT_WR)
    assert pair.client.recv(1) == b""
    fill(pair.client)
    pair.client.close()
    gevent.sleep(0)
    reset(pair.upstream)
    assert pair.owner.ending()[0] == Ending.UPSTREAM_RESET


def test_upstream_that_dies_is_the_culprit_though_the_client_is_closed_both_ways(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    pair.upstream.shutdown(socket.SHUT_WR)
    assert pair.client.recv(1) == b""
    pair.client.sendall(b"x")
    pair.client.close()
    reset(pair.upstream)  # both in one batch
    assert pair.owner.ending() == (Ending.UPSTREAM_RESET, 0, 0)


def test_bytes_that_were_not_delivered_are_not_counted(engine: relay.Engine) -> None:
    pair = Relayed(engine, bytes(8_000_000))
    gevent.sleep(0.01)
    engine.abort_all(Ending.DRAIN_TIMEOUT)
    ending, up, down = pair.owner.ending()
    assert ending == Ending.DRAIN_TIMEOUT
    assert 0 < up < 8_000_000
    assert down == 0


# -------------------------------------------------------------------- bytes


BUDGETS = {"plain": {}, "no pipe": {"max_pipes": 0}, "hasty": {"reads_a_turn": 1, "splices_a_turn": 1}}
BUDGETS["hasty, no pipe"] = {"reads_a_turn": 1, "max_pipes": 0}


@pytest.mark.parametrize("buffers", [None, SMALL])
@pytest.mark.parametrize("budget", BUDGETS)
def test_bytes_are_identical_both_ways_at_once(engine: relay.Engine, budget: str, buffers: int | None) -> None:
    """With a budget of one read, events and continuations meet all the time."""
    for name, value in BUDGETS[budget].items():
        setattr(engine, name, value)
    pairs = [Relayed(engine, buffers=buffers) for _ in range(3)]
    total = 400_000 if buffers else 3_000_000

    def send(sock: Any, data: list[bytes]) -> None:
        for number, chunk in enumerate(data):
            sock.sendall(chunk)
            if number % 50 == 0:
                gevent.sleep(0)
        sock.shutdown(socket.SHUT_WR)

    jobs: list[Callable[[], Any]] = []
    for number, pair in enumerate(pairs):
        up, down = chunks(number, total, 200_000), chunks(number + 100, total, 200_000)
        jobs += [lambda s=pair.client, d=up: send(s, d), lambda s=pair.upstream, d=up: read_all(s) == b"".join(d)]
        jobs += [lambda s=pair.upstream, d=down: send(s, d), lambda s=pair.client, d=down: read_all(s) == b"".join(d)]
    results = run(*jobs)
    assert [result for result in results if result is not None] == [True] * 6
    for pair in pairs:
        ending, *counts = pair.owner.ending()
        assert ending.is_clean
        assert counts == [total, total]
    assert engine.free_pipes == engine.pipes
    assert engine.faults == 0


def test_bulk_is_spliced_and_calm_is_not(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    data = b"".join(chunks(1, 12_000_000, 65536))
    for _ in range(2):  # bulk, calm, bulk, calm
        received = run(lambda: pair.client.sendall(data), lambda: exactly(pair.upstream, len(data)))[1]
        assert received == data
        assert engine.pipes == 1
        pair.client.sendall(b"calm")
        assert pair.upstream.recv(10) == b"calm"
        until(lambda: engine.free_pipes == 1)
        pair.check()


def exactly(sock: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += sock.recv(size - len(data))
    return bytes(data)


def test_a_transfer_that_stops_lends_its_pipe_to_others(engine: relay.Engine) -> None:
    engine.max_pipes = 1
    pair = Relayed(engine)
    data = bytes(8_000_000)
    run(lambda: pair.client.sendall(data), lambda: exactly(pair.upstream, len(data)))
    assert engine.pipes == 1
    list(engine.sweep(0))
    list(engine.sweep(1))
    assert engine.free_pipes == 1


def test_more_transfers_than_pipes(engine: relay.Engine) -> None:
    engine.max_pipes = 1
    data = b"".join(chunks(2, 5_000_000, 65536))
    jobs: list[Callable[[], Any]] = []
    for pair in [Relayed(engine) for _ in range(4)]:
        jobs += [lambda p=pair: p.client.sendall(data), lambda p=pair: exactly(p.upstream, len(data)) == data]
    assert run(*jobs)[1::2] == [True] * 4
    assert engine.pipes == 1


def test_no_big_pipe_may_be_had(engine: relay.Engine) -> None:
    """The kernel refuses F_SETPIPE_SZ; here because of the size, usually because the user's allowance is used up."""
    engine.pipe_size = -1
    pair = Relayed(engine)
    before = open_descriptors()
    data = b"".join(chunks(3, 5_000_000, 65536))
    while engine.max_pipes:  # it asks for one behind some full reads in a row, of which there may be none
        assert run(lambda: pair.client.sendall(data), lambda: exactly(pair.upstream, len(data)))[1] == data
    assert engine.pipes == 0
    assert open_descriptors() == before


@pytest.mark.parametrize("size", [5, 8_000_000])
def test_early_bytes_go_first(engine: relay.Engine, size: int) -> None:
    early = b"".join(chunks(4, size, 65536))
    pair = Relayed(engine, early, before=lambda pair: pair.client.sendall(b"then this"))
    assert exactly(pair.upstream, size + 9) == early + b"then this"
    pair.check()
    pair.close()
    assert pair.owner.ending()[1:] == (size + 10, 1)


@pytest.mark.parametrize("pipes", [0, 32])
@pytest.mark.parametrize("side", ["client", "upstream"])
def test_a_slow_reader_stops_the_sender(engine: relay.Engine, side: str, pipes: int) -> None:
    engine.max_pipes = pipes
    pair = Relayed(engine, buffers=SMALL)
    sender, reader = (pair.client, pair.upstream) if side == "client" else (pair.upstream, pair.client)
    tracemalloc.start()
    try:
        sent = fill(sender)
        assert tracemalloc.get_traced_memory()[0] < 150_000
    finally:
        tracemalloc.stop()
    # Four small socket buffers (the kernel doubles them), one buffer of ours and one pipe.
    assert sent < 4 * 4 * SMALL + 65536 + ((1 << 20) if pipes else 0)
    (source,) = {pair.client, pair.upstream} - {sender}
    assert source is reader
    reader.sendall(b"the other way is free")
    assert sender.recv(100) == b"the other way is free"
    assert len(exactly(reader, sent)) == sent
    pair.check()


def test_what_is_left_when_the_budget_is_used_up_needs_no_new_event(engine: relay.Engine) -> None:
    engine.reads_a_turn = engine.splices_a_turn = 1
    for size in (300_000, 3_000_000):
        pair = Relayed(engine)
        job = run(lambda p=pair, s=size: p.client.sendall(bytes(s)), lambda p=pair, s=size: exactly(p.upstream, s))
        assert len(job[1]) == size


def test_a_fin_behind_data_needs_no_new_event(engine: relay.Engine) -> None:
    for size in (1, 65536, 65536 * 4, 65536 * 40):
        pair = Relayed(engine)

        def send(pair: Relayed = pair, size: int = size) -> None:
            pair.client.sendall(bytes(size))
            pair.client.close()

        assert len(run(send, lambda p=pair: read_all(p.upstream))[1]) == size


def test_more_events_than_a_batch(engine: relay.Engine) -> None:
    pairs = [Relayed(engine) for _ in range(300)]
    for pair in pairs:
        pair.client.sendall(b"x")
        pair.upstream.sendall(b"y")
    for pair in pairs:
        assert pair.upstream.recv(10) == b"x"
        assert pair.client.recv(10) == b"y"
        pair.close()
    until(lambda: engine.pairs == 0)


# -------------------------------------------------------------------- limits and the end of the program


def test_idle_timeout_counts_from_the_last_byte(engine: relay.Engine) -> None:
    pair = Relayed(engine, idle_timeout=10)
    list(engine.sweep(100))
    list(engine.sweep(109.9))
    pair.check()
    list(engine.sweep(110.5))
    list(engine.sweep(120.4))
    assert not pair.owner.told
    list(engine.sweep(120.5))
    assert pair.owner.ending() == (Ending.IDLE_TIMEOUT, 1, 1)
    assert was_reset(pair.client)
    assert was_reset(pair.upstream)


@pytest.mark.parametrize("side", ["client", "upstream"])
def test_what_one_side_has_closed_ends_sooner(engine: relay.Engine, side: str) -> None:
    """Counted from the close, or from the last byte after it; nothing else has a shorter life by it."""
    engine.half_close_timeout = 10
    pair, whole = Relayed(engine, idle_timeout=100), Relayed(engine, idle_timeout=100)
    gone, other = (pair.client, pair.upstream) if side == "client" else (pair.upstream, pair.client)
    list(engine.sweep(100))
    list(engine.sweep(150))
    gone.shutdown(socket.SHUT_WR)
    assert other.recv(1) == b""
    list(engine.sweep(151))
    list(engine.sweep(160))
    assert not pair.owner.told
    other.sendall(b"x")
    assert gone.recv(1) == b"x"
    list(engine.sweep(161))
    list(engine.sweep(170.9))
    assert not pair.owner.told
    list(engine.sweep(171))
    assert pair.owner.ending()[0] == Ending.HALF_CLOSE_TIMEOUT
    assert was_reset(gone)
    assert not whole.owner.told
    list(engine.sweep(200))
    assert whole.owner.ending()[0] == Ending.IDLE_TIMEOUT


def stays_unread(fd: int) -> bool:
    """Whether bytes wait there that the relay does not read, however often it has its turn."""
    for _ in range(50):
        gevent.sleep(0.001)
        if not unread(fd):
            return False
    return True


@pytest.mark.parametrize("splicing", [False, True])
def test_a_close_behind_bytes_that_nobody_takes_is_seen(engine: relay.Engine, splicing: bool) -> None:
    """Nothing is read any more, the FIN neither; without a close it is the idle timeout's business."""
    engine.half_close_timeout = 10
    if not splicing:
        engine.max_pipes = 0
    pair, whole = Relayed(engine, idle_timeout=100), Relayed(engine, idle_timeout=100)
    for each in (pair, whole):
        while not stays_unread(each.fds[0]):  # more, and the FIN would stay on the client's own side
            each.client.send(bytes(65536))
    list(engine.sweep(100))
    list(engine.sweep(150))
    pair.client.shutdown(socket.SHUT_WR)
    until(lambda: has_gone(pair.fds[0]))
    list(engine.sweep(151))
    list(engine.sweep(151))  # the first may still have found bytes that the kernel took meanwhile
    list(engine.sweep(160.9))
    assert not pair.owner.told
    list(engine.sweep(161))
    assert pair.owner.ending()[0] == Ending.HALF_CLOSE_TIMEOUT
    assert not whole.owner.told


def test_an_idle_timeout_that_is_shorter_still_holds(engine: relay.Engine) -> None:
    engine.half_close_timeout = 100
    pair = Relayed(engine, idle_timeout=10)
    pair.client.shutdown(socket.SHUT_WR)
    assert pair.upstream.recv(1) == b""
    list(engine.sweep(100))
    list(engine.sweep(110))
    assert pair.owner.ending()[0] == Ending.IDLE_TIMEOUT


def test_a_sweep_sets_tcp_to_watch_over_the_receiver(engine: relay.Engine) -> None:
    """Not earlier: most connections are over by then, and spare five system calls."""
    pair = Relayed(engine, idle_timeout=90)
    ours = os.dup(pair.fds[1])
    with socket.socket(fileno=ours) as sock:
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        list(engine.sweep(100))
        for level, name, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 90_000),
        ):
            assert sock.getsockopt(level, name) == value


def test_an_ended_pair_leaves_no_work_for_the_garbage_collector(engine: relay.Engine) -> None:
    def come_and_go() -> weakref.ref[Owner]:
        pair = Relayed(engine)
        pair.check()
        pair.close()
        until(lambda: pair.owner.told)
        return weakref.ref(pair.owner)

    gc.collect()
    gc.disable()
    try:
        gone = [come_and_go() for _ in range(3)]
        assert [owner() for owner in gone] == [None] * 3
    finally:
        gc.enable()


def test_bytes_that_nobody_takes_are_no_progress(engine: relay.Engine) -> None:
    pair = Relayed(engine, idle_timeout=10)
    fill(pair.client)
    until(lambda: unread(pair.fds[0]))
    list(engine.sweep(100))
    pair.client.settimeout(0)
    with contextlib.suppress(BlockingIOError):  # the kernel may find room for them
        pair.client.send(b"more")
    list(engine.sweep(110))
    assert pair.owner.ending()[0] == Ending.IDLE_TIMEOUT


def test_sweep_lets_others_run_and_bears_changes_meanwhile(engine: relay.Engine) -> None:
    pairs = [Relayed(engine, idle_timeout=10) for _ in range(600)]
    list(engine.sweep(0))
    steps = 0
    for _ in engine.sweep(10):
        if not steps:
            for pair in pairs[::2]:
                pair.close()
            until(lambda: engine.pairs <= 300)
        steps += 1
    assert steps >= 2
    assert engine.pairs == 0
    assert all(len(pair.owner.told) == 1 for pair in pairs)
    for pair in pairs:
        pair.close()


def test_abort_all(engine: relay.Engine) -> None:
    pairs = [Relayed(engine) for _ in range(3)]
    pairs[0].check()
    fill(pairs[1].client)
    engine.abort_all(Ending.DRAIN_TIMEOUT)
    for pair in pairs:
        assert pair.owner.ending()[0] == Ending.DRAIN_TIMEOUT
        assert was_reset(pair.client)
        assert was_reset(pair.upstream)
    engine.abort_all(Ending.DRAIN_TIMEOUT)
    gevent.sleep(0)
    assert all(len(pair.owner.told) == 1 for pair in pairs)
    assert engine.free_pipes == engine.pipes


def test_abort_one(engine: relay.Engine) -> None:
    pairs = [Relayed(engine) for _ in range(3)]
    assert engine.abort(pairs[1].owner, Ending.CLOSED_BY_OPERATOR)
    assert pairs[1].owner.ending()[0] == Ending.CLOSED_BY_OPERATOR
    assert was_reset(pairs[1].client)
    assert was_reset(pairs[1].upstream)
    assert not engine.abort(pairs[1].owner, Ending.CLOSED_BY_OPERATOR)
    for pair in (pairs[0], pairs[2]):
        pair.check()
        pair.close()


# -------------------------------------------------------------------- faults


FAULTS = [RuntimeError("a bug"), OSError(5, "a bug"), BlockingIOError(11, "a bug"), Timeout(1)]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("how", ["closed", "reset", "swept", "joined"])
def test_an_owner_that_raises_costs_nobody_anything(
    engine: relay.Engine, quiet: list[Any], how: str, error: BaseException
) -> None:
    bystander = Relayed(engine)
    pair = Relayed(engine, owner=Owner(error), idle_timeout=1 if how == "swept" else 1e9)
    before = open_descriptors()
    pair.client.sendall(b"x")  # so that the bystander's event may come in the same batch
    bystander.client.sendall(b"z")
    if how == "closed":
        pair.close()
    elif how == "swept":
        list(engine.sweep(0))
        list(engine.sweep(1000))
    elif how == "reset":
        reset(pair.client)
    else:
        pair.close()
        late = Relayed(engine, owner=Owner(error), before=lambda late: (reset(late.client), reset(late.upstream)))
        assert late.owner.ending()
    assert pair.owner.ending()
    assert bystander.upstream.recv(10) == b"z"
    bystander.check()
    assert engine.faults == len(quiet) == (2 if how == "joined" else 1)
    pair.close()
    assert open_descriptors() < before


@pytest.mark.parametrize("handler", ["works", "raises"])
@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_callback_or_greenlet_that_raises_costs_nobody_anything(
    engine: relay.Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException, handler: str
) -> None:
    def handle(*_: object) -> None:
        if handler == "raises":
            raise ValueError("standard error is gone")

    monkeypatch.setattr(get_hub(), "handle_error", handle)
    bystander = Relayed(engine)
    bystander.check()
    (peer, sock), (peer2, sock2) = tcp_pair(), tcp_pair()
    for fd in (sock.fileno(), sock2.fileno()):
        engine.register(fd)
    gevent.sleep(0.01)

    def dies() -> None:
        engine.wait(sock2.fileno())
        raise error

    def raises(events: int) -> None:
        raise error

    start(dies)
    engine.watch(sock.fileno(), raises)
    peer.sendall(b"x")
    peer2.sendall(b"x")
    bystander.client.sendall(b"z")  # all three in one batch, this last
    assert bystander.upstream.recv(10) == b"z"
    until(lambda: engine.faults == 2)
    bystander.check()
    for each in (sock, sock2):
        engine.close(each)
    peer.close()
    peer2.close()


def test_a_dead_watcher_is_started_again(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    pair.check()
    engine._watcher.stop()
    pair.client.sendall(b"x")
    list(engine.sweep(0))
    assert engine.rearmed == 1
    assert pair.upstream.recv(10) == b"x"
    list(engine.sweep(1))
    assert engine.rearmed == 1


def test_a_join_that_cannot_register_is_told_as_an_ending(engine: relay.Engine, quiet: list[Any]) -> None:
    def register_the_client_already(pair: Relayed) -> None:
        engine.register(pair.fds[0])

    pair = Relayed(engine, before=register_the_client_already)
    assert pair.owner.ending() == (Ending.INTERNAL_ERROR, 0, 0)
    assert was_reset(pair.client)
    assert was_reset(pair.upstream)
    assert (engine.pairs, engine.faults) == (0, 1)


# -------------------------------------------------------------------- waiters, watchers, descriptors


def start(work: Callable[[], object]) -> None:
    """Run it in a bare greenlet beneath the hub, as `crew` does, up to where it waits."""
    get_hub().loop.run_callback(greenlet(work, get_hub()).switch)
    gevent.sleep(0)


class Pooled:
    """A greenlet that lives twice, as those of `crew` do: its first life's socket must not wake the second."""

    def __init__(self, first: Callable[[], object]) -> None:
        self.first = first
        self.woken_by: list[object] = []
        self.second_life = False
        start(self.live)

    def live(self) -> None:
        self.first()
        self.second_life = True
        while True:
            self.woken_by.append(get_hub().switch())


def test_a_waiter_that_timed_out_is_not_woken_in_its_next_life(engine: relay.Engine) -> None:
    peer, sock = tcp_pair()
    engine.register(sock.fileno())
    gevent.sleep(0.01)

    def wait_in_vain() -> None:
        with Timeout(0.01, False):
            engine.wait(sock.fileno())

    pooled = Pooled(wait_in_vain)
    until(lambda: pooled.second_life)
    peer.sendall(b"x")
    gevent.sleep(0.01)
    bystander = Relayed(engine)
    bystander.check()
    assert pooled.woken_by == []
    engine.close(sock)
    peer.close()


def test_a_waiter_whose_socket_was_closed_leaves_its_successor_alone(engine: relay.Engine) -> None:
    (_, sock), (peer2, sock2) = tcp_pair(), tcp_pair()
    fd = sock.fileno()
    engine.register(fd)
    gevent.sleep(0.01)
    done: list[bool] = []

    def wait_in_vain() -> None:
        with Timeout(0.01, False):
            engine.wait(fd)
        done.append(True)

    start(wait_in_vain)
    engine.close(sock)
    assert os.dup2(sock2.fileno(), fd) == fd
    sock2.close()
    successor = RawSocket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
    events: list[int] = []
    engine.register(fd)
    engine.watch(fd, events.append)
    until(lambda: done)
    peer2.sendall(b"x")
    until(lambda: any(event & 1 for event in events))
    engine.close(successor)


def test_wait_returns_the_events_and_only_to_one_who_waits(engine: relay.Engine) -> None:
    peer, sock = tcp_pair()
    engine.register(sock.fileno())
    gevent.sleep(0.01)
    gevent.spawn(peer.sendall, b"x")
    assert engine.wait(sock.fileno()) & 1
    peer.sendall(b"y")
    gevent.sleep(0.01)  # nobody waits: dropped
    switch = getcurrent().switch
    gevent.get_hub().loop.run_callback(switch)
    assert engine.wait(sock.fileno()) == 0  # woken by something else: spurious, no events
    engine.close(sock)
    peer.close()


def test_a_wait_passes_over_events_that_it_does_not_want(engine: relay.Engine) -> None:
    """Whoever waits for bytes is not woken because there is room to send, as there is from the beginning."""
    (peer, sock), (peer2, sock2) = tcp_pair(), tcp_pair()
    engine.register(sock.fileno())
    engine.register(sock2.fileno())
    told: list[int] = []
    gevent.spawn(lambda: told.append(engine.wait(sock.fileno(), relay.HEARD)))
    assert engine.wait(sock2.fileno()) == relay.select.EPOLLOUT  # in the same batch
    assert told == []
    peer.sendall(b"x")
    until(lambda: told, what="the bytes wake it")
    assert told[0] & relay.select.EPOLLIN
    gevent.spawn(lambda: told.append(engine.wait(sock2.fileno(), relay.HEARD)))
    peer2.close()
    until(lambda: len(told) == 2, what="the end wakes it")
    assert told[1] & relay.select.EPOLLRDHUP
    for one in (sock, sock2):
        engine.close(one)
    peer.close()


def test_a_descriptor_is_not_reused_within_a_batch(engine: relay.Engine) -> None:
    """The first event's callback closes the second's socket and opens another, which must not get that event."""
    (peer, sock), (peer2, sock2) = tcp_pair(), tcp_pair()
    engine.register(sock.fileno())
    engine.register(sock2.fileno())
    gevent.sleep(0.01)
    strays: list[int] = []
    opened: list[RawSocket] = []
    old = sock2.fileno()

    def close_and_open(events: int) -> None:
        engine.close(sock2)
        os.fstat(old)  # it is still open
        opened.append(RawSocket(socket.AF_INET, socket.SOCK_DGRAM, 0))
        engine.register(opened[0].fileno())
        engine.watch(opened[0].fileno(), strays.append)

    engine.watch(sock.fileno(), close_and_open)
    engine.watch(sock2.fileno(), strays.append)
    peer.sendall(b"x")
    peer2.sendall(b"x")
    until(lambda: opened)
    assert sock2.fileno() == -1  # closed when the batch was over
    assert not any(events & 1 for events in strays)
    assert engine.faults == 0
    engine.close(opened[0])
    engine.close(sock)
    peer.close()
    peer2.close()


def test_a_pair_that_ends_within_a_batch_keeps_its_descriptors_until_the_end(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    peer, sock = tcp_pair()
    engine.register(sock.fileno())
    pair.check()
    opened: list[RawSocket] = []

    def abort(events: int) -> None:
        if opened:
            return
        engine.abort_all(Ending.DRAIN_TIMEOUT)
        opened.append(RawSocket(socket.AF_INET, socket.SOCK_DGRAM, 0))
        for fd in pair.fds:
            os.fstat(fd)  # they are still open

    engine.watch(sock.fileno(), abort)
    peer.sendall(b"x")
    pair.client.sendall(b"x")
    pair.upstream.sendall(b"x")
    until(lambda: opened)
    assert pair.owner.ending() == (Ending.DRAIN_TIMEOUT, 1, 1)
    assert engine.faults == 0
    assert was_reset(pair.client)
    engine.close(opened[0])
    engine.close(sock)
    peer.close()


def test_a_closed_socket_can_be_neither_waited_for_nor_watched(engine: relay.Engine) -> None:
    _, sock = tcp_pair()
    engine.register(sock.fileno())
    engine.close(sock)
    with pytest.raises(OSError, match="Bad file descriptor"):
        engine.wait(sock.fileno())
    engine.watch(sock.fileno(), pytest.fail)
    engine.watch(sock.fileno(), None)
    Relayed(engine).check()


def test_close_with_reset(engine: relay.Engine) -> None:
    for wanted in (True, False):
        peer, sock = tcp_pair()
        engine.register(sock.fileno())
        engine.close(sock, reset=wanted)
        engine.close(sock)
        assert was_reset(peer) is wanted


def test_an_owner_may_use_the_engine(engine: relay.Engine) -> None:
    """It is told while the engine settles things: what it starts must work all the same."""
    others = [Relayed(engine) for _ in range(2)]
    started: list[Relayed] = []

    class Restless(Owner):
        def ended(self, ending: Ending, up: int, down: int) -> None:
            super().ended(ending, up, down)
            engine.abort_all(Ending.DRAIN_TIMEOUT)
            started.append(Relayed(engine))

    pair = Relayed(engine, owner=Restless())
    pair.check()
    pair.close()
    assert pair.owner.ending()[0].is_clean
    assert [other.owner.ending()[0] for other in others] == [Ending.DRAIN_TIMEOUT] * 2
    started[0].check()
    assert engine.pairs == 1


# -------------------------------------------------------------------- what upstream says first


@pytest.mark.parametrize("first", [b"421 4.7.0 not now\r\n", b"554-no\r\n554 never\r\n", b"5"])
def test_the_owner_hears_what_may_be_a_refusal_and_the_bytes_pass(engine: relay.Engine, first: bytes) -> None:
    pair = Relayed(engine)
    pair.upstream.sendall(first)
    pair.upstream.close()
    assert read_all(pair.client) == first
    assert pair.owner.first == first


def test_a_refusal_byte_by_byte_is_heard_as_far_as_its_code(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    greeting = b"450 later\r\n"
    for number in range(len(greeting)):
        pair.upstream.sendall(greeting[number : number + 1])
        assert pair.client.recv(1) == greeting[number : number + 1]
    assert pair.owner.first == b"450 "


def test_what_was_there_at_the_join_is_heard(engine: relay.Engine) -> None:
    pair = Relayed(engine, before=lambda pair: pair.upstream.sendall(b"554 no\r\n"))
    assert pair.client.recv(100) == b"554 no\r\n"
    assert pair.owner.first == b"554 no\r\n"


def test_nothing_else_is_heard(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    pair.client.sendall(b"421 is what the client says")
    assert pair.upstream.recv(100)
    pair.upstream.sendall(b"220 hello\r\n")
    assert pair.client.recv(100)
    pair.upstream.sendall(b"554 later on\r\n")
    assert pair.client.recv(100)
    assert pair.owner.first == b""


def test_no_more_than_a_line_is_copied(engine: relay.Engine) -> None:
    pair = Relayed(engine)
    pair.upstream.sendall(b"5" * 60_000)
    pair.upstream.close()
    assert len(read_all(pair.client)) == 60_000
    assert len(pair.owner.first) <= 256


def test_an_owner_that_fails_to_hear_costs_nobody_else(engine: relay.Engine, quiet: list[Any]) -> None:
    class Deaf(Owner):
        def heard(self, data: bytes) -> None:
            raise ValueError("a bug")

    other = Relayed(engine)
    pair = Relayed(engine, owner=Deaf())
    pair.upstream.sendall(b"554 no\r\n")
    until(lambda: quiet, what="the fault is told")
    other.check()


# -------------------------------------------------------------------- what it costs


def test_memory_of_an_idle_relay(engine: relay.Engine) -> None:
    """Bytes a relay without its owner and sockets: Python's own, and malloc's beneath (the C structs)."""
    number = 500
    owner = Owner()
    Relayed(engine, owner=owner)  # grows tables
    sockets = [(tcp_pair(), tcp_pair()) for _ in range(number)]
    for _, (_, theirs) in sockets:
        engine.register(theirs.fileno())
    gc.collect()
    traced = beneath = 0.0
    for start in (0, number // 2):  # one after the other, since tracemalloc itself allocates
        if start:
            tracemalloc.start()
        before = malloced()
        for (_, ours), (_, theirs) in sockets[start : start + number // 2]:
            engine.join(ours, theirs, owner, 60.0, b"", False, False, True)
        if start:
            traced = tracemalloc.get_traced_memory()[0] / (number // 2)
            tracemalloc.stop()
        else:
            beneath = (malloced() - before) / (number // 2)
    for (client, _), (upstream, _) in sockets:
        client.sendall(b"EHLO")
        assert upstream.recv(10) == b"EHLO"
    assert engine.pairs == number + 1
    assert traced + beneath < (300 if engine.name == "compiled" else 950)


def test_an_owner_is_let_go(engine: relay.Engine) -> None:
    class Weak(Owner):
        pass

    owner: Owner | None = Weak()
    reference = weakref.ref(owner)
    pair = Relayed(engine, owner=owner)
    pair.check()
    pair.close()
    pair.owner.ending()
    owner = None
    del pair
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("kind", ENGINES, ids=lambda kind: kind.name)
def test_no_leak_over_many_sessions(kind: type[relay.Engine]) -> None:
    script = Path(__file__).with_name("relay_sessions.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", script, kind.name], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout)
    assert left.pop("malloced") < 100_000  # 50 bytes a session; a pair that is not freed has 200
    assert left == {"descriptors": 0, "greenlets": 0, "pairs": 0, "faults": 0}
    assert done.stderr == ""


# -------------------------------------------------------------------- which engine


def test_which_engine_is_made() -> None:
    assert relay.engine_name() == ENGINES[-1].name
    engine = relay.make_engine()
    assert engine.name == ENGINES[-1].name
    engine.stop()


def test_without_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "proxy.net._fastrelay", None)
    monkeypatch.delattr("proxy.net._fastrelay", raising=False)
    assert relay.engine_name() == "python"
    engine = relay.make_engine()
    assert type(engine) is relay.Engine
    engine.stop()
