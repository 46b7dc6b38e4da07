"""An MTA that is killed in the middle of a message which its receiver does not take: what it held is free again."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mx import Mx, say, stall
from tests.program import ROOT, SECRET, Address, Proxy
from tests.waiting import wait_for

SOURCE = "127.0.0.5"
#: An MTA with one place, whose message is longer than all kernels between take.
MTA = f"""
import sys
from greenarrow_proxy_client import Limits, Session

host, port, mx_host, mx_port, tls = sys.argv[1:]
session = Session((host, int(port)), {SECRET!r}, "dies", tls=tls == "yes")
throttle = session.throttle({SOURCE!r}, Limits("one", max_connections=1))
throttle.wait_until_registered(60)
smtp = session.smtp([(mx_host, int(mx_port))], "dies.example", throttles=[throttle], tls="none", timeout=None)
smtp.mail("a@example.com")
smtp.rcpt("b@example.net")
assert smtp.docmd("DATA")[0] == 354
print("sends", flush=True)
smtp.sock.sendall(bytes(64 << 20))
"""
_ESTABLISHED = "01"
#: Of the timers in /proc/net/tcp, the one that asks whether the other end has room again.
_NO_ROOM = "04"


@contextlib.contextmanager
def mta(proxy: Proxy, mx: Mx, tls: str) -> Iterator[subprocess.Popen[str]]:
    """In the middle of its message; it can send no more."""
    arguments = [str(each) for each in (*proxy.native, *mx.endpoint, tls)]
    with subprocess.Popen([sys.executable, "-c", MTA, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True) as it:
        try:
            assert it.stdout is not None
            assert it.stdout.readline() == "sends\n"
            wait_for(lambda: is_stuck(proxy, mx), 60, "it can send no more")
            yield it
        finally:
            it.kill()


def is_stuck(proxy: Proxy, mx: Mx) -> bool:
    """Whether there is no room on the whole way, and the proxy, which has looked at all its sockets meanwhile, found
    nothing that it could move."""
    before = [held_back(address) for address in (mx.endpoint, proxy.native)]
    for _ in range(2):  # it has begun a turn, and ended it
        proxy.throttles()
    return all(before) and before == [held_back(address) for address in (mx.endpoint, proxy.native)]


def held_back(address: Address) -> int:
    """Bytes that wait in the kernel for room at the address, of the connection that has most; 0 while there is room."""
    host, port = address
    remote = f"{int.from_bytes(socket.inet_aton(host), 'little'):08X}:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    waiting = [row for row in rows if row[2:4] == [remote, _ESTABLISHED] and row[5].startswith(f"{_NO_ROOM}:")]
    return max((int(row[4].partition(":")[0], 16) for row in waiting), default=0)


def place(proxy: Proxy) -> list[int]:
    return [row["used"] for row in proxy.throttles()]


@pytest.mark.parametrize("tls", ["yes", "no"], ids=["tls", "clear"])
def test_the_place_of_a_killed_mta_is_free_although_its_receiver_takes_nothing(tls: str) -> None:
    """Its FIN stands behind what the proxy has no room for: without a frame of the proxy's it is minutes until any
    side gives up."""
    with (
        Proxy(f"listen_tls {tls}\nlisten_status 127.0.0.1:0\n") as proxy,
        Mx({"data": say(b"354 go on\r\n", stall)}) as mx,
        mta(proxy, mx, tls) as killed,
    ):
        assert place(proxy) == [1]
        killed.send_signal(signal.SIGKILL)
        proxy.wait_line(r"^connection .*outcome=client_reset", 60)
        proxy.wait_idle()
        assert place(proxy) in ([0], [])
