"""What happens now and then: status lines, the watchdog of systemd, and the sweep of all that is open.

Each is a loop of a greenlet of its own. What a report says is for `stats`, what a sweep finds for those that are swept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from time import monotonic

import gevent

from proxy.log import lines as log
from proxy.net.turns import Breather, rest
from proxy.server import systemd
from proxy.services import Services
from proxy.stats import MOST_LINES, Snapshot, StatusLine

_SWEEPS_AN_IDLE_TIMEOUT = 8
_LONGEST_SWEEP_PERIOD = 15.0


class Routine:
    """The loops, from `begin` until the program ends.

    Args:
        services: those of the moment. snapshot: the figures of the moment.
        turn_day: tell whoever counts by days which one it is. tick: some times a minute.
    """

    def __init__(
        self,
        services: Callable[[], Services],
        snapshot: Callable[[], Snapshot],
        turn_day: Callable[[], None],
        tick: Callable[[], None],
        notifier: systemd.Notifier,
    ) -> None:
        self._services = services
        self._snapshot = snapshot
        self._turn_day = turn_day
        self._tick = tick
        self._notifier = notifier

    def begin(self) -> None:
        """Start them all."""
        self._reporting = gevent.spawn(self._report_forever)
        gevent.spawn(sweep_forever, self._services, self._now_and_then)
        gevent.spawn(self._watchdog_forever)

    def end(self) -> None:
        """Another process tells of everything now."""
        self._reporting.kill(block=False)

    def report(self) -> None:
        """SIGUSR1: all status lines, in turns with all else: there may be thousands."""
        log.status(_in_turns(self._snapshot().lines()))

    def _now_and_then(self) -> None:
        self._turn_day()
        self._tick()

    def _report_forever(self) -> None:
        while True:
            gevent.sleep(self._services().settings.stats_interval)
            log.status(self._snapshot().lines(MOST_LINES))

    def _watchdog_forever(self) -> None:
        interval = self._notifier.watchdog_interval
        while interval:
            self._notifier.watchdog()
            gevent.sleep(interval)


def sweep_forever(services: Callable[[], Services], tick: Callable[[], object]) -> None:
    """Look at all that is open for what has been idle too long, again and again.

    Args:
        tick: called each time.
    """
    while True:
        settings = services().settings
        shortest = min(settings.idle_timeout, settings.half_close_timeout)
        gevent.sleep(min(shortest / _SWEEPS_AN_IDLE_TIMEOUT, _LONGEST_SWEEP_PERIOD))
        tick()
        for _ in services().engine.sweep(monotonic()):
            rest()
        for channel in list(services().instances.channels):
            channel.sweep(monotonic())
        for dialogue in list(services().instances.dialogues):
            dialogue.sweep(monotonic())
        if (agent := services().via) is not None:  # a reload may have put another in its place
            agent.shed()


def _in_turns(lines: Iterable[StatusLine]) -> Iterator[StatusLine]:
    breathe = Breather("report")
    for line in lines:
        breathe()
        yield line
