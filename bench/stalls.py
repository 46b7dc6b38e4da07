#!/usr/bin/env python3
"""The longest stall of an innocent connection while somebody attacks: one row for each attack of harness/attacks.py.

The innocent plays ping-pong through SOCKS5, in a process of its own, from before an attack until its end; the attack
runs in another one, against the real program. What is printed is the longest that the innocent waited for a byte to go
through and come back, and the most that the proxy itself computed meanwhile. Takes about a minute. On a busy machine
the row without an attack says how much of the first figure is noise; the second one has none.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing as mp
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from harness import attacks

from tests import clients
from tests.program import Proxy

#: Longest stall that is aimed at, in milliseconds, on a machine that does nothing else.
GOAL, GOAL_OF_HANDSHAKES = 20, 50
#: Seconds between two pings.
_PAUSE = 0.001
#: Seconds that the innocent is watched, if an attack does not last longer.
_AT_LEAST = 2.0
_CONFIG = "listen_status 127.0.1.4:0\n"


class Row(NamedTuple):
    """One attack: the generator, how many processes do it; whether the native listener speaks TLS, which an attack
    with threads on one connection cannot, and the bits of its RSA key (0: P-256); what else is configured."""

    what: str
    attack: Callable[[attacks.Doors], attacks.Attack] | None
    processes: int = 1
    tls: bool = False
    rsa: int = 0
    goal: int = GOAL
    config: str = ""


def blocks(number: int) -> str:
    """So many throttle blocks, each with lists of its own, which overlap."""
    return "".join(
        f"throttle t{n} {{\n    destination 98.0.0.0/8, 99.{n >> 8}.{n & 255}.0/24\n    domain d{n}.example\n"
        f"    source 10.0.{n >> 8}.{n & 255}\n    max_delivery_rate 1000/hr\n}}\n"
        for n in range(number)
    )


#: 4,094 addresses with a name each; a CIDR stands for its hosts.
SOURCES = "source vmta* {\n    ip 10.1.0.0/20\n    ehlo mail-{ip}.example.com\n}\n"

ROWS = {
    "quiet": Row("nobody attacks", None),
    "keyupdate": Row("4 strangers send KeyUpdates", attacks.key_updates_of_a_stranger, tls=True),
    "mx-keyupdate": Row("4 receivers send KeyUpdates", attacks.key_updates_of_a_receiver),
    "mx-tickets": Row("4 receivers send 200,000 tickets each", attacks.tickets_of_a_receiver),
    "mx-cached": Row("the same from cached receivers", attacks.tickets_of_a_cached_receiver),
    "open": Row("5 channels send OPENs without waiting", attacks.opens_without_waiting),
    "bytes": Row("3 channels send DATA of one byte", attacks.frames_of_one_byte),
    "outcome": Row("200 OUTCOMEs on a throttle of 99,000 paths", attacks.outcomes_on_a_wide_throttle),
    "reg": Row("200 REGs with other rates on such a throttle", attacks.other_rates_on_a_wide_throttle),
    "page": Row("40 readers of the status page at once", attacks.readers_of_the_page),
    "ping": Row("PINGs, 64 KB at a time", attacks.pings),
    "hello": Row("ClientHellos, P-256", attacks.client_hellos, tls=True, processes=2, goal=GOAL_OF_HANDSHAKES),
    "hello-rsa": Row("ClientHellos, RSA 4096", attacks.client_hellos, tls=True, rsa=4096, goal=GOAL_OF_HANDSHAKES),
    "handshakes": Row("200 handshakes a second by clients, P-256", attacks.handshakes, tls=True),
    "handshakes-rsa": Row("200 handshakes a second by clients, RSA 2048", attacks.handshakes, tls=True, rsa=2048),
    "mx-handshakes": Row("200 handshakes a second with receivers, P-256", attacks.handshakes_with_receivers),
    "reload-blocks": Row("reloads with 10,000 throttle blocks", attacks.reloads, goal=50, config=blocks(10_000)),
    "reload-sources": Row("reloads with 4,094 sources in bulk", attacks.reloads, goal=50, config=SOURCES),
}


class Stalls(NamedTuple):
    """Milliseconds: the longest wait of all, that of one in a hundred, and the most processor time of the proxy's loop
    within one wait; and how many pings there were."""

    longest: float
    p99: float
    computed: float
    pings: int


def computed(pid: int) -> float:
    """Milliseconds that the first thread of a process has run."""
    with open(f"/proc/{pid}/task/{pid}/schedstat", encoding="ascii") as file:
        return int(file.read().split()[0]) / 1e6


def innocent(door: tuple[str, int], pid: int, over: Any, ready: Any, results: Any) -> None:
    """Ping-pong through the proxy until told to stop; client and receiver are one thread, so nothing else waits."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = clients.socks5(door, listener.getsockname())
        receiver, _ = listener.accept()
    for sock in (client, receiver):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(120)
    waits, works = [], []
    while not over.is_set() or not waits:
        before, began = computed(pid), time.perf_counter()
        client.sendall(b"?")
        receiver.recv(1)
        receiver.sendall(b"!")
        client.recv(1)
        waits.append((time.perf_counter() - began) * 1000)
        works.append(computed(pid) - before)
        if len(waits) == 100 and not ready.is_set():
            waits.clear()  # the warm-up
            works.clear()
            ready.set()
        time.sleep(_PAUSE)
    waits.sort()
    results.send(Stalls(waits[-1], waits[len(waits) * 99 // 100], max(works), len(waits)))


def attacker(attack: Callable[[attacks.Doors], attacks.Attack], doors: attacks.Doors, ready: Any, go: Any) -> None:
    steps = attack(doors)
    next(steps)
    ready.release()
    go.wait()
    next(steps, None)
    os._exit(0)  # its threads may still read


def first_of_all(pid: int) -> None:
    """Run before all else: a machine that does other things measures these otherwise. (Not the real-time scheduler: it
    stops for 50 ms in each second.)"""
    os.setpriority(os.PRIO_PROCESS, pid, -20)


def measure(row: Row, first: bool) -> Stalls:
    """One row, with the program and all others in processes of their own."""
    tls = "" if row.tls else "listen_tls no\n"
    with certificate(row.rsa) as more, Proxy(_CONFIG + tls + more + row.config) as proxy:
        doors = attacks.Doors(
            proxy.native, proxy.socks5, proxy.door("status"), row.tls, proxy.pid or 0, Path(proxy.path)
        )
        over, steady, go, prepared = mp.Event(), mp.Event(), mp.Event(), mp.Semaphore(0)
        results, out = mp.Pipe(False)
        attackers = []
        if row.attack is not None:
            arguments = (row.attack, doors, prepared, go)
            attackers = [mp.Process(target=attacker, args=arguments) for _ in range(row.processes)]
        for each in attackers:
            each.start()
        for _ in attackers:
            if not prepared.acquire(timeout=120):
                raise TimeoutError(f"{row.what}: the attack was not ready")
        watcher = mp.Process(target=innocent, args=(doors.socks5, doors.pid, over, steady, out))
        watcher.start()
        if first:
            for pid in (proxy.pid, watcher.pid):
                first_of_all(pid or 0)
        if not steady.wait(30):
            raise TimeoutError(f"{row.what}: nobody could connect")
        go.set()
        time.sleep(_AT_LEAST)
        for each in attackers:
            each.join(30)
            each.kill()
        over.set()
        found: Stalls = results.recv()
        watcher.join()
    return found


@contextlib.contextmanager
def certificate(bits: int) -> Iterator[str]:
    """Directives for a certificate with an RSA key; nothing when none is wanted."""
    if not bits:
        yield ""
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pem"
        path.write_bytes(_pem(bits))
        yield f"tls_certificate_file {path}\ntls_private_key_file {path}\n"


@functools.cache
def _pem(bits: int) -> bytes:
    import datetime

    key = rsa.generate_private_key(65537, bits)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "proxy.example.com")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=2))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--first", action="store_true", help="on a busy machine: these two come before all else (root)")
    arguments = parser.parse_args()
    print("| attack | longest stall | p99 | computed | goal |\n|---|---|---|---|---|")
    for name in arguments.rows:
        row = ROWS[name]
        found = measure(row, arguments.first)
        print(
            f"| {row.what} | {found.longest:,.1f} ms | {found.p99:.1f} ms | {found.computed:.1f} ms | {row.goal} ms |",
            flush=True,
        )


if __name__ == "__main__":
    main()
