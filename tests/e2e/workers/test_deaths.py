"""Processes that die, hang or starve: each costs its own connections, and another one takes its place."""

from __future__ import annotations

import os
import resource
import signal
import socket
from contextlib import ExitStack

import pytest

from tests import clients
from tests.clients import Refused, dial, exactly, socks5
from tests.e2e.workers.processes import Workers, gone
from tests.sinks import Raw, echo
from tests.waiting import wait_for

ONE = "throttle one {\n    destination 127.0.0.0/8\n    max_concurrent_connections %d\n    wait 20s\n}\n"


class Talks:
    """Clients with a receiver that says again what they say; `of`: by the worker that each came to."""

    def __init__(self, stack, proxy, receiver, each=2):
        self.of = {number: [] for number in range(1, proxy.count + 1)}
        while min(map(len, self.of.values())) < each:
            sock = stack.enter_context(socks5(proxy.socks5, receiver.endpoint))
            self.of[owner(proxy, sock)].append(sock)

    def all(self):
        return [sock for socks in self.of.values() for sock in socks]


def owner(proxy, sock):
    """The worker that has this client's socket: whose descriptor it is, the kernel knows."""
    inode = _inode(sock)
    for number, pid in proxy.pids().items():
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]":
                    return number
            except OSError:
                continue
    raise AssertionError("no worker has it")


def _inode(sock):
    """Of the other end of this connection."""
    ours, theirs = sock.getsockname(), sock.getpeername()
    wanted = f"{_hex(theirs)} {_hex(ours)}"
    with open("/proc/net/tcp") as table:
        return next(line.split()[9] for line in table if wanted in line)


def _hex(address):
    return f"{int.from_bytes(socket.inet_aton(address[0]), 'little'):08X}:{address[1]:04X}"


def talks(sock, text=b"hello"):
    sock.sendall(text)
    return exactly(sock, len(text)) == text


def is_cut(sock):
    sock.settimeout(clients.TIMEOUT)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_killed_worker_costs_its_own_connections_only():
    with Workers() as proxy, Raw(echo) as receiver, ExitStack() as stack:
        there = Talks(stack, proxy, receiver)
        pid = proxy.pids()[1]
        os.kill(pid, signal.SIGKILL)
        assert all(map(is_cut, there.of[1]))
        assert all(map(talks, there.of[2]))
        proxy.replaced(1, pid)
        assert len(proxy.matching(r'^ERROR worker: .* worker=1 .*reason="?signal SIGKILL')) == 1
        again = Talks(stack, proxy, receiver)
        assert all(map(talks, again.all()))
        assert all(map(talks, there.of[2]))
        assert proxy.open_connections() == len(again.all()) + len(there.of[2])


def test_who_waits_in_the_queue_of_a_dead_worker_is_served_by_the_next_one(mx):
    """The sockets are the master's: what the kernel has let in is not lost."""
    with Workers() as proxy, ExitStack() as stack:
        pids = proxy.pids()
        for pid in pids.values():
            os.kill(pid, signal.SIGSTOP)
        waiting = [stack.enter_context(dial(proxy.socks5)) for _ in range(20)]
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
        for sock in waiting:
            sock.sendall(clients.WITH_PASSWORD)
        for sock in waiting:
            assert exactly(sock, 2) == b"\x05\x02"
        for number, pid in pids.items():
            proxy.replaced(number, pid)


def test_places_of_a_dead_worker_go_to_who_waits():
    with Workers(ONE % 4) as proxy, Raw(echo) as receiver, ExitStack() as stack:
        there = [stack.enter_context(socks5(proxy.socks5, receiver.endpoint)) for _ in range(4)]
        owners = [owner(proxy, sock) for sock in there]
        victim = owners[0]
        pid = proxy.pids()[victim]
        # Each knocks at a door of its own until somebody has come to the worker that stays.
        waiting = [stack.enter_context(dial(proxy.socks5)) for _ in range(8)]
        for sock in waiting:
            sock.sendall(clients.WITH_PASSWORD + clients.login() + clients.connect_request(receiver.endpoint))
        stay = [sock for sock in waiting if owner(proxy, sock) != victim]
        assert stay, "all eight came to the same worker"
        for sock in stay:
            assert exactly(sock, 4) == b"\x05\x02\x01\x00"
        os.kill(pid, signal.SIGKILL)
        got = min(len(stay), owners.count(victim))
        wait_for(lambda: sum(map(_is_readable, stay)) == got, what="they have its places")
        proxy.replaced(victim, pid)


def _is_readable(sock):
    sock.settimeout(0)
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False
    finally:
        sock.settimeout(clients.TIMEOUT)


def test_a_worker_that_hangs_is_killed_and_replaced():
    """The master waits for a word from it, by its own count of turns."""
    with Workers() as proxy, Raw(echo) as receiver, ExitStack() as stack:
        there = Talks(stack, proxy, receiver, each=1)
        pid = proxy.pids()[2]
        os.kill(pid, signal.SIGSTOP)
        assert all(map(talks, there.of[1]))
        proxy.wait_line(r"^ERROR worker: .*worker=2 reason=.*said nothing", timeout=90)
        proxy.replaced(2, pid)
        assert all(map(talks, there.of[1]))
        assert all(map(talks, Talks(stack, proxy, receiver, each=1).all()))


def test_a_worker_without_descriptors_serves_whom_it_has_and_a_reload_is_all_or_nothing():
    with Workers("listen_socks5 127.0.1.2:0\n") as proxy, Raw(echo) as receiver, ExitStack() as stack:
        there = Talks(stack, proxy, receiver, each=1)
        pid = proxy.pids()[1]
        limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        # The reserve is lent to what must work: so there are none, even with it.
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, limits[1]))
        why = proxy.bad_hup("workers 2\nlisten_socks5 127.0.1.2:0, 127.0.1.7:0\n")
        assert why
        assert "no descriptor left for its socket" in why[0]
        assert all(map(talks, there.all()))
        assert proxy.pids()[1] == pid
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        proxy.hup("workers 2\nlisten_socks5 127.0.1.2:0, 127.0.1.7:0\n")
        door = proxy.door("socks5", "127.0.1.7")
        assert talks(stack.enter_context(socks5(door, receiver.endpoint)))
        assert all(map(talks, there.all()))


def test_a_worker_that_cannot_start_is_tried_again():
    """It dies at once, again and again; the other one serves, and so does this one when it can."""
    with Workers() as proxy, Raw(echo) as receiver, ExitStack() as stack:
        pid = proxy.pids()[1]
        proxy.status()  # so it has begun, and has read all that it needs
        limits = resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (8, limits[1]))  # no pair of sockets for it
        os.kill(pid, signal.SIGKILL)
        mark = len(proxy.lines)
        proxy.wait_line(r"^ERROR worker: .*worker=1 reason=.*cannot be started: Too many open files", since=mark)
        resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, limits)
        proxy.replaced(1, pid)
        assert all(map(talks, Talks(stack, proxy, receiver, each=1).all()))


def test_a_dead_master_leaves_workers_that_finish_and_end():
    with Workers("drain_timeout 60s\n", exit_code=-signal.SIGKILL) as proxy, Raw(echo) as receiver:
        with ExitStack() as stack:
            there = Talks(stack, proxy, receiver, each=1)
            workers = set(proxy.pids().values())
            door = proxy.socks5
            os.kill(proxy.pid, signal.SIGKILL)
            wait_for(lambda: not _listens(door), what="nothing new is taken")
            assert all(map(talks, there.all()))
        gone(workers)


def test_workers_of_a_dead_master_end_after_the_drain_timeout():
    with Workers("drain_timeout 1s\n", exit_code=-signal.SIGKILL) as proxy, Raw(echo) as receiver, ExitStack() as stack:
        there = Talks(stack, proxy, receiver, each=1)
        workers = set(proxy.pids().values())
        os.kill(proxy.pid, signal.SIGKILL)
        assert all(map(is_cut, there.all()))
        gone(workers)


def _listens(door):
    try:
        dial(door).close()
    except ConnectionRefusedError:
        return False
    return True


def test_a_stop_lets_finish_what_is_open_and_leaves_no_process():
    with Workers("drain_timeout 60s\n") as proxy, Raw(echo) as receiver:
        family = proxy.family()
        assert len(family) == 3
        with ExitStack() as stack:
            there = Talks(stack, proxy, receiver, each=1)
            proxy.term()
            proxy.wait_line(f"^drain: .*open_connections={len(there.all())} ")
            wait_for(lambda: not _listens(proxy.socks5), what="nothing new is taken")
            assert all(map(talks, there.all()))
        proxy.wait_exit()
        proxy.wait_line("^stop: stopped reset_connections=0")
        gone(family)


def test_a_stop_that_takes_too_long_resets_the_rest():
    with Workers("drain_timeout 200ms\n") as proxy, Raw(echo) as receiver, ExitStack() as stack:
        family, there = proxy.family(), Talks(stack, proxy, receiver, each=1)
        proxy.term()
        assert all(map(is_cut, there.all()))
        proxy.wait_exit()
        proxy.wait_line(f"^stop: stopped reset_connections={len(there.all())}")
        assert len(proxy.matching("^connection .*outcome=drain_timeout")) == len(there.all())
        gone(family)


def test_a_second_signal_ends_all_of_it_at_once():
    with Workers("drain_timeout 60s\n", exit_code=1) as proxy, Raw(echo) as receiver, ExitStack() as stack:
        family, there = proxy.family(), Talks(stack, proxy, receiver, each=1)
        proxy.term()
        proxy.wait_line("^drain: ")
        proxy.term()
        proxy.wait_exit()
        proxy.wait_line(f"^WARNING stop: second signal.* open_connections={len(there.all())}")
        gone(family)


def test_twenty_reloads_under_load_cut_and_refuse_nobody():
    with Workers() as proxy, Raw(echo) as receiver, ExitStack() as stack:
        there = Talks(stack, proxy, receiver)
        for number in range(20):
            proxy.hup(f"workers 2\nmax_connections {1000 + number}\nlisten_socks5 127.0.1.2:0")
            with socks5(proxy.socks5, receiver.endpoint) as sock:
                assert talks(sock)
            assert all(map(talks, there.all()))
        proxy.hup("workers 2\nmax_connections 1\n")
        with pytest.raises(Refused):
            socks5(proxy.socks5, receiver.endpoint)
        assert len(set(proxy.pids().values())) == 2
        assert not proxy.matching("^ERROR")
