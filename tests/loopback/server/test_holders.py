"""Who listens already: this process, its child, or somebody else."""

import os
import socket
import subprocess
import sys

import pytest

from proxy.model import Endpoint
from proxy.server import holders

CHILD = """
import socket, sys
listener = socket.create_server(("127.0.9.2", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_this_process_listens():
    with (
        socket.create_server(("127.0.9.1", 0)) as one,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as two,
        socket.create_connection(one.getsockname()) as connected,
    ):
        found = holders.listening(os.getpid())
        assert {Endpoint(*one.getsockname()[:2]), Endpoint(*two.getsockname()[:2])} <= found
        assert Endpoint(*connected.getsockname()) not in found
    assert Endpoint("127.0.9.1", 0) not in found


def test_the_wildcards():
    with (
        socket.create_server(("0.0.0.0", 0)) as one,
        socket.create_server(("::", 0), family=socket.AF_INET6) as two,
    ):
        expected = {Endpoint("0.0.0.0", one.getsockname()[1]), Endpoint("::", two.getsockname()[1])}
        assert expected <= holders.listening(os.getpid())


def test_a_child_counts_and_a_stranger_does_not():
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        endpoint = Endpoint("127.0.9.2", int(child.stdout.readline()))
        assert endpoint in holders.listening(os.getpid())
        assert endpoint in holders.listening(child.pid)
        with socket.create_server(("127.0.9.1", 0)) as ours:
            assert Endpoint(*ours.getsockname()) not in holders.listening(child.pid)
        child.stdin.close()


def test_a_process_that_is_gone():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert holders.listening(child.pid) is None


@pytest.mark.parametrize(("environ", "pid"), [({}, None), ({"MAINPID": ""}, None), ({"MAINPID": "17"}, 17)])
def test_systemd_says_whom_it_is_for(environ, pid):
    assert holders.main_pid(environ) == pid
