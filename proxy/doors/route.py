"""Where a connection of a standard door leaves from and goes to: chosen, allowed, bound, and connected."""

from __future__ import annotations

from time import monotonic

from proxy.doors.presence import HALF_CLOSED
from proxy.doors.record import Visit
from proxy.egress import upstream
from proxy.egress.asking import wait_for_place
from proxy.egress.office import Applicant
from proxy.errors import Overloaded, PeerError
from proxy.model import Endpoint, Route
from proxy.net.relay import RawSocket
from proxy.policy.access import place_within


def check_route(visit: Visit, route: Route) -> tuple[str, Endpoint]:
    """Source and destination, chosen and allowed.

    Raises:
        ProxyError: refused.
    """
    services = visit.services
    destination = visit.destination = route.destination
    instance = visit.instance = visit.instance or visit.instance_of_address()
    try:
        source = route.source or named_source(visit, destination)
        if source is None:
            listener = visit.door.configured
            source = upstream.source_for(services.access, instance, visit.socket, None, destination, listener)
    except Overloaded:
        services.keeper.shed(1)
        raise
    visit.source = source
    services.access.check_route(instance, source, destination)
    ends = services.gauges.ends
    if ends is not None and visit.client in ends:
        raise PeerError(
            "a connection of the proxy itself was redirected to it: the rule must match the MTA's user only"
        )
    return source, destination


def named_source(visit: Visit, destination: Endpoint) -> str | None:
    """The address of the source that the client has named, if it has.

    Raises:
        SourceNotAllowed, FamilyMismatch: there is none.
    """
    name = visit.source_name
    return None if name is None else visit.services.access.source_named(name, destination)


def bind(visit: Visit, source: str) -> RawSocket:
    """The socket that will connect.

    Raises:
        UpstreamError: the address is none of this machine's. Overloaded: no descriptor for it.
    """
    try:
        sock = visit.upstream = upstream.bind(source)
    except Overloaded:
        visit.services.keeper.shed(1)
        raise
    visit.services.gauges.outgoing += 1
    return sock


def connect(visit: Visit, source: str, destination: Endpoint) -> int:
    """Connect; the events of upstream that the relay has to act upon.

    Raises:
        ProxyError: refused or failed.
    """
    services = visit.services
    left = visit.answer_within()
    if services.office.limited:
        visit.now("place", "wants a place under the throttles")
        asked_at = monotonic()
        _take_place(visit, visit.instance, source, destination)
        left -= monotonic() - asked_at
    visit.now("connect", "connects")
    sock = visit.upstream or bind(visit, source)
    timeout = min(services.settings.connect_timeout, upstream.LONGEST_CONNECT, left)
    begun = None if services.gauges.ends is None else visit.note_end
    with visit.while_client_stays(HALF_CLOSED):
        return upstream.connect(services.engine, sock, source, destination, timeout, begun)


def _take_place(visit: Visit, instance: str, source: str, destination: Endpoint) -> None:
    """Wait for a place under the proxy's own throttles; a client that goes away meanwhile gives up its turn.

    Raises:
        Throttled: not in time. OSError: the client is gone.
    """
    services = visit.services
    owner = instance or visit.client.host
    weight = services.access.weight_of(instance)
    seconds = place_within(visit.answer_within())
    with visit.while_client_stays(0.0):
        who = Applicant(owner, weight, source, destination.host)
        visit.place = wait_for_place(services.office, who, seconds)
