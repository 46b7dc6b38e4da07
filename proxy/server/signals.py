"""Signals: what comes during the start waits, and what comes when memory has run out is acted upon all the same.

gevent's own `signal_handler` makes a greenlet for each signal, and a greenlet is what cannot be had then. Here the
watchers call back in the hub, and a greenlet that was there from the start does what takes longer. What a signal means
is `server`'s.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

import gevent
from gevent import get_hub
from gevent.event import Event

from proxy.log import lines as log

#: Their default is to end the program, which is not what they mean here: greenarrow_proxy.py blocks them at once.
HELD_AT_THE_START = frozenset({signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2})


def release() -> None:
    """Let in what was held back since the start."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_AT_THE_START)


class Signals:
    """Watches over signals from `watch` on.

    Args:
        at_once: signal → what is called in the hub; must not wait.
        in_turn: signal → what is called in a greenlet of its own, one after the other. A signal that comes while the
            same one is being acted upon is acted upon again afterwards.
    """

    def __init__(
        self,
        at_once: Mapping[signal.Signals, Callable[[], object]],
        in_turn: Mapping[signal.Signals, Callable[[], object]],
    ) -> None:
        self._at_once = at_once
        self._in_turn = in_turn
        self._asked: dict[signal.Signals, None] = {}
        self._news = Event()
        self._watchers: list[Any] = []

    def watch(self) -> None:
        """Begin, with those that came during the start."""
        gevent.spawn(self._act_in_turn)
        for number, act in self._at_once.items():
            self._start(number, act)
        for number in self._in_turn:
            self._start(number, self._ask, number)
        release()

    def _start(self, number: signal.Signals, *callback: Any) -> None:
        watcher = get_hub().loop.signal(number, ref=False)
        watcher.start(*callback)
        self._watchers.append(watcher)

    def _ask(self, number: signal.Signals) -> None:
        self._asked[number] = None
        self._news.set()

    def _act_in_turn(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            while self._asked:
                number = next(iter(self._asked))
                del self._asked[number]
                try:
                    self._in_turn[number]()
                except Exception as error:  # this greenlet is not to be had again
                    log.internal_error(f"acting on {number.name}", error)
