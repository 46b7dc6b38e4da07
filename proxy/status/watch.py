"""The same view again and again, until somebody has seen enough: `--status --watch` and `ctl --watch`."""

from __future__ import annotations

import time
from collections.abc import Callable

#: To the top left, and what stood there is gone.
_CLEAR = "\x1b[H\x1b[2J"
SECONDS = 2.0


def watch(
    look: Callable[[Callable[[str], None], Callable[[str], None]], int],
    seconds: float,
    say: Callable[[str], None],
    terminal: bool,
    sleep: Callable[[float], object] = time.sleep,
) -> int:
    """Look, show, wait, until it is interrupted (Ctrl-C).

    Args:
        look: one look; hands its output, and what it has to complain of, to the two functions; an exit code. A proxy
            that is not there may come back.
        terminal: each look takes the place of the one before; else they follow each other, with an empty line between.

    Returns:
        The exit code of the last look.
    """
    code = 0
    try:
        while True:
            text: list[str] = []
            code = look(text.append, text.append)
            say((_CLEAR if terminal else "") + "\n".join(text) + ("" if terminal else "\n"))
            sleep(seconds)
    except KeyboardInterrupt:
        return code
