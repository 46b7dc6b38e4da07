"""One worker as the master sees it: what is known of it, and its link."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from time import monotonic

from gevent.event import Event

from proxy.egress.branch import Branch
from proxy.model import Endpoint
from proxy.net.seam import Seam
from proxy.protocols import seam
from proxy.server import orders
from proxy.server.orders import pack

#: Descriptors in one order.
_SOCKETS_AT_ONCE = 200


class Worker:
    """One of them, as the master sees it; a number keeps its record when its process is replaced."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0
        self.since = monotonic()
        self.died = ""  # why we have killed it
        self.link: Seam | None = None
        self.branch: Branch | None = None
        self.serves = False
        self.prepared: bytes | None = None  # what it said of the settings; b"": it is
        self.commits = False  # once it is prepared: it is a new one
        self.committing = False  # what it was told to put in force is not yet
        self.generation = 0  # of the plan that it has
        self.silent = 0
        self.failures = self.runs = 0
        self.cut = 0
        self.gone = Event()
        self.changed = Event()

    def say(self, record: seam.FromMaster) -> None:
        if self.link is not None:
            self.link.say(record)

    def say_with(self, record: seam.FromMaster, fds: Sequence[int]) -> None:
        if self.link is not None:
            self.link.say_with(record, fds)

    def order(self, what: str, body: object = None) -> None:
        self.say(seam.Order(what, pack(body)))

    def hand(self, sockets: Mapping[Endpoint, socket.socket]) -> None:
        """Listening sockets, by their configured addresses.

        Raises:
            OSError: there is no descriptor left for a copy.
        """
        addresses = list(sockets)
        for start in range(0, len(addresses), _SOCKETS_AT_ONCE):
            some = addresses[start : start + _SOCKETS_AT_ONCE]
            self.say_with(seam.Order(orders.SOCKETS, pack(some)), [sockets[each].fileno() for each in some])

    def kill(self, why: str) -> None:
        if self.pid:
            self.died = why
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
