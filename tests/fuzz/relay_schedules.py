#!/usr/bin/env python3
"""Random schedules of sends, reads, FINs, resets and faults against the relay engines.

    python tests/fuzz/relay_schedules.py [--steps N] [--rounds N] [--seed N] [--engine python|compiled]

Checked all the time: each byte that arrives is the right one; each owner is told once, with counts that fit what the
peers sent and got; nothing is left open. tests/sanitized runs this against the compiled engine with sanitizers.
"""

from __future__ import annotations

import argparse
import random
import socket
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import gevent  # noqa: E402
from gevent import get_hub  # noqa: E402

from proxy.model import Ending  # noqa: E402
from proxy.net import relay  # noqa: E402
from tests.loopback.net.relays import (  # noqa: E402
    ENGINES,
    Owner,
    Relayed,
    close_peers,
    open_descriptors,
    reset,
    tcp_pair,
    until,
)

_STREAM = random.Random(0).randbytes(1 << 20)  # every direction's bytes, again and again
_TWICE = _STREAM + _STREAM


class Side:
    """One peer's socket: what it has sent and got of the endless stream."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.sent = self.received = 0
        self.said_fin = self.gone = self.saw_end = False
        sock.settimeout(0)

    def send(self, size: int) -> None:
        if self.said_fin or self.gone:
            return
        start = self.sent % len(_STREAM)
        try:
            self.sent += self.sock.send(_TWICE[start : start + size])
        except BlockingIOError:
            pass
        except OSError:
            self.gone = True

    def receive(self, size: int) -> None:
        if self.gone or self.saw_end:
            return
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return
        except OSError:
            self.gone = True
            return
        if not data:
            self.saw_end = True
        start = self.received % len(_STREAM)
        assert data == _TWICE[start : start + len(data)], f"wrong bytes at {self.received}"
        self.received += len(data)

    def fin(self) -> None:
        if not self.gone and not self.said_fin:
            self.said_fin = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.gone = True

    def reset(self) -> None:
        self.gone = True
        if self.sock.fileno() >= 0:
            reset(self.sock)

    def close(self) -> None:
        self.gone = True
        self.sock.close()


class Session:
    """One relay, its peers and its owner."""

    def __init__(self, engine: relay.Engine, rng: random.Random) -> None:
        early = _STREAM[: rng.choice((0, 0, 1, 70_000))]
        owner = Owner(rng.choice((None, None, None, RuntimeError("of the fuzzer"))))
        self.early = len(early)
        self.relayed = Relayed(engine, early, rng.choice((5, 1e9)), rng.choice((None, 4096, 65536)), owner)
        self.owner = owner
        self.client, self.upstream = Side(self.relayed.client), Side(self.relayed.upstream)
        self.client.sent = len(early)

    def step(self, rng: random.Random) -> None:
        side = rng.choice((self.client, self.upstream))
        kind = rng.random()
        if kind < 0.5:
            side.send(rng.choice((1, 100, 5000, 65536, 65537, 400_000)))
        elif kind < 0.93:
            side.receive(rng.choice((1, 500, 65536, 1_000_000)))
        elif kind < 0.97:
            side.fin()
        elif kind < 0.98:
            side.reset()
        elif kind < 0.985:
            side.close()

    def check(self) -> None:
        ending, up, down = self.owner.ending()
        client, upstream = self.client, self.upstream
        assert upstream.received <= up <= client.sent, (ending, upstream.received, up, client.sent)
        assert client.received <= down <= upstream.sent, (ending, client.received, down, upstream.sent)
        if ending.is_clean:
            assert (up, down) == (client.sent, upstream.sent), (ending, up, client.sent, down, upstream.sent)


def churn(engine: relay.Engine, rng: random.Random) -> None:
    """A socket of a set-up that is closed in the batch of its event, and another one in its place."""
    peer, sock = tcp_pair()
    engine.register(sock.fileno())

    def on_event(events: int) -> None:
        engine.close(sock, reset=rng.random() < 0.5)
        if rng.random() < 0.3:
            raise RuntimeError("of the fuzzer")

    engine.watch(sock.fileno(), on_event)
    peer.send(b"x")


def schedule(engine: relay.Engine, seed: int, steps: int) -> None:
    """One schedule, to its end; leaves nothing behind.

    Raises:
        AssertionError: a byte, a count or an ending is wrong, or something is left over.
    """
    rng = random.Random(seed)
    engine.reads_a_turn = rng.choice((1, 2, 16))
    engine.splices_a_turn = rng.choice((1, 8))
    engine.max_pipes = rng.choice((0, 1, 32))
    loop_runs = rng.choice((0.3, 0.5, 0.8, 0.95))  # the rarer, the more comes in one batch
    before = open_descriptors()
    now = 0.0
    alive: list[Session] = []
    over: list[Session] = []
    for _ in range(steps):
        if len(alive) < 12 and rng.random() < 0.2:
            alive.append(Session(engine, rng))
        for session in alive:
            session.step(rng)
        if rng.random() < loop_runs:
            gevent.sleep(0)
        chance = rng.random()
        if chance < 0.05:
            churn(engine, rng)
        elif chance < 0.1:
            now += rng.choice((0.1, 3))
            for _ in engine.sweep(now):
                gevent.sleep(0)
        elif chance < 0.101:
            engine.abort_all(Ending.DRAIN_TIMEOUT)
        over += [session for session in alive if session.owner.told]
        alive = [session for session in alive if not session.owner.told]
    finish(alive)
    for session in over + alive:
        session.check()
    assert engine.pairs == 0
    close_peers()
    until(lambda: open_descriptors() <= before + 2 * engine.pipes, what="all is closed")


def finish(alive: list[Session]) -> None:
    """Both sides say FIN and read to the end; some do not bear it and are reset by the deadline."""
    for session in alive:
        session.client.fin()
        session.upstream.fin()

    def all_told() -> bool:
        for session in alive:
            for side in (session.client, session.upstream):
                side.receive(1_000_000)
        return all(session.owner.told for session in alive)

    until(all_told, timeout=20, what="every relay ends")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("python", "compiled"), default="compiled")
    options = parser.parse_args()
    engines = [engine for engine in ENGINES if engine.name == options.engine]
    if not engines:
        print("that engine was not built", file=sys.stderr)
        return 1
    get_hub().exception_stream = None  # the faults are wanted
    for seed in range(options.seed, options.seed + options.rounds):
        print(f"seed {seed}", flush=True)
        engine = engines[0]()
        schedule(engine, seed, options.steps)
        engine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
