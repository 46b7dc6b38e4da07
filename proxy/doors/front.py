"""The data path: one accepted connection from its first byte to its closing log line, whatever protocol it speaks.

`serve` runs in a pooled greenlet and reads top to bottom: greet (the handshake, under one deadline), connect (access
rules, bind, connect), answer, hand over to the relay. From then on the connection has no greenlet; `Visit.ended` is
called when it is over. What goes wrong on the way is one `ProxyError`, told to the client in its own protocol and
logged as one line.
"""

from __future__ import annotations

from typing import Any, Final

from gevent import sleep

from proxy.doors.carriage import Carriage
from proxy.doors.passing import pass_on, taken_over
from proxy.doors.presence import HALF_CLOSED
from proxy.doors.record import NO_SOCKET, Visit
from proxy.doors.request import greet
from proxy.doors.route import check_route, connect, named_source
from proxy.doors.smtp import visit as smtp
from proxy.doors.smtp.books import Facts
from proxy.doors.smtp.direct import egress_for
from proxy.doors.smtp.egress import Line
from proxy.doors.through import Through
from proxy.egress import upstream
from proxy.egress.via import Via
from proxy.errors import ClientNotAllowed, ProxyError, let_go
from proxy.model import Accepted, Ending, Endpoint, Handshake, Route
from proxy.net.conversation import send_all, watch_over
from proxy.net.relay import GONE, RawSocket, keep_alive
from proxy.net.tls import PlainStream, TlsStream
from proxy.protocols.seam import Passed
from proxy.services import Door, Services

#: Seconds between a SOCKS reply and a greeting that is at hand, since its connection was parked. A receiver's own takes
#: a round trip, and there are libraries (socks of npm, as Nodemailer uses it) that lose what they read in one go with
#: the reply.
_GREETING_AFTER: Final = 0.02
_YES: Final = Accepted()


def serve(
    services: Services, door: Door, sock: RawSocket, address: tuple[Any, ...], refusal: ProxyError | None = None
) -> None:
    """Serve one accepted connection; returns when it is relayed or over. Never raises.

    Args:
        refusal: the proxy is full or shuts down: do the handshake, then say this instead of connecting.
    """
    visit = Visit(services, door, sock, address)
    if not services.access.client_allowed(visit.client.host, door.protocol):
        visit.failed(ClientNotAllowed(f"{visit.client.host} is not in allow_from"))
        visit.leave()
        return
    try:
        _run(visit, refusal)
    except Exception as error:
        _fail(visit, error)
    finally:
        visit.leave()


def go_on(services: Services, door: Door, sock: RawSocket, passed: Passed) -> None:
    """Serve a client of mode smtp that another worker has passed on. Never raises."""
    visit, handshake = taken_over(services, door, sock, passed)
    try:
        watch_over(services.engine, sock)
        services.engine.watch(sock.fileno(), visit.miss)
        visit.missed = True
        _mediate(visit, handshake, passed.source, passed.destination)
    except Exception as error:
        _fail(visit, error)
    finally:
        visit.leave()


def _fail(visit: Visit, error: Exception) -> None:
    """What ended the way to a relay: told to the client; only counted, where the client is gone; or a bug of ours."""
    if isinstance(error, ProxyError):
        visit.failed(error)
        visit.tell(error)
    elif isinstance(error, OSError):
        visit.services.counters.refused.count("client_gone")
    else:
        visit.broken(error)
    let_go(error)


def _run(visit: Visit, refusal: ProxyError | None) -> None:
    """Handshake, connect, answer, hand over.

    Raises:
        ProxyError: to be told to the client.
        OSError: the client is gone.
    """
    request = greet(visit)
    handshake = visit.handshake
    if request is None or handshake is None:
        visit.services.counters.probes += 1
        visit.now("request", "gone without a request")
        return
    services, route = visit.services, request.route
    services.newcomers.leave(visit)
    visit.destination = route.destination
    visit.now("request", "asks for its receiver")
    if refusal is not None:
        raise refusal
    if services.via is not None:
        _go_through(visit, services.via, handshake, route)
        return
    source, destination = check_route(visit, route)
    modes = services.modes
    if modes.any_smtp and modes.is_smtp(visit.instance, visit.door.configured, destination):
        if not pass_on(visit, handshake, source, destination):
            _mediate(visit, handshake, source, destination)
    elif visit.stream is None:
        _hand_over(visit, handshake, connect(visit, source, destination))
    else:
        connect(visit, source, destination)
        _carry(visit, handshake, visit.stream)


def _go_through(visit: Visit, via: Via, handshake: Handshake, route: Route) -> None:
    """The same through another proxy, from the rules to the closing line.

    Raises:
        ProxyError: refused or failed. OSError: the client is gone.
    """
    services = visit.services
    destination = visit.destination = route.destination
    instance = visit.instance = visit.instance or visit.instance_of_address()
    dialled = upstream.local_endpoint(visit.socket).host
    wanted = route.source or named_source(visit, destination)
    source = wanted or services.access.default_source(instance, destination, dialled, visit.door.configured)
    visit.source = source or ""
    judged = source if services.access.has_source_lists(instance) else None
    services.access.check_route(instance, judged, destination)
    modes = services.modes
    dialogue = modes.any_smtp and modes.is_smtp(instance, visit.door.configured, destination)
    within = visit.answer_within()
    through = Through(services, via, visit.socket, instance, route, source, dialogue, within)
    visit.now("connect", "asks the other proxy")
    channel, opened = through.open(handshake.trailing, visit.has_said_more if visit.stream is not None else None)
    visit.source = opened.local.host
    visit.handshake = None

    def answered() -> None:
        local = opened.local.endpoint if handshake.tells_local else None
        visit.write(handshake.send(Accepted(local)))

    services.gauges.outgoing += 1
    services.counters.fresh += 1
    visit.hosted = through
    visit.now("relay", f"goes through the other proxy, from {opened.local.endpoint}")
    try:
        ending = through.carry(channel, visit.client_stream, handshake.trailing, answered)
    except BaseException:
        services.gauges.outgoing -= 1
        raise
    services.engine.close(visit.socket, reset=not ending.is_clean)
    visit.relayed = True
    visit.ended(ending, through.up, through.down)


def _hand_over(visit: Visit, handshake: Handshake, upstream_events: int) -> None:
    """Say yes and let the relay take both sockets."""
    services, client, receiver = visit.services, visit.socket, visit.upstream
    assert receiver is not None
    reply = Accepted(upstream.local_endpoint(receiver)) if handshake.tells_local else _YES
    answer = handshake.send(reply)
    if answer and visit.write(answer):
        upstream_events = GONE  # while we waited, edges of both sides went by
    early = handshake.trailing
    visit.now("relay", "connected: relayed from now on")
    visit.relayed = True
    visit.handshake = None
    visit.socket, visit.upstream = NO_SOCKET, None  # the record lives as long as the relay, and there may be many
    services.counters.fresh += 1
    timeout = services.settings.idle_timeout
    services.engine.join(client, receiver, visit, timeout, early, True, visit.missed, upstream_events)


def _carry(visit: Visit, handshake: Handshake, client: TlsStream) -> None:
    """Say yes and carry the bytes, since the relay takes raw sockets only; up to the closing line.

    Raises:
        OSError: the client is gone.
    """
    services, receiver = visit.services, visit.upstream
    assert receiver is not None
    reply = Accepted(upstream.local_endpoint(receiver)) if handshake.tells_local else _YES
    answer, early = handshake.send(reply), handshake.trailing
    visit.handshake = None
    services.counters.fresh += 1
    keep_alive(receiver, services.settings.idle_timeout)
    carriage = Carriage(services, visit.instance)
    visit.hosted = carriage
    visit.now("relay", f"is carried, from {upstream.local_endpoint(receiver)}")
    ending = carriage.run(
        client, PlainStream(receiver), early, lambda: send_all(services.engine, client, answer), visit.heard
    )
    if ending is Ending.CLIENT_RESET and carriage.delivered:
        ending = Ending.UPSTREAM_CLOSED  # it closed, and our close_notify was not read: that looks like a reset
    visit.upstream = None
    visit.relayed = True
    services.engine.close(visit.socket, reset=not ending.is_clean)
    services.engine.close(receiver, reset=not ending.is_clean)
    visit.ended(ending, carriage.up, carriage.down)


def _mediate(visit: Visit, handshake: Handshake, source: str, destination: Endpoint) -> None:
    """Mode smtp: have a connection, say yes, and take part in the dialogue until it is over.

    Raises:
        ProxyError: refused or failed.
        OSError: the client is gone.
    """
    services, instance = visit.services, visit.instance
    terms = services.modes.terms(instance, visit.client.host, source, destination)
    bound, visit.upstream = visit.upstream, None
    if bound is not None:
        services.gauges.outgoing -= 1  # it is counted by who has it
    owner, weight = instance or visit.client.host, services.access.weight_of(instance)
    egress = egress_for(services, terms, owner, weight, bound, visit.answer_within())
    visit.source = source
    visit.now("connect", "wants a connection, held open or new")
    try:
        with visit.while_client_stays(HALF_CLOSED):
            first = egress.connect()
    finally:
        egress.close()
    try:
        answer = handshake.send(Accepted(first.local) if handshake.tells_local else _YES)
        visit.write(answer)
        if answer and first.greeting is not None:
            sleep(_GREETING_AFTER)
    except BaseException:
        if isinstance(first, Line):
            egress.drop(first, False)
        raise
    visit.handshake = None
    if visit.stream is not None:
        terms = terms._replace(offer_starttls=False)
    facts = Facts(visit.number, visit.client, terms, visit.started)
    missed = visit.missed or visit.stream is not None
    mediated = smtp.Visit(services, visit.door, visit.client_stream, facts, egress, first, missed=missed)
    visit.hosted = mediated
    mediated.serve(handshake.trailing)
    if mediated.resets:
        services.engine.close(visit.socket, True)
