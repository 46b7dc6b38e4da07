"""A receiver's own evidence: when each MAIL came and from whom, and how many connections it had at one time.

    witness = Witness()
    with Mx(witness.script) as mx:
        ...
    witness.check(Rule(20, 1), "a", "b")

When a MAIL came is the kernel's word, not that of the thread that reads it: a busy machine may let a receiver run when
it likes, and what came one by one is then read together.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from bisect import bisect_left
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

from tests.mx import Behaviour, Session, usual
from tests.unit.throttling.oracle import SECOND, Rule, check_uses, check_windows

_SO_TIMESTAMPNS = 35  # Linux, as SO_TIMESTAMPNS_OLD; not in Python's module
_STAMP = struct.Struct("qq")
#: Between the proxy's look at the clock and its write it may not run for a moment, as any program.
MARGIN = SECOND // 20


class Mail(NamedTuple):
    """`at`: nanoseconds of the kernel's clock. sender: what stands before the @ in MAIL FROM."""

    at: int
    sender: str


class Witness:
    """Attributes:
    most: connections at one time, by the receiver's count: each from its accept until it closes it.
    """

    def __init__(self, **script: Behaviour) -> None:
        """Args: script: what the receiver does at other steps."""
        _stamp_always()
        self.most = 0
        self.script: dict[str, Any] = {"greeting": self._greet, "mail": self._mail} | script
        self._mails: list[Mail] = []
        self._lock = threading.Lock()

    def mails(self, since: int = 0, until: int | None = None) -> list[Mail]:
        """In the order in which they came."""
        with self._lock:
            mails = sorted(self._mails)
        return [mail for mail in mails if since <= mail.at and (until is None or mail.at < until)]

    def counts(self, since: int = 0, until: int | None = None) -> Counter[str]:
        """How many of each sender."""
        return Counter(mail.sender for mail in self.mails(since, until))

    def check(self, rule: Rule, *senders: str, since: int = 0, wait_for_places: bool = False) -> None:
        """No window, long or short, saw more mail of these senders (all, if none is named) than the rule lets through:
        counted in some windows, and by slots in all of them.

        Args:
            wait_for_places: messages have their slots, and then wait for places. Several that waited may go together
                when one comes: what is promised then is the rule's own window, and longer ones.

        Raises:
            oracle.Violation.
        """
        times = [mail.at for mail in self.mails(since) if not senders or mail.sender in senders]
        if not wait_for_places:
            check_uses(times, rule.later(MARGIN))
        for window in (SECOND // 10, SECOND // 2, SECOND, 2 * SECOND, rule.seconds * SECOND):
            if window >= rule.seconds * SECOND or not wait_for_places:
                check_windows(times, window, rule.most(window + MARGIN))

    def busiest(self, seconds: float, since: int = 0) -> int:
        """The most mail that a window of so many seconds saw."""
        times = [mail.at for mail in self.mails(since)]
        return max((bisect_left(times, at + seconds * SECOND) - i for i, at in enumerate(times)), default=0)

    def _greet(self, session: Session, reply: bytes) -> None:
        session.sock = _Stamped(session.sock)
        with self._lock:
            self.most = max(self.most, session.mx.open)
        usual(session, reply)

    def _mail(self, session: Session, reply: bytes) -> None:
        sender = re.search(rb"<([^@>]*)", session.commands[-1])
        at = session.sock.came_at if isinstance(session.sock, _Stamped) else now()
        with self._lock:
            self._mails.append(Mail(at, sender[1].decode() if sender else ""))
        usual(session, reply)


def now() -> int:
    """The kernel's clock of incoming packets; nothing else in the tests or the program looks at it."""
    return time.time_ns()


@cache
def _stamp_always() -> int:
    """The kernel stamps what comes while some socket wants it. One is left open for as long as this process lives: else
    it would begin anew, a little late, with each connection that comes when there is no other."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    return sock.detach()


class _Stamped(socket.socket):
    """A connection that knows when the bytes that were read last have come."""

    def __init__(self, sock: socket.socket) -> None:
        timeout = sock.gettimeout()
        super().__init__(fileno=sock.detach())
        self.settimeout(timeout)
        self.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.came_at = 0

    def recv(self, size: int, flags: int = 0) -> bytes:  # type: ignore[override]
        data, words, _, _ = self.recvmsg(size, socket.CMSG_SPACE(_STAMP.size), flags)
        self.came_at = now()  # what came before this socket wanted to know has no stamp
        for level, kind, word in words:
            if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
                seconds, nanoseconds = _STAMP.unpack(word)
                self.came_at = seconds * SECOND + nanoseconds
        return data
