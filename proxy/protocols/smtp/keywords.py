"""What a client of mode smtp is shown of the receiver's EHLO reply, and whether another connection offers as much.

A keyword is shown only if what it stands for works through the proxy, on any connection to the same receiver: the
dialogue may change its connection between two messages. The first line stays as it is; MTAs find loops by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: Keywords that are extensions of MAIL, RCPT and of the order of commands, with nothing to agree upon beforehand. All
#: others are hidden, above all STARTTLS and REQUIRETLS (RFC 3207, 8689: TLS is between the proxy and the receiver),
#: CHUNKING and BINARYMIME (RFC 3030: the proxy looks for the end of a message in DATA), PIPE_CONNECT (a client that
#: remembers it speaks before the greeting), XCLIENT, XFORWARD and ETRN (they make the session another).
SHOWN: Final = frozenset(
    {
        "PIPELINING",
        "SIZE",
        "8BITMIME",
        "SMTPUTF8",
        "DSN",
        "ENHANCEDSTATUSCODES",
        "LIMITS",
        "DELIVERBY",
        "MT-PRIORITY",
    }
)


#: Keywords that mean nothing but a parameter of MAIL (RFC 6152, 6531).
_OF_MAIL = {"8BITMIME": b"BODY=8BITMIME", "SMTPUTF8": b"SMTPUTF8"}


def shown(hello: Sequence[str], left: int | None, auth: bool) -> list[str]:
    """The lines for the client.

    Args:
        hello: the texts of the receiver's lines.
        left: MAIL commands that it takes on this connection from now on, if it said a number (RFC 9422).
        auth: show AUTH too.
    """
    lines = list(hello[:1])
    for line in hello[1:]:
        keyword = _keyword(line)
        if keyword == "LIMITS":
            line = _limits(line, left)
        if line and (keyword in SHOWN or (auth and keyword == "AUTH")):
            lines.append(line)
    return lines


def offers(hello: Sequence[str], promised: Sequence[str], command: bytes = b"") -> bool:
    """Whether a receiver's `hello` has all that a client was `promised` (both with their first lines).

    Args:
        command: what it is to hear. What only a MAIL can make use of has to be there if this one does.
    """
    used = command.upper().split()
    offered = {_keyword(line): line.partition(" ")[2].strip() for line in hello[1:]}
    for line in promised[1:]:
        keyword, parameters = _keyword(line), line.partition(" ")[2].strip()
        if keyword == "LIMITS" or (keyword in _OF_MAIL and _OF_MAIL[keyword] not in used):
            continue
        if keyword not in offered or (keyword == "SIZE" and _size(offered[keyword]) < _size(parameters)):
            return False
    return True


def _keyword(line: str) -> str:
    return line.partition(" ")[0].upper()


def _limits(line: str, left: int | None) -> str:
    """MAILMAX is what is left of it; all other limits as they are."""
    keyword, *parts = line.split()
    kept = [f"MAILMAX={left}" if part.upper().startswith("MAILMAX=") else part for part in parts]
    if left is None or left < 1:
        kept = [part for part in kept if not part.upper().startswith("MAILMAX=")]
    return " ".join([keyword, *kept]) if kept else ""


def _size(parameters: str) -> float:
    """RFC 1870: no number, and 0, mean no fixed limit."""
    digits = parameters.split()[:1]
    number = int(digits[0]) if digits and digits[0].isascii() and digits[0].isdigit() and len(digits[0]) <= 20 else 0
    return number or float("inf")
