"""Every outcome that is not success, sorted by who must act.

- `PeerError`: the client sent bytes that its protocol does not allow; the client's author must act.
- `Refused`: the request was understood and is against policy, or has to wait; its administrator must act, or time.
- `UpstreamError`: the network or the receiving side failed, with the step and the errno.
- `ConfigError`: the operator of this proxy must act.

A class carries what every protocol needs to tell its outcome: `code` (a stable word for logs, metrics and the native
protocol), `socks_reply` (RFC 1928 section 6) and `retry` (whether the same request may succeed later). What happened is
one English sentence, without a secret and without a line break. Nothing here formats for a protocol: each does that
itself.
"""

from __future__ import annotations

import enum
import errno as _errno
from collections.abc import Iterator
from typing import ClassVar


class Step(enum.StrEnum):
    """The step of an outgoing connection that failed (native protocol: FAILED.step)."""

    THROTTLE = "throttle"
    BIND = "bind"
    CONNECT = "connect"
    GREETING = "greeting"
    EHLO = "ehlo"
    STARTTLS = "starttls"
    TLS = "tls"


class ProxyError(Exception):
    """Base of all outcomes; `str(error)` is the sentence for humans."""

    code: ClassVar[str] = "error"
    socks_reply: int = 0x01
    retry: ClassVar[bool] = False


def every(base: type[ProxyError]) -> Iterator[type[ProxyError]]:
    """The kinds of outcome below `base` that have a code of their own."""
    for kind in base.__subclasses__():
        if "code" in vars(kind):
            yield kind
        yield from every(kind)


def let_go(error: BaseException) -> None:
    """Forget the way that an error came, once it was told and written. To be called where it ends.

    It refers to the frames on its way, and their variables often to it: all that they refer to would be there until the
    garbage collector comes.
    """
    before: BaseException | None = error
    while before is not None:
        before.__traceback__ = None
        before = before.__context__


class PeerError(ProxyError):
    """The peer broke its protocol: malformed, too long, out of order, or a feature that we do not have."""

    code = "bad_protocol"


class CommandNotSupported(PeerError):
    """A SOCKS command other than CONNECT and BIND, or one in the wrong place."""

    code = "command_not_supported"
    socks_reply = 0x07


class AddressTypeNotSupported(PeerError):
    """A domain name (this proxy does not resolve names) or an unknown address type."""

    code = "address_type_not_supported"
    socks_reply = 0x08


class VersionMismatch(PeerError):
    """No version of the native protocol that both sides speak."""

    code = "version_mismatch"


class HandshakeTimeout(PeerError):
    """The client did not finish its handshake within `auth_timeout`."""

    code = "handshake_timeout"


class Refused(ProxyError):
    """Policy says no; `socks_reply` 0x02 is "connection not allowed by ruleset"."""

    code = "refused"
    socks_reply = 0x02


class ClientNotAllowed(Refused):
    """The client's address is not in `allow_from`."""

    code = "client_not_allowed"


class BadCredentials(Refused):
    """Unknown instance or wrong secret: one answer for both, so that nobody learns which."""

    code = "bad_credentials"


class StaleKey(Refused):
    """A channel's key, counter or proof is not (or no longer) good: authenticate in full."""

    code = "stale_key"
    retry = True


class NameInUse(Refused):
    """A newer run of the same instance name has taken over; this one stays refused."""

    code = "name_in_use"


class SourceNotAllowed(Refused):
    """The source address is not in `source_ip` (of the proxy or of the instance)."""

    code = "source_not_allowed"


class DestinationNotAllowed(Refused):
    """The destination is in a denied range, is this proxy itself, or its port is not in `destination_port`."""

    code = "destination_not_allowed"


class BadServerName(Refused):
    """An OPEN's `tls_server_name` is neither a host name nor an IP address: no certificate could prove it."""

    code = "bad_server_name"


class BadCiphers(Refused):
    """An OPEN's `tls_ciphers` are none that OpenSSL knows."""

    code = "bad_ciphers"


class UnknownPath(Refused):
    """An OPEN names a throttle path that the run has not registered, or the run has no session now."""

    code = "unknown_path"
    retry = True


class FamilyMismatch(Refused):
    """Source and destination are not both IPv4 or both IPv6."""

    code = "family_mismatch"
    socks_reply = 0x08


class Overloaded(Refused):
    """`max_connections` is reached, the proxy is out of descriptors, or an address has failed too often.

    Args:
        retry_after: seconds until asking again makes sense; 0: not known.
    """

    code = "overloaded"
    retry = True

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(Refused):
    """The proxy is shutting down."""

    code = "draining"
    retry = True


class Throttled(Refused):
    """A throttle leaves no place or slot in time.

    Args:
        message: the sentence.
        throttle: the throttle's name, as the operator or the instance gave it.
        retry_after: seconds until asking again makes sense.
    """

    code = "throttled"
    retry = True

    def __init__(self, message: str, throttle: str, retry_after: float) -> None:
        super().__init__(message)
        self.throttle = throttle
        self.retry_after = retry_after


class Replaced(ProxyError):
    """A session of the same run has come in the place of this one."""

    code = "replaced"


class NoPong(ProxyError):
    """A session's client has answered no ping for too long."""

    code = "no_pong"
    retry = True


class IdleTooLong(ProxyError):
    """A channel that nobody used for `idle_timeout`."""

    code = "idle_timeout"
    retry = True


#: How a connection ends that did nothing wrong: told to its client, and not counted as refused.
GOODBYES = (Replaced, NoPong, IdleTooLong, Draining)

#: errno → RFC 1928 reply; everything else is 0x01, general failure. The one such map of the program.
_SOCKS_REPLY_OF_ERRNO = {
    _errno.ENETUNREACH: 0x03,
    _errno.ENETDOWN: 0x03,
    _errno.EAFNOSUPPORT: 0x03,  # this machine knows no IPv6 at all
    _errno.EHOSTUNREACH: 0x04,
    _errno.EHOSTDOWN: 0x04,
    _errno.ECONNREFUSED: 0x05,
    _errno.ETIMEDOUT: 0x06,
    _errno.EACCES: 0x02,
    _errno.EPERM: 0x02,
}


#: RFC 8460 section 4.3.
_TLS_RESULT_OF_STEP = {Step.STARTTLS: "starttls-not-supported", Step.TLS: "validation-failure"}


class UpstreamError(ProxyError):
    """An outgoing connection failed.

    Args:
        message: the sentence; names the addresses.
        step: which step failed.
        errno: the operating system's number, or 0 where none applies (an SMTP reply, a TLS alert).
        smtp_reply: the receiver's reply as it sent it (code and text), where one was the reason.
        reason: what failed, without the addresses; the message, where nothing else is known.
        tls_result: what was wrong with the receiver's TLS, in a word of RFC 8460 section 4.3; empty: it was not that.
    """

    code = "upstream_failed"
    retry = True

    def __init__(
        self,
        message: str,
        step: Step,
        errno: int = 0,
        smtp_reply: str | None = None,
        reason: str = "",
        tls_result: str = "",
    ) -> None:
        super().__init__(message)
        self.reason = reason or message
        self.step = step
        self.errno = errno
        self.smtp_reply = smtp_reply
        self.tls_result = tls_result or _TLS_RESULT_OF_STEP.get(step, "")
        # A source address that is not on this machine is a general failure, whatever its errno.
        self.socks_reply = 0x01 if step is Step.BIND else _SOCKS_REPLY_OF_ERRNO.get(errno, 0x01)


class ViaUnavailable(ProxyError):
    """An agent's proxy (`via`) cannot be reached, or has trouble of its own: not now, for whatever message it was."""

    code = "via_unavailable"
    retry = True


class SourceMissing(UpstreamError):
    """The source address is allowed, and not on this machine: its administrator must act.

    Attributes:
        source: the address.
    """

    def __init__(self, source: str) -> None:
        super().__init__(f"bind {source}: not an address of this machine", Step.BIND, _errno.EADDRNOTAVAIL)
        self.source = source


class NoPlaintext(OSError):
    """The peer sends TLS's own messages for ever, and nothing in them."""

    def __init__(self) -> None:
        super().__init__(_errno.EPROTO, "too much TLS without a byte of content")


class Mistake(Exception):
    """Why a request on the control socket is none; `code` as in `control.commands.Answer`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ConfigError(ProxyError):
    """A mistake in the configuration, located.

    Args:
        message: what is wrong with which value, and what would be valid; never the value of a secret.
        file: configuration file, or "command line" / "environment".
        line: line in that file, 0 where there is none.
    """

    code = "bad_configuration"

    def __init__(self, message: str, file: str = "", line: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.line = line

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.line else f"{self.file}: " if self.file else ""
        return where + self.message


class UsageError(ConfigError):
    """A command line that cannot be understood: an unknown flag, or a flag without its value."""

    code = "bad_usage"
