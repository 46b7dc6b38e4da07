"""SIGUSR2: a new program takes over. Nobody is refused, nothing is cut, no limit is passed, no process is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trustme

from tests.clients import Smtp, exactly, socks5
from tests.load import descriptors
from tests.mx import Mx
from tests.peers import missing
from tests.program import ROOT, Proxy
from tests.sinks import Raw, echo
from tests.unit.throttling.oracle import SECOND, Rule
from tests.waiting import wait_for
from tests.witness import Witness

WORKERS = pytest.mark.parametrize("workers", ["1", "2"])


def settings(workers: str, more: str = "") -> str:
    return f"workers {workers}\nlisten_status 127.0.1.4:0\nupgrade_timeout 60s\n{more}"


class Load:
    """Clients that send message after message, each on a connection of its own, until they are told to end.

    Attributes:
        sent: messages that were accepted. wrong: what went wrong, in words.
    """

    def __init__(self, proxy: Proxy, mx: Mx, clients: int) -> None:
        self.sent = 0
        self.wrong: list[str] = []
        self._ends = threading.Event()
        self._lock = threading.Lock()
        self._address, self._mx = proxy.socks5, mx.endpoint
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self._ends.is_set():
            try:
                with socks5(self._address, self._mx, "127.0.0.5") as sock:
                    smtp = Smtp(sock)
                    smtp.sendmail(f"c{number}@a.example", ["b@b.example"], f"Subject: {self.sent}\r\n\r\nhello\r\n")
                    smtp.quit()
            except Exception as error:
                with self._lock:
                    self.wrong.append(f"{type(error).__name__}: {error}")
                return
            with self._lock:
                self.sent += 1

    def end(self) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


@contextmanager
def load(proxy: Proxy, mx: Mx, clients: int) -> Iterator[Load]:
    running = Load(proxy, mx, clients)
    try:
        yield running
    finally:
        running.end()


@WORKERS
@pytest.mark.parametrize("mode", ["tcp", "smtp"])
def test_under_load_nobody_is_refused_and_nothing_is_cut(workers: str, mode: str) -> None:
    """Several in a row; each process ends when its last connection has, and every message arrived once."""
    witness = Witness()
    with Mx(witness.script) as mx, Proxy(settings(workers, f"mode {mode}\n")) as proxy, load(proxy, mx, 4) as running:
        for _ in range(5):
            so_far = running.sent
            old = proxy.upgrade()
            wait_for(lambda so_far=so_far: running.wrong or running.sent > so_far + 8, what="mail goes on")  # type: ignore[misc]
            wait_for(lambda old=old: running.wrong or not lives(old), 60, "the old process ends")  # type: ignore[misc]
        running.end()
        assert not running.wrong
        assert len(witness.mails()) == running.sent


@WORKERS
def test_an_open_connection_goes_on_in_the_old_process(workers: str) -> None:
    with Mx() as mx, Proxy(settings(workers)) as proxy, socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as sock:
        smtp = Smtp(sock)
        first = proxy.upgrade()
        second = proxy.upgrade()
        assert lives(first)
        wait_for(lambda: proxy.open_connections("socks5") == 1, 30, "it is shown by the new one")
        rows = proxy.page()["workers"]
        assert [row["open_connections"] for row in rows if row["role"] == "leaving"] == [1], "with those of its own"
        smtp.sendmail("a@a.example", ["b@b.example"], "Subject: x\r\n\r\nhello\r\n")
        smtp.quit()
        sock.close()
        wait_for(lambda: not lives(first) and not lives(second), 60, "both end")
        assert len(mx.messages) == 1


@WORKERS
def test_places_and_rates_go_on_where_they_were(workers: str) -> None:
    """The receiver's own count: never more connections than places, never more mail than the rate."""
    witness = Witness()
    block = "mode smtp\nthrottle one {\n    max_concurrent_connections 2\n    max_delivery_rate 20/s\n    wait 60s\n}\n"
    with Mx(witness.script) as mx, Proxy(settings(workers, block)) as proxy, load(proxy, mx, 6) as running:
        for _ in range(4):
            so_far = running.sent
            proxy.upgrade()
            wait_for(lambda so_far=so_far: running.wrong or running.sent > so_far + 10, 60, "mail goes on")  # type: ignore[misc]
        running.end()
        assert not running.wrong
    assert witness.most <= 2
    witness.check(Rule(20, 1, latest=SECOND // 10), wait_for_places=True)


@WORKERS
def test_who_waits_for_a_place_waits_on_at_the_new_process(workers: str) -> None:
    block = "throttle one {\n    max_concurrent_connections 1\n    wait 60s\n}\n"
    with Mx() as mx, Proxy(settings(workers, block)) as proxy, ExitStack() as stack:
        first = stack.enter_context(socks5(proxy.socks5, mx.endpoint, "127.0.0.5"))
        got = threading.Event()

        def second() -> None:
            with socks5(proxy.socks5, mx.endpoint, "127.0.0.5"):
                got.set()

        thread = threading.Thread(target=second)
        thread.start()
        wait_for(lambda: proxy.throttles() and proxy.throttles()[0]["waiting"] == 1, what="it waits")
        proxy.upgrade()
        wait_for(lambda: proxy.throttles() and proxy.throttles()[0]["waiting"] == 1, what="it waits there")
        assert not got.is_set()
        wait_for(lambda: mx.connects == 1, what="the receiver has accepted the first")
        first.close()
        assert got.wait(30)
        thread.join(30)
        wait_for(lambda: mx.connects == 2, what="the receiver has accepted it")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("nonsense yes\n", "exit code 78"),
        ("listen_socks5 198.51.100.7:1080, 127.0.1.2:70000\n", "exit code 78"),
    ],
)
@WORKERS
def test_a_new_program_that_cannot_begin_changes_nothing(workers: str, spoil: str, why: str) -> None:
    with Mx() as mx, Proxy(settings(workers)) as proxy, socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as sock:
        proxy.path.write_text(proxy.path.read_text() + spoil)
        mark = len(proxy.lines)
        proxy.signal(signal.SIGUSR2)
        proxy.wait_line(rf"ERROR upgrade: the new program has ended: {why}; this one goes on as before", 60, mark)
        smtp = Smtp(sock)
        smtp.noop()
        with socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as another:
            Smtp(another).quit()
        smtp.quit()


@WORKERS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
def test_signals_in_the_middle(workers: str, number: int) -> None:
    """TERM: all ends, and no process is left; HUP and another USR2: acted upon in turn."""
    with Mx() as mx, Proxy(settings(workers)) as proxy:
        old = proxy.pid
        os.kill(old, signal.SIGUSR2)
        os.kill(old, number)
        if number == signal.SIGTERM:
            proxy._told_to_stop = True
            proxy._process.wait(60)
            wait_for(lambda: not others_of(proxy), 60, "all are gone")
            return
        match = proxy.wait_line(r"upgrade: the new program has taken over: finishing what is open pid=(\d+)", 60)
        proxy._heirs.append(int(match[1]))
        wait_for(lambda: not lives(old), 60, "the old one ends")
        with socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as sock:
            Smtp(sock).quit()


@WORKERS
def test_a_new_program_that_hangs_is_given_up_when_it_is_killed(workers: str) -> None:
    with Mx() as mx, Proxy(settings(workers)) as proxy:
        proxy.signal(signal.SIGUSR2)
        wait_for(lambda: others_of(proxy), what="the new program runs")
        new = others_of(proxy)[0]
        os.kill(new, signal.SIGKILL)
        proxy.wait_line(r"ERROR upgrade: .*; this one goes on as before|upgrade: the new program has taken over", 60)
        if lives(proxy.pid) and not proxy.matching("the new program has taken over"):
            with socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as sock:
                Smtp(sock).quit()


@WORKERS
def test_many_in_a_row_leave_one_process_and_its_descriptors(workers: str) -> None:
    with Proxy(settings(workers)) as proxy:
        descriptors = []
        for _ in range(5):
            old = proxy.upgrade()
            wait_for(lambda old=old: not lives(old), 60, "the old process ends")  # type: ignore[misc]
            wait_for(lambda: len(proxy.page()["workers"]) == (1 if workers == "1" else 3), 30, "all of them serve")
            wait_for(lambda: not descriptors or proxy.fds() <= descriptors[0], 30, f"no more than {descriptors}")
            descriptors.append(proxy.fds())
        wait_for(lambda: not [pid for pid in others_of(proxy) if pid != proxy.pid], 30, "nobody else")


def test_idle_tls_connections_hear_quit() -> None:
    """The old processes keep none; the new ones make their own."""
    many = 100
    more = "mode smtp\nsmtp_tls required\nsource all {\n    ip 127.0.0.5\n    ehlo client.example\n}\n"
    for name in ("max_cached", "max_cached_per_destination"):
        more += f"reuse_connections_{name} {many}\n"
    with Mx(starttls=True) as mx, Proxy(settings("2", more)) as proxy:
        clients = [Smtp(socks5(proxy.socks5, mx.endpoint, "127.0.0.5")) for _ in range(many)]
        for client in clients:
            client.ehlo()
            assert client.mail("a@a.example")[0] == 250
        for client in clients:
            client.rset()
            client.quit()
        wait_for(lambda: proxy.page()["pool"]["held"] == many, 60, "all of them are held open")
        old = proxy.upgrade()
        wait_for(lambda: not lives(old), 60, "the old process ends")
        wait_for(lambda: mx.open == 0, 60, "all have been closed")
        held = [session for session in mx.sessions if session.encrypted]
        assert len(held) == many
        assert all(session.commands[-1].upper().startswith(b"QUIT") for session in held)


@pytest.fixture
def tls_door(tmp_path: Path) -> tuple[str, ssl.SSLContext]:
    """A listener with a certificate, and a client's context for it."""
    authority = trustme.CA()
    leaf = authority.issue_cert("proxy.example.net")
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "crt"))
    leaf.private_key_pem.write_to_path(str(tmp_path / "key"))
    (tmp_path / "key").chmod(0o600)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    files = f"tls_certificate_file {tmp_path}/crt\ntls_private_key_file {tmp_path}/key\n"
    return f"listen_socks5_tls 127.0.2.2:0\n{files}", context


def test_a_thousand_clients_in_tls_stay_where_they_are(tls_door: tuple[str, ssl.SSLContext]) -> None:
    """Each can go on, at the old process; the new one has nothing of them, and who comes then is served by it."""
    many = 1000
    if not descriptors(4 * many):
        missing(f"{many} clients and as many receivers need a limit of {4 * many} descriptors")
    lines, context = tls_door
    with Raw(echo) as receiver, Proxy(settings("1", lines)) as proxy, ExitStack() as stack:

        def connect() -> socket.socket:
            sock = socks5(proxy.door("socks5", "127.0.2.2"), receiver.endpoint, "127.0.0.5", tls=context)
            return stack.enter_context(sock)

        def goes_on(sock: socket.socket) -> bool:
            sock.sendall(b"?")
            return exactly(sock, 1) == b"?"

        alone = proxy.fds()
        held = [connect() for _ in range(many)]
        assert proxy.fds() >= alone + 2 * many
        old = proxy.upgrade()
        assert proxy.fds() < alone + 20, "some of the old one's are open in the new one, too"
        assert all(map(goes_on, held))
        new = connect()
        assert proxy.open_connections() == many + 1
        for sock in held:
            sock.close()
        wait_for(lambda: not lives(old), 60, "the old one ends with its last client")
        assert goes_on(new)
        new.close()
        wait_for(lambda: not proxy.open_connections(), 30, "nobody is connected")
        wait_for(lambda: proxy.fds() <= alone, 30, "no descriptor is left over")


#: A program of another version: it is this one, and `spoil` is done to it.
OTHER = """
import os, signal, sys
sys.path.insert(0, {root!r})
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2))
import greenarrow_proxy
from proxy.protocols import seam
from proxy.server import succession
from proxy.throttling import estate

def dies(of, name, after):
    original = getattr(of, name)
    def die(*args, **more):
        if after:
            original(*args, **more)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(of, name, die)

{spoil}
if __name__ == "__main__":
    sys.exit(greenarrow_proxy.main())
"""
KILLED = "the new program has ended: signal SIGKILL"
#: What the new program does, and what is said of it: by the old one, and by itself.
STEPS = [
    ("dies(succession.Predecessor, 'greet', False)", KILLED, ""),
    ("dies(succession.Predecessor, 'greet', True)", KILLED, ""),
    ("dies(succession.Predecessor, 'take_over', False)", KILLED, ""),
    ("dies(succession.Reader, 'feed', False)", KILLED, ""),
    ("dies(succession.Predecessor, 'take_over', True)", KILLED, ""),
    ("dies(succession.Predecessor, 'taken', False)", KILLED, ""),
    ("seam.VERSION = 99", "exit code 78", "hands over in form 1, and this one takes 99: restart instead"),
    ("estate.MAJOR = 2", "exit code 78", "its format is 1.0, and this program knows 2.0; restart instead"),
]


@WORKERS
def test_a_new_program_that_fails_at_any_step_changes_nothing(workers: str, tmp_path: Path) -> None:
    """Who has a place keeps it, who waits goes on waiting, nobody is refused; and the next one may do better."""
    program = tmp_path / "another.py"
    program.write_text(OTHER.format(root=str(ROOT), spoil=""))
    block = "throttle one {\n    max_concurrent_connections 1\n    wait 60s\n}\n"
    with Mx() as mx, Proxy(settings(workers, block), program=program) as proxy, ThreadPoolExecutor() as pool:
        old = proxy.pid
        first = socks5(proxy.socks5, mx.endpoint, "127.0.0.5")
        for spoil, why, says in STEPS:
            second = pool.submit(socks5, proxy.socks5, mx.endpoint, "127.0.0.5")
            wait_for(lambda: proxy.throttles() and proxy.throttles()[0]["waiting"] == 1, what="it waits")
            program.write_text(OTHER.format(root=str(ROOT), spoil=spoil))
            mark = len(proxy.lines)
            proxy.signal(signal.SIGUSR2)
            proxy.wait_line(rf"ERROR upgrade: .*{why}.*; this one goes on as before", 60, mark)
            if says:
                proxy.wait_line(says, 10, mark)
            wait_for(lambda: not others_of(proxy), 30, f"no process is left over by {spoil}")  # type: ignore[misc]
            assert (proxy.throttles()[0]["used"], proxy.throttles()[0]["waiting"]) == (1, 1)
            assert not second.done()
            Smtp(first).quit()
            first.close()
            first = second.result(60)
        Smtp(first).quit()
        first.close()
        program.write_text(OTHER.format(root=str(ROOT), spoil=""))
        assert proxy.upgrade() == old
        with socks5(proxy.socks5, mx.endpoint, "127.0.0.5") as sock:
            Smtp(sock).quit()
        wait_for(lambda: not lives(old), 60, "the old one ends")


def test_an_upgrade_may_change_the_number_of_workers() -> None:
    """Those who stand in the queue of a socket that the new one has no use for are served by the old one."""
    witness = Witness()
    with Mx(witness.script) as mx, Proxy(settings("2")) as proxy, load(proxy, mx, 6) as running:
        for workers in ("1", "2", "3", "2"):
            proxy.path.write_text(re.sub(r"(?m)^workers .*$", f"workers {workers}", proxy.path.read_text()))
            so_far, old = running.sent, proxy.upgrade()
            wait_for(lambda so_far=so_far: running.wrong or running.sent > so_far + 12, 60, "mail goes on")  # type: ignore[misc]
            wait_for(lambda old=old: running.wrong or not lives(old), 60, "the old process ends")  # type: ignore[misc]
        running.end()
        assert not running.wrong
        assert len(witness.mails()) == running.sent


def lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def others_of(proxy: Proxy) -> list[int]:
    """Other processes that were started with its configuration."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if str(proxy.path).encode() in file.read() and int(pid) != proxy._process.pid:
                    found.append(int(pid))
        except OSError:
            continue
    return found
