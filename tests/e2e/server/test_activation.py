"""Under a service manager: what it is told, and the sockets that it hands over. systemd itself is not needed."""

import contextlib
import fcntl
import os
import re
import signal
import socket

import pytest

from tests.clients import exactly, proxied, socks5
from tests.program import Proxy
from tests.sinks import GREETING, Raw, echo, greet
from tests.waiting import wait_for


class Manager:
    """The datagram socket behind NOTIFY_SOCKET; each message as a dictionary."""

    def __init__(self, path):
        self.path = str(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(30)

    def next(self):
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().splitlines())


@pytest.fixture
def manager(tmp_path):
    manager = Manager(tmp_path / "notify")
    yield manager
    manager.socket.close()


def test_a_whole_life(manager):
    with Proxy(environ={"NOTIFY_SOCKET": manager.path}) as proxy:
        message = manager.next()
        assert message["READY"] == "1"
        assert "STATUS" in message
        for reload in (lambda: proxy.hup(""), lambda: proxy.bad_hup("nonsense 1\n")):
            reload()
            message = manager.next()
            assert message["RELOADING"] == "1"
            assert re.fullmatch(r"\d+", message["MONOTONIC_USEC"])
            assert manager.next()["READY"] == "1"
        proxy.term()
        message = manager.next()
        assert message["STOPPING"] == "1"
        assert int(message["EXTEND_TIMEOUT_USEC"]) > 1_000_000
        assert proxy.wait_exit() == 0
    assert not proxy.matching("systemd")


def test_a_long_drain_asks_for_more_time(manager):
    with Proxy("drain_timeout 30s\n", environ={"NOTIFY_SOCKET": manager.path}) as proxy, Raw(greet) as mx:
        assert manager.next()["READY"] == "1"
        with proxied(proxy.proxy_protocol, mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING
            proxy.term()
            assert manager.next()["STOPPING"] == "1"
            assert int(manager.next()["EXTEND_TIMEOUT_USEC"]) > 1_000_000
        assert proxy.wait_exit() == 0


def test_not_ready_before_it_listens(manager):
    with socket.create_server(("127.0.1.4", 0)) as busy:
        text = f"listen_socks5 127.0.1.4:{busy.getsockname()[1]}\n"
        with Proxy(text, ready=False, exit_code=69, environ={"NOTIFY_SOCKET": manager.path}) as proxy:
            proxy.wait_exit()
    manager.socket.settimeout(0)
    with pytest.raises(BlockingIOError):
        manager.next()


def test_ready_means_ready(manager):
    with Proxy(ready=False, environ={"NOTIFY_SOCKET": manager.path}) as proxy, Raw(greet) as mx:
        assert manager.next()["READY"] == "1"
        proxy.wait_line("protocol=proxy_protocol")
        with proxied(proxy.proxy_protocol, mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING


def test_the_watchdog(manager):
    environ = {"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "100000"}
    with Proxy(environ=environ, before="export WATCHDOG_PID=$$"):
        assert manager.next()["READY"] == "1"
        assert [manager.next() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3


def test_a_manager_that_does_not_listen_is_no_reason_to_wait(manager):
    """Its queue is full: the datagrams are lost, the program is not."""
    filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    filler.setblocking(False)
    with contextlib.closing(filler), contextlib.suppress(BlockingIOError):
        while True:
            filler.sendto(b"x", manager.path)
    with Proxy(environ={"NOTIFY_SOCKET": manager.path}) as proxy, Raw(greet) as mx:
        proxy.hup("")
        with proxied(proxy.proxy_protocol, mx.endpoint) as sock:
            assert exactly(sock, 8) == GREETING


# -- socket activation


@contextlib.contextmanager
def inherited(*listeners):
    """`before` for Proxy: makes them descriptors 3, 4 ... of the process, as a service manager does."""
    # First out of the way of the numbers that they shall have; whatever has these here keeps them.
    high = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, 200) for sock in listeners]
    moves = " ".join(f"{3 + number}<&{fd} {fd}<&-" for number, fd in enumerate(high))
    try:
        yield {
            "before": f"exec {moves}; export LISTEN_PID=$$ LISTEN_FDS={len(high)}",
            "pass_fds": tuple(high),
        }
    finally:
        for fd in high:
            os.close(fd)


def test_inherited_sockets_are_used():
    with socket.create_server(("127.0.1.5", 0)) as one, socket.create_server(("127.0.1.6", 0)) as other:
        # A client that comes before the program waits in the backlog and is served.
        early = socket.create_connection(one.getsockname(), 30)
        text = f"listen_socks5 127.0.1.5:{one.getsockname()[1]}\n"
        text += f"listen_proxy_protocol 127.0.1.6:{other.getsockname()[1]}\n"
        with inherited(one, other) as arguments, Proxy(text, **arguments) as proxy, Raw(greet) as mx:
            early.sendall(b"\x05\x01\x02")
            assert exactly(early, 2) == b"\x05\x02"
            with socks5(proxy.socks5, mx.endpoint) as sock:
                assert exactly(sock, 8) == GREETING
            with proxied(proxy.proxy_protocol, mx.endpoint) as sock:
                assert exactly(sock, 8) == GREETING
            assert (proxy.socks5, proxy.proxy_protocol) == (one.getsockname(), other.getsockname())
            early.close()
        assert not proxy.matching("systemd")
        # They are the service manager's: still open after the program, for the next one.
        socket.create_connection(one.getsockname(), 30).close()


def test_a_restart_refuses_nobody():
    """Clients that come in between wait for the successor."""
    with socket.create_server(("127.0.1.5", 0)) as listener, Raw(greet) as mx:
        text = f"listen_socks5 127.0.1.5:{listener.getsockname()[1]}\n"
        with inherited(listener) as arguments, Proxy(text, **arguments):
            pass
        waiting = socket.create_connection(listener.getsockname(), 30)
        with inherited(listener) as arguments, Proxy(text, **arguments) as proxy:
            waiting.sendall(b"\x05\x01\x02")
            assert exactly(waiting, 2) == b"\x05\x02"
            with socks5(proxy.socks5, mx.endpoint) as sock:
                assert exactly(sock, 8) == GREETING
            waiting.close()


def test_sockets_that_do_not_fit_are_told_and_closed():
    with (
        socket.create_server(("127.0.1.5", 0)) as stranger,
        socket.socket(socket.AF_UNIX) as unix,
        inherited(stranger, unix) as arguments,
        Proxy(**arguments) as proxy,
    ):
        address = "{}:{}".format(*stranger.getsockname())
        proxy.wait_line(rf"^WARNING systemd: the inherited socket {re.escape(address)} is not in the configuration")
        proxy.wait_line(r"^WARNING systemd: the inherited descriptor 4 is not a listening TCP socket")
        links = [os.readlink(f"/proc/{proxy.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{proxy.pid}/fd")]
        assert f"socket:[{os.fstat(stranger.fileno()).st_ino}]" not in links


def test_sockets_of_another_process_are_left_alone():
    with socket.create_server(("127.0.1.5", 0)) as listener, inherited(listener) as arguments:
        arguments["before"] = arguments["before"].replace("LISTEN_PID=$$", "LISTEN_PID=1")
        text = f"listen_socks5 127.0.1.5:{listener.getsockname()[1]}\n"
        with Proxy(text, ready=False, exit_code=69, **arguments) as proxy:
            proxy.wait_exit()
    assert proxy.matching("Address already in use")


def test_reload_with_an_inherited_socket():
    """The socket stays through good and bad reloads."""
    with socket.create_server(("127.0.1.5", 0)) as listener, Raw(echo) as receiver:
        text = f"listen_socks5 127.0.1.5:{listener.getsockname()[1]}\n"
        with inherited(listener) as arguments, Proxy(text, **arguments) as proxy:
            with socks5(proxy.socks5, receiver.endpoint) as sock:
                proxy.hup(text + "idle_timeout 60s\n")
                proxy.bad_hup(text + "nonsense 1\n")
                sock.sendall(b"?")
                assert exactly(sock, 1) == b"?"
            with socks5(proxy.socks5, receiver.endpoint):
                pass
            wait_for(lambda: proxy.running, what="it runs")
            proxy.signal(signal.SIGTERM)
            assert proxy.wait_exit() == 0


def until_said(manager, name):
    """The next message with this word; others (watchdog, extensions) go by."""
    while name not in (message := manager.next()):
        pass
    return message


@pytest.mark.parametrize("workers", [1, 2])
def test_an_upgrade_with_inherited_sockets(manager, workers):
    """What a service manager sees of it: another main process, which is reloaded and stopped as the first would be. The
    sockets stay its own: whoever comes after the stop waits for the next start."""
    with socket.create_server(("127.0.1.5", 0)) as listener, Raw(echo) as receiver:
        text = f"listen_socks5 127.0.1.5:{listener.getsockname()[1]}\nworkers {workers}\ndrain_timeout 30s\n"
        environ = {"NOTIFY_SOCKET": manager.path}
        with inherited(listener) as arguments, Proxy(text, environ=environ, **arguments) as proxy:
            assert "MAINPID" not in until_said(manager, "READY")
            with socks5(proxy.socks5, receiver.endpoint) as early:
                old = proxy.upgrade()
                assert int(until_said(manager, "MAINPID")["MAINPID"]) == proxy.pid != old
                proxy.hup()
                assert until_said(manager, "RELOADING")
                assert until_said(manager, "READY")
                second = proxy.upgrade()
                assert int(until_said(manager, "MAINPID")["MAINPID"]) == proxy.pid != second
                early.sendall(b"?")
                assert exactly(early, 1) == b"?", "served by the first"
                with socks5(listener.getsockname(), receiver.endpoint) as late:
                    late.sendall(b"!")
                    assert exactly(late, 1) == b"!"
            proxy.term()
            assert until_said(manager, "STOPPING")
            assert proxy.wait_exit() == 0
        assert not proxy.matching("systemd")
        waiting = socket.create_connection(listener.getsockname(), 30)
        with waiting, inherited(listener) as arguments, Proxy(text, **arguments):
            waiting.sendall(b"\x05\x01\x02")
            assert exactly(waiting, 2) == b"\x05\x02"


def test_a_stop_after_an_upgrade_waits_for_those_of_both(manager):
    """The old process has an open connection: it ends within the new one's stop, whose time is asked for."""
    with Proxy("drain_timeout 30s\n", environ={"NOTIFY_SOCKET": manager.path}) as proxy, Raw(echo) as receiver:
        until_said(manager, "READY")
        with socks5(proxy.socks5, receiver.endpoint) as sock:
            proxy.upgrade()
            until_said(manager, "MAINPID")
            proxy.term()
            assert int(until_said(manager, "STOPPING")["EXTEND_TIMEOUT_USEC"]) > 1_000_000
            sock.sendall(b"?")
            assert exactly(sock, 1) == b"?"
        assert proxy.wait_exit() == 0
