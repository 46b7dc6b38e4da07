"""Who looks at the steps of connections, and for how long: `log verbose` and `trace`.

Both are a `steps.Watch` with an end. One writes the lines of `log_verbose` into the log, the other hands them to its
caller, as long as that takes them; other processes may have some for him, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Any, NamedTuple

import gevent
from gevent.queue import Empty, Queue

from proxy.log import lines as log
from proxy.log import steps
from proxy.log.spelling import printable
from proxy.stats import Standing

#: Steps that wait for a caller who does not take them; the rest is counted.
_MOST_WAITING = 1000
#: A caller hears something so often, and so is known to be there; seconds.
_HEARTBEAT = 5.0


Hear = Callable[[str], object]
Lines = Iterator[list[str]]


class Verbose(NamedTuple):
    """What is written for a time. `id` is that of `show overrides`; `ends_at` on the monotonic clock."""

    id: str
    wanted: Mapping[str, str]
    ends_at: float
    because: str
    watch: steps.Watch
    timer: Any

    @property
    def left(self) -> float:
        """Seconds."""
        return max(0.0, self.ends_at - monotonic())


class Watching:
    """Those that were set by hand."""

    def __init__(self) -> None:
        self.verbose: list[Verbose] = []
        self._numbers = itertools.count(1)

    def begin(self, wanted: Mapping[str, str], seconds: float, because: str, id: str = "") -> str:
        """Write the steps of these connections into the log, for so long.

        Args:
            id: that another process has given it, who tells when it is over. "": it gets a new one.

        Returns:
            the id.
        """
        watch = steps.Watch(log.step, wanted)
        steps.begin(watch)
        timer = gevent.spawn_later(seconds, self._over, watch, not id)
        id = id or f"log{next(self._numbers)}"
        self.verbose.append(Verbose(id, dict(wanted), monotonic() + seconds, because, watch, timer))
        return id

    def end(self, id: str | None = None) -> int:
        """As if their time were over; all, or one; how many."""
        ended = [each for each in self.verbose if id in (None, each.id)]
        self.verbose = [each for each in self.verbose if each not in ended]
        for each in ended:
            each.timer.kill(block=False)
            steps.end(each.watch)
        return len(ended)

    def _over(self, watch: steps.Watch, is_told: bool) -> None:
        steps.end(watch)
        self.verbose = [each for each in self.verbose if each.watch is not watch]
        if is_told:
            log.note(log.Event.CONTROL, log.INFO, "log verbose is over", **watch.wanted)


def _nobody(hear: Hear) -> Callable[[], None]:
    return lambda: None


def trace(wanted: Mapping[str, str], seconds: float, others: Callable[[Hear], Callable[[], None]] = _nobody) -> Lines:
    """The steps of these connections as they happen, until the time is over or nobody asks for more; [] now and then,
    when there are none.

    Args:
        others: have those of other processes handed in, too; comes back with how to end that.
    """
    waiting: Queue[str] = Queue(_MOST_WAITING)
    left_out = 0

    def hear(line: str) -> None:
        nonlocal left_out
        if waiting.full():
            left_out += 1
        else:
            waiting.put_nowait(line)

    watch = steps.Watch(lambda standing, text: hear(_line(standing, text)), wanted)
    steps.begin(watch)
    end_others = others(hear)
    ends_at = monotonic() + seconds
    try:
        while (left := ends_at - monotonic()) > 0:
            lines = _taken(waiting, min(left, _HEARTBEAT))
            if left_out:
                lines.append(_left_out(left_out))
                left_out = 0
            yield lines
    finally:
        steps.end(watch)
        end_others()


def tell(wanted: Mapping[str, str], say: Callable[[list[str]], bool]) -> Callable[[], None]:
    """The same for a `trace` in another process, until the function that comes back is called.

    Args:
        say: hands over some lines, without waiting; False: there is no room.
    """
    left_out = 0

    def hear(standing: Standing, text: str) -> None:
        nonlocal left_out
        lines = [_left_out(left_out)] * (left_out > 0) + [_line(standing, text)]
        left_out = 0 if say(lines) else left_out + 1

    watch = steps.Watch(hear, wanted)
    steps.begin(watch)
    return lambda: steps.end(watch)


def _left_out(count: int) -> str:
    return f"{count} steps left out: they are not taken fast enough"


def _taken(waiting: Queue[str], seconds: float) -> list[str]:
    try:
        lines = [waiting.get(timeout=seconds)]
    except Empty:
        return []
    while not waiting.empty():
        lines.append(waiting.get_nowait())
    return lines


def _line(standing: Standing, text: str) -> str:
    where = f"{standing.client} {standing.source or '-'} -> {standing.destination or '-'}"
    age = monotonic() - standing.started
    return printable(f"{standing.number} {standing.instance or '-'} {where} +{age:.3f} {text}", 500)
