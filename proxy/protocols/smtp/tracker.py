"""Watches an SMTP dialogue that passes by, both ways, to say whether its connection may serve somebody else afterwards.

Out come a verdict (None, or a `Discard` reason), the number of MAIL commands, and what became of the messages. Nothing
is changed, held back or answered: the relay passes every byte on, whatever is thought of it here. When in doubt, the
verdict is against keeping. LMTP is not supported (one reply a recipient after the final dot).

Memory is bounded: a few numbers, a byte or so for each reply that is outstanding, and at most one unfinished line each
way. Replies come in the order of the commands (RFC 5321 4.1.1, RFC 2920 3.1). Only the *last* outstanding reply can be
that to DATA or STARTTLS (RFC 2920 3.1: they end a group; a client that goes on before the reply makes the rest
unreadable, and the tracker says so and looks away).
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import Final

from proxy.model import Discard
from proxy.protocols.smtp.dialogue import MAX_REPLY_LINE, BadReply, parse_reply_line
from proxy.protocols.smtp.dots import fastest as scan
from proxy.protocols.smtp.octets import CR, LF, NUL

#: RFC 5321 4.5.3.1.4 says 512 octets, extensions add to it, AUTH up to 12288 (RFC 4954 4).
MAX_COMMAND_LINE: Final = 12288

#: Bytes of a reply that are remembered.
LONGEST_SAID: Final = 256
#: Characters of a refusal that are told.
LONGEST_REFUSAL: Final = 2000

#: Commands without a reply; nobody sends more at a time, and it bounds memory.
MOST_OUTSTANDING: Final = 100_000

_END_OF_DATA: Final = b"\r\n.\r\n"

#: What an outstanding reply will answer, as far as it matters.
MAIL, RCPT, DOT, _OTHER = "mail", "rcpt", "dot", ""
_KINDS = {b"MAIL": MAIL, b"RCPT": RCPT}

#: Verbs that change nothing which RSET does not undo.
_HARMLESS: Final = frozenset((b"MAIL", b"RCPT", b"DATA", b"RSET", b"NOOP", b"VRFY", b"EXPN", b"HELP"))
#: Verbs after which the connection is no longer what its key says, or is at its end.
_HARMFUL = {
    b"QUIT": Discard.QUIT,
    b"EHLO": Discard.HELLO,
    b"HELO": Discard.HELLO,
    b"AUTH": Discard.AUTH,
    b"STARTTLS": Discard.STARTTLS,
    b"BDAT": Discard.BDAT,
    b"XCLIENT": Discard.XCLIENT,
}


class _Client(enum.Enum):
    """What the next byte of the client is part of."""

    COMMAND = enum.auto()
    SWITCHING = enum.auto()  # DATA or STARTTLS was sent: the client has to wait for the reply
    DATA = enum.auto()
    CHUNK = enum.auto()  # BDAT (RFC 3030)
    LOST = enum.auto()  # not understood any more


class Tracker:
    """One use of one connection, from behind the EHLO of the bring-up to END.

    Give each piece to `client_bytes` or `server_bytes` *before* it is passed on: then no reply can be seen before its
    command. How the bytes are cut into pieces makes no difference.

    Args:
        refused: told each refusal (4xx or 5xx) that answers a command: its code and a blank, then its lines joined by
            LF. Must not wait. What the receiver says unasked, as when it has had enough of an idle connection, is none.
    """

    __slots__ = (
        "_before",
        "_chunk_left",
        "_client",
        "_code",
        "_ending",
        "_line",
        "_mail_refused",
        "_outstanding",
        "_reason",
        "_refusal",
        "_refused",
        "_reply_line",
        "_server_lost",
        "_tail",
        "accepted",
        "deferred",
        "errors",
        "mails",
        "mails_allowed",
        "rejected",
        "said",
    )

    def __init__(self, refused: Callable[[str], None] | None = None) -> None:
        #: MAIL commands that the client sent: what a permit is spent on.
        self.mails = 0
        #: How many MAIL commands may pass; None: any number. The next one is handed back by `client_bytes`.
        self.mails_allowed: int | None = None
        #: Final dots that the receiver answered with 2xx. BDAT messages are not counted.
        self.accepted = 0
        #: Replies 4xx, and 5xx, to MAIL, RCPT and final dots; none to what was pipelined behind a refused MAIL.
        self.deferred = 0
        self.rejected = 0
        #: Replies 5xx, to whatever: many receivers count them, and slow down or end a connection that has too many.
        self.errors = 0
        #: The last line of the last of these replies, 4xx included; cut.
        self.said = ""
        self._client = _Client.COMMAND
        self._line = b""
        self._tail = b""
        self._chunk_left = 0
        self._outstanding: deque[str] = deque()
        self._mail_refused = False
        self._reply_line = b""
        self._code = 0  # of a reply whose last line has not come; 0: none
        self._server_lost = False
        self._ending = False  # QUIT was said, or 421
        self._reason: Discard | None = None
        self._refused = refused
        self._refusal = ""  # the lines of one that have come

    def over(self) -> None:
        """Nobody is told of anything any more."""
        self._refused = None

    def turned_away(self, said: bytes, reply: bytes) -> None:
        """A MAIL that no receiver has heard was refused. `said`: it, and what is known to stand behind it."""

    def verdict(self) -> Discard | None:
        """None: nothing speaks against keeping the connection now; else the first reason that came up."""
        if self._reason is not None:
            return self._reason
        if self._client is _Client.DATA:
            return Discard.IN_DATA
        if self.owes or self._line:
            return Discard.OUTSTANDING
        return None

    @property
    def at_rest(self) -> bool:
        """Whether the receiver waits for a command, so that QUIT can be said to it, fit for others or not."""
        if self._client is not _Client.COMMAND or self._server_lost or self._ending:
            return False
        return not (self.owes or self._line)

    @property
    def owes(self) -> bool:
        """Whether the receiver has not answered all that it was told."""
        return bool(self._outstanding or self._reply_line or self._code)

    @property
    def may_answer(self) -> bool:
        """Whether a reply of our own, in the receiver's place, would be the next one that the client waits for."""
        return self.at_rest and self._reason not in (Discard.PROTOCOL_ERROR, Discard.SAID_421)

    @property
    def lost(self) -> bool:
        """Whether what the client says is not understood any more, so that no MAIL is seen in it."""
        return self._client is _Client.LOST

    @property
    def in_data(self) -> bool:
        """Whether the client's next byte is part of a message."""
        return self._client is _Client.DATA

    def data_bytes(self, data: bytes) -> bytes:
        """Like `client_bytes` while `in_data`, but stops at the end of the message; what comes behind it."""
        return self._take_data(data)

    def client_bytes(self, data: bytes) -> bytes:
        """What the client sends to the receiver; the rest of it that may not be passed on yet, to be given again.

        The rest begins with the line of a MAIL that is one too many (see `mails_allowed`), or with what is left of it
        if pieces of that line, but never its end, had been passed on before it could be known for one.
        """
        while data:
            if self._client is _Client.DATA:
                data = self._take_data(data)
            elif self._client is _Client.COMMAND:
                left = self._take_commands(data)
                if self._client is _Client.COMMAND:
                    return left
                data = left
            elif self._client is _Client.CHUNK:
                taken = min(self._chunk_left, len(data))
                self._chunk_left -= taken
                data = data[taken:]
                if not self._chunk_left:
                    self._client = _Client.COMMAND
            else:
                if self._client is _Client.SWITCHING:
                    self._lose_client()
                break
        return b""

    def server_bytes(self, data: bytes) -> None:
        """What the receiver sends to the client."""
        if self._server_lost:
            return
        *lines, rest = (self._reply_line + data).split(b"\r\n")
        try:
            for line in lines:
                self._on_reply_line(line)
            if rest:  # a trailing CR may still become the line end
                _check_reply_line(rest.removesuffix(b"\r"))
        except BadReply:
            self._blame(Discard.PROTOCOL_ERROR)
            self._server_lost = True
            rest = b""
        self._reply_line = rest

    # -- client side ---------------------------------------------------------------------------------------------------

    def _take_commands(self, data: bytes) -> bytes:
        """Reads commands until the mode changes or a MAIL may not pass; returns what is left."""
        known = len(self._line)
        data = self._line + data
        self._line = b""
        start = 0
        while self._client is _Client.COMMAND:
            end = data.find(b"\r\n", start)
            if end < 0:
                rest = data[start:]
                if len(rest) > MAX_COMMAND_LINE or LF in rest or CR in rest[:-1]:
                    self._lose_client()
                else:
                    self._line = rest
                return b""
            line = data[start:end]
            if self.mails == self.mails_allowed and _verb(line) == b"MAIL":
                self._line = data[start : max(start, known)]
                return data[max(start, known) :]
            self._on_command(line)
            start = end + 2
        return data[start:]

    def _on_command(self, line: bytes) -> None:
        if len(line) > MAX_COMMAND_LINE or LF in line or CR in line or NUL in line:
            # A receiver that takes a bare LF for a line end, or a NUL for the end of a line, sees other commands.
            self._lose_client()
            return
        words = line.split(None, 2)
        verb = words[0].upper() if words else b""
        if len(self._outstanding) >= MOST_OUTSTANDING:
            self._lose_client()
            return
        self._outstanding.append(_KINDS.get(verb, _OTHER))
        if verb == b"MAIL":
            self.mails += 1
        elif verb == b"DATA":
            self._client = _Client.SWITCHING
        elif verb not in _HARMLESS:
            self._on_harmful(verb, words[1] if len(words) > 1 else b"")

    def _on_harmful(self, verb: bytes, argument: bytes) -> None:
        self._blame(_HARMFUL.get(verb, Discard.UNKNOWN_VERB))
        self._ending = self._ending or verb == b"QUIT"
        if verb == b"STARTTLS":
            self._client = _Client.SWITCHING
        elif verb == b"BDAT" and argument.isdigit() and len(argument) < 20:
            # Looked at only so that MAIL commands behind it are still counted.
            self._chunk_left = int(argument)
            if self._chunk_left:
                self._client = _Client.CHUNK

    def _take_data(self, data: bytes) -> bytes:
        """Reads message data up to and with CRLF.CRLF (RFC 5321 4.1.1.4); returns what comes behind it.

        A lone dot between any other line ends (LF.LF, CR.CR, LF.CRLF ...) makes the connection unfit for others: some
        receivers take it for the end of the message ("SMTP smuggling") and what follows for commands, whose replies the
        next user would read. So does a NUL beside a dot, which some skip.
        """
        data = self._tail + data
        found = scan(data)
        if found & 1:
            self._blame(Discard.LONE_DOT)
        end = found >> 1
        if end < 0:
            self._tail = data[-4:]
            return b""
        self._tail = b""
        self._outstanding.append(DOT)
        self._client = _Client.COMMAND
        return data[end + len(_END_OF_DATA) :]

    def _lose_client(self) -> None:
        self._blame(Discard.PROTOCOL_ERROR)
        self._client = _Client.LOST
        self._line = b""

    # -- server side ---------------------------------------------------------------------------------------------------

    def _on_reply_line(self, line: bytes) -> None:
        _check_reply_line(line)
        code, last = parse_reply_line(line)
        if self._code and code != self._code:
            raise BadReply("the lines of one reply carry different codes")
        self._code = 0 if last else code
        if code >= 400 and self._refused is not None:
            self._gather(line, last, self._refused)
        if last:
            if code >= 400:
                self.said = line[:LONGEST_SAID].decode("utf-8", "backslashreplace").rstrip()
            self._on_reply(code)

    def _gather(self, line: bytes, last: bool, refused: Callable[[str], None]) -> None:
        """A line of a refusal, which is told with its last one."""
        text = line.decode("utf-8", "backslashreplace")
        if not self._refusal:
            self._refusal = f"{text[:3]} {text[4:]}"[:LONGEST_REFUSAL]
        elif len(self._refusal) < LONGEST_REFUSAL:
            self._refusal = f"{self._refusal}\n{text[4:]}"[:LONGEST_REFUSAL]
        if last:
            refusal, self._refusal = self._refusal, ""
            if self._outstanding:
                refused(refusal)

    def replaced(self, line: bytes) -> None:
        """A refusal, or the first line of one, that its client will not hear: it is asked the same elsewhere."""
        if self._refused is not None:
            text = line.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
            self._refused(f"{text[:3]} {text[4:]}"[:LONGEST_REFUSAL])

    def _on_reply(self, code: int) -> None:
        if code == 421:
            self._blame(Discard.SAID_421)
            self._ending = True
        self.errors += code >= 500
        if not self._outstanding:
            # Two replies for one command, or one for none: every later reply would be read one too early.
            self._blame(Discard.PROTOCOL_ERROR)
            return
        kind = self._outstanding.popleft()
        if kind:
            self._count(kind, code)
        if self._client is _Client.SWITCHING and not self._outstanding:
            self._on_switch(code)
        elif 300 <= code < 400:
            # 334 answers AUTH, which has its own reason already.
            self._blame(Discard.PROTOCOL_ERROR)

    def _count(self, kind: str, code: int) -> None:
        if kind is MAIL:
            self._mail_refused = code >= 400
        elif kind is RCPT and self._mail_refused:
            return  # the refusal was counted; this is only what was pipelined behind it
        if code >= 500:
            self.rejected += 1
        elif code >= 400:
            self.deferred += 1
        elif kind is DOT and code < 300:
            self.accepted += 1

    def _on_switch(self, code: int) -> None:
        """The reply to DATA or STARTTLS: no (4xx, 5xx), 354, or what ends our understanding: TLS, or nonsense."""
        if code >= 400:
            self._client = _Client.COMMAND
        elif code == 354:
            self._client = _Client.DATA
            self._tail = b"\r\n"  # the line end of DATA itself counts (RFC 5321 4.1.1.4)
        else:
            self._lose_client()

    def _blame(self, reason: Discard) -> None:
        if self._reason is None:
            self._reason = reason


def _verb(line: bytes) -> bytes:
    words = line.split(None, 1)
    return words[0].upper() if words else b""


def _check_reply_line(line: bytes) -> None:
    if len(line) > MAX_REPLY_LINE or LF in line or CR in line or NUL in line:
        raise BadReply("a reply line is too long, or holds a bare CR, a bare LF or a NUL")
