"""A MAIL that the proxy refuses in a dialogue that it only watches: its reply, and those to what stands behind it.

As in mode smtp: the client may have pipelined the rest of the message, and each command of it gets an answer, in order,
as a receiver would give it. Whatever cannot be part of that message is the receiver's again. The caller sees to it that
the receiver owes no reply meanwhile.
"""

from __future__ import annotations

from proxy.protocols.smtp import replies
from proxy.protocols.smtp.octets import CR, LF, NUL
from proxy.protocols.smtp.tracker import MAX_COMMAND_LINE

#: What we answer to the commands of a message that was never begun, and to what changes nothing in it.
_ANSWERS = {b"RCPT": replies.NO_MAIL, b"DATA": replies.NO_MAIL, b"BDAT": replies.NO_MAIL, b"NOOP": replies.OK}


class Unanswerable(ValueError):
    """What the client says can be read in more than one way: no reply to it would be right."""


class TurnedAway:
    """One message.

    Args:
        reply: to its MAIL.

    Attributes:
        over: something has come that is no part of the message.
    """

    def __init__(self, reply: bytes) -> None:
        self.over = False
        self._reply = reply  # b"" once it was given
        self._line = b""
        self._chunk = 0  # octets of a BDAT to be swallowed

    @property
    def in_line(self) -> bool:
        """Whether the client is in the middle of a command."""
        return bool(self._line or self._chunk)

    def take(self, data: bytes) -> tuple[bytes, bytes]:
        """What the client sent, its MAIL first; the replies, and what is for the receiver once it is `over`.

        Raises:
            Unanswerable.
        """
        said: list[bytes] = []
        data, self._line = self._line + data, b""
        start = 0
        while start < len(data) and not self.over:
            if self._chunk:
                taken = min(self._chunk, len(data) - start)
                self._chunk -= taken
                start += taken
                continue
            end = data.find(b"\r\n", start)
            line = data[start:] if end < 0 else data[start:end]
            _check(line.removesuffix(b"\r") if end < 0 else line)
            if end < 0:
                self._line = line
                break
            if not self._answer(line, said):
                break
            start = end + 2
            if line[:4].upper() == b"DATA" and start < len(data):
                raise Unanswerable("a client that does not wait for the reply to DATA")
        return b"".join(said), data[start:] if self.over else b""

    def _answer(self, line: bytes, said: list[bytes]) -> bool:
        """Whether the command is part of the message."""
        if self._reply:
            said.append(self._reply)
            self._reply = b""
            return True
        words = line.split(None, 2)
        verb = words[0].upper() if words else b""
        answer = _ANSWERS.get(verb)
        if answer is None:
            self.over = True
            return False
        if verb == b"BDAT":  # its octets come whatever we say (RFC 3030 section 2)
            if len(words) < 2 or not words[1].isdigit() or len(words[1]) >= 20:
                raise Unanswerable("BDAT without a size")
            self._chunk = int(words[1])
        said.append(answer)
        return True


def _check(line: bytes) -> None:
    if len(line) > MAX_COMMAND_LINE or LF in line or CR in line or NUL in line:
        raise Unanswerable("no command line")
