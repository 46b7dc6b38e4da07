"""Connections of the native protocol, authenticated here and handed over to the C generator, which speaks the rest.

In clear, as the peers that they are compared with. Proofs take Python and happen before anything is measured.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

from harness.machine import ROOT

sys.path.insert(0, str(ROOT))

from harness.permit_driver import Fleet
from proxy.protocols.native import messages as m
from proxy.protocols.native.auth import NO_CERTIFICATE, ClientHandshake

_TIMEOUT = 10.0
_READ = 65536
#: Beyond what can be asked for: nothing waits for a slot.
_MESSAGES_A_SECOND = 1_000_000


def _channel(address: tuple[str, int], secret: str, run_id: bytes) -> socket.socket:
    sock = socket.create_connection(address, _TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    handshake = ClientHandshake(
        m.Kind.CHANNEL, "bench", secret.encode(), run_id=run_id, nonce=os.urandom(32), certificate=NO_CERTIFICATE
    )
    out = handshake.start()
    while handshake.welcome is None:
        sock.sendall(out)
        out = handshake.receive(sock.recv(_READ))
    sock.setblocking(False)
    return sock


@contextlib.contextmanager
def channels(address: tuple[str, int], secret: str, count: int) -> Iterator[list[int]]:
    """Warm channels that no session stands beside; their descriptors."""
    run_id = os.urandom(16)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_channel(address, secret, run_id)) for _ in range(count)]
        yield [sock.fileno() for sock in opened]


@contextlib.contextmanager
def sessions(address: tuple[str, int], secret: str, count: int) -> Iterator[list[tuple[int, int]]]:
    """Sessions with a path 0 whose permits are there at once; descriptor and incarnation of each."""
    with Fleet(address, secret, [f"permits-{number}" for number in range(count)]) as fleet:
        for number, member in enumerate(fleet.members):
            fleet.register(member, [(0, f"own-{number}", _MESSAGES_A_SECOND, 1)])
        fleet.until(lambda: not any(member.decoder.unread for member in fleet.members))
        yield [(member.sock.fileno(), member.incarnation) for member in fleet.members]
