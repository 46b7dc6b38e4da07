"""MTAs that send without end, each message with a permit, to a receiver that keeps its own times (`tests.witness`)."""

from __future__ import annotations

import smtplib
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from typing import Any

from greenarrow_proxy_client import Limits, PermitExpired, ProxyFailure, Session, ThrottleTimeout
from tests.mx import Mx
from tests.program import SECRET
from tests.unit.throttling.oracle import SECOND
from tests.waiting import wait_for
from tests.witness import Witness

SOURCE = "127.0.0.5"
NAME = "mta.example.com"
MESSAGE = b"Subject: x\r\n\r\nx\r\n"
_LOOK_UP_EVERY = 0.2  # whether it is over


class Sender:
    """One instance and one path of it, which the proxy knows when this is made; a context manager.

    Its mail is from `instance`@example.com.

    Args:
        threads: so many senders, each with a connection of its own.
        each: messages on a connection; 0: all.
        limits: the throttles of the path.
    """

    def __init__(
        self, address: tuple[str, int], mx: Mx, instance: str, *limits: Limits, threads: int = 2, each: int = 0
    ) -> None:
        self.instance = instance
        self.session = Session(address, SECRET, instance, tls=False, timeout=5)
        self.path = self.session.throttle(SOURCE, *limits)
        assert self.path.wait_until_registered(20)
        self._mx = mx
        self._each = each
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def __enter__(self) -> Sender:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join(60)
        self.session.close()  # not before: its limits go with it

    def stop(self) -> None:
        """After the message that it is at."""
        self._over.set()

    @property
    def slack(self) -> int:
        """d of its path's permits, in nanoseconds; it does not shrink."""
        return self.path._lease.slack_us * 1000

    def change(self, *limits: Limits) -> None:
        """Other limits for the same throttles."""
        self.session.change_limits(self.path, *limits)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                with self._connection() as smtp:
                    for number in count(1):
                        self._send(smtp)
                        if number == self._each or self._over.is_set():
                            break
            except (ProxyFailure, smtplib.SMTPException, OSError):  # the proxy was ended, or this is the end
                self._over.wait(0.02)

    def _connection(self) -> Any:
        options: dict[str, Any] = {"throttles": [self.path], "reuse": False, "tls": "none"}
        return self.session.smtp([self._mx.endpoint], NAME, **options)

    def _send(self, smtp: Any) -> None:
        try:
            self.path.backlog(ram=100_000)
            smtp.permit = self.path.acquire(_LOOK_UP_EVERY)
        except ThrottleTimeout:
            return
        with suppress(PermitExpired):  # nothing was sent
            smtp.sendmail(f"{self.instance}@example.com", ["to@example.net"], MESSAGE)


@contextmanager
def sending(witness: Witness, *senders: Sender, within: float = 20) -> Iterator[None]:
    """All of them have begun to send."""
    with ExitStack() as stack:
        for sender in senders:
            stack.enter_context(sender)
        names = {sender.instance for sender in senders}
        wait_for(lambda: set(witness.counts()) == names, within, "all of them send")
        yield
        for sender in senders:
            sender.stop()


def more(witness: Witness, number: int, since: int, *senders: str) -> None:
    """Until the receiver has seen so many more, of these senders together (all, if none is named)."""

    def seen() -> int:
        counts = witness.counts(since)
        return sum(counts[name] for name in senders) if senders else counts.total()

    wait_for(lambda: seen() >= number, 60, f"{number} more messages")


def passed(witness: Witness, seconds: float) -> None:
    """Until the receiver has got mail so many seconds after the first one."""
    first = witness.mails()[0].at
    wait_for(lambda: witness.mails()[-1].at >= first + seconds * SECOND, seconds + 60, f"{seconds} s of mail")
