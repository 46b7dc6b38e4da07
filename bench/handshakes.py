#!/usr/bin/env python3
"""Handshakes a second with one and with two threads of `net.apart`: whether they grow with cores.

One piece of work is a whole handshake, both sides of it, in memory: what OpenSSL computes, without a network. So a
figure here is about half of what a proxy does that has one side. `resumed`: in an earlier session. On a busy machine
the figures are lower, and two threads have less than two cores. Takes half a minute.
"""

from __future__ import annotations

import contextlib
import ssl
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import gevent
import trustme

from proxy.net.apart import Apart
from proxy.net.contexts import Profile, client_context

_SECONDS = 3.0
#: Who wait in the line at a time: enough for two threads to be busy.
_WAITING = 8


def handshake(server: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLObject:
    """Both sides, to the tickets; the client's."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    far = server.wrap_bio(up, down, server_side=True)
    near = client_context(Profile()).wrap_bio(down, up, server_hostname="mx.example.net", session=session)
    for side in (near, far, near, far):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    far.write(b"250")
    near.read(3)
    return near


def rate(threads: int, server: ssl.SSLContext, session: ssl.SSLSession | None) -> float:
    """Handshakes a second."""
    apart, done, ends = Apart(threads), [], time.monotonic() + _SECONDS

    def work(key: int) -> None:
        while time.monotonic() < ends:
            done.append(apart.call(key, handshake, server, session).version())

    began = time.monotonic()
    gevent.joinall([gevent.spawn(work, key) for key in range(_WAITING)], raise_error=True)
    return len(done) / (time.monotonic() - began)


def main() -> None:
    print("| handshake, both sides | 1 thread | 2 threads | |\n|---|---|---|---|")
    authority = trustme.CA()
    for kind in (trustme.KeyType.ECDSA, trustme.KeyType.RSA):
        leaf = authority.issue_cert("mx.example.net", key_type=kind)
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf.configure_cert(server)
        for what, session in (("full", None), ("resumed", handshake(server, None).session)):
            one, two = (rate(threads, server, session) for threads in (1, 2))
            print(f"| TLS 1.3, {kind.name}, {what} | {one:,.0f}/s | {two:,.0f}/s | x {two / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
