"""How the program ends: what is open may finish within `drain_timeout`, the rest is reset.

Whether it ends, and what is to be closed of the process itself, is the server's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import inf
from time import monotonic
from typing import Protocol

import gevent

from proxy.errors import Draining
from proxy.log import lines as log
from proxy.model import Ending, Endpoint
from proxy.server import systemd
from proxy.server.listeners import Doors
from proxy.services import Leaving, Services

_DRAIN_POLL = 0.05
_EXTEND_EVERY = 5.0
#: Seconds that the others may take to end, beyond the same time-out.
_LAST_WORDS = 3.0
_STOPPING = "the proxy is shutting down"


class Others(Protocol):
    """Processes that end with this one."""

    def finish(self, timeout: float, replaced: bool, ours: Collection[tuple[Endpoint, int]]) -> None:
        """They take nothing new, and end when what they have is over, or after `timeout`."""

    def all_gone(self) -> bool: ...
    def open_connections(self) -> int: ...

    def kill(self) -> int:
        """End those that are left; how many connections of clients all of them had to reset."""


class Nobody:
    """There are none."""

    def finish(self, timeout: float, replaced: bool, ours: Collection[tuple[Endpoint, int]]) -> None:
        """See `Others`."""

    def all_gone(self) -> bool:
        return True

    def open_connections(self) -> int:
        return 0

    def kill(self) -> int:
        """See `Others`."""
        return 0


def drain(
    services: Services,
    doors: Doors,
    notifier: systemd.Notifier,
    timeout: float,
    others: Others | None = None,
    replaced: bool = False,
    hurry: Callable[[], float] = lambda: inf,
    ours: Collection[tuple[Endpoint, int]] = (),
) -> int:
    """Accept nothing more and wait for what is open.

    Args:
        timeout: seconds after which the rest is reset. others: None: we are one of them, and say nothing.
        hurry: until when at the most, on the monotonic clock, if that has become earlier.
        replaced: another process takes what is new, so that nobody needs to be hurried; the doors are its own.
        ours: but for these, by their configured addresses and numbers.

    Returns:
        How many connections of clients had to be reset.
    """
    is_worker = others is None
    others = Nobody() if others is None else others
    notifier.stopping("draining", 3 * _EXTEND_EVERY)
    if replaced:
        doors.leave({endpoint for endpoint, index in ours if index == 0})
    else:
        doors.finish()
    others.finish(timeout, replaced, ours)
    end = monotonic() + timeout
    _ask_to_leave(services, timeout, end, replaced)
    open_now = doors.open_connections() + others.open_connections()
    level = log.DEBUG if is_worker else log.INFO
    log.note(log.Event.DRAIN, level, "stopping: no new connections", open_connections=open_now, timeout=timeout)
    extended = monotonic()
    while (_is_busy(services, doors) or not others.all_gone()) and monotonic() < min(end, hurry()):
        if monotonic() - extended >= _EXTEND_EVERY:
            extended = monotonic()
            notifier.extend(3 * _EXTEND_EVERY)
        gevent.sleep(_DRAIN_POLL)
    cut = doors.open_connections()
    _cut_off(services)
    with gevent.Timeout(_LAST_WORDS, False):
        while not others.all_gone():
            gevent.sleep(_DRAIN_POLL)
    return cut + others.kill()


def _ask_to_leave(services: Services, timeout: float, end: float, replaced: bool) -> None:
    services.instances.leaving = Leaving(end, _STOPPING, replaced)
    for channel in list(services.instances.channels):
        channel.goaway(timeout, _STOPPING, Ending.DRAIN_TIMEOUT)
    if not replaced:
        for dialogue in list(services.instances.dialogues):
            dialogue.goaway()
    for session in list(services.instances.sessions):
        session.goaway(timeout, _STOPPING)
    services.keeper.drain()


def _is_busy(services: Services, doors: Doors) -> bool:
    """Whether anything is open that a drain waits for; sessions stay until all else is done."""
    return doors.open_connections() > len(services.instances.sessions) or services.keeper.cached > 0


def _cut_off(services: Services) -> None:
    services.engine.abort_all(Ending.DRAIN_TIMEOUT)
    for channel in list(services.instances.channels):
        channel.cut(Ending.DRAIN_TIMEOUT)
    for dialogue in list(services.instances.dialogues):
        dialogue.cut(Ending.DRAIN_TIMEOUT)
    for session in list(services.instances.sessions):
        session.cut(Draining(_STOPPING))
