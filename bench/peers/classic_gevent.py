"""The classic gevent relay, as tutorials write it: StreamServer, two greenlets a connection, recv and sendall.

It stands for what one gets without thinking about cost. PROXY v2 on the first port, SOCKS5 without authentication on
the second: `classic_gevent.py PROXY_PORT SOCKS_PORT`.
"""

import contextlib
import signal
import socket as stdlib_socket
import struct
import sys

import gevent
from gevent import socket
from gevent.server import StreamServer

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c"


def read_exactly(sock, length):
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def connect(source, destination):
    upstream = socket.socket()
    upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if source:
        upstream.setsockopt(socket.IPPROTO_IP, getattr(stdlib_socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
        upstream.bind((source, 0))
    upstream.connect(destination)
    return upstream


def proxy_protocol(client):
    header = read_exactly(client, 28)
    if header[:16] != SIGNATURE:
        raise EOFError
    source, destination, _, port = struct.unpack("!4s4sHH", header[16:])
    return connect(socket.inet_ntoa(source), (socket.inet_ntoa(destination), port))


def socks5(client):
    read_exactly(client, 3)
    client.sendall(b"\x05\x00")
    address, port = struct.unpack("!4x4sH", read_exactly(client, 10))
    upstream = connect(None, (socket.inet_ntoa(address), port))
    client.sendall(b"\x05\x00\x00\x01" + bytes(6))
    return upstream


def forward(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def handler(handshake):
    def handle(client, _address):
        with contextlib.suppress(EOFError, OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.closing(handshake(client)) as upstream:
                back = gevent.spawn(forward, upstream, client)
                forward(client, upstream)
                back.join()

    return handle


def main():
    doors = zip(sys.argv[1:3], (proxy_protocol, socks5), strict=True)
    servers = [StreamServer(("127.0.0.1", int(port)), handler(handshake), backlog=4096) for port, handshake in doors]
    for server in servers:
        server.start()
    gevent.signal_handler(signal.SIGTERM, sys.exit, 0)
    gevent.wait()


if __name__ == "__main__":
    main()
