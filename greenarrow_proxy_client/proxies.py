"""The proxies of one session: one is used, the others stand by; who hears of it and who speaks through it.

With each of them a session is kept up (`control`), so that it is known beforehand who would answer, and a wrong secret
on the second proxy shows on the first day and not on the day when it is needed. Throttles are told to the one that is
used alone: `choice` says which. When that changes, for those who listen it is as if the proxy had been restarted: all
that was said is forgotten, and said again to the other. The one that was left is told BYE, so that nothing is kept for
us there.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from greenarrow_proxy_client.channels import Channels
from greenarrow_proxy_client.choice import Choice
from greenarrow_proxy_client.control import Control, Listener
from greenarrow_proxy_client.errors import ProxyRejected, ProxyUnavailable
from greenarrow_proxy_client.link import Account
from proxy.protocols.native import messages as m


@dataclass(frozen=True, slots=True)
class ProxyState:
    """How it stands with one proxy of a session.

    Attributes:
        address: as it was given to `Session`.
        up: a session with it stands. in_use: it is the one that is used.
        round_trip: seconds that the last ping took; 0.0 before the first.
        failure: what went wrong last, "" while it is up.
    """

    address: tuple[str, int]
    up: bool
    in_use: bool
    round_trip: float
    failure: str


class Proxy:
    """One of them; a `control.Watcher` of its own connection.

    Attributes:
        welcome: of the session that stands, else None.
        error: why the last attempt, or session, ended.
        again_at: when the next attempt begins; None: one is under way, or a session stands. over: there will be none.
    """

    def __init__(self, which: int, account: Account, max_idle_channels: int, proxies: Proxies) -> None:
        self.which = which
        self.account = account
        self.welcome: m.Welcome | None = None
        self.error: Exception | None = None
        self.again_at: float | None = None
        self.over = False
        self.control = Control(account, self)
        self.channels = Channels(account, self.control, max_idle_channels)
        self._proxies = proxies

    def connected(self, welcome: m.Welcome) -> None:
        with self._proxies.news:
            self.welcome, self.error = welcome, None
            self._proxies.choice.came(self.which, time.monotonic(), random.random())
            self._proxies.decide()

    def received(self, message: m.Message, at_us: int) -> None:
        with self._proxies.news:
            if self._proxies.current is self:
                self._proxies.tell(lambda listener: listener.received(message, at_us))

    def disconnected(self) -> None:
        with self._proxies.news:
            self.welcome = None
            self._proxies.choice.went(self.which, time.monotonic())
            self._proxies.decide()

    def trying(self) -> None:
        with self._proxies.news:
            self.again_at = None

    def failed(self, error: Exception | None, again: float | None) -> None:
        with self._proxies.news:
            now = time.monotonic()
            self.error, self.over = error or self.error, again is None
            self.again_at = now + (again or 0.0)
            self._proxies.choice.went(self.which, now)
            self._proxies.decide()

    def going_away(self) -> None:
        with self._proxies.news:
            self._proxies.choice.leaves(self.which, time.monotonic())
            self._proxies.decide()

    def beat(self) -> None:
        with self._proxies.news:
            self._proxies.decide()


class Proxies:
    """Args:
    accounts: how to reach each, the preferred one first.
    max_idle_channels: kept open to each.
    first_pause: see `choice`.

    Attributes:
        all: in the order of preference.
        current: the one that is used; None: none is up.
        news: held while any of this changes; notified afterwards.
    """

    def __init__(self, accounts: Sequence[Account], max_idle_channels: int, first_pause: float) -> None:
        self.news = threading.Condition(threading.RLock())
        self.choice = Choice(len(accounts), first_pause, time.monotonic())
        self.current: Proxy | None = None
        self.closed = False
        self._listeners: list[Listener] = []
        self.all = [Proxy(which, account, max_idle_channels, self) for which, account in enumerate(accounts)]
        for proxy in self.all:
            proxy.control.start()

    # --- who is used ---

    def in_use(self, ends_at: float) -> Proxy:
        """The one to open channels to, waited for until `ends_at` (of `time.monotonic`) while there is hope.

        A single one is always that: a channel needs no session, it only costs more without.

        Raises:
            ProxyUnavailable, ProxyRejected: none answers, or the session is closed.
        """
        with self.news:
            while not self.closed:
                if len(self.all) == 1:
                    return self.all[0]
                self.decide()
                if self.current is not None:
                    return self.current
                now = time.monotonic()
                if now >= ends_at or all(proxy.again_at is not None for proxy in self.all):
                    raise self._nobody(now)
                self.news.wait(min(ends_at, self.choice.look_again(now) or ends_at) - now)
        raise ProxyUnavailable("the session is closed")

    def turn_away(self, proxy: Proxy) -> bool:
        """It did not serve us though it seemed to be there; whether another one is used now."""
        with self.news:
            if self.current is proxy:
                self.choice.leaves(proxy.which, time.monotonic())
                self.decide()
            return self.current is not proxy and self.current is not None

    def wait_until_up(self, timeout: float | None) -> bool:
        """Whether one is used within `timeout` seconds; no, at once, when none ever will be."""
        with self.news:
            self.news.wait_for(lambda: self.current is not None or all(proxy.over for proxy in self.all), timeout)
            return self.current is not None

    @property
    def rejected(self) -> ProxyRejected | None:
        """Why the proxies do not want us, if none is up and one of them has said so."""
        if self.current is not None:
            return None
        return next((proxy.control.rejected for proxy in self.all if proxy.control.rejected is not None), None)

    def states(self) -> list[ProxyState]:
        with self.news:
            return [
                ProxyState(
                    proxy.account.address,
                    proxy.welcome is not None,
                    proxy is self.current,
                    proxy.control.round_trip,
                    "" if proxy.welcome is not None else str(proxy.error or ""),
                )
                for proxy in self.all
            ]

    def decide(self) -> None:
        """After any change; `news` is held."""
        which = self.choice.decide(time.monotonic())
        old, new = self.current, None if which is None else self.all[which]
        if new is not old:
            self.current = new
            if old is not None:
                self.tell(lambda listener: listener.disconnected())
            if new is not None and new.welcome is not None:
                welcome = new.welcome
                self.tell(lambda listener: listener.connected(welcome))
                if old is not None:
                    old.control.renew()
                    old.channels.abandon()
        self.news.notify_all()

    # --- what is said ---

    def listen(self, listener: Listener) -> None:
        """From the next session on; a session that is up already is told at once, in the caller's thread."""
        with self.news:
            self._listeners.append(listener)
            if self.current is not None and self.current.welcome is not None:
                listener.connected(self.current.welcome)

    def send(self, message: m.Message) -> bool:
        """Send a session message; False: no session is up."""
        proxy = self.current
        return proxy is not None and proxy.control.send(message)

    def tell(self, call: Callable[[Listener], None]) -> None:
        for listener in self._listeners:
            call(listener)

    # --- the end ---

    def stop(self) -> None:
        """Take leave of all; a second time does nothing."""
        with self.news:
            self.closed = True
            self.news.notify_all()
        for proxy in self.all:
            proxy.control.leave()
        for proxy in self.all:
            proxy.control.stop()

    def _nobody(self, now: float) -> ProxyRejected | ProxyUnavailable:
        """The failure to tell when none is up: the first one's word if all have rejected us."""
        errors = [proxy.error for proxy in self.all]
        if all(isinstance(error, ProxyRejected) for error in errors):
            rejections = [error for error in errors if isinstance(error, ProxyRejected)]
            return next((error for error in rejections if error.retry), rejections[0])
        failure = ProxyUnavailable("; ".join(str(error) for error in errors if error is not None) or "no proxy answers")
        moments = [proxy.again_at for proxy in self.all if proxy.again_at is not None and not proxy.over]
        failure.retry_after = max(0.0, min(moments, default=now) - now)
        return failure
