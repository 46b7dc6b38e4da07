"""The load generator of bench/ under the sanitizers, its stack included: each pattern, each handshake, and what it does
with a command line, a client and a receiver that are not as they should be. What it measures, and its TLS and native
sessions, are in tests/e2e/server/test_generator.py."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import exactly
from tests.instrumented import Done, Instrumented
from tests.peers import ROOT, address
from tests.program import SECRET, Proxy
from tests.sinks import Raw

pytestmark = pytest.mark.either_form("C of the benchmark")

_SOURCE = ROOT / "bench" / "loadgen"
_LIBRARIES = ("-lm", "-lssl", "-lcrypto")
_FEW = ("--connections", "5")
_PATTERNS = {
    "one message each": ("load", *_FEW, "--sessions", "20"),
    "several, pipelined": ("load", *_FEW, "--sessions", "10", "--messages", "3", "--pipelining", "--bytes", "0"),
    # As many connections as sessions or questions: none finds all of them busy, however late this machine is.
    "on a timetable": ("load", "--connections", "10", "--sessions", "10", "--rate", "500"),
    "questions": ("pingpong", *_FEW, "--seconds", "0.1"),
    "questions on a timetable": ("pingpong", "--connections", "25", "--seconds", "0.1", "--rate", "200"),
    "bulk up": ("bulk", *_FEW, "--megabytes", "5"),
    "bulk down": ("bulk", *_FEW, "--megabytes", "5", "--download"),
    "idle": ("idle", *_FEW, "--seconds", "0.1"),
}
_HANDSHAKES = {
    "v1": ("--handshake", "v1"),
    "v2": ("--handshake", "v2"),
    "SOCKS5": ("--handshake", "socks5", "--user", "mta", "--password", SECRET),
    "SOCKS5 with BIND": ("--handshake", "socks5", "--user", "mta", "--password", SECRET, "--bind"),
}


class Generator:
    """The program, and its sink at `target`."""

    def __init__(self, copy: Instrumented) -> None:
        self._copy = copy
        self._program = copy.executable(
            sorted(_SOURCE.glob("*.c")), "-std=gnu11", "-Wall", "-Wextra", "-Werror", *_LIBRARIES
        )
        self.target = address(), 2525
        command: list[str | Path] = [self._program, "sink", *self._at(self.target)]
        self.sink = subprocess.Popen(command, stdout=subprocess.PIPE, env=copy.environ())
        assert self.sink.stdout is not None
        assert self.sink.stdout.readline() == b"ready\n"

    def __call__(self, *arguments: str, target: tuple[str, int] | None = None) -> Done:
        return self._copy.run([self._program, *arguments, *self._at(target or self.target)], self._copy.environ(), 60.0)

    @staticmethod
    def _at(endpoint: tuple[str, int]) -> tuple[str, str]:
        return "--target", f"{endpoint[0]}:{endpoint[1]}"

    def look_at_sink(self) -> None:
        """It still answers, and nothing was reported."""
        with socket.create_connection(self.target) as sock:
            assert sock.recv(100).startswith(b"220 ")
        assert self._copy.defects() == ""

    def close(self) -> None:
        self.sink.kill()
        self.sink.communicate()


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    with Instrumented() as copy:
        generator = Generator(copy)
        yield generator
        generator.close()


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as proxy:
        yield proxy


@pytest.mark.parametrize("name", _PATTERNS)
def test_patterns(generator: Generator, name: str) -> None:
    done = generator(*_PATTERNS[name], "--watch", "1", "--sink-pid", str(generator.sink.pid))
    done.check()
    assert json.loads(done.output)["errors"] == 0
    generator.look_at_sink()


@pytest.mark.parametrize("name", _HANDSHAKES)
def test_handshakes(generator: Generator, proxy: Proxy, name: str) -> None:
    host, port = proxy.socks5 if name.startswith("SOCKS5") else proxy.proxy_protocol
    done = generator("load", *_FEW, "--sessions", "10", "--proxy", f"{host}:{port}", *_HANDSHAKES[name])
    done.check()
    report = json.loads(done.output)
    assert (report["errors"], report["units"]) == (0, 10), done.output


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nothing",),
        ("load", "--connections", "0"),
        ("load", "--connections", "-1"),
        ("load", "--proxy", "127.0.0.1"),
        ("load", "--proxy", f"{'1' * 100}:25"),
        ("load", "--handshake", "socks4"),
        ("load", "--handshake", "socks5", "--user", "u" * 256, "--password", "p"),
        ("load", "--handshake", "socks5", "--user", "u", "--password", "p" * 2000),
    ],
)
def test_a_wrong_command_line(generator: Generator, arguments: tuple[str, ...]) -> None:
    done = generator(*arguments)
    assert (done.returncode, done.defects) == (64, "")


def test_the_longest_secrets(generator: Generator) -> None:
    secrets = []

    def refuse(sock: socket.socket) -> None:
        assert exactly(sock, 3) == b"\5\1\2"
        sock.sendall(b"\5\2")
        secrets.append(exactly(sock, 3 + 2 * 255))
        sock.sendall(b"\1\1")

    with Raw(refuse) as door:
        host, port = door.endpoint
        arguments = ("load", "--connections", "1", "--sessions", "1", "--proxy", f"{host}:{port}")
        done = generator(*arguments, "--handshake", "socks5", "--user", "u" * 255, "--password", "p" * 255)
    done.check()
    assert secrets == [b"\1\xff" + b"u" * 255 + b"\xff" + b"p" * 255]


def test_clients_that_say_anything(generator: Generator) -> None:
    rng = random.Random(1)
    words = (
        b"EHLO x\r\n",
        b"DATA\r\n",
        b"\r\n.\r\n",
        b".\r\n",
        b"\r",
        b"\n",
        b"x" * 511,
        b"DOWN -5\r\n",
        b"DOWN 9x\r\n",
    )
    last = (b"QUIT\r\n", b"x" * 513, b"BULK\r\nany\0thing", b"DOWN 99999999999999999999\r\n", b"")
    for _ in range(200):
        # It hangs up in the middle.
        with contextlib.suppress(OSError), socket.create_connection(generator.target) as sock:
            for _ in range(rng.randrange(5)):
                sock.sendall(b"".join(rng.choices(words, k=rng.randrange(1, 4))))
            sock.sendall(rng.choice(last))
    generator.look_at_sink()


def test_receivers_that_say_anything(generator: Generator) -> None:
    rng = random.Random(2)
    lines = (
        b"220 x\r\n",
        b"250-x\r\n",
        b"250 x\r\n",
        b"354 x\r\n",
        b"\n",
        b"2\n",
        b"250",
        b"550 no\r\n",
        b"\0" * 300_000,
    )

    def say(sock: socket.socket) -> None:
        for _ in range(rng.randrange(1, 12)):
            sock.sendall(rng.choice(lines))
        sock.shutdown(socket.SHUT_RDWR)

    with Raw(say) as receiver:
        for handshake in ("none", "socks5"):
            done = generator("load", *_FEW, "--sessions", "60", "--handshake", handshake, target=receiver.endpoint)
            assert (done.returncode, done.defects) == (1, "")
            assert "loadgen: " in done.output  # it says what is wrong, and gives up
