"""What a mediated dialogue has said to its receiver and not been answered, and the receiver's lines as they come.

The smaller parts of `mediator`, with no opinion of their own.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from proxy.protocols.smtp.dialogue import BadReply, parse_reply_line

#: The receiver's line; longer than anybody's, since here it is only passed on.
MOST_REPLY_LINE: Final = 8192
#: A group that may have to be said again.
MOST_REPLAY: Final = 65536

#: In the place of a verb: the end of a message.
DOT: Final = b"."


class Group:
    """Commands whose replies are outstanding, by their verbs, and their bytes as long as they can be said again."""

    def __init__(self) -> None:
        self.verbs: deque[bytes] = deque()
        self._said: list[bytes] | None = None
        self._size = 0

    @property
    def last(self) -> bytes:
        return self.verbs[-1]

    @property
    def repeatable(self) -> bool:
        """Nothing of it was answered, and it is known whole."""
        return self._said is not None and bool(self.verbs)

    @property
    def first(self) -> bytes:
        """What is said again first; b"" if nothing is."""
        return self._said[0] if self._said else b""

    @property
    def said(self) -> bytes:
        """As much of it as can be said again."""
        return b"".join(self._said or ())

    def begin(self, repeatable: bool) -> None:
        """Nothing is outstanding; what follows is a new group."""
        self._said, self._size = ([], 0) if repeatable else (None, 0)

    def add(self, verb: bytes, command: bytes) -> None:
        self.verbs.append(verb)
        if self._said is not None:
            self._size += len(command)
            self._said.append(command)
            if self._size > MOST_REPLAY:
                self._said = None

    def answered(self) -> bytes:
        """One reply has come; what it answers, b"" if nothing is outstanding."""
        self._said = None
        return self.verbs.popleft() if self.verbs else b""

    def forget_bytes(self) -> None:
        """It cannot be said again."""
        self._said = None

    def again(self) -> list[bytes]:
        """What is to be said again; that is done once."""
        said, self._said = self._said or [], None
        return said

    def clear(self) -> list[bytes]:
        """Nothing of it will be answered; the verbs."""
        verbs = list(self.verbs)
        self.verbs.clear()
        self._said = None
        return verbs


class Line:
    """A line of a reply as it came; `code` 0: it is none."""

    __slots__ = ("code", "data", "last")

    def __init__(self, data: bytes, code: int, last: bool) -> None:
        self.data = data
        self.code = code
        self.last = last


class ReplyLines:
    """Bytes of a receiver → lines, bounded. A bare LF ends a line too: the tracker thinks its part about it."""

    def __init__(self) -> None:
        self._rest = b""
        self._code = 0  # of a reply whose last line has not come

    def feed(self, data: bytes) -> None:
        """What came."""
        self._rest = self._rest + data if self._rest else data

    def next_line(self) -> Line | None:
        """The next one that is complete; None: more bytes are needed."""
        rest = self._rest
        end = rest.find(b"\n") + 1
        if not end:
            if len(rest) <= MOST_REPLY_LINE:
                return None
            end = len(rest)
        self._rest = rest[end:]
        return self._parsed(rest[:end])

    def take_rest(self) -> bytes:
        """What is there and was not given out; from now on as new."""
        rest, self._rest, self._code = self._rest, b"", 0
        return rest

    def _parsed(self, line: bytes) -> Line:
        try:
            code, last = parse_reply_line(line.removesuffix(b"\n").removesuffix(b"\r"))
        except BadReply:
            return Line(line, 0, True)
        if self._code and code != self._code:
            return Line(line, 0, True)
        self._code = 0 if last else code
        return Line(line, code, last)
