"""Programs that others wrote, as peers of the proxy: found or skipped, started, watched and always ended.

The snippets of etc/clients are loaded and filled in here, so that what a user copies is what the tests run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import pytest

from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
SNIPPETS = ROOT / "etc" / "clients"
POSTFIX = ROOT / ".cache" / "postfix" / "usr"
TIMEOUT = 30.0
_CLONE_NEWNET = 0x40000000

#: Arrives as it is through every peer: dots, blanks, empty lines, 8 bits, but nothing that an MTA has a right to mend.
MESSAGE = (
    b"From: <from@example.com>\r\nTo: <to@example.net>\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n"
    b"Date: Wed, 25 Nov 2026 08:00:00 +0000\r\nMessage-ID: <1@example.com>\r\nMIME-Version: 1.0\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n"
    b".\r\n..\r\n.dot\r\n\r\n  blanks at both ends  \r\n\tQUIT\r\nPROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
    + "Grüße, 你好\r\n".encode()
    + b"".join(b"%06d " % number + b"x" * 900 + b"\r\n" for number in range(200))
    + b".\r\nthe end\r\n"
)


# -- finding -----------------------------------------------------------------------------------------------------------


def program(name: str) -> str:
    """The path of a program; where it is missing, the test is skipped, in continuous integration it fails."""
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    return path or missing(f"{name} is not installed")


def postfix(name: str) -> str:
    """The path of one of Postfix' tools, which tests/fetch_smtp_sink.sh unpacks."""
    path = POSTFIX / "sbin" / name
    return str(path) if path.exists() else missing(f"{name} is not there: run tests/fetch_smtp_sink.sh")


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it in continuous integration."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def environ() -> dict[str, str]:
    """For any peer: nobody's proxy settings, one language, Postfix' libraries."""
    mine = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return mine | {"LC_ALL": "C", "LD_LIBRARY_PATH": str(POSTFIX / "lib" / "postfix")}


# -- places ------------------------------------------------------------------------------------------------------------


def address() -> str:
    """A loopback address that nobody else has in mind."""
    return f"127.{random.randint(64, 250)}.{random.randint(0, 255)}.{random.randint(2, 250)}"


def free_port(host: str) -> int:
    """A port that is free now; with an address from `address` it stays so."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def directory(user: str | None = None) -> Iterator[Path]:
    """A directory for a peer that may run as another user, who can write to it."""
    path = Path(tempfile.mkdtemp(prefix="peer-"))
    try:
        path.chmod(0o755)
        if user is not None:
            shutil.chown(path, user)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def unprivileged() -> str:
    """The user that a peer shall be: ourselves, but not root."""
    return "nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name


def in_network_namespace(function: Callable[[], object]) -> None:
    """Run in a thread that has a network of its own, and so have its children; needs root, else the test is skipped."""
    failures: list[BaseException] = []

    def body() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
                pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")
            function()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


# -- running -----------------------------------------------------------------------------------------------------------


def run(
    *command: str | Path, stdin: bytes = b"", timeout: float = TIMEOUT, cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run to the end; what hangs is killed and fails the test."""
    return subprocess.run(command, input=stdin, capture_output=True, timeout=timeout, env=environ(), cwd=cwd)


class Daemon:
    """A peer that runs until the block ends; `output` is all it wrote.

    Args:
        command: what to run, in the foreground.
        listens: the address where it is expected to accept connections; the block begins when it does.
    """

    def __init__(self, *command: str | Path, listens: tuple[str, int], cwd: Path | None = None) -> None:
        self._command = command
        self._listens = listens
        self._cwd = cwd
        self._chunks: list[bytes] = []

    @property
    def output(self) -> str:
        return b"".join(self._chunks).decode("utf-8", "replace")

    def __enter__(self) -> Daemon:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ(),
            cwd=self._cwd,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            wait_for(self._accepts, TIMEOUT, f"{self._command[0]} listens")
        except BaseException:
            self.__exit__()
            print(self.output)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # what it started and left behind
            os.killpg(self._process.pid, signal.SIGKILL)
        self._reader.join(5)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _accepts(self) -> bool:
        assert self._process.poll() is None, f"{self._command[0]} has ended:\n{self.output}"
        return listening(self._listens)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):
            while chunk := self._process.stdout.read1(65536):  # type: ignore[attr-defined]
                self._chunks.append(chunk)


def listening(endpoint: tuple[str, int]) -> bool:
    """Whether an IPv4 address is listened on in this thread's network namespace, without connecting to it."""
    host = socket.inet_aton(endpoint[0])[::-1].hex().upper()
    wanted = f"{host}:{endpoint[1]:04X}"
    lines = [line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()]
    return any(fields[1] == wanted and fields[3] == "0A" for fields in lines)


# -- snippets ----------------------------------------------------------------------------------------------------------


def snippet(name: str, values: Mapping[str, object]) -> str:
    """The text of a file in etc/clients, with its documented values replaced.

    Args:
        values: what stands in the file → what stands there in the test; each must occur outside the comments.
    """
    text = (SNIPPETS / name).read_text()
    comment = "--" if name.endswith(".lua") else "#"
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(comment))
    for old, new in values.items():
        assert old in code, f"{name} does not say {old}"
        text = text.replace(old, str(new))
    return text


def script(path: Path, name: str, values: Mapping[str, object]) -> Path:
    """The same as an executable file in the directory `path`."""
    file = path / name
    file.write_text(snippet(name, values))
    file.chmod(0o755)
    return file
