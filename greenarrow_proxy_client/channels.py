"""The channels to one proxy: opened when they are needed, kept for the next SMTP session."""

from __future__ import annotations

import threading
import time

import msgspec

from greenarrow_proxy_client.channel import Channel, ChannelLost, State
from greenarrow_proxy_client.control import Control
from greenarrow_proxy_client.errors import ProxyFailure, ProxyRefused, ProxyRejected
from greenarrow_proxy_client.link import Account, Link, unavailable
from proxy.protocols.native import messages as m

#: A channel that was idle this long is closed.
_MAX_IDLE = 300.0


class Channels:
    """Usable by many threads.

    Args:
        account: how to reach the proxy.
        control: its session, which knows how a channel is authenticated in one flight.
        most: how many idle ones are kept.
    """

    def __init__(self, account: Account, control: Control, most: int) -> None:
        self._account = account
        self._control = control
        self._most = most
        self._idle: list[Channel] = []  # the last one used last, and taken first
        self._lock = threading.Lock()
        self._closed = False

    def open(self, request: m.Open) -> tuple[Channel, m.Opened]:
        """An SMTP session on an idle channel if one is alive, else on a new one.

        Raises:
            ProxyRefused, ProxyRejected, ProxyUnavailable.
        """
        while (channel := self._take_idle()) is not None:
            try:
                return channel, self._open_on(channel, request)
            except (ChannelLost, ProxyRejected):
                continue
        channel = self._dial()
        try:
            return channel, self._open_on(channel, request)
        except ProxyRejected as error:
            if error.code != "stale_key":
                raise
        except ChannelLost as error:
            raise unavailable(self._account, error) from None
        channel = self._dial(in_full=True)
        try:
            return channel, self._open_on(channel, request)
        except ChannelLost as error:
            raise unavailable(self._account, error) from None

    def open_fresh(self, channel: Channel, request: m.Open) -> m.Opened:
        """For `Stream`: never a shared connection a second time. The channel stays the stream's."""
        fresh = msgspec.structs.replace(request, fresh=True)
        channel.limit_sending(self._account.timeout)
        try:
            return channel.open(fresh)
        except (ChannelLost, TimeoutError) as error:
            raise unavailable(self._account, error) from None

    def give_back(self, channel: Channel) -> None:
        """A channel whose SMTP session is over: kept for the next one if it is of use."""
        now = time.monotonic()
        with self._lock:
            surplus = []
            while self._idle and now - self._idle[0].used_at > _MAX_IDLE:
                surplus.append(self._idle.pop(0))
            keep = not self._closed and channel.state in (State.IDLE, State.ENDING) and not channel.going_away
            if keep and len(self._idle) < self._most:
                channel.used_at = now
                self._idle.append(channel)
            else:
                surplus.append(channel)
        for each in surplus:
            each.retire()

    def abandon(self) -> None:
        """Close those that are idle now: another proxy is used. Does not wait."""
        for channel in self._take_all():
            channel.close()

    def close(self) -> None:
        """Keep none any more. SMTP sessions in progress are not touched."""
        self._closed = True
        for channel in self._take_all():
            channel.retire()

    def _open_on(self, channel: Channel, request: m.Open) -> m.Opened:
        """As `Channel.open`; a channel that only could not serve this request goes back."""
        channel.limit_sending(self._account.timeout)
        try:
            return channel.open(request)
        except ProxyRefused:
            self.give_back(channel)
            raise
        except ProxyFailure:
            raise
        except TimeoutError as error:
            raise unavailable(self._account, error) from None

    def _dial(self, in_full: bool = False) -> Channel:
        """A new channel. One that is not authenticated yet will be with its first OPEN.

        Raises:
            ProxyUnavailable, ProxyRejected.
        """
        rejected = self._control.rejected
        if rejected is not None and rejected.code == "name_in_use":
            raise rejected
        link = Link(self._account)
        flight = None if in_full else self._control.one_flight(link.certificate)
        if flight is None:
            link.authenticate(m.Kind.CHANNEL)
        return Channel(link, flight or b"")

    def _take_all(self) -> list[Channel]:
        with self._lock:
            idle, self._idle = self._idle, []
        return idle

    def _take_idle(self) -> Channel | None:
        with self._lock:
            return self._idle.pop() if self._idle else None
