"""What an installed proxy is for: a message of each of two MTAs through it, an Exim by SOCKS5 and queue_sender.py by
the native protocol. Also the commands of docs/install.md, with a test's addresses instead of the documented ones."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests import peers
from tests.interop.test_exim import Exim
from tests.program import ROOT
from tests.sinks import Sink
from tests.waiting import wait_for

PAGE = ROOT / "docs" / "install.md"
MESSAGE = b"Subject: hello\n\nHello.\n"


class Place(NamedTuple):
    """Addresses of one test, all of them on this machine."""

    door: str
    source: str
    other_source: str

    def fill_in(self, text: str) -> str:
        """Documented commands or configuration for this place; loopback has to be allowed as a destination besides."""
        for old, new in (
            ("10.0.0.1:", f"{self.door}:"),
            ("10.0.0.0/24", "127.0.0.0/8"),
            ("192.0.2.1,", f"{self.source},"),
            ("192.0.2.2", self.other_source),
            ("192.0.2.1\nEND", f"{self.source}\nallow_destination 127.0.0.0/8\ndestination_port 1-65535\nEND"),
            ("192.0.2.1\ncontrol", f"{self.source}\nallow_destination 127.0.0.0/8\ndestination_port 1-65535\ncontrol"),
        ):
            text = text.replace(old, new)
        assert "192.0.2." not in text
        assert "10.0.0." not in text
        return text


def place() -> Place:
    door = peers.address()
    network = door.rpartition(".")[0]
    return Place(door, f"{network}.251", f"{network}.252")


def commands(heading: str) -> str:
    """The first block of commands below a heading of the page: three commands."""
    text = PAGE.read_text()
    assert f"\n## {heading}\n" in text
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    match = re.search(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert match
    outside = re.sub(r"(<<END)\n.*?^END$", r"\1", match[1], flags=re.MULTILINE | re.DOTALL)
    assert len(outside.splitlines()) == 3, outside
    return match[1]


def secret_of(configuration: str) -> str:
    match = re.search(r"^auth_shared_secret (\w{64})$", configuration, re.MULTILINE)
    assert match, configuration
    return match[1]


def by_two_mtas(place: Place, secret: str, native_port: int = 807) -> None:
    """Both get a message through, which leaves from the source that is configured."""
    with Sink() as sink:
        _exim(place, secret, sink)
        _queue_sender(place, secret, native_port, sink)
        assert [(message.peer[0], message.content) for message in sink.messages] == [
            (place.source, peers.MESSAGE),
            (place.other_source, MESSAGE.replace(b"\n", b"\r\n")),
        ]


def _exim(place: Place, secret: str, sink: Sink) -> None:
    snippet = peers.snippet(
        "exim.conf", {"10.0.0.1 port": f"{place.door} port", "PUT-THE-SECRET-OF-THE-PROXY-HERE": secret}
    )
    with peers.directory(_exim_user()) as directory:
        log = Exim(directory, snippet, sink.endpoint).send()
        assert "=> to@example.net" in log, log


def _exim_user() -> str:
    if os.getuid():
        return pwd.getpwuid(os.getuid()).pw_name
    done = peers.run(peers.program("exim4"), "-C", "/dev/null", "-bP", "exim_user")
    return done.stdout.decode().rpartition(" = ")[2].strip()


def _queue_sender(place: Place, secret: str, native_port: int, sink: Sink) -> None:
    with peers.directory() as directory:
        for path in (ROOT / "etc" / "clients").glob("*queue*"):
            shutil.copy(path, directory)
        (directory / "secret").write_text(secret)
        text = (directory / "queue_sender.toml").read_text()
        for old, new in (
            ("10.0.0.1:807", f"{place.door}:{native_port}"),
            ("/etc/queue_sender.secret", str(directory / "secret")),
            ("/var/spool/queue_sender", str(directory / "queue")),
            ("198.51.100.7:25", "{}:{}".format(*sink.endpoint)),
            ("192.0.2.1", place.other_source),
        ):
            assert old in text
            text = text.replace(old, new)
        (directory / "queue_sender.toml").write_text(text)
        _python(directory, "mail_queue.py", directory / "queue", "me@example.com", "you@yahoo.com")
        _python(directory, "queue_sender.py", directory / "queue_sender.toml", "--drain")


def _python(directory: Path, *arguments: str | Path) -> None:
    """Of the environment that has the library."""
    done = subprocess.run(
        [sys.executable, *arguments],
        input=MESSAGE,
        capture_output=True,
        timeout=60,
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for_service(place: Place, configuration: Path, shell: subprocess.Popen[str]) -> str:
    """Until the program that a shell has in its foreground listens; the configuration that was typed."""

    def listens() -> bool:
        if shell.poll() is not None:
            raise AssertionError(shell.stdout.read() if shell.stdout else "it has ended")
        with contextlib.suppress(OSError), socket.create_connection((place.door, 1080), 30):
            return True
        return False

    wait_for(listens, 300, "it listens")
    return configuration.read_text()
