"""An SMTP session on a channel in which the proxy takes part (OPEN.dialogue): mode smtp for an agent's client.

The agent's MTA speaks SMTP; its bytes come in DATA frames, and the dialogue is served here as that of a SOCKS5 or PROXY
client is, by `doors.smtp`. What is the channel's: the answer to OPEN, the end.
"""

from __future__ import annotations

from time import monotonic

from proxy.doors.native.entrance import Guest
from proxy.doors.native.link import ClientGone, Link
from proxy.doors.smtp.books import Facts
from proxy.doors.smtp.direct import egress_for
from proxy.doors.smtp.egress import Line
from proxy.doors.smtp.visit import Visit
from proxy.egress import upstream
from proxy.errors import PeerError
from proxy.model import Ending, Endpoint
from proxy.net.alarm import TimeIsUp
from proxy.net.conversation import receive, send_all
from proxy.net.framed import FramedStream
from proxy.net.probing import Prober
from proxy.net.relay import Engine
from proxy.protocols.native import frames
from proxy.protocols.native import messages as m
from proxy.services import Door, Services


class Dialogue:
    """One of them.

    Args:
        request: has `dialogue`, and one destination.
        number: of the connection, for the log.
    """

    def __init__(
        self, services: Services, door: Door, guest: Guest, link: Link, instance: str, request: m.Open, number: int
    ) -> None:
        if len(request.destinations) != 1 or request.ehlo_name is not None or request.throttles:
            raise PeerError("OPEN with dialogue has one destination, no ehlo_name and no throttles")
        self._services = services
        self._door = door
        self._probes = request.probes
        self._link = link
        self._number = number
        self._started = monotonic()
        self._visit: Visit | None = None
        destination = request.destinations[0].endpoint
        client = guest.stream.socket
        source = upstream.source_for(services.access, instance, client, request.source_ip, destination)
        services.access.check_route(instance, source, destination)
        terms = services.modes.terms(instance, guest.client.host, source, destination)
        self._facts = Facts(number, guest.client, terms._replace(offer_starttls=False), self._started)
        weight = services.access.weight_of(instance)
        self._egress = egress_for(
            services, terms, instance or guest.client.host, weight, None, request.deadline_ms / 1000
        )

    @property
    def source(self) -> str:
        return self._facts.terms.source

    @property
    def doing(self) -> str:
        """How far it is; see `services.HostedDialogue`."""
        return self._visit.doing if self._visit is not None else "open"

    @property
    def destination(self) -> Endpoint:
        return self._facts.terms.destination

    def open(self) -> m.Opened:
        """Have a connection, parked or fresh, or go on without one for now.

        Raises:
            ProxyError: none. What else is thrown in while it waits: the client is gone.
        """
        try:
            self._first = self._egress.connect()
        finally:
            self._egress.close()
        reused = isinstance(self._first, Line) and self._first.reused
        return m.Opened(reused, m.Address(*self.destination), m.Local(*self._first.local))

    def give_up(self) -> None:
        """Nobody waits for the connection any more."""
        if isinstance(self._first, Line):
            self._egress.drop(self._first, False)

    def serve(self) -> None:
        """From OPENED to ENDED.

        Raises:
            ClientGone: the channel is over. PeerError: the client broke its protocol.
        """
        link, engine = self._link, self._services.engine
        stream = FramedStream(link.stream, link.decoder, frames.CHANNEL_FROM_CLIENT)
        prober = Prober(engine, stream.probe) if self._probes else None
        visit = Visit(self._services, self._door, stream, self._facts, self._egress, self._first, prober)
        self._visit = visit
        visit.serve(b"")
        self._visit = None
        if visit.breach is not None:
            raise visit.breach
        if visit.resets:
            raise ClientGone("the dialogue was broken off")
        await_end(engine, stream, self._services.settings.half_close_timeout)
        if not isinstance(stream.word, m.End):
            raise PeerError(f"{type(stream.word).__name__.upper()} in the middle of an SMTP session")
        link.look_again()
        link.send(frames.encode(m.Ended(False, "not_offered")))

    def cut(self, ending: Ending) -> None:
        """End it; must not wait."""
        if self._visit is not None:
            self._visit.cut(ending)


def await_end(engine: Engine, stream: FramedStream, seconds: float) -> None:
    """Say EOF and read on until the client says END, for so long at most: the sweep takes this for an OPEN in progress.

    Raises:
        ClientGone: it did not, or its connection broke. PeerError: it broke its protocol.
    """
    alarm = engine.alarms.start(seconds)
    try:
        if stream.word is None:
            stream.finish()
            send_all(engine, stream, b"")
            while receive(engine, stream):
                pass  # what crossed our last words
            _hear_word(engine, stream)
    except TimeIsUp as fired:
        if fired.alarm is not alarm:
            raise
        raise ClientGone("no END within half_close_timeout") from None
    except OSError:
        raise ClientGone("the connection broke") from None
    finally:
        alarm.cancel()


def _hear_word(engine: Engine, stream: FramedStream) -> None:
    """EOF came before END."""
    while stream.word is None:
        stream.next_session()
        receive(engine, stream)
