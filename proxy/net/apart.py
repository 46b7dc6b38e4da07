"""What OpenSSL computes for milliseconds, in a few real threads: it lets go of the interpreter meanwhile, so the hub
goes on, and on another core if there is one.

Threads are few, and whose work it is decides who is next (`policy.turns.Line`), so that one peer's thousand handshakes
make nobody else wait for more than a few.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from gevent import get_hub, getcurrent
from gevent.threadpool import ThreadPool

from proxy.policy.turns import Line

_T = TypeVar("_T")


class Apart:
    """A pool of real threads with a fair line in front of it.

    Args:
        threads: how many work at a time.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPool(threads)
        self._free = threads
        self._line: Line[Any] = Line()
        self._handed: set[Any] = set()  # whose turn has come, and who have not run since

    def __len__(self) -> int:
        """How many wait for a thread."""
        return len(self._line)

    def call(self, key: Hashable, work: Callable[..., _T], *arguments: Any) -> _T:
        """What `work(*arguments)` returns or raises. Others run meanwhile.

        Who gives up waiting (a Timeout, say) must not touch what the work was given: the thread goes on with it.

        Args:
            key: whose work it is.
        """
        self._take_thread(key)
        try:
            task = self._pool.spawn(_outcome, work, arguments)
        except BaseException:
            self._give_thread()
            raise
        task.rawlink(lambda _: self._give_thread())
        result, error = task.get()
        del task
        if error is None:
            return result  # type: ignore[no-any-return]
        try:
            raise error
        finally:
            del error  # it refers to this frame

    def _take_thread(self, key: Hashable) -> None:
        if self._free:
            self._free -= 1
            return
        me = getcurrent()
        self._line.add(key, me)
        try:
            while me not in self._handed:  # other wake-ups are only hints
                get_hub().switch()
        except BaseException:
            if me in self._handed:
                self._give_thread()
            raise
        finally:
            self._line.leave(me)
            self._handed.discard(me)

    def _give_thread(self) -> None:
        """Called in the hub's thread. The thread goes to the next in the line at once, so nobody slips in."""
        if not self._line:
            self._free += 1
            return
        following = self._line.next()
        self._handed.add(following)
        get_hub().loop.run_callback(self._wake, following)

    def _wake(self, following: Any) -> None:
        if following in self._handed:  # it may have given up
            following.switch()


def _outcome(work: Callable[..., object], arguments: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    """What came of it; an exception is a result here, or gevent's hub would print it."""
    try:
        return work(*arguments), None
    except BaseException as error:
        return None, error


#: By whether it is for clients' TLS, which anybody can ask of us and which so never keeps receivers' waiting.
_apart: dict[bool, Apart] = {}


def for_receivers() -> Apart:
    """The threads for TLS that we ask for."""
    return _threads(False, max(1, min(4, os.cpu_count() or 1)))


def for_clients() -> Apart:
    """The thread for TLS that is asked of us."""
    return _threads(True, 1)


def _threads(clients: bool, number: int) -> Apart:
    if clients not in _apart:
        _apart[clients] = Apart(number)
    return _apart[clients]
