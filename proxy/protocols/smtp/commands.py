"""Commands of mode smtp that are not the receiver's business alone: what the proxy answers, holds or asks for.

`own` is called by `mediator` with a command when no reply is outstanding; it changes the dialogue through the moves
of `course`. Commands within a message go to the receiver without coming here.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.protocols.smtp import replies
from proxy.protocols.smtp.course import Course
from proxy.protocols.smtp.dialogue import MAX_EHLO_NAME
from proxy.protocols.smtp.octets import CR, NUL
from proxy.protocols.smtp.states import State, Want


def own(dialogue: Course, line: bytes, verb: bytes, argument: bytes) -> None:
    """Carry out one command; `line` is without its line end, `verb` in capitals."""
    handler = _HANDLERS.get(verb)
    if not verb or CR in line or NUL in line:
        dialogue.mistake(replies.BAD_LINE)
    elif handler is not None:
        handler(dialogue, line, argument)
    elif _has_said_hello(dialogue):
        dialogue.ask_receiver(line)


def _has_said_hello(dialogue: Course) -> bool:
    """Whether the client may go on; if not it is told."""
    if not dialogue.said_hello:
        dialogue.mistake(replies.NO_HELLO)
    return dialogue.said_hello


def _mail(dialogue: Course, line: bytes, argument: bytes) -> None:
    if not _has_said_hello(dialogue):
        return
    if dialogue.open:
        dialogue.mistake(replies.NESTED_MAIL)
    elif b"REQUIRETLS" in argument.upper().split():  # hidden: that TLS was verified is not for a receiver to judge
        dialogue.mistake(replies.NO_REQUIRETLS)
    else:
        dialogue.ask_slot(line)


def _message_part(dialogue: Course, line: bytes, argument: bytes) -> None:
    """RCPT or DATA, and there is no message: none was begun, or we have refused it."""
    if _has_said_hello(dialogue) and (dialogue.state is State.SWALLOW or dialogue.count_idle()):
        dialogue.to_client.append(replies.NO_MAIL)


def _rset(dialogue: Course, line: bytes, argument: bytes) -> None:
    if dialogue.count_idle():
        if dialogue.state is State.SWALLOW:
            dialogue.rest()
        dialogue.to_client.append(replies.OK)


def _noop(dialogue: Course, line: bytes, argument: bytes) -> None:
    if dialogue.count_idle():
        dialogue.to_client.append(replies.OK)


def _help(dialogue: Course, line: bytes, argument: bytes) -> None:
    """VRFY, EXPN, HELP: only a receiver can answer."""
    if _has_said_hello(dialogue) and dialogue.count_idle():
        dialogue.ask_receiver(line)


def _ehlo(dialogue: Course, line: bytes, argument: bytes) -> None:
    _hello(dialogue, argument, False)


def _helo(dialogue: Course, line: bytes, argument: bytes) -> None:
    _hello(dialogue, argument, True)


def _hello(dialogue: Course, argument: bytes, helo: bool) -> None:
    name = argument.split(None, 1)[0].decode("ascii", "replace") if argument else ""
    if not (0 < len(name) <= MAX_EHLO_NAME and name.isascii() and name.isprintable()):
        dialogue.mistake(replies.BAD_NAME)
        return
    if not dialogue.count_idle():
        return
    dialogue.helo = helo
    known = dialogue.name is not None and name.lower() == dialogue.name.lower()
    if known and dialogue.refusal:
        dialogue.to_client.append(dialogue.refusal)
    elif known and dialogue.hello:
        _hello_again(dialogue)
    else:
        dialogue.introduce(name)


def _hello_again(dialogue: Course) -> None:
    """The same name: answered from memory. It ends what is in progress, as RSET does (RFC 5321 section 4.1.4)."""
    dialogue.said_hello = True
    dialogue.answer_hello()
    if dialogue.begun and dialogue.attached:
        dialogue.want = Want.LEAVE
    else:
        dialogue.rest()


def _quit(dialogue: Course, line: bytes, argument: bytes) -> None:
    dialogue.to_client.append(replies.closing(dialogue.host))
    dialogue.end()


def _starttls(dialogue: Course, line: bytes, argument: bytes) -> None:
    if not dialogue.offer_starttls or dialogue.secured:
        dialogue.mistake(replies.NO_STARTTLS)
        return
    dialogue.to_client.append(replies.GO_AHEAD)
    dialogue.discard_input()  # plaintext behind it would be taken for the encrypted client's word
    dialogue.want = Want.START_TLS


def _bdat(dialogue: Course, line: bytes, argument: bytes) -> None:
    """Hidden, and sent all the same: its octets come whatever we say (RFC 3030 section 2)."""
    size = argument.split(None, 1)[0] if argument else b""
    if size.isdigit() and len(size) < 20:
        dialogue.chunk = int(size)
    dialogue.mistake(replies.NO_BDAT)


_HANDLERS: dict[bytes, Callable[[Course, bytes, bytes], None]] = {
    b"MAIL": _mail,
    b"RCPT": _message_part,
    b"DATA": _message_part,
    b"RSET": _rset,
    b"NOOP": _noop,
    b"VRFY": _help,
    b"EXPN": _help,
    b"HELP": _help,
    b"EHLO": _ehlo,
    b"HELO": _helo,
    b"QUIT": _quit,
    b"STARTTLS": _starttls,
    b"BDAT": _bdat,
}
