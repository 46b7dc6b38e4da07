"""What throttling makes is gone when nobody needs it, without the help of the garbage collector.

The program sets objects that live long apart from it (`server.process.Collector`): a circle among them would never be
found.
"""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

from proxy.throttling import flows as records
from proxy.throttling.audit import Account
from proxy.throttling.flows import Flow, Places, Receiver, Run, Throttle, Ticket
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import SECOND, Key, Limit
from tests.unit.throttling.benches import SOURCE, Bench, part
from tests.unit.throttling.heirs import heir_of

MX = "198.51.100.1"
ROOT = Path(__file__).parents[3]
MODULE = "tests.unit.throttling.test_garbage"


def lives(bench: Bench, rng: random.Random) -> None:
    """Sessions come, use all there is, and go: in order, by a break, replaced by the next of their name."""
    for round in range(12):
        name = f"mta{round % 3}"
        session = bench.session(name, run=bytes([round]))
        for id in range(5):
            keys = [Key(SOURCE, f"rule{id}"), Key(SOURCE, "all")]
            bench.register(session, *[(key, part(Limit(20, 1), places=3)) for key in keys], id=id)
            bench.want(session, rng.randrange(1, 30), 0, id)
        bench.run(SECOND)
        flows = bench.manager.flows(session, (0, 1))
        held = [bench.manager.admit(name, 1.0, SOURCE, MX, flows, bench.now) for _ in range(5)]
        tickets = [bench.manager.ask_message(f"other{n}", 1.0, SOURCE, MX, flows[:1], bench.now) for n in range(3)]
        for each in held:
            if isinstance(each, Places):
                bench.mails(each, 4)
        bench.register(session, (Key(SOURCE, "another"), part(Limit(5, 1))), id=0)
        bench.manager.outcome(session, 1, 1, 0, 30, True, bench.now)
        bench.manager.give_back(session, 1, 0, 2, bench.now)
        for ticket in tickets[:2]:
            if ticket is not None and not ticket.granted:
                bench.manager.cancel_message(ticket, bench.now)
        bench.run(SECOND)
        for each in held:
            if isinstance(each, Ticket):
                bench.manager.cancel(each, bench.now)
            else:
                bench.manager.release(each, bench.now)
        if round % 4 == 0:
            bench.manager.bye(session, bench.now)
        elif round % 4 == 1:
            bench.manager.lost(session, bench.now)
    for session in list(bench.manager.sessions.values()):
        bench.manager.bye(session, bench.now)


def exchange(bench: Bench) -> Manager:
    """Another manager goes on, with everything in use; the one before stays as it is, until its process ends."""
    session = bench.session("mta")
    bench.register(session, (Key(SOURCE, "rule"), part(Limit(20, 1), places=2)))
    bench.want(session, 40, 0)
    bench.run(SECOND)
    flows = bench.manager.flows(session, (0,))
    held = [bench.manager.admit("mta", 1.0, SOURCE, MX, flows, bench.now) for _ in range(4)]
    bench.manager.give_back(session, 0, 15, 2, bench.now)
    former = bench.manager
    bench.manager, places = heir_of(former, bench.now)
    for each in held:
        if isinstance(each, Places):
            bench.mails(places[each.number], 2)
            bench.manager.release(places.pop(each.number), bench.now)
    lives(bench, random.Random(2))
    return former


def within(manager: Manager | None) -> set[int]:
    """All objects that it keeps."""
    seen: dict[int, object] = {}
    left: list[object] = [manager] if manager is not None else []
    while left:
        one = left.pop()
        if id(one) not in seen and not isinstance(one, type | ModuleType):
            seen[id(one)] = one
            left += gc.get_referents(one) if not isinstance(one, FunctionType) else one.__closure__ or ()
    return set(seen)


def look(exchanged: bool = False) -> None:
    gc.collect()  # what imports have left
    gc.disable()
    bench = Bench()
    lives(bench, random.Random(1))
    former = exchange(bench) if exchanged else None
    for each in (bench.got, bench.caps, bench.quiet):
        each.clear()  # type: ignore[attr-defined]
    bench.run(10_000 * SECOND)
    manager = bench.manager
    for take in (manager.take_blocked, manager.take_granted, manager.take_admitted, manager.take_ended):
        take()
    assert not manager.throttles
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    assert Counter(type(each).__name__ for each in gc.garbage) == {}
    others = within(former)
    ours = Counter(
        type(each).__name__
        for each in gc.get_objects()
        if type(each).__module__ == "proxy.throttling.flows" and id(each) not in others
    )
    assert ours == {}, "they are still known to somebody"


@pytest.mark.parametrize("exchanged", [False, True])
def test_throttling_makes_no_circles(exchanged: bool) -> None:
    """In a process of its own: what tests before this one have left behind is no matter of throttling."""
    program = f"from {MODULE} import look; look({exchanged})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_looking_at_permits_again_makes_nothing_new() -> None:
    """The collector would look at it: 100,000 paths are 100,000 lists, when their permits have lapsed."""
    throttle = Throttle(Key(SOURCE, "rule"))
    throttle.limit_to((Limit(20, 1),), 0, SECOND)
    flow = Flow(Receiver("mta", 1.0), 0, records.Path((throttle,)))
    account = Account()
    holdings, fresh = account._holdings, account._fresh
    account.granted(Run(flow, 0, SECOND, 2, SECOND), SECOND // 10)
    for now, left in ((SECOND, 1), (3 * SECOND // 2, 1), (10 * SECOND, 0)):
        account.over_at(now)
        assert (account._holdings is holdings, account._fresh is fresh) == (True, True)
        assert len(holdings) == left
    assert account.lapsed == 2
