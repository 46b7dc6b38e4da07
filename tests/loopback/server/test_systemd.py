"""sd_notify to real datagram sockets; socket activation with real inherited descriptors in a real process."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.model import Endpoint
from proxy.server.systemd import Inherited, Notifier

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """The service manager's socket and the value of NOTIFY_SOCKET for it."""
    name = str(tmp_path / "notify") if request.param == "file" else f"@greenarrow-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:] if name[0] == "@" else name)
        sock.setblocking(False)
        yield name, sock


def test_messages(manager: tuple[str, socket.socket]) -> None:
    name, sock = manager
    notifier = Notifier({"NOTIFY_SOCKET": name}, 42)
    assert notifier.ready("3 listeners\nREADY=0")
    assert sock.recv(4096) == b"READY=1\nSTATUS=3 listeners READY=0"
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notifier.reloading()
    match = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", sock.recv(4096))
    assert match
    assert before <= int(match[1]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert notifier.stopping("draining 5 connections", 62.5)
    assert sock.recv(4096) == b"STOPPING=1\nSTATUS=draining 5 connections\nEXTEND_TIMEOUT_USEC=62500000"
    assert notifier.extend(5)
    assert sock.recv(4096) == b"EXTEND_TIMEOUT_USEC=5000000"
    assert notifier.watchdog()
    assert sock.recv(4096) == b"WATCHDOG=1"
    notifier.close()
    assert not notifier.ready("")


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:1234"}])
def test_without_a_manager_nothing_is_sent(environ: dict[str, str]) -> None:
    notifier = Notifier(environ | {"WATCHDOG_USEC": "1000000"}, 42)
    assert not notifier.ready("x")
    assert notifier.watchdog_interval == 0


def test_a_manager_that_does_not_read_is_not_waited_for(manager: tuple[str, socket.socket]) -> None:
    name, sock = manager
    notifier = Notifier({"NOTIFY_SOCKET": name}, 42)
    sent = 0
    while notifier.watchdog():
        sent += 1
        assert sent < 100_000
    sock.close()
    assert not notifier.watchdog()
    notifier.close()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15),
        ({"WATCHDOG_USEC": "30000000"}, 15),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, 0),
        ({"WATCHDOG_USEC": "-1"}, 0),
        ({}, 0),
    ],
)
def test_watchdog_interval(environ: dict[str, str], seconds: float, manager: tuple[str, socket.socket]) -> None:
    notifier = Notifier(environ | {"NOTIFY_SOCKET": manager[0]}, 42)
    assert notifier.watchdog_interval == seconds
    notifier.close()


#: A program started as systemd starts one: takes two addresses, accepts on the first, tells what is left.
PROGRAM = """
import os, sys
from proxy.model import Endpoint
from proxy.server.systemd import Inherited
inherited = Inherited(os.environ, os.getpid())
(taken,) = inherited.take(Endpoint("127.0.0.1", int(sys.argv[1])), 1)
assert inherited.take(Endpoint("127.0.0.1", int(sys.argv[1])), 1) == []
assert inherited.take(Endpoint("127.0.0.9", 1), 1) == []
assert not taken.getblocking() and not taken.get_inheritable()
print(inherited.left(), inherited.unusable, taken.accept()[0].recv(5))
inherited.close()
print(inherited.left())
taken.close()
"""


def test_inherited_sockets_are_matched_by_address() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as second,
        socket.socket() as mute,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        client = socket.create_connection(first.getsockname())
        client.sendall(b"hello")

        def as_systemd_does() -> None:
            fds = [os.dup(s.fileno()) for s in (first, second, mute, datagrams)]
            high = [os.dup2(fd, 200 + n) for n, fd in enumerate(fds)]
            for n, fd in enumerate(high):
                os.dup2(fd, 3 + n)

        launcher = (
            "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); "
            "os.execv(sys.executable, [sys.executable, '-W', 'ignore', '-c', sys.argv[1], sys.argv[2]])"
        )
        done = subprocess.run(
            [sys.executable, "-c", launcher, PROGRAM, str(first.getsockname()[1])],
            preexec_fn=as_systemd_does,
            close_fds=False,
            env=os.environ | {"LISTEN_FDS": "4"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
        )
        client.close()
        assert done.stderr == ""
        left = [Endpoint("::1", second.getsockname()[1])]
        assert done.stdout == f"{left} [5, 6] b'hello'\n[]\n"


@pytest.mark.parametrize(
    "environ",
    [{}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}, {"LISTEN_FDS": "x", "LISTEN_PID": "42"}, {"LISTEN_FDS": "1"}],
)
def test_sockets_meant_for_somebody_else_are_left_alone(environ: dict[str, str]) -> None:
    inherited = Inherited(environ, 42)
    assert inherited.left() == []
    assert inherited.unusable == []
