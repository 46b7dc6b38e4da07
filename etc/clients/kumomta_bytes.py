#!/usr/bin/env python3
"""What a KumoMTA with kumomta.lua sends, byte by byte: a check of the proxy without a KumoMTA.

    kumomta_bytes.py socks5 10.0.0.1:1080 192.0.2.1 198.51.100.7:25 server-a < secret
    kumomta_bytes.py ha_proxy 10.0.0.1:808 192.0.2.1 198.51.100.7:25

Prints each step and the receiver's greeting, says QUIT, and ends with 0; with 1 and the reason when the proxy refuses.
`connect` can be imported to send mail over the socket that it returns. Needs nothing but Python 3.
"""

import ipaddress
import socket
import struct
import sys

TIMEOUT = 60  # KumoMTA's own deadline for all of it
PASSWORD_OFFERED = b"\x05\x02\x00\x02"
NO_PASSWORD = b"\x05\x01\x00"
PROXY_V2 = b"\r\n\r\n\x00\r\nQUIT\n"
REASONS = (
    *("ok", "source address is not on the proxy, or failure", "not allowed", "network unreachable"),
    *("host unreachable", "connection refused", "timeout", "command not supported", "wrong address family"),
)


def connect(way, proxy, source, destination, user=None, secret=None, tell=lambda line: None):
    """A socket on which the receiver speaks next.

    Args:
        way: "socks5" or "ha_proxy".
        proxy, destination: (IP address, port).
        source: IP address to leave from.
        tell: called with a line for each thing that is sent or received.

    Raises:
        OSError: refused, with the proxy's reason.
    """
    sock = socket.create_connection(proxy, TIMEOUT)
    try:
        if way == "ha_proxy":
            _say(sock, _proxy_header(source, destination), tell)
        else:
            _socks5(sock, source, destination, user, secret, tell)
    except BaseException:
        sock.close()
        raise
    return sock


def _socks5(sock, source, destination, user, secret, tell):
    _say(sock, PASSWORD_OFFERED if user else NO_PASSWORD, tell)
    method = _hear(sock, 2, tell)[1]
    if method == 2:
        name, password = user.encode(), secret.encode()
        login = b"\x01%c%b%c%b" % (len(name), name, len(password), password)
        _say(sock, login, lambda line: tell("> login as " + user))
        if _hear(sock, 2, tell)[1]:
            raise OSError("the proxy refuses name and secret")
    elif method:
        raise OSError("the proxy wants another login method")
    for command, (host, port) in ((2, (source, 0)), (1, destination)):  # BIND, then CONNECT
        packed = ipaddress.ip_address(host).packed
        kind = 1 if len(packed) == 4 else 4
        _say(sock, bytes((5, command, 0, kind)) + packed + struct.pack("!H", port), tell)
        reply = _hear(sock, 4, tell)
        _hear(sock, 6 if reply[3] == 1 else 18, tell)
        if reply[1]:
            step = "BIND" if command == 2 else "CONNECT"
            raise OSError(f"{step} refused: {reply[1]} ({REASONS[reply[1]]})")


def _proxy_header(source, destination):
    """28 bytes for IPv4, 52 for IPv6; source port 0."""
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(destination[0]).packed
    family = 0x11 if len(addresses) == 8 else 0x21
    ports = struct.pack("!HH", 0, destination[1])
    return PROXY_V2 + struct.pack("!BBH", 0x21, family, len(addresses) + 4) + addresses + ports


def _say(sock, data, tell):
    tell("> " + data.hex(" "))
    sock.sendall(data)


def _hear(sock, size, tell):
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise OSError("the proxy closed the connection")
        data += more
    tell("< " + data.hex(" "))
    return data


def _endpoint(text):
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def main(arguments):
    way, proxy, source, destination, *user = arguments
    secret = sys.stdin.readline().rstrip("\n") if user else None
    try:
        sock = connect(way, _endpoint(proxy), source, _endpoint(destination), *user[:1] or (None,), secret, print)
        with sock, sock.makefile("rb") as lines:
            greeting = lines.readline().decode("ascii", "replace").rstrip()
            print(greeting)
            if greeting.startswith("220"):
                sock.sendall(b"QUIT\r\n")
                print(lines.readline().decode("ascii", "replace").rstrip())
    except OSError as error:
        print(error)
        return 1
    return 0 if greeting.startswith("220") else 1


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6) or sys.argv[1] not in ("socks5", "ha_proxy"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
