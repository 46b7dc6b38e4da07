"""A refusal where the client waits for an SMTP greeting: what a door says that has no reply of its own.

Always 421: every MTA defers on it and none bounces.
"""

from __future__ import annotations

from typing import Final

from proxy.errors import Draining, HandshakeTimeout, Overloaded, Refused, Throttled, UpstreamError

#: RFC 5321 section 4.5.3.1.5: a reply line, CRLF included.
_REPLY_MAX: Final = 512
#: RFC 3463 code of a refusal: the first class that fits. 4.4.1 is "no answer from host", 4.7.1 "not authorised".
_ENHANCED_CODES = (
    (UpstreamError, b"4.4.1"),
    (Throttled, b"4.4.5"),
    ((Overloaded, Draining), b"4.3.2"),
    (Refused, b"4.7.1"),
    (HandshakeTimeout, b"4.4.2"),
)
_OTHER_ERROR: Final = b"4.5.0"


def refusal(host_name: str, error: Exception) -> bytes:
    """One SMTP reply line, printable ASCII; what is not becomes a backslash escape, what is too long is cut."""
    code = next((code for kind, code in _ENHANCED_CODES if isinstance(error, kind)), _OTHER_ERROR)
    line = b"421 %b %b" % (code, f"{host_name} {error}".encode("unicode_escape"))
    return line[: _REPLY_MAX - 2] + b"\r\n"
