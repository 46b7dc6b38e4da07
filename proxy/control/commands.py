"""The vocabulary of the control socket: words → command, who may say it, the shape of request and answer.

A request and an answer are one JSON object on one line each. New fields may come; `VERSION` changes when one goes or
changes its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from proxy.errors import Mistake

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
        lines: what was done, or each mistake; of `trace` what happens, and then there is `more`, in further answers.
        table: the kind of `rows`, which are those of status.json.
    """

    v: Any
    ok: Any
    code: str = ""
    error: str = ""
    lines: list[str] = []
    table: str = ""
    rows: list[Any] = []
    more: bool = False


class Command(NamedTuple):
    """One form of command: its words in front, and how many must and may follow. `changes`: only for who may change."""

    words: tuple[str, ...]
    help: str
    most_arguments: int = 0
    changes: bool = False
    arguments: str = ""
    least_arguments: int = 0


_FILTERS = "[COLUMN=VALUE ...] [older=30s]"

COMMANDS: tuple[Command, ...] = (
    Command(("show", "status"), "program, connections and counters"),
    Command(("show", "trouble"), "what is wrong, in words"),
    Command(
        ("show", "throttles"),
        "limits, who holds places, who waits and for what",
        8,
        arguments="[NAME [SOURCE]] [COLUMN=VALUE ...]",
    ),
    Command(
        ("show", "blocks"),
        "throttle blocks as configured, and which addresses their names mean now",
        8,
        arguments="[NAME] [COLUMN=VALUE ...]",
    ),
    Command(
        ("show", "backoffs"),
        "throttle blocks that replies have slowed down",
        8,
        arguments="[NAME [SOURCE]] [COLUMN=VALUE ...]",
    ),
    Command(("show", "sessions"), "instances with a session", 8, arguments="[INSTANCE] [COLUMN=VALUE ...]"),
    Command(("show", "connections"), "clients' connections: whose, how far, since when", 8, arguments=_FILTERS),
    Command(("show", "cached"), "held-open connections", 8, arguments="[DESTINATION] [COLUMN=VALUE ...]"),
    Command(("show", "listeners"), "listening sockets", 8, arguments="[COLUMN=VALUE ...]"),
    Command(
        ("show", "workers"),
        "processes: what each costs, and which have died",
        8,
        arguments="[NUMBER] [COLUMN=VALUE ...]",
    ),
    Command(("show", "sources"), "source addresses", 8, arguments="[SOURCE] [COLUMN=VALUE ...]"),
    Command(("show", "receivers"), "receivers with trouble", 8, arguments="[RECEIVER] [COLUMN=VALUE ...]"),
    Command(("show", "store"), "the store of throttles that several proxies share"),
    Command(
        ("show", "leased"),
        "throttles that the store holds: limits, our share without it, what was leased",
        8,
        arguments="[NAME [SOURCE]] [COLUMN=VALUE ...]",
    ),
    Command(("show", "events"), "what was logged lately, single connections left out", 8, arguments=_FILTERS),
    Command(("show", "config"), "what is in force, and where it is written", 1, arguments="[DIRECTIVE|BLOCK]"),
    Command(
        ("explain",),
        "what would happen to a connection now; SOURCE -: the client names none",
        3,
        arguments="SOURCE DESTINATION[:PORT] [instance=NAME]",
        least_arguments=2,
    ),
    Command(
        ("show", "logins"),
        "which secret clients have proven themselves with",
        8,
        arguments="[INSTANCE] [COLUMN=VALUE ...] [older=30s]",
    ),
    Command(("show", "overrides"), "what was set by hand for a time", 8, arguments="[COLUMN=VALUE ...]"),
    Command(("trace",), "the steps of connections as they happen", 8, arguments="[COLUMN=VALUE ...] [for 60s]"),
    Command(("reload",), "read the configuration anew and wait for the outcome", changes=True),
    Command(("close", "connection"), "end a client's connection, whatever it is doing", 1, True, "ID", 1),
    Command(("drop", "cached"), "close held-open connections that leave from an address", 1, True, "SOURCE", 1),
    Command(
        ("log", "verbose"),
        "the steps of connections in the log, for a time, or until off",
        8,
        True,
        "[COLUMN=VALUE ...] [for 10m] | off",
    ),
    Command(
        ("pause", "throttle"),
        "new messages and connections wait, for a time; what runs finishes",
        4,
        True,
        "NAME [SOURCE] [for 1h]",
        1,
    ),
    Command(("resume", "throttle"), "end such a pause", 2, True, "NAME [SOURCE]", 1),
    Command(
        ("limit", "throttle"),
        "a lower limit, never a higher one, for a time",
        8,
        True,
        "NAME [SOURCE] [connections=5] [rate=500/hr] [for 1h]",
        2,
    ),
    Command(("end", "override"), "end what was set by hand before its time", 1, True, "ID", 1),
    Command(("backoff", "end"), "end the back-off of a throttle block: its own limits hold", 1, True, "NAME", 1),
    Command(("drain",), "the same as stop", changes=True),
    Command(("stop",), "accept nothing new, let what is open finish, and end", changes=True),
    Command(("help",), "the commands"),
)


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


def without(silent: Sequence[int]) -> list[str]:
    """Lines about the workers, by number, that have not answered."""
    return [f"worker {number} does not answer: without it" for number in silent]


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
            if len(arguments) < command.least_arguments:
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
