"""A demonstration on one machine, and a check: three MTAs share one proxy, and each leaves from its own address.

Everything runs on loopback addresses: an MX on 127.0.0.2, the proxy on 127.0.0.3 and .4, sources 127.0.0.11 to .13.
The MX records who connected and what arrived; at the end both are compared with what was sent, byte by byte.
Exit code 0 only if all of it is right. Started by `make demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import smtplib
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import socks
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP as SMTPServer

ROOT = Path(__file__).resolve().parents[1]
SECRET = "only-for-this-demonstration-0123456789"
MX_ADDRESS = "127.0.0.2"
SIZES = (2_000, 20_000, 500_000)
Address = tuple[str, int]
PATIENCE = 20.0  # seconds that any single step may take

CONFIGURATION = """\
listen_socks5 127.0.0.3:0
listen_proxy_protocol 127.0.0.4:0
allow_from 127.0.0.0/8
auth_shared_secret "{secret}"
source_ip 127.0.0.11, 127.0.0.12, 127.0.0.13
default_source_ip 127.0.0.13
destination_port {port}
allow_destination {mx}
stats_interval 1h
"""


class Failure(Exception):
    """Something is not as it should be; the text says what."""


def say(text: str = "") -> None:
    print(text, flush=True)


# ---------------------------------------------------------------- the receiving side


@dataclass
class Arrival:
    client: str
    sender: str
    content: bytes


class Mailbox:
    """The MX's memory, by Message-ID."""

    def __init__(self) -> None:
        self.arrived: dict[str, Arrival] = {}

    async def handle_DATA(self, server: SMTPServer, session: Any, envelope: Any) -> str:
        content = bytes(envelope.original_content)
        match = re.search(rb"^Message-ID: <(.+)>\r$", content, re.MULTILINE)
        name = match[1].decode() if match else "(no Message-ID)"
        self.arrived[name] = Arrival(session.peer[0], envelope.mail_from, content)
        return "250 2.0.0 accepted"


@contextlib.contextmanager
def mail_exchanger(mailbox: Mailbox) -> Iterator[int]:
    """An SMTP server on MX_ADDRESS; yields its port."""
    with socket.create_server((MX_ADDRESS, 0)) as probe:
        port = int(probe.getsockname()[1])
    mx = Controller(mailbox, hostname=MX_ADDRESS, port=port, data_size_limit=0)
    mx.start()
    try:
        yield port
    finally:
        mx.stop()


# ---------------------------------------------------------------- the proxy


class Proxy:
    """The program itself, in a process of its own; its log is kept."""

    def __init__(self, program: list[str], configuration: str, directory: Path) -> None:
        file = directory / "greenarrow_proxy.conf"
        file.touch(mode=0o600)
        file.write_text(configuration)
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._process = subprocess.Popen(
            [*program, f"--config-filename={file}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first log line that matches; waits for it."""
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            while True:
                for line in self.lines:
                    if match := re.search(pattern, line):
                        return match
                left = deadline - time.monotonic()
                if left <= 0 or self._process.poll() is not None:
                    log = "\n".join(self.lines) or "(nothing)"
                    raise Failure(
                        f"the proxy did not say {pattern!r}; exit code {self._process.poll()}; it said:\n{log}"
                    )
                self._changed.wait(min(left, 0.1))

    def address(self, protocol: str) -> Address:
        """Where it listens for `protocol`."""
        match = self.wait_for(rf"listening on (\S+):(\d+) protocol={protocol}\b")
        return match[1], int(match[2])

    def stop(self) -> int:
        """Ask for a clean stop; the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            self._reader.join(PATIENCE)
            if self._process.stdout is not None:
                self._process.stdout.close()


# ---------------------------------------------------------------- three ways through the proxy

Connect = Callable[[Address, int], socket.socket]


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise Failure("the proxy closed in the middle of its answer")
        data += chunk
    return data


def socks5_request(sock: socket.socket, command: int, host: str, port: int) -> int:
    """One SOCKS5 request with an IPv4 address; the reply code (RFC 1928 section 6)."""
    sock.sendall(struct.pack("!BBBB4sH", 5, command, 0, 1, socket.inet_aton(host), port))
    return read_exactly(sock, 10)[1]


def socks5_login(proxy: Address, instance: str) -> socket.socket:
    sock = socket.create_connection(proxy, PATIENCE)
    sock.sendall(b"\x05\x02\x00\x02")
    if read_exactly(sock, 2) != b"\x05\x02":
        raise Failure("the proxy does not want a password")
    sock.sendall(b"\x01" + bytes([len(instance)]) + instance.encode() + bytes([len(SECRET)]) + SECRET.encode())
    if read_exactly(sock, 2) != b"\x01\x00":
        raise Failure("the proxy refused the password")
    return sock


def like_kumomta(proxy: Address, mx_port: int) -> socket.socket:
    """SOCKS5 as KumoMTA speaks it: BIND names the address to leave from, then CONNECT."""
    sock = socks5_login(proxy, "server-a")
    for command, host, number in ((2, "127.0.0.11", 0), (1, MX_ADDRESS, mx_port)):
        reply = socks5_request(sock, command, host, number)
        if reply != 0:
            raise Failure(f"SOCKS command {command} {host}: reply {reply}")
    return sock


def like_greenarrow(proxy: Address, mx_port: int) -> socket.socket:
    """PROXY protocol v2 in the outbound sense: source = leave from here, destination = go there."""
    sock = socket.create_connection(proxy, PATIENCE)
    addresses = struct.pack("!4s4sHH", socket.inet_aton("127.0.0.12"), socket.inet_aton(MX_ADDRESS), 0, mx_port)
    sock.sendall(b"\r\n\r\n\x00\r\nQUIT\n" + b"\x21\x11" + struct.pack("!H", len(addresses)) + addresses)
    return sock


def like_a_script(proxy: Address, mx_port: int) -> socket.socket:
    """Any program with an ordinary SOCKS library; it cannot name a source, so `default_source_ip` decides."""
    sock = socks.socksocket()
    sock.set_proxy(socks.SOCKS5, *proxy, username="server-c", password=SECRET)
    sock.settimeout(PATIENCE)
    sock.connect((MX_ADDRESS, mx_port))
    return sock


@dataclass
class Sender:
    """One MTA: how it connects, where its mail must seem to come from, what it has sent."""

    name: str
    way: str
    protocol: str
    connect: Connect
    source: str
    sent: dict[str, bytes] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def run(self, proxy: Address, mx_port: int) -> None:
        """Send a message of each size, each through a connection of its own; the body of a thread."""
        try:
            for size in SIZES:
                self._send(proxy, mx_port, size)
        except (OSError, smtplib.SMTPException, socks.ProxyError, Failure) as error:
            self.error = f"{type(error).__name__}: {error}"

    def _send(self, proxy: Address, mx_port: int, size: int) -> None:
        name = f"{size}@{self.name}.example"
        content = message(name, self.name, size)
        began = time.monotonic()
        smtp = OverSocket(self.connect(proxy, mx_port))
        with smtp:
            smtp.sendmail(f"sender@{self.name}.example", ["user@receiver.example"], content)
        self.sent[name] = content
        self.seconds[name] = time.monotonic() - began
        say(f"  {self.name}: {size:>7,} bytes sent in {self.seconds[name] * 1000:.1f} ms")


class OverSocket(smtplib.SMTP):
    """smtplib on a connection that somebody else has made."""

    def __init__(self, sock: socket.socket) -> None:
        self._made = sock
        super().__init__("mx.receiver.example", 25, local_hostname="sender.example", timeout=PATIENCE)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:  # type: ignore[override]
        return self._made


def message(name: str, sender: str, size: int) -> bytes:
    """A message of about `size` bytes (a few hundred less at most), with all that relays like to damage."""
    head = f"From: sender@{sender}.example\r\nTo: user@receiver.example\r\nMessage-ID: <{name}>\r\n\r\n".encode()
    lines = [b".", b"..", b"", b"x" * 900, "grüße ✉".encode(), b"\x80\xff\x00 binary", b"QUIT", b"DATA", b".QUIT"]
    body = b"".join(line + b"\r\n" for line in lines)
    repeats, rest = divmod(size - len(head) - 2, len(body))
    return head + body * repeats + b"x" * min(rest, 900) + b"\r\n"


# ---------------------------------------------------------------- the story


def check(senders: list[Sender], mailbox: Mailbox) -> list[str]:
    """What is wrong with what arrived; and the account, a line a message."""
    wrong = []
    say("\nWhat the MX saw")
    say(f"  {'message':<26} {'way through the proxy':<34} {'left from':<12} {'time':>9}  content")
    for sender in senders:
        if sender.error:
            wrong.append(f"{sender.name}: {sender.error}")
        for name, content in sender.sent.items():
            arrival = mailbox.arrived.get(name)
            if arrival is None:
                wrong.append(f"{name} did not arrive")
                continue
            same = arrival.content == content
            if not same:
                wrong.append(f"{name} was changed on the way")
            if arrival.client != sender.source:
                wrong.append(f"{name} left from {arrival.client} instead of {sender.source}")
            verdict = f"{len(content):,} bytes, {'identical' if same else 'CHANGED'}"
            spent = f"{sender.seconds[name] * 1000:.1f} ms"
            say(f"  {name:<26} {sender.way:<34} {arrival.client:<12} {spent:>9}  {verdict}")
    expected = len(senders) * len(SIZES)
    if len(mailbox.arrived) != expected:
        wrong.append(f"{len(mailbox.arrived)} messages arrived instead of {expected}")
    return wrong


def check_refusal(proxy: Address) -> list[str]:
    """An address that is not in source_ip must be refused, before anything leaves."""
    with socks5_login(proxy, "server-a") as sock:
        reply = socks5_request(sock, 2, "127.0.0.66", 0)
    say(f"  server-a asks to leave from 127.0.0.66, which is not in source_ip: SOCKS reply {reply} (2: not allowed)")
    return [] if reply == 2 else [f"leaving from 127.0.0.66 was answered with {reply}"]


def demonstrate(program: list[str]) -> list[str]:
    """Run everything; returns what went wrong.

    Raises:
        Failure: it could not go on.
    """
    senders = [
        Sender("server-a", "SOCKS5, BIND + CONNECT (KumoMTA)", "socks5", like_kumomta, "127.0.0.11"),
        Sender("server-b", "PROXY v2 (GreenArrow and others)", "proxy_protocol", like_greenarrow, "127.0.0.12"),
        Sender("server-c", "SOCKS5, a library (any program)", "socks5", like_a_script, "127.0.0.13"),
    ]
    mailbox = Mailbox()
    with mail_exchanger(mailbox) as mx_port, tempfile.TemporaryDirectory() as directory:
        say(f"MX listens on {MX_ADDRESS}:{mx_port}. Starting the proxy ...")
        configuration = CONFIGURATION.format(secret=SECRET, port=mx_port, mx=MX_ADDRESS)
        proxy = Proxy(program, configuration, Path(directory))
        try:
            doors = {protocol: proxy.address(protocol) for protocol in ("socks5", "proxy_protocol")}
            listing = ", ".join(f"{host}:{port} ({protocol})" for protocol, (host, port) in doors.items())
            say(f"The proxy listens on {listing}. Three MTAs send at the same time:")
            threads = [threading.Thread(target=s.run, args=(doors[s.protocol], mx_port)) for s in senders]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wrong = check_refusal(doors["socks5"])
        finally:
            code = proxy.stop()
    wrong += check(senders, mailbox)
    wrong += check_log(senders, proxy.lines, code)
    return wrong


def check_log(senders: list[Sender], lines: list[str], code: int) -> list[str]:
    """The proxy's own account must agree: one closing line for each connection, with the right source."""
    wrong = [] if code == 0 else [f"the proxy ended with exit code {code}"]
    own = [line for line in lines if re.search(r"\b(connection|refused|failed) id=", line)]
    say("\nWhat the proxy logged")
    for line in own:
        say(f"  {line}")
    for sender in senders:
        count = sum(f" protocol={sender.protocol} " in line and f" source={sender.source} " in line for line in own)
        if count != len(SIZES):
            wrong.append(f"{count} closing lines about {sender.source} instead of {len(SIZES)}")
    if not any("reason=source_not_allowed" in line for line in own):
        wrong.append("no line about the refused source")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument(
        "--program", default=f"{sys.executable} {ROOT / 'greenarrow_proxy.py'}", help="the proxy to run"
    )
    program = parser.parse_args().program.split()
    began = time.monotonic()
    try:
        wrong = demonstrate(program)
    except Failure as failure:
        wrong = [str(failure)]
    if wrong:
        say("\nFAILED\n  " + "\n  ".join(wrong))
        return 1
    spent = time.monotonic() - began
    say(f"\nAll right: {len(SIZES) * 3} messages, three source addresses, every byte as sent; {spent:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
