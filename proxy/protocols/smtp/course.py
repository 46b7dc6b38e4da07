"""A mediated dialogue's state and the moves that change it; when to make which is decided elsewhere.

`commands` makes them for what the client says, `answers` for what the receiver says, and `mediator`, which is one, for
what its caller tells. What is outstanding at the receiver, and what may be said again, stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proxy.model import Discard
from proxy.protocols.smtp import keywords, replies
from proxy.protocols.smtp.group import Group, ReplyLines
from proxy.protocols.smtp.states import State, Want
from proxy.protocols.smtp.tracker import Tracker

#: Commands that we answered ourselves since the last message, and mistakes, before it is enough.
MOST_IDLE_COMMANDS: Final = 500
MOST_MISTAKES: Final = 20

#: Commands that RSET undoes and that leave the session what it is.
ORDINARY: Final = frozenset((b"MAIL", b"RCPT", b"DATA", b"RSET", b"NOOP", b"VRFY", b"EXPN", b"HELP"))
#: Those that need no message.
_HARMLESS: Final = frozenset((b"RSET", b"NOOP"))


class Course:
    """One client's dialogue, as far as it has come.

    Args:
        host: this proxy's name, in its own replies.
        offer_starttls, show_auth: what the client is shown beside the receiver's keywords.
        tracker: makes the judge of a connection.

    Attributes:
        name: what the client said in EHLO; None: nothing yet.
        fresh: what kind of connection LINE asks for.
        attached: there is a receiver; death: why it is of no more use.
        refused: messages that we refused at MAIL.
    """

    def __init__(
        self,
        host: str,
        offer_starttls: bool = False,
        show_auth: bool = False,
        tracker: Callable[[], Tracker] = Tracker,
    ) -> None:
        self.state = State.GREET
        self.want: Want | None = Want.GREETING
        self.to_client: list[bytes] = []
        self.to_receiver: list[bytes] = []
        self.name: str | None = None
        self.fresh = False
        self.attached = True
        self.death: Discard | None = None
        self.refused = 0
        self.tracker = tracker()
        self.host = host
        self.offer_starttls = offer_starttls
        self.show_auth = show_auth
        self.hello: tuple[str, ...] = ()  # the receiver's lines under `name`
        self.promised: list[str] = []  # what the client was shown of them
        self.foreseen: tuple[str, ...] = ()  # what a receiver is thought to say, as long as there was none
        self.said_hello = False  # since the start, or since TLS with the client
        self.secured = False  # TLS with the client
        self.helo = False  # it said HELO
        self.refusal = b""  # the receiver's, of `name`
        self.begun = False  # MAIL was sent, and neither RSET nor the end of its message since
        self.open = False  # and the receiver accepted it
        self.pending = b""  # the command that is held
        self.unread = bytearray()  # what the client sent and nothing has become of yet
        self.chunk = 0  # octets of a BDAT to be swallowed
        self.make_tracker = tracker
        self.lines = ReplyLines()
        self.group = Group()  # what the receiver owes replies to
        self.mails_left: int | None = None  # MAIL commands that the connection takes; None: any number
        self.may_change = False  # the connection may be given away and had anew
        self.old = False  # the receiver may have closed it behind our back
        self._idle_commands = 0
        self._mistakes = 0

    # ---------------------------------------------------------------- the client

    def answer_hello(self) -> None:
        """The reply to EHLO, from memory."""
        self.promised = [] if self.helo else keywords.shown(self.hello, self.mails_left, self.show_auth)
        lines = self.promised or list(self.hello[:1])
        if self.offer_starttls and not self.secured and not self.helo:
            lines = [*lines, "STARTTLS"]
        self.to_client.append(replies.lines(250, lines))

    def introduce(self, name: str) -> None:
        """A name that the receiver has not heard from this client."""
        first, self.name, self.hello, self.refusal = self.name is None, name, (), b""
        self.state, self.said_hello = State.HELLO, False
        if self.foreseen:
            self.hello, self.said_hello = self.foreseen, True
            self.answer_hello()
            self.rest()
        elif first and self.attached:
            self.want = Want.HELLO
        elif self.attached:
            self.want = Want.LEAVE
        else:
            self.ask_line()

    def ask_slot(self, line: bytes) -> None:
        """A MAIL: it waits for its turn."""
        self.pending, self.state, self.want = line, State.HELD, Want.SLOT
        self._idle_commands = 0

    def ask_receiver(self, line: bytes) -> None:
        """A command that only a receiver can answer."""
        if self.attached:
            self.begin(line)
        else:
            self.pending, self.state = line, State.HELD
            self.ask_line()

    def discard_input(self) -> None:
        """Forget what the client sent behind its present command."""
        del self.unread[self.unread.find(b"\n") + 1 :]

    def rest(self) -> None:
        """Nothing is in progress any more."""
        self.state = State.READY if self.attached else State.DETACHED

    def mistake(self, reply: bytes) -> None:
        """Answer; and end it when there are too many of these."""
        self.to_client.append(reply)
        self._mistakes += 1
        if self._mistakes >= MOST_MISTAKES:
            self.last_word("4.7.0", "too many mistakes")

    def count_idle(self) -> bool:
        """A command without a message; whether there may be more of them."""
        self._idle_commands += 1
        if self._idle_commands >= MOST_IDLE_COMMANDS:
            self.last_word("4.7.0", "too many commands without a message")
            return False
        return True

    def last_word(self, code: str, why: str) -> None:
        """Say 421, and end it."""
        self.to_client.append(replies.over(self.host, code, why))
        self.end()

    # ---------------------------------------------------------------- the receiver

    def begin(self, line: bytes) -> None:
        """The first command after a pause."""
        self.group.begin(self.old and self.may_change)
        self.pending = b""
        self.send(line, line.split(None, 1)[0].upper())

    def send(self, line: bytes, verb: bytes) -> None:
        """A command goes to the receiver, which owes its reply from now on."""
        command = line + b"\r\n"
        self.tracker.client_bytes(command)
        self.to_receiver.append(command)
        self.group.add(verb, command)
        self.state = State.DATA_ASKED if verb == b"DATA" else State.TRANSACTION
        if verb == b"MAIL":
            self.begun = True
            if self.mails_left:
                self.mails_left -= 1
        elif verb == b"RSET":
            self.begun = self.open = False
        if verb not in ORDINARY:  # from now on the session is this client's own
            self.may_change = False
            self.group.forget_bytes()

    def ask_line(self) -> None:
        """There is no connection, and one is needed."""
        self.want = Want.LINE
        if self.state is not State.HELLO:
            self.state = State.HELD

    def replace(self, why: Discard) -> None:
        """The connection was dead before our first word reached it: the same is said on a fresh one, once."""
        self.lines.take_rest()
        self.state, self.death, self.fresh, self.want = State.HELD, why, True, Want.LEAVE

    def go_on(self) -> None:
        """There is all that the command that was held, or is to be said again, waited for."""
        if self.group.verbs:
            self.say_again()
        else:
            self.begin(self.pending)

    def say_again(self) -> None:
        """On a fresh connection: all that the one that was replaced did not answer."""
        self.fresh = False
        for command in self.group.again():
            self.tracker.client_bytes(command)
            self.to_receiver.append(command)
            if command[:4].upper() in (b"MAIL", b"RSET"):
                self.begun = command[:1].upper() == b"M"
        self.state = State.DATA_ASKED if self.group.last == b"DATA" else State.TRANSACTION
        if self.mails_left:
            self.mails_left -= 1

    def refuse(self, reply: bytes) -> None:
        """The answer to MAIL is ours: so are those to what was pipelined behind it."""
        self.refused += 1
        said = self.group.said if self.group.verbs else self.pending + b"\n"
        self.tracker.turned_away(said + bytes(self.unread), reply)
        behind = self.group.clear()[1:]
        self.to_client += [reply, *[replies.OK if verb in _HARMLESS else replies.NO_MAIL for verb in behind]]
        self.state, self.fresh, self.pending, self.begun = State.SWALLOW, False, b"", False

    def give_up(self) -> None:
        """What the receiver says cannot be understood: from here on bytes pass, as they would without us."""
        self.state, self.may_change = State.RAW, False

    def lost_line(self, why: Discard) -> None:
        """Between two messages that is nobody's harm."""
        self.death, self.want = why, Want.LEAVE

    def end(self) -> None:
        """All is said."""
        self.state, self.want = State.OVER, Want.END
