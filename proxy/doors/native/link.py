"""The client's end of a channel: frames in and out, waiting, and how others interrupt the greenlet that serves it.

What the frames mean is not known here. The rules of the relay hold: try, then wait; an edge is only a hint. What the
channel does for its client, and for the receiver behind it, is counted against one turn; who waits with a turn that is
over rests instead.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from time import monotonic
from typing import Any

from gevent import get_hub, getcurrent

from proxy.doors.native.entrance import Guest
from proxy.errors import PeerError, ProxyError
from proxy.model import Ending
from proxy.net.alarm import TimeIsUp
from proxy.net.conversation import farewell, rest_for
from proxy.net.peer import has_gone, holds_back
from proxy.net.relay import GONE, HEARD, UNSURE, Engine, Shortcut
from proxy.net.turns import TurnOver
from proxy.policy.turns import READ
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m

_READ_SIZE = 65536
_RESET = select.EPOLLERR | select.EPOLLHUP
_PROBE = frames.encode(m.Probe())

#: Handles epoll events in the hub; whether the greenlet has to look around.
Step = Callable[[int], bool]


class ClientGone(PeerError):
    """The client's end of the channel is closed or broken, or is to be closed without a word."""

    code = "client_gone"


class Link:
    """Belongs to the greenlet that makes it.

    Attributes:
        moved: grows with each byte that came or went, receivers' included: what idleness is measured by.
        doom: why all of it ends now; set by `interrupt`.
        goes_at: until when what runs may go on, of which the client is to be told before the next OPEN at the latest;
            None: there is no end in sight. goes_why: the reason, for the client.
        blocked: the client has not taken all that it was sent.
        turn: what may be done for this channel before others come.
    """

    def __init__(self, engine: Engine, guest: Guest) -> None:
        self.engine = engine
        self.stream = guest.stream
        self.fd = guest.stream.socket.fileno()
        self.turn = guest.stream.turn
        self.decoder = guest.handshake.decoder
        self.moved = 0
        self.doom: Ending | None = None
        self.goes_at: float | None = None
        self.goes_why = ""
        self.goes_code = ""
        self.blocked = False
        self._told_goaway = False
        self._unsent = b""  # for the client, not yet taken by the stream
        self._greenlet: Any = getcurrent()
        self.readable = True  # there may be something to receive
        self._missed = True  # events may have gone by that nobody acted upon
        self._waiting = False
        self._cancellable = False
        self._refusal: ProxyError | None = None
        self._reset = False
        self._raised: BaseException | None = None  # in the hub, by a step; for our greenlet

    # ---------------------------------------------------------------- in

    def receive(self) -> bool:
        """Read once, for the decoder; False: there is nothing now, or the turn is over.

        Raises:
            ClientGone: closed or broken.
        """
        return self.turn.spend(READ, monotonic()) and self._read()

    @property
    def may_hold(self) -> bool:
        """Whether the socket may have something to read of which no event will tell any more."""
        return self.readable or self._missed

    def has_spoken(self) -> bool:
        """Whether more has come from the client than was acted upon; read once to see.

        Raises:
            ClientGone: closed or broken.
        """
        return self.decoder.unread or (self.readable and self._read())

    def _read(self) -> bool:
        try:
            data = self.stream.recv(_READ_SIZE)
        except TurnOver:
            self.turn.end()
            return False
        except BlockingIOError:
            self.readable = self._missed = False
            return False
        except OSError:
            raise self.broken() from None
        if not data:
            raise self.closed()
        self.readable = self._missed or not self.stream.drained
        self.blocked = self.blocked or self.stream.unsent  # TLS has something to say of its own
        self.moved += len(data)
        self.decoder.receive(data)
        return True

    def broken(self) -> ClientGone:
        """Why nothing more can be read or said."""
        return ClientGone("the connection broke")

    def closed(self) -> ClientGone:
        """Why nothing more comes."""
        return ClientGone("the client closed")

    # ---------------------------------------------------------------- out

    def send(self, data: bytes) -> None:
        """Send whole frames and wait until they are gone.

        Raises:
            ClientGone.
        """
        self._unsent += data
        while not self.flush():
            self.wait()

    def answer(self, data: bytes) -> None:
        """The same, unless the client has said more already, and will be answered soon: then in one piece with that.

        Raises:
            ClientGone.
        """
        if self.decoder.unread and not self.blocked:
            self.put(data)
        else:
            self.send(data)

    def throw(self, _up: TimeIsUp) -> None:
        """The next answer takes its time: what was to go with it goes now. In the hub."""
        try:
            self.flush()
        except ClientGone:
            self._cancel()

    @property
    def holds(self) -> int:
        """Bytes of frames that are still here."""
        return len(self._unsent)

    def put(self, data: bytes) -> None:
        """Whole frames to be sent by the next `flush`, which must be soon."""
        self._unsent += data

    def queue(self, data: bytes) -> bool:
        """Send whole frames without waiting; whether all is gone."""
        self._unsent += data
        return self.flush()

    def flush(self) -> bool:
        """Hand on what is held back; whether all is gone.

        Raises:
            ClientGone.
        """
        stream = self.stream
        self.blocked = True
        try:
            while self._unsent:
                sent = stream.send(self._unsent)
                self._unsent = self._unsent[sent:]
                self.moved += sent
            if stream.unsent:
                stream.flush()
            self.blocked = stream.unsent
        except BlockingIOError:
            pass
        except OSError:
            raise self.broken() from None
        return not self.blocked

    def hold(self, data: bytes) -> None:
        """The end of whole frames that the client did not take; nothing else is held."""
        self._unsent = data
        self.blocked = True

    def probe(self) -> None:
        """Say PROBE, which no living client minds. A dead one's kernel answers it with a reset.

        Not while the client takes nothing: what it was sent already tells as much, and probes do not pile up.

        Raises:
            ClientGone.
        """
        if not self.blocked and not holds_back(self.stream.socket):
            moved = self.moved
            self.queue(_PROBE)
            self.moved = moved  # nothing has: idleness goes on

    def tell_goaway(self) -> None:
        """Say GOAWAY, if there is one to be said; once."""
        if self.goes_at is not None and not self._told_goaway:
            self._told_goaway = True
            left = max(0.0, self.goes_at - monotonic())  # it may have taken a while until it could be said
            self.queue(frames.encode(m.Goaway(int(left * 1000), self.goes_why, self.goes_code)))

    def part(self, error: ProxyError | None = None) -> None:
        """The last word, behind what is held back, and a moment for the client to read it."""
        last = frames.error_frame(error) if error is not None else b""
        farewell(self.engine, self.stream, self._unsent + last)

    # ---------------------------------------------------------------- waiting

    @property
    def waits(self) -> bool:
        """Whether its greenlet sleeps until an event, or a word from somebody else."""
        return self._waiting

    def saw_all(self) -> None:
        """A read has found nothing: there is nothing more, and an event will tell of what comes."""
        self.readable = self._missed = False

    def look_again(self) -> None:
        """Events went by while nobody looked: only a read that finds nothing proves that there is nothing."""
        self.readable = self._missed = True

    def wait(
        self,
        other: int = -1,
        client_step: Step | None = None,
        other_step: Step | None = None,
        shortcut: Shortcut | None = None,
        look: bool = False,
    ) -> None:
        """Until the client's socket or the other descriptor has an event, or somebody wakes us; or until the next turn.

        With steps, events are handled as they come, in the hub, without our greenlet: a step is called with the events,
        must not wait, and says whether the greenlet has to look around, as it has to at an end (`relay.GONE`). What it
        raises is raised here. A shortcut has each event first, and leaves to the steps what is not the usual;
        with `look` it reads both sides before, and there is no waiting for what it finds and may not handle.

        Raises:
            ClientGone: we are told to end, or the client has reset the connection, which must not have to wait until
                the receiver takes bytes again.
        """
        if self.turn.over:
            self.rest()
        else:
            self._wait(other, client_step, other_step, shortcut, look)
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised
        if self.doom is not None or self._reset:
            raise ClientGone("reset, or to be cut off")

    def rest(self) -> None:
        """Let others run until it is our turn again. Events that come meanwhile are not seen."""
        rest_for(self.turn)
        self.look_again()

    def pause(self, seconds: float) -> None:
        """Do nothing for so long, whatever the client sends.

        Raises:
            ClientGone: as `wait`.
        """
        over = False

        def end() -> None:
            nonlocal over
            over = True
            self._resume()

        timer = get_hub().loop.timer(seconds)
        timer.start(end)
        try:
            while not over:
                self.wait()
        finally:
            timer.close()

    def _wait(
        self, other: int, client_step: Step | None, other_step: Step | None, shortcut: Shortcut | None, look: bool
    ) -> None:
        engine, fd = self.engine, self.fd

        def client_event(events: int) -> None:
            self.turn.begin(monotonic())
            self._note(events)
            self._handle(client_step, events)

        def other_event(events: int) -> None:
            self.turn.begin(monotonic())
            self._handle(other_step, events)

        if shortcut is None:
            engine.watch(fd, client_event)
            engine.watch(other, other_event)
        else:
            shortcut.begin(client_event, other_event)
            engine.watch(fd, shortcut.client_event)
            engine.watch(other, shortcut.receiver_event)
        try:
            if shortcut is not None and look and shortcut.look():
                return
            self._waiting = True
            if self.doom is None:
                get_hub().switch()
        finally:
            self._waiting = False
            engine.watch(fd, None)
            engine.watch(other, None)
            if shortcut is not None:
                shortcut.end()

    def fail(self, error: BaseException) -> None:
        """What went wrong in the hub is raised in our greenlet, which waits."""
        self._raised = error
        self._greenlet.switch()

    def _handle(self, step: Step | None, events: int) -> None:
        try:
            if step is not None and not step(events):
                return
        except BaseException as error:
            self._raised = error
        self._greenlet.switch()

    def _note(self, events: int) -> None:
        """What an event says of what there is to read. That there is room for more to be sent says nothing of it."""
        if events & HEARD:
            self.readable = True
        if events & GONE:  # no other event will tell of it
            self._note_end(events)
        elif events & UNSURE:
            self._missed = True

    def _note_end(self, events: int) -> None:
        """The client has closed, at least its sending side."""
        self._missed = True
        self._reset = self._reset or bool(events & _RESET)

    def wake(self) -> None:
        """Let the greenlet look around; must not wait."""
        get_hub().loop.run_callback(self._resume)

    def _resume(self) -> None:
        if self._waiting:  # by now it may wait for something else
            self._greenlet.switch()

    def interrupt(self, ending: Ending, refusal: ProxyError | None = None) -> None:
        """End whatever is in progress; must not wait. `refusal`: what an OPEN that is being served is answered."""
        self.doom = ending
        self._refusal = refusal
        get_hub().loop.run_callback(self._cancel)
        self.wake()

    # ---------------------------------------------------------------- while an OPEN is served

    def watch_client(self) -> None:
        """Cancel with ClientGone whatever our greenlet waits for, when the client goes away.

        Raises:
            ClientGone: it is gone already: no edge would tell it again.
        """
        self._cancellable = True
        self.engine.watch(self.fd, self._opening_event)
        if self._missed and has_gone(self.stream.socket):
            raise ClientGone("the client closed")

    def unwatch_client(self) -> None:
        self._cancellable = False
        self.engine.watch(self.fd, None)

    def _opening_event(self, events: int) -> None:
        self._note(events)
        if events & GONE:
            self._cancel()

    def _cancel(self) -> None:
        if self._cancellable:
            self._cancellable = False
            self._greenlet.throw(self._refusal or ClientGone("the client closed"))
