"""docs/ha.md: two machines, two proxies, two keepaliveds, and addresses that move from one to the other.

Each machine is a network namespace on one bridge; the bridge's is that of the clients and the receiver, and of the
test. The configurations are those of the page, but for the secret.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from greenarrow_proxy_client import ProxyFailure, Session
from tests import documents, peers
from tests.interop.conftest import DOCUMENTED_SECRET
from tests.program import SECRET, Proxy
from tests.sinks import Sink
from tests.waiting import wait_for

pytestmark = pytest.mark.either_form("keepalived's configurations")

DOOR, SOURCE, MX = "10.0.0.100", "192.0.2.1", "198.51.100.7"
MAIL = b"Subject: hello\r\n\r\nHello\r\n"
PATIENCE = 60.0
#: Three seconds without a word of the master, or a check that takes as long, and addresses move: that is keepalived's
#: task. The programs that may not be late come before all else that this machine does.
FIRST = ("nice", "-n", "-20")


def ip(*words: str) -> str:
    done = peers.run(peers.program("ip"), *words)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout.decode()


class Machine:
    """A namespace with one interface on the bridge, a proxy, and a keepalived.

    Args:
        number: the last of its own address.
        proxy_text, keepalived_text: the page's.
    """

    def __init__(self, number: int, directory: Path, proxy_text: str, keepalived_text: str) -> None:
        self.name = f"gp{os.getpid()}-{number}"
        self._address = f"10.0.0.{number}/24"
        self._number = number
        self._directory = directory / self.name
        self._directory.mkdir()
        self._proxy_text = proxy_text
        (self._directory / "keepalived.conf").write_text(keepalived_text)
        self._keepalived: subprocess.Popen[bytes] | None = None
        self._log = self._directory / "keepalived.log"

    @contextlib.contextmanager
    def on(self, bridge: str) -> Iterator[Machine]:
        ip("netns", "add", self.name)
        try:
            ip("link", "add", f"port{self._number}", "type", "veth", "peer", "name", "eth0", "netns", self.name)
            ip("link", "set", f"port{self._number}", "master", bridge, "up")
            for words in (
                ("link", "set", "lo", "up"),
                ("address", "add", self._address, "dev", "eth0"),
                ("link", "set", "eth0", "up"),
                ("route", "add", "default", "via", "10.0.0.254"),
            ):
                ip("-n", self.name, *words)
            yield self
        finally:
            self.stop_keepalived()
            ip("netns", "del", self.name)

    def proxy(self, **options: object) -> Proxy:
        """The page's proxy there; with a stop that is short."""
        before = f'set -- {" ".join(FIRST)} {peers.program("ip")} netns exec {self.name} "$@"'
        flags = ("--allow-destination=198.51.100.0/24", "--drain-timeout=2s")
        return Proxy(self._proxy_text, base="", before=before, flags=flags, **options)  # type: ignore[arg-type]

    def start_keepalived(self) -> None:
        files = [word for flag in "prc" for word in (f"-{flag}", str(self._directory / f"{flag}.pid"))]
        command = [*FIRST, peers.program("ip"), "netns", "exec", self.name, peers.program("keepalived")]
        with self._log.open("wb") as log:
            self._keepalived = subprocess.Popen(
                [*command, "-n", "-l", "-D", "-f", str(self._directory / "keepalived.conf"), *files],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop_keepalived(self) -> None:
        """In good order: it takes its addresses away and tells the other."""
        if self._keepalived is not None:
            self._keepalived.terminate()
            try:
                self._keepalived.wait(20)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._keepalived.pid, signal.SIGKILL)
                self._keepalived = None

    def addresses(self) -> set[str]:
        return {line.split()[3].partition("/")[0] for line in ip("-n", self.name, "-o", "-4", "address").splitlines()}

    def wait_for_addresses(self) -> None:
        try:
            wait_for(
                lambda: {DOOR, SOURCE, "192.0.2.2"} <= self.addresses(), PATIENCE, f"{self.name} has the addresses"
            )
        except AssertionError:
            print(self._log.read_text())
            raise

    def wait_for_none(self) -> None:
        wait_for(lambda: not {DOOR, SOURCE, "192.0.2.2"} & self.addresses(), PATIENCE, f"{self.name} has none")

    def wait_until_fit(self) -> None:
        """Its keepalived has seen the proxy again, and would take the addresses."""
        try:
            wait_for(lambda: "BACKUP" in self._log.read_text().rpartition("FAULT")[2], PATIENCE, "it is fit again")
        except AssertionError:
            print(self._log.read_text())
            raise


def send(session: Session) -> None:
    """One message, as soon as there is a proxy."""

    def attempt() -> bool:
        try:
            with session.smtp([(MX, 25)], "mta.example.com", source_ip=SOURCE, tls="none", deadline=5.0) as smtp:
                smtp.sendmail("a@example.com", ["b@example.net"], MAIL)
        except (ProxyFailure, OSError):
            return False
        return True

    wait_for(attempt, PATIENCE, "a message goes out")


def test_addresses_move(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("keepalived and namespaces want root")
    for name in ("keepalived", "curl"):
        peers.program(name)
    peers.in_network_namespace(lambda: addresses_move(tmp_path))


def addresses_move(tmp_path: Path) -> None:
    text, keepalived = documents.blocks(documents.section("docs/ha.md", "Addresses that move"))
    assert DOCUMENTED_SECRET in text
    assert "priority 150" in keepalived
    text = text.replace(DOCUMENTED_SECRET, SECRET)
    ip("link", "set", "lo", "up")
    ip("link", "add", "lan", "type", "bridge")
    ip("address", "add", "10.0.0.254/24", "dev", "lan")
    ip("address", "add", f"{MX}/32", "dev", "lan")
    ip("link", "set", "lan", "up")
    ip("route", "add", "192.0.2.0/24", "dev", "lan")
    one = Machine(1, tmp_path, text, keepalived)
    two = Machine(2, tmp_path, text, keepalived.replace("priority 150", "priority 100"))
    with one.on("lan"), two.on("lan"), Sink(MX, port=25) as sink, two.proxy() as second:
        with one.proxy(exit_code=-signal.SIGKILL) as first:
            second.wait_line(r"listening on 10\.0\.0\.100:807 ")  # on an address that it does not have
            one.start_keepalived()
            one.wait_for_addresses()
            two.start_keepalived()
            session = Session((DOOR, 807), SECRET, "server-a", timeout=5.0)
            with session:
                send(session)
                first.wait_line(r"^connection .*instance=server-a .*source=192\.0\.2\.1 ")
                assert not {DOOR, SOURCE} & two.addresses()

                # The proxy is killed: its machine lets go of the addresses, the other takes them.
                first.signal(signal.SIGKILL)
                two.wait_for_addresses()
                one.wait_for_none()
                send(session)
                second.wait_line(r"^connection .*instance=server-a .*source=192\.0\.2\.1 ")

                # It is back, and nothing moves; then the other's keepalived is stopped for some work there.
                with one.proxy() as third:
                    one.wait_until_fit()
                    assert SOURCE in two.addresses()
                    held = session.smtp([(MX, 25)], "mta.example.com", source_ip=SOURCE, tls="none")
                    held.sendmail("a@example.com", ["b@example.net"], MAIL)
                    held.release(wait=True)
                    two.stop_keepalived()
                    one.wait_for_addresses()
                    second.wait_line(r"address is gone from this machine source=192\.0\.2\.1 dropped=\d+$")
                    send(session)
                    third.wait_line(r"^connection .*instance=server-a .*source=192\.0\.2\.1 ")
        assert {message.peer[0] for message in sink.messages} == {SOURCE}
