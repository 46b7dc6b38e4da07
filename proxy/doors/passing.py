"""A client of mode smtp that came to another worker than the one where connections to its receiver are held open.

Connections that are shared stand in one process, so their clients have to come there: by source and destination it is
clear which that is. The client's socket is passed, with all that was decided about it; whoever takes it over goes on
where the other one left off. In clear only: TLS cannot be passed.
"""

from __future__ import annotations

from proxy.doors.record import Visit
from proxy.doors.request import HANDSHAKES
from proxy.model import Connect, Endpoint, Handshake, Route
from proxy.net.relay import RawSocket
from proxy.protocols.seam import Passed
from proxy.services import Door, Services


def pass_on(visit: Visit, handshake: Handshake, source: str, destination: Endpoint) -> bool:
    """Give the client to the worker where it belongs; False: it belongs here, or there is no way to it now."""
    services = visit.services
    if services.neighbours is None or visit.stream is not None:
        return False
    passed = Passed(
        visit.door.configured,
        visit.client,
        visit.number,
        visit.started,
        visit.instance,
        visit.source_name,
        source,
        destination,
        handshake.protocol,
        handshake.requested(),
    )
    if not services.neighbours.pass_on(source, destination, passed, visit.socket.fileno()):
        return False
    visit.now("passed", "passed on to the worker where connections to this receiver are held open")
    services.engine.forget(visit.socket)
    if visit.upstream is not None:  # bound only: the other binds one of its own
        bound, visit.upstream = visit.upstream, None
        services.engine.close(bound)
        services.gauges.outgoing -= 1
    return True


def taken_over(services: Services, door: Door, sock: RawSocket, passed: Passed) -> tuple[Visit, Handshake]:
    """The record of a client that another worker has passed on, and the handshake in which it is answered."""
    visit = Visit(services, door, sock, passed.client, passed.number)
    visit.started = passed.started
    visit.instance, visit.source_name = passed.instance, passed.source_name
    visit.source, visit.destination = passed.source, passed.destination
    visit.handshake = handshake = HANDSHAKES[passed.protocol](visit)
    handshake.go_on(passed.requested, Connect(Route(passed.source, passed.destination)))
    return visit, handshake
