"""One SMTP session on a channel: bytes both ways between the client's frames and the receiver, from OPENED to END.

What is held back on one side stops reading on the other, so memory is bounded by one read each way; beside that there
is what stands behind a MAIL that has to wait (`gate`). Closing, counting and who gets the connection afterwards are
`channel`'s.
"""

from __future__ import annotations

import errno
import os
import ssl
from functools import partial
from time import monotonic

from gevent import Timeout

from proxy.doors.native.gate import Gate
from proxy.doors.native.link import ClientGone, Link
from proxy.egress.receiver import Receiver
from proxy.errors import PeerError
from proxy.model import Discard, Ending
from proxy.net.peer import has_gone
from proxy.net.probing import Prober
from proxy.net.relay import GONE, HEARD, UNSURE, Shortcut
from proxy.net.tls import tls_reason
from proxy.net.turns import TurnOver
from proxy.policy.turns import FRAME, READ
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.protocols.smtp import replies
from proxy.protocols.smtp.tracker import Tracker
from proxy.protocols.smtp.turned_away import TurnedAway, Unanswerable

_READ_SIZE = 65536
#: Reads of one side before the other has its say. When all others have theirs is `Link.turn`'s.
_READS_A_SIDE = 4
#: What the client gave before END is sent on for this long.
_FLUSH_SECONDS = 5.0


class Transfer:
    """One SMTP session's bytes.

    Args:
        tracker: follows the dialogue, if the connection may be shared or its messages are counted.
        reused: somebody else has had the connection before.
        gate: says which MAIL may go on; needs a tracker. None: all.
        probes: the client takes PROBE.

    Attributes:
        up, down: bytes so far.
        receiver_done: the receiver said FIN, or is broken.
        broken: the connection to the receiver ended otherwise than by a FIN.
        end: what the client ended the session with.
        refused: messages that we refused at MAIL.
    """

    def __init__(
        self,
        link: Link,
        receiver: Receiver,
        tracker: Tracker | None,
        reused: bool = False,
        gate: Gate | None = None,
        probes: bool = False,
    ) -> None:
        self.receiver = receiver
        self.tracker = tracker
        self.up = 0
        self.down = 0
        self.receiver_done = False
        self.broken: Ending | None = None
        self.end: m.End | None = None
        self.refused = 0
        self._link = link
        self._reused = reused
        self._gate = gate
        self._prober = Prober(link.engine, link.probe) if probes else None
        if gate is not None and tracker is not None:
            tracker.mails_allowed = 0
        self._kept = b""  # of the client, from a MAIL on that has to wait
        self._refusing = False  # that MAIL is refused, once the receiver has answered what came before it
        self._turned_away: TurnedAway | None = None  # the message whose MAIL was refused last
        self.stream = receiver.stream
        self._readable = True  # the receiver may have something to be read
        self._missed = True  # events of the receiver may have gone by that nobody acted upon
        self._closed = False  # an event told that the receiver has closed; the end may not have been read yet
        self._held = b""  # for the receiver, not yet taken by the stream
        self._blocked = False  # the receiver does not take what it is given; nothing of the client is read meanwhile
        self._finished = False  # the client said EOF
        self._said: m.End | m.Eof | None = None  # what comes behind bytes that are held back
        self._write_error: OSError | None = None
        self._shortcut: Shortcut | None = None  # while bytes are carried

    @property
    def moved(self) -> int:
        """See `Link.moved`, of this very moment."""
        return self._link.moved + (self._shortcut.moved if self._shortcut is not None else 0)

    @property
    def blocked(self) -> bool:
        """Whether bytes wait until the receiver takes them."""
        return self._blocked

    def carry(self) -> None:
        """Move bytes both ways until END.

        Raises:
            ClientGone, PeerError.
        """
        self._shortcut = self._link.engine.shortcut(self, self._link)
        try:
            self._carry()
        finally:
            self._shortcut = None

    def _carry(self) -> None:
        link = self._link
        if self._shortcut is not None and link.goes_at is None and link.doom is None:
            self._wait(look=True)
        while self.end is None:
            moved = self._from_receiver()
            moved |= self._from_client()
            if self._has_ended():
                return
            link.tell_goaway()
            if link.doom is not None:
                raise ClientGone("to be cut off")
            if link.turn.over:
                link.rest()
                self._readable = self._missed = True
            elif not moved:
                if self._kept and has_gone(link.stream.socket):
                    raise ClientGone("the client closed")
                if self._blocked and has_gone(link.stream.socket):
                    self._push_on()
                else:
                    self._wait()

    def _has_ended(self) -> bool:
        return self.end is not None

    def _wait(self, look: bool = False) -> None:
        """Until something happens; of a client that is not read, see `Prober`. `look`: see `Link.wait`.

        Raises:
            ClientGone.
        """
        link = self._link
        steps = self.stream.socket.fileno(), self._client_event, self._receiver_event, self._shortcut
        if self._prober is not None and (self._blocked or self._is_full()):
            self._prober.wait(link.moved, partial(link.wait, *steps))
        else:
            link.wait(*steps, look)

    def _client_event(self, events: int) -> bool:
        """The usual case, in the hub: what the client sends, the receiver takes. See `Link.wait`."""
        link = self._link
        if events & GONE or link.blocked or self._blocked:
            return True
        self._from_client()
        more = (link.readable or link.decoder.unread) and not self._is_full()
        return more or self.end is not None or self._write_error is not None or self._blocked

    def _receiver_event(self, events: int) -> bool:
        """The same the other way."""
        if events & HEARD:
            self._readable = True
        if events & UNSURE:  # no other event will tell of it
            self._missed = True
            self._closed = self._closed or bool(events & GONE)
        if self._link.blocked or self._blocked:
            return True
        self._from_receiver()
        if self._link.blocked or self._blocked or self._refusing or self.broken is not None:
            return True
        return bool(self._kept) if self.receiver_done else self._readable

    def unclean(self) -> Discard | None:
        """Why the connection cannot serve another client, as far as its bytes tell."""
        if self.receiver_done or self.broken is not None:
            return Discard.PEER_CLOSED
        if self._blocked or self._finished or self._kept:
            return Discard.OUTSTANDING
        if self._turned_away is not None and self._turned_away.in_line:
            return Discard.OUTSTANDING
        return self.tracker.verdict() if self.tracker is not None else Discard.NOT_OFFERED

    @property
    def may_hold(self) -> bool:
        """Whether the receiver may have said something of which no event will tell any more."""
        return self._readable or self._missed

    @property
    def half_closed(self) -> bool:
        """Whether one side has ended, and the other has not."""
        return self._finished or self.receiver_done

    @property
    def waits_for_command(self) -> bool:
        """Whether the receiver does, so that QUIT may be said; without a tracker only the client knows."""
        if self.receiver_done or self.broken is not None or self._blocked or self._finished:
            return False
        if self.tracker is None:
            return self.end is not None and self.end.quit
        return self.tracker.at_rest

    def _push_on(self) -> None:
        """The client has closed while the receiver takes nothing, and there may be an END among what is unread.

        Raises:
            ClientGone: the receiver goes on taking nothing, so that END will not be seen.
        """
        if not self.flush():
            raise ClientGone("the client closed")
        self._link.look_again()
        self._readable = self._missed = True

    def flush(self) -> bool:
        """What the client gave before END shall reach the receiver, if it takes it soon; whether it did."""
        if self._push():
            return self.broken is None
        timer = Timeout.start_new(_FLUSH_SECONDS)
        try:
            while not self._push():
                self._link.engine.wait(self.stream.socket.fileno())
            return self.broken is None
        except Timeout as fired:
            if fired is not timer:
                raise
            return False
        finally:
            timer.close()
            self._link.look_again()

    # ---------------------------------------------------------------- for the shortcut

    @property
    def usual(self) -> bool:
        """Whether both sides take what they are given, the client says nothing but DATA, and none of it has to wait."""
        if self._link.blocked or self._blocked or self._kept or self._finished:
            return False
        if self.end is not None or self._said is not None or self._turned_away is not None:
            return False
        return self._write_error is None and self.broken is None

    @property
    def unasked(self) -> bool:
        """Whether what the receiver says answers nobody: somebody else has had it before, and we said nothing yet."""
        return self._reused and not self.up

    def hold(self, data: bytes) -> None:
        """The receiver has not taken these bytes; nothing else is held."""
        self._held = data
        self._blocked = True

    def saw_all(self) -> None:
        """See `Link.saw_all`."""
        self._readable = self._missed = False

    def ended(self) -> None:
        """The receiver said FIN."""
        self.receiver_done = True
        self._readable = self._missed = False

    # ---------------------------------------------------------------- from the client

    def _from_client(self) -> bool:
        """Read frames and send their bytes on, as far as the receiver takes them and the turn goes; if any came."""
        if self._blocked and not self._push():
            return False
        link = self._link
        moved = bool(self._kept) and self._go_on()
        if self._blocked:
            return moved
        moved |= self._take_frames()
        for _ in range(_READS_A_SIDE):
            if self.end is not None or self._blocked or self._is_full() or link.turn.over:
                break
            if not link.readable or not link.receive():
                break
            moved = True
            self._take_frames()
        return moved

    def _take_frames(self) -> bool:
        """Act on what has come, as far as the turn goes; whether there was anything. DATA that came in small pieces is
        sent on in one."""
        next_frame, spend, now = self._link.decoder.next_frame, self._link.turn.spend, monotonic()
        pieces: list[memoryview | bytes] = []
        came = self._said is not None and not self._kept
        self._act()
        while self.end is None and not self._is_full() and spend(FRAME, now) and (frame := next_frame()) is not None:
            came = True
            if frame[0] == frames.DATA:
                if self._said is not None:
                    raise PeerError("DATA after EOF in an SMTP session")
                pieces.append(frame[1])
                continue
            self._said = self._control(frame)
            if pieces and not self.give(b"".join(pieces)):
                return True  # and what was said is acted upon behind it
            pieces.clear()
            self._act()
        if pieces:
            self.give(b"".join(pieces))
        return came

    def _control(self, frame: frames.Frame) -> m.End | m.Eof:
        """END or EOF."""
        message = frames.decode_again(frame, frames.CHANNEL_FROM_CLIENT)
        if not isinstance(message, m.End | m.Eof):
            raise PeerError(f"{type(message).__name__.upper()} in the middle of an SMTP session")
        if self._said is not None and isinstance(message, m.Eof):
            raise PeerError("EOF twice in an SMTP session")
        return message

    def _act(self) -> None:
        """Do what the client said. An EOF comes behind a MAIL that waits; an END ends the waiting."""
        if self._kept and isinstance(self._said, m.Eof):
            return
        message, self._said = self._said, None
        if isinstance(message, m.End):
            self.end = message
        elif message is not None:
            self._finish()

    def _finish(self) -> None:
        if self._finished:
            raise PeerError("EOF twice in an SMTP session")
        self._finished = True
        if self._write_error is None and self.broken is None:
            try:
                self.stream.finish()
                self._blocked = self.stream.unsent
            except OSError as error:
                self.write_failed(error)

    def give(self, piece: bytes) -> bool:
        """Send the client's bytes to the receiver; False: some are held back."""
        if self._finished:
            raise PeerError("DATA after EOF in an SMTP session")
        if self._write_error is not None or self.broken is not None:
            return True  # the client does not know yet, or goes on after the receiver's FIN
        if self._kept:
            self._kept += piece
            return True
        if self._turned_away is not None:
            piece = self._answer(self._turned_away, piece)
        if self.tracker is not None:
            piece = self.look(self.tracker, piece)
        self.up += len(piece)
        self._held = piece
        return self._push()

    def look(self, tracker: Tracker, piece: bytes) -> bytes:
        """Look at the client's bytes; those that may go on: `piece` itself if all of them. The others are kept."""
        left = tracker.client_bytes(piece)
        while left and self._gate is not None and tracker.mails_allowed is not None:
            if not self._gate.mail():
                self._kept = left
                return piece[: len(piece) - len(left)]
            tracker.mails_allowed += 1
            left = tracker.client_bytes(left)
        if tracker.lost and self._gate is not None and not self._gate.unseen():
            self._kept = piece
            return b""
        return piece

    def _go_on(self) -> bool:
        """Send on what was kept, if its slot has come; whether it has.

        When it will not come any more, the client is told so in the receiver's place, behind all that the receiver owes
        it. Where that cannot be done in order, it is to the client as if the receiver had been lost.
        """
        gate, tracker = self._gate, self.tracker
        assert gate is not None
        assert tracker is not None
        assert tracker.mails_allowed is not None
        if gate.closed:
            return False
        refusal = gate.refusal if not self.receiver_done else None
        self._refusing = refusal is not None and tracker.owes and not tracker.lost
        if self._refusing:
            return False
        kept, self._kept = self._kept, b""
        gate.refusal = None
        if refusal is None:
            tracker.mails_allowed += 1
        elif tracker.may_answer:
            reply = replies.throttled(refusal)
            tracker.turned_away(kept, reply)
            self._turned_away = TurnedAway(reply)
            self.refused += 1
        else:
            self.aborted(OSError(errno.ETIMEDOUT, ""), str(refusal))
            return True
        self.give(kept)
        return True

    def _answer(self, message: TurnedAway, piece: bytes) -> bytes:
        """Give our replies to a message that was refused; what is for the receiver again."""
        try:
            said, rest = message.take(piece)
        except Unanswerable as error:
            self.aborted(OSError(errno.EPROTO, ""), str(error))
            return b""
        if said:
            self._link.moved += len(said)
            self._link.queue(frames.encode_data(said))
        if message.over:
            self._turned_away = None
        return rest

    def _is_full(self) -> bool:
        """Nothing more is read behind a MAIL that waits, nor while replies of ours wait; an END that comes soon is
        seen."""
        return len(self._kept) >= _READ_SIZE or (self._turned_away is not None and self._link.blocked)

    def _push(self) -> bool:
        """Hand what is held back to the receiver; whether nothing is left."""
        stream = self.stream
        self._blocked = False
        if self._write_error is not None or self.broken is not None:
            return True
        try:
            while self._held:
                sent = stream.send(self._held)
                self._held = self._held[sent:]
                self._link.moved += sent
            if stream.unsent:
                stream.flush()
            self._blocked = stream.unsent
        except BlockingIOError:
            self._blocked = True
        except OSError as error:
            self.write_failed(error)
        return not self._blocked

    def write_failed(self, error: OSError) -> None:
        """The receiver takes no more; what it has said before is still to be read, and perhaps says why.

        After its FIN there is nothing to tell any more: the client has been told that it closed.
        """
        self._write_error = error
        self._held = b""
        if not self.receiver_done:
            self.broken = Ending.UPSTREAM_RESET

    # ---------------------------------------------------------------- from the receiver

    def _from_receiver(self) -> bool:
        """Read from the receiver and frame it, as far as the client takes it; whether anything came. Its last words, as
        a 221, go in one piece with the word that it has closed."""
        link = self._link
        if (link.blocked and not link.flush()) or self.receiver_done:
            return False
        moved = False
        for _ in range(_READS_A_SIDE):
            if (not self._readable and self._write_error is None) or not link.turn.spend(READ, monotonic()):
                break
            if not self._read_receiver():
                break
            moved = True
            more = self._closed and self._readable and link.holds < _READ_SIZE
            if self.receiver_done or (not more and not link.flush()):
                break
        if link.holds and not link.blocked:
            link.flush()
        return moved

    def _read_receiver(self) -> bool:
        """Read once, for the client; whether there was anything, an end included."""
        link = self._link
        try:
            data = self.stream.recv(_READ_SIZE)
        except TurnOver:
            link.turn.end()
            return False
        except BlockingIOError:
            self._readable = self._missed = False
            if self._write_error is not None:
                self.aborted(self._write_error)
            return self._write_error is not None
        except OSError as error:
            self.aborted(error)
            return True
        self._readable = self._missed or not self.stream.drained
        self._blocked = self._blocked or self.stream.unsent  # TLS has something to say of its own
        if not data:
            self.ended()
            if self._write_error is not None:
                self.aborted(self._write_error)
            else:
                link.put(frames.encode(m.Eof()))
        elif self.unasked:
            # Nobody has asked it anything: the client would take this for the answer to its first command, and
            # each later answer for that to the command after. To the client it is a connection that has died.
            self.aborted(OSError(errno.EPROTO, ""))
        else:
            if self.tracker is not None:
                self.tracker.server_bytes(data)
            self.down += len(data)
            link.moved += len(data)
            link.put(frames.encode_data(data))
        return True

    def aborted(self, error: OSError, why: str = "") -> None:
        """Tell the client at once that the receiver is broken; it answers with END."""
        self.broken = Ending.UPSTREAM_RESET
        self.receiver_done = True
        self._held = b""
        if isinstance(error, ssl.SSLError):  # its number is OpenSSL's
            number, text = 0, f"TLS: {tls_reason(error)}"
        else:
            number = error.errno or 0
            text = why or os.strerror(number)
        self._link.queue(frames.encode(m.Aborted("upstream_failed", number, text[:200])))
