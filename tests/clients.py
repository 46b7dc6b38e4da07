"""Clients of the front doors, on plain blocking sockets: KumoMTA's exact bytes, PROXY headers, and SMTP over either."""

from __future__ import annotations

import smtplib
import socket
import ssl
import struct
from collections.abc import Callable
from ipaddress import ip_address

from tests.program import SECRET, Proxy

Address = tuple[str, int]
TIMEOUT = 20.0
_LINGER_RESET = struct.pack("ii", 1, 0)

NO_LOGIN = b"\x05\x01\x00"
WITH_PASSWORD = b"\x05\x02\x00\x02"  # as KumoMTA offers it
V2_SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"


# -- bytes -------------------------------------------------------------------------------------------------------------


def login(user: str = "mta-1", password: str = SECRET) -> bytes:
    """RFC 1929."""
    name, secret = user.encode(), password.encode()
    return bytes((1, len(name))) + name + bytes((len(secret),)) + secret


def address(host: str, port: int) -> bytes:
    """ATYP, address, port."""
    packed = ip_address(host).packed
    return bytes((1 if len(packed) == 4 else 4,)) + packed + struct.pack("!H", port)


def bind_request(source: str) -> bytes:
    return b"\x05\x02\x00" + address(source, 0)


def connect_request(destination: Address) -> bytes:
    return b"\x05\x01\x00" + address(*destination)


def v1(source: str, destination: Address, source_port: int = 0) -> bytes:
    """A PROXY header, version 1."""
    family = "TCP6" if ":" in source else "TCP4"
    return f"PROXY {family} {source} {destination[0]} {source_port} {destination[1]}\r\n".encode()


def v2(source: str, destination: Address, tlvs: bytes = b"", command: int = 0x21) -> bytes:
    """A PROXY header, version 2, as KumoMTA sends it: source port 0."""
    addresses = ip_address(source).packed + ip_address(destination[0]).packed + struct.pack("!HH", 0, destination[1])
    family = 0x11 if len(addresses) == 12 else 0x21
    return V2_SIGNATURE + struct.pack("!BBH", command, family, len(addresses) + len(tlvs)) + addresses + tlvs


# -- sockets -----------------------------------------------------------------------------------------------------------


def dial(door: Address, source: str | None = None) -> socket.socket:
    """A connected socket with a timeout."""
    return socket.create_connection(door, TIMEOUT, source_address=(source, 0) if source else None)


def exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer at the end of the file."""
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def read_all(sock: socket.socket) -> bytes:
    """Everything to the end of the file; a reset is ConnectionResetError."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def was_reset(sock: socket.socket) -> bool:
    """Whether the stream ends with RST; reads all that comes before."""
    try:
        read_all(sock)
    except ConnectionResetError:
        return True
    return False


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    sock.close()


class Refused(Exception):
    """The proxy said no; the argument is its whole reply."""


def socks5(
    door: Address,
    destination: Address,
    source: str | None = None,
    user: str | None = "mta-1",
    password: str = SECRET,
    client: str | None = None,
    tls: ssl.SSLContext | None = None,
) -> socket.socket:
    """Connect through SOCKS5 as KumoMTA does: ask, read the answer, ask.

    Args:
        source: to BIND before; None: no BIND.
        user: None: offer no password.
        client: the address to dial from.
        tls: speak TLS first.

    Raises:
        Refused: with the reply.
    """
    sock = secured(dial(door, client), tls)
    try:
        if user is None:
            _ask(sock, NO_LOGIN, b"\x05\x00")
        else:
            _ask(sock, WITH_PASSWORD, b"\x05\x02")
            _ask(sock, login(user, password), b"\x01\x00")
        if source is not None:
            _request(sock, bind_request(source))
        _request(sock, connect_request(destination))
    except BaseException:
        sock.close()
        raise
    return sock


def _ask(sock: socket.socket, question: bytes, wanted: bytes) -> None:
    sock.sendall(question)
    reply = exactly(sock, len(wanted))
    if reply != wanted:
        raise Refused(reply)


def _request(sock: socket.socket, request: bytes) -> None:
    sock.sendall(request)
    reply = exactly(sock, len(request))
    if reply[:2] != b"\x05\x00":
        raise Refused(reply)


def secured(sock: socket.socket, tls: ssl.SSLContext | None) -> socket.socket:
    """With TLS, if that is wanted."""
    try:
        return sock if tls is None else tls.wrap_socket(sock, server_hostname="proxy.example.net")
    except BaseException:
        sock.close()
        raise


def proxied(
    door: Address,
    destination: Address,
    source: str = "127.0.0.5",
    header: Callable[..., bytes] = v1,
    tls: ssl.SSLContext | None = None,
) -> socket.socket:
    """Connect through the PROXY protocol."""
    sock = secured(dial(door), tls)
    sock.sendall(header(source, destination))
    return sock


#: Each front door as one function: (proxy, destination, source) → a socket on which the receiver speaks next.
DOORS: dict[str, Callable[[Proxy, Address, str], socket.socket]] = {
    "socks5": lambda proxy, destination, source: socks5(proxy.socks5, destination, source),
    "proxy_v1": lambda proxy, destination, source: proxied(proxy.proxy_protocol, destination, source, v1),
    "proxy_v2": lambda proxy, destination, source: proxied(proxy.proxy_protocol, destination, source, v2),
}


class Smtp(smtplib.SMTP):
    """smtplib on a socket that is connected already."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(local_hostname="client.example", timeout=TIMEOUT)
        self.sock = sock
        self.greeting = self.getreply()


def send(sock: socket.socket, message: bytes, recipient: str = "to@example.net") -> tuple[int, bytes]:
    """Deliver one message whose bytes are as they shall arrive (CRLF line ends); the reply to the final dot."""
    smtp = Smtp(sock)
    assert smtp.greeting[0] == 220, smtp.greeting
    smtp.ehlo()
    assert smtp.mail("from@example.com")[0] == 250
    assert smtp.rcpt(recipient)[0] == 250
    assert smtp.docmd("DATA")[0] == 354
    sock.sendall(stuffed(message) + b".\r\n")
    reply = smtp.getreply()
    assert smtp.docmd("QUIT")[0] == 221
    smtp.close()
    return reply


def stuffed(message: bytes) -> bytes:
    """RFC 5321 section 4.5.2."""
    return b"\r\n".join(b"." + line if line.startswith(b".") else line for line in message.split(b"\r\n"))
