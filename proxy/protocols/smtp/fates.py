"""What became of each message of a dialogue: `Tracker` that tells, for `log_messages`.

Of a sender and its recipients only the domains are kept, and a bounded number of those. The receiver's reply is the one
key to a message that both ends know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from proxy.protocols.smtp.tracker import DOT, MAIL, Tracker
from proxy.stats import Fate

#: Domains of recipients that are told; the others are only counted.
MOST_DOMAINS: Final = 10
_LONGEST_DOMAIN: Final = 255
_LONGEST_REPLY: Final = 400


class _Message:
    """One that is under way."""

    __slots__ = ("domains", "rcpts", "sender", "size")

    def __init__(self, sender: str) -> None:
        self.sender = sender
        self.domains: dict[str, None] = {}
        self.rcpts = 0
        self.size = 0

    def take_rcpt(self, line: bytes) -> None:
        self.rcpts += 1
        if len(self.domains) < MOST_DOMAINS:
            self.domains[_domain(line)] = None


class FateTracker(Tracker):
    """Args:
    tell: called with each message's fate; must not wait.
    refused: as for `Tracker`.
    """

    __slots__ = ("_asked", "_current", "_ended", "_tell", "_text")

    def __init__(self, tell: Callable[[Fate], None], refused: Callable[[str], None] | None = None) -> None:
        super().__init__(refused)
        self._tell = tell
        self._current: _Message | None = None
        self._asked: deque[_Message] = deque()  # MAIL was sent and not answered
        self._ended: deque[_Message] = deque()  # the same of the final dot
        self._text = ""

    def over(self) -> None:
        super().over()
        self._tell = _nobody

    def turned_away(self, said: bytes, reply: bytes) -> None:
        mail, *behind = said.split(b"\n")
        message = _Message(_domain(mail))
        for line in behind:
            if line[:4].upper() != b"RCPT":
                break
            message.take_rcpt(line)
        text = reply.rstrip()[:_LONGEST_REPLY].decode("utf-8", "backslashreplace")
        self._tell(Fate(message.sender, tuple(message.domains), message.rcpts, 0, text, False))

    def _on_command(self, line: bytes) -> None:
        before = self.mails
        super()._on_command(line)
        verb = line[:4].upper()
        if self.mails != before:
            self._current = _Message(_domain(line))
            self._asked.append(self._current)
        elif verb == b"RCPT" and self._current is not None:
            self._current.take_rcpt(line)
        elif verb == b"RSET":
            self._current = None

    def _take_data(self, data: bytes) -> bytes:
        rest = super()._take_data(data)
        message = self._current
        if message is not None:
            message.size += len(data) - len(rest)
            if not self.in_data:
                self._ended.append(message)
                self._current = None
        return rest

    def _on_reply_line(self, line: bytes) -> None:
        self._text = line[:_LONGEST_REPLY].decode("utf-8", "backslashreplace")
        super()._on_reply_line(line)

    def _count(self, kind: str, code: int) -> None:
        super()._count(kind, code)
        if kind is MAIL and self._asked:
            message = self._asked.popleft()
            if code >= 400:
                if message is self._current:
                    self._current = None
                self._say(message)
        elif kind is DOT and self._ended:
            self._say(self._ended.popleft())

    def _on_switch(self, code: int) -> None:
        super()._on_switch(code)
        message = self._current
        if code >= 400 and message is not None:
            self._current = None
            self._say(message)

    def _say(self, message: _Message) -> None:
        self._tell(Fate(message.sender, tuple(message.domains), message.rcpts, message.size, self._text))


def _nobody(fate: Fate) -> None:
    """Is told when nobody is interested any more."""


def _domain(line: bytes) -> str:
    """The domain of the address in a MAIL or RCPT command; a local part is nobody's business."""
    path = line.partition(b":")[2].partition(b">")[0]
    domain = path.rpartition(b"@")[2] if b"@" in path else b""
    return domain[:_LONGEST_DOMAIN].decode("utf-8", "backslashreplace").lower()
