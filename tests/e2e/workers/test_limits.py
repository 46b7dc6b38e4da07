"""What is limited for the whole proxy, whichever process a client comes to: clients, and wrong secrets."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack

import pytest

from tests import clients
from tests import independent_client as mta
from tests.clients import Refused, dial, exactly, read_all, socks5
from tests.e2e.workers.processes import Workers
from tests.program import SECRET
from tests.sinks import GREETING
from tests.waiting import wait_for


class Crowd(ExitStack):
    """Clients that are served."""

    def __init__(self, proxy, mx):
        super().__init__()
        self.proxy, self.mx = proxy, mx
        self.inside = []

    def enter(self):
        """Whether one more is let in."""
        try:
            sock = socks5(self.proxy.socks5, self.mx.endpoint)
        except Refused:
            return False
        assert exactly(sock, 8) == GREETING
        self.inside.append(self.enter_context(sock))
        return True

    def leave(self):
        self.inside.pop(0).close()

    def wait_for(self, count):
        wait_for(lambda: self.proxy.open_connections() == count, what=f"{count} are open")


def test_max_connections_is_of_all_processes_together(mx):
    """Each process is asked often enough that both are."""
    with Workers("max_connections 7\n") as proxy, Crowd(proxy, mx) as crowd:
        assert [crowd.enter() for _ in range(7)] == [True] * 7
        assert [crowd.enter() for _ in range(12)] == [False] * 12
        for _ in range(10):
            crowd.wait_for(7)
            crowd.leave()
            crowd.wait_for(6)
            assert [crowd.enter(), crowd.enter()] == [True, False]
        crowd.wait_for(7)


def test_native_clients_are_counted_with_the_others(mx):
    with Workers("max_connections 3\n") as proxy, Crowd(proxy, mx) as crowd:
        with mta.channel(proxy.native) as peer:
            assert peer.welcome
            assert [crowd.enter() for _ in range(4)] == [True, True, False, False]
        crowd.wait_for(2)
        assert [crowd.enter(), crowd.enter()] == [True, False]


def test_a_reload_changes_the_limit(mx):
    with Workers("max_connections 2\n") as proxy, Crowd(proxy, mx) as crowd:
        assert [crowd.enter() for _ in range(3)] == [True, True, False]
        for more, count in (("max_connections 5\n", 5), ("", 8), ("max_connections 9\n", 9)):
            proxy.hup(f"workers 2\n{more}")
            while len(crowd.inside) < count:
                assert crowd.enter()
        assert not crowd.enter()
        proxy.hup("workers 2\nmax_connections 4\n")
        assert not crowd.enter()
        while crowd.inside:  # as long as a process has more clients than seats, the others let in what leaves it
            crowd.leave()
        crowd.wait_for(0)
        assert [crowd.enter() for _ in range(5)] == [True] * 4 + [False]


def test_what_a_dead_worker_had_is_free(mx):
    with Workers("max_connections 6\n") as proxy, Crowd(proxy, mx) as crowd:
        while crowd.enter():
            pass
        assert len(crowd.inside) == 6
        pid = proxy.pids()[1]
        os.kill(pid, signal.SIGKILL)
        proxy.replaced(1, pid)
        left = [sock for sock in crowd.inside if not _is_closed(sock)]
        crowd.inside = left
        while crowd.enter():
            pass
        assert len(crowd.inside) == 6


def _is_closed(sock):
    sock.settimeout(0)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    finally:
        sock.settimeout(clients.TIMEOUT)


def test_an_address_has_one_budget_of_wrong_secrets():
    """With a budget in each process it would have twice as many answers at once."""
    guess = clients.WITH_PASSWORD + clients.login(password="x" * len(SECRET))
    with Workers("auth_timeout 60s\nlog_verbose no\n") as proxy, ExitStack() as stack:
        for _ in range(10):
            with dial(proxy.socks5) as sock:
                sock.sendall(guess)
                assert read_all(sock) == b"\x05\x02\x01\x01"
            # Each is told to the other before the next one comes: the same words go through the master.
            proxy.status()
        slow = [stack.enter_context(dial(proxy.socks5)) for _ in range(6)]
        for sock in slow:
            sock.sendall(guess)
            assert exactly(sock, 2) == b"\x05\x02"
        proxy.status()
        for sock in slow:
            sock.settimeout(0)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
