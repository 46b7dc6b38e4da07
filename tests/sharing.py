"""What the tests of sharing have in common: instances that send numbered messages, and a receiver's count of them."""

from __future__ import annotations

import contextlib
import smtplib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from greenarrow_proxy_client import ProxyFailure, Session
from tests.mx import Mx, close, half_close, reset, say
from tests.program import SECRET, Proxy
from tests.waiting import wait_for

NAME = "mta.example.com"
PLAIN = "listen_tls no\n"
#: How a receiver can die instead of answering.
DEATHS = {"close": close, "reset": reset, "half_close": half_close, "421": say(b"421 4.3.2 bye\r\n", close)}
#: What a client that delivers mail has to expect.
FAILURES = (ProxyFailure, smtplib.SMTPException, OSError)


class Mixed(Exception):
    """A message is not what was sent."""


@contextlib.contextmanager
def instances(proxy: Proxy, *names: str, **options: Any) -> Iterator[tuple[Session, ...]]:
    """MTAs of these names; the proxy must have `listen_tls no` where they are not told otherwise."""
    with contextlib.ExitStack() as stack:
        yield tuple(
            stack.enter_context(Session(proxy.native, SECRET, name, **({"tls": False} | options))) for name in names
        )


def body(number: int, size: int = 300) -> bytes:
    """A message that can be told from any other, with lines that begin with dots."""
    line = b"%d .\r\n.%d\r\n" % (number, number)
    return b"Subject: %d\r\n\r\n" % number + line * (size // len(line) + 1)


def send(session: Session, mx: Mx, number: int, *, release: bool = True, size: int = 300, **options: Any) -> Any:
    """One message; the `ProxiedSMTP`, which is released if it went well.

    Raises:
        FAILURES: it did not go; the connection is closed.
    """
    options.setdefault("tls", "none")
    smtp = session.smtp([mx.endpoint], NAME, **options)
    try:
        smtp.sendmail(f"{number}@example.com", ["to@example.net"], body(number, size))
    except BaseException:
        smtp.close()
        raise
    if release:
        smtp.verdict = smtp.release(wait=True)
    return smtp


def cached(proxy: Proxy, count: int, *mxs: Mx) -> None:
    """Wait until so many connections are idle, and none is in use; `mxs`: all that they lead to."""
    seen = ""

    def look() -> bool:
        nonlocal seen
        seen = proxy.status()[-1]
        return seen.endswith(f"connections={count}(active=0 cached={count})")

    # Each look is a signal and some lines.
    wait_for(look, what=f"{count} cached connections", pause=lambda _: time.sleep(0.02))
    # Those that are being cleaned count, too. An answer that was sent before a signal is read before the next one.
    wait_for(lambda: all(_has_answered_rset(mx) for mx in mxs), what="RSET is answered")
    look()
    look()


def drop_cached(proxy: Proxy, more: str = PLAIN) -> None:
    """What a test left in the cache is given up, so that the next one finds none."""
    proxy.hup("reuse_connections no\n" + more)
    proxy.hup(more)
    cached(proxy, 0)


def _has_answered_rset(mx: Mx) -> bool:
    running = [session for session in mx.sessions if session.ended is None]
    return all(each.commands[-1:] == [b"RSET"] and each.last.startswith(b"250") for each in running)


def accepted(mx: Mx, size: int | Callable[[int], int] = 300) -> Counter[int]:
    """Number of a message → how often the receiver has accepted it.

    Raises:
        Mixed: one is not whole, or something else is in it.
    """
    count: Counter[int] = Counter()
    for message in list(mx.messages):
        if message.accepted:
            number = int(message.mail.partition(b"<")[2].partition(b"@")[0])
            expected = body(number, size(number) if callable(size) else size)
            if message.content != expected or message.rcpts != (b"rcpt TO:<to@example.net>",):
                raise Mixed(f"message {number}: {message.rcpts} {message.content[:2000]!r}")
            count[number] += 1
    return count


def arrived(mx: Mx, expected: dict[int, int], size: int | Callable[[int], int] = 300) -> None:
    """The receiver has accepted these, and nothing else. (It has said so before it notes it.)"""
    found: Counter[int] = Counter()

    def look() -> bool:
        nonlocal found
        found = accepted(mx, size)
        return found == expected

    try:
        wait_for(look)
    except AssertionError:
        lost, others = dict(Counter(expected) - found), dict(found - Counter(expected))
        raise AssertionError(f"not accepted: {lost}; accepted and not expected: {others}") from None
