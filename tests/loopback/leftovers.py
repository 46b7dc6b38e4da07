"""What a test has left running in this process: all tests of a worker share one hub, and whatever goes on after its
test disturbs others, which then fail in its place.

Greenlets are noted as they are made, so a look costs no more than those that live still. A crew's greenlets that wait
for work are no leftovers; those at work are. Timers and watched descriptors are only counted, by the loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakSet

import gevent
from gevent import get_hub
from greenlet import greenlet

from proxy.net import crew

#: Seconds for those that were told to end, and for what they set going by that.
_PATIENCE = 2.0

#: Turns of the hub until that is so.
_TURNS = 2

_begun: WeakSet[Any] = WeakSet()
_told: WeakSet[Any] = WeakSet()


def watch() -> None:
    """Note what is begun from now on; once in a process."""
    gevent.Greenlet.add_spawn_callback(_begun.add)
    crew.greenlet = _of_a_crew  # type: ignore[assignment]


def _of_a_crew(*arguments: Any) -> greenlet:
    begun = greenlet(*arguments)
    _begun.add(begun)
    return begun


def running() -> set[Any]:
    """The greenlets of this thread's hub that do something, or wait for something."""
    hub = get_hub()
    return {each for each in tuple(_begun) if each and each.parent is hub and not _is_parked(each)}


class Before(NamedTuple):
    """What runs, and how much the loop watches."""

    greenlets: frozenset[Any]
    watched: int


def now() -> Before:
    """After what was only handed to the hub has begun."""
    for _ in range(_TURNS):
        gevent.sleep(0)
    return Before(frozenset(running()), get_hub().loop.activecnt)


def left_since(before: Before) -> list[str]:
    """What runs and did not run then, after it had the time to end by itself; each is told once."""
    known, ends_at = before.greenlets | set(_told), monotonic() + _PATIENCE
    while True:
        at_last = now()
        left, more = at_last.greenlets - known, at_last.watched - before.watched
        if (not left and more <= 0) or monotonic() > ends_at:
            break
        gevent.sleep(0.001)
    _told.update(left)
    watched = [f"{more} timers or descriptors that the loop watches"] if more > 0 and not left else []
    return watched + sorted(f"{each!r} in {_where(each)}" for each in left)


def end_work_of_crews() -> None:
    """For a test whose subject waits on for long by design."""
    for each in running():
        if not isinstance(each, gevent.Greenlet):
            gevent.kill(each)


def _is_parked(each: greenlet) -> bool:
    frame = each.gr_frame
    if frame is None or frame.f_code is not crew.Crew._worker.__code__:
        return False
    return frame.f_locals["switch"] in frame.f_locals["idle"]


def _where(each: greenlet) -> str:
    """The calls that it is in, the outermost first."""
    return " > ".join(reversed([frame.f_code.co_qualname for frame in _frames(each)]))


def _frames(each: greenlet) -> Iterator[FrameType]:
    frame = each.gr_frame
    while frame is not None:
        yield frame
        frame = frame.f_back
