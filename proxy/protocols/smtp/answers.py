"""What the receiver says in a mediated dialogue: passed on, and what follows from it.

`mediator` calls `take` for each line of a reply and `done` when the receiver has closed.
"""

from __future__ import annotations

from typing import Final

from proxy.model import Discard
from proxy.protocols.smtp.course import Course
from proxy.protocols.smtp.group import Line
from proxy.protocols.smtp.states import State

#: States in which a receiver has nothing to say.
_SILENT: Final = frozenset((State.HELLO, State.READY, State.SWALLOW))


def take(dialogue: Course, line: Line) -> bool:
    """One line of a reply, or what stands in its place; False: what comes behind it is none, or nobody's."""
    if dialogue.state in _SILENT and dialogue.may_change:  # it speaks although nobody asked it anything
        dialogue.lost_line(_why(line))
    elif dialogue.state is State.HELD and not dialogue.group.verbs and dialogue.may_change:
        dialogue.death = _why(line)  # no answer to the MAIL, which it has not heard; that goes on elsewhere
    elif line.code == 421 and dialogue.group.repeatable:
        dialogue.tracker.replaced(line.data)
        dialogue.replace(Discard.SAID_421)
    else:
        dialogue.tracker.server_bytes(line.data)
        dialogue.to_client.append(line.data)
        if not line.code:
            dialogue.give_up()
        elif line.last:
            _on_reply(dialogue, line.code)
    return dialogue.death is None and dialogue.state is not State.RAW


def _why(line: Line) -> Discard:
    return Discard.SAID_421 if line.code == 421 else Discard.PEER_SPOKE


def _on_reply(dialogue: Course, code: int) -> None:
    verb = dialogue.group.answered()
    if code == 421:
        dialogue.death = Discard.SAID_421
        dialogue.end()
    elif not verb or (300 <= code < 400 and not (verb == b"DATA" or (verb == b"AUTH" and code == 334))):
        dialogue.give_up()  # what the client says next may be no command
    elif verb == b"MAIL":
        dialogue.open = code < 400 and dialogue.begun
    elif verb == b"DATA":
        _on_data_reply(dialogue, code)
    elif code == 334:
        dialogue.state = State.AUTH
    if dialogue.state is State.TRANSACTION and not dialogue.group.verbs and not dialogue.begun:
        dialogue.old = True
        dialogue.state = State.READY


def _on_data_reply(dialogue: Course, code: int) -> None:
    if dialogue.tracker.in_data:
        dialogue.state = State.DATA
    elif code >= 400:
        dialogue.state = State.TRANSACTION
    else:
        dialogue.give_up()


def done(dialogue: Course) -> None:
    """The receiver has closed, or is broken."""
    dialogue.death = dialogue.death or Discard.PEER_CLOSED
    if dialogue.state in _SILENT and dialogue.may_change:
        dialogue.lost_line(dialogue.death)
    elif dialogue.group.repeatable:
        dialogue.replace(dialogue.death)
    elif dialogue.want is None:
        dialogue.to_client.append(dialogue.lines.take_rest())
        dialogue.end()
