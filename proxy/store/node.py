"""One server that is kept connected: found, watched, found anew after every trouble, with a growing pause between.

Which server that is may change (Sentinel), and is `find`'s to say. While it stays, INFO is asked every two seconds:
so a server that has lost its mastership, or hangs, is noticed without a call.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from time import monotonic
from typing import Any

from gevent import Greenlet, sleep, spawn

from proxy.log import lines as log
from proxy.store.dial import INFO, read_info
from proxy.store.link import Link
from proxy.store.servers import Server, Trouble

#: Seconds between two looks at a server, and for the answer.
WATCH = 2.0
ANSWER = 1.0
#: Seconds of the first pause between two attempts, and of the longest; each is shortened at random, to a half at most,
#: so that proxies do not come back all at once.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0
#: A connection that has stood for so long was good: the next pause is the first again.
_GOOD = 5.0

Find = Callable[[], tuple[Link, Server]]


class Node:
    """A server that shall always be connected.

    Args:
        find: a connection to the server that it shall be, logged in. Raises Trouble.
        still: whether that server is still the right one; called now and then. Raises Trouble if it is not.
        changed: called when the connection comes and goes. look: seconds between two looks at it.

    Attributes:
        link, server: the connection and who is there; None while there is none.
        trouble: why there is none, or the last one. attempts: in a row that failed.
        connects: how often it was connected.
    """

    def __init__(
        self,
        find: Find,
        changed: Callable[[Node], object],
        still: Callable[[Server], object] = lambda server: None,
        look: float = WATCH,
    ) -> None:
        self.link: Link | None = None
        self.server: Server | None = None
        self.trouble: Trouble | None = None
        self.attempts = 0
        self.connects = 0
        self._find, self._still, self._changed, self._look = find, still, changed, look
        self._running: Greenlet[Any] | None = None

    @property
    def live(self) -> tuple[Link, Server] | None:
        """The connection and who is there; None: there is none, or it has just ended."""
        if self.link is None or self.server is None or self.link.trouble is not None:
            return None
        return self.link, self.server

    def start(self) -> None:
        self._running = spawn(self._run)

    def stop(self) -> None:
        """Let the connection go, for good."""
        if self._running is not None:
            self._running.kill(block=False)
        if self.link is not None:
            self.link.close(Trouble("connect", self.link.where, "not wanted any more"))
            self.link = self.server = None

    def give_up(self, trouble: Trouble) -> None:
        """This connection is of no use: find the server anew."""
        if self.link is not None:
            self.link.close(trouble)

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                link, server = self._find()
            except Trouble as trouble:
                self.attempts += 1
                self._lose(trouble)
            except Exception as error:  # a mistake of ours must not be the last attempt
                log.internal_error("finding the throttle store", error)
                self._lose(Trouble("internal", "-", type(error).__name__))
            else:
                since = monotonic()
                self._use(link, server)
                self._lose(self._watch(link))
                if monotonic() - since >= _GOOD:
                    pause = FIRST_PAUSE
            sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, LONGEST_PAUSE)

    def _use(self, link: Link, server: Server) -> None:
        self.link, self.server = link, server
        self.attempts = 0
        self.connects += 1
        self._changed(self)

    def _lose(self, trouble: Trouble) -> None:
        self.link = self.server = None
        self.trouble = trouble
        self._changed(self)

    def _watch(self, link: Link) -> Trouble:
        """Look at it now and then until it ends; why it has."""
        while not link.ended.wait(self._look):
            try:
                server = read_info(link, link.ask(INFO, ANSWER, "info"))
                if not server.is_master:
                    raise Trouble("role", link.where, f"it is a replica now, of {server.master or 'nobody'}")
                self._still(server)
            except Trouble as trouble:
                link.close(trouble)
                break
            if server != self.server:
                self.server = server
                self._changed(self)
        assert link.trouble is not None
        return link.trouble
