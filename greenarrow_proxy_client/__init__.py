"""The MTA's side of the native protocol: blocking sockets and threads, for any Python MTA, also under gevent.

`Session` is the way in. This package needs the native protocol's codec and the standard library, and nothing else of
the proxy; docs/protocol.md describes what goes over the wire.
"""

from greenarrow_proxy_client.errors import ProxyFailure, ProxyRefused, ProxyRejected, ProxyUnavailable
from greenarrow_proxy_client.proxies import ProxyState
from greenarrow_proxy_client.session import Session
from greenarrow_proxy_client.smtp import MailLimitReached, ProxiedSMTP
from greenarrow_proxy_client.stream import Stream
from greenarrow_proxy_client.throttle import Limits, Permit, PermitExpired, Throttle, ThrottleRejected, ThrottleTimeout

__all__ = [
    "Limits",
    "MailLimitReached",
    "Permit",
    "PermitExpired",
    "ProxiedSMTP",
    "ProxyFailure",
    "ProxyRefused",
    "ProxyRejected",
    "ProxyState",
    "ProxyUnavailable",
    "Session",
    "Stream",
    "Throttle",
    "ThrottleRejected",
    "ThrottleTimeout",
]
