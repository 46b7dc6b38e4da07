"""An MX that speaks STARTTLS, for what the C sink cannot: `tls_sink.py HOST PORT CERTIFICATE KEY`. Keeps nothing."""

import contextlib
import ssl
import sys

from gevent.server import StreamServer

_REPLIES = {b"MAIL": b"250 ok\r\n", b"RCPT": b"250 ok\r\n", b"RSET": b"250 ok\r\n", b"NOOP": b"250 ok\r\n"}


def serve(sock, _address):
    with contextlib.suppress(OSError):
        converse(sock)
    sock.close()


def converse(sock):
    secure = False
    lines = sock.makefile("rb")
    sock.sendall(b"220 mx.example ESMTP\r\n")
    while line := lines.readline():
        verb = line[:4].upper()
        if verb == b"EHLO":
            sock.sendall(b"250-mx.example\r\n250 SIZE\r\n" if secure else b"250-mx.example\r\n250 STARTTLS\r\n")
        elif verb == b"STAR" and not secure:
            sock.sendall(b"220 go ahead\r\n")
            sock = CONTEXT.wrap_socket(sock, server_side=True)
            lines, secure = sock.makefile("rb"), True
        elif verb == b"DATA":
            sock.sendall(b"354 go ahead\r\n")
            while (line := lines.readline()) and line != b".\r\n":
                pass
            sock.sendall(b"250 ok\r\n")
        elif verb == b"QUIT":
            sock.sendall(b"221 bye\r\n")
            return
        else:
            sock.sendall(_REPLIES.get(verb, b"500 what?\r\n"))


if __name__ == "__main__":
    from gevent import ssl as gevent_ssl

    CONTEXT = gevent_ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    CONTEXT.load_cert_chain(sys.argv[3], sys.argv[4])
    server = StreamServer((sys.argv[1], int(sys.argv[2])), serve, backlog=1024)
    server.start()
    print("ready", flush=True)
    server.serve_forever()
