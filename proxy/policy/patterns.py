"""What a receiver's reply has to say for a rule of a `throttle` block to look up: one pattern, matched in linear time.

A pattern has one of three forms. Three digits are a reply code (`421`). Digits with dots are an enhanced code (RFC
3463), whole (`4.7.1`) or its beginning (`4.7.`). All else is a regular expression, sought in the code and the text.

Receivers choose their words, and some choose them with care: the engine is RE2, which has no backtracking and takes
time in proportion to the text, whatever stands in it. What it cannot do that way (lookaround, backreferences) it
refuses. Text and patterns are bounded, and so is its memory.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, NamedTuple

import re2

#: Characters of a pattern, and those of a reply that are looked at.
LONGEST_PATTERN = 200
LONGEST_TEXT = 1000
#: Bytes that the engine may have for one pattern: its program and what it remembers of states.
_MEMORY = 256 * 1024

_CODE = re.compile(r"[45][0-9]{2}")
_ENHANCED = re.compile(r"([45])\.(?:([0-9]{1,3})(?:\.([0-9]{1,3})?)?)?")
#: RFC 2034 section 4: an enhanced code stands in front of the text; some write a # before it.
_LEADING = re.compile(r"#?([245])\.([0-9]{1,3})\.([0-9]{1,3})(?![0-9.])[ :-]*")


class BadPattern(ValueError):
    """It is none; says where."""


class Said(NamedTuple):
    """A reply as patterns look at it.

    Args:
        code: of three digits. enhanced: its numbers as texts; empty: there is none.
        text: code and text on one line, without the enhanced codes of further lines.
    """

    code: str
    enhanced: tuple[str, ...]
    text: str


class Pattern:
    """One of them.

    Raises:
        BadPattern: the text cannot be one.
    """

    __slots__ = ("_code", "_enhanced", "_expression", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._code = text if _CODE.fullmatch(text) else ""
        enhanced = _ENHANCED.fullmatch(text)
        self._enhanced = tuple(part for part in enhanced.groups() if part) if enhanced else ()
        self._expression: Any = None if self._code or enhanced else _compiled(text)

    def matches(self, said: Said) -> bool:
        if self._code:
            return said.code == self._code
        if self._enhanced:
            return said.enhanced[: len(self._enhanced)] == self._enhanced
        return self._expression.search(said.text) is not None


def said(reply: str) -> Said:
    """A reply: its code and a blank, then its lines, joined by LF."""
    code, _, rest = reply[: 2 * LONGEST_TEXT].partition(" ")
    lines = rest.split("\n")
    leading = _LEADING.match(lines[0])
    if leading is not None:
        lines[1:] = [line[len(leading[0]) :] if line.startswith(leading[0]) else line for line in lines[1:]]
    text = f"{code} {' '.join(lines)}"[:LONGEST_TEXT]
    if not text.isascii():  # what UTF-8 cannot hold
        text = text.encode("utf-8", "backslashreplace").decode()[:LONGEST_TEXT]
    return Said(code, leading.groups() if leading is not None else (), text)


@lru_cache(maxsize=4096)
def _compiled(text: str) -> Any:
    if not text:
        raise BadPattern("it is empty")
    if len(text) > LONGEST_PATTERN:
        raise BadPattern(f"longer than {LONGEST_PATTERN} characters")
    try:
        expression = _compile(text)
    except re2.error as error:
        raise BadPattern(f"character {_position(text)}: {_reason(error)}") from None
    if expression.search("") is not None:
        raise BadPattern("it fits every reply")
    return expression


def _compile(text: str) -> Any:
    options = re2.Options()
    options.case_sensitive = False
    options.never_capture = True
    options.log_errors = False
    options.max_mem = _MEMORY
    return re2.compile(text, options)


def _position(text: str) -> int:
    """Where it goes wrong, from 1: behind the longest beginning that is a pattern."""
    for length in range(len(text) - 1, 0, -1):
        try:
            _compile(text[:length])
        except re2.error:
            continue
        return length + 1
    return 1


def _reason(error: Exception) -> str:
    """RE2's own words, which are bytes."""
    said = error.args[0] if error.args else ""
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
