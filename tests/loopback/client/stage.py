"""Threads in virtual time: who waits on a condition is parked until it is notified, interrupted, or its time has come.

`Stage.threading` stands in for the module of that name where the code under test waits. Real threads run, but time
passes only when all of them are parked, so what happens does not depend on how fast the machine is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

MS = 1_000_000
_PATIENCE = 30.0  # of the test itself, in real seconds, if a thread neither waits nor ends


class Parked:
    def __init__(self, condition: Condition, deadline: int | None) -> None:
        self.condition = condition
        self.deadline = deadline
        self.notified = False
        self.error: BaseException | None = None
        self.go = threading.Event()
        self.thread = threading.current_thread()


class Condition:
    """What the library uses of `threading.Condition`."""

    def __init__(self, stage: Stage, lock: threading.RLock | None = None) -> None:
        self.stage = stage
        self.lock = lock or threading.RLock()
        self.waiters: list[Parked] = []

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else self.stage.now + round(timeout * 1_000 * MS)
        parked = Parked(self, deadline)
        self.waiters.append(parked)
        self.lock.release()
        try:
            self.stage.park(parked)
        finally:
            self.lock.acquire()
        if parked.error is not None:
            raise parked.error
        return parked.notified

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> object:
        ends_at = None if timeout is None else self.stage.now + round(timeout * 1_000 * MS)
        while not (result := predicate()):
            if ends_at is not None and self.stage.now >= ends_at:
                return result
            self.wait(None if ends_at is None else (ends_at - self.stage.now) / (1_000 * MS))
        return result

    def notify(self, n: int = 1) -> None:
        for parked in self.waiters[:n]:
            parked.notified = True
            self.stage.resume(parked)

    def notify_all(self) -> None:
        self.notify(len(self.waiters))


class Stage:
    """`now` in nanoseconds."""

    def __init__(self) -> None:
        self.now = 1_000_000 * MS
        self.threading = SimpleNamespace(
            RLock=threading.RLock, Condition=lambda lock=None: Condition(self, lock), Thread=self._thread
        )
        self._monitor = threading.Condition()
        self._running = 0
        self._parked: list[Parked] = []

    def start(self, work: Callable[[], object], name: str = "") -> SimpleNamespace:
        """A thread; `result` or `error` is there when it has ended."""
        actor = SimpleNamespace(result=None, error=None)

        def run() -> None:
            try:
                actor.result = work()
            except BaseException as error:
                actor.error = error
            with self._monitor:
                self._running -= 1
                self._monitor.notify_all()

        actor.thread = threading.Thread(target=run, name=name, daemon=True)
        with self._monitor:
            self._running += 1
        actor.thread.start()
        self.settle()
        return actor

    def settle(self) -> None:
        """Until everybody is parked or over."""
        with self._monitor:
            assert self._monitor.wait_for(lambda: not self._running, _PATIENCE), "a thread neither waits nor ends"

    def run_until(self, when: int) -> None:
        """Let time pass, from one deadline to the next."""
        self.settle()
        while due := [each for each in self._parked if each.deadline is not None and each.deadline <= when]:
            first = min(due, key=lambda each: each.deadline)
            self.now = max(self.now, first.deadline)
            self.resume(first)
            self.settle()
        self.now = when

    def interrupt(self, thread: threading.Thread, error: BaseException) -> None:
        """What a signal's handler or a killed thread raises in the middle of a wait."""
        (parked,) = [each for each in self._parked if each.thread is thread]
        parked.error = error
        self.resume(parked)
        self.settle()

    def park(self, parked: Parked) -> None:
        with self._monitor:
            self._parked.append(parked)
            self._running -= 1
            self._monitor.notify_all()
        assert parked.go.wait(_PATIENCE), "the test ended before its threads"

    def resume(self, parked: Parked) -> None:
        with self._monitor:
            if parked in self._parked:
                self._parked.remove(parked)
                parked.condition.waiters.remove(parked)
                self._running += 1
                parked.go.set()

    def _thread(self, target: Callable[[], object], name: str, daemon: bool) -> SimpleNamespace:
        started = []
        return SimpleNamespace(
            start=lambda: started.append(self.start(target, name)), join=lambda *_: started[0].thread.join(_PATIENCE)
        )
