"""The vocabulary of the control socket: words → command, who may say it, the shape of request and answer.

A request and an answer are one JSON object on one line each. New fields may come; `VERSION` changes when one goes or
changes its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from proxy.status.rows import Status

VERSION = 1
#: Bytes of one request.
LONGEST_REQUEST = 16_384


class Request(Struct):
    """`command`: its words. `dry_run`: say what would be done, and do nothing. `because`: for the audit line."""

    command: list[str]
    v: int = VERSION
    dry_run: bool = False
    because: str = ""


class Answer(Struct, omit_defaults=True):
    """`v` and `ok` are always there.

    Args:
        code: of a no: `bad_request`, `bad_command`, `not_allowed`, `failed`. error: the same in a sentence.
        lines: what was done, or each mistake. table: the kind of `rows`, which are those of status.json.
    """

    v: Any
    ok: Any
    code: str = ""
    error: str = ""
    lines: list[str] = []
    table: str = ""
    rows: list[Any] = []


class Mistake(Exception):
    """Why a request is none; `code` as in `Answer`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Command(NamedTuple):
    """One form of command: its words in front, and how many may follow. `changes`: only for who may change."""

    words: tuple[str, ...]
    help: str
    most_arguments: int = 0
    changes: bool = False
    arguments: str = ""


#: Tables of `show` → field of `Status`.
TABLES = {
    "trouble": "trouble",
    "throttles": "throttles",
    "sessions": "sessions",
    "cached": "pool",
    "listeners": "listeners",
    "sources": "sources",
    "receivers": "receivers",
}

COMMANDS: tuple[Command, ...] = (
    Command(("show", "status"), "program, connections and counters"),
    Command(("show", "trouble"), "what is wrong, in words"),
    Command(("show", "throttles"), "limits, who holds places, who waits and for what", 2, arguments="[NAME [SOURCE]]"),
    Command(("show", "sessions"), "instances with a session", 1, arguments="[INSTANCE]"),
    Command(("show", "cached"), "held-open connections", 1, arguments="[DESTINATION]"),
    Command(("show", "listeners"), "listening sockets"),
    Command(("show", "sources"), "source addresses", 1, arguments="[SOURCE]"),
    Command(("show", "receivers"), "receivers with trouble", 1, arguments="[RECEIVER]"),
    Command(("reload",), "read the configuration anew and wait for the outcome", changes=True),
    Command(("drop", "cached"), "close held-open connections that leave from an address", 1, True, "SOURCE"),
    Command(("stop",), "accept nothing new, let what is open finish, and end", changes=True),
    Command(("help",), "the commands"),
)
#: Which fields of a row the arguments of `show` are compared with, in their order.
_KEYS = {
    "throttles": ("name", "source"),
    "sessions": ("name",),
    "cached": ("destination",),
    "sources": ("name",),
    "receivers": ("name",),
}


def decode(line: bytes) -> Request:
    """
    Raises:
        Mistake: it is no request, or of another version.
    """
    try:
        request = msgspec.json.decode(line, type=Request)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Mistake("bad_request", f"not a request: {error}") from None
    if request.v != VERSION:
        raise Mistake("bad_request", f"version {request.v} is not spoken here, but {VERSION}")
    return request


def encode(answer: Answer) -> bytes:
    return msgspec.json.encode(answer) + b"\n"


def refused(code: str, error: str, lines: Sequence[str] = ()) -> Answer:
    return Answer(VERSION, False, code, error, list(lines))


def done(*lines: str) -> Answer:
    return Answer(VERSION, True, lines=list(lines))


def parse(words: Sequence[str], may_change: bool) -> tuple[Command, list[str]]:
    """The command that these words are, and its arguments.

    Raises:
        Mistake: none, or not for this one.
    """
    for command in COMMANDS:
        count = len(command.words)
        if tuple(words[:count]) == command.words:
            arguments = list(words[count:])
            if len(arguments) > command.most_arguments:
                raise Mistake("bad_command", f"too many words: {usage(command)}")
            if command.changes and command.arguments and not arguments:
                raise Mistake("bad_command", f"something is missing: {usage(command)}")
            if command.changes and not may_change:
                who = "root, the user of the proxy, and members of control_group"
                raise Mistake("not_allowed", f"{' '.join(command.words)}: only {who} may change something")
            return command, arguments
    raise Mistake("bad_command", f"{' '.join(words)[:100] or 'no word'}: no such command; see help")


def usage(command: Command) -> str:
    return " ".join((*command.words, command.arguments)).strip()


def helped() -> Answer:
    width = max(len(usage(command)) for command in COMMANDS)
    return done(*(f"{usage(command):{width}}  {command.help}" for command in COMMANDS))


def show(table: str, arguments: Sequence[str], view: Status) -> Answer:
    """The rows of one table, those that fit the arguments."""
    if table == "status":
        figures: dict[str, Any] = {"host": view.host, "generated_at": view.generated_at}
        for name in ("program", "connections", "manager"):
            figures |= {f"{name}.{key}": value for key, value in msgspec.structs.asdict(getattr(view, name)).items()}
        return Answer(VERSION, True, table=table, rows=[figures])
    found: list[Any] = view.pool.keys if table == "cached" else getattr(view, TABLES[table])
    for key, wanted in zip(_KEYS.get(table, ()), arguments, strict=False):
        found = [row for row in found if getattr(row, key) == wanted]
    return Answer(VERSION, True, table=table, rows=list(found))
