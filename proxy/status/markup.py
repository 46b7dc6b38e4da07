"""Tables of the status page as HTML, a few rows at a time. Whatever is not `Html` is text, and gets escaped here.

A table has a caption that says what it lists, a head for each column and each row, and a region around it that can be
scrolled sideways, with the keyboard too; the row's head stays in sight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from itertools import islice
from typing import NamedTuple

from proxy.log.spelling import printable

#: Rows of a table in one piece.
_ROWS = 25


class Html(str):
    """Markup."""

    __slots__ = ()


class Mark(NamedTuple):
    """Text that is shown as a warning (`w`), bad (`b`), in lines as long as there is room for (`l`), or in two lines
    (`two`, parted by a line feed)."""

    text: str
    kind: str


class Row(NamedTuple):
    """Cells, the first of which is the row's head; `inner`: it is a part of the row above that is none."""

    cells: tuple[object, ...]
    inner: bool = False


class Table(NamedTuple):
    """A head that begins with # is that of a column of figures. `unseen`: there are more than `rows`, so many;
    `findable`: as many that come into sight when they are looked for."""

    title: str
    caption: str
    head: tuple[str, ...]
    rows: Iterable[Row]
    unseen: int = 0
    findable: int = 0


def text(value: object) -> str:
    """As HTML."""
    return value if isinstance(value, Html) else escape(printable(str(value)))


def holds(cells: Iterable[object], wanted: str) -> bool:
    """Whether `wanted`, which is in small letters, is in the text of one of these."""
    return any(wanted in (cell.text if isinstance(cell, Mark) else str(cell)).casefold() for cell in cells)


def section(table: Table, most: int, wanted: str = "") -> Iterator[str]:
    """A table with its title, and how many rows of it are not shown."""
    name = table.title.lower().replace(" ", "-")
    yield f'<h2 id="{name}">{table.title}</h2>'
    rows = iter(table.rows)
    some = list(islice(rows, min(most, _ROWS)))
    if some:
        heads = "".join(
            f'<th scope="col" class="n">{n[1:]}</th>' if n.startswith("#") else f'<th scope="col">{n}</th>'
            for n in table.head
        )
        yield (
            f'<div class="s" role="region" aria-labelledby="{name}" tabindex="0"><table>'
            f"<caption>{table.caption}</caption><thead><tr>{heads}</tr></thead><tbody>"
        )
    else:
        yield "<p>none</p>" if not wanted else "<p>none of those looked for</p>"
    left = most - len(some)
    while some:
        yield "".join(_row(table.head, row) for row in some)
        some = list(islice(rows, min(left, _ROWS)))
        left -= len(some)
    if left < most:
        yield "</tbody></table></div>"
    if findable := table.findable + sum(1 for row in rows if not row.inner):
        yield f"<p>{findable} more are not shown; they can be looked for by name.</p>"
    if table.unseen:
        yield f"<p>{table.unseen} more are not listed.</p>"


def _row(head: tuple[str, ...], row: Row) -> str:
    first, *others = row.cells
    cells = "".join(
        ('<td class="n">' if name.startswith("#") else "<td>") + _cell(cell) + "</td>"
        for name, cell in zip(head[1:], others, strict=True)
    )
    opening = '<tr class="i">' if row.inner else "<tr>"
    return f'{opening}<th scope="row">{_cell(first)}</th>{cells}</tr>'


def _cell(value: object) -> str:
    if not isinstance(value, Mark):
        return text(value)
    if value.kind == "two":
        first, _, second = value.text.partition("\n")
        return f"<b>{text(first)}</b><br><span>{text(second)}</span>"
    return f'<span class="{value.kind}">{text(value.text)}</span>' if value.text else ""


def figures(*pairs: tuple[str, object]) -> str:
    """Names and values, as many in a line as there is room for."""
    items = (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{''.join(items)}</dl>"
