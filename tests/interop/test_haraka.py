"""Haraka, which knows neither SOCKS nor the PROXY protocol for what it sends: through listen_redirect, in mode smtp.

What its group sends is redirected: it runs as the user of the test, from npm (tests/fetch_node_peers.sh), in a network
namespace of its own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import clients, peers
from tests.interop.test_opensmtpd import NAME, PROXY, RECEIVERS, SOURCE, arrived, network
from tests.mx import Message, Mx
from tests.peers import MESSAGE, Daemon
from tests.program import Proxy
from tests.waiting import wait_for

NODE = peers.ROOT / ".cache" / "node"
HARAKA = NODE / "node_modules" / "Haraka"
PLUGIN = Path(__file__).with_name("haraka_plugin.js")
GROUP = 64322
LISTENS = ("127.0.0.1", 2501)
MESSAGES = 5
CONFIG = {
    "config/me": NAME,
    "config/plugins": "sends",
    "config/smtp.ini": f"[main]\nlisten={LISTENS[0]}:{LISTENS[1]}\n",
    "config/outbound.ini": "enable_tls=true\nlocal_mx_ok=true\n",
    "config/log.ini": "[main]\nlevel=INFO\n",
}


@contextmanager
def running() -> Iterator[Daemon]:
    """In the network namespace of this thread."""
    if not HARAKA.is_dir():
        peers.missing("Haraka is not there: run tests/fetch_node_peers.sh")
    with peers.directory() as directory:
        for name in ("config", "plugins", "queue"):
            (directory / name).mkdir()
        for name, text in CONFIG.items():
            (directory / name).write_text(text)
        shutil.copy(HARAKA / "config" / "connection.ini", directory / "config")  # it does not start without
        shutil.copy(PLUGIN, directory / "plugins" / "sends.js")
        program = ("env", f"SOURCE={SOURCE}", f"HELO={NAME}", peers.program("node"), HARAKA / "bin" / "haraka")
        group = (peers.program("setpriv"), f"--regid={GROUP}", "--clear-groups")
        with Daemon(*group, *program, "-c", directory, listens=LISTENS) as daemon:
            yield daemon


def content(message: Message) -> bytes:
    """Without the two headers that Haraka adds, when it takes a message and when it sends it."""
    return re.sub(rb"\A(?:Received: [^\n]*\n(?:[ \t][^\n]*\n)*){2}", b"", message.content)


def test_mode_smtp() -> None:
    """It keeps no connections itself: five messages to each receiver would be five connections and five handshakes."""
    peers.in_network_namespace(messages_for_two_receivers)


def messages_for_two_receivers() -> None:
    network(f"skgid {GROUP}")
    with (
        Mx(host=RECEIVERS[0], port=25, starttls=True) as first,
        Mx(host=RECEIVERS[1], port=25, starttls=True) as other,
        Proxy(PROXY) as proxy,
        running() as haraka,
    ):
        for number in range(MESSAGES):
            for host in RECEIVERS:
                code, text = clients.send(
                    clients.dial(LISTENS), MESSAGE, f"{number}@d-{host.replace('.', '-')}.example"
                )
                assert code == 250, text
        wait_for(lambda: arrived(first) == arrived(other) == MESSAGES, 60.0, haraka.output)
        proxy.wait_line(r"^connection .*protocol=redirect .*messages=1 accepted=1 ")
    for mx in (first, other):
        assert [content(message) == MESSAGE for message in mx.messages] == [True] * MESSAGES
        assert all(message.encrypted and message.peer[0] == SOURCE for message in mx.messages)
        assert mx.handshakes == mx.connects == 1
