"""The sending side of the demonstration: three ways through the proxy, as different MTAs go them, and a message."""

from __future__ import annotations

import smtplib
import socket
import struct
from collections.abc import Callable

import socks

from demo.program import PATIENCE, SECRET, Address, Failure
from demo.receiver import MX_ADDRESS

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
