"""Errands of a dialogue of mode smtp: what it wants next is done here, waiting as long as it takes, and told to it."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Final

from gevent import Timeout

from proxy.doors.smtp.books import Books
from proxy.doors.smtp.egress import Line, TlsAtOnce
from proxy.doors.smtp.holding import Holding
from proxy.doors.smtp.wire import ClientGone, Wires
from proxy.errors import ProxyError, Throttled, let_go
from proxy.log import steps
from proxy.net.apart import for_clients
from proxy.net.conversation import shake_hands
from proxy.net.framed import FramedStream
from proxy.net.tls import Stream, TlsStream
from proxy.protocols.smtp.mediator import Mediator
from proxy.protocols.smtp.states import State, Want
from proxy.services import Services

#: A receiver that was out of sight for so long may have closed meanwhile.
_OUT_OF_SIGHT: Final = 0.5
_STEPS = {
    Want.GREETING: "waits for the receiver's greeting",
    Want.HELLO: "brings the session up",
    Want.LINE: "wants another connection to its receiver",
    Want.SLOT: "a message wants its slot",
}
#: Read of what it said meanwhile; how much there is makes no difference.
_UNASKED_SIZE: Final = 4096


def _nothing() -> float | None:
    """In the place of the ear of a client that is gone."""
    return None


class Errands:
    """Of one client, in its greenlet.

    Args:
        hear: see `Wires.begin_errand`.

    Attributes:
        stream: the client's; another one once TLS has begun.
        waited: others have had their turn during the last one.
    """

    def __init__(
        self,
        services: Services,
        stream: Stream | FramedStream,
        mediator: Mediator,
        wires: Wires,
        holding: Holding,
        books: Books,
        hear: Callable[[], float | None],
    ) -> None:
        self.stream = stream
        self.waited = False
        self._hear = hear
        self._services = services
        self._mediator = mediator
        self._wires = wires
        self._holding = holding
        self._books = books

    def over(self) -> None:
        """There will be none any more: who sent us on them can go."""
        self._hear = _nothing

    def run(self, want: Want) -> None:
        """Do what is wanted, and tell.

        Raises:
            ClientGone, OSError: the client is gone.
        """
        self.waited = False
        if want is Want.LEAVE:
            self._holding.leave()
            self._mediator.left()
        elif want is Want.START_TLS:
            self.waited = True
            self._start_tls()
        elif not self._at_hand(want):
            self._go(want)

    def _at_hand(self, want: Want) -> bool:
        """Whether it was said to the one who had the connection before; then it is told, and nothing need be had."""
        line, mediator = self._holding.line, self._mediator
        if line is None or not line.reused:
            return False
        if want is Want.GREETING and line.greeting is not None:
            mediator.greeted(line.greeting, True)
        elif want is Want.HELLO and line.knows(mediator.name or ""):
            self._brought_up(line)
        else:
            return False
        return True

    def _go(self, want: Want) -> None:
        """Go and have it.

        Raises:
            ClientGone, OSError: the client is gone.
        """
        started = monotonic()
        if steps.on:
            self._books.step(_STEPS[want])
        try:
            self._wires.begin_errand(self._hear)
            self._fetch(want, started)
            if steps.on:
                self._books.step(f"has it after {monotonic() - started:.3f} s")
        except ClientGone:
            raise
        except TlsAtOnce as unseen:
            self._books.step(f"passes on what it cannot see: {unseen}")
            self._holding.attach()
            self._mediator.pass_through()
        except ProxyError as failure:  # a name of its own: a compiler gives a variable one type
            self._books.step(f"has none: {failure}")
            self._failed(want, failure)
            let_go(failure)
        finally:
            self._wires.end_errand()
            if want is Want.SLOT:
                self._books.outcomes.waited += monotonic() - started

    def _failed(self, want: Want, error: ProxyError) -> None:
        mediator, holding = self._mediator, self._holding
        if want is not Want.SLOT:
            holding.lose()
            if mediator.state is not State.HELD and isinstance(error, Throttled):
                mediator.put_off(holding.egress.preview().hello)  # a place is for a MAIL to wait for
                return
            self._books.note_failure(error)
        mediator.failed(error)

    def _fetch(self, want: Want, started: float) -> None:
        """What only the egress has.

        Raises:
            ProxyError: it has not.
        """
        mediator, holding = self._mediator, self._holding
        egress, line, name = holding.egress, holding.line, mediator.name or ""
        if want is Want.SLOT:
            try:
                egress.slot(self._waits)
            finally:
                if holding.line is not None:  # nobody is to wait for one that is not lent any more
                    egress.keep(holding.line)
            if holding.line is not None:
                egress.redeem()  # a turn of the loop late at most
            self._hear_receiver()
            mediator.slot_granted(monotonic() - started >= _OUT_OF_SIGHT)
            return
        if want is Want.GREETING:
            if line is None:
                assert holding.preview is not None
                mediator.previewed(holding.preview.greeting, holding.preview.hello)
                return
            if line.greeting is None:
                holding.lose()
                self.waited = True
                try:
                    egress.greet(line)
                except TlsAtOnce:
                    holding.line = line
                    raise
                holding.line = line
            holding.attach()
            if (line.greeting or "")[:1] in ("4", "5"):
                self._books.refused_by = self._books.reply = line.greeting or ""
            mediator.greeted(line.greeting or "", line.reused)
            return
        if want is Want.HELLO:
            assert line is not None
            holding.lose()
            holding.line = line = egress.hello(line, name)
        else:
            holding.line = line = egress.renew(name, mediator.fresh, mediator.state is State.HELD)
        self.waited = not line.reused
        holding.attach()
        self._brought_up(line)

    def _brought_up(self, line: Line) -> None:
        """There is a session under the client's name."""
        mediator, books = self._mediator, self._books
        books.tls, books.seen = line.tls or books.tls, line.seen or books.seen
        in_time = not mediator.says_mail or self._holding.egress.redeem()
        mediator.attached_to(line.hello, line.left, True, line.reused, in_time)

    def _waits(self) -> None:
        """A slot is not there at once."""
        self.waited = True
        self._holding.lend_while_held()

    def _hear_receiver(self) -> None:
        """What it said while nobody asked it anything: later it would be taken for the answer to MAIL."""
        receiver = self._wires.receiver
        if receiver is None or not receiver.readable:
            return
        try:
            data = receiver.read(_UNASKED_SIZE, self.stream.turn, 0)
        except OSError:
            data = b""
        if data:
            self._mediator.receiver(data)
        elif data is not None:
            self._mediator.receiver_done()

    def _start_tls(self) -> None:
        """TLS with the client, under the deadline of a login.

        Raises:
            ClientGone: it failed.
        """
        wires, services = self._wires, self._services
        assert services.mta_context is not None
        stream = TlsStream(self.stream.socket, services.mta_context, server_side=True)
        timer = Timeout.start_new(services.settings.auth_timeout)
        try:
            while wires.client.blocked:
                wires.wait()
                wires.client.push()
            stream.turn = self.stream.turn
            shake_hands(services.engine, stream, for_clients())
        except OSError:
            raise ClientGone("TLS failed") from None
        except Timeout as fired:
            if fired is not timer:
                raise
            raise ClientGone("TLS took too long") from None
        finally:
            timer.close()
        self.stream = stream
        wires.secure(stream)
        self._mediator.tls_started()
