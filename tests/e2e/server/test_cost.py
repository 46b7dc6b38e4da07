"""What a connection costs, counted: system calls a session and a step; what an idle relay holds.

No time is measured here (`bench/` does that): these figures are the same on every machine, and they grow only when the
data path does more than it did. Who adds a system call on purpose raises the bound, and says why.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import DOORS, exactly, send, v2
from tests.independent_client import END, ENDED, OPEN, OPENED, PING, PONG, Peer, channel, frame, pack, session
from tests.load import Load, Receiver, Session, descriptors
from tests.mta import clock
from tests.mx import Mx
from tests.onlooker import Onlooker
from tests.peers import missing, program
from tests.program import Proxy
from tests.sinks import GREETING
from tests.waiting import wait_for

try:
    from proxy.net import _fastrelay  # noqa: F401
except ImportError:
    ENGINES = ["python"]
else:
    ENGINES = ["python", "compiled"]

REG, DEMAND, GRANT = 0x23, 0x24, 0x28
SESSIONS = 40
EXCHANGES = 20
RELAYS = 2000

#: Calls of the loop's turns, of signals and of the log: how many sessions share one depends on the load.
SHARED = {
    *("epoll_wait", "getpid", "read", "write", "rt_sigreturn", "rt_sigaction"),
    *("futex", "restart_syscall", "mmap", "munmap", "brk"),
}

#: System calls of a session that has no mail: accept4, getsockname and ioctl to make a Python socket of it (C asks
#: neither), epoll_ctl, recvfrom the request; socket, 3 setsockopt, bind, connect, epoll_ctl; the greeting read, and
#: sent; the end read, shutdown, the other end read; 2 close: 19, and 17 compiled. What the program does each second is
#: spread over them, and a client whose request is not there when it is let in costs a read more.
#: (One setsockopt is for SO_OOBINLINE: without it a receiver's urgent byte is lost.) SOCKS5 has three requests more, a
#: reply to each of the four, and asks for the port that it tells.
BOUND = {"proxy_v2": 20, "socks5": 20 + 3 + 4 + 1}
OF_A_PYTHON_SOCKET = {"python": 0, "compiled": -2}
#: The same of a session of mode smtp with one message of 20 KB. On a connection of its own: accept4, getsockname and
#: ioctl, epoll_ctl, the request; socket, 3 setsockopt, bind, connect, epoll_ctl, its port asked for; 6 reads of the
#: client and 7 of the receiver, 6 writes to the client and 7 to the receiver; shutdown, the client's end read, 2 close:
#: 43. Nothing is read where it is sure that an event will tell of what comes. On a shared one, with RSET and
#: its reply instead of greeting, EHLO and QUIT, 13 calls less.
BOUND_SMTP = {"own": 47, "shared": 34}
#: Switches of greenlets: where something is had or decided, or waited for before it is read; none for the events within
#: a message, for QUIT and RSET.
BOUND_SWITCHES = {"own": 27, "shared": 18}
SMTP = {
    "own": "mode smtp\n",
    "shared": "mode smtp\nsource here {\n  ip 127.0.0.5\n  ehlo client.example\n}\n",
}
MESSAGE = b"Subject: one\r\n\r\n" + b"a line of the message, and no more than that.\r\n" * 430

#: One step one way is a read and a write.
BOUND_STEP = 2.1
#: A session on a warm channel: recvfrom the OPEN; socket, 3 setsockopt, bind, connect, epoll_ctl, getsockname; OPENED;
#: the receiver looked at before the greeting is read and sent; END read, ENDED, close: 16. What comes sooner than it
#: might, an event of room for more, and what is done each second make some more of it; so do turns that are over, in
#: Python.
BOUND_CHANNEL = {"python": 19, "compiled": 17.5}
#: The same of one that the proxy brings up and says QUIT to: END and OPEN read; nine calls until it stands; greeting,
#: EHLO and its reply; ENDED and OPENED in one write; the receiver looked at; QUIT, its answer, close: 18.
BOUND_CHANNEL_MAIL = {"python": 23, "compiled": 19.5}
#: In Python a step may take longer than a turn has, beside strace on a busy machine: who has rested reads once more.
BOUND_CHANNEL_STEP = {"python": 3.0, "compiled": BOUND_STEP}
#: A permit that is asked for alone is a read and a write: no timer, no look for more that finds nothing. In a turn of
#: the loop for it alone the loop's epoll and the engine's are asked, once each.
PERMITS, ASKERS = 200, 10
BOUND_PERMIT = 2.1
BOUND_PERMIT_EPOLL = 2.3

#: Bytes that the process grows by for an idle relay, all that is kept of it included.
BOUND_MEMORY = {"python": 1800, "compiled": 1300}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def running(engine: str, more: str = "") -> Proxy:
    return Proxy(f"auth_timeout 60s\n{more}", environ={"GREENARROW_PROXY_PURE": "1" if engine == "python" else ""})


@contextlib.contextmanager
def traced(proxy: Proxy, tmp_path: Path, shared: frozenset[str] = frozenset(SHARED)) -> Iterator[dict[str, int]]:
    """The system calls of the program within the block, by name, but for the shared ones; filled in when it ends."""
    strace = program("strace")
    report = tmp_path / "calls"
    command = [strace, "-f", "-c", "-o", str(report), "-p", str(proxy.pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    try:
        first = tracer.stderr.readline()
        if "attached" not in first:
            missing(f"strace may not look: {first.strip()}")
        calls: dict[str, int] = {}
        yield calls
    finally:
        tracer.terminate()
        tracer.wait(30)
        tracer.stderr.close()
    for line in report.read_text().splitlines():
        match = re.fullmatch(r"\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)(?:\s+\d+)?\s+(\w+)", line)
        if match and match[2] != "total" and match[2] not in shared:
            calls[match[2]] = int(match[1])


def calls_of_sessions(proxy: Proxy, tmp_path: Path, door: str, exchanges: int) -> dict[str, int]:
    """What `SESSIONS` sessions one after the other take, each with so many questions and answers."""
    with Receiver() as receiver, traced(proxy, tmp_path) as calls:
        for _ in range(SESSIONS):
            with DOORS[door](proxy, receiver.endpoint, "127.0.0.5") as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                assert exactly(sock, len(GREETING)) == GREETING
                for _ in range(exchanges):
                    sock.sendall(b"NOOP\r\n")
                    assert exactly(sock, 6) == b"NOOP\r\n"
        proxy.wait_idle()
    return calls


@pytest.mark.parametrize("door", BOUND)
def test_system_calls_of_a_session_and_of_a_step(engine: str, door: str, tmp_path: Path) -> None:
    with running(engine) as proxy:
        bare = calls_of_sessions(proxy, tmp_path, door, 0)
        talk = calls_of_sessions(proxy, tmp_path, door, EXCHANGES)
    session = sum(bare.values()) / SESSIONS
    step = (sum(talk.values()) - sum(bare.values())) / SESSIONS / EXCHANGES / 2
    print(f"\n{engine}, {door}: {session:.1f} system calls a session, {step:.2f} a step, {bare}")
    assert session <= BOUND[door] + OF_A_PYTHON_SOCKET[engine], bare
    assert step <= BOUND_STEP, talk


@pytest.mark.parametrize("tls", [False, True], ids=["in clear", "tls"])
def test_system_calls_of_a_session_on_a_warm_channel(engine: str, tls: bool, tmp_path: Path) -> None:
    with (
        running(engine, "" if tls else "listen_tls no\n") as proxy,
        Receiver() as receiver,
        channel(proxy.native, tls=tls) as peer,
    ):
        bare = calls_on_a_channel(proxy, tmp_path, peer, receiver, 0)
        talk = calls_on_a_channel(proxy, tmp_path, peer, receiver, EXCHANGES)
    session = sum(bare.values()) / SESSIONS
    step = (sum(talk.values()) - sum(bare.values())) / SESSIONS / EXCHANGES / 2
    print(f"\n{engine}: {session:.1f} system calls a session, {step:.2f} a step, {bare}")
    assert session <= BOUND_CHANNEL[engine], bare
    assert step <= BOUND_CHANNEL_STEP[engine], talk


def test_system_calls_of_a_session_that_is_brought_up_on_a_warm_channel(engine: str, tmp_path: Path) -> None:
    """END, which leaves QUIT to the proxy, comes in one piece with the next OPEN."""
    end = frame(END, pack([False, 0, True]))
    with running(engine, "listen_tls no\n") as proxy, Mx() as mx, channel(proxy.native, tls=False) as peer:
        request = frame(OPEN, pack(["127.0.0.5", [list(mx.endpoint)], "mta.example.com"]))
        with traced(proxy, tmp_path) as calls:
            for number in range(SESSIONS):
                peer.sock.sendall(end + request if number else request)
                if number:
                    peer.expect(ENDED)
                peer.expect(OPENED)
            peer.sock.sendall(end)
            peer.expect(ENDED)
            wait_for(lambda: not mx.running)
    session = sum(calls.values()) / SESSIONS
    print(f"\n{engine}: {session:.1f} system calls a session, {calls}")
    assert session <= BOUND_CHANNEL_MAIL[engine], calls


def calls_on_a_channel(proxy: Proxy, tmp_path: Path, peer: Peer, receiver: Receiver, exchanges: int) -> dict[str, int]:
    """What `SESSIONS` sessions take on one channel, each with so many questions and answers."""
    peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with traced(proxy, tmp_path) as calls:
        for _ in range(SESSIONS):
            peer.say(OPEN, "127.0.0.5", [list(receiver.endpoint)])
            peer.expect(OPENED)
            assert peer.hear_until(b"\r\n") == GREETING
            for _ in range(exchanges):
                peer.data(b"NOOP\r\n")
                assert peer.hear_until(b"\r\n") == b"NOOP\r\n"
            peer.say(END, False, 0)
            peer.expect(ENDED)
    return calls


@pytest.mark.parametrize(("at_once", "tls"), [(1, False), (16, False), (1, True)])
def test_system_calls_and_turns_of_a_permit(engine: str, at_once: int, tls: bool, tmp_path: Path) -> None:
    """Several ask before the first looks for its answer: so none is there again before the program looks for more."""
    with running(engine, "" if tls else "listen_tls no\n") as proxy, contextlib.ExitStack() as stack:
        askers = [stack.enter_context(Asker(proxy, f"mta-{number}", tls)) for number in range(ASKERS)]
        with traced(proxy, tmp_path, frozenset(SHARED) - {"epoll_wait"}) as calls:
            for _ in range(PERMITS // ASKERS):
                for asker in askers:
                    asker.ask(at_once)
                for asker in askers:
                    asker.await_grant()
    epolls = calls.pop("epoll_wait", 0) / PERMITS
    permit = (sum(calls.values()) - 2 * sum(asker.pings for asker in askers)) / PERMITS
    print(f"\n{engine}, {at_once} at a time: {permit:.2f} system calls, {epolls:.2f} looks of the loop, {calls}")
    assert permit <= BOUND_PERMIT, calls
    assert epolls <= BOUND_PERMIT_EPOLL


class Asker:
    """An instance with one path that nobody else uses."""

    def __init__(self, proxy: Proxy, name: str, tls: bool) -> None:
        self.pings = 0
        self._granted = self._wanted = 0
        self._peer = peer = session(proxy.native, instance=name, run_id=os.urandom(16), tls=tls)
        self._incarnation = peer.welcome[1]
        peer.say(PING, self._incarnation, clock() // 1000)
        peer.say(REG, self._incarnation, [[1, "127.0.0.5", [[name, [[1_000_000, 1, 1]]]]]])
        self.ask(1)
        self.await_grant()

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.sock.close()

    def ask(self, want: int) -> None:
        self._wanted += want
        self._peer.say(DEMAND, self._incarnation, [[1, want, self._granted, 0]])

    def await_grant(self) -> None:
        while self._granted < self._wanted:
            kind, fields = self._peer.hear()
            if kind == GRANT:
                self._granted += sum(n for _, n, *_ in fields[3])
            elif kind == PING:
                self.pings += 1
                self._peer.say(PONG, self._incarnation, fields[1], 0)


@pytest.mark.parametrize("kind", SMTP)
def test_system_calls_and_switches_of_a_session_of_mode_smtp(engine: str, kind: str, tmp_path: Path) -> None:
    onlooker = Onlooker(tmp_path)
    environ = onlooker.environ | {"GREENARROW_PROXY_RELAY": engine}
    with Mx() as mx, Proxy(SMTP[kind] + "listen_tls no\n", environ=environ) as proxy:

        def sessions(count: int) -> int:
            for _ in range(count):
                with DOORS["proxy_v2"](proxy, mx.endpoint, "127.0.0.5") as sock:
                    assert send(sock, MESSAGE)[0] == 250
            wait_for(lambda: not proxy.open_connections() and "active=0" in proxy.status()[-1])
            return onlooker.seen.switches

        before = sessions(5)
        switches = (sessions(SESSIONS) - before) / SESSIONS
        with traced(proxy, tmp_path) as calls:
            sessions(SESSIONS)
    session = sum(calls.values()) / SESSIONS
    print(f"\n{engine}, {kind}: {session:.1f} system calls, {switches:.1f} switches a session, {calls}")
    if kind == "shared":  # one, or a second while the first is being cleaned
        assert len(mx.sessions) <= 3
    else:
        assert len(mx.sessions) == 2 * SESSIONS + 5
    assert session <= BOUND_SMTP[kind], calls
    assert switches <= BOUND_SWITCHES[kind]


def watches(proxy: Proxy) -> list[int]:
    """How many descriptors each of the program's epoll descriptors watches, the smallest first."""
    found = []
    for entry in Path(f"/proc/{proxy.pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            text = entry.read_text()
            if "anon_inode:[eventpoll]" in os.readlink(f"/proc/{proxy.pid}/fd/{entry.name}"):
                found.append(text.count("tfd:"))
    return sorted(found)


def test_an_idle_relay_is_two_descriptors_two_watches_and_little_memory(engine: str) -> None:
    if not descriptors(2 * RELAYS + 1000):
        missing(f"{RELAYS} relays need a limit of {2 * RELAYS + 1000} descriptors")
    with Receiver() as receiver, running(engine) as proxy:

        def hold(count: int) -> list[socket.socket]:
            request = [v2(f"127.0.4.{number % 50 + 1}", receiver.endpoint) for number in range(count)]
            load = Load((Session(proxy.proxy_protocol, each, len(GREETING), "stay") for each in request), at_once=100)
            load.run()
            return load.stayed

        for sock in hold(300):  # the first ones make what all need
            sock.close()
        proxy.wait_idle()
        descriptors_before, watches_before, memory_before = proxy.fds(), watches(proxy), proxy.rss()
        stayed = hold(RELAYS)
        descriptors_now, watches_now, memory_now = proxy.fds(), watches(proxy), proxy.rss()
        for sock in stayed:
            sock.close()
        proxy.wait_idle()
        assert proxy.fds() == descriptors_before
        assert watches(proxy) == watches_before
    assert descriptors_now == descriptors_before + 2 * RELAYS
    # The engine's epoll has two more for each; the loop's own has none, whatever is open.
    assert sorted(watches_now)[-1] >= 2 * RELAYS
    assert sum(watches_now) == sum(watches_before) + 2 * RELAYS
    memory = (memory_now - memory_before) / RELAYS
    print(f"\n{engine}: {memory:.0f} bytes an idle relay")
    assert memory <= BOUND_MEMORY[engine]
