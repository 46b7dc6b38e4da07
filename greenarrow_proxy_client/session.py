"""`Session`: an MTA's standing with a proxy, or with several of which one is used, and the way to SMTP sessions."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import cast

import msgspec

from greenarrow_proxy_client.channel import Channel
from greenarrow_proxy_client.dialogue import Dialogue
from greenarrow_proxy_client.errors import ProxyRefused, ProxyRejected, ProxyUnavailable
from greenarrow_proxy_client.link import Account, tls_context
from greenarrow_proxy_client.proxies import Proxies, Proxy, ProxyState
from greenarrow_proxy_client.smtp import ProxiedSMTP
from greenarrow_proxy_client.stream import Stream
from greenarrow_proxy_client.throttle import Limits, Throttle
from proxy.errors import PeerError
from proxy.model import TlsMode
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m

Address = tuple[str, int]
#: Refusals that are about the proxy itself: another one may serve.
_NOT_NOW = {"draining", "overloaded"}


class Session:
    """Connects to the proxy in the background, and again whenever the connection is lost. Usable by many threads.

    Args:
        address: host (name or IP address) and port of the proxy's native listener; or several of them, the preferred
            one first, each another proxy. Then the first that answers is used, the next one when it is lost or says
            "not now", and it again when it has answered for a while (docs/library.md, "Several proxies").
        secret: the shared secret, the same for all proxies.
        instance: this MTA's name; no two that run at the same time may have the same.
        tls: as the proxy has it (`listen_tls`); there is no falling back from one to the other.
        timeout: seconds to connect and authenticate within.
        max_idle_channels: kept open for the next SMTP session, to each proxy.
        return_after: seconds that a better proxy must have answered before it is used again: once to twice as long,
            by luck; twice as long as before each time that it is lost after less than five minutes of use, up to five
            minutes.

    Raises:
        ValueError: a name that the protocol does not allow, no address, or one twice.
    """

    def __init__(
        self,
        address: Address | Sequence[Address],
        secret: str | bytes,
        instance: str,
        *,
        tls: bool = True,
        timeout: float = 10.0,
        max_idle_channels: int = 100,
        return_after: float = 5.0,
    ) -> None:
        if not 1 <= len(instance) <= 64 or any(c < " " or c == "\x7f" for c in instance):
            raise ValueError("an instance name has 1 to 64 characters and no control characters")
        addresses = _addresses(address)
        secret = secret.encode() if isinstance(secret, str) else secret
        run_id, context = os.urandom(16), tls_context() if tls else None
        accounts = [Account(each, secret, instance, run_id, timeout, context) for each in addresses]
        self._lock = threading.Lock()
        self._closed = False
        self._dialogue: Dialogue | None = None
        self._proxies = Proxies(accounts, max_idle_channels, return_after)

    # --- the session itself ---

    def wait_until_up(self, timeout: float | None = None) -> bool:
        """Whether the session is up within `timeout` seconds; no, at once, when it is closed or rejected for good.

        Nothing but throttles needs it: `smtp` and `connect` do without, only each new channel costs more then. (Of
        several proxies one must be up, and they wait for it by themselves.)
        """
        return self._proxies.wait_until_up(timeout)

    @property
    def rejected(self) -> ProxyRejected | None:
        """Why the proxy does not want this session at present, or None; of several, while none of them is up.
        "name_in_use" is for good."""
        return self._proxies.rejected

    @property
    def round_trip(self) -> float:
        """Seconds that the last ping to the proxy that is used took; 0.0 before the first."""
        return next((proxy.round_trip for proxy in self.proxies if proxy.in_use), 0.0)

    @property
    def proxies(self) -> list[ProxyState]:
        """How it stands with each proxy, in the order of preference: for an operator, who should know of a second one
        that would not answer before it is needed."""
        return self._proxies.states()

    def close(self) -> None:
        """Take leave of the proxy. SMTP sessions in progress are not touched. A second time does nothing."""
        with self._lock:
            self._closed = True
            dialogue, self._dialogue = self._dialogue, None
        if dialogue is not None:
            dialogue.stop()
        self._proxies.stop()
        for proxy in self._proxies.all:
            proxy.channels.close()

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
                self._dialogue = Dialogue(self._proxies)
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
        proxy, channel, opened = self._open(request, throttles)
        for throttle in throttles:
            throttle.count(1)

        def over(channel: Channel) -> None:
            for throttle in throttles:
                throttle.count(-1)
            proxy.channels.give_back(channel)

        return Stream(channel, opened, timeout, over, lambda channel: proxy.channels.open_fresh(channel, request))

    def _open(self, request: m.Open, throttles: Sequence[Throttle] = ()) -> tuple[Proxy, Channel, m.Opened]:
        """At the proxy that is used; at the next one, in the time that is left, when it is lost meanwhile or says "not
        now". Nothing has gone to a receiver then."""
        ends_at = time.monotonic() + request.deadline_ms / 1000
        for another in range(2 * len(self._proxies.all)):
            if another:
                left = max(1, int((ends_at - time.monotonic()) * 1000))
                request = msgspec.structs.replace(request, deadline_ms=left)
            proxy = self._proxies.in_use(ends_at)
            for throttle in throttles:
                throttle.wait_until_registered(request.deadline_ms / 1000)
            if self._closed:
                raise ProxyUnavailable("the session is closed")
            try:
                return proxy, *proxy.channels.open(request)
            except ProxyRefused as error:  # it did not know our throttles, or no longer
                failure: ProxyRefused | ProxyRejected | ProxyUnavailable = error
                again = error.code in _NOT_NOW and self._proxies.turn_away(proxy)
                again |= error.code == "unknown_path" and self._proxies.current is not proxy
            except (ProxyRejected, ProxyUnavailable) as error:
                failure = error
                again = self._proxies.turn_away(proxy)
            if not again:
                break
        raise failure


def _addresses(address: Address | Sequence[Address]) -> list[Address]:
    """One, or several: a pair of a host and a port is one.

    Raises:
        ValueError: none, or one twice.
    """
    if len(address) == 2 and isinstance(address[0], str):
        return [cast("Address", tuple(address))]
    if not address:
        raise ValueError("a session needs the address of a proxy")
    addresses = [(host, port) for host, port in cast("Sequence[Address]", address)]
    if len(set(addresses)) < len(addresses):
        raise ValueError("the address of a proxy is given twice")
    return addresses


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
