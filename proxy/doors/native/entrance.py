"""The native listener's entrance: TLS, then who is it? Everything before a peer is authenticated.

One deadline covers all of it, the number of those inside is bounded (`Newcomers`), and a failure is told in one
sentence that is the same for an unknown name and a wrong secret. What an authenticated peer then does is `channel`'s
or `control`'s; the dispatch is `server`'s.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import monotonic
from typing import Any

from gevent import Timeout

from proxy.doors.failures import wrong_secret
from proxy.doors.secure import begin_tls, first_bytes, speaks_tls
from proxy.errors import (
    BadCredentials,
    ClientNotAllowed,
    HandshakeTimeout,
    NoPlaintext,
    PeerError,
    ProxyError,
    Refused,
    let_go,
)
from proxy.log import lines as log
from proxy.model import Endpoint
from proxy.net.conversation import farewell, receive, send_all, watch_over
from proxy.net.identities import ServerIdentity
from proxy.net.relay import RawSocket
from proxy.net.tls import PlainStream, Stream
from proxy.numbering import numbers
from proxy.policy.access import Access
from proxy.protocols.native import frames
from proxy.protocols.native.auth import NO_CERTIFICATE, Peer, ServerHandshake
from proxy.protocols.recognise import SILENT, wrong_door
from proxy.services import Door, Services, note_failure


@dataclass(slots=True, eq=False)
class Guest:
    """An authenticated peer's connection.

    Args:
        number: names it in the log.
        handshake: over; holds the peer, the frame decoder with what came behind, and makes the WELCOME.
    """

    number: int
    stream: Stream
    client: Endpoint
    handshake: ServerHandshake


class _Probe(Exception):
    """Closed without a byte: a health check."""


def enter(
    services: Services, door: Door, sock: RawSocket, address: tuple[Any, ...], refusal: ProxyError | None = None
) -> Guest | None:
    """Let a peer in, or tell it why not. Never raises; the socket is the caller's to close either way.

    Args:
        refusal: the proxy is full: say this to whoever it is.

    Returns:
        None: nobody came in.
    """
    client = Endpoint(address[0], address[1])
    number = numbers.take()
    services.counters.accepted.count(door.protocol)
    entrance = _Entrance(services, client, sock)
    started = monotonic()
    try:
        return Guest(number, *entrance.run(refusal))
    except ProxyError as error:
        note_failure(services, door, number, entrance.claimed_instance, client, "", None, started, error)
        entrance.refuse(error)
        let_go(error)
    except _Probe:
        services.counters.probes += 1
    except OSError as error:
        services.counters.refused.count("client_gone")
        log.note(log.Event.TLS, log.DEBUG, "a native client is gone before it was known", client=client, error=error)
        let_go(error)
    except Exception as error:
        services.counters.internal_errors += 1
        log.internal_error(f"connection {number} of {client}", error)
    finally:
        services.newcomers.leave(entrance)
        services.slowed.leave(entrance)
    return None


def check_still_welcome(access: Access, peer: Peer, host: str) -> None:
    """Whether a reload has left an authenticated peer, that came from `host`, its place.

    Raises:
        Refused: no longer.
    """
    if not access.client_allowed(host, "native") or not access.instance_allowed(peer.instance, host):
        raise Refused("this address is no longer allowed")
    if peer.secret not in access.secrets_of(peer.instance):
        raise Refused("the secret of this instance has changed")


class _Entrance:
    """One connection on its way in. It is a newcomer until it is known, or has read why it is refused."""

    def __init__(self, services: Services, client: Endpoint, sock: RawSocket) -> None:
        self._services = services
        self._client = client
        self._stream: Stream = PlainStream(sock)
        self._stream.turn.key = client.host
        self._can_be_told = False
        self._heard = False
        self._handshake: ServerHandshake | None = None

    @property
    def claimed_instance(self) -> str:
        """The name it gave, proven or not."""
        return self._handshake.claimed_instance if self._handshake else ""

    def run(self, refusal: ProxyError | None) -> tuple[Stream, Endpoint, ServerHandshake]:
        """TLS and authentication.

        Raises:
            ProxyError: refused. OSError: the client is gone. _Probe.
        """
        services, host = self._services, self._client.host
        if not services.access.client_allowed(host, "native"):
            raise ClientNotAllowed(f"{host} is not in allow_from")
        watch_over(services.engine, self._stream.socket)
        services.newcomers.enter(self, self._stream.socket, host)
        timer = Timeout.start_new(services.settings.auth_timeout)
        try:
            first = self._first_bytes(self._stream.socket)
            certificate = self._start(services.identity, first)
            if refusal is not None:
                raise refusal
            return self._stream, self._client, self._authenticate(certificate)
        except Timeout as fired:
            if fired is not timer:
                raise
            raise HandshakeTimeout("not authenticated within auth_timeout" if self._heard else SILENT) from None
        finally:
            timer.close()

    def _start(self, identity: ServerIdentity | None, first: bytes) -> bytes:
        """Begin with TLS or without, as configured; the hash of the certificate shown."""
        sock, tls = self._stream.socket, speaks_tls(first)  # no frame of ours is as long as a TLS record's header says
        self._can_be_told = not tls or identity is None  # a client of the wrong kind: in clear
        if identity is None:
            if tls:
                raise PeerError("the client speaks TLS, this listener does not (listen_tls no)")
            if hint := wrong_door(first, "native"):
                raise PeerError(f"the client does not speak the native protocol{hint}")
            return NO_CERTIFICATE
        engine, host = self._services.engine, self._client.host
        self._stream = begin_tls(engine, sock, identity.context, host, first, "listen_tls yes")
        self._can_be_told = True
        return identity.certificate

    def _first_bytes(self, sock: RawSocket) -> bytes:
        """Look without taking them."""
        first = first_bytes(self._services.engine, sock)
        if not first:
            raise _Probe
        self._heard = True
        return first

    def _authenticate(self, certificate: bytes) -> ServerHandshake:
        services = self._services
        handshake = self._handshake = ServerHandshake(
            services.access.secrets_of,
            services.instances.channel_keys.get,
            nonce=os.urandom(32),
            certificate=certificate,
        )
        while handshake.peer is None:
            try:
                data = receive(services.engine, self._stream)
            except NoPlaintext as error:
                raise PeerError(error.strerror) from None
            if not data:
                raise PeerError("the client closed before it was authenticated")
            answer = handshake.receive(data)
            if answer:
                send_all(services.engine, self._stream, answer)
        peer = handshake.peer
        if not services.access.instance_allowed(peer.instance, self._client.host):
            raise BadCredentials("unknown instance or wrong secret")
        services.instances.fences.check(peer.instance, peer.run_id)
        services.instances.logins.proven(peer.instance, self._client.host, peer.secret, monotonic())
        return handshake

    def refuse(self, error: ProxyError) -> None:
        """Say why. A wrong secret costs an address its budget, and time when that is used up."""
        services, host = self._services, self._client.host
        if isinstance(error, BadCredentials):
            wrong_secret(services, self, self._stream.socket, host)
        if self._can_be_told:
            farewell(services.engine, self._stream, frames.error_frame(error))
