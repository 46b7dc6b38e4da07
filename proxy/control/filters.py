"""Which rows of a table are meant: words of a `show` command → a choice among rows.

A word alone is compared with the table's own keys, in their order; `column=value` with that column; `older=30s` with
the age. An address without a port means all its ports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from proxy.config.values import parse_duration
from proxy.errors import Mistake

OLDER = "older"


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
            found = [row for row in found if _fits(_field(row, column), wanted)]
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


def _fits(value: str, wanted: str) -> bool:
    if value == wanted:
        return True
    host, colon, port = value.rpartition(":")
    return bool(colon) and port.isdigit() and host.strip("[]") == wanted.strip("[]")
