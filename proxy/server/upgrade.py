"""SIGUSR2: a new process of this program, perhaps of a newer version, takes over without a break.

The old side. It starts the new one, hands it the listening sockets, waits until that one is ready to serve, freezes the
throttle manager, and sends what it has. From then on the new one is the master, and this process is a worker of it that
takes nothing new: it asks for places and slots there (`egress.switch`), and ends when its last connection has. If the
new one fails before it has taken over, nothing has happened. The new side is `succession`, the words are `orders`'.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence

import gevent
from gevent.event import Event
from msgspec import msgpack

from proxy import __version__
from proxy.egress.admission import Admission
from proxy.egress.clock import clock_ns
from proxy.egress.remote import Remote
from proxy.log import lines as log
from proxy.model import Endpoint
from proxy.net.seam import Seam
from proxy.net.turns import Breather
from proxy.protocols import seam
from proxy.server import orders
from proxy.server.child import LINK_FD, start_child
from proxy.server.orders import Handed, Hello

#: Seconds until the new process must be ready, and then until it must have taken over.
_READY_WITHIN, _TAKEN_WITHIN = 120.0, 60.0
#: Seconds after its last word in which it ends, which says more.
_ENDS_WITHIN = 2.0
_SOCKETS_AT_ONCE = 200
#: The variable that says where the new process finds its end of the link.
VARIABLE = "GREENARROW_HEIR_FD"
_OURS_ALONE = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_PID")


class Failed(Exception):
    """The new process does not take over; says why."""


class Upgrade:
    """One attempt.

    Args:
        sockets: what is handed over, each with what it is.
        hello: the first words.
        admission: whose manager is handed over.
        taken: called when the new process is ready, with the link on which it is the master; must not wait.
        asked: called for each question and order of the new master.

    Attributes:
        unused: doors, each with its number, that the new process does not listen on: who stands in their queues is
            still ours.
    """

    def __init__(
        self,
        sockets: Sequence[tuple[Handed, int]],
        hello: Hello,
        admission: Admission,
        asked: Callable[[seam.FromMaster], object],
    ) -> None:
        self._sockets = sockets
        self._hello = hello
        self._admission = admission
        self._asked = asked
        self._news = Event()
        self._heard: list[str] = []
        self._gone = ""  # why there is no new process (any more)
        self._remote: Remote | None = None
        self.pid = 0
        self.unused: frozenset[tuple[Endpoint, int]] = frozenset()
        self.link: Seam | None = None

    def run(self) -> None:
        """Up to the moment in which the new process has taken over.

        Raises:
            Failed: it has not; all is as it was.
        """
        manager = self._admission.manager
        self._start()
        try:
            self._greet()
            self._wait_for(orders.READY, _READY_WITHIN)
            manager.freeze(clock_ns())
            try:
                self._send_estate()
                self._wait_for(orders.TAKEN, _TAKEN_WITHIN)
            except BaseException:
                self._admission.thaw()
                raise
        except BaseException:
            self._end()
            raise

    def goes_to(self, remote: Remote) -> None:
        """What the new master says of places and slots goes there."""
        self._remote = remote

    def say_meanwhile(self) -> None:
        """What has happened to places that the new master knows of."""
        if self.link is not None:
            for chunk in self._admission.manager.meanwhile():
                self.link.say(seam.Tell(orders.MEANWHILE, chunk))

    # ---------------------------------------------------------------- steps

    def _start(self) -> None:
        blocked = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        try:
            child = start_child(sys.orig_argv[1:], _OURS_ALONE, {VARIABLE: str(LINK_FD)}, blocked)
        except OSError as error:
            raise Failed(f"the new program cannot be started: {os.strerror(error.errno or 0)}") from None
        self.pid = child.pid
        self.link = Seam(child.link, False, self._take, self._lost)
        child.watch(self._exited)

    def _greet(self) -> None:
        link = self.link
        assert link is not None
        link.say(seam.Tell(orders.HELLO, msgpack.encode(self._hello)))
        for start in range(0, len(self._sockets), _SOCKETS_AT_ONCE):
            some = self._sockets[start : start + _SOCKETS_AT_ONCE]
            body = msgpack.encode([what for what, _ in some])
            link.say_with(seam.Tell(orders.HANDED, body), [fd for _, fd in some])
        link.say(seam.Tell(orders.ALL_HANDED))

    def _send_estate(self) -> None:
        link = self.link
        assert link is not None
        for chunk in self._admission.manager.gather(clock_ns(), Breather("upgrade")):
            link.say(seam.Tell(orders.ESTATE, chunk))
        link.say(seam.Tell(orders.ESTATE_END))
        self.say_meanwhile()

    def _wait_for(self, what: str, seconds: float) -> None:
        with gevent.Timeout(seconds, Failed(f"the new program was not {what} within {seconds:.0f} s")):
            while what not in self._heard:
                if self._gone:
                    raise Failed(self._gone)
                self._news.wait()
                self._news.clear()

    def _take(self, records: Iterable[seam.FromMaster], fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        for record in records:
            try:
                if isinstance(record, seam.Order) and record.what in (orders.READY, orders.TAKEN):
                    self._note_unused(record.body)
                    self._heard.append(record.what)
                    self._news.set()
                elif self._remote is None or not self._remote.hear(record):
                    self._asked(record)
            except Exception as error:  # the other records are not to be lost
                log.internal_error("a record of the new master", error)

    def _note_unused(self, body: bytes) -> None:
        if body:
            handed = msgpack.decode(body, type=list[Handed])
            self.unused = frozenset([(Endpoint(each.host, each.port), each.index) for each in handed])

    def _lost(self) -> None:
        self.link = None
        gevent.spawn_later(_ENDS_WITHIN, self._gone_for, "the new program has closed the link")
        if self._remote is not None:
            self._remote.lost()

    def _gone_for(self, why: str) -> None:
        self._gone = self._gone or why
        self._news.set()

    def _exited(self, how: str) -> None:
        self._gone_for(f"the new program has ended: {how}")

    def _end(self) -> None:
        """The new process is of no use."""
        if self.link is not None:
            self.link.close()
            self.link = None
        if not self._gone.startswith("the new program has ended"):
            os.kill(self.pid, signal.SIGKILL)


def version_of(hello: Hello) -> str:
    return f"{hello.version} (pid {hello.pid})"


def hello_of(incarnation: int, highest: int, identity: bytes) -> Hello:
    """The first words of this process."""
    return Hello(seam.VERSION, __version__, os.getpid(), incarnation, highest, identity)
