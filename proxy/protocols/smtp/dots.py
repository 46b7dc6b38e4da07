"""Where a message ends, and which dots in it somebody might take for its end.

`_fastdots`, if it was built, has the same `scan` in C: one look at each dot, where this one searches message data
several times. Both have the same tests.
"""

from __future__ import annotations

from collections.abc import Callable

_END_OF_DATA = b"\r\n.\r\n"


def scan(data: bytes) -> int:
    """Look at message data for its end, CRLF.CRLF (RFC 5321 4.1.1.4), and for lone dots in front of it.

    A lone dot stands between any other line ends (LF.LF, CR.CR, LF.CRLF ...), or beside a NUL. A CRLF.CR at the very
    end of the data may still become the end of the message, and is none.

    Returns:
        twice the place of CRLF.CRLF, or -2 if it is not there; 1 more if there is a lone dot.
    """
    dot = data.find(b".")
    if dot < 0:
        return -2
    start = max(dot - 1, 0)
    line_feed, carriage_return = data.find(b"\n.", start), data.find(b"\r.", start)
    nul = 0 in data
    if line_feed < 0 and carriage_return < 0 and not nul:
        return -2
    end = data.find(_END_OF_DATA, max(line_feed - 1, 0)) if line_feed >= 0 else -1
    if end < 0:
        return -2 + _has_lone_dot(data)
    if line_feed != end + 1 or carriage_return >= 0 or nul:
        return 2 * end + _has_lone_dot(data[: end + 2])
    return 2 * end


def _has_lone_dot(data: bytes) -> bool:
    at = data.find(b"\n.\r")
    unfinished = 0 < at == len(data) - 3 and data[at - 1] == 13
    if (at >= 0 and not unfinished) or b"\n.\n" in data or b"\r.\r" in data or b"\r.\n" in data:
        return True
    return b"\0." in data or b".\0" in data


def _fastest() -> Callable[[bytes], int]:
    try:
        from proxy.protocols.smtp import _fastdots
    except ImportError:
        return scan
    return _fastdots.scan


#: The one that is used.
fastest = _fastest()
