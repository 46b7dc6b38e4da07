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
that are not the receiver's alone stands in `commands`, what replies do in `answers`, and the moves of both in `course`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Final

from proxy.errors import ProxyError, Throttled
from proxy.model import Discard
from proxy.protocols.smtp import answers, commands, keywords, replies
from proxy.protocols.smtp.course import ORDINARY, Course
from proxy.protocols.smtp.group import DOT
from proxy.protocols.smtp.octets import CR, NUL
from proxy.protocols.smtp.states import State, Want
from proxy.protocols.smtp.tracker import MAX_COMMAND_LINE, Tracker

#: Unread bytes of the client, beyond which it is not read.
MOST_INPUT: Final = 65536
#: Commands that wait for their replies before more are taken.
MOST_OUTSTANDING: Final = 1000

#: A line with which a message ends, or a dialogue.
_AN_END: Final = re.compile(rb"^(?:\.|QUIT)[ \t]*\r?$", re.MULTILINE | re.IGNORECASE)

#: States in which the client may be told to go.
_BETWEEN: Final = frozenset((State.HELLO, State.READY, State.DETACHED, State.SWALLOW))
#: States in which the client has nothing in progress on its connection: behind a refused MAIL, too.
_RESTING: Final = frozenset((State.READY, State.SWALLOW))
#: States in which the receiver's session is not up yet.
_NO_SESSION: Final = frozenset((State.GREET, State.HELLO))
#: States in which nothing of the client is taken.
_DEAF: Final = frozenset((State.GREET, State.HELD, State.DATA_ASKED, State.OVER))


class Mediator(Course):
    """One client's dialogue, as its caller sees it; `Course` for the arguments and what it knows."""

    def __init__(
        self,
        host: str,
        offer_starttls: bool = False,
        show_auth: bool = False,
        tracker: Callable[[], Tracker] = Tracker,
    ) -> None:
        super().__init__(host, offer_starttls, show_auth, tracker)
        self._client_done = False
        self._draining = False

    # ---------------------------------------------------------------- for the caller

    @property
    def reads_client(self) -> bool:
        """Whether more bytes of the client are of use now."""
        if self.want is not None or self._client_done or len(self.unread) >= MOST_INPUT:
            return False
        return self.state not in _DEAF

    @property
    def hears_client(self) -> bool:
        """While something is wanted: whether what the client says meanwhile is kept for later."""
        return not self._client_done and len(self.unread) < MOST_INPUT

    @property
    def begins_tls(self) -> bool:
        """The client has not waited for a greeting, and says what is the first of TLS (RFC 8446 section 5.1)."""
        return self.state is State.GREET and self.unread.startswith(b"\x16\x03")

    @property
    def hopeless(self) -> bool:
        """Nothing can come of the session or the MAIL's slot that is waited for: the client has ended with no message
        and no QUIT said."""
        waits = self.says_mail or self.state in _NO_SESSION
        return self._client_done and waits and not _AN_END.search(self.unread)

    @property
    def idle(self) -> bool:
        """Nothing is in progress, the connection may change, and no word of the client waits."""
        if self.want is not None or self.unread or not self.may_change:
            return False
        if self.state is State.TRANSACTION:
            return not self.group.verbs and not self.open
        return self.state in _RESTING

    @property
    def may_lend(self) -> bool:
        """While a slot is waited for: another connection would do as well, and nothing is in progress on this one."""
        return self.want is Want.SLOT and self.attached and self.may_change and not self.open

    @property
    def says_mail(self) -> bool:
        """What the connection that is waited for will hear first is a message's MAIL."""
        return self.state is State.HELD and (self.pending or self.group.first)[:4].upper() == b"MAIL"

    @property
    def verdict(self) -> Discard | None:
        """What speaks against keeping the receiver's connection; see `Tracker.verdict`."""
        return self.death or self.tracker.verdict()

    @property
    def in_vain(self) -> bool:
        """What was said last on the present connection is said again on another."""
        return self.fresh and self.death is not None

    # ---------------------------------------------------------------- outcomes of what was wanted

    def greeted(self, greeting: str, reused: bool) -> None:
        """The receiver's greeting (code and text), of now or, `reused`, of a connection that was kept."""
        self.want, self.may_change = None, reused
        self.to_client.append(replies.again(greeting))
        if greeting.startswith("220"):
            self.state = State.HELLO
            self._run()
        else:
            self.death = Discard.PEER_SPOKE
            self.end()

    def previewed(self, greeting: str, hello: Sequence[str]) -> None:
        """There is no receiver yet, since no place is free: the client is told what one is thought to say."""
        self.want, self.attached, self.state, self.foreseen = None, False, State.HELLO, tuple(hello)
        self.to_client.append(replies.again(greeting))
        self._run()

    def put_off(self, hello: Sequence[str]) -> None:
        """There is no place for a connection under the name that was just said: the same as `previewed`."""
        assert self.name is not None
        self.want, self.attached, self.foreseen = None, False, tuple(hello)
        self.introduce(self.name)
        self._run()

    def pass_through(self) -> None:
        """There is no dialogue that could be seen: bytes pass from here on, both ways."""
        self.want = None
        self.give_up()
        self._run()

    def attached_to(
        self, hello: Sequence[str], left: int | None, may_change: bool, reused: bool, in_time: bool = True
    ) -> None:
        """There is a connection whose session is up under `name`.

        Args:
            hello: the receiver's lines. left: MAIL commands that it takes.
            may_change: another one would do as well. reused: somebody else had it before.
            in_time: the slot of the message that waits (`says_mail`) is still good.
        """
        self.want, self.attached, self.death, self.foreseen = None, True, None, ()
        self.tracker = self.make_tracker()
        self.lines.take_rest()
        self.mails_left, self.may_change, self.old = left, may_change, reused
        if self.state is State.HELLO:
            self.hello, self.said_hello, self.state = tuple(hello), True, State.READY
            self.answer_hello()
        elif not keywords.offers(hello, self.promised, self.pending or self.group.first):
            self.last_word("4.3.2", "the receiver offers less than it did")
        elif not in_time:
            self.want = Want.SLOT
        else:
            self.go_on()
        self._run()

    def failed(self, error: ProxyError) -> None:
        """There is no slot, or no connection."""
        self.want, last = None, False
        if self.state is State.HELD and isinstance(error, Throttled):
            self.refuse(replies.throttled(error))
            if self.attached and self.death is not None:
                self.want = Want.LEAVE
        elif self.state is State.HELD:
            # A receiver's refusal of the host would be one of the message here.
            self.attached = False
            self.last_word("4.4.1", str(error))
        else:
            self.attached = False
            reply, last = replies.failure(error, self.host)
            self.to_client.append(reply)
            if last or self.state is State.GREET:
                self.end()
            elif not isinstance(error, Throttled):
                self.refusal = reply
        self._run()

    def slot_granted(self, waited: bool) -> None:
        """The message that is held may go; `waited`: the receiver was out of sight meanwhile."""
        self.want = None
        self.old = self.old or waited
        if not self.attached:
            self.ask_line()
        elif self.may_change and (self.mails_left == 0 or self.death is not None):
            self.want = Want.LEAVE
        elif self.death is not None:
            self.end()
        else:
            self.go_on()
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
            self.ask_line()
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
        if self.want is None and not self.group.verbs and self.state not in (State.DATA, State.RAW):
            self.last_word("4.4.2", "idle for too long")
        else:
            self.end()

    def client_done(self) -> None:
        """The client will send nothing more; it may still read."""
        self._client_done = True
        self._run()

    def client_gone(self) -> None:
        """The client is not there any more, whatever is in progress."""
        self.end()

    def over(self) -> None:
        """The caller is done with it: nothing here refers to that one any more."""
        self.make_tracker = Tracker
        self.tracker.over()

    # ---------------------------------------------------------------- the client's bytes

    def client(self, data: bytes) -> None:
        """What the client sent."""
        if self.state is State.DATA and not self.unread:
            self._message(data)
        else:
            self.unread += data
        self._run()

    def _run(self) -> None:
        while self.want is None and self._step():
            pass

    def _step(self) -> bool:
        """Take one thing from what the client sent; False: not now."""
        if self._draining and self.state in _BETWEEN and not self.group.verbs:
            self.last_word("4.3.2", "shutting down")
        state = self.state
        if state in _DEAF:
            return False
        if state is State.DATA or state is State.RAW:
            return self._step_bytes()
        if not self.unread:
            if self._client_done and not self.group.verbs:
                self.end()
            return False
        if self.chunk and self.unread:
            taken = min(self.chunk, len(self.unread))
            del self.unread[:taken]
            self.chunk -= taken
            return True
        end = self.unread.find(b"\n", 0, MAX_COMMAND_LINE)
        if end < 0:
            self._no_line()
            return False
        line = bytes(self.unread[:end]).removesuffix(b"\r")
        if not self._command(line):
            return False
        del self.unread[: end + 1]
        return True

    def _step_bytes(self) -> bool:
        data = bytes(self.unread)
        self.unread.clear()
        if data and self.state is State.DATA:
            self._message(data)
        elif data:
            self.to_receiver.append(data)
        elif self._client_done:
            self.end()
        return bool(data)

    def _no_line(self) -> None:
        if self.group.verbs:
            return
        if len(self.unread) >= MAX_COMMAND_LINE:
            self.unread.clear()
            self.to_client.append(replies.BAD_LINE)
            self.last_word("4.7.0", "too long a line")
        elif self._client_done:
            self.end()

    def _message(self, data: bytes) -> None:
        """Message data, on its way as it came, and what follows its end."""
        rest = self.tracker.data_bytes(data)
        self.to_receiver.append(data[: len(data) - len(rest)] if rest else data)
        if not self.tracker.in_data:
            self.group.add(DOT, b"")
            self.state, self.begun, self.open = State.TRANSACTION, False, False
            self.unread += rest

    def _command(self, line: bytes) -> bool:
        """Carry a command out; False: it has to wait until the receiver has answered what came before."""
        words = line.split(None, 1)
        verb = words[0].upper() if words else b""
        if self.state is State.AUTH:
            if CR in line or NUL in line:
                self.to_client.append(replies.BAD_LINE)
                self.last_word("4.7.0", "no line of an AUTH exchange")
                return False
            self.send(line, b"AUTH")
            return True
        if self._passes(line, verb):
            if len(self.group.verbs) >= MOST_OUTSTANDING:
                return False
            self.send(line, verb)
            return True
        if self.group.verbs:
            return False
        commands.own(self, line, verb, words[1].strip() if len(words) > 1 else b"")
        return True

    def _passes(self, line: bytes, verb: bytes) -> bool:
        """Whether a command is the receiver's business alone, and may be pipelined."""
        if not self.begun or self.state is not State.TRANSACTION or CR in line or NUL in line:
            return False
        return verb in ORDINARY and verb != b"MAIL"

    # ---------------------------------------------------------------- the receiver's bytes

    def receiver(self, data: bytes) -> None:
        """What the receiver sent."""
        if self.state is State.RAW:
            self.to_client.append(data)
            return
        lines = self.lines
        lines.feed(data)
        while (line := lines.next_line()) is not None:
            if not answers.take(self, line):
                rest = lines.take_rest()
                if self.death is None:
                    self.to_client.append(rest)
                break
        self._run()

    def receiver_done(self) -> None:
        """The receiver has closed, or is broken."""
        answers.done(self)
