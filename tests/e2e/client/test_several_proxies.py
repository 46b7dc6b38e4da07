"""A library with a list of proxies, real programs at both ends: each way in which one can be away, and the way back.

Each proxy has a default source of its own, so a connection's local address says through which one it went.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenarrow_proxy_client import (
    Limits,
    ProxyFailure,
    ProxyRefused,
    ProxyRejected,
    ProxyUnavailable,
    Session,
    ThrottleRejected,
)
from tests.program import ROOT, SECRET, Proxy
from tests.sinks import Raw, Sink
from tests.waiting import wait_for

MAIL = b"Subject: hello\r\n\r\nHello\r\n"
A, B = "127.0.0.11", "127.0.0.12"
SOON = 0.05  # the first pause: the way back is waited for, not measured


def real(source: str, more: str = "", **options: object) -> Proxy:
    return Proxy(f"default_source_ip {source}\n{more}", **options)  # type: ignore[arg-type]


def at(proxy: Proxy) -> str:
    """Its native listener as a line of the configuration, for who comes after it."""
    return "listen {}:{}\n".format(*proxy.native)


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as it:
        yield it


def through(session: Session, sink: Sink, **options: object) -> str:
    """Send a message; the source that says through which proxy it went."""
    with session.smtp([sink.endpoint], "mta.example.com", tls="none", reuse=False, **options) as smtp:  # type: ignore[arg-type]
        assert smtp.sendmail("a@example.com", ["b@example.net"], MAIL) == {}
        return str(smtp.opened.local.host)


def standing(session: Session) -> list[str]:
    return ["in use" if it.in_use else "up" if it.up else "away" for it in session.proxies]


def wait_standing(session: Session, *wanted: str) -> None:
    wait_for(lambda: standing(session) == list(wanted), 30, f"{wanted}")


def eventually(session: Session, sink: Sink, source: str) -> None:
    """Messages go through that proxy sooner or later, and no attempt before it fails."""
    wait_for(lambda: through(session, sink) == source, 30, f"mail leaves from {source}")


def test_the_first_is_used_and_the_second_knows_us_already(sink):
    with real(A) as first, real(B) as second, Session([first.native, second.native], SECRET, "mta") as session:
        wait_standing(session, "in use", "up")
        assert [through(session, sink) for _ in range(3)] == [A] * 3
        assert any("session(mta)" in line for line in second.status())
        assert session.round_trip >= 0
        assert [it.address for it in session.proxies] == [first.native, second.native]


def test_killed_and_back(sink):
    """kill -9, then the next message at once through the second, and through the first again when it is back."""
    with real(B) as second, contextlib.ExitStack() as stack:
        first = stack.enter_context(real(A, exit_code=-signal.SIGKILL))
        address = at(first)
        session = stack.enter_context(Session([first.native, second.native], SECRET, "mta", return_after=SOON))
        wait_standing(session, "in use", "up")
        assert through(session, sink) == A
        first.signal(signal.SIGKILL)
        assert through(session, sink) == B
        assert standing(session) == ["away", "in use"]
        assert "refused" in wait_for(lambda: session.proxies[0].failure)
        assert session.rejected is None
        stack.enter_context(real(A, address))
        eventually(session, sink, A)
        wait_standing(session, "in use", "up")
    assert len(sink.messages) >= 3


def test_many_threads_lose_nothing_when_it_is_killed(sink):
    """Each sends one message after another; the proxy dies in the middle. What fails was not delivered, and is sent
    again by the thread that had it; the receiver has each once."""
    each, threads = 25, 8
    with real(B) as second, contextlib.ExitStack() as stack:
        first = stack.enter_context(real(A, exit_code=-signal.SIGKILL))
        session = stack.enter_context(Session([first.native, second.native], SECRET, "mta", return_after=300.0))
        wait_standing(session, "in use", "up")
        unsure: list[str] = []
        go = threading.Barrier(threads + 1)

        def send(name: int) -> None:
            go.wait(30)
            for number in range(each):
                text = f"{name}-{number}"
                while True:
                    dotted = False
                    try:
                        with session.smtp([sink.endpoint], "mta.example.com", tls="none") as smtp:
                            smtp.mail("a@example.com")
                            smtp.rcpt("b@example.net")
                            dotted = True
                            smtp.data(f"Subject: {text}\r\n\r\n".encode())
                            break
                    except OSError:
                        if dotted:
                            unsure.append(text)

        workers = [threading.Thread(target=send, args=(name,)) for name in range(threads)]
        for worker in workers:
            worker.start()
        go.wait(30)
        wait_for(lambda: len(sink.messages) >= threads * 3)
        first.signal(signal.SIGKILL)
        for worker in workers:
            worker.join(120)
            assert not worker.is_alive()
        assert standing(session) == ["away", "in use"]
    came = [message.content.split(b"\r\n")[0].removeprefix(b"Subject: ").decode() for message in sink.messages]
    assert set(came) == {f"{name}-{number}" for name in range(threads) for number in range(each)}
    twice = {text for text in came if came.count(text) > 1}
    assert twice <= set(unsure), "only what broke between the dot and its reply may come twice"
    assert {message.peer[0] for message in sink.messages} == {A, B}


def test_a_drain_moves_what_is_new_and_lets_what_runs_finish(sink):
    with (
        real(A, "drain_timeout 30s\n") as first,
        real(B) as second,
        Session([first.native, second.native], SECRET, "mta") as session,
    ):
        wait_standing(session, "in use", "up")
        running = session.smtp([sink.endpoint], "mta.example.com", tls="none")
        first.term()
        wait_standing(session, "away", "in use")
        assert through(session, sink) == B
        assert running.sendmail("a@example.com", ["b@example.net"], MAIL) == {}
        assert running.opened.local.host == A
        running.quit()
    assert sorted(message.peer[0] for message in sink.messages) == [A, B]


def test_the_only_one_that_is_left_is_used_though_it_drains(sink):
    """A proxy that goes away serves who is there until it has gone, when there is no other."""
    with socket.create_server(("127.0.0.3", 0)) as closed:
        nobody = closed.getsockname()
    with real(A, "drain_timeout 30s\n") as first, Session([first.native, nobody], SECRET, "mta") as session:
        wait_standing(session, "in use", "away")
        running = session.smtp([sink.endpoint], "mta.example.com", tls="none")
        first.term()
        with pytest.raises(ProxyFailure) as caught:
            wait_for(lambda: through(session, sink) and None)
        assert caught.value.retry
        assert running.sendmail("a@example.com", ["b@example.net"], MAIL) == {}
        running.quit()


def test_stopped_dead_in_the_middle(sink):
    """SIGSTOP: its kernel goes on accepting, nobody answers. Five seconds without a pong, then the other."""
    with (
        real(A) as first,
        real(B) as second,
        Session([first.native, second.native], SECRET, "mta", timeout=3.0, return_after=SOON) as session,
    ):
        wait_standing(session, "in use", "up")
        first.signal(signal.SIGSTOP)
        try:
            wait_standing(session, "away", "in use")
            assert through(session, sink) == B
        finally:
            first.signal(signal.SIGCONT)
        eventually(session, sink, A)


def test_a_black_hole_in_the_first_place(sink):
    """It accepts and says nothing, from the start."""
    with (
        socket.create_server(("127.0.0.3", 0)) as hole,
        real(B) as second,
        Session([hole.getsockname(), second.native], SECRET, "mta", timeout=30.0) as session,
    ):
        assert through(session, sink) == B, "long before the first attempt is given up"
        assert standing(session) == ["away", "in use"]


def test_refused_in_the_first_place(sink):
    with socket.create_server(("127.0.0.3", 0)) as closed:
        nobody = closed.getsockname()
    with real(B) as second, Session([nobody, second.native], SECRET, "mta") as session:
        assert through(session, sink) == B


def test_the_wrong_secret_at_one(sink):
    """Told at once, and no reason not to send."""
    with (
        real(A, 'auth_shared_secret "another secret of more than thirty-two characters"\n') as first,
        real(B) as second,
        Session([first.native, second.native], SECRET, "mta") as session,
    ):
        assert through(session, sink) == B
        assert session.rejected is None
        assert "wrong secret" in wait_for(lambda: session.proxies[0].failure)


def test_the_wrong_secret_at_both():
    other = 'auth_shared_secret "another secret of more than thirty-two characters"\n'
    with (
        real(A, other) as first,
        real(B, other) as second,
        Session([first.native, second.native], SECRET, "mta") as session,
    ):
        with pytest.raises(ProxyRejected) as caught:
            session.connect([("127.0.0.3", 25)])
        assert (caught.value.code, caught.value.retry) == ("bad_credentials", False)
        assert wait_for(lambda: session.rejected).code == "bad_credentials"


def test_nobody_is_there():
    with socket.create_server(("127.0.0.3", 0)) as one, socket.create_server(("127.0.0.3", 0)) as two:
        nobody = [one.getsockname(), two.getsockname()]
    with Session(nobody, SECRET, "mta") as session:
        with pytest.raises(ProxyUnavailable) as caught:
            session.connect([("127.0.0.3", 25)], deadline=600.0)  # it is not waited for
        assert str(caught.value).count("refused") == 2
        assert standing(session) == ["away", "away"]


def test_one_that_is_full_hands_over(sink):
    """It is up, and pings go well; a channel more than it takes is "not now"."""
    with (
        real(A, "max_connections 2\n") as first,
        real(B) as second,
        Session([first.native, second.native], SECRET, "mta", return_after=300.0) as session,
    ):
        wait_standing(session, "in use", "up")
        held = session.connect([sink.endpoint])
        assert held.opened.local.host == A
        assert through(session, sink) == B
        wait_standing(session, "up", "in use")
        held.close()


def test_a_refusal_is_told_and_moves_nobody(sink):
    """What the receiver or the configuration refuses, another proxy would refuse as well."""
    with socket.create_server(("127.0.0.3", 0)) as closed:
        nobody = closed.getsockname()
    with real(A) as first, real(B) as second, Session([first.native, second.native], SECRET, "mta") as session:
        wait_standing(session, "in use", "up")
        for destination, source in ((nobody, None), (sink.endpoint, "192.0.2.1")):
            with pytest.raises(ProxyRefused):
                session.connect([destination], source_ip=source)
        assert standing(session) == ["in use", "up"]


def test_a_newer_run_of_the_name_puts_the_older_one_out_everywhere(sink):
    with real(A) as first, real(B) as second, Session([first.native, second.native], SECRET, "mta") as older:
        wait_standing(older, "in use", "up")
        with Session([first.native, second.native], SECRET, "mta") as newer:
            assert through(newer, sink) == A
            assert wait_for(lambda: older.rejected).code == "name_in_use"
            with pytest.raises(ProxyRejected, match="in use"):
                wait_for(lambda: through(older, sink) and None)
            assert not older.wait_until_up(0)


# --- throttles ---


def registered(proxy: Proxy) -> list[str]:
    """The instances of the throttle "one" there, as the status has them."""
    rows = [row for row in proxy.throttles() if row["name"] == "one"]
    return [instance["name"] for row in rows for instance in row["instances"] if instance["places"] is not None]


STATUS = "listen_status 127.0.0.1:0\n"


def test_throttles_go_where_the_session_goes_and_leave_nothing_behind(sink):
    """Registered at the one that is used, and only there; permits come from it."""
    with real(B, STATUS) as second, contextlib.ExitStack() as stack:
        first = stack.enter_context(real(A, STATUS, exit_code=-signal.SIGKILL))
        address = at(first)
        session = stack.enter_context(Session([first.native, second.native], SECRET, "mta", return_after=SOON))
        wait_standing(session, "in use", "up")
        throttle = session.throttle("127.0.0.13", Limits("one", rates=[(36000, 3600)], max_connections=2))

        def send(proxy: Proxy) -> None:
            with session.smtp([sink.endpoint], "mta.example.com", tls="none", throttles=[throttle]) as smtp:
                smtp.permit = throttle.acquire(30)
                smtp.sendmail("a@example.com", ["b@example.net"], MAIL)
                wait_for(
                    lambda: registered(proxy) == ["mta"], 30, "the throttle is known there"
                )  # a page lives a second

        send(first)
        assert registered(second) == []
        first.signal(signal.SIGKILL)
        send(second)
        third = stack.enter_context(real(A, address + STATUS))
        wait_standing(session, "in use", "up")
        send(third)
        wait_for(lambda: registered(second) == [], 30, "the one that was left knows nothing of us any more")
    assert len(sink.messages) == 3
    assert throttle.connections == 0


def test_what_one_proxy_does_not_accept_the_other_may(sink):
    """The throttle's source is not the second one's: told as `ThrottleRejected`, until the first is back."""
    with real(B, f"source_ip {B}\n") as second, contextlib.ExitStack() as stack:
        first = stack.enter_context(real(A, exit_code=-signal.SIGKILL))
        address = at(first)
        session = stack.enter_context(Session([first.native, second.native], SECRET, "mta", return_after=SOON))
        wait_standing(session, "in use", "up")
        throttle = session.throttle(A, Limits("one", max_connections=2))
        assert through(session, sink, throttles=[throttle]) == A
        first.signal(signal.SIGKILL)
        wait_standing(session, "away", "in use")
        with pytest.raises(ThrottleRejected):
            through(session, sink, throttles=[throttle])
        stack.enter_context(real(A, address))
        wait_standing(session, "in use", "up")
        assert through(session, sink, throttles=[throttle]) == A


def test_a_source_by_name_is_each_proxys_own_address(sink):
    """The way to say "the same, elsewhere" where each proxy has its own addresses."""
    block = "source vmta7 {{\n    ip {}\n}}\n"
    with real(B, block.format("127.0.0.22")) as second, contextlib.ExitStack() as stack:
        first = stack.enter_context(real(A, block.format("127.0.0.21"), exit_code=-signal.SIGKILL))
        session = stack.enter_context(Session([first.native, second.native], SECRET, "mta", return_after=300.0))
        wait_standing(session, "in use", "up")
        throttle = session.throttle(None, Limits("one", max_connections=2), source="vmta7")
        assert through(session, sink, throttles=[throttle]) == "127.0.0.21"
        first.signal(signal.SIGKILL)
        assert through(session, sink, throttles=[throttle]) == "127.0.0.22"


def test_while_each_half_is_at_another_proxy_each_gives_out_the_whole_limit():
    """Places: three at each proxy, so six at the receiver; what docs/ha.md warns of."""

    def greet(sock: socket.socket) -> None:
        sock.sendall(b"220 mx\r\n")
        sock.recv(100)

    with real(A) as first, real(B) as second, Raw(greet) as raw, contextlib.ExitStack() as stack:
        for name, order in (("one", [first, second]), ("two", [second, first])):
            session = stack.enter_context(Session([proxy.native for proxy in order], SECRET, name))
            throttle = session.throttle("127.0.0.13", Limits("one", max_connections=3))
            wait_standing(session, "in use", "up")
            for _ in range(3):
                stack.enter_context(session.connect([raw.endpoint], throttles=[throttle]))
            with pytest.raises(ProxyRefused) as caught:
                session.connect([raw.endpoint], throttles=[throttle], deadline=0.2)
            assert caught.value.code == "throttled"


# --- gevent ---

UNDER_GEVENT = """
import os, signal, sys, threading
from greenarrow_proxy_client import Limits, Session

a, b, mx = [(each.split(":")[0], int(each.split(":")[1])) for each in sys.argv[1:4]]
with Session([a, b], os.environ["SECRET"], "green") as session:
    assert session.wait_until_up(30)
    throttle = session.throttle("127.0.0.13", Limits("one", rates=[(360000, 3600)], max_connections=4))
    sent = []

    def send(number):
        with session.smtp([mx], "mta.example.com", tls="none", throttles=[throttle], deadline=60) as smtp:
            smtp.permit = throttle.acquire(60)
            smtp.sendmail("a@example.com", ["b@example.net"], b"Subject: %d\\r\\n\\r\\n" % number)
        sent.append(number)

    def all_of(numbers):
        workers = [threading.Thread(target=send, args=(number,)) for number in numbers]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    all_of(range(8))
    first = [it.in_use for it in session.proxies].index(True)
    os.kill(int(sys.argv[4]), signal.SIGKILL)
    all_of(range(8, 16))
    print(type(threading.current_thread()).__module__, first, sorted(sent) == list(range(16)))
"""


def test_under_gevent(sink, tmp_path: Path) -> None:
    script = tmp_path / "green.py"
    script.write_text(UNDER_GEVENT)
    with real(B) as second, real(A, exit_code=-signal.SIGKILL) as first:
        done = subprocess.run(
            [
                *(sys.executable, "-W", "error", "-m", "gevent.monkey", script),
                *("{}:{}".format(*where) for where in (first.native, second.native, sink.endpoint)),
                str(first.pid),
            ],
            env=os.environ | {"SECRET": SECRET, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[1:] == ["0", "True"]
    subjects = sorted(int(message.content.split()[1]) for message in sink.messages)
    assert subjects == list(range(16))


def test_an_mx_that_stalls_is_no_loss_of_the_proxy():
    """Nothing of the receiver's doing moves the session."""
    gate = threading.Event()
    with (
        Raw(lambda sock: gate.wait(60)) as raw,
        real(A) as first,
        real(B) as second,
        Session([first.native, second.native], SECRET, "mta") as session,
    ):
        wait_standing(session, "in use", "up")
        with pytest.raises(ProxyRefused):
            session.smtp([raw.endpoint], "mta.example.com", tls="none", deadline=1.0)
        assert standing(session) == ["in use", "up"]
        gate.set()
