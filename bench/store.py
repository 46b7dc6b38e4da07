#!/usr/bin/env python3
"""Limits over several proxies against their goals: `python bench/store.py [--docs] [--quick]`.

Real proxies, a real engine, MTAs that send as fast as they are let, and a receiver that keeps the kernel's times. What
the engine costs is its own word (`INFO cpu`), what a proxy costs the kernel's. Prints the table of goals with what was
measured; `--docs` puts it into docs/cluster.md.
"""

from __future__ import annotations

import argparse
import contextlib
import smtplib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from harness import machine
from harness.goals import Row, jain, percentile, report
from harness.report import put_into
from harness.usage import process_cpu

sys.path.insert(0, str(machine.ROOT))

from greenarrow_proxy_client import Session
from tests.e2e.cluster.house import NAME, SOURCE, House
from tests.engines import REDIS_7, VALKEY_8, VALKEY_9, Engine, engine
from tests.program import SECRET
from tests.unit.throttling.oracle import SECOND
from tests.witness import now

DOCUMENT = machine.ROOT / "docs" / "cluster.md"
BEGIN, END = "<!-- bench: begin, written by bench/store.py -->", "<!-- bench: end -->"
#: A strict limit of an hour, fast enough for a sample of some seconds.
AN_HOUR = 360_000
A_SECOND = AN_HOUR / 3600
#: Source addresses, each with a limit of its own.
MANY = 100


@contextlib.contextmanager
def house(store: Engine, proxies: int = 2, limits: str = f"max_delivery_rate {AN_HOUR}/hr") -> Iterator[House]:
    with House(store.url(), proxies=proxies, limits=limits, rule=None) as made:
        yield made


def passed(made: House, seconds: float) -> dict[str, int]:
    """What each MTA sends in that time, some time after the first message."""
    time.sleep(2.0)
    begin = now()
    time.sleep(seconds)
    return dict(made.witness.counts(begin, begin + int(seconds * SECOND)))


def shared_limit(store: Engine, proxies: int, seconds: float) -> list[Row]:
    """All have more to send than may be sent."""
    with house(store, proxies) as made, made.mail(threads=8):
        counts = passed(made, seconds)
        pages = [proxy.page()["store"] for proxy in made.proxies]
        begin = time.perf_counter()
        time.sleep(2.0)
        after = [proxy.page()["store"] for proxy in made.proxies]
        spent = time.perf_counter() - begin
    use = sum(counts.values()) / (A_SECOND * seconds)
    fairness = jain([counts.get(f"mta-{number}", 0) for number in range(proxies)])
    calls = max((late["calls"] - early["calls"]) / spent for early, late in zip(pages, after, strict=True))
    p50, p99 = (max(page[name] or 0.0 for page in after) * 1e3 for name in ("p50", "p99"))
    kind = f"{proxies} proxies, {AN_HOUR:,}/hr"
    return [
        Row(f"use of the limit ({kind})", "≥ 99 %", f"{use:.2%}", use >= 0.99),
        Row(f"Jain's index of the proxies, {seconds:.0f} s ({kind})", "≥ 0.99", f"{fairness:.4f}", fairness >= 0.99),
        Row(f"calls a second of a proxy ({kind})", "≤ 20", f"{calls:.1f}", calls <= 20),
        Row(f"a call ({kind})", "", f"p50 {p50:.2f} ms, p99 {p99:.2f} ms", None),
    ]


def one_of_two(store: Engine, seconds: float) -> list[Row]:
    """Only one proxy has mail: with the store, and without it."""
    with house(store) as made, made.mail(0, threads=8):
        use = sum(passed(made, seconds).values()) / (A_SECOND * seconds)
        store.kill()
        made.wait_alone()
        share = sum(passed(made, seconds).values()) / (A_SECOND * seconds)
    store.start()
    return [
        Row("use by one of two proxies, the other has no mail", "≥ 99 %", f"{use:.2%}", use >= 0.99),
        Row("the same without the store", "≥ 49 %", f"{share:.2%}", share >= 0.49),
    ]


def engine_cost(store: Engine, seconds: float) -> list[Row]:
    """Two proxies, and many limits that are all in use."""
    limits = "max_delivery_rate 7200/hr"
    with House(store.url(), limits=limits, rule=None, per="source") as made, contextlib.ExitStack() as stack:
        for number in range(2):
            stack.enter_context(many_sources(made, number))
        time.sleep(3.0)
        store.client.config_resetstat()
        before, asked = cpu_of(store), [proxy.page()["store"] for proxy in made.proxies]
        cpu, begin = [process_cpu(proxy.pid) for proxy in made.proxies], time.perf_counter()
        time.sleep(seconds)
        spent, engine_cpu = time.perf_counter() - begin, cpu_of(store) - before
        script = store.client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]
        proxies_cpu = [process_cpu(proxy.pid) - then for proxy, then in zip(made.proxies, cpu, strict=True)]
        after = [proxy.page()["store"] for proxy in made.proxies]
    keys = sum(late["throttles_asked"] - early["throttles_asked"] for early, late in zip(asked, after, strict=True))
    each = engine_cpu * 1e6 / max(1, keys)
    busy, own = engine_cpu / spent, max(proxies_cpu) / spent
    return [
        Row(f"CPU of {store.kind} for each limit and call", "≤ 5 µs", f"{each:.1f} µs", each <= 5),
        Row(f"of that the script, by the word of {store.kind}", "", f"{script:.1f} µs", None),
        Row(f"CPU of {store.kind}, {MANY} limits in use by two proxies", "", f"{busy:.2%} of a core", None),
        Row(f"CPU of a proxy beside {store.kind}, {2 * MANY} messages a second", "", f"{own:.1%} of a core", None),
    ]


def cpu_of(store: Engine) -> float:
    """Seconds of processor that it has used."""
    used: dict[str, Any] = store.client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


@contextlib.contextmanager
def many_sources(made: House, number: int) -> Iterator[None]:
    """An MTA with a connection from each of many addresses, on each of which it sends as fast as it may."""
    over = threading.Event()

    def send(smtp: smtplib.SMTP) -> None:
        with contextlib.suppress(smtplib.SMTPException, OSError):
            while not over.is_set():
                smtp.mail(f"mta-{number}@example.com")
                smtp.rset()

    with contextlib.ExitStack() as stack:
        session = stack.enter_context(Session(made.proxies[number].native, SECRET, f"mta-{number}", tls=False))
        threads = []
        for each in range(MANY):
            source = f"127.0.9.{each + 1}"
            smtp: smtplib.SMTP = session.smtp([made.mx.endpoint], NAME, source_ip=source, reuse=False, tls="none")
            stack.callback(smtp.close)
            threads.append(threading.Thread(target=send, args=(smtp,)))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join(10)


def latency(store: Engine, count: int) -> list[Row]:
    """How long a message waits for its slot under a limit that is far from used, half a second after the one before."""
    rows = []
    for where, scope in (("in the store", "cluster"), ("in memory", "proxy")):
        times = []
        with House(store.url(), limits=f"max_delivery_rate {AN_HOUR}/hr", rule=None, scope=scope) as made:
            for _ in range(count):
                time.sleep(0.5)
                times.append(one_message(made))
        p50, p99 = (percentile(times, share) * 1e3 for share in (0.5, 0.99))
        what = f"a message under a limit {where} that is not used up"
        rows.append(Row(what, "", f"p50 {p50:.1f} ms, p99 {p99:.1f} ms", None))
    return rows


def one_message(made: House) -> float:
    """Seconds until MAIL is answered."""
    with Session(made.proxies[0].native, SECRET, "mta-0", tls=False) as session:
        smtp = session.smtp([made.mx.endpoint], NAME, source_ip=SOURCE, reuse=False, tls="none")
        begin = time.perf_counter()
        smtp.mail("mta-0@example.com")
        spent = time.perf_counter() - begin
        smtp.close()
    return spent


def cost_of_scope(store: Engine, seconds: float) -> list[Row]:
    """Processor of a proxy for the same mail with the limit in memory, and in the store."""
    rows, costs = [], []
    for where, scope in (("in memory", "proxy"), ("in the store", "cluster")):
        with (
            House(store.url(), limits=f"max_delivery_rate {AN_HOUR}/hr", rule=None, scope=scope, proxies=1) as made,
            made.mail(threads=8),
        ):
            time.sleep(1.0)
            cpu, begin = process_cpu(made.proxies[0].pid), now()
            time.sleep(seconds)
            spent, sent = process_cpu(made.proxies[0].pid) - cpu, made.witness.counts(begin).total()
        costs.append(spent * 1e6 / max(1, sent))
        rows.append(Row(f"CPU of a proxy for a message, limit {where}", "", f"{costs[-1]:.0f} µs", None))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter samples, one engine")
    parser.add_argument("--docs", action="store_true", help="put the table into docs/cluster.md")
    options = parser.parse_args()
    seconds = 5.0 if options.quick else 10.0
    runs: list[list[Row]] = []

    def note(measure: Callable[[], list[Row]]) -> None:
        runs.append(measure())
        for row in runs[-1]:
            print(f"{row.what}: {row.found} (target {row.goal or '-'})", file=sys.stderr, flush=True)

    with engine(VALKEY_9) as store:
        note(lambda: shared_limit(store, 2, seconds))
        note(lambda: shared_limit(store, 3, seconds))
        note(lambda: one_of_two(store, seconds))
        note(lambda: latency(store, 10 if options.quick else 30))
        note(lambda: cost_of_scope(store, seconds))
    for kind in (VALKEY_9,) if options.quick else (VALKEY_9, VALKEY_8, REDIS_7):
        with engine(kind) as other:
            note(lambda other=other: engine_cost(other, seconds))  # type: ignore[misc]
    text = report(runs)
    print(text)
    if options.docs:
        put_into(DOCUMENT, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
