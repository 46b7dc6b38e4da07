"""What the commands that only look answer: a table of rows, or lines.

The tables are those of the status page's view, so that a figure has one meaning wherever it is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec

from proxy.config.in_force import Row
from proxy.config.values import parse_endpoint
from proxy.control.commands import VERSION, Answer, done, without
from proxy.control.filters import chosen, columns, for_a_time
from proxy.control.house import House
from proxy.errors import Mistake
from proxy.log import steps
from proxy.model import Endpoint, canonical_ip
from proxy.status.rows import ConfigRow, Status, StoreRow
from proxy.status.workers import silent

_SMTP = 25
#: Seconds of a trace, where nothing is said; and at most.
_TRACE, _LONGEST_TRACE = 60.0, 3600.0


class _Table(NamedTuple):
    """Where rows of the view are, and which words choose among them; see `filters.chosen`."""

    path: str
    keys: tuple[str, ...] = ()
    age: str = ""


_OF_THE_VIEW = {
    "trouble": _Table("trouble"),
    "throttles": _Table("throttles", ("name", "source")),
    "blocks": _Table("blocks", ("name",)),
    "backoffs": _Table("backoffs", ("name", "source")),
    "sessions": _Table("sessions", ("name",), "connected"),
    "cached": _Table("pool.keys", ("destination",), "oldest"),
    "listeners": _Table("listeners", ("address",)),
    "sources": _Table("sources", ("name",), "last_ago"),
    "receivers": _Table("receivers", ("name",), "last_ago"),
    "workers": _Table("workers", ("number",), "up"),
}


def look(words: tuple[str, ...], arguments: Sequence[str], house: House) -> Answer:
    """The answer to one command; may wait.

    Raises:
        Mistake: an argument cannot be understood.
    """
    if words == ("explain",):
        return done(*(f"{subject:12}  {text}" for subject, text in _explain(arguments, house)))
    table = words[1]
    if table == "status":
        view = house.view()
        return _answer(table, [_figures(view)], _silent(view))
    if table == "config":
        return _answer(table, _config(house.config(), arguments))
    if table == "events":
        events, silent = house.events()
        return _answer(table, chosen(events, arguments, ("event",), "ago"), silent)
    if table == "overrides":
        return _answer(table, chosen(house.overrides(), arguments, ("what",)))
    if table == "logins":
        logins, silent = house.logins()
        return _answer(table, chosen(logins, arguments, ("instance",), "ago"), silent)
    if table == "connections":
        connections, silent = house.connections()
        return _answer(table, chosen(connections, arguments, ("id",), "age"), silent)
    if table in ("store", "leased"):
        return _answer(table, _of_the_store(house.view().store, table, arguments))
    found, view = _OF_THE_VIEW[table], house.view()
    return _answer(table, chosen(attrgetter(found.path)(view), arguments, found.keys, found.age), _silent(view))


def _silent(view: Status) -> list[int]:
    return [row.number for row in silent(view.workers)]


def traced(arguments: Sequence[str], house: House) -> Iterator[Answer]:
    """Answers with `more`, until the time is over.

    Raises:
        Mistake: an argument cannot be understood.
    """
    words, seconds = for_a_time(arguments, _TRACE, _LONGEST_TRACE)
    for lines in house.trace(columns(words, steps.COLUMNS), seconds):
        yield Answer(VERSION, True, lines=lines, more=True)
    yield done("the time is over")


def _answer(table: str, rows: list[Any], silent: Sequence[int] = ()) -> Answer:
    return Answer(VERSION, True, table=table, rows=rows, lines=without(silent))


def _figures(view: Status) -> dict[str, Any]:
    figures: dict[str, Any] = {"host": view.host, "generated_at": view.generated_at}
    for name in ("program", "connections", "manager"):
        figures |= {f"{name}.{key}": value for key, value in msgspec.structs.asdict(getattr(view, name)).items()}
    return figures


def _of_the_store(store: StoreRow | None, table: str, arguments: Sequence[str]) -> list[Any]:
    """Itself, or the throttles that it holds; nothing where none is configured.

    Raises:
        Mistake: an argument cannot be understood.
    """
    if table == "leased":
        return chosen(store.keys if store is not None else [], arguments, ("name", "source"))
    if store is None:
        return []
    return [{key: value for key, value in msgspec.structs.asdict(store).items() if key != "keys"}]


def _config(rows: Sequence[Row], arguments: Sequence[str]) -> list[ConfigRow]:
    """All of it, or what one directive says, or one block, or the blocks of one kind.

    Raises:
        Mistake: nothing is called so.
    """
    wanted = arguments[0] if arguments else ""
    found = [
        ConfigRow(block, directive, value, place)
        for block, directive, value, place in rows
        if not wanted or wanted in (directive, block, block.partition(" ")[0], block.partition(" ")[2])
    ]
    if not found:
        raise Mistake("bad_command", f"{wanted}: neither a directive nor a block in force")
    return found


def _explain(arguments: Sequence[str], house: House) -> list[tuple[str, str]]:
    source, destination, *more = arguments
    instance = ""
    for word in more:
        name, equals, instance = word.partition("=")
        if name != "instance" or not equals:
            raise Mistake("bad_command", f"{word}: what may follow is instance=NAME")
    return house.explain(None if source == "-" else source, _endpoint(destination), instance)


def _endpoint(text: str) -> Endpoint:
    """Port 25 where none is given.

    Raises:
        Mistake: it is no address.
    """
    try:
        return Endpoint(canonical_ip(text.strip("[]")), _SMTP)
    except ValueError:
        pass
    try:
        return parse_endpoint(text)
    except ValueError:
        raise Mistake("bad_command", f"{text}: the address of a receiver, as 192.0.2.7 or 192.0.2.7:25") from None
