"""What can go wrong between an MTA and the proxy, sorted by what the MTA should do about it.

All are `OSError`, so that code written for `smtplib` and sockets treats them as a connection that did not come about.
"""

from __future__ import annotations

from proxy.protocols.native import messages as m


class ProxyFailure(OSError):
    """Base of all.

    Attributes:
        code: a word of docs/protocol.md section 9, or "unreachable".
        retry: whether the same may succeed later without anybody changing anything.
        retry_after: seconds until trying again makes sense, 0.0 where that is not known.
    """

    code = "failed"
    retry = True
    retry_after = 0.0

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(errno, message)

    def __str__(self) -> str:
        return str(self.strerror)


class ProxyUnavailable(ProxyFailure):
    """The proxy cannot be reached, or its connection broke: try later, or another proxy."""

    code = "unreachable"


class ProxyRejected(ProxyFailure):
    """The proxy does not want this client: wrong secret, no common version, name in use, going away."""

    def __init__(self, error: m.Error) -> None:
        super().__init__(error.message)
        self.code = error.code
        self.retry = error.retry
        self.retry_after = error.retry_after_ms / 1000


class ProxyRefused(ProxyFailure):
    """The proxy did not open the SMTP session.

    Attributes:
        step: "throttle", "bind", "connect", "greeting", "ehlo", "starttls" or "tls"; None: refused by policy, see code.
        errno: the proxy's error number (Linux), 0 where none applies.
        smtp_code, smtp_reply: what the receiver said, where that was the reason; else 0 and b"".
        throttle: name of the throttle that had no place, or None.
        tls_result: what was wrong with the receiver's TLS, in a word of RFC 8460 section 4.3, or "".
        attempts: for each destination that was tried, in order: (destination, step, errno, smtp_reply, message,
            tls_result).
    """

    def __init__(self, failed: m.Failed) -> None:
        super().__init__(failed.message, failed.errno)
        self.step = failed.step.value if failed.step else None
        self.code = failed.code
        self.retry = failed.retry
        self.retry_after = failed.retry_after_ms / 1000
        self.smtp_reply = failed.smtp_reply or b""
        self.smtp_code = int(self.smtp_reply[:3]) if self.smtp_reply[:3].isdigit() else 0
        self.throttle = failed.throttle
        self.tls_result = failed.tls_result
        self.attempts = [
            (
                attempt.destination.endpoint,
                attempt.step.value,
                attempt.errno,
                attempt.smtp_reply or b"",
                attempt.message,
                attempt.tls_result,
            )
            for attempt in failed.attempts
        ]
