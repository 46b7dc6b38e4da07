"""One client of mode smtp, from the answer to its request to its closing log line: does what the dialogue wants.

Runs in the greenlet that `front` was served in. It moves bytes between the dialogue (`protocols.smtp.mediator`) and the
two sockets (`wire`), goes on the `errands` that the dialogue sends it on, and waits for nothing else. Within a message,
where nothing has to be had, the hub moves the bytes by itself (`_step`), and the greenlet sleeps until there is
something to decide. What is read from one side is bounded by what the other has not taken. The connection to a receiver
is `holding`'s; counters and log, `books`'s.
"""

from __future__ import annotations

from time import monotonic
from typing import Final

from proxy.doors.smtp.books import Books, Facts
from proxy.doors.smtp.egress import Egress, Line, Preview, TlsAtOnce
from proxy.doors.smtp.errands import Errands
from proxy.doors.smtp.holding import Holding
from proxy.doors.smtp.wire import ClientGone, End, Wires
from proxy.errors import PeerError, let_go
from proxy.log import lines as log
from proxy.model import Ending
from proxy.net.conversation import farewell, rest_for, send_all
from proxy.net.framed import FramedStream
from proxy.net.probing import Prober
from proxy.net.tls import Stream, TlsStream
from proxy.policy.idleness import Idleness
from proxy.protocols.smtp.fates import FateTracker
from proxy.protocols.smtp.mediator import Mediator
from proxy.protocols.smtp.states import State, Want
from proxy.protocols.smtp.tracker import Tracker
from proxy.services import Door, Services
from proxy.stats import Fate

#: Read of a message at a time, and of commands and replies, each of which is looked at.
_MESSAGE_SIZE: Final = 65536
_LINES_SIZE: Final = 4096
#: Work for so many bytes of those, as `policy.turns` counts.
_COST: Final = _LINES_SIZE // 16
#: Seconds for which a session or a MAIL's slot is waited for on behalf of a client that has closed its sending side and
#: said no message: who has died, or has given up, looks like this, and must not keep a place or a turn from others.
_HOPELESS: Final = 1.0


class Visit:
    """One client.

    Args:
        stream: the client's, its socket registered with the engine; stays the caller's to close.
        egress: where its receivers come from. first: what it had at its request.
        prober: finds out whether a client that is not read still lives; None: it takes no probes.
        missed: there may be bytes of the client of which no event will tell.

    Attributes:
        breach: why its channel is to be closed, if it has one.
    """

    def __init__(
        self,
        services: Services,
        door: Door,
        stream: Stream | FramedStream,
        facts: Facts,
        egress: Egress,
        first: Line | Preview,
        prober: Prober | None = None,
        missed: bool = True,
    ) -> None:
        terms, settings = facts.terms, services.settings
        starttls = terms.offer_starttls and services.mta_context is not None
        self._services = services
        self._facts = facts
        self._log_messages = settings.log_messages
        self._books = Books(services, door, facts, first)
        self._wires = Wires(services.engine, stream, missed)
        self._mediator = Mediator(services.host_name, starttls, terms.show_auth, self._judge)
        self._holding = Holding(services, egress, first, self._mediator, self._wires, self._books)
        self._errands = Errands(services, stream, self._mediator, self._wires, self._holding, self._books, self._hear)
        self._turn = stream.turn
        self._turn.key = facts.client.host
        self._may_speak_tls = isinstance(first, Line) and first.greeting is None  # to whom nobody has spoken SMTP yet
        self._client_done = False  # it has said FIN
        self._idleness = Idleness()
        self._prober = prober
        self._reset = False  # the client is to see RST, as the receiver sent it
        self.breach: PeerError | None = None

    # ---------------------------------------------------------------- the whole life

    def serve(self, early: bytes) -> None:
        """Serve until it is over; closes nothing of the client's. Never raises.

        Args:
            early: bytes that the client sent behind its request.
        """
        dialogues = self._services.instances.dialogues
        dialogues[self] = None
        try:
            line = self._holding.line
            if line is not None and line.greeting is not None:
                self._holding.attach()  # else it is the egress's, which reads the greeting
            leaving = self._services.instances.leaving
            if leaving is not None and not leaving.replaced:
                self._mediator.drain()
            if early:
                self._mediator.client(early)
            self._converse()
            self._part()
        except (ClientGone, OSError) as gone:
            ending = Ending.PROTOCOL_ERROR if self.breach is not None else Ending.CLIENT_RESET
            if self._wires.doom and isinstance(gone, ClientGone):
                ending = self._books.ending
            self._client_gone(ending)
            let_go(gone)
        except Exception as error:
            self._books.ending = Ending.INTERNAL_ERROR
            self._services.counters.internal_errors += 1
            log.internal_error(f"connection {self._facts.number} of {self._facts.client}", error)
            self._holding.leave()
            let_go(error)
        finally:
            self._holding.leave()
            del dialogues[self]
            self._books.close(self._mediator.refused)
            self._wires.over()
            self._errands.over()
            self._mediator.over()

    def goaway(self) -> None:
        """See `services.HostedDialogue`."""
        self._mediator.drain()
        self._wires.wake()

    def reloaded(self, services: Services) -> None:
        """See `services.HostedDialogue`."""
        self._holding.egress.reloaded(services)

    def cut(self, ending: Ending) -> None:
        """See `services.HostedDialogue`."""
        self._books.ending = ending
        self._reset = True
        self._wires.interrupt()

    @property
    def doing(self) -> str:
        """See `services.HostedDialogue`."""
        want, state = self._mediator.want, self._mediator.state
        return (want if want is not None else state).name.lower()

    def sweep(self, now: float) -> None:
        """See `services.HostedDialogue`: byte progress, as the relay counts it. Errands have their own deadlines."""
        busy = self._mediator.want is not None
        ending = self._idleness.over(self._moved, self._client_done, self._services.settings, now, busy)
        if ending is not None:
            self._books.ending = ending
            self._mediator.time_is_up()
            self._wires.wake()

    @property
    def _moved(self) -> int:
        client, receiver, books = self._wires.client, self._wires.receiver, self._books
        return client.moved + books.up + books.down + (receiver.moved if receiver is not None else 0)

    # ---------------------------------------------------------------- bytes

    def _converse(self) -> None:
        """Until the dialogue wants its end.

        Raises:
            ClientGone, OSError: the client is gone.
        """
        mediator, wires = self._mediator, self._wires
        while True:
            self._go_on()
            if mediator.want is Want.END:
                return
            if mediator.want is not None:
                self._errands.run(mediator.want)
                if self._errands.waited:
                    self._turn.begin(monotonic())
            elif self._turn.over:
                rest_for(self._turn)
            elif not wires.doom:
                self._wait()
            if wires.doom:
                raise ClientGone("to be cut off")

    def _wait(self) -> None:
        """Until something happens that is our business.

        Raises:
            ClientGone, OSError: the client is gone.
        """
        receiver = self._wires.receiver
        if self._prober is not None and receiver is not None and receiver.blocked:
            self._prober.wait(self._moved, self._await_step)
        else:
            self._await_step()
        self._turn.begin(monotonic())

    def _await_step(self) -> None:
        self._holding.wait(self._step)

    def _step(self) -> bool:
        """An event of either side, in the hub: within a message bytes move there. Whether the greenlet is needed.

        Raises:
            ClientGone, OSError: the client is gone.
        """
        mediator, turn, receiver = self._mediator, self._turn, self._wires.receiver
        turn.begin(monotonic())
        self._go_on()
        if mediator.want is not None or turn.left <= 0:
            return True
        if self._prober is not None and receiver is not None and receiver.blocked:
            return True
        return mediator.idle  # its connection is to be lent

    def _go_on(self) -> None:
        """Move bytes as long as there are any, and nothing else is wanted. Does not wait.

        Raises:
            ClientGone, OSError: the client is gone.
        """
        mediator, turn, wires = self._mediator, self._turn, self._wires
        while True:
            if mediator.to_receiver or mediator.to_client:
                self._send()
            if mediator.want is not None or turn.left <= 0 or not wires.busy or not self._move():
                return

    def _send(self) -> None:
        """Hand on what has piled up.

        Raises:
            OSError: the client is gone.
        """
        mediator, wires = self._mediator, self._wires
        pieces = mediator.to_receiver
        if pieces:
            mediator.to_receiver = []
            if wires.receiver is not None:
                data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                self._books.up += len(data)
                try:  # noqa: SIM105 - each write comes by here
                    wires.receiver.write(data)
                except OSError:  # reading it tells more
                    pass
        pieces = mediator.to_client
        if pieces and (self._reset or mediator.want is not Want.END):  # the last words go with the end, see `_part`
            mediator.to_client = []
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self._books.down += len(data)
            wires.client.write(data)

    def _move(self) -> bool:
        """Read from either side what the other takes; whether anything came.

        Raises:
            OSError: the client is gone.
        """
        mediator, client, receiver = self._mediator, self._wires.client, self._wires.receiver
        moved = False
        if client.blocked:
            client.push()
        if receiver is not None:
            if receiver.blocked:
                try:  # noqa: SIM105
                    receiver.push()
                except OSError:
                    pass
            if receiver.readable and not client.blocked:
                moved = self._read_receiver(receiver)
        if client.readable and mediator.want is None and mediator.reads_client:
            size = _MESSAGE_SIZE if mediator.state is State.DATA else _LINES_SIZE
            if receiver is None or not receiver.blocked:
                moved |= self._read_client(size)
        if client.broken and not moved:
            raise ClientGone("reset")
        return moved

    def _read_client(self, size: int) -> bool:
        try:
            data = self._wires.client.read(size, self._turn, _COST if size == _LINES_SIZE else 0)
        except PeerError as error:  # of the protocol that its bytes come in
            self.breach = error
            raise ClientGone("it has broken its protocol") from None
        if data is None:
            return False
        if data:
            self._mediator.client(data)
        else:
            self._client_done = True
            self._mediator.client_done()
        return True

    def _hear(self) -> float | None:
        """The client's bytes while an errand is under way, kept for later; see `Wires.begin_errand`. Does not wait.

        A client that has said all may well wait for its replies half-closed. As long as in mode tcp, or until it gets
        its slot or is refused; but not without a message or a QUIT.

        Raises:
            ClientGone, OSError: it is gone. TlsAtOnce.
        """
        mediator = self._mediator
        while self._wires.client.readable and mediator.hears_client and self._read_client(_LINES_SIZE):
            pass
        if self._may_speak_tls and mediator.begins_tls:
            raise TlsAtOnce("TLS in front of the greeting")
        if not self._client_done:
            return None
        if mediator.hopeless:
            return _HOPELESS
        return None if mediator.state is State.HELD else self._services.settings.half_close_timeout

    def _read_receiver(self, receiver: End) -> bool:
        mediator = self._mediator
        if mediator.death is not None:
            return False
        try:
            data = receiver.read(_LINES_SIZE, self._turn, _COST)
        except OSError:
            self._receiver_done(True)
            return True
        if data:
            mediator.receiver(data)
        elif data is not None:
            self._receiver_done(False)
        return data is not None

    def _receiver_done(self, reset: bool) -> None:
        mediator = self._mediator
        mediator.receiver_done()
        if mediator.want is Want.END:
            self._books.ending = Ending.UPSTREAM_RESET if reset else Ending.UPSTREAM_CLOSED
            self._reset = reset

    # ---------------------------------------------------------------- ends

    def _part(self) -> None:
        """Leave the receiver to others, and let the client read our last words."""
        self._holding.kept = False
        self._holding.leave()
        if self._books.ending is Ending.CLIENT_CLOSED and self._holding.kept:
            self._books.ending = Ending.KEPT
        client = self._wires.client
        client.unwatch()
        if self._reset:
            return
        words = b"".join(self._mediator.to_client)
        self._books.down += len(words)
        last, stream = client.take_unsent() + words, self._errands.stream
        if isinstance(stream, FramedStream):  # a channel goes on
            send_all(self._services.engine, stream, last)
        else:
            missed = client.readable or isinstance(stream, TlsStream)
            farewell(self._services.engine, stream, last, missed)

    def _client_gone(self, ending: Ending) -> None:
        self._books.ending = ending
        self._mediator.client_gone()
        self._wires.end_errand()
        self._wires.client.unwatch()
        self._holding.leave()

    @property
    def resets(self) -> bool:
        """Whether the client's connection is to be reset."""
        return self._reset

    # ---------------------------------------------------------------- what is seen of each connection

    def _judge(self) -> Tracker:
        """The judge of one, which also tells what is wanted to be told."""
        refused = self._refused if self._services.office.listens else None
        return FateTracker(self._tell_fate, refused) if self._log_messages else Tracker(refused)

    def _refused(self, reply: str) -> None:
        line = self._holding.line
        if line is not None:
            self._holding.egress.refused(line, reply)

    def _tell_fate(self, fate: Fate) -> None:
        line = self._holding.line
        self._books.tell_fate(fate, line.local if line is not None else None)
