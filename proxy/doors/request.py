"""What a client of a standard door asks for: TLS where the door has it, its handshake, its name, its bind.

All of it is under one deadline, and whatever was decided stands in the connection's record.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from ssl import CERT_NONE
from time import monotonic
from typing import Final

from proxy.doors.failures import wrong_secret
from proxy.doors.record import Visit
from proxy.doors.route import bind
from proxy.doors.secure import begin_tls, first_bytes
from proxy.errors import BadCredentials, ClientNotAllowed, HandshakeTimeout, PeerError
from proxy.model import Accepted, BindSource, Connect, Endpoint, Event, Handshake, HealthCheck, Login
from proxy.net import redirect
from proxy.net.alarm import Alarm, TimeIsUp
from proxy.net.conversation import watch_over
from proxy.policy.certificates import client_names
from proxy.protocols.proxy_protocol import ProxyProtocol
from proxy.protocols.recognise import SILENT, wrong_door
from proxy.protocols.redirect import Redirected
from proxy.protocols.socks5 import Socks5

_YES: Final = Accepted()


def _socks5(visit: Visit) -> Handshake:
    """Who has proven by a certificate who it is need not log in."""
    return Socks5(visit.services.settings.socks5_auth == "required" and not visit.instance)


def _proxy_protocol(visit: Visit) -> Handshake:
    return ProxyProtocol(visit.services.host_name)


def _redirected(visit: Visit) -> Handshake:
    """The client leaves from the address that it is bound to itself, where that is one to leave from."""
    services, host = visit.services, visit.client.host
    bound = host if services.access.lists_source(services.access.instance_of_address(host), host) else None
    return Redirected(services.host_name, redirect.meant_for(visit.socket), bound)


HANDSHAKES: dict[str, Callable[[Visit], Handshake]] = {
    "socks5": _socks5,
    "proxy_protocol": _proxy_protocol,
    "redirect": _redirected,
}


def greet(visit: Visit) -> Connect | None:
    """TLS if the door has it, and read until the request is there; None for a health check. One deadline covers all
    of it, from the first moment in which something has to be waited for.

    Most clients of the PROXY protocol have said all of it by the time they are let in; so that is looked for first.
    """
    watch_over(visit.services.engine, visit.socket)
    first = b""
    handshake: Handshake | None = None
    alarm: Alarm | None = None
    try:
        if visit.door.secure:
            alarm = _begin_to_wait(visit)
            if not _begin_tls(visit):
                return None
        handshake = visit.handshake = HANDSHAKES[visit.door.protocol](visit)
        while True:
            event = handshake.next_event()
            if event is None:
                data = visit.first_words() if alarm is None and not first else None
                if data is None:
                    if alarm is None:
                        alarm = _begin_to_wait(visit)
                    data = visit.read()
                if data:
                    first = first or data
                    handshake.receive(data)
                elif not first:
                    return None
                else:
                    raise PeerError("the client closed in the middle of its handshake")
            elif event.__class__ is Connect:
                return event
            elif event.__class__ is HealthCheck:
                return None
            else:
                if alarm is None:
                    alarm = _begin_to_wait(visit)
                visit.write(handshake.send(_verdict(visit, event)))
    except TimeIsUp as fired:
        if fired.alarm is not alarm:
            raise
        begun = first or visit.stream is not None
        raise HandshakeTimeout("the handshake was not finished within auth_timeout" if begun else SILENT) from None
    except PeerError as error:
        hint = wrong_door(first, handshake.protocol) if handshake is not None else ""
        if not hint:
            raise
        raise PeerError(f"{error}{hint}") from None
    finally:
        if alarm is not None:
            alarm.cancel()


def _begin_to_wait(visit: Visit) -> Alarm:
    """For a client that is a newcomer until its request is there."""
    services = visit.services
    services.newcomers.enter(visit, visit.socket, visit.client.host)
    return services.engine.alarms.start(services.settings.auth_timeout)


def _begin_tls(visit: Visit) -> bool:
    """Whether TLS stands; False: the client closed without a byte. Its certificate says which instance it is.

    Raises:
        PeerError: it speaks something else. ClientNotAllowed: it has no certificate, and nothing else to show.
    """
    services, host = visit.services, visit.client.host
    context = services.door_context
    assert context is not None
    first = first_bytes(services.engine, visit.socket)
    if not first:
        return False
    directive = f"listen_{visit.door.protocol}_tls"
    if visit.door.protocol == "proxy_protocol":
        directive += "; the header belongs inside of TLS"
    stream = begin_tls(services.engine, visit.socket, context, host, first, directive)
    visit.stream, visit.missed = stream, True
    names = client_names(stream.tls.getpeercert())
    if names:
        visit.instance = services.access.instance_of_certificate(names, host)
    elif context.verify_mode is not CERT_NONE and not _may_log_in(visit):
        raise ClientNotAllowed(f"{host} has shown no certificate, which tls_client_ca_file asks for")
    return True


def _may_log_in(visit: Visit) -> bool:
    """Whether a client can show a password at this door."""
    return visit.door.protocol == "socks5" and visit.services.settings.socks5_auth == "required"


def _verdict(visit: Visit, event: Event) -> Accepted:
    """Decide on what comes before the request.

    Raises:
        ProxyError: no.
    """
    services = visit.services
    if event.__class__ is Login:
        _authenticate(visit, event)
    elif event.__class__ is BindSource:
        source = visit.source = event.source
        instance = visit.instance or visit.instance_of_address()
        if services.via is None or services.access.has_source_lists(instance):
            services.access.check_source(instance, source)
        if services.via is None:
            # Bound now, since only here can the client be told that the source is wrong; the connect uses it.
            bind(visit, source)
        return _leaves_from(source)
    return _YES


@lru_cache(maxsize=4096)
def _leaves_from(source: str) -> Accepted:
    return Accepted(Endpoint(source, 0))


def _authenticate(visit: Visit, login: Login) -> None:
    """Whether it is who it says. Wrong secrets cost an address its budget, and time when that is used up.

    A right one is never slowed: behind one NAT address there may be a good instance beside a bad one.

    Raises:
        BadCredentials: no.
    """
    services, host = visit.services, visit.client.host
    visit.instance, visit.source_name = services.access.names_of(login.instance)  # for the log line, whatever it is
    digest = sha256(login.secret).digest()
    try:
        services.access.authenticate(visit.instance, digest, host)
    except BadCredentials:
        wrong_secret(services, visit, visit.socket, host)
        raise
    services.instances.logins.shown(visit.instance, host, digest, monotonic())
    visit.now("request", "has proven its name")
