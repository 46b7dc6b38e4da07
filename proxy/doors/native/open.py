"""Serving an OPEN: the destinations in order, each with a connection that is shared, or a fresh one.

Runs in the channel's greenlet, within the time that the client gave. Policy is asked for every destination before
anything is tried. Which of several failures is reported, and how, is `channel`'s.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from proxy.doors.native.entrance import Guest
from proxy.egress import upstream
from proxy.egress.pool import PoolKey
from proxy.egress.receiver import Receiver, Wish, open_receiver
from proxy.errors import BadServerName, Overloaded, Step, UnknownPath, UpstreamError
from proxy.model import Endpoint
from proxy.protocols.native import messages as m
from proxy.protocols.native.auth import Peer
from proxy.protocols.server_name import server_name
from proxy.protocols.smtp.dialogue import try_next_destination
from proxy.services import Services
from proxy.throttling.flows import Flow, Places

#: The longest that one of several destinations may take to connect; the last one may take `connect_timeout`.
_CONNECT_ONE_OF_MANY = 10.0

Attempts = list[tuple[m.Address, UpstreamError]]
#: Owner, weight, source, destination and paths, as `Admission` wants them.
_Who = tuple[str, float, str, str, tuple[Flow, ...]]


class Taken(NamedTuple):
    """A connection that serves the client from now on; `key` is what it may be shared by."""

    receiver: Receiver
    key: PoolKey
    reused: bool


class Opener:
    """One OPEN being served."""

    def __init__(self, services: Services, guest: Guest, peer: Peer, request: m.Open) -> None:
        self._services = services
        self._guest = guest
        self._peer = peer
        self._request = request
        self._ends_at = monotonic() + request.deadline_ms / 1000
        self._flows: tuple[Flow, ...] = ()
        self._server_name = ""

    def run(self, attempts: Attempts) -> Taken:
        """A connection to the first destination that works.

        Args:
            attempts: is filled with the destinations that did not.

        Raises:
            ProxyError: refused, or all have failed: then it is what the last one tried failed with.
        """
        request, access, instance = self._request, self._services.access, self._peer.instance
        self._server_name = _server_name(request)
        for address in request.destinations:
            access.check_route(instance, request.source_ip, address.endpoint)
        self._flows = self._paths()
        left = len(request.destinations)
        for address in request.destinations:
            try:
                return self._one(address.endpoint, left)
            except UpstreamError as error:
                attempts.append((address, error))
                left -= 1
                if not left or not try_next_destination(error):
                    raise
        raise AssertionError("an OPEN has at least one destination")

    def _paths(self) -> tuple[Flow, ...]:
        """The paths that the OPEN names, as the manager knows them.

        Raises:
            UnknownPath: not registered by a live session of this run, or for another source address.
        """
        request, peer = self._request, self._peer
        if not request.throttles:
            return ()
        manager = self._services.admission.manager
        session = manager.sessions.get(peer.instance)
        if session is None or session.run != peer.run_id:
            raise UnknownPath("there is no session of this run that could have registered a path")
        try:
            flows = manager.flows(session, request.throttles)
        except KeyError as error:
            raise UnknownPath(f"path {error.args[0]} is not registered") from None
        for flow in flows:
            source = flow.path.throttles[0].key.source
            if source != request.source_ip:
                raise UnknownPath(f"path {flow.id} is for source {source}")
        return flows

    def _one(self, destination: Endpoint, left: int) -> Taken:
        """One destination, of which `left` are still to be tried, this one included."""
        services, request, instance = self._services, self._request, self._peer.instance
        client = self._guest.stream.socket
        source = upstream.source_for(services.access, instance, client, request.source_ip, destination)
        if request.source_ip is None:
            services.access.check_route(instance, source, destination)
        key = self._key(source, destination)
        who = (
            instance or self._guest.client.host,
            services.access.weight_of(instance),
            source,
            destination.host,
            self._flows,
        )
        may_share = request.reuse and request.ehlo_name is not None and not request.fresh
        if may_share and (kept := self._kept(key, lambda kept: self._swap(kept, who))) is not None:
            return kept
        places = services.admission.enter(*who, self._share(left), key if may_share else None)
        if may_share and places is not None:  # perhaps it had to be waited for, and came with a connection
            kept = self._kept(key, lambda kept: self._move_in(kept, places))
            if kept is not None:
                return kept
        try:
            receiver = self._fresh(source, destination, left)
        except BaseException:
            services.admission.leave(places)
            raise
        receiver.place = places
        return Taken(receiver, key, False)

    def _kept(self, key: PoolKey, claim: Callable[[Receiver], bool]) -> Taken | None:
        """A cached connection, if there is one and `claim` gets it its places."""
        services = self._services
        receiver = services.keeper.take(key, claim)
        if receiver is None:
            return None
        services.gauges.outgoing += 1
        services.counters.reused += 1
        return Taken(receiver, key, True)

    def _swap(self, kept: Receiver, who: _Who) -> bool:
        """Its places for those of this path, if these are free."""
        may, places = self._services.admission.swap(kept.place, *who)
        if may:
            kept.place = places
        return may

    def _move_in(self, kept: Receiver, places: Places) -> bool:
        """Its places are given back, since we have our own."""
        old, kept.place = kept.place, places
        self._services.admission.leave(old)
        return True

    def _fresh(self, source: str, destination: Endpoint, left: int) -> Receiver:
        services, request = self._services, self._request
        seconds = self._share(left)
        if seconds <= 0:
            raise UpstreamError(f"connect {source} -> {destination}: no time left", Step.CONNECT, errno.ETIMEDOUT)
        longest = services.settings.connect_timeout if left == 1 else _CONNECT_ONE_OF_MANY
        wish = Wish(request.ehlo_name, request.tls, self._server_name, request.tls_verify)
        services.gauges.outgoing += 1
        try:
            receiver = open_receiver(
                services.engine,
                wish,
                source,
                destination,
                (min(seconds, longest), seconds),
                services.settings.idle_timeout,
            )
        except BaseException as error:
            services.gauges.outgoing -= 1
            if isinstance(error, Overloaded):
                services.keeper.shed(1)
            raise
        services.counters.fresh += 1
        return receiver

    def _share(self, left: int) -> float:
        """Seconds for the next of the destinations that are left."""
        return (self._ends_at - monotonic()) / left

    def _key(self, source: str, destination: Endpoint) -> PoolKey:
        request = self._request
        return PoolKey(
            source,
            destination,
            request.ehlo_name or "",
            request.tls,
            self._server_name,
            "verify" if request.tls_verify else "",
            request.smtputf8,
            request.requiretls,
            request.tenant or "",
            self._services.modes.group(self._peer.instance),
        )


def _server_name(request: m.Open) -> str:
    """The canonical form of the name that the OPEN gives, or empty.

    Raises:
        BadServerName: it cannot be one.
    """
    if request.tls_server_name is None:
        return ""
    try:
        return server_name(request.tls_server_name)
    except ValueError as error:
        raise BadServerName(f"tls_server_name {request.tls_server_name}: {error}") from None
