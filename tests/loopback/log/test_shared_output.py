"""Several processes that write to one pipe, file or socket: every line arrives whole, and each process' in order."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.program import ROOT

PROCESSES, LINES = 4, 1500
#: What the `serial`th line has behind its number: of all lengths, and every 500th is longer than a pipe takes at once.
WRITER = """
import sys
import gevent
from proxy.log import writer

me, lines, form = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
out = writer.Writer(1, {}, lambda lost, total: f"{me} lost {lost}", limit=100_000)
out.share()
sys.stdin.read(1)
for serial in range(lines):
    length = 6000 if serial % 500 == 499 else serial * 7919 % 900
    text = chr(97 + me) * length
    if form == "json":
        out.put(f'{{"me":{me},"serial":{serial},"length":{length},"text":"{text}"}}')
    else:
        out.put(f"{me} {serial} {length} {text}|")
    if serial % 40 == 0:
        gevent.sleep(0)
while not out.flush(20.0):
    raise SystemExit("nobody reads")
"""


def begun(fd: int, form: str) -> list[subprocess.Popen[bytes]]:
    """The writers, which all begin at once."""
    words = [sys.executable, "-c", WRITER]
    writers = [
        subprocess.Popen([*words, str(me), str(LINES), form], cwd=ROOT, stdin=subprocess.PIPE, stdout=fd)
        for me in range(PROCESSES)
    ]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"!")
        writer.stdin.flush()
    return writers


def read(take: Callable[[int], bytes]) -> str:
    """All of it, a little at a time, so that the writers find no room again and again."""
    data = b""
    while piece := take(1500):
        data += piece
    return data.decode()


def ended(writers: list[subprocess.Popen[bytes]]) -> None:
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0


def check(said: str, form: str = "text") -> None:
    """No line is torn, lost, doubled, or out of the order of its writer."""
    assert said.endswith("\n")
    serials: dict[int, list[int]] = {me: [] for me in range(PROCESSES)}
    for line in said.splitlines():
        me, serial, length, text = fields(line, form)
        letter = chr(97 + me)
        if length > 4000:
            assert len(line.encode()) < 4096
            assert set(text) == {letter, "."}
            assert text.endswith("...")
        else:
            assert text == letter * length
        serials[me].append(serial)
    assert serials == {me: list(range(LINES)) for me in range(PROCESSES)}


def fields(line: str, form: str) -> tuple[int, int, int, str]:
    if form == "json":
        entry = json.loads(line)
        return entry["me"], entry["serial"], entry["length"], entry["text"]
    me, serial, length, text = line.split(" ", 3)
    assert text.endswith("|") or int(length) > 4000
    return int(me), int(serial), int(length), text.removesuffix("|")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_pipe(pipe: tuple[int, int], form: str) -> None:
    read_end, write_end = pipe
    writers = begun(write_end, form)
    os.close(write_end)
    said = read(lambda size: os.read(read_end, size))
    ended(writers)
    check(said, form)


def test_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writers = begun(theirs.fileno(), "text")
        theirs.close()
        said = read(ours.recv)
        ended(writers)
    check(said)


@pytest.mark.parametrize("flags", [os.O_APPEND, 0])
def test_a_file(tmp_path: Path, flags: int) -> None:
    """Also one that was opened without O_APPEND, as the shell's `>` does: who inherited it shares the place in it.

    Nothing is cut: what is written to a file is one piece however long.
    """
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags)
    writers = begun(fd, "text")
    os.close(fd)
    ended(writers)
    lines = path.read_text().splitlines()
    long = [line for line in lines if len(line) > 4096]
    assert len(long) == PROCESSES * (LINES // 500)
    assert all(line.endswith("|") for line in lines)
    serials = {me: [int(line.split(" ")[1]) for line in lines if line.startswith(f"{me} ")] for me in range(PROCESSES)}
    assert serials == {me: list(range(LINES)) for me in range(PROCESSES)}
