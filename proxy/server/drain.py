"""How the program ends: what is open may finish within `drain_timeout`, the rest is reset.

Whether it ends, and what is to be closed of the process itself, is the server's.
"""

from __future__ import annotations

from time import monotonic

import gevent

from proxy.errors import Draining
from proxy.log import lines as log
from proxy.model import Ending
from proxy.server import systemd
from proxy.server.listeners import Doors
from proxy.services import Leaving, Services

_DRAIN_POLL = 0.05
_EXTEND_EVERY = 5.0
_STOPPING = "the proxy is shutting down"


def drain(services: Services, doors: Doors, notifier: systemd.Notifier) -> int:
    """Accept nothing more and wait for what is open.

    Returns:
        How many connections of clients had to be reset.
    """
    timeout = services.settings.drain_timeout
    notifier.stopping("draining", 3 * _EXTEND_EVERY)
    doors.finish()
    end = monotonic() + timeout
    _ask_to_leave(services, timeout, end)
    open_now = doors.open_connections()
    log.note(log.Event.DRAIN, log.INFO, "stopping: no new connections", open_connections=open_now, timeout=timeout)
    extended = monotonic()
    while _is_busy(services, doors) and monotonic() < end:
        if monotonic() - extended >= _EXTEND_EVERY:
            extended = monotonic()
            notifier.extend(3 * _EXTEND_EVERY)
        gevent.sleep(_DRAIN_POLL)
    cut = doors.open_connections()
    _cut_off(services)
    return cut


def _ask_to_leave(services: Services, timeout: float, end: float) -> None:
    services.instances.leaving = Leaving(end, _STOPPING)
    for channel in list(services.instances.channels):
        channel.goaway(timeout, _STOPPING, Ending.DRAIN_TIMEOUT)
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
