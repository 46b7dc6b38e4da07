"""The session's own connection: kept up by a thread, answered and asked pings, handed to whoever listens.

It knows nothing of SMTP. What it gives to the channels is the one-flight authentication; what the throttle dialogue
needs are `listen` and `send`.
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from greenarrow_proxy_client.errors import ProxyRejected
from greenarrow_proxy_client.link import Account, Link
from proxy.errors import PeerError
from proxy.protocols.native import auth, frames
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s

PING_EVERY = 1.0
DEAD_AFTER = 5.0
#: A connection that lived this long is made again at once.
_STEADY = 10.0
_SHORTEST_DELAY, _LONGEST_DELAY = 0.1, 10.0
#: After an answer that somebody has to do something about.
_DELAY_AFTER_REJECTION = 60.0
#: How long the proxy has to answer BYE by closing.
_LEAVE_TIMEOUT = 2.0


def clock_us() -> int:
    """Microseconds of a clock that never steps and goes on while the machine is suspended."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) // 1000


class Listener(Protocol):
    """Who takes part in the session dialogue; called in the session's thread, must not wait."""

    def connected(self, welcome: m.Welcome) -> None:
        """A session is up: all that was said before is forgotten on the other side."""

    def received(self, message: m.Message, at_us: int) -> None:
        """A message other than PING, PONG, CERT, GOAWAY and ERROR came, at this time of `clock_us`."""

    def disconnected(self) -> None:
        """The session is down; it is being made again."""


@dataclass(slots=True)
class _Live:
    """What holds while one connection of the session lives."""

    link: Link
    welcome: m.Welcome
    hashes: frozenset[bytes] = frozenset()
    counters: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    pong_at: float = field(default_factory=time.monotonic)


class Control:
    """Args:
    account: how to reach the proxy.

    Attributes:
        up: set while a session is up.
        rejected: the proxy's last word if it does not want us, None as soon as it does.
        round_trip: of the last ping in seconds, 0.0 before.
    """

    def __init__(self, account: Account) -> None:
        self.up = threading.Event()
        self.rejected: ProxyRejected | None = None
        self.round_trip = 0.0
        self._account = account
        self._live: _Live | None = None
        self._listeners: list[Listener] = []
        self._stopping = threading.Event()
        self._over = False
        self._news = threading.Condition()  # up, or over
        self._thread = threading.Thread(target=self._run, name=f"proxy session {account.instance}", daemon=True)
        self._thread.start()

    def listen(self, listener: Listener) -> None:
        """From the next session on; a session that is up already is told at once, in the caller's thread."""
        self._listeners.append(listener)
        live = self._live
        if live is not None:
            listener.connected(live.welcome)

    def wait_until_up(self, timeout: float | None) -> bool:
        """Whether a session is up within `timeout` seconds; none will be any more when the thread has ended."""
        with self._news:
            self._news.wait_for(lambda: self.up.is_set() or self._over, timeout)
            return self.up.is_set()

    def send(self, message: m.Message) -> bool:
        """Send a session message; False: no session is up."""
        live = self._live
        if live is None:
            return False
        try:
            live.link.send(frames.encode(message))
        except OSError:
            live.link.close()
            return False
        return True

    def one_flight(self, certificate: bytes) -> bytes | None:
        """CHANNEL_AUTH for a channel that showed this certificate; None: authenticate in full."""
        live = self._live
        if live is None or certificate not in live.hashes or not live.welcome.key:
            return None
        welcome = live.welcome
        counter = next(live.counters)
        return auth.channel_auth(welcome.key, certificate, live.link.version, welcome.key_id, counter)

    def stop(self) -> None:
        """Say BYE, and wait a moment for the proxy to close: a close with unread bytes is a reset, and a reset may
        overtake BYE. The thread ends, at the latest when its attempt to connect does. A second time does nothing."""
        self._stopping.set()
        live = self._live
        if live is not None:
            self.send(s.Bye(live.welcome.incarnation))
            self._thread.join(_LEAVE_TIMEOUT)
            live.link.close()
        self._thread.join(_LEAVE_TIMEOUT)

    def _run(self) -> None:
        try:
            self._keep_up()
        finally:
            with self._news:
                self._over = True
                self._news.notify_all()

    def _keep_up(self) -> None:
        delay = 0.0
        while not self._stopping.wait(delay):
            began, least = time.monotonic(), 0.0
            try:
                self._serve()
            except ProxyRejected as error:
                self.rejected = error
                if error.code == "name_in_use":
                    return
                least = error.retry_after if error.retry else _DELAY_AFTER_REJECTION
            except (OSError, PeerError):
                pass
            if time.monotonic() - began >= _STEADY:
                delay = 0.0
            else:
                delay = min(max(delay * 2, _SHORTEST_DELAY), _LONGEST_DELAY) * random.uniform(0.8, 1.2)
            delay = max(delay, least)

    def _serve(self) -> None:
        """One connection, from the first byte to the last.

        Raises:
            ProxyRejected, OSError, PeerError: why it ended; returns when the proxy just closed it.
        """
        link = Link(self._account)
        try:
            live = _Live(link, link.authenticate(m.Kind.SESSION))
            self._live, self.rejected = live, None
            with self._news:
                self.up.set()
                self._news.notify_all()
            for listener in list(self._listeners):
                listener.connected(live.welcome)
            if not self._stopping.is_set():
                self._converse(live)
        finally:
            link.close()
            self.up.clear()
            if self._live is not None:
                self._live = None
                for listener in list(self._listeners):
                    listener.disconnected()

    def _converse(self, live: _Live) -> None:
        ping_due = 0.0
        while not self._stopping.is_set():
            now = time.monotonic()
            if now >= ping_due:
                live.link.send(frames.encode(s.Ping(live.welcome.incarnation, clock_us())))
                ping_due = now + PING_EVERY
            if now - live.pong_at >= DEAD_AFTER:
                raise ConnectionResetError("no answer to a ping for 5 s")
            try:
                frame = live.link.next_frame(ping_due - now)
            except TimeoutError:
                continue
            if frame is None:
                return
            at_us = clock_us()
            message = frames.decode(frame, frames.SESSION_FROM_PROXY)
            if getattr(message, "incarnation", live.welcome.incarnation) == live.welcome.incarnation:
                self._take(live, message, at_us)
        while live.link.next_frame(_LEAVE_TIMEOUT) is not None:
            pass  # what crosses BYE

    def _take(self, live: _Live, message: m.Message, at_us: int) -> None:
        if isinstance(message, s.Ping):
            live.link.send(frames.encode(s.Pong(message.incarnation, message.t, max(0, clock_us() - at_us))))
        elif isinstance(message, s.Pong):
            live.pong_at = time.monotonic()
            self.round_trip = max(0, at_us - message.t - message.hold_us) / 1e6
        elif isinstance(message, s.Cert):
            live.hashes = frozenset(message.hashes)
        elif isinstance(message, m.Error):
            raise ProxyRejected(message)
        elif not isinstance(message, m.Goaway):  # it will close, and then we connect again: nothing to do yet
            for listener in list(self._listeners):
                listener.received(message, at_us)
