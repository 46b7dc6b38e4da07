"""Pooled greenlets: a greenlet that has done its work waits for the next instead of dying.

Starting a greenlet costs more than all the Python of a short connection's set-up, so `Crew.run` hands the work to one
that is idle; from the hub at once, not in the next turn of the loop. Work must not raise; if it does, the loop's error
handler tells it and the greenlet goes on. Work is never lost: when there is no memory for a greenlet, it waits.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from gevent import get_hub, getcurrent
from greenlet import greenlet

_MAX_IDLE: Final = 256  # a burst's greenlets are let go again
#: Seconds until work that there was no memory for is tried again.
_TRY_AGAIN: Final = 0.1


#: Begins a job. Whatever else a greenlet is switched to with is none. (A class of its own takes longer to make.)
_JOB: Final = object()
_Job = tuple[object, Callable[..., object], tuple[Any, ...]]  # `_JOB`, work and its arguments


class Crew:
    """A pool of greenlets without an upper limit; `max_connections` is the limit."""

    def __init__(self) -> None:
        self._hub: Any = get_hub()
        self._idle: list[Callable[..., Any]] = []
        self._waiting: deque[_Job] = deque()  # for memory
        self._timer = self._hub.loop.timer(_TRY_AGAIN)  # made now: later there may be no memory for it
        self._begun = 0
        self.busy = 0

    def run(self, work: Callable[..., object], *arguments: Any) -> bool:
        """Start `work(*arguments)`: now if the caller is the hub (an event's callback), else in its next turn.

        Only the hub may switch to another greenlet and be sure to be switched back to.

        Returns:
            False: there is no memory; it will be done when there is.
        """
        if getcurrent() is self._hub:
            return self._start((_JOB, work, arguments))
        self._hub.loop.run_callback(self._start, (_JOB, work, arguments))
        return True

    def _start(self, job: _Job) -> bool:
        if self._idle:
            self._idle.pop()(job)
            return True
        begun = self._begun
        try:
            greenlet(self._worker, self._hub).switch(job)
        except MemoryError:
            if self._begun != begun:  # it was not the greenlet that there was no memory for
                raise
            self._waiting.append(job)
            if not self._timer.active:
                self._timer.start(self._try_again)
            return False
        return True

    def _try_again(self) -> None:
        while self._waiting and self._start(self._waiting.popleft()):
            pass

    def _worker(self, job: _Job) -> None:
        idle, rest, switch = self._idle, self._hub.switch, getcurrent().switch
        while True:
            self._begun += 1
            self.busy += 1
            try:
                _, work, arguments = job
                work(*arguments)
            except Exception:
                self._hub.handle_error(work, *sys.exc_info())
            finally:
                self.busy -= 1
            if len(idle) >= _MAX_IDLE:
                return
            idle.append(switch)
            told = rest()
            # A wake-up meant for this greenlet's former life:
            while told.__class__ is not tuple or len(told) != 3 or told[0] is not _JOB:
                told = rest()
            job = told
