"""What the pure throttle core costs: `python bench/throttle_core.py`. No network: microseconds a call, memory, frames.

With `--permit` only the cost of a permit, as JSON, for the benchmark that compares.

A permit is counted from the wheel's turn to the wire records that `native` would encode. Prints one line a figure.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from proxy.config.load import load
from proxy.policy.limits import Limits
from proxy.server.process import STEP_EVERY, Collector
from proxy.throttling.estate import Reader
from proxy.throttling.flows import Places, Ticket
from proxy.throttling.limits import Part
from proxy.throttling.manager import Manager
from proxy.throttling.session import Session
from proxy.throttling.throttle import SECOND, Key, Limit


def manager_with(sessions: int, now: int) -> tuple[Manager, list[Session]]:
    manager = Manager(1, 0)
    made = [manager.hello(f"mta{index}", b"run", "10.0.0.1", 1.0, now) for index in range(sessions)]
    for session in made:
        manager.ping(session, now // 1000, now)
    return manager, made


def run(manager: Manager, sessions: list[Session], now: int, seconds: int) -> tuple[int, int, int]:
    """Let the manager work; permits, frames that carry them, and when it ended."""
    permits = frames = 0
    end = now + seconds * SECOND
    while (wake := manager.next_wakeup()) is not None and wake <= end:
        now = wake
        for session in sessions:
            session.pong_at = now
        manager.advance(now)
        for session in manager.take_ready():
            output = manager.take(session, now)
            if output.grants:
                frames += 1
                permits += sum(grant.n for grant in output.grants)
    return permits, frames, end


def permits(sessions: int, rate: int, paths: int = 1, shared: bool = False) -> tuple[int, int, float]:
    """Twenty seconds of that many: permits, frames, and the seconds of CPU that they took."""
    now = 10_000 * SECOND
    manager, made = manager_with(sessions, now)
    for session in made:
        for id in range(paths):
            parts = [(Key("192.0.2.1", f"rule{id}"), Part((Limit(rate // paths, 1),)))]
            if shared:
                parts.append((Key("192.0.2.1", "address"), Part((Limit(rate, 1),))))
            manager.register(session, id, parts, now)
            manager.demand(session, id, 2**31, 0, 0, 0, 0, now)
    run(manager, made, now, 1)
    begin = thread_time()
    count, frames, _ = run(manager, made, now + SECOND, 20)
    spent = thread_time() - begin
    assert count >= rate * 20 * 0.995, f"{count} of {rate * 20} permits"
    return count, frames, spent


def show_permits(sessions: int, rate: int, paths: int = 1, shared: bool = False) -> None:
    count, frames, spent = permits(sessions, rate, paths, shared)
    what = f"{sessions} sessions, {paths} paths{', one limit above' if shared else ''}, {rate}/s"
    print(f"permit ({what}): {spent / count * 1e6:.2f} us, {count / spent:.0f}/s, {frames / count:.3f} frames a permit")


def show_permit() -> None:
    """What a permit costs, five times as many as above so that a second of noise is no answer."""
    runs = [permits(5, 3500) for _ in range(5)]
    count, spent = sum(count for count, _, _ in runs), sum(spent for _, _, spent in runs)
    print(json.dumps({"units": count, "units_per_second": count / spent, "cpu_us_per_unit": spent / count * 1e6}))


def one_by_one(sessions: int) -> None:
    """A demand for one message on an idle throttle, answered in the same call."""
    now = 10_000 * SECOND
    manager, made = manager_with(sessions, now)
    for session in made:
        manager.register(session, 0, [(Key("192.0.2.1", session.name), Part((Limit(10**6, 1),)))], now)
    for session in manager.take_ready():
        manager.take(session, now)
    got = dict.fromkeys(made, 0)
    begin = perf_counter()
    for index in range(100_000):
        session = made[index % sessions]
        manager.demand(session, 0, 1, got[session], 1, 0, 0, now + index * 1000)
        for ready in manager.take_ready():
            got[ready] += len(manager.take(ready, now + index * 1000).grants)
    spent = perf_counter() - begin
    print(f"demand and grant, one by one: {spent / 100_000 * 1e6:.2f} us ({sum(got.values())} permits)")


def many_throttles(count: int) -> None:
    """One session over many throttles: memory, registration, registration again, demand for all, and its end."""
    now = 10_000 * SECOND
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    manager, (session,) = manager_with(1, now)
    for step in ("register", "register again"):
        begin = perf_counter()
        for id in range(count):
            key, part = Key("192.0.2.1", f"rule-{id:06}"), Part((Limit(1000, 3600),), 20)
            manager.register(session, id, [(key, part)], now)
        print(f"{step}: {(perf_counter() - begin) / count * 1e6:.2f} us a path")
    manager.take(session, now)
    gc.collect()
    grown = process.memory_info().rss - before
    print(f"memory of {count} throttles with one session: {grown / 2**20:.0f} MiB, {grown / count:.0f} B each")
    begin = perf_counter()
    for id in range(count):
        manager.demand(session, id, 5, 0, 5, 0, 0, now)
    print(f"demand on all: {(perf_counter() - begin) / count * 1e6:.2f} us each")
    grown = process.memory_info().rss - before
    print(f"memory with demand on all: {grown / 2**20:.0f} MiB")
    manager.take(session, now)
    begin = perf_counter()
    figure = manager.active_throttles(now)
    print(f"status figure of {figure} active throttles: {(perf_counter() - begin) * 1e3:.1f} ms")
    begin = perf_counter()
    manager.bye(session, now)
    longest, calls = perf_counter() - begin, 1
    while manager.next_wakeup() == 0:
        begin = perf_counter()
        manager.advance(now)
        longest = max(longest, perf_counter() - begin)
        calls += 1
    print(f"end of that session: {calls} calls, the longest {longest * 1e3:.1f} ms")


def pauses(count: int) -> None:
    """The longest single step of a manager with so many throttles, the garbage collector's work in it included.

    A step is what the program does before it looks at its sockets again: 50 records of a frame, one delivery, one turn
    of the wheels. The collector's own steps are done as often as in the program.
    """
    now = 10_000 * SECOND
    collector = Collector(lambda: True)
    collector.begin()
    manager, made = manager_with(-(-count // 100_000), now)
    steps: list[float] = []
    phases: list[str] = []

    collect_at = 0.0

    def timed(work: Callable[[], object]) -> None:
        nonlocal collect_at
        begin = thread_time()  # what others do on the machine meanwhile is no pause of ours
        work()
        steps.append(thread_time() - begin)
        if thread_time() >= collect_at:
            begin = thread_time()
            collector.step()
            collect_at = thread_time() + STEP_EVERY
            steps.append(collect_at - STEP_EVERY - begin)

    def done(phase: str) -> None:
        phases.append(f"{phase} {max(steps) * 1e3:.1f}")
        steps.clear()

    def deliver() -> None:
        for session in made:
            while session.parked_records:
                timed(partial(manager.take, session, now))

    def each(record: Callable[[Session, int], None]) -> None:
        def batch(session: Session, first: int) -> None:
            for id in range(first, first + 50):
                record(session, id)

        for session in made:
            for first in range(0, count // len(made), 50):
                timed(partial(batch, session, first))
            manager.take_ready()

    def register(session: Session, id: int) -> None:
        manager.register(session, id, [(Key(session.name, f"rule-{id:06}"), Part((Limit(1000, 3600),), 20))], now)

    each(register)
    done("register")
    deliver()
    each(lambda session, id: manager.demand(session, id, 5, 0, 5, 0, 0, now))
    done("demand")
    deliver()
    done("deliver")
    for _ in range(2_000):
        now = max(now, manager.next_wakeup() or now)
        for session in made:
            session.pong_at = now
        timed(partial(manager.advance, now))
        manager.take_ready()
        deliver()
    done("slots")
    for session in made:
        timed(partial(manager.bye, session, now))
    while manager.next_wakeup() == 0:
        timed(partial(manager.advance, now))
    done("end")
    collector.end()
    print(f"longest pause with {count} throttles, in ms (goal: 20): {', '.join(phases)}")


def places() -> None:
    now = 10_000 * SECOND
    for owners in (10, 1000):
        manager, made = manager_with(owners, now)
        for session in made:
            manager.register(session, 0, [(Key("192.0.2.1", "rule"), Part((), 20))], now)
        held, waiting = [], 0
        for session in made:
            for _ in range(3):
                answer = manager.admit(
                    session.name, 1.0, "192.0.2.1", "198.51.100.1", manager.flows(session, (0,)), now
                )
                if isinstance(answer, Places):
                    held.append(answer)
                elif isinstance(answer, Ticket):
                    waiting += 1
        begin = perf_counter()
        for _ in range(20_000):
            places = held.pop(0)
            held += [ticket.places for ticket in manager.release(places, now) if ticket.places is not None]
            session = manager.sessions[places.owner]
            manager.admit(session.name, 1.0, "192.0.2.1", "198.51.100.1", manager.flows(session, (0,)), now)
        spent = perf_counter() - begin
        print(f"release, next in, wait again ({owners} owners, {waiting} waiting): {spent / 20_000 * 1e6:.2f} us")
    manager, (session,) = manager_with(1, now)
    manager.register(session, 0, [(Key("192.0.2.1", "rule"), Part((), 0))], now)
    flows = manager.flows(session, (0,))
    begin = perf_counter()
    for _ in range(50_000):
        answer = manager.admit("mta0", 1.0, "192.0.2.1", "198.51.100.1", flows, now)
        assert isinstance(answer, Places)
        manager.release(answer, now)
    print(f"admit and release, nobody waits: {(perf_counter() - begin) / 50_000 * 1e6:.2f} us")


def handing_over(count: int) -> None:
    """All that a manager with so many throttles has, each with a debt, a permit in hand and a place, goes into another.

    A step ends where others have their turn; the collector's steps are counted too, as in the program.
    """
    now = 10_000 * SECOND
    collector = Collector(lambda: count >= 100_000)
    collector.begin()
    manager, made = manager_with(-(-count // 100_000), now)
    for number in range(count):
        session, id = made[number % len(made)], number // len(made)
        manager.register(session, id, [(Key(session.name, f"rule-{id:06}"), Part((Limit(1000, 3600),), 20))], now)
        manager.admit(session.name, 1.0, session.name, "", manager.flows(session, (id,)), now)
    now += SECOND * 100
    for session in made:
        manager.ping(session, 1, now)
        manager.pong(session, now // 1_000, 0, now)
        for id in range(count // len(made)):
            manager.demand(session, id, 1, 0, 1, 0, 0, now)
        while session.parked_records:
            manager.take(session, now)
    for _ in range(100):
        collector.step()
    steps: list[float] = []
    begin = collect_at = thread_time()

    def breathe() -> None:
        nonlocal begin, collect_at
        steps.append(thread_time() - begin)
        if (begin := thread_time()) >= collect_at:
            collector.step()
            collect_at = thread_time() + STEP_EVERY
            steps.append(collect_at - STEP_EVERY - begin)
        begin = thread_time()

    def done(what: str) -> None:
        nonlocal begin
        breathe()
        print(f"{what} {count} throttles: {sum(steps):.3f} s, the longest step {max(steps) * 1e3:.1f} ms")
        steps.clear()
        begin = thread_time()

    chunks = []
    manager.freeze(now)
    done("freezing")
    for chunk in manager.gather(now, breathe):
        chunks.append(chunk)
        breathe()
    done("gathering")
    done_at_once = Manager(1, now).adopt_as_it_comes(iter(chunks), now, breathe)
    assert len(done_at_once) == count
    done("reading and adopting as it comes")
    reader = Reader()
    for chunk in chunks:
        reader.feed(chunk)
        breathe()
    done("reading")
    held = Manager(1, now).adopt(reader.finish(), now, breathe)
    done("adopting")
    assert len(held) == count
    print(f"{sum(map(len, chunks)) / 1e6:.1f} MB in {len(chunks)} chunks, the largest {max(map(len, chunks))} bytes")
    collector.end()


def matching(number: int) -> None:
    """Which of so many blocks hold for a connection: each with a source of its own; and with lists that all overlap."""
    for what, line in (
        ("each its own source", "source 10.0.{0}.{1}\n destination 98.0.0.0/8"),
        ("different lists that all have the receiver", "source 10.0.{0}.{1}\n destination 98.0.0.0/8, 99.{0}.{1}.0/24"),
        (
            "such lists on both sides, by instance",
            "source 10.0.0.0/8, 11.{0}.{1}.0/24\n destination 98.0.0.0/8, 99.{0}.{1}.0/24\n instance i{0}-{1}",
        ),
    ):
        text = "".join(f"throttle t{n} {{\n {line.format(n >> 8, n & 255)}\n}}\n" for n in range(number))
        base = "listen_socks5 127.0.0.1:1080\nsocks5_auth none\nallow_from 127.0.0.1\n"
        limits = Limits(load(["--config-filename=f"], {}, lambda _, text=base + text: text).settings.throttle)
        connections = [(f"i0-{n % number & 255}", f"10.0.0.{n % min(number, 256)}", f"98.0.{n}.1") for n in range(256)]
        steps = limits.steps
        begin = perf_counter()
        for _ in range(20):
            for instance, source, destination in connections:
                assert len(limits.match(instance, source, destination)) <= 1
        spent = (perf_counter() - begin) / 20 / len(connections)
        steps = (limits.steps - steps) // 20 // len(connections)
        print(f"matching ({number} blocks, {what}): {spent * 1e6:.1f} us, {steps} look-ups")


if __name__ == "__main__":
    if sys.argv[1:] == ["--permit"]:
        show_permit()
        sys.exit()
    for number in (10, 1_000, 10_000):
        matching(number)
    show_permits(1, 3500)
    show_permits(5, 3500)
    show_permits(10, 100_000)
    show_permits(5, 3500, paths=10, shared=True)
    one_by_one(50)
    places()
    many_throttles(100_000)
    for number in (1_000, 100_000):
        handing_over(number)
    pauses(100_000)
    pauses(500_000)
