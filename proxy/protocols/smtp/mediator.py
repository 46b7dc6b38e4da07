"""The dialogue of mode smtp: a client on one side, a receiver (or none) on the other, and who says what when. Sans-IO.

Bytes of both sides and the outcomes of what was wanted go in; bytes for both sides pile up in `to_client` and
`to_receiver`, and `want` names the one thing that is needed before it goes on. The caller sends what has piled up
*before* it does what is wanted, reads the client only while `reads_client`, and calls one method for each outcome.

Rules that keep it right:

- **Nothing of ours overtakes a reply that the receiver owes.** We answer, wait for a slot or change the connection only
  when no reply is outstanding; until then the client's next command waits, unread. A pipelined group that needs no word
  of ours (MAIL RCPT RCPT DATA) goes out in one write as it came.
- **A message passes the gate at MAIL**, each by itself, also the second in one write. What is "not now" is 451 there.
- **Nothing is ever added to a message**, and no reply is invented for one that was sent.
- Between messages the connection may be anybody's: a client keeps what it was shown, not what it had.
- Memory is bounded: `MOST_INPUT` bytes of a client, a line of the receiver, `MOST_OUTSTANDING` replies, one group to be
  said again.

Lines of commands leave with CRLF however they came, and never with a bare CR or NUL in them, so that all receivers see
the same commands. Whether the connection is clean is `Tracker`'s judgement, as for native channels. What commands do
that are not the receiver's alone stands in `commands`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

from proxy.errors import ProxyError, Throttled
from proxy.model import Discard
from proxy.protocols.smtp import keywords, replies
from proxy.protocols.smtp.group import DOT, Group, Line, ReplyLines
from proxy.protocols.smtp.tracker import MAX_COMMAND_LINE, Tracker

#: Unread bytes of the client, beyond which it is not read.
MOST_INPUT = 65536
#: Commands that wait for their replies before more are taken.
MOST_OUTSTANDING = 1000
#: Commands that we answered ourselves since the last message, and mistakes, before it is enough.
MOST_IDLE_COMMANDS = 500
MOST_MISTAKES = 20


class State(enum.Enum):
    """Where the dialogue is."""

    GREET = "greet"  # the receiver's greeting is awaited
    HELLO = "hello"  # no name of the client's was accepted yet
    READY = "ready"  # nothing in progress; a connection is there
    DETACHED = "detached"  # nothing in progress; the connection was given away, or died
    HELD = "held"  # a command waits: for a slot, a connection, or both
    SWALLOW = "swallow"  # its MAIL was refused by us: what was pipelined behind it is, too
    TRANSACTION = "transaction"
    DATA_ASKED = "data_asked"  # DATA was sent: what follows depends on the reply
    DATA = "data"
    AUTH = "auth"  # the receiver asks for the next line of an AUTH exchange
    RAW = "raw"  # the receiver says what nobody understands: bytes pass, both ways
    OVER = "over"


class Want(enum.Enum):
    """What the caller is to do next, and what to tell then."""

    GREETING = "greeting"  # read it: `greeted` or `failed`
    HELLO = "hello"  # bring the session up under `name`: `attached_to` or `failed`
    SLOT = "slot"  # wait for a message's slot: `slot_granted` or `failed`
    LINE = "line"  # a session under `name`, `fresh` or not: `attached_to` or `failed`
    LEAVE = "leave"  # the receiver is not needed any more, see `verdict` and `death`: `left`
    START_TLS = "start_tls"  # with the client: `tls_started`
    END = "end"  # close the client; the receiver, if one is `attached`, as for LEAVE


#: Commands that RSET undoes and that leave the session what it is.
_ORDINARY = frozenset((b"MAIL", b"RCPT", b"DATA", b"RSET", b"NOOP", b"VRFY", b"EXPN", b"HELP"))
#: States in which the client may be told to go.
_BETWEEN = frozenset((State.HELLO, State.READY, State.DETACHED, State.SWALLOW))
#: States in which nothing of the client is taken.
_DEAF = frozenset((State.GREET, State.HELD, State.DATA_ASKED, State.OVER))
#: States in which a receiver has nothing to say.
_SILENT = frozenset((State.HELLO, State.READY))

#: Carries out a command that is not the receiver's alone; no reply is outstanding: `(mediator, line, verb, argument)`.
Own = Callable[["Mediator", bytes, bytes, bytes], None]


class Mediator:
    """One client's dialogue.

    Args:
        host: this proxy's name, in its own replies.
        own: `commands.own`.
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
        own: Own,
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
        # Of `commands` and ours.
        self.hello: tuple[str, ...] = ()  # the receiver's lines under `name`
        self.promised: list[str] = []  # what the client was shown of them
        self.said_hello = False  # since the start, or since TLS with the client
        self.secured = False  # TLS with the client
        self.helo = False  # it said HELO
        self.refusal = b""  # the receiver's, of `name`
        self.begun = False  # MAIL was sent, and neither RSET nor the end of its message since
        self.open = False  # and the receiver accepted it
        self.pending = b""  # the command that is held
        self.chunk = 0  # octets of a BDAT to be swallowed
        self._own = own
        self._make_tracker = tracker
        self._input = bytearray()
        self._lines = ReplyLines()
        self._group = Group()
        self._mails_left: int | None = None  # MAIL commands that the connection takes; None: any number
        self._may_change = False  # the connection may be given away and had anew
        self._old = False  # the receiver may have closed it behind our back
        self._client_done = False
        self._draining = False
        self._idle_commands = 0
        self._mistakes = 0

    # ---------------------------------------------------------------- for the caller

    @property
    def reads_client(self) -> bool:
        """Whether more bytes of the client are of use now."""
        if self.want is not None or self._client_done or len(self._input) >= MOST_INPUT:
            return False
        return self.state not in _DEAF

    @property
    def idle(self) -> bool:
        """Nothing is in progress, the connection may change, and no word of the client waits."""
        if self.want is not None or self._input or not self._may_change:
            return False
        return self.state is State.READY or (self.state is State.TRANSACTION and not self._group and not self.open)

    @property
    def may_lend(self) -> bool:
        """While a slot is waited for: another connection would do as well, and nothing is in progress on this one."""
        return self.want is Want.SLOT and self.attached and self._may_change and not self.open

    @property
    def verdict(self) -> Discard | None:
        """What speaks against keeping the receiver's connection; see `Tracker.verdict`."""
        return self.death or self.tracker.verdict()

    @property
    def in_vain(self) -> bool:
        """What was said last on the present connection is said again on another."""
        return self.fresh and self.death is not None

    @property
    def mails_left(self) -> int | None:
        """MAIL commands that the connection still takes; None: any number."""
        return self._mails_left

    # ---------------------------------------------------------------- outcomes of what was wanted

    def greeted(self, greeting: str, reused: bool) -> None:
        """The receiver's greeting (code and text), of now or, `reused`, of a connection that was kept."""
        self.want, self._may_change = None, reused
        self.to_client.append(replies.again(greeting))
        if greeting.startswith("220"):
            self.state = State.HELLO
            self._run()
        else:
            self.death = Discard.PEER_SPOKE
            self._end()

    def attached_to(self, hello: Sequence[str], left: int | None, may_change: bool, reused: bool) -> None:
        """There is a connection whose session is up under `name`.

        Args:
            hello: the receiver's lines. left: MAIL commands that it takes.
            may_change: another one would do as well. reused: somebody else had it before.
        """
        self.want, self.attached, self.death = None, True, None
        self.tracker = self._make_tracker()
        self._lines.take_rest()
        self._mails_left, self._may_change, self._old = left, may_change, reused
        if self.state is State.HELLO:
            self.hello, self.said_hello, self.state = tuple(hello), True, State.READY
            self.answer_hello()
        elif not keywords.offers(hello, self.promised):
            self.last_word("4.3.2", "the receiver offers less than it did")
        elif self._group:
            self._say_again()
        else:
            self._begin(self.pending)
        self._run()

    def failed(self, error: ProxyError) -> None:
        """There is no slot, or no connection."""
        self.want, last = None, False
        if self.state is State.HELD and isinstance(error, Throttled):
            self._refuse(replies.throttled(error))
        elif self.state is State.HELD:
            # A receiver's refusal of the host would be one of the message here.
            self.attached = False
            self.last_word("4.4.1", str(error))
        else:
            self.attached = False
            reply, last = replies.failure(error, self.host)
            self.to_client.append(reply)
            if last or self.state is State.GREET:
                self._end()
            elif not isinstance(error, Throttled):
                self.refusal = reply
        self._run()

    def slot_granted(self, waited: bool) -> None:
        """The message that is held may go; `waited`: the receiver was out of sight meanwhile."""
        self.want = None
        self._old = self._old or waited
        if not self.attached:
            self._ask_line()
        elif self._mails_left == 0 and self._may_change:
            self.want = Want.LEAVE
        else:
            self._begin(self.pending)
            self._run()

    def left(self) -> None:
        """The receiver is gone, one way or the other; also while a slot is waited for, without having been wanted."""
        held, self.want = self.want is Want.SLOT, None
        self.attached, self.death = False, None
        self.begun = self.open = False
        self.to_receiver.clear()
        if held:
            self.want = Want.SLOT
        elif self.state is State.HELD or (self.state is State.HELLO and self.name is not None):
            self._ask_line()
        elif self.state is not State.HELLO:
            self.state = State.DETACHED
            self._run()

    def tls_started(self) -> None:
        """TLS with the client stands; it has to introduce itself again (RFC 3207 section 4.2)."""
        self.want, self.secured, self.said_hello = None, True, False
        self._run()

    # ---------------------------------------------------------------- events of the caller's own

    def taken(self) -> None:
        """While it is `idle`, somebody else wants the connection."""
        if self.idle and self.attached:
            self.want = Want.LEAVE

    def drain(self) -> None:
        """The proxy stops: the client is told between two messages."""
        self._draining = True
        self._run()

    def time_is_up(self) -> None:
        """Nobody has said anything for too long."""
        if self.want is None and not self._group and self.state not in (State.DATA, State.RAW):
            self.last_word("4.4.2", "idle for too long")
        else:
            self._end()

    def client_done(self) -> None:
        """The client will send nothing more; it may still read."""
        self._client_done = True
        self._run()

    def client_gone(self) -> None:
        """The client is not there any more, whatever is in progress."""
        self._end()

    # ---------------------------------------------------------------- the client's bytes

    def client(self, data: bytes) -> None:
        """What the client sent."""
        if self.state is State.DATA and not self._input:
            self._message(data)
        else:
            self._input += data
        self._run()

    def _run(self) -> None:
        while self.want is None and self._step():
            pass

    def _step(self) -> bool:
        """Take one thing from what the client sent; False: not now."""
        if self._draining and self.state in _BETWEEN and not self._group:
            self.last_word("4.3.2", "shutting down")
        if self.state in _DEAF:
            return False
        if self.state is State.DATA or self.state is State.RAW:
            return self._step_bytes()
        if self.chunk and self._input:
            taken = min(self.chunk, len(self._input))
            del self._input[:taken]
            self.chunk -= taken
            return True
        end = self._input.find(b"\n", 0, MAX_COMMAND_LINE)
        if end < 0:
            self._no_line()
            return False
        line = bytes(self._input[:end]).removesuffix(b"\r")
        if not self._command(line):
            return False
        del self._input[: end + 1]
        return True

    def _step_bytes(self) -> bool:
        data = bytes(self._input)
        self._input.clear()
        if data and self.state is State.DATA:
            self._message(data)
        elif data:
            self.to_receiver.append(data)
        elif self._client_done:
            self._end()
        return bool(data)

    def _no_line(self) -> None:
        if self._group:
            return
        if len(self._input) >= MAX_COMMAND_LINE:
            self._input.clear()
            self.to_client.append(replies.BAD_LINE)
            self.last_word("4.7.0", "too long a line")
        elif self._client_done:
            self._end()

    def _message(self, data: bytes) -> None:
        """Message data, on its way as it came, and what follows its end."""
        rest = self.tracker.data_bytes(data)
        self.to_receiver.append(data[: len(data) - len(rest)] if rest else data)
        if not self.tracker.in_data:
            self._group.add(DOT, b"")
            self.state, self.begun, self.open = State.TRANSACTION, False, False
            self._input += rest

    def _command(self, line: bytes) -> bool:
        """Carry a command out; False: it has to wait until the receiver has answered what came before."""
        words = line.split(None, 1)
        verb = words[0].upper() if words else b""
        if self.state is State.AUTH:
            self._send(line, b"AUTH")
            return True
        if self._passes(line, verb):
            if len(self._group) >= MOST_OUTSTANDING:
                return False
            self._send(line, verb)
            return True
        if self._group:
            return False
        self._own(self, line, verb, words[1].strip() if len(words) > 1 else b"")
        return True

    def _passes(self, line: bytes, verb: bytes) -> bool:
        """Whether a command is the receiver's business alone, and may be pipelined."""
        if not self.begun or self.state is not State.TRANSACTION or b"\r" in line or b"\0" in line:
            return False
        return verb in _ORDINARY and verb != b"MAIL"

    # ---------------------------------------------------------------- for `commands`

    def answer_hello(self) -> None:
        """The reply to EHLO, from memory."""
        self.promised = [] if self.helo else keywords.shown(self.hello, self._mails_left, self.show_auth)
        lines = self.promised or list(self.hello[:1])
        if self.offer_starttls and not self.secured and not self.helo:
            lines = [*lines, "STARTTLS"]
        self.to_client.append(replies.lines(250, lines))

    def introduce(self, name: str) -> None:
        """A name that the receiver has not heard from this client."""
        first, self.name, self.hello, self.refusal = self.name is None, name, (), b""
        self.state, self.said_hello = State.HELLO, False
        if first and self.attached:
            self.want = Want.HELLO
        elif self.attached:
            self.want = Want.LEAVE
        else:
            self._ask_line()

    def ask_slot(self, line: bytes) -> None:
        """A MAIL: it waits for its turn."""
        self.pending, self.state, self.want = line, State.HELD, Want.SLOT
        self._idle_commands = 0

    def ask_receiver(self, line: bytes) -> None:
        """A command that only a receiver can answer."""
        if self.attached:
            self._begin(line)
        else:
            self.pending, self.state = line, State.HELD
            self._ask_line()

    def discard_input(self) -> None:
        """Forget what the client sent behind its present command."""
        del self._input[self._input.find(b"\n") + 1 :]

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
        self._end()

    def end(self) -> None:
        """All is said."""
        self._end()

    # ---------------------------------------------------------------- towards the receiver

    def _begin(self, line: bytes) -> None:
        """The first command after a pause."""
        self._group.begin(self._old and self._may_change)
        self.pending = b""
        self._send(line, line.split(None, 1)[0].upper())

    def _send(self, line: bytes, verb: bytes) -> None:
        command = line + b"\r\n"
        self.tracker.client_bytes(command)
        self.to_receiver.append(command)
        self._group.add(verb, command)
        self.state = State.DATA_ASKED if verb == b"DATA" else State.TRANSACTION
        if verb == b"MAIL":
            self.begun = True
            if self._mails_left:
                self._mails_left -= 1
        elif verb == b"RSET":
            self.begun = self.open = False
        if verb not in _ORDINARY:  # from now on the session is this client's own
            self._may_change = False
            self._group.forget_bytes()

    def _ask_line(self) -> None:
        self.want = Want.LINE
        if self.state is not State.HELLO:
            self.state = State.HELD

    def _replace(self, why: Discard) -> None:
        """The connection was dead before our first word reached it: the same is said on a fresh one, once."""
        self._lines.take_rest()
        self.state, self.death, self.fresh, self.want = State.HELD, why, True, Want.LEAVE

    def _say_again(self) -> None:
        self.fresh = False
        for command in self._group.again():
            self.tracker.client_bytes(command)
            self.to_receiver.append(command)
            if command[:4].upper() in (b"MAIL", b"RSET"):
                self.begun = command[:1].upper() == b"M"
        self.state = State.DATA_ASKED if self._group.last == b"DATA" else State.TRANSACTION
        if self._mails_left:
            self._mails_left -= 1

    def _refuse(self, reply: bytes) -> None:
        """The answer to MAIL is ours: so are those to what was pipelined behind it."""
        self.refused += 1
        self.to_client += [reply, *[replies.NO_MAIL] * (self._group.clear() - 1)]
        self.state, self.fresh, self.pending, self.begun = State.SWALLOW, False, b"", False

    # ---------------------------------------------------------------- the receiver's bytes

    def receiver(self, data: bytes) -> None:
        """What the receiver sent."""
        if self.state is State.RAW:
            self.to_client.append(data)
            return
        for line in self._lines.feed(data):
            self._reply_line(line)
            if self.death is not None:  # of that connection nothing more is of use
                self._lines.take_rest()
                return
            if self._gave_up():
                self.to_client.append(self._lines.take_rest())
                return
        self._run()

    def _gave_up(self) -> bool:
        return self.state is State.RAW

    def _reply_line(self, line: Line) -> None:
        if self.state in _SILENT and self._may_change:  # it speaks although nobody asked it anything
            self._lost_line(Discard.SAID_421 if line.code == 421 else Discard.PEER_SPOKE)
        elif line.code == 421 and self._group.repeatable:
            self._replace(Discard.SAID_421)
        else:
            self.tracker.server_bytes(line.data)
            self.to_client.append(line.data)
            if not line.code:
                self._give_up()
            elif line.last:
                self._on_reply(line.code)

    def _on_reply(self, code: int) -> None:
        verb = self._group.answered()
        if code == 421:
            self.death = Discard.SAID_421
            self._end()
        elif not verb:
            self._give_up()
        elif verb == b"MAIL":
            self.open = code < 400 and self.begun
        elif verb == b"DATA":
            self._on_data_reply(code)
        elif verb == b"AUTH" and code == 334:
            self.state = State.AUTH
        if self.state is State.TRANSACTION and not self._group and not self.begun:
            self._old = True
            self.state = State.READY

    def _on_data_reply(self, code: int) -> None:
        if self.tracker.in_data:
            self.state = State.DATA
        elif code >= 400:
            self.state = State.TRANSACTION
        else:
            self._give_up()

    def _give_up(self) -> None:
        """What the receiver says cannot be understood: from here on bytes pass, as they would without us."""
        self.state, self._may_change = State.RAW, False

    def receiver_done(self) -> None:
        """The receiver has closed, or is broken."""
        self.death = self.death or Discard.PEER_CLOSED
        if self.state in _SILENT and self._may_change:
            self._lost_line(self.death)
        elif self._group.repeatable:
            self._replace(self.death)
        elif self.want is None:
            self.to_client.append(self._lines.take_rest())
            self._end()

    def _lost_line(self, why: Discard) -> None:
        """Between two messages that is nobody's harm."""
        self.death, self.want = why, Want.LEAVE

    def _end(self) -> None:
        self.state, self.want = State.OVER, Want.END
