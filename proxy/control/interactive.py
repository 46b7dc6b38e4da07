"""`greenarrow_proxy ctl` without a command, on a terminal: one command a line, with completion by the tabulator.

Words are completed from the table of commands, columns from the tables of rows. The line editor is Python's readline.
"""

from __future__ import annotations

import readline
import shlex
from collections.abc import Callable, Sequence

from proxy.control.commands import COMMANDS

PROMPT = "greenarrow_proxy> "
_LEAVE = ("quit", "exit")
#: What rows are asked for by, in one table or another.
_COLUMNS = ("instance=", "source=", "destination=", "client=", "protocol=", "state=", "name=", "older=")


def completions(line: str) -> list[str]:
    """What the last word of the line may become; a blank follows where the word is whole."""
    words = line.split()
    begun = "" if not line or line[-1].isspace() else words.pop()
    found: dict[str, None] = {}
    for command in COMMANDS:
        known = len(words)
        if known < len(command.words) and list(command.words[:known]) == words:
            found[command.words[known] + " "] = None
        elif command.most_arguments and list(command.words) == words[: len(command.words)]:
            found |= dict.fromkeys(_arguments(command.arguments))
    if not words:
        found |= dict.fromkeys(f"{word} " for word in _LEAVE)
    return [word for word in found if word.startswith(begun)]


def _arguments(usage: str) -> list[str]:
    words = list(_COLUMNS) if "COLUMN=VALUE" in usage else []
    if "instance=" in usage and not words:
        words.append("instance=")
    if " for " in usage or "[for " in usage:
        words.append("for ")
    return words


def run(command: Callable[[Sequence[str]], int], complain: Callable[[str], None]) -> int:
    """Until the end of the input, or `quit`.

    Args:
        command: says one to the proxy, prints the answer; an exit code.

    Returns:
        The exit code of the last command.
    """
    readline.set_completer_delims(" ")
    readline.set_completer(
        lambda text, state: _nth(completions(readline.get_line_buffer()[: readline.get_endidx()]), state)
    )
    readline.parse_and_bind("tab: complete")
    code = 0
    while True:
        try:
            words = shlex.split(input(PROMPT))
        except ValueError as error:
            complain(f"greenarrow_proxy: {error}")
            continue
        except (EOFError, KeyboardInterrupt):
            return code
        if words and words[0] in _LEAVE:
            return code
        if words:
            code = command(words)


def _nth(found: Sequence[str], number: int) -> str | None:
    return found[number] if number < len(found) else None
