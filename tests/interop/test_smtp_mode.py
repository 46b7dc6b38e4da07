"""Mode smtp with the programs that people run, each alone, then all of them together on one receiver under one limit.

None of them knows anything of the proxy but how to connect through it. The receiver offers STARTTLS; what is counted is
what it sees: connections, handshakes, messages.
"""

from __future__ import annotations

import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from greenarrow_proxy_client import Session
from tests import clients, peers
from tests.clients import proxied, socks5
from tests.interop.test_exim import Exim, snippet, user  # noqa: F401 (a fixture)
from tests.mx import Mx
from tests.peers import MESSAGE
from tests.program import SECRET, Proxy
from tests.sharing import cached
from tests.waiting import wait_for

NAME = "mail1.example.com"
SOURCE = "127.0.0.5"
NODE = peers.ROOT / ".cache" / "node"
#: All instances share with each other, and everybody leaves from one address. msmtp cannot log in: it is known by the
#: address that it comes from, as a client without a login is.
CONFIG = f"""\
mode smtp
socks5_auth none
default_source_ip {SOURCE}
source mail1 {{
    ip {SOURCE}
    ehlo {NAME}
}}
""" + "".join(
    f"instance {name} {{\n    share_with all\n}}\n" for name in ("server-a", "mta-1", "python", "nodemailer", "swaks")
)
#: On a busy machine the receiver, which counts, closes late: a place waits for it.
LIMITED = """\
throttle_close_timeout 1h
throttle one_receiver {
    max_concurrent_connections 2
    wait 60s
}
"""


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy(CONFIG) as proxy:
        yield proxy


@pytest.fixture
def mx() -> Iterator[Mx]:
    with Mx(starttls=True) as mx:
        yield mx


@pytest.fixture
def directory(user: str) -> Iterator[Path]:  # noqa: F811
    with peers.directory(user) as path:
        yield path


#: proxy, receiver, a directory, how many messages, what to do between two of them → how many connections it gave up.
Send = Callable[[Proxy, Mx, Path, int, Callable[[], None]], int]


def exim(proxy: Proxy, mx: Mx, directory: Path, count: int, between: Callable[[], None]) -> int:
    program = Exim(directory, snippet(proxy.socks5), mx.endpoint, f"  helo_data = {NAME}\n  hosts_try_fastopen =\n")
    for _ in range(count):
        log = program.send()
        between()
    assert log.count(" => to@example.net ") == count, log
    return 0


def curl(proxy: Proxy, mx: Mx, directory: Path, count: int, between: Callable[[], None]) -> int:
    file = directory / "message"
    file.write_bytes(MESSAGE)
    for _ in range(count):
        done = peers.run(
            *(peers.program("curl"), "--silent", "--show-error", "--socks5", f"{proxy.socks5[0]}:{proxy.socks5[1]}"),
            *("--proxy-user", f"server-a:{SECRET}", "--mail-from", "from@example.com", "--mail-rcpt", "to@example.net"),
            *("--upload-file", file, f"smtp://{mx.host}:{mx.port}/{NAME}"),
        )
        assert (done.returncode, done.stderr) == (0, b"")
        between()
    return 0


def swaks(proxy: Proxy, mx: Mx, directory: Path, count: int, between: Callable[[], None]) -> int:
    file = directory / "swaks"
    file.write_bytes(MESSAGE.removesuffix(b"\r\n"))  # it adds one
    door = f"{proxy.proxy_protocol[0]}:{proxy.proxy_protocol[1]}"
    for _ in range(count):
        done = peers.run(
            *(peers.program("swaks"), "--silent", "2", "--server", door, "--helo", NAME, "--data", f"@{file}"),
            *("--from", "from@example.com", "--to", "to@example.net", "--proxy-version", "1"),
            *("--proxy-family", "TCP4", "--proxy-source", SOURCE, "--proxy-source-port", "25"),
            *("--proxy-dest", mx.host, "--proxy-dest-port", str(mx.port)),
        )
        assert (done.returncode, done.stderr) == (0, b"")
        between()
    return 0


def msmtp(proxy: Proxy, mx: Mx, directory: Path, count: int, between: Callable[[], None]) -> int:
    host, port = proxy.socks5
    for _ in range(count):
        done = peers.run(
            *(peers.program("msmtp"), "--file=/dev/null", f"--host={mx.host}", f"--port={mx.port}", "--tls=off"),
            *(f"--domain={NAME}", f"--proxy-host={host}", f"--proxy-port={port}", "--from=from@example.com"),
            "to@example.net",
            stdin=MESSAGE.replace(b"\r\n", b"\n"),
        )
        assert (done.returncode, done.stderr) == (0, b"")
        between()
    return 0


def nodemailer(proxy: Proxy, mx: Mx, directory: Path, count: int, between: Callable[[], None]) -> int:
    if not (NODE / "node_modules" / "nodemailer").is_dir():
        peers.missing("Nodemailer is not there: run tests/fetch_node_peers.sh")
    script = Path(__file__).with_name("nodemailer_send.js")
    done = subprocess.run(
        [peers.program("node"), script, *map(str, (*proxy.socks5, "nodemailer", SECRET, *mx.endpoint, NAME, count))],
        input=MESSAGE,
        capture_output=True,
        timeout=60,
        env=peers.environ() | {"NODE_PATH": str(NODE / "node_modules")},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"250 ") == count
    return done.stdout.count(b"again")


def kumomta(proxy: Proxy, mx: Mx, directory: Path, count: int, between: Callable[[], None]) -> int:
    """Its byte sequences: BIND and CONNECT, then several messages on one connection with RSET between them."""
    smtp = clients.Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE))
    smtp.ehlo(NAME)
    for _ in range(count):
        assert smtp.mail("from@example.com")[0] == 250
        assert smtp.rcpt("to@example.net")[0] == 250
        assert smtp.data(MESSAGE)[0] == 250
        assert smtp.rset()[0] == 250
    assert smtp.docmd("QUIT")[0] == 221
    smtp.close()
    return 0


def greenarrow(proxy: Proxy, mx: Mx, directory: Path, count: int, between: Callable[[], None]) -> int:
    """The line that its documentation describes: the PROXY protocol, version 1."""
    for _ in range(count):
        smtp = clients.Smtp(proxied(proxy.proxy_protocol, mx.endpoint, SOURCE, clients.v1))
        smtp.ehlo(NAME)
        assert smtp.sendmail("from@example.com", ["to@example.net"], MESSAGE) == {}
        assert smtp.docmd("QUIT")[0] == 221
        smtp.close()
        between()
    return 0


def library(proxy: Proxy, mx: Mx, directory: Path, count: int, between: Callable[[], None]) -> int:
    """An MTA in Python, by the native protocol: it shares with all the others."""
    with Session(proxy.native, SECRET, "python") as session:
        for _ in range(count):
            with session.smtp([mx.endpoint], NAME, source_ip=SOURCE) as smtp:
                assert smtp.sendmail("from@example.com", ["to@example.net"], MESSAGE) == {}
            between()
    return 0


SENDERS: dict[str, Send] = {
    send.__name__: send for send in (exim, curl, swaks, msmtp, nodemailer, kumomta, greenarrow, library)
}


def delivered(mx: Mx) -> Counter[bool]:
    return Counter(message.content.rstrip() == MESSAGE.rstrip() for message in mx.messages)


@pytest.mark.parametrize("name", SENDERS)
def test_each_alone(proxy: Proxy, mx: Mx, directory: Path, name: str) -> None:
    """Three messages need one connection and one handshake, which the program itself knows nothing of."""
    given_up = SENDERS[name](proxy, mx, directory, 3, lambda: cached(proxy, 1, mx))
    assert delivered(mx) == {True: 3}
    assert all(message.encrypted and message.peer[0] == SOURCE for message in mx.messages)
    assert (mx.connects, mx.handshakes) == (1 + given_up, 1)


def test_all_of_them_together_under_one_limit(mx: Mx, user: str) -> None:  # noqa: F811
    """Eight programs at once, two connections for all of them: and few handshakes."""
    most = 0
    failures: list[str] = []
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, mx.open)
            over.wait(0.001)

    with Proxy(CONFIG + LIMITED) as proxy:

        def run(name: str) -> None:
            with peers.directory(user) as directory:
                try:
                    SENDERS[name](proxy, mx, directory, 4, lambda: None)
                except BaseException as error:
                    failures.append(f"{name}: {error!r}")

        watcher = threading.Thread(target=watch)
        watcher.start()
        threads = [threading.Thread(target=run, args=(name,)) for name in SENDERS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        over.set()
        watcher.join()
        assert failures == []
        assert delivered(mx) == {True: 4 * len(SENDERS)}
        assert most <= 2
        assert mx.handshakes <= mx.connects < 4 * len(SENDERS)
        wait_for(lambda: "active=0" in proxy.status()[-1])
