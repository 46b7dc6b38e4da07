#!/usr/bin/env python3
"""What 2000 sessions leave behind in a process that does nothing else: one JSON object of what there is more of.

    python tests/loopback/relay_sessions.py python|compiled

In the tests' own process it cannot be told: greenlets, threads and sockets of tests before may end at any moment.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

from greenlet import greenlet  # noqa: E402

from proxy.net import relay  # noqa: E402
from tests.loopback.net.relays import ENGINES, Relayed, close_peers, malloced, open_descriptors, reset  # noqa: E402

WARM_UP, SESSIONS = 20, 2000


def session(engine: relay.Engine, number: int) -> None:
    pair = Relayed(engine, early=b"e" * (number % 3))
    pair.check() if number % 3 == 0 else pair.client.sendall(b"x")
    reset(pair.client) if number % 5 == 0 else pair.client.close()
    pair.upstream.close()
    pair.owner.ending()
    close_peers()


def figures() -> dict[str, int]:
    gc.collect()
    greenlets = sum(isinstance(thing, greenlet) for thing in gc.get_objects())
    return {"descriptors": open_descriptors(), "greenlets": greenlets, "malloced": malloced()}


def main() -> None:
    (engine,) = [kind() for kind in ENGINES if kind.name == sys.argv[1]]
    for number in range(WARM_UP):
        session(engine, number)
    before = figures()
    for number in range(SESSIONS):
        session(engine, number)
    growth = {name: value - before[name] for name, value in figures().items()}
    print(json.dumps(growth | {"pairs": engine.pairs, "faults": engine.faults}))
    engine.stop()


if __name__ == "__main__":
    main()
