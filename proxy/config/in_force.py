"""A configuration as it was written and is in force: each directive's values, and where each of them stands.

For people who ask a running program what it goes by. Kept as tuples of texts, which cost the garbage collector nothing;
a secret is never among them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from proxy.config.options import BLOCKS, OPTIONS, Option
from proxy.config.origins import Given
from proxy.model import Breathe, hold_breath

#: Block ("" outside of any, else its kind and name), directive, value, place.
Row = tuple[str, str, str, str]
#: A block's kind, its name, where it begins, and its directives.
Block = tuple[str, str, Given, Mapping[str, Sequence[Given]]]

_SECRET = "(secret)"
_DEFAULT = "default"
_NOTHING = "-"


def in_force(
    given: Mapping[str, Sequence[Given]], blocks: Iterable[Block], breathe: Breathe = hold_breath
) -> tuple[Row, ...]:
    """Every directive outside of blocks, those that stand nowhere with their default, then what the blocks say.

    Args:
        given: directive → its values, in order.
    """
    rows: list[Row] = []
    for option in OPTIONS:
        for row in _rows("", option, given.get(option.name, ()), True):
            breathe()
            rows.append(row)
    for kind, name, start, directives in blocks:
        block, before = f"{kind} {name}", len(rows)
        for option in BLOCKS[kind]:
            for row in _rows(block, option, directives.get(option.name, ()), False):
                breathe()
                rows.append(row)
        if len(rows) == before:
            rows.append((block, _NOTHING, _NOTHING, place(start)))
    return tuple(rows)


def digest(rows: Iterable[Row], breathe: Breathe = hold_breath) -> str:
    """Twelve hex digits that tell two configurations apart, whatever their files are called. Secrets make no
    difference."""
    found = hashlib.sha256()
    for row in rows:
        breathe()
        found.update("\0".join(row[:3]).encode("utf-8", "backslashreplace") + b"\n")
    return found.hexdigest()[:12]


def place(given: Given) -> str:
    """Where a value stands, as the messages about mistakes say it."""
    return f"{given.file}:{given.line}" if given.line else given.file


def _rows(block: str, option: Option, given: Sequence[Given], defaults: bool) -> Iterator[Row]:
    if defaults and (option.extends or not given):
        for text in option.default.split(", ") if option.default and option.repeatable else (option.default,):
            yield block, option.name, text or _NOTHING, _DEFAULT
    for one in given:
        yield block, option.name, _SECRET if option.secret else one.text, place(one)
