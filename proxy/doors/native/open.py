"""Serving an OPEN: the destinations in order, each with a connection that is shared, or a fresh one.

Runs in the channel's greenlet, within the time that the client gave. Policy is asked for every destination before
anything is tried. Which of several failures is reported, and how, is `channel`'s.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Final, NamedTuple

from proxy.doors.native.entrance import Guest
from proxy.doors.native.receiver_names import host_name, names_of
from proxy.egress import upstream
from proxy.egress.asking import wait_for_place
from proxy.egress.bring_up import open_receiver
from proxy.egress.claim import Claim
from proxy.egress.office import Applicant
from proxy.egress.pool import PoolKey
from proxy.egress.receiver import InClear, Limits, Receiver, StaleSession, Wish, may_do_without
from proxy.errors import BadCiphers, Draining, Overloaded, Step, UnknownPath, UpstreamError, let_go
from proxy.model import UNNAMED, Endpoint, TlsMode
from proxy.net.contexts import Profile, client_context
from proxy.policy.certificates import Demand, Result, Tlsa
from proxy.protocols.native import messages as m
from proxy.protocols.native.auth import Peer
from proxy.protocols.smtp.dialogue import try_next_destination
from proxy.services import Services
from proxy.throttling.flows import Flow, Places

#: The longest that one of several destinations may take to connect; the last one may take `connect_timeout`.
_CONNECT_ONE_OF_MANY = 10.0
#: What a receiver gets for its greeting and answers, however many destinations there are: many delay their greeting on
#: purpose. But never more than half of the time while others are still to be tried.
_SESSION_ONE_OF_MANY = 15.0

_NOTHING: Final = Demand()

Attempts = list[tuple[m.Address, UpstreamError]]
#: Told of each connection that did not come to be: its source, its destination, and why.
Tell = Callable[[str, Endpoint, UpstreamError], None]


class Taken(NamedTuple):
    """A connection that serves the client from now on; `key` is what it may be shared by, where the client
    lets it be shared.

    A session in clear that was to be under TLS has the key of those who want none: for the others TLS is tried anew.
    `in_clear`: why this client is served so, who would have liked TLS.
    """

    receiver: Receiver
    key: PoolKey | None
    reused: bool
    in_clear: InClear | None = None


class Opener:
    """One OPEN being served.

    Args:
        tell: told of each connection that did not come to be, as it happens.
    """

    def __init__(self, services: Services, guest: Guest, peer: Peer, request: m.Open, tell: Tell) -> None:
        self._services = services
        self._guest = guest
        self._peer = peer
        self._request = request
        self._tell = tell
        self._ends_at = monotonic() + request.deadline_ms / 1000
        self._flows: tuple[Flow, ...] = ()
        self._server_name = ""
        self._names = UNNAMED
        self._rated = is_raw(request)
        self._named: dict[bool, str] = {}  # by family: the address that the source's name stands for in this OPEN
        self._source = ""  # of the attempt in progress

    def run(self, attempts: Attempts) -> Taken:
        """A connection to the first destination that works.

        Args:
            attempts: is filled with the destinations that did not.

        Raises:
            ProxyError: refused, or all have failed: then it is what the last one tried failed with.
        """
        request, access, instance = self._request, self._services.access, self._peer.instance
        self._server_name = host_name("tls_server_name", request.tls_server_name)
        self._names = names_of(request)  # refused now, if they cannot be
        _check_ciphers(request)
        destinations = [(address, address.endpoint) for address in request.destinations]
        for _, destination in destinations:
            access.check_route(instance, self._wanted(destination), destination)
        if request.throttles:
            self._flows = self._paths()
            self._names = names_of(request, self._flows)
        left = len(destinations)
        for address, destination in destinations:
            try:
                return self._one(destination, left)
            except UpstreamError as error:
                attempts.append((address, error))
                self._tell(self._source, destination, error)
                left -= 1
                if not left or not try_next_destination(error):
                    raise
                let_go(error)
        raise AssertionError("an OPEN has at least one destination")

    def _paths(self) -> tuple[Flow, ...]:
        """The paths that the OPEN names, as the manager knows them.

        Raises:
            UnknownPath: not registered by a live session of this run, or for another source address.
            Draining: or what was said of it waits for the process that takes over.
        """
        request, peer = self._request, self._peer
        manager = self._services.admission.manager
        if manager.frozen:
            raise Draining("another process of the proxy takes over")
        session = manager.sessions.get(peer.instance)
        if session is None or session.run != peer.run_id:
            raise UnknownPath("there is no session of this run that could have registered a path")
        try:
            flows = manager.flows(session, request.throttles)
        except KeyError as error:
            raise UnknownPath(f"path {error.args[0]} is not registered") from None
        leaves_from = self._source_for(request.destinations[0].endpoint)
        for flow in flows:
            source = flow.path.throttles[0].key.source
            if not self._services.access.is_source_of_path(source, leaves_from):
                raise UnknownPath(f"path {flow.id} is for source {source}, and this OPEN leaves from {leaves_from}")
        return flows

    def _wanted(self, destination: Endpoint) -> str | None:
        """The address that the OPEN asks for, also by the name of a source; None: the default.

        Raises:
            SourceNotAllowed, FamilyMismatch: the name has none.
        """
        request = self._request
        if request.source is None:
            return request.source_ip
        ipv6 = destination.is_ipv6
        if ipv6 not in self._named:
            self._named[ipv6] = self._services.access.source_named(request.source, destination)
        return self._named[ipv6]

    def _source_for(self, destination: Endpoint) -> str:
        """The address to leave from: what the OPEN says, else the default."""
        services, wanted = self._services, self._wanted(destination)
        client = self._guest.stream.socket
        return upstream.source_for(services.access, self._peer.instance, client, wanted, destination)

    def _one(self, destination: Endpoint, left: int) -> Taken:
        """One destination, of which `left` are still to be tried, this one included."""
        services, request, instance = self._services, self._request, self._peer.instance
        self._source = self._wanted(destination) or ""
        source = self._source = self._source_for(destination)
        if request.source_ip is None and request.source is None:
            services.access.check_route(instance, source, destination)
        names, left_for_dns = self._names, self._share(left)
        wish = services.demands.join(
            self._wish(destination), instance, source, destination, left_for_dns, names, said=True
        )
        why = services.broken_tls.why(destination, monotonic()) if may_do_without(wish) else ""
        if not why:
            return self._connection(wish, source, destination, left)
        taken = self._connection(wish._replace(tls=TlsMode.NONE), source, destination, left)
        services.counters.in_clear.count("remembered")
        return taken._replace(in_clear=_remembered(why))

    def _connection(self, wish: Wish, source: str, destination: Endpoint, left: int) -> Taken:
        """Shared or fresh, with its places."""
        services, request, instance = self._services, self._request, self._peer.instance
        key = self._key(source, destination, wish) if request.reuse else None
        who = Applicant(
            instance or self._guest.client.host,
            services.access.weight_of(instance),
            source,
            destination.host,
            self._flows,
            self._rated,
            self._names,
        )
        shared = key if request.ehlo_name is not None and not request.fresh else None
        if shared is not None:
            patience = self._share(left) / 2
            kept = self._kept(shared, lambda kept: self._swap(kept, who), patience)
            if kept is not None:
                return kept
        places = wait_for_place(services.admission, who, self._share(left), shared)
        if shared is not None and places is not None:  # perhaps it had to be waited for, and came with a connection
            try:
                kept = self._kept(shared, lambda kept: self._move_in(kept, places), self._share(left) / 2, True)
            except BaseException:
                services.admission.leave(places)
                raise
            if kept is not None:
                return kept
        receiver = self._fresh(wish, source, destination, left, who, places)
        if receiver.greeting is not None:
            services.acquaintances.met(destination, wish.tls, receiver.greeting, receiver.hello)
        if receiver.tls is not None:
            services.broken_tls.worked(destination)
            services.counters.tls(receiver.tls.seen)
        if receiver.in_clear is None:
            return Taken(receiver, key, False)
        services.counters.in_clear.count(receiver.in_clear.cause)
        in_clear = self._key(source, destination, wish._replace(tls=TlsMode.NONE)) if request.reuse else None
        return Taken(receiver, in_clear, False, receiver.in_clear)

    def _kept(
        self, key: PoolKey, claim: Callable[[Receiver], bool], seconds: float, with_places: bool = False
    ) -> Taken | None:
        """A cached connection, if there is one and `claim` gets it its places."""
        services = self._services
        receiver = services.keeper.take(key, claim, seconds, with_places)
        if receiver is None:
            return None
        services.gauges.outgoing += 1
        services.counters.reused += 1
        return Taken(receiver, key, True)

    def _swap(self, kept: Receiver, who: Applicant) -> bool:
        """Its places for those of this path, if these are free."""
        may, places = self._services.admission.swap(kept.place, who)
        if may:
            kept.place = places
        return may

    def _move_in(self, kept: Receiver, places: Places) -> bool:
        """Its places are given back, since we have our own."""
        old, kept.place = kept.place, places
        self._services.admission.leave(old)
        return True

    def _fresh(
        self, wish: Wish, source: str, destination: Endpoint, left: int, who: Applicant, places: Places | None
    ) -> Receiver:
        """A new connection, which has these places, or those of the connection in clear that took its turn."""
        services, limits = self._services, self._limits(left)
        again = partial(self._place_again, source, destination, who, limits.ends_at)
        claim = Claim(services.keeper, places, again)
        services.gauges.outgoing += 1
        try:
            if limits.connect <= 0:
                raise UpstreamError(f"connect {source} -> {destination}: no time left", Step.CONNECT, errno.ETIMEDOUT)
            receiver = open_receiver(
                services.engine,
                wish,
                source,
                destination,
                limits,
                services.settings.idle_timeout,
                claim.failed,
                claim.once_more,
                services.tls_sessions,
            )
        except BaseException as error:
            services.gauges.outgoing -= 1
            if isinstance(error, UpstreamError) and error.smtp_reply is not None:
                services.admission.replied(claim.asked_with, error.smtp_reply)
            services.admission.leave(claim.places)
            if isinstance(error, Overloaded):
                services.keeper.shed(1)
            raise
        services.counters.fresh += 1
        receiver.place = claim.places
        return receiver

    def _place_again(
        self, source: str, destination: Endpoint, who: Applicant, ends_at: float, error: UpstreamError
    ) -> Places | None:
        """TLS failed, and is done without, or without what the receiver remembered; see `Claim`."""
        services = self._services
        if not isinstance(error, StaleSession):
            services.broken_tls.failed(destination, error.reason, monotonic())
        self._tell(source, destination, error)
        return wait_for_place(services.admission, who, ends_at - monotonic())

    def _limits(self, left: int) -> Limits:
        """How the time that is left is spent, if `left` destinations are to be tried, the next one included."""
        now = monotonic()
        seconds = self._ends_at - now
        if left == 1:
            return Limits(min(seconds, self._services.settings.connect_timeout), seconds, self._ends_at)
        connect = min(seconds / left, _CONNECT_ONE_OF_MANY)
        session = max(seconds / left, min(_SESSION_ONE_OF_MANY, seconds / 2))
        return Limits(connect, session, now + connect + session)

    def _share(self, left: int) -> float:
        """Seconds to wait for a place at the next of the destinations that are left."""
        return (self._ends_at - monotonic()) / left

    def _wish(self, destination: Endpoint) -> Wish:
        """What the OPEN asks for; whoever has a receiver's records knows that it has TLS (RFC 7672 section 2.2)."""
        request = self._request
        mode = TlsMode.REQUIRED if request.tlsa and request.tls is TlsMode.OPPORTUNISTIC else request.tls
        demand = self._demand(destination)
        return Wish(request.ehlo_name, mode, self._server_name, demand, request.tls_min, request.tls_ciphers)

    def _demand(self, destination: Endpoint) -> Demand:
        """What the receiver's certificate has to prove; without a name there is still the address."""
        request = self._request
        records = tuple(Tlsa(each.usage, each.selector, each.matching, each.data) for each in request.tlsa)
        name = self._server_name or (destination.host if request.tls_verify or records else "")
        if not name and not request.tls_names:
            return _NOTHING
        names = tuple(request.tls_names) or (name,)
        return Demand(names, request.tls_verify or bool(request.tls_names), records)

    def _key(self, source: str, destination: Endpoint, wish: Wish) -> PoolKey:
        request, encrypted = self._request, wish.tls is not TlsMode.NONE
        return PoolKey(
            source,
            destination,
            request.ehlo_name or "",
            wish.tls,
            wish.tls_server_name if encrypted else "",
            wish.proof if encrypted else "",
            request.smtputf8,
            request.requiretls,
            request.tenant or "",
            self._services.modes.group(self._peer.instance),
        )


def is_raw(request: m.Open) -> bool:
    """Nobody looks at the bytes: the rates of the proxy's own throttles count the connection, else each MAIL on it."""
    return request.ehlo_name is None


def _remembered(why: str) -> InClear:
    """It is not known any more what exactly was wrong with its TLS."""
    return InClear("remembered", f"not tried, for it has failed before: {why}", Result.VALIDATION_FAILURE)


def _check_ciphers(request: m.Open) -> None:
    """
    Raises:
        BadCiphers: OpenSSL has none of those that the OPEN wants.
    """
    if not request.tls_ciphers:
        return  # nothing else of it can be wrong: a frame with another tls_min is none
    try:
        client_context(Profile(True, request.tls_min, request.tls_ciphers))
    except ValueError as error:
        raise BadCiphers(f"tls_ciphers {error}") from None
