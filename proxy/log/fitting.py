"""A line that must not be longer than what a pipe takes at once: cut where it hurts least.

Only what peers say makes a line so long. Whole lines fit nearly always, and come back as they are.
"""

from __future__ import annotations

import re

import msgspec

_CUT = "..."
#: A line of JSON, perhaps with a priority for the journal in front.
_JSON = re.compile(r"(<\d>)?\{")
_ESCAPED = re.compile(r"\\.")


def fitting(line: str, most: int) -> bytes:
    """The line in UTF-8, at most so many bytes.

    Of JSON the longest text is cut, so that it stays JSON; of text the end, and a quote that is open is closed.
    """
    data = line.encode("utf-8", "backslashreplace")
    if len(data) <= most:
        return data
    if (found := _JSON.match(line)) is not None:
        priority = found[1] or ""
        cut = _json(line[len(priority) :], most - len(priority))
        if cut is not None:
            return priority.encode() + cut
    return _text(data, most)


def _text(data: bytes, most: int) -> bytes:
    kept = data[: most - len(_CUT) - 1].decode("utf-8", "ignore").rstrip("\\")
    is_open = _ESCAPED.sub("", kept).count('"') % 2
    return (kept + _CUT + '"' * is_open).encode()


def _json(line: str, most: int) -> bytes | None:
    """None: it cannot be cut so far, or is none."""
    try:
        entry = msgspec.json.decode(line, type=dict[str, object])
    except msgspec.MsgspecError:
        return None
    while (over := len(data := msgspec.json.encode(entry)) - most) > 0:
        length, key, value = max(
            ((len(value), key, value) for key, value in entry.items() if isinstance(value, str)), default=(0, "", "")
        )
        if length <= len(_CUT):
            return None
        entry[key] = value[: max(0, length - over - len(_CUT))] + _CUT
    return data
