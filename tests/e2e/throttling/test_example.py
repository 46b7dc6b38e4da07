"""The block of docs/configuration.md, letter by letter: what an operator sees of it, what binds, and its shadow.

It runs in a network of its own, in which the document's addresses exist.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import peers
from tests.clients import Smtp, socks5
from tests.dns_server import DnsServer
from tests.mx import Mx
from tests.peers import MESSAGE
from tests.program import ROOT, Proxy
from tests.waiting import wait_for

DOCUMENT = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
BLOCK = re.search(r"```\n(throttle yahoo \{\n.*?\n\}\n)```", DOCUMENT, re.DOTALL)[1]  # type: ignore[index]
SOURCE, BY_NAME, BY_ADDRESS, OTHER = "192.0.2.1", "67.195.204.77", "98.136.96.91", "67.195.228.1"
DNS = {
    "yahoo.com.": {"MX": ["1 mta5.am0.yahoodns.net."]},
    "ymail.com.": {"MX": ["1 mta5.am0.yahoodns.net.", "1 mta6.am0.yahoodns.net."]},
    "mta5.am0.yahoodns.net.": {"A": [BY_NAME]},
    "mta6.am0.yahoodns.net.": {"A": ["67.195.228.94"]},
}
CONFIG = f"""\
mode smtp
listen_status 127.0.1.9:0
listen_proxy_protocol 127.0.1.3:0
control_socket {{control}}
dns_server {{server}}
source_ip 192.0.2.0/24
source vmta1 {{{{
    ip {SOURCE}
}}}}
{BLOCK.replace("{", "{{").replace("}", "}}")}"""


class Operator:
    """A proxy with the example, its receivers, and the words of the operator."""

    def __init__(self, proxy: Proxy, control: str, server: object) -> None:
        self.proxy = proxy
        self._control, self._server = control, server

    def text(self, enforce: bool = True, warm: bool = False) -> str:
        """The example, or its shadow; `warm`: its warm-up is over."""
        text = CONFIG.format(control=self._control, server=self._server)
        text = text.replace("from 2026-12-01", "from 2020-12-01") if warm else text
        return text if enforce else text.replace("enforce yes", "enforce no ")

    def run(self, *words: str) -> str:
        command = [sys.executable, str(ROOT / "greenarrow_proxy.py"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ctl(self, *words: str) -> str:
        return self.run("ctl", "--socket", self._control, *words)

    def status(self) -> list[str]:
        host, port = self.proxy.door("status")
        return self.run(f"--status={host}:{port}").splitlines()


def world(look: Callable[[Operator], None], control: Path) -> None:
    ip = peers.program("ip")
    assert peers.run(ip, "link", "set", "lo", "up").returncode == 0
    for address in (SOURCE, BY_NAME, BY_ADDRESS, OTHER):
        assert peers.run(ip, "address", "add", f"{address}/32", "dev", "lo").returncode == 0
    with DnsServer(DNS) as server, ExitStack() as receivers:
        for host in (BY_NAME, BY_ADDRESS, OTHER):
            receivers.enter_context(Mx(host=host, port=25))
        text = CONFIG.format(control=control, server=server.endpoint)
        with Proxy(text) as proxy:
            wait_for(lambda: server.asked["mta6.am0.yahoodns.net.", "AAAA"], what="the names are looked up")
            operator = Operator(proxy, str(control), server.endpoint)
            wait_for(lambda: "67.195.228.94" in operator.ctl("show", "blocks"), what="and known")
            look(operator)


@pytest.fixture
def operate(tmp_path: Path) -> Callable[[Callable[[Operator], None]], None]:
    return lambda look: peers.in_network_namespace(lambda: world(look, tmp_path / "control"))


def send(operator: Operator, host: str, user: str = "box7+vmta1", messages: int = 1) -> None:
    smtp = Smtp(socks5(operator.proxy.socks5, (host, 25), None, user=user))
    smtp.ehlo("mta.example")
    for _ in range(messages):
        assert smtp.sendmail("a@example.com", ["b@yahoo.com"], MESSAGE) == {}
    smtp.quit()


def test_what_is_said_of_it_before_a_start_and_while_nothing_happens(operate) -> None:
    def look(operator: Operator) -> None:
        said = operator.run("--check-config", f"--config-filename={operator.proxy.path}")
        assert "the configuration is good" in said
        assert re.search(r"\nthrottle yahoo counts\n.*messages; connections where an OPEN gives no EHLO name\n", said)
        assert re.search(r"\n  at listen_socks5 \S+, listen_proxy_protocol \S+: messages \(mode smtp\)\n", said)
        (line,) = (line for line in operator.status() if line.startswith("BLOCK "))
        assert line.startswith(
            "BLOCK yahoo: 2000/hr, 20 connections, 5/s new connections, 5 days of warm-up, 2 back-off "
        )
        for told in (
            "to yahoo.com, ymail.com, aol.com, *.yahoodns.net, 98.136.96.0/24 from 192.0.2.0/24, vmta1 asked for by ",
            "box7, counted per source; its names mean now 67.195.204.77, 67.195.228.94 (2 MX hosts)",
            "not known: MX of aol.com: NXDOMAIN",
        ):
            assert told in line
        held = operator.ctl("explain", "vmta1", BY_NAME, "instance=box7")
        assert "yahoo, counted for 192.0.2.1: 2000/hr, 20 connections, 5/s new connections" in held
        assert "on this machine" in held
        assert "no throttle block holds" in operator.ctl("explain", "vmta1", OTHER, "instance=box7")
        assert "no throttle block holds" in operator.ctl("explain", "vmta1", BY_NAME, "instance=box8")

    operate(look)


def test_what_binds(operate) -> None:
    """2,000 messages an hour are one in 1.8 s; who is not meant does not wait."""

    def look(operator: Operator) -> None:
        operator.proxy.hup(operator.text(warm=True))
        over = threading.Event()

        def work() -> None:
            while not over.is_set():
                send(operator, BY_NAME)

        waiting = threading.Thread(target=work)
        waiting.start()
        try:
            wait_for(lambda: re.search(r"1 wait, next slot in .*held by rate", explained(operator)), what="it is told")
            (row,) = (line for line in operator.status() if line.startswith("yahoo  "))
            assert re.search(r" 192\.0\.2\.1 \(vmta1\) +2000/hr, 20 connections ", row)
            send(operator, OTHER, messages=5)
            send(operator, BY_ADDRESS, "box8+vmta1", 5)
        finally:
            over.set()
            waiting.join(60)

    operate(look)


def explained(operator: Operator) -> str:
    return operator.ctl("explain", "vmta1", BY_NAME, "instance=box7")


def test_what_its_shadow_would_have_done(operate) -> None:
    """By name and by address: both are one group. The second and the third message would have waited, and did not."""

    def look(operator: Operator) -> None:
        operator.proxy.hup(operator.text(enforce=False, warm=True))
        wait_for(lambda: "2 back-off rules (shadow mode)" in "\n".join(operator.status()), what="it says so")
        for host in (BY_NAME, BY_ADDRESS, BY_NAME):
            send(operator, host)
        shadow = r"shadow: would have waited (\d+) times"
        wait_for(lambda: re.search(shadow, explained(operator)), what="it is told")

        def waited() -> bool:
            (row,) = (line for line in operator.status() if line.startswith("yahoo  "))
            return int(re.search(shadow, row)[1]) >= 2  # type: ignore[index]

        wait_for(waited, what="the view, which is a second old at most, shows both")

    operate(look)
