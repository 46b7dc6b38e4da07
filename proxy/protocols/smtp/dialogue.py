"""SMTP as a client speaks it (RFC 5321), sans-IO: the reply parser, the bring-up of a session, RSET and QUIT.

Bytes of the receiver go in; what to send and what to do next come out. A failure of the bring-up raises `UpstreamError`
with the step and the receiver's reply. No socket, no clock (deadlines are the caller's), no TLS: the caller does the
handshake when told `Then.START_TLS`. Watching a dialogue that passes by is `smtp_tracker`'s job.

Line ends: RFC 5321 2.3.8 knows only CRLF. Some old receivers end replies with a bare LF, and every client accepts that,
so the bring-up accepts it too (`strict=False`). Where a connection is to be kept for somebody else nothing is guessed:
RSET and the tracker are strict.
"""

from __future__ import annotations

import enum
import re
from functools import lru_cache
from typing import Final, NamedTuple

from proxy.errors import PeerError, Step, UpstreamError
from proxy.model import Discard, TlsMode
from proxy.protocols.smtp.octets import CR, NUL

#: RFC 5321 4.5.3.1.5 allows 512 octets with the CRLF, extensions may go over it; nobody needs more than this.
MAX_REPLY_LINE: Final = 2048
#: Bound of one reply over all its lines.
MAX_REPLY: Final = 32 * 1024
#: RFC 5321 4.5.3.1.2 allows 255 octets for a domain.
MAX_EHLO_NAME: Final = 255


class BadReply(Exception):
    """The receiver sent something that is not an SMTP reply; the text says what, without quoting it."""


class Reply(NamedTuple):
    """One whole reply; `lines` are the texts behind the codes, undecodable bytes as backslash escapes."""

    code: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        """Code and text, the lines joined by LF (as `smtplib` joins them)."""
        return f"{self.code} " + "\n".join(self.lines)


_NAME: Final = re.compile(r"[!-~]+")
_REFUSAL: Final = re.compile(r"[45][0-9]{2}[ -][^\r\n]*")


def refusal(first: str) -> str:
    """The first line of what a peer has said first, if it is a reply 4xx or 5xx; else ""."""
    match = _REFUSAL.match(first)
    return match[0] if match else ""


def parse_reply_line(line: bytes) -> tuple[int, bool]:
    """The code of a reply line without its line end, and whether it is the last line of its reply.

    First digit 2 to 5 (RFC 5321 4.2.1). The grammar stops the second digit at 5, but codes such as 571 are common and
    harmless, so any is taken. A line of only the code is a last line (RFC 5321 4.2 asks clients to accept it).

    Raises:
        BadReply: no code, or something else than space or hyphen behind it.
    """
    code = line[:3]
    if len(code) != 3 or not code.isdigit() or not 0x32 <= code[0] <= 0x35:
        raise BadReply("a reply does not begin with a reply code")
    mark = line[3] if len(line) > 3 else 0x20
    if mark != 0x20 and mark != 0x2D:
        raise BadReply("a reply code is followed by neither space nor hyphen")
    return int(code), mark == 0x20


#: Whole replies as they came in one piece, and what they say: a receiver says the same to each of us.
_strictly: dict[bytes, Reply] = {}
_loosely: dict[bytes, Reply] = {}
_LONGEST_REMEMBERED: Final = 1024
_MOST_REMEMBERED: Final = 1024


class ReplyParser:
    """Bytes in, whole replies out, bounded by `MAX_REPLY_LINE` and `MAX_REPLY`.

    Args:
        strict: a bare LF, a bare CR or a NUL in a reply is an error instead of being tolerated.
    """

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._remembered = _strictly if strict else _loosely
        self._buffer = bytearray()
        self._lines: list[str] = []
        self._code = 0
        self._size = 0

    def receive(self, data: bytes) -> None:
        self._buffer += data

    @property
    def unread(self) -> bool:
        """Whether bytes wait that are not yet part of a reply returned by `next_reply`."""
        return bool(self._buffer or self._lines)

    def next_reply(self) -> Reply | None:
        """The next whole reply, or None: more bytes are needed.

        Raises:
            BadReply: not a reply, over a bound, or lines of different codes in one reply (RFC 5321 4.2.1).
        """
        whole = bytes(self._buffer) if not self._lines and len(self._buffer) <= _LONGEST_REMEMBERED else b""
        known = self._remembered.get(whole)
        if known is not None:
            self._buffer.clear()
            return known
        while (line := self._next_line()) is not None:
            code, last = parse_reply_line(line)
            if self._lines and code != self._code:
                raise BadReply("the lines of one reply carry different codes")
            self._code = code
            self._lines.append(line[4:].decode("utf-8", "backslashreplace"))
            if last:
                reply = Reply(code, tuple(self._lines))
                self._lines, self._size = [], 0
                if whole and not self._buffer:
                    self._remember(whole, reply)
                return reply
        return None

    def _remember(self, whole: bytes, reply: Reply) -> None:
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered[whole] = reply

    def _next_line(self) -> bytes | None:
        end = self._buffer.find(b"\n", 0, MAX_REPLY_LINE)
        if end < 0:
            if len(self._buffer) >= MAX_REPLY_LINE:
                raise BadReply(f"a reply line is longer than {MAX_REPLY_LINE} bytes")
            return None
        self._size += end + 1
        if self._size > MAX_REPLY:
            raise BadReply(f"a reply is longer than {MAX_REPLY} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        content = line.removesuffix(b"\r")
        if self._strict and (content is line or CR in content or NUL in content):
            raise BadReply("a reply holds a bare CR, a bare LF or a NUL")
        return content


class Then(enum.Enum):
    """What the caller of a `ClientDialogue` does after it has sent what it was given."""

    READ = "read"  # wait for bytes, give them to `receive`
    START_TLS = "start_tls"  # do the handshake as the client, then call `tls_started`
    INTRODUCE = "introduce"  # the greeting is there, and no name was given yet: call `introduce`
    DONE = "done"  # the session is up; the dialogue is of no more use


class Action(NamedTuple):
    """Send these bytes (maybe none), then do that."""

    send: bytes
    then: Then


_READ = Action(b"", Then.READ)
_START_TLS = Action(b"", Then.START_TLS)
_INTRODUCE = Action(b"", Then.INTRODUCE)
_DONE = Action(b"", Then.DONE)


class ClientDialogue:
    """Brings an SMTP session up: greeting, EHLO, STARTTLS, EHLO again.

    Call `begin` once the connection stands and do what each returned `Action` says until `Then.DONE`. `receive` raises
    `UpstreamError`, after which the connection can only be closed; `eof` gives the error for a receiver that closes.

    - A server that does not know EHLO (500 or 502) is greeted with HELO (RFC 5321 3.2, 4.1.4), unless STARTTLS is
      required. Any other failure is reported with step `ehlo`: a receiver that dislikes our name shall be heard.
    - `OPPORTUNISTIC` goes on in clear when STARTTLS is not offered or refused (but not on a 421). A *handshake* that
      fails leaves an unusable connection: the caller reports step `tls`, and may come back with `NONE` afresh.
    - Bytes that nobody asked for behind a reply end the session: in front of TLS they are an injection (plaintext that
      would be taken for the encrypted peer's word), elsewhere every later reply would be read one too early.

    Args:
        ehlo_name: our name or address literal; None: it is given by `introduce`, behind the greeting.
        tls: see `TlsMode`.
        peer: the receiver's address, for messages; its text is made when there is one.

    Raises:
        PeerError: `ehlo_name` cannot stand in a command.
    """

    def __init__(self, ehlo_name: str | None, tls: TlsMode, peer: object) -> None:
        self._name = _checked(ehlo_name) if ehlo_name is not None else b""
        self._tls = tls
        self._peer = peer
        self._parser = ReplyParser()
        self._command = b""  # the command whose reply is awaited; empty: the greeting
        self._step = Step.GREETING
        #: The receiver's 220, its first sight of us.
        self.greeting: Reply | None = None
        #: The reply to the last EHLO or HELO; after TLS the one from inside (RFC 3207 4.2 drops what was said before).
        self.hello: Reply | None = None
        #: Keyword in upper case → parameters; empty after HELO.
        self.capabilities: dict[str, str] = {}
        #: Whether TLS was started.
        self.encrypted = False
        #: The reply that made an opportunistic session go on in clear, where STARTTLS was offered.
        self.starttls_refusal: Reply | None = None

    @property
    def step(self) -> Step:
        """Where the dialogue is: what a time-out or a reset is reported with."""
        return self._step

    def begin(self) -> Action:
        if self._tls is TlsMode.IMPLICIT:
            self._step = Step.TLS
            return _START_TLS
        return _READ

    def introduce(self, ehlo_name: str) -> Action:
        """Say our name, which was not known before.

        Raises:
            PeerError: it cannot stand in a command.
        """
        self._name = _checked(ehlo_name)
        return self._say_hello(b"EHLO")

    def tls_started(self) -> Action:
        """The handshake is done, and the peer's certificate is as good as this client wants it."""
        self.encrypted = True
        if self.greeting is None:
            self._step = Step.GREETING
            return _READ
        return self._say_hello(b"EHLO")

    def receive(self, data: bytes) -> Action:
        self._parser.receive(data)
        try:
            reply = self._parser.next_reply()
        except BadReply as error:
            raise self._failure(f"sent garbage: {error}") from None
        if reply is None:
            return _READ
        if self._parser.unread:
            what = "sent plaintext in front of TLS" if self._command == b"STARTTLS" else "spoke out of turn"
            raise self._failure(what, reply if reply.code >= 400 else None)
        if self._command == b"":
            return self._on_greeting(reply)
        if self._command == b"STARTTLS":
            return self._on_starttls(reply)
        return self._on_hello(reply)

    def eof(self) -> UpstreamError:
        """The error for a connection that the receiver closed before the session was up."""
        return self._failure("closed the connection")

    def _on_greeting(self, reply: Reply) -> Action:
        if reply.code != 220:
            raise self._failure("did not greet with 220", reply)
        self.greeting = reply
        return self._say_hello(b"EHLO") if self._name else _INTRODUCE

    def _on_hello(self, reply: Reply) -> Action:
        if reply.code != 250:
            unknown = reply.code in (500, 502) and self._command == b"EHLO"
            if unknown and not self.encrypted and self._tls is not TlsMode.REQUIRED:
                return self._say_hello(b"HELO")
            raise self._failure(f"refused {self._command.decode()}", reply)
        self.hello = reply
        self.capabilities = parse_capabilities(reply) if self._command == b"EHLO" else {}
        if self.encrypted or self._tls is TlsMode.NONE:
            return _DONE
        if "STARTTLS" in self.capabilities:
            self._step, self._command = Step.STARTTLS, b"STARTTLS"
            return Action(b"STARTTLS\r\n", Then.READ)
        if self._tls is TlsMode.REQUIRED:
            self._step = Step.STARTTLS
            raise self._failure("does not offer STARTTLS, which is required")
        return _DONE

    def _on_starttls(self, reply: Reply) -> Action:
        if reply.code == 220:
            self._step = Step.TLS
            self.hello, self.capabilities = None, {}
            return _START_TLS
        if self._tls is TlsMode.REQUIRED or reply.code == 421 or reply.code < 400:
            raise self._failure("refused STARTTLS", reply)
        self.starttls_refusal = reply
        return _DONE

    def _say_hello(self, verb: bytes) -> Action:
        self._step, self._command = Step.EHLO, verb
        return Action(verb + b" " + self._name + b"\r\n", Then.READ)

    def _failure(self, what: str, reply: Reply | None = None) -> UpstreamError:
        return UpstreamError(f"{self._peer} {what}", self._step, smtp_reply=str(reply) if reply else None)


def _checked(ehlo_name: str) -> bytes:
    if len(ehlo_name) > MAX_EHLO_NAME or _NAME.fullmatch(ehlo_name) is None:
        raise PeerError(f"an EHLO name has 1 to {MAX_EHLO_NAME} printable ASCII characters and no space")
    return ehlo_name.encode("ascii")


def try_next_destination(error: UpstreamError) -> bool:
    """Whether the next of several destinations may do better: not after a 5xx, which is the receiver's answer."""
    return error.smtp_reply is None or not error.smtp_reply.startswith("5")


@lru_cache(maxsize=256)
def parse_capabilities(reply: Reply) -> dict[str, str]:
    """EHLO keywords (upper case) and their parameters, from the second line on (RFC 5321 4.1.1.1). Not to be changed:
    the next receiver that says the same has the same."""
    pairs = (line.partition(" ") for line in reply.lines[1:])
    return {keyword.upper(): parameters.strip() for keyword, _, parameters in pairs if keyword}


def mailmax(capabilities: dict[str, str]) -> int | None:
    """How many MAIL commands, failed ones included, the receiver takes in a session (RFC 9422 4.1); None: not said.

    The value has one to six digits and does not begin with 0; any other is ignored, like limits with other names.
    """
    for limit in capabilities.get("LIMITS", "").split():
        name, _, value = limit.partition("=")
        if name.upper() == "MAILMAX" and value.isascii() and value.isdigit() and len(value) <= 6 and value[0] != "0":
            return int(value)
    return None


class Rset:
    """Cleans a session before it is kept: send `command`, then give the bytes to `receive` until it is true.

    One 250 (RFC 5321 4.1.1.5) and not a byte more: a second reply would belong to a command that nobody knows of.
    """

    command: Final = b"RSET\r\n"

    def __init__(self) -> None:
        self._parser = ReplyParser(strict=True)
        self._clean = False
        #: Why the session is not clean; None as long as nothing speaks against it.
        self.reason: Discard | None = None

    def receive(self, data: bytes) -> bool:
        """True once the session is proven clean; when `reason` is set it never will be."""
        if self.reason is None:
            self._parser.receive(data)
            self.reason = self._judge()
        return self._clean and self.reason is None

    def _judge(self) -> Discard | None:
        try:
            reply = None if self._clean else self._parser.next_reply()
        except BadReply:
            return Discard.PROTOCOL_ERROR
        if reply is not None:
            if reply.code == 421:
                return Discard.SAID_421
            if reply.code != 250:
                return Discard.RSET_REFUSED
            self._clean = True
        return Discard.UNREAD if self._clean and self._parser.unread else None


class Quit:
    """Ends a session politely: send `command`, read until `receive` is true, the end of file or a short deadline.

    RFC 5321 4.1.1.10 asks the client to wait for the reply; whatever it is, garbage included, the connection is closed.
    """

    command: Final = b"QUIT\r\n"

    def __init__(self) -> None:
        self._parser = ReplyParser()

    def receive(self, data: bytes) -> bool:
        """True when the connection may be closed."""
        self._parser.receive(data)
        try:
            return self._parser.next_reply() is not None
        except BadReply:
            return True
