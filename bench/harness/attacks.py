"""What a hostile peer does to make everybody else wait: one generator for each attack, run in a process of its own.

An attack gets ready (connects, authenticates, makes its bytes) up to its first `yield`, and attacks from there until
it has nothing more to say; who runs it ends it. Nothing here is clever on the wire but `tests.tls_records`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tests import clients, independent_client
from tests.certificates import server_context
from tests.independent_client import Peer
from tests.tls_records import KeyLog, Records

Address = tuple[str, int]
Attack = Generator[None, None, None]
_PONG, _PING, _REG, _OUTCOME, _LIMIT = 0x21, 0x20, 0x23, 0x26, 0x2A
_REFUSED = ("10.0.0.25", 25)  # private
_HERE = "127.0.0.1"
#: Seconds that an attacker stays, or goes on, so that what it sent has its effect.
_WATCHED = 3.0
_HANDSHAKES_A_SECOND = 200


class Doors(NamedTuple):
    """Where the program listens, and whether its native listener speaks TLS; for its operator pid and configuration."""

    native: Address
    socks5: Address
    status: Address
    tls: bool
    pid: int
    config: Path


# -- TLS without plaintext ---------------------------------------------------------------------------------------------


def key_updates_of_a_stranger(doors: Doors) -> Attack:
    """Nobody knows who it is, and nothing but KeyUpdates comes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with KeyLog(context) as log:
        ready = []
        for _ in range(4):
            sock = context.wrap_socket(socket.create_connection(doors.native, 10))
            ready.append((sock, log.records(sock, "CLIENT").key_updates(100_000)))
        yield
        _send_all([(sock.detach(), data) for sock, data in ready])


def key_updates_of_a_receiver(doors: Doors) -> Attack:
    """A receiver that was reached with STARTTLS says no more words, only KeyUpdates."""
    yield from _receiver(doors, lambda records: records.key_updates(100_000), after_ehlo=False)


def tickets_of_a_receiver(doors: Doors) -> Attack:
    yield from _receiver(doors, lambda records: records.tickets(200_000), after_ehlo=False)


def tickets_of_a_cached_receiver(doors: Doors) -> Attack:
    """The same, when its connection was given back and is kept."""
    yield from _receiver(doors, lambda records: records.tickets(200_000), after_ehlo=True)


def _receiver(doors: Doors, flood: Callable[[Records], bytes], after_ehlo: bool) -> Attack:
    context = server_context("valid")
    context.num_tickets = 0
    ready: list[tuple[int, bytes]] = []
    made = threading.Semaphore(0)
    with KeyLog(context) as log, socket.create_server((_HERE, 0)) as listener:

        def receive() -> None:
            for _ in range(4):
                sock, _ = listener.accept()
                sock.sendall(b"220 mx\r\n")
                sock.recv(4096)
                sock.sendall(b"250-mx\r\n250 STARTTLS\r\n")
                sock.recv(4096)
                sock.sendall(b"220 go\r\n")
                secure = context.wrap_socket(sock, server_side=True)
                records = log.records(secure, "SERVER")
                secure.recv(4096)
                if after_ehlo:
                    _say(secure, records.data(b"250 mx\r\n"))
                    secure.recv(4096)  # RSET
                    _say(secure, records.data(b"250 ok\r\n"))
                data = flood(records)
                ready.append((secure.detach(), data))
                made.release()

        threading.Thread(target=receive, daemon=True).start()
        channels = [independent_client.channel(doors.native, tls=doors.tls) for _ in range(4)]
        for number, channel in enumerate(channels):
            channel.say_open(
                listener.getsockname(), ehlo_name=f"mta{number}.example", tls="required", reuse=True, deadline_ms=60_000
            )
            if after_ehlo:
                assert channel.hear()[0] == independent_client.OPENED
                channel.finish(keep=True)
            assert made.acquire(timeout=30)
        yield
        _send_all(ready)


def _say(sock: ssl.SSLSocket, data: bytes) -> None:
    """Past `ssl`, which would encrypt it."""
    with socket.socket(fileno=os.dup(sock.fileno())) as raw:
        raw.sendall(data)


def _send_all(ready: list[tuple[int, bytes]]) -> None:
    threads = [threading.Thread(target=_send_quietly, args=each) for each in ready]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send_quietly(fd: int, data: bytes) -> None:
    with contextlib.suppress(OSError), socket.socket(fileno=fd) as sock:
        sock.setblocking(True)
        sock.sendall(data)


# -- channels ----------------------------------------------------------------------------------------------------------


def opens_without_waiting(doors: Doors) -> Attack:
    """OPENs that are refused, without a look at the answers."""
    channels = [independent_client.channel(doors.native, tls=doors.tls) for _ in range(5)]
    one = msgspec.msgpack.encode(["127.0.0.5", [_REFUSED], None, "none", None, False, False, [], 10_000])
    data = independent_client.frame(independent_client.OPEN, one) * 40_000
    yield
    _flood(channels, data)


def frames_of_one_byte(doors: Doors) -> Attack:
    """DATA frames of one byte each, to a receiver that takes them all."""
    with socket.create_server((_HERE, 0)) as listener:
        channels = [independent_client.channel(doors.native, tls=doors.tls) for _ in range(3)]
        for channel in channels:
            channel.opened(listener.getsockname())
            sock, _ = listener.accept()
            threading.Thread(target=_drain, args=(sock,), daemon=True).start()
        data = independent_client.frame(independent_client.DATA, b"x") * 500_000
        yield
        _flood(channels, data)


def _flood(peers: list[Peer], data: bytes) -> None:
    """All of them at the same time; what comes back is read and dropped."""

    def send(peer: Peer) -> None:
        with contextlib.suppress(OSError):
            peer.sock.sendall(data)

    for peer in peers:
        threading.Thread(target=_drain, args=(peer.sock,), daemon=True).start()
    threads = [threading.Thread(target=send, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(_WATCHED)


def _drain(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(65536):
            pass


# -- sessions ----------------------------------------------------------------------------------------------------------

_FLOWS = 99_000


def outcomes_on_a_wide_throttle(doors: Doors) -> Attack:
    """Many paths through one throttle, then a frame of outcomes that each slow it down."""
    with _session(doors, _FLOWS, _wide) as (peer, incarnation):
        yield
        _say_frame(peer, _OUTCOME, incarnation, [(id, 0, 0, 50, True) for id in range(200)])
        time.sleep(_WATCHED)


def other_rates_on_a_wide_throttle(doors: Doors) -> Attack:
    """The same with a REG that changes the rate, and again."""
    with _session(doors, _FLOWS, _wide) as (peer, incarnation):
        yield
        _say_frame(peer, _REG, incarnation, [_path(id, _wide(id), 3601 + id) for id in range(200)])
        time.sleep(_WATCHED)


def pings(doors: Doors) -> Attack:
    """As many PINGs as fit in 64 KB, in one write, over and over."""
    with _session(doors, 1, lambda id: (str(id),)) as (peer, incarnation):
        ping = independent_client.frame(_PING, msgspec.msgpack.encode([incarnation, 1]))
        data = ping * (65536 // len(ping))
        yield
        ends = time.monotonic() + _WATCHED
        while time.monotonic() < ends:
            peer.sock.sendall(data)


@contextlib.contextmanager
def _session(
    doors: Doors, paths: int, names: Callable[[int], tuple[str, ...]], instance: str = "attacker"
) -> Iterator[tuple[Peer, int]]:
    """A session that answers pings, with so many paths registered and answered."""
    with independent_client.session(doors.native, instance=instance, tls=doors.tls) as peer:
        incarnation = peer.welcome[1]
        news = threading.Semaphore(0)
        seen: list[int] = []

        def listen() -> None:
            with contextlib.suppress(OSError, independent_client.Closed):
                while True:
                    kind, payload = peer.raw()
                    if kind == _PING:
                        _say_frame(peer, _PONG, incarnation, msgspec.msgpack.decode(payload)[1], 0)
                    elif kind == _LIMIT and len(seen) < paths:
                        seen.extend(record[0] for record in msgspec.msgpack.decode(payload)[1])
                        news.release()

        threading.Thread(target=listen, daemon=True).start()
        for at in range(0, paths, 1000):
            batch = range(at, min(at + 1000, paths))
            _say_frame(peer, _REG, incarnation, [_path(number, names(number)) for number in batch])
            while len(seen) < batch.stop:
                assert news.acquire(timeout=60), len(seen)
        yield peer, incarnation


def _wide(number: int) -> tuple[str, ...]:
    return "one", f"own-{number}"


def _path(id: int, names: tuple[str, ...], amount: int = 3600) -> list[Any]:
    backoff = [50, None, 300, 0]
    first = [names[0], [[amount, 3600, 1]], 0, "average", False, backoff]
    return [id, "127.0.0.5", [first, *([name, []] for name in names[1:])]]


def _say_frame(peer: Peer, kind: int, *fields: Any) -> None:
    peer.sock.sendall(independent_client.frame(kind, msgspec.msgpack.encode(fields)))


# -- the status --------------------------------------------------------------------------------------------------------


def readers_of_the_page(doors: Doors) -> Attack:
    """Forty at once, with a page as long as it gets."""
    with contextlib.ExitStack() as stack:
        for number in range(20):
            stack.enter_context(_session(doors, 500, lambda id: (f"throttle-{id}",), f"instance-{number}"))
        yield
        for _ in range(3):
            threads = [threading.Thread(target=_read_page, args=(doors.status,)) for _ in range(40)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            time.sleep(0.3)


def _read_page(door: Address) -> None:
    with contextlib.suppress(OSError), socket.create_connection(door, 10) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        clients.read_all(sock)


# -- handshakes --------------------------------------------------------------------------------------------------------


def client_hellos(doors: Doors) -> Attack:
    """The first flight of a handshake and no more, from as many connections as there can be."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    hello = outgoing.read()
    yield
    ends = time.monotonic() + _WATCHED
    held: list[socket.socket] = []
    while time.monotonic() < ends:
        with contextlib.suppress(OSError):
            sock = socket.create_connection(doors.native, 10, source_address=("127.0.9.9", 0))
            sock.sendall(hello)
            held.append(sock)
        if len(held) > 200:
            clients.reset(held.pop(0))


def handshakes(doors: Doors) -> Attack:
    """No attack, but what is usual at a busy proxy: full handshakes, so many a second."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    yield

    def one() -> None:
        context.wrap_socket(socket.create_connection(doors.native, 10)).close()

    _paced(one)


def handshakes_with_receivers(doors: Doors) -> Attack:
    """The same on the other side: sessions over TLS, none of which goes on in an earlier one. They have P-256."""
    context = server_context("valid")
    context.num_tickets = 0
    listener = socket.create_server((_HERE, 0), backlog=256)

    def receive() -> None:
        while True:
            sock, _ = listener.accept()
            sock.sendall(b"220 mx\r\n")
            sock.recv(4096)
            sock.sendall(b"250-mx\r\n250 STARTTLS\r\n")
            sock.recv(4096)
            sock.sendall(b"220 go\r\n")
            with context.wrap_socket(sock, server_side=True) as secure:
                secure.recv(4096)
                secure.sendall(b"250 mx\r\n")
                secure.recv(4096)  # QUIT, or the end

    for _ in range(16):
        threading.Thread(target=receive, daemon=True).start()
    waiting = [independent_client.channel(doors.native, tls=doors.tls) for _ in range(8)]
    yield

    def one() -> None:
        peer = waiting.pop(0)
        peer.opened(listener.getsockname(), ehlo_name="mta.example", tls="required", deadline_ms=60_000)
        peer.finish()
        waiting.append(peer)

    _paced(one, len(waiting))


def _paced(one: Callable[[], None], threads: int = 4) -> None:
    """So many of these a second, for a while; how many there were in fact goes to standard error."""
    began, done = time.monotonic(), []

    def run(number: int) -> None:
        while (due := began + number / _HANDSHAKES_A_SECOND) < began + _WATCHED:
            time.sleep(max(0.0, due - time.monotonic()))
            one()
            done.append(number)
            number += threads

    running = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    print(f"{len(done) / (time.monotonic() - began):.0f} handshakes a second", file=sys.stderr, flush=True)


# -- the operator ------------------------------------------------------------------------------------------------------


def reloads(doors: Doors) -> Attack:
    """Three reloads, each with other limits in every block."""
    yield
    for rate in ("2000/hr", "3000/hr", "1000/hr"):
        text = doors.config.read_text()
        doors.config.write_text(re.sub(r"(?<=max_delivery_rate )\S+", rate, text))
        os.kill(doors.pid, signal.SIGHUP)
        time.sleep(_WATCHED)
