"""What the proxy says by itself to a client of mode smtp, as bytes.

The codes follow RFC 5321 and RFC 3463. 421 is said only where the connection ends; what is only "not now" is 451, and
only as the answer to MAIL: there an MTA lets one message wait, not all mail for the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from proxy.errors import ProxyError, Step, Throttled, UpstreamError

OK = b"250 2.0.0 OK\r\n"
GO_AHEAD = b"220 2.0.0 ready to start TLS\r\n"
NO_HELLO = b"503 5.5.1 say EHLO first\r\n"
NO_MAIL = b"503 5.5.1 no message was begun\r\n"
NESTED_MAIL = b"503 5.5.1 a message is in progress\r\n"
NO_STARTTLS = b"502 5.5.1 STARTTLS is not offered\r\n"
NO_BDAT = b"503 5.5.1 BDAT is not offered\r\n"
NO_REQUIRETLS = b"555 5.5.4 REQUIRETLS is not offered\r\n"
BAD_NAME = b"501 5.5.4 that is no name\r\n"
BAD_LINE = b"500 5.5.2 that is no command\r\n"


def lines(code: int, texts: Sequence[str]) -> bytes:
    """One reply of several lines."""
    if not texts:
        return b""
    between, last = f"\r\n{code}-", f"{code} {texts[-1]}\r\n"
    text = f"{code}-{between.join(texts[:-1])}\r\n{last}" if len(texts) > 1 else last
    return text.encode("utf-8", "backslashreplace")


def again(reply: str) -> bytes:
    """A receiver's reply (`str(Reply)`: code, then texts joined by LF) as it was on the wire."""
    code, _, text = reply.partition(" ")
    return lines(int(code), text.split("\n"))


def closing(host: str) -> bytes:
    """To QUIT."""
    return f"221 2.0.0 {host} closing\r\n".encode()


def over(host: str, code: str, why: str) -> bytes:
    """The last reply of a connection that ends; `code` is RFC 3463's."""
    text = "".join(character if character.isprintable() else "?" for character in why)
    return f"421 {code} {host} {text[:400]}\r\n".encode("utf-8", "backslashreplace")


def throttled(error: Throttled) -> bytes:
    """Not now: to MAIL."""
    name = "".join(character if "!" <= character <= "~" else "?" for character in error.throttle)[:64]
    return f"451 4.7.1 throttle {name}: again in {max(1, math.ceil(error.retry_after))} s\r\n".encode()


def failure(error: ProxyError, host: str) -> tuple[bytes, bool]:
    """No connection to the receiver: the reply, and whether it is the last one.

    What the receiver said to the greeting or EHLO is passed on as it is. TLS that is required and not to be had ends
    the connection: Exim answers another refusal of EHLO with HELO, and would go on in clear.
    """
    if isinstance(error, Throttled):
        return throttled(error), False
    if not isinstance(error, UpstreamError):
        return over(host, "4.3.2" if error.retry else "4.7.0", str(error)), True
    if error.smtp_reply is not None and error.step is Step.GREETING:
        return again(error.smtp_reply), True
    if error.smtp_reply is not None and error.step is Step.EHLO:
        return again(error.smtp_reply), error.smtp_reply.startswith("421")
    if error.step in (Step.STARTTLS, Step.TLS):
        return over(host, "4.7.5", str(error)), True
    return over(host, "4.4.1", str(error)), True
