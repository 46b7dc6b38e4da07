"""One client of mode smtp, from the answer to its request to its closing log line: does what the dialogue wants.

Runs in the greenlet that `front` was served in. It moves bytes between the dialogue (`protocols.smtp.mediator`) and the
two sockets (`wire`), goes on the errands that the dialogue sends it on, and waits for nothing else. What is read from
one side is bounded by what the other has not taken.
"""

from __future__ import annotations

import contextlib
from time import monotonic
from typing import NamedTuple

from gevent import Timeout, get_hub

from proxy.doors.smtp.egress import Egress, Line
from proxy.doors.smtp.wire import ClientGone, Wires
from proxy.errors import ProxyError
from proxy.log import lines as log
from proxy.model import Discard, Ending, Endpoint
from proxy.net.alarm import Alarm
from proxy.net.conversation import farewell, rest_for, send_all, shake_hands
from proxy.net.framed import FramedStream
from proxy.net.tls import Stream, TlsStream
from proxy.policy.idleness import Idleness
from proxy.policy.modes import Terms
from proxy.protocols.smtp.fates import FateTracker
from proxy.protocols.smtp.mediator import Mediator
from proxy.protocols.smtp.states import State, Want
from proxy.protocols.smtp.tracker import Tracker
from proxy.services import Door, Services
from proxy.stats import Fate, Outcomes

#: Read of a message at a time, and of commands and replies, each of which is looked at.
_MESSAGE_SIZE = 65536
_LINES_SIZE = 4096
#: Work for some bytes of those, as `policy.turns` counts.
_BYTES_A_UNIT = 16
#: A client that is silent for so long between two messages lets others have its connection.
_SILENCE = 1.0
#: A receiver that was out of sight for so long may have closed meanwhile.
_OUT_OF_SIGHT = 0.5
#: Of a dialogue: nothing that only the client's own session could be the reason for.
_DIRTY = frozenset({Discard.OUTSTANDING, Discard.IN_DATA})


class Facts(NamedTuple):
    """What the log says of a client; `started` on the monotonic clock."""

    number: int
    client: Endpoint
    terms: Terms
    started: float


class Visit:
    """One client.

    Args:
        stream: the client's, its socket registered with the engine; stays the caller's to close.
        egress: where its receivers come from. line: the first of them.
    """

    def __init__(
        self, services: Services, door: Door, stream: Stream | FramedStream, facts: Facts, egress: Egress, line: Line
    ) -> None:
        self._services = services
        self._door = door
        self._facts = facts
        self._egress = egress
        self._line: Line | None = line
        self._stream = stream
        self._wires = Wires(services.engine, self._stream)
        terms = facts.terms
        starttls = terms.offer_starttls and services.mta_context is not None
        judge = Tracker if not services.settings.log_messages else self._fate_tracker
        self._mediator = Mediator(services.host_name, starttls, terms.show_auth, judge)
        self._turn = self._stream.turn
        self._turn.key = facts.client.host
        self._outcomes = Outcomes()
        self._up = self._down = 0
        self._reused = line.reused
        self._tls = line.tls
        self._ending = Ending.CLIENT_CLOSED
        self._kept = False
        self._taken = False
        self._lent = False
        self._client_done = False  # it has said FIN
        self._idleness = Idleness()
        self._reset = False  # the client is to see RST, as the receiver sent it

    # ---------------------------------------------------------------- the whole life

    def serve(self, early: bytes) -> None:
        """Serve until it is over; closes nothing of the client's. Never raises.

        Args:
            early: bytes that the client sent behind its request.
        """
        dialogues = self._services.instances.dialogues
        dialogues[self] = None
        try:
            self._attach()
            if early:
                self._mediator.client(early)
            self._converse()
            self._part()
        except ClientGone:
            self._client_gone(self._ending if self._wires.doom else Ending.CLIENT_RESET)
        except OSError:
            self._client_gone(Ending.CLIENT_RESET)
        except Exception as error:
            self._ending = Ending.INTERNAL_ERROR
            self._services.counters.internal_errors += 1
            log.internal_error(f"connection {self._facts.number} of {self._facts.client}", error)
            self._leave()
        finally:
            self._leave()
            del dialogues[self]
            self._tell()

    def goaway(self) -> None:
        """See `services.HostedDialogue`."""
        self._mediator.drain()
        self._wires.wake()

    def reloaded(self, services: Services) -> None:
        """See `services.HostedDialogue`."""
        self._egress.reloaded(services)

    def cut(self, ending: Ending) -> None:
        """See `services.HostedDialogue`."""
        self._ending = ending
        self._reset = True
        self._wires.interrupt()

    def sweep(self, now: float) -> None:
        """See `services.HostedDialogue`: byte progress, as the relay counts it. Errands have their own deadlines."""
        busy = self._mediator.want is not None
        ending = self._idleness.over(self._moved, self._client_done, self._services.settings, now, busy)
        if ending is not None:
            self._ending = ending
            self._mediator.time_is_up()
            self._wires.wake()

    @property
    def _moved(self) -> int:
        receiver = self._wires.receiver
        return self._wires.client.moved + self._up + self._down + (receiver.moved if receiver is not None else 0)

    # ---------------------------------------------------------------- bytes

    def _converse(self) -> None:
        """Until the dialogue wants its end.

        Raises:
            ClientGone, OSError: the client is gone.
        """
        mediator = self._mediator
        while True:
            self._send()
            if mediator.want is Want.END:
                return
            if mediator.want is not None:
                self._errand(mediator.want)
            elif self._turn.over:
                rest_for(self._turn)
            elif not self._move() and not self._turn.over:
                self._wait()
                self._turn.begin(monotonic())
            if self._wires.doom:
                raise ClientGone("to be cut off")

    def _send(self) -> None:
        """Hand on what has piled up.

        Raises:
            OSError: the client is gone.
        """
        mediator, wires = self._mediator, self._wires
        if mediator.to_receiver:
            pieces, mediator.to_receiver = mediator.to_receiver, []
            if wires.receiver is not None:
                self._up += sum(map(len, pieces))
                with contextlib.suppress(OSError):  # reading it tells more
                    wires.receiver.write(pieces)
        if mediator.to_client:
            pieces, mediator.to_client = mediator.to_client, []
            self._down += sum(map(len, pieces))
            wires.client.write(pieces)

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
                with contextlib.suppress(OSError):
                    receiver.push()
            if receiver.readable and not client.blocked:
                moved = self._read_receiver()
        if mediator.want is None and mediator.reads_client and client.readable:
            blocked = receiver is not None and receiver.blocked
            size = _MESSAGE_SIZE if mediator.state is State.DATA else _LINES_SIZE
            if not blocked and (data := client.read(size, self._turn)) is not None:
                moved = True
                self._spend(size, data)
                if data:
                    mediator.client(data)
                else:
                    self._client_done = True
                    mediator.client_done()
        if client.broken and not moved:
            raise ClientGone("reset")
        return moved

    def _read_receiver(self) -> bool:
        mediator, receiver = self._mediator, self._wires.receiver
        assert receiver is not None
        if mediator.death is not None:
            return False
        try:
            data = receiver.read(_LINES_SIZE, self._turn)
        except OSError:
            self._receiver_done(True)
            return True
        if data:
            self._spend(_LINES_SIZE, data)
            mediator.receiver(data)
        elif data is not None:
            self._receiver_done(False)
        return data is not None

    def _spend(self, size: int, data: bytes) -> None:
        if size == _LINES_SIZE:
            self._turn.spend(len(data) // _BYTES_A_UNIT, monotonic())

    def _receiver_done(self, reset: bool) -> None:
        mediator = self._mediator
        mediator.receiver_done()
        if mediator.want is Want.END:
            self._ending = Ending.UPSTREAM_RESET if reset else Ending.UPSTREAM_CLOSED
            self._reset = reset

    def _wait(self) -> None:
        """Until something happens. An idle client's connection may meanwhile be taken by who waits for one, and is for
        all after a while."""
        mediator, line = self._mediator, self._line
        if line is None or not mediator.idle:
            self._wires.wait()
            return
        self._egress.lend(line, self._take)
        self._lent = True
        alarm = self._services.engine.alarms.start(_SILENCE) if line.shared else None
        try:
            if not self._taken:
                self._wires.wait()
        except Alarm as fired:
            if fired is not alarm:
                raise
            self._taken = True
        finally:
            self._lent = False
            if alarm is not None:
                alarm.cancel()
            self._egress.keep(line)
        if self._taken:
            self._taken = False
            if not self._wires.client.readable:
                mediator.taken()

    def _take(self) -> None:
        self._taken = True
        if self._lent:
            self._wires.wake()

    # ---------------------------------------------------------------- errands

    def _errand(self, want: Want) -> None:
        """Do what is wanted, and tell.

        Raises:
            ClientGone, OSError: the client is gone.
        """
        if want is Want.LEAVE:
            self._leave()
            self._mediator.left()
            return
        if want is Want.START_TLS:
            self._start_tls()
            return
        started = monotonic()
        self._wires.begin_errand()
        try:
            self._fetch(want, started)
        except ClientGone:
            raise
        except ProxyError as error:
            if want is not Want.SLOT:
                self._wires.detach()
                self._line = None
                self._note_failure(error)
            self._mediator.failed(error)
        finally:
            self._wires.end_errand()
            self._outcomes.waited += monotonic() - started if want is Want.SLOT else 0.0

    def _fetch(self, want: Want, started: float) -> None:
        """What only the egress has.

        Raises:
            ProxyError: it has not.
        """
        mediator, egress, line, name = self._mediator, self._egress, self._line, self._mediator.name or ""
        if want is Want.SLOT:
            egress.slot(self._lend_while_held)
            if self._line is not None:
                egress.keep(self._line)
            mediator.slot_granted(monotonic() - started >= _OUT_OF_SIGHT)
            return
        if want is Want.GREETING:
            assert line is not None
            if line.greeting is None:
                egress.greet(line)
            self._attach()
            mediator.greeted(line.greeting or "", line.reused)
            return
        if want is Want.HELLO:
            assert line is not None
            self._wires.detach()
            self._line = None
            self._line = line = egress.hello(line, name)
        else:
            self._line = line = egress.renew(name, mediator.fresh)
        self._tls = line.tls or self._tls
        self._attach()
        mediator.attached_to(line.hello, line.left, True, line.reused)

    def _lend_while_held(self) -> None:
        """A MAIL waits for its slot: meanwhile its connection, and its place, may be somebody else's."""
        if self._line is not None and self._mediator.may_lend:
            self._egress.lend(self._line, self._give_soon)

    def _give_soon(self) -> None:
        get_hub().loop.run_callback(self._give_while_held)

    def _give_while_held(self) -> None:
        if self._mediator.want is Want.SLOT and self._line is not None:  # else the slot was faster
            self._leave()
            self._mediator.left()

    def _attach(self) -> None:
        assert self._line is not None
        self._wires.attach(self._line.stream)

    def _start_tls(self) -> None:
        """TLS with the client, under the deadline of a login.

        Raises:
            ClientGone: it failed.
        """
        wires, services = self._wires, self._services
        assert services.mta_context is not None
        stream = TlsStream(self._stream.socket, services.mta_context, server_side=True)
        timer = Timeout.start_new(services.settings.auth_timeout)
        try:
            while wires.client.blocked:
                wires.wait()
                wires.client.push()
            stream.turn = self._turn
            shake_hands(services.engine, stream)
        except OSError:
            raise ClientGone("TLS failed") from None
        except Timeout as fired:
            if fired is not timer:
                raise
            raise ClientGone("TLS took too long") from None
        finally:
            timer.close()
        self._stream = stream
        wires.secure(stream)
        self._mediator.tls_started()

    def _note_failure(self, error: ProxyError) -> None:
        """A line of its own: the client goes on, or is told by SMTP."""
        counters, terms = self._services.counters, self._facts.terms
        counters.note(error)
        log.refused(
            self._facts.number,
            terms.instance,
            self._door.protocol,
            self._facts.client,
            terms.source,
            terms.destination,
            monotonic() - self._facts.started,
            error,
        )

    def _fate_tracker(self) -> Tracker:
        return FateTracker(self._tell_fate)

    def _tell_fate(self, fate: Fate) -> None:
        """The line of one message; called in the middle of reading its reply."""
        facts, line = self._facts, self._line
        log.message(
            facts.number,
            facts.terms.instance,
            facts.terms.source,
            facts.terms.destination,
            line.local if line is not None else None,
            self._tls,
            fate,
        )

    # ---------------------------------------------------------------- ends

    def _leave(self) -> None:
        """Part from the receiver, as the dialogue has left it; a second time does nothing."""
        line, self._line = self._line, None
        if line is None:
            return
        mediator = self._mediator
        tracker, verdict = mediator.tracker, mediator.verdict
        self._wires.detach()
        line.messages, line.errors = tracker.mails, tracker.errors
        self._count(tracker)
        if mediator.death or verdict in _DIRTY or mediator.state is State.RAW or line.greeting is None:
            if line.shared and verdict is not None:
                self._services.keeper.decline(verdict)
            self._egress.drop(line, verdict in _DIRTY)
        elif verdict is None and line.shared and line.hello:
            self._kept = True
            self._egress.give(line)
        else:
            self._egress.part(line, verdict or Discard.NOT_OFFERED)

    def _count(self, tracker: Tracker) -> None:
        mails = tracker.mails - self._mediator.in_vain
        self._outcomes.add(mails, tracker.accepted, tracker.deferred, tracker.rejected)
        self._services.counters.messages += mails

    def _part(self) -> None:
        """Leave the receiver to others, and let the client read our last words."""
        self._kept = False
        self._leave()
        if self._ending is Ending.CLIENT_CLOSED and self._kept:
            self._ending = Ending.KEPT
        client = self._wires.client
        client.unwatch()
        if self._reset:
            return
        last = client.take_unsent()
        if isinstance(self._stream, FramedStream):  # a channel goes on
            send_all(self._services.engine, self._stream, last)
        else:
            farewell(self._services.engine, self._stream, last)

    def _client_gone(self, ending: Ending) -> None:
        self._ending = ending
        self._mediator.client_gone()
        self._wires.end_errand()
        self._wires.client.unwatch()
        self._leave()

    def _tell(self) -> None:
        """Count and log."""
        services, facts, terms = self._services, self._facts, self._facts.terms
        outcomes, counters = self._outcomes, services.counters
        outcomes.deferred += self._mediator.refused
        counters.bytes_up += self._up
        counters.bytes_down += self._down
        counters.ended.count(self._ending)
        counters.count_outcomes(terms.instance, terms.source, outcomes)
        log.connection(
            facts.number,
            terms.instance,
            self._door.protocol,
            facts.client,
            terms.source,
            terms.destination,
            self._reused,
            self._tls,
            self._up,
            self._down,
            monotonic() - facts.started,
            self._ending,
            outcomes,
        )

    @property
    def resets(self) -> bool:
        """Whether the client's connection is to be reset."""
        return self._reset
