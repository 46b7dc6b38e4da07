"""MTA processes for the throttle tests: each takes permits through the client library and says when it used which.

    with Mta(proxy, "mta-1", {"fast": [("rule", 100, 1, 1)]}) as mta:
        wait_for(lambda: len(mta.uses) > 50)
        mta.signal(signal.SIGSTOP)

Run as a program, it is such an MTA. A path is a list of throttles (name, messages, seconds, burst). Everything is on
one machine and one clock (CLOCK_BOOTTIME), so what several processes say can be judged together: `check_uses`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SOURCE = "127.0.0.5"
SECOND = 1_000_000_000
#: Slots so many places apart are compared; longer spans are counted by time.
_REACH = 60
#: path → its throttles (name, messages, seconds, burst)
Paths = dict[str, list[tuple[str, int, int, int]]]


class Use(NamedTuple):
    """A permit that passed its check at `at`. Its slot is not before `earliest` and not after `latest`.

    A frame arrives after it was sent and a ping after it was sent, so the two bounds are the client's own figures.
    """

    path: str
    at: int
    earliest: int
    latest: int
    use_by: int


def clock() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Mta:
    """One such process; a context manager. `uses`: what it has told so far; `words`: everything else."""

    def __init__(self, proxy: Any, instance: str, paths: Paths, *, tls: bool = False, mode: str = "average") -> None:
        from tests.program import SECRET

        self.uses: list[Use] = []
        self.words: list[str] = []
        self._order = {
            "address": proxy if isinstance(proxy, tuple) else proxy.native,
            "secret": SECRET,
            "instance": instance,
            "tls": tls,
            "paths": paths,
            "mode": mode,
        }

    def __enter__(self) -> Mta:
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(self._order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def used(self, since: int = 0) -> int:
        """How many permits it used from this moment of `clock` on."""
        return sum(use.at >= since for use in list(self.uses))

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            words = line.decode().split()
            if words[0] == "use":
                self.uses.append(Use(words[1], *map(int, words[2:])))
            else:
                self.words.append(line.decode().strip())


def check_uses(uses: Iterable[Use], paths: Paths) -> None:
    """The oracle: what was used, by whomever, follows the limits slot by slot and in every window.

    Raises:
        oracle.Violation.
    """
    from tests.unit.throttling.oracle import Rule, Violation, check_windows

    uses = list(uses)
    for use in uses:
        if not use.earliest <= use.at <= use.use_by:
            raise Violation(f"{use} is outside its time")
    rules: dict[str, tuple[int, int, int]] = {}
    passing: dict[str, list[Use]] = {}
    for path, throttles in paths.items():
        for name, *limit in throttles:
            rules[name] = (limit[0], limit[1], limit[2])
            passing.setdefault(name, []).extend(use for use in uses if use.path == path)
    for name, (amount, seconds, burst) in rules.items():
        slack = SECOND // 4 if 60 <= seconds < 600 else 2 * SECOND if seconds >= 600 else 0
        rule = Rule(amount, seconds, burst, slack, max(slack, SECOND // 2))
        _check_slots(passing[name], rule)
        times = sorted(use.at for use in passing[name])
        for window in (seconds * SECOND // 10, seconds * SECOND, seconds * SECOND * 10):
            check_windows(times, window, rule.most(window))


def _check_slots(uses: list[Use], rule: Any) -> None:
    """GCRA on slots of which only bounds are known: no span holds more slots than it may, that surely lie within it."""
    from tests.unit.throttling.oracle import Violation

    uses = sorted(uses, key=lambda use: use.latest)
    for index, first in enumerate(uses):
        within = 0
        for use in uses[max(0, index - _REACH) : index + _REACH]:
            if use.earliest < first.earliest:
                continue
            within += 1
            if within > (use.latest - first.earliest) / rule.interval + rule.burst:
                raise Violation(f"{within} slots from {first} to {use}: one used twice, or slots too close")


def _serve(order: dict[str, Any]) -> None:
    """The MTA: one thread a path, mail without end."""
    from greenarrow_proxy_client import Limits, ProxyFailure, Session

    def say(text: str) -> None:
        os.write(1, text.encode() + b"\n")

    session = Session(tuple(order["address"]), order["secret"], order["instance"], tls=order["tls"], timeout=30)

    def deliver(path: str, throttles: list[list[Any]]) -> None:
        limits = [
            Limits(name, ((amount, seconds),), burst=burst if burst > 1 else 0, mode=order["mode"])
            for name, amount, seconds, burst in throttles
        ]
        throttle = session.throttle(SOURCE, *limits)
        while True:
            throttle.backlog(ram=100_000)
            try:
                permit = throttle.acquire()
                at = clock()
                permit.check()
            except ProxyFailure as error:
                say(f"no {path} {error.code}")
                time.sleep(0.01)
                continue
            slot, slack = permit._slot, throttle._lease.slack_us * 1000
            say(f"use {path} {at} {slot.use_by - slack} {slot.not_before} {slot.use_by}")

    for path, throttles in order["paths"].items():
        threading.Thread(target=deliver, args=(path, throttles), daemon=True).start()

    def report() -> None:
        told = None
        while True:
            rejected = session.rejected
            state = f"rejected {rejected.code}" if rejected else "up" if session.wait_until_up(0) else "down"
            if state != told:
                say(state)
                told = state
            time.sleep(0.01)

    threading.Thread(target=report, daemon=True).start()
    signal.sigwait({signal.SIGTERM})
    session.close()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    _serve(json.loads(sys.argv[1]))
