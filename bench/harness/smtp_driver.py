"""SMTP sessions driven from Python, for doors that the C generator does not speak: TLS and the native protocol.

Several threads send one message of 20 KB after another, each over a connection that a *dialler* gives them. Only the
proxy's CPU is counted. All rows of such a workload are driven by this same code, so their ratios compare proxies; they
must not be compared with figures of the C generator, which loads a proxy's core more evenly.
"""

from __future__ import annotations

import socket
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable
from smtplib import SMTPException
from typing import Any, Protocol

from harness.candidates import SECRET, SINK
from harness.machine import ROOT
from harness.usage import process_cpu

sys.path.insert(0, str(ROOT))

from greenarrow_proxy_client import ProxyFailure

_THREADS = 8
_SECONDS, _SECONDS_QUICK = 2.0, 1.5
_TIMEOUT = 10.0
_LINE = b"The quick brown fox jumps over the lazy dog, again and again and once more.\r\n"
MESSAGE = _LINE * (20 * 1024 // len(_LINE) + 1) + b".\r\n"
SOURCE = "127.0.2.1"


class Stream(Protocol):
    """What a dialogue needs of a connection."""

    def sendall(self, data: bytes, /) -> None: ...

    def recv(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


Dialler = Callable[[], Stream]


def sink_address() -> tuple[str, int]:
    host, port = SINK.split(":")
    return host, int(port)


def proxy_header(destination: tuple[str, int] | None = None) -> bytes:
    host, port = destination or sink_address()
    addresses = socket.inet_aton(SOURCE) + socket.inet_aton(host) + struct.pack("!HH", 1, port)
    return b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + addresses


def _is_whole(data: bytes) -> bool:
    last_line = data[data.rfind(b"\n", 0, -1) + 1 :]
    return last_line.endswith(b"\n") and last_line[3:4] == b" "


def expect(stream: Stream, code: bytes) -> None:
    """Reads one reply, which may have several lines, and checks its code."""
    data = b""
    while not _is_whole(data):
        piece = stream.recv(4096)
        if not piece:
            raise EOFError("closed in the middle of a reply")
        data += piece
    if not data.startswith(code):
        raise ValueError(f"unexpected reply {data[:80]!r}")


def send_message(stream: Stream) -> None:
    """MAIL to the reply after the final dot, on a session past EHLO."""
    for words, code in (
        (b"MAIL FROM:<bounce-1234567@sender.example.com>\r\n", b"250"),
        (b"RCPT TO:<recipient@example.net>\r\n", b"250"),
        (b"DATA\r\n", b"354"),
        (MESSAGE, b"250"),
    ):
        stream.sendall(words)
        expect(stream, code)


def whole_session(stream: Stream) -> None:
    expect(stream, b"220")
    stream.sendall(b"EHLO mta1.sender.example.com\r\n")
    expect(stream, b"250")
    send_message(stream)
    stream.sendall(b"QUIT\r\n")
    expect(stream, b"221")


def dial_socks5(port: int) -> Stream:
    """Password, BIND, CONNECT: what KumoMTA does."""
    stream = _connect(port)
    user, secret = b"bench", SECRET.encode()
    host, target_port = sink_address()
    login = b"\x01" + bytes([len(user)]) + user + bytes([len(secret)]) + secret
    bind = b"\x05\x02\x00\x01" + socket.inet_aton(SOURCE) + b"\x00\x00"
    connect = b"\x05\x01\x00\x01" + socket.inet_aton(host) + struct.pack("!H", target_port)
    for request, reply_length in ((b"\x05\x01\x02", 2), (login, 2), (bind, 10), (connect, 10)):
        stream.sendall(request)
        reply = stream.recv(reply_length, socket.MSG_WAITALL)
        if reply[1:2] not in (b"\x00", b"\x02"):
            raise ValueError(f"refused: {reply!r}")
    return stream


def dial_proxy_tls(port: int, context: ssl.SSLContext) -> Stream:
    """PROXY v2, then TLS that ends at the proxy: a fresh handshake for each SMTP session."""
    stream = _connect(port)
    stream.sendall(proxy_header())
    return context.wrap_socket(stream)


def _connect(port: int) -> socket.socket:
    stream = socket.create_connection(("127.0.0.1", port), _TIMEOUT)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def unverified_tls() -> ssl.SSLContext:
    """The peers' certificates are made for the run; who they are is not the question here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def accepted(sink: tuple[str, int]) -> int:
    """Messages that a sink of the generator has taken so far; it is asked past the proxy."""
    with socket.create_connection(sink, _TIMEOUT) as stream, stream.makefile("rb") as lines:
        lines.readline()
        stream.sendall(b"STAT\r\n")
        return int(lines.readline().split()[1])


def drive(pid: int, quick: bool, work: Callable[[], None], sink: tuple[str, int] | None = None) -> dict[str, Any]:
    """Have threads do `work` again and again; the sample, with a unit for each time that it returned.

    Each `work` is a message, which `sink` must have (None: the one in clear).
    """
    sink = sink or sink_address()
    had = accepted(sink)
    end = time.monotonic() + (_SECONDS_QUICK if quick else _SECONDS)
    waits: list[float] = []
    errors: list[str] = []

    def loop() -> None:
        while (began := time.monotonic()) < end and len(errors) < 20:
            try:
                work()
            except (OSError, EOFError, ValueError, ProxyFailure, SMTPException) as error:
                errors.append(str(error) or type(error).__name__)
            else:
                waits.append(time.monotonic() - began)

    before, began = process_cpu(pid), time.monotonic()
    threads = [threading.Thread(target=loop) for _ in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent, seconds = process_cpu(pid) - before, time.monotonic() - began
    if errors or not waits:
        return {"failed": errors[0] if errors else "nothing was done"}
    if (came := accepted(sink) - had) != len(waits):
        return {"failed": f"the sink has {came} of {len(waits)} messages"}
    waits.sort()
    return {
        "unit": "session",
        "units": len(waits),
        "errors": 0,
        "seconds": seconds,
        "units_per_second": len(waits) / seconds,
        "cpu_us_per_unit": spent * 1e6 / len(waits),
        "proxy_core_use": spent / seconds,
        "session_p50_us": waits[len(waits) // 2] * 1e6,
        "session_p99_us": waits[int(len(waits) * 0.99)] * 1e6,
    }


def drive_sessions(pid: int, quick: bool, dial: Dialler) -> dict[str, Any]:
    """A connection of its own for each session."""

    def work() -> None:
        stream = dial()
        try:
            whole_session(stream)
        finally:
            stream.close()

    return drive(pid, quick, work)
