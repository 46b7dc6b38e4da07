"""Which rows of a table are meant: words of a `show` command → a choice among rows.

A word alone is compared with the table's own keys, in their order; `column=value` with that column; `older=30s` with
the age. An address without a port means all its ports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from proxy.config.values import parse_duration
from proxy.errors import Mistake
from proxy.model import is_meant
from proxy.stats import whole_seconds

OLDER = "older"
_FOR = "for"


def chosen(rows: Iterable[Any], words: Sequence[str], keys: Sequence[str], age: str = "") -> list[Any]:
    """The rows that fit all the words.

    Args:
        rows: msgspec Structs of one kind. keys: the fields that words without a column are compared with.
        age: the field that `older=` is compared with; "": the table has no ages.

    Raises:
        Mistake: a word cannot be understood.
    """
    found = list(rows)
    positions = iter(keys)
    for word in words:
        column, equals, wanted = word.partition("=")
        if not equals:
            column, wanted = next(positions, ""), word
            if not column:
                raise Mistake("bad_command", f"{word}: one word too many; columns are asked for as column=value")
        if column == OLDER:
            found = _older(found, wanted, age)
        else:
            found = [row for row in found if is_meant(_field(row, column), wanted)]
    return found


def _older(rows: list[Any], wanted: str, age: str) -> list[Any]:
    try:
        seconds = parse_duration(wanted)
    except ValueError:
        raise Mistake("bad_command", f"{OLDER}={wanted}: a duration such as 30s or 5m") from None
    if not age:
        raise Mistake("bad_command", f"{OLDER}=: nothing here has an age")
    return [row for row in rows if getattr(row, age) >= seconds]


def _field(row: Any, column: str) -> str:
    fields: tuple[str, ...] = row.__struct_fields__
    if column not in fields:
        raise Mistake("bad_command", f"{column}=: no such column; there are {', '.join(fields)}")
    value = getattr(row, column)
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def for_a_time(words: Sequence[str], default: float, most: float) -> tuple[list[str], float]:
    """`... for 10m` → what stands in front, and the seconds.

    Raises:
        Mistake: that is no duration, or a longer one than `most`.
    """
    if _FOR not in words:
        return list(words), default
    at = list(words).index(_FOR)
    text = " ".join(words[at + 1 :])
    try:
        seconds = parse_duration(text)
    except ValueError:
        raise Mistake("bad_command", f"for {text}: a duration such as 30s, 10m or 2h, in the last place") from None
    if not 0 < seconds <= most:
        raise Mistake("bad_command", f"for {text}: more than nothing, and at most {whole_seconds(most)}")
    return list(words[:at]), seconds


def columns(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """`instance=mta1 source=192.0.2.1` as a mapping.

    Raises:
        Mistake: a word is none of that kind.
    """
    found = {}
    for word in words:
        column, equals, wanted = word.partition("=")
        if not equals or column not in known:
            raise Mistake("bad_command", f"{word}: what may stand here is {'=, '.join(known)}=")
        found[column] = wanted
    return found
