"""The session's own connection to one proxy: kept up by a thread, answered and asked pings, handed to who watches.

It knows nothing of SMTP. What it gives to the channels is the one-flight authentication; what is said about throttles
goes through `proxies`, which knows which of several proxies is meant.
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
#: After another session of this run has taken the place of this one: of two addresses of one proxy, which a list should
#: not have, one is left alone.
_DELAY_AFTER_REPLACED = 3600.0
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


class Watcher(Listener, Protocol):
    """A listener who also wants to know how the connection fares."""

    def trying(self) -> None:
        """An attempt to connect begins."""

    def failed(self, error: Exception | None, again: float | None) -> None:
        """The attempt or the session is over; the next attempt is in `again` seconds, None: never."""

    def going_away(self) -> None:
        """The proxy says that it shuts down. The session stands until it closes."""

    def beat(self) -> None:
        """The session stands, and a ping was sent."""


@dataclass(slots=True)
class _Live:
    """What holds while one connection of the session lives."""

    link: Link
    welcome: m.Welcome
    hashes: frozenset[bytes] = frozenset()
    leaving: bool = False
    bye_said: bool = False
    counters: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    pong_at: float = field(default_factory=time.monotonic)


class Control:
    """Args:
    account: how to reach the proxy.
    watcher: hears all that happens, in the session's thread, and must not wait.

    Attributes:
        rejected: the proxy's last word if it does not want us, None as soon as it does.
        round_trip: of the last ping in seconds, 0.0 before.
    """

    def __init__(self, account: Account, watcher: Watcher) -> None:
        self.rejected: ProxyRejected | None = None
        self.round_trip = 0.0
        self._account = account
        self._watcher = watcher
        self._live: _Live | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"proxy session {account.instance}", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def send(self, message: m.Message) -> bool:
        """Send a session message; False: no session is up."""
        live = self._live
        if live is None or live.leaving:
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
        if live is None or live.leaving or certificate not in live.hashes or not live.welcome.key:
            return None
        welcome = live.welcome
        counter = next(live.counters)
        return auth.channel_auth(welcome.key, certificate, live.link.version, welcome.key_id, counter)

    def renew(self) -> None:
        """Say BYE, so that nothing which this session registered is left over, and connect again; does not wait."""
        live = self._live
        if live is not None:
            live.leaving = True
            if not live.link.unsent:  # else the session's thread does it
                self._say_bye(live)

    def leave(self) -> None:
        """Say BYE, and do not connect again."""
        self._stopping.set()
        live = self._live
        if live is not None:
            live.leaving = True
            self._say_bye(live)

    def stop(self) -> None:
        """As `leave`, and wait a moment for the proxy to close: a close with unread bytes is a reset, and a reset may
        overtake BYE. The thread ends, at the latest when its attempt to connect does. A second time does nothing."""
        self.leave()
        live = self._live
        if live is not None:
            self._thread.join(_LEAVE_TIMEOUT)
            live.link.close()
        self._thread.join(_LEAVE_TIMEOUT)

    def _run(self) -> None:
        error: Exception | None = None
        try:
            error = self._keep_up()
        finally:
            self._watcher.failed(error, None)

    def _keep_up(self) -> Exception | None:
        """Until `stop`, or until the proxy does not want us for good: why."""
        delay = 0.0
        while not self._stopping.wait(delay):
            began, least = time.monotonic(), 0.0
            failure: Exception | None = None
            self._watcher.trying()
            try:
                self._serve()
            except ProxyRejected as error:
                self.rejected = failure = error
                if error.code == "name_in_use":
                    return error
                least = _pause_after(error)
            except (OSError, PeerError) as error:
                failure = error
            if time.monotonic() - began >= _STEADY:
                delay = 0.0
            else:
                delay = min(max(delay * 2, _SHORTEST_DELAY), _LONGEST_DELAY) * random.uniform(0.8, 1.2)
            delay = max(delay, least)
            self._watcher.failed(failure, delay)
        return None

    def _serve(self) -> None:
        """One connection, from the first byte to the last.

        Raises:
            ProxyRejected, OSError, PeerError: why it ended; returns when the proxy just closed it.
        """
        link = Link(self._account)
        try:
            live = _Live(link, link.authenticate(m.Kind.SESSION))
            self._live, self.rejected = live, None
            self._watcher.connected(live.welcome)
            if not self._stopping.is_set():
                self._converse(live)
        finally:
            link.close()
            if self._live is not None:
                self._live = None
                self._watcher.disconnected()

    def _converse(self, live: _Live) -> None:
        ping_due = 0.0
        while not live.leaving:
            now = time.monotonic()
            if now >= ping_due:
                live.link.send(frames.encode(s.Ping(live.welcome.incarnation, clock_us())))
                ping_due = now + PING_EVERY
                self._watcher.beat()
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
        self._say_bye(live)
        while live.link.next_frame(_LEAVE_TIMEOUT) is not None:
            pass  # what crosses BYE

    def _say_bye(self, live: _Live) -> None:
        if not live.bye_said:
            live.bye_said = True
            try:
                live.link.send(frames.encode(s.Bye(live.welcome.incarnation)))
            except OSError:
                live.link.close()

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
        elif isinstance(message, m.Goaway):
            self._watcher.going_away()
        else:
            self._watcher.received(message, at_us)


def _pause_after(error: ProxyRejected) -> float:
    """Seconds at least to the next attempt."""
    if error.code == "replaced":
        return _DELAY_AFTER_REPLACED
    return error.retry_after if error.retry else _DELAY_AFTER_REJECTION
