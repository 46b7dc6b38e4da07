"""`Session`: an MTA's standing with one proxy, and the way to open SMTP sessions through it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import msgspec

from greenarrow_proxy_client.channel import Channel, ChannelLost, State
from greenarrow_proxy_client.control import Control
from greenarrow_proxy_client.dialogue import Dialogue
from greenarrow_proxy_client.errors import ProxyFailure, ProxyRefused, ProxyRejected, ProxyUnavailable
from greenarrow_proxy_client.link import Account, Link, tls_context, unavailable
from greenarrow_proxy_client.smtp import ProxiedSMTP
from greenarrow_proxy_client.stream import Stream
from greenarrow_proxy_client.throttle import Limits, Throttle
from proxy.errors import PeerError
from proxy.model import TlsMode
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m

#: A channel that was idle this long is closed.
_MAX_IDLE = 300.0


class Session:
    """Connects to the proxy in the background, and again whenever the connection is lost. Usable by many threads.

    Args:
        address: host (name or IP address) and port of the proxy's native listener.
        secret: the shared secret.
        instance: this MTA's name; no two that run at the same time may have the same.
        tls: as the proxy has it (`listen_tls`); there is no falling back from one to the other.
        timeout: seconds to connect and authenticate within.
        max_idle_channels: kept open for the next SMTP session.

    Raises:
        ValueError: a name that the protocol does not allow.
    """

    def __init__(
        self,
        address: tuple[str, int],
        secret: str | bytes,
        instance: str,
        *,
        tls: bool = True,
        timeout: float = 10.0,
        max_idle_channels: int = 100,
    ) -> None:
        if not 1 <= len(instance) <= 64 or any(c < " " or c == "\x7f" for c in instance):
            raise ValueError("an instance name has 1 to 64 characters and no control characters")
        self._account = Account(
            address,
            secret.encode() if isinstance(secret, str) else secret,
            instance,
            os.urandom(16),
            timeout,
            tls_context() if tls else None,
        )
        self._max_idle_channels = max_idle_channels
        self._idle: list[Channel] = []  # the last one used last, and taken first
        self._lock = threading.Lock()
        self._closed = False
        self._control = Control(self._account)
        self._dialogue: Dialogue | None = None

    # --- the session itself ---

    def wait_until_up(self, timeout: float | None = None) -> bool:
        """Whether the session is up within `timeout` seconds; no, at once, when it is closed or rejected for good.

        Nothing but throttles needs it: `smtp` and `connect` do without, only each new channel costs more then.
        """
        return self._control.wait_until_up(timeout)

    @property
    def rejected(self) -> ProxyRejected | None:
        """Why the proxy does not want this session at present, or None. "name_in_use" is for good."""
        return self._control.rejected

    @property
    def round_trip(self) -> float:
        """Seconds that the last ping took; 0.0 before the first."""
        return self._control.round_trip

    def close(self) -> None:
        """Take leave of the proxy. SMTP sessions in progress are not touched. A second time does nothing."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            dialogue, self._dialogue = self._dialogue, None
        if dialogue is not None:
            dialogue.stop()
        self._control.stop()
        for channel in idle:
            channel.retire()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- throttles ---

    def throttle(
        self,
        source_ip: str | None,
        *limits: Limits,
        source: str | None = None,
        mx: str | None = None,
        domain: str | None = None,
    ) -> Throttle:
        """The throttle, or the several throttles, that one kind of message passes.

        Args:
            source_ip: address of the proxy's machine that the messages leave from.
            limits: what this instance has configured; the proxy reconciles it with what others have.
            source: instead of `source_ip` (None), the name of a source that the proxy's configuration has.
            mx, domain: the MX host's name and the recipient domain of all its connections, for the proxy's own limits
                by these; `smtp` may say others.

        Raises:
            ValueError: a name or figure that the protocol does not allow.
        """
        return self._speaker().throttle(source_ip, limits, source, mx, domain)

    def change_limits(self, throttle: Throttle, *limits: Limits) -> None:
        """Other limits for the same throttles, in force when the proxy has answered.

        Raises:
            ValueError: as `throttle`, or other names than before.
        """
        if [each.name for each in limits] != [each.name for each in throttle.limits]:
            raise ValueError("the names of a throttle do not change; make a new one")
        self._speaker().change(throttle, limits)

    def _speaker(self) -> Dialogue:
        with self._lock:
            if self._closed:
                raise ProxyUnavailable("the session is closed")
            if self._dialogue is None:
                self._dialogue = Dialogue(self._control)
            return self._dialogue

    # --- SMTP sessions ---

    def smtp(
        self,
        destinations: Sequence[tuple[str, int]],
        ehlo_name: str,
        *,
        source_ip: str | None = None,
        source: str | None = None,
        tls: str = "opportunistic",
        tls_server_name: str | None = None,
        tls_verify: bool = False,
        tls_names: Sequence[str] = (),
        tlsa: Sequence[tuple[int, int, int, bytes]] = (),
        tls_min: m.TlsMinimum = "",
        tls_ciphers: str = "",
        reuse: bool = True,
        smtputf8: bool = False,
        requiretls: bool = False,
        tenant: str | None = None,
        mx: str | None = None,
        domain: str | None = None,
        throttles: Sequence[Throttle] = (),
        deadline: float = 50.0,
        timeout: float | None = 300.0,
    ) -> ProxiedSMTP:
        """An SMTP connection past EHLO and TLS, fresh or shared.

        Args:
            destinations: IP addresses and ports, tried in this order.
            ehlo_name: this MTA's name for EHLO.
            source_ip: address of the proxy's machine to leave from; None: the proxy's default.
            source: instead, the name of a source that the proxy's configuration has.
            tls: "none", "opportunistic", "required" (STARTTLS) or "implicit"; it ends at the proxy.
            tls_server_name: for SNI and verification: a host name, U-labels too, or an IP address.
            tls_verify: fail unless the receiver's certificate is valid for that name.
            tls_names: fail unless an authority has signed it for one of these names (MTA-STS: the name of the MX).
            tlsa: the receiver's TLSA records, from a secure DNS answer: (usage, selector, matching type, data). TLS is
                required then, and fails unless one of them fits; names are compared where RFC 7672 wants it.
            tls_min: the oldest version, "TLSv1.2" or "TLSv1.3". tls_ciphers: OpenSSL's words for TLS 1.2's.
            reuse: take a shared connection if there is one, and be able to `release` this one.
            smtputf8, requiretls, tenant: shared only with connections opened with the same.
            mx, domain: the MX host's name and the recipient domain, for the proxy's own limits by these; None: the
                throttles'.
            throttles: those whose connections this one is among; `source_ip` or `source` is theirs if not given. The
                proxy waits for a place under each.
            deadline: seconds until the proxy answers, waiting for throttles included.
            timeout: seconds that a reply may take, as for `smtplib.SMTP`.

        Raises:
            ProxyRefused: the proxy or the receiver did not let us, with the step and the reason.
            ProxyRejected, ProxyUnavailable: no channel to the proxy.
            ValueError: not an IP address, or another value that the protocol does not allow.
        """
        source_ip, source = _leaving(source_ip, source, throttles)
        request = m.Open(
            source_ip,
            [m.Address(host, port) for host, port in destinations],
            ehlo_name,
            TlsMode(tls),
            tls_server_name,
            tls_verify,
            reuse,
            [throttle.id for throttle in throttles],
            int(deadline * 1000),
            smtputf8,
            requiretls,
            tenant,
            source=source,
            mx=mx,
            domain=domain,
            tls_names=list(tls_names),
            tlsa=[m.TlsaRecord(*record) for record in tlsa],
            tls_min=tls_min,
            tls_ciphers=tls_ciphers,
            probes=True,
        )
        return ProxiedSMTP(self._stream(request, timeout, throttles), ehlo_name, reuse, throttles)

    def connect(
        self,
        destinations: Sequence[tuple[str, int]],
        *,
        source_ip: str | None = None,
        throttles: Sequence[Throttle] = (),
        deadline: float = 50.0,
        timeout: float | None = 300.0,
    ) -> Stream:
        """A raw connection; the proxy stays out of the dialogue. Arguments and errors as for `smtp`."""
        source_ip, source = _leaving(source_ip, None, throttles)
        request = m.Open(
            source_ip,
            [m.Address(host, port) for host, port in destinations],
            throttles=[throttle.id for throttle in throttles],
            deadline_ms=int(deadline * 1000),
            source=source,
            probes=True,
        )
        return self._stream(request, timeout, throttles)

    # --- channels ---

    def _stream(self, request: m.Open, timeout: float | None, throttles: Sequence[Throttle]) -> Stream:
        _validate(request)
        for throttle in throttles:
            throttle.wait_until_registered(request.deadline_ms / 1000)
        if self._closed:
            raise ProxyUnavailable("the session is closed")
        channel, opened = self._open(request)
        for throttle in throttles:
            throttle.count(1)

        def over(channel: Channel) -> None:
            for throttle in throttles:
                throttle.count(-1)
            self._give_back(channel)

        return Stream(channel, opened, timeout, over, lambda channel: self._open_fresh(channel, request))

    def _open(self, request: m.Open) -> tuple[Channel, m.Opened]:
        """On an idle channel if one is alive, else on a new one."""
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

    def _open_on(self, channel: Channel, request: m.Open) -> m.Opened:
        """As `Channel.open`; a channel that only could not serve this request goes back."""
        channel.limit_sending(self._account.timeout)
        try:
            return channel.open(request)
        except ProxyRefused:
            self._give_back(channel)
            raise
        except ProxyFailure:
            raise
        except TimeoutError as error:
            raise unavailable(self._account, error) from None

    def _open_fresh(self, channel: Channel, request: m.Open) -> m.Opened:
        """For `Stream`: never a shared connection a second time. The channel stays the stream's."""
        fresh = msgspec.structs.replace(request, fresh=True)
        channel.limit_sending(self._account.timeout)
        try:
            return channel.open(fresh)
        except (ChannelLost, TimeoutError) as error:
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

    def _take_idle(self) -> Channel | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _give_back(self, channel: Channel) -> None:
        """A channel whose SMTP session is over: kept for the next one if it is of use."""
        now = time.monotonic()
        with self._lock:
            surplus = []
            while self._idle and now - self._idle[0].used_at > _MAX_IDLE:
                surplus.append(self._idle.pop(0))
            keep = not self._closed and channel.state in (State.IDLE, State.ENDING) and not channel.going_away
            if keep and len(self._idle) < self._max_idle_channels:
                channel.used_at = now
                self._idle.append(channel)
            else:
                surplus.append(channel)
        for each in surplus:
            each.retire()


def _leaving(source_ip: str | None, source: str | None, throttles: Sequence[Throttle]) -> tuple[str | None, str | None]:
    """Address and name to leave from, one of them or none: what is said, else the throttles'."""
    if source_ip is None and source is None and throttles:
        return throttles[0].source_ip, throttles[0].source
    return source_ip, source


def _validate(request: m.Open) -> None:
    """Find here what the proxy would have to end the channel for.

    Raises:
        ValueError: names the field.
    """
    frame = frames.encode(request)
    try:
        frames.decode((request.TYPE, frame[frames.HEADER :]), frames.CHANNEL_FROM_CLIENT)
    except PeerError as error:
        raise ValueError(str(error)) from None
