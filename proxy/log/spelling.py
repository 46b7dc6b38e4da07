"""How a value is spelled in a text line: peers' words on one line, harmless, and cut.

Whoever shows a peer's words elsewhere (the page, the terminal, `ctl`) takes `printable`, too. Which values a line has
does not belong here.
"""

from __future__ import annotations

import re
from functools import lru_cache

#: The longest text taken from a field, and the longest message; characters.
FIELD_LIMIT = 200
MESSAGE_LIMIT = 1000
_PLAIN_WORD = re.compile(r"[A-Za-z0-9._:/@\[\]+,-]{1,200}")


def printable(text: str, limit: int = FIELD_LIMIT) -> str:
    """`text` on one line and harmless on a terminal: what is not printable is escaped, what is too long is cut.

    Unicode's invisible direction marks and surrogates are not printable either.
    """
    cut = text if len(text) <= limit else text[:limit] + "..."
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


@lru_cache(maxsize=4096)
def word(text: str) -> str:
    """`text` as the value of `key=value`: bare where possible, `-` when empty, else quoted with JSON's escapes."""
    if _PLAIN_WORD.fullmatch(text):
        return text
    return quoted(text, FIELD_LIMIT) if text else "-"


def quoted(text: str, limit: int) -> str:
    """`text` in quotes, with JSON's escapes."""
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"'), limit) + '"'


def figure(value: object) -> str:
    """A field's value in a line that comes now and then: seconds to the millisecond."""
    return f"{value:.3f}" if isinstance(value, float) else word(str(value))
