"""The control socket of a program of several processes: each command reaches the process that it is about, and one that
dies or hangs takes no answer away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.clients import read_all, send, socks5
from tests.e2e.control.test_control import ask, ctl
from tests.e2e.status.test_one_view import SOURCES, World, running
from tests.e2e.status.test_status import metrics, view
from tests.program import ROOT
from tests.waiting import wait_for


@pytest.fixture
def world() -> Iterator[World]:
    with running(2) as world:
        yield world


def hold(world: World, count: int = 6) -> list[socket.socket]:
    """Open connections, some in each worker."""
    held = [socks5(world.proxy.socks5, world.good.endpoint, SOURCES[0]) for _ in range(count)]
    while len({row["id"] % 10 for row in world.rows("connections")}) < 2:
        held.append(socks5(world.proxy.socks5, world.good.endpoint, SOURCES[0]))
    return held


def connected_to(world: World, worker: int) -> tuple[socket.socket, int]:
    """A connection in this worker, and its number."""
    others = []
    try:
        while True:
            sock = socks5(world.proxy.socks5, world.good.endpoint, SOURCES[0])
            port = sock.getsockname()[1]
            (number,) = (row["id"] for row in world.rows("connections") if row["client"].endswith(f":{port}"))
            if number % 10 == worker:
                return sock, number
            others.append(sock)
    finally:
        for each in others:
            each.close()


def pid_of(world: World, worker: int) -> int:
    (row,) = world.rows("workers", str(worker))
    pid: int = row["pid"]
    return pid


def test_a_connection_is_closed_wherever_it_is(world: World) -> None:
    for worker in (1, 2):
        sock, number = connected_to(world, worker)
        with sock:
            assert world.ctl("close", "connection", str(number))["ok"]
            with contextlib.suppress(ConnectionResetError):
                read_all(sock)
            world.proxy.wait_line(rf"connection id={number} .*outcome=closed_by_operator")
        code, out, err = ctl(world.control, "close", "connection", str(number))
        assert (code, out) == (78, "")
        assert f"there is no connection {number} (any more)" in err


def test_it_is_explained_which_worker_has_connections_in_mode_smtp() -> None:
    with running(2, "mode smtp") as world:
        to = f"{world.mx.endpoint[0]}:{world.mx.endpoint[1]}"
        with socks5(world.proxy.socks5, world.mx.endpoint, SOURCES[0]) as sock:
            assert send(sock, b"x\r\n")[0] == 250
        wait_for(lambda: metrics(world.proxy)["remote_connections", "cached"] == 1)
        (line,) = [line for line in world.ctl("explain", SOURCES[0], to)["lines"] if line.startswith("process")]
        number = int(line.split("worker ")[1][0])
        os.kill(pid_of(world, number), signal.SIGKILL)  # it was that one's
        wait_for(lambda: metrics(world.proxy)["remote_connections", "cached"] == 0)


def test_cached_connections_of_all_are_dropped() -> None:
    with running(2, "mode smtp") as world:
        for number in range(5, 15):  # which worker keeps a connection follows from its source and destination
            with socks5(world.proxy.socks5, world.mx.endpoint, f"127.0.0.{number}") as sock:
                assert send(sock, b"x\r\n")[0] == 250
        wait_for(lambda: metrics(world.proxy)["remote_connections", "cached"] == 10)
        assert sum(row["connections"] for row in world.rows("cached")) == 10
        for number in range(5, 15):
            assert world.ctl("drop", "cached", f"127.0.0.{number}")["lines"] == ["1 connections closed"]
        assert metrics(world.proxy)["remote_connections", "cached"] == 0
        assert world.ctl("drop", "cached", "127.0.0.5")["lines"] == ["0 connections closed"]


def test_steps_of_all_are_logged_for_a_time(world: World) -> None:
    assert world.ctl("log", "verbose", "instance=mta-1")["ok"]
    (row,) = world.rows("overrides")
    for worker in (1, 2):
        sock, number = connected_to(world, worker)
        with sock:
            world.proxy.wait_line(rf"step id={number} ")
    assert world.ctl("end", "override", row["id"])["ok"]
    assert world.rows("overrides") == []
    for worker in (1, 2):
        sock, number = connected_to(world, worker)
        sock.close()
        world.proxy.wait_line(rf"connection id={number} ")
        assert not world.proxy.matching(rf"step id={number} ")


def test_a_worker_that_is_new_logs_as_the_others(world: World) -> None:
    world.ctl("log", "verbose")
    before = pid_of(world, 1)
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: pid_of(world, 1) not in (0, before))
    sock, number = connected_to(world, 1)
    with sock:
        world.proxy.wait_line(rf"step id={number} ")


def test_a_trace_has_the_steps_of_all(world: World) -> None:
    words = ["ctl", "--socket", world.control, "trace", "instance=mta-1", "for", "60s"]
    lines: list[str] = []
    with subprocess.Popen(
        [sys.executable, str(ROOT / "greenarrow_proxy.py"), *words], stdout=subprocess.PIPE, text=True
    ) as tracing:
        assert tracing.stdout is not None
        reader = threading.Thread(target=lines.extend, args=(tracing.stdout,))
        reader.start()

        def has_both() -> bool:
            """Nobody says when it has begun."""
            for worker in (1, 2):
                connected_to(world, worker)[0].close()
            return {int(line.split()[0]) % 10 for line in list(lines)} == {1, 2}

        wait_for(has_both)
        tracing.terminate()
        reader.join(30)
    assert all(" mta-1 " in line for line in lines)


def test_one_that_hangs_is_named_and_the_others_answer(world: World) -> None:
    held = hold(world)
    stopped = pid_of(world, 1)
    rows = world.rows("connections")
    os.kill(stopped, signal.SIGSTOP)
    try:
        answer = world.ctl("show", "connections")
        assert answer["lines"] == ["worker 1 does not answer: without it"]
        assert [row["id"] for row in answer["rows"]] == [row["id"] for row in rows if row["id"] % 10 == 2]
        ours = next(row["id"] for row in rows if row["id"] % 10 == 1)
        refused = ask(world.control, json.dumps({"command": ["close", "connection", str(ours)]}).encode() + b"\n")
        assert (refused["ok"], refused["lines"]) == (False, ["worker 1 does not answer: without it"])
    finally:
        os.kill(stopped, signal.SIGCONT)
    # It was only slow: all of it is there again, and the connection is closed as it was asked to be.
    wait_for(lambda: "lines" not in world.ctl("show", "connections"))
    world.proxy.wait_line(rf"connection id={ours} .*outcome=closed_by_operator")
    left = {row["id"] for row in rows} - {ours}
    assert {row["id"] for row in world.rows("connections")} == left
    assert pid_of(world, 1) == stopped
    for sock in held:
        sock.close()


def test_one_that_hangs_for_long_is_not_waited_for_and_is_trouble(world: World) -> None:
    """Until the master kills it."""
    held = hold(world)
    stopped = pid_of(world, 1)
    wait_for(lambda: view(world.proxy)["connections"]["open"] == len(held))
    os.kill(stopped, signal.SIGSTOP)
    (trouble,) = wait_for(lambda: world.rows("trouble"))
    assert trouble["kind"] == "worker_silent"
    answers = [world.ctl("show", table) for table in ("receivers", "events", "logins", "connections")]
    assert {tuple(answer["lines"]) for answer in answers} == {("worker 1 does not answer: without it",)}
    assert metrics(world.proxy)["worker_up", "1", "worker"] == 0
    assert metrics(world.proxy)["worker_up", "2", "worker"] == 1
    (status,) = world.rows("status")  # what it said last is still shown
    assert status["connections.open"] == len(held)
    wait_for(lambda: pid_of(world, 1) not in (0, stopped), 60.0)
    (row,) = world.rows("workers", "1")
    assert (row["restarts"], row["died_lately"]) == (1, 1)
    wait_for(lambda: world.rows("trouble") == [])
    for sock in held:
        sock.close()


def test_what_the_dead_have_counted_stays(world: World) -> None:
    held = hold(world, 20)
    first = max(row["id"] for row in world.rows("connections"))
    for sock in held:
        sock.close()
    wait_for(lambda: metrics(world.proxy)["remote_connections", "active"] == 0)
    wait_for(lambda: sum(view(world.proxy)["counters"]["ended"].values()) == len(held))
    before = metrics(world.proxy)
    for worker in (1, 2):
        pid = pid_of(world, worker)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda worker=worker, pid=pid: pid_of(world, worker) not in (0, pid))
        (row,) = world.rows("workers", str(worker))
        assert row["restarts"] == 1
        assert row["died"]
        after = metrics(world.proxy)
        for key, value in before.items():
            if not key[0].startswith("worker_") and key[0].endswith(("_total", "_count", "_bucket", "_sum")):
                assert after[key] >= value, key
        assert after["worker_restarts_total", str(worker)] == 1
    (trouble,) = world.rows("trouble")
    assert trouble["kind"] == "workers_dying"
    sock, number = connected_to(world, 1)
    sock.close()
    assert number > first
    (figures,) = world.rows("status")
    assert figures["connections.open"] == 0


def test_the_page_of_several_has_a_table_of_them(world: World) -> None:
    wait_for(lambda: all(row["memory"] for row in world.rows("workers")))
    shown = view(world.proxy)
    assert [(row["number"], row["role"]) for row in shown["workers"]] == [(0, "master"), (1, "worker"), (2, "worker")]
    for row in shown["workers"]:
        assert row["memory"] > 1e6
        assert 0 < row["descriptors"] < row["most_descriptors"]
        assert os.path.exists(f"/proc/{row['pid']}")
    assert shown["workers"][0]["pid"] == world.proxy.pid
    found = metrics(world.proxy)
    total = found["process_resident_memory_bytes",]
    assert total > 3e6
    assert json.dumps(shown["trouble"]) == "[]"


@pytest.mark.parametrize("workers", [1, 2])
def test_what_leaves_after_an_upgrade_is_in_the_one_view_too(workers: int) -> None:
    with running(workers) as world:
        held = [socks5(world.proxy.socks5, world.good.endpoint, SOURCES[0]) for _ in range(4)]
        before = {row["id"]: row["client"] for row in world.rows("connections")}
        counted = metrics(world.proxy)["accepted_connections_total", "socks5"]
        assert (len(before), counted) == (4, 4)
        world.proxy.upgrade()
        wait_for(lambda: {row["id"]: row["client"] for row in world.rows("connections")} == before)
        assert {row["role"] for row in world.rows("workers")} >= {"master", "leaving"}
        held.append(socks5(world.proxy.socks5, world.good.endpoint, SOURCES[0]))
        now = {row["id"]: row["client"] for row in world.rows("connections")}
        assert len(now) == 5
        assert before.items() <= now.items(), "no number is used twice"
        assert metrics(world.proxy)["accepted_connections_total", "socks5"] == 5
        # A view may be a second old.
        wait_for(lambda: [row["open_connections"] for row in world.rows("listeners", "protocol=socks5")] == [5])
        for number in before:
            assert world.ctl("close", "connection", str(number))["ok"]
        wait_for(lambda: {row["role"] for row in world.rows("workers")} <= {"master", "worker"}, 60.0)
        assert set(now) - set(before) == {row["id"] for row in world.rows("connections")}
        for sock in held:
            sock.close()
