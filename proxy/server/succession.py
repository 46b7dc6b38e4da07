"""The new side of an upgrade (`upgrade`): a process that takes over from a running one.

It has read its own configuration and is wired like any other when it asks for the estate of the old one; only then it
gives out places and slots, and only then it accepts. Whatever goes wrong before that ends it, and the old one goes on.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import gevent
from gevent.event import Event
from msgspec import MsgspecError, msgpack

from proxy.egress.clock import clock_ns
from proxy.errors import ConfigError
from proxy.log import lines as log
from proxy.model import Endpoint
from proxy.net.seam import Seam
from proxy.net.turns import Breather
from proxy.protocols import seam
from proxy.server import orders
from proxy.server.orders import Handed, Hello
from proxy.throttling.estate import Reader, Unreadable
from proxy.throttling.flows import Places
from proxy.throttling.manager import Manager

_WITHIN = 60.0


class Predecessor:
    """The process that is replaced.

    Args:
        fd: our end of the link.

    Attributes:
        hello: its first words. held: the places of sockets that it has, by its numbers.
        heard: takes what it says when it is our worker; set by who has it as one. lost: called when it is gone.
        settle: called when something has happened to its places.
    """

    def __init__(self, fd: int) -> None:
        self.hello: Hello
        self.held: dict[int, Places] = {}
        self.heard: Callable[[seam.FromWorker], object] = lambda record: None
        self.lost: Callable[[], object] = lambda: None
        self.settle: Callable[[], object] = lambda: None
        self._sockets: dict[tuple[str, Endpoint], dict[int, socket.socket]] = {}
        self._control: tuple[str, socket.socket] | None = None
        self._unused: list[Handed] = []
        self._reader = Reader()
        self._unreadable = ""
        self._manager: Manager | None = None
        self._early: list[bytes] = []
        self._got: set[str] = set()
        self._news = Event()
        self._gone = False
        self.link = Seam(socket.socket(fileno=fd), True, self._take, self._is_gone)

    # ---------------------------------------------------------------- what it hands over

    def greet(self) -> None:
        """Wait for its first words and its sockets.

        Raises:
            ConfigError: they do not come, or cannot be understood.
        """
        self._wait_for(orders.ALL_HANDED)
        if self.hello.seam != seam.VERSION:
            raise ConfigError(
                f"the running program ({self.hello.version}) hands over in form {self.hello.seam}, and this one takes "
                f"{seam.VERSION}: restart instead"
            )

    def take(self, endpoint: Endpoint, count: int) -> list[socket.socket]:
        """Listening sockets for a configured address, as many as are wanted; see `listeners.Handed`."""
        found = self._sockets.pop(("door", endpoint), None)
        if found is None:
            return []
        sockets = [found[index] for index in sorted(found)]
        self._give_back(endpoint, {index: found[index] for index in sorted(found)[count:]})
        return [*sockets[:count], *(sockets[0].dup() for _ in range(count - len(sockets)))]

    def control(self, path: str) -> socket.socket | None:
        """The listening control socket, if it is this one."""
        if self._control is None or self._control[0] != path:
            return None
        sock, self._control = self._control[1], None
        return sock

    def close_unclaimed(self) -> None:
        """Sockets that our configuration does not name: nobody shall hang in their queues."""
        for (_, endpoint), found in self._sockets.items():
            log.note(log.Event.LISTEN, log.INFO, f"{endpoint} is not in the configuration any more")
            self._give_back(endpoint, found)
        self._sockets.clear()
        if self._control is not None:
            self._control[1].close()

    def _give_back(self, endpoint: Endpoint, sockets: dict[int, socket.socket]) -> None:
        """It serves those who stand in their queues, and closes them."""
        for index, sock in sockets.items():
            sock.close()
            self._unused.append(Handed("door", endpoint.host, endpoint.port, index))

    # ---------------------------------------------------------------- its throttles

    def take_over(self, manager: Manager) -> None:
        """Say that we are ready, and adopt what its manager has.

        Raises:
            ConfigError: it cannot be understood, or the other process is gone.
        """
        self.link.say(seam.Order(orders.READY))
        self._wait_for(orders.ESTATE_END)
        try:
            self.held = manager.adopt(self._reader.finish(), clock_ns(), Breather("upgrade"))
            self._manager = manager
            for chunk in self._early:
                manager.adopt_meanwhile(chunk, self.held, clock_ns())
        except Unreadable as error:
            raise ConfigError(_unreadable(error)) from None

    def taken(self) -> None:
        """We are the master from now on."""
        self.link.say(seam.Order(orders.TAKEN, msgpack.encode(self._unused)))

    # ---------------------------------------------------------------- steps

    def _wait_for(self, what: str) -> None:
        with gevent.Timeout(_WITHIN, ConfigError(f"the running program did not send {what} within {_WITHIN:.0f} s")):
            while True:
                if self._unreadable:
                    raise ConfigError(self._unreadable)
                if what in self._got:
                    return
                if self._gone:
                    raise ConfigError("the running program has ended in the middle of the upgrade")
                self._news.wait()
                self._news.clear()

    def _take(self, records: Iterable[Any], fds: list[int]) -> None:
        for record in records:
            try:
                if not isinstance(record, seam.Tell) or not self._understand(record, fds):
                    self.heard(record)
            except (Unreadable, MsgspecError) as error:
                self._unreadable = self._unreadable or _unreadable(error)
            except Exception as error:
                log.internal_error("what the running program says", error)
        self._news.set()

    def _understand(self, record: seam.Tell, fds: list[int]) -> bool:
        if record.what == orders.HELLO:
            self.hello = msgpack.decode(record.body, type=Hello)
        elif record.what == orders.HANDED:
            for what, fd in zip(msgpack.decode(record.body, type=list[Handed]), fds, strict=True):
                self._keep(what, socket.socket(fileno=fd))
        elif record.what == orders.ESTATE:
            self._reader.feed(record.body)
        elif record.what == orders.MEANWHILE:
            if self._manager is None:
                self._early.append(record.body)
            else:
                self._manager.adopt_meanwhile(record.body, self.held, clock_ns())
                self.settle()
        elif record.what in (orders.ALL_HANDED, orders.ESTATE_END):
            self._got.add(record.what)
        else:
            return False
        return True

    def _keep(self, what: Handed, sock: socket.socket) -> None:
        sock.setblocking(False)
        if what.kind == "control":
            self._control = what.path, sock
        else:
            self._sockets.setdefault((what.kind, Endpoint(what.host, what.port)), {})[what.index] = sock

    def _is_gone(self) -> None:
        self._gone = True
        self._news.set()
        self.lost()


def _unreadable(error: Exception) -> str:
    return f"what the running program hands over cannot be read: {error}; restart instead"


def of_environment() -> Predecessor | None:
    """The one that has started this process to be replaced by it; None: nobody has."""
    from proxy.server.upgrade import VARIABLE

    fd = os.environ.pop(VARIABLE, "")
    return Predecessor(int(fd)) if fd.isdecimal() else None
