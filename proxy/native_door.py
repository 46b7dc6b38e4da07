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

import gevent
from gevent import Timeout

from proxy import log, native
from proxy.budget import SLOW_ANSWER
from proxy.conversation import farewell, receive, send_all
from proxy.errors import BadCredentials, ClientNotAllowed, HandshakeTimeout, Overloaded, PeerError, ProxyError
from proxy.model import Endpoint
from proxy.native_auth import NO_CERTIFICATE, ServerHandshake
from proxy.relay import RawSocket
from proxy.services import Door, Services, numbers
from proxy.tls import PlainStream, Stream, TlsStream


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
    number = next(numbers)
    services.counters.accepted.count(door.protocol)
    entrance = _Entrance(services, number, client, sock)
    started = monotonic()
    try:
        return entrance.run(refusal)
    except ProxyError as error:
        services.counters.refused.count(error.code)
        instance = entrance.claimed_instance
        log.refused(number, instance, door.protocol, client, "", None, monotonic() - started, error)
        entrance.refuse(error)
    except OSError as error:
        services.counters.refused.count("client_gone")
        log.note(log.Event.TLS, log.DEBUG, "a native client is gone before it was known", client=client, error=error)
    return None


class _Entrance:
    """One connection on its way in."""

    def __init__(self, services: Services, number: int, client: Endpoint, sock: RawSocket) -> None:
        self._services = services
        self._number = number
        self._client = client
        self._stream: Stream = PlainStream(sock)
        self._can_be_told = False
        self._handshake: ServerHandshake | None = None

    @property
    def claimed_instance(self) -> str:
        """The name it gave, proven or not."""
        peer = self._handshake.peer if self._handshake else None
        return peer.instance if peer else ""

    def run(self, refusal: ProxyError | None) -> Guest | None:
        """TLS and authentication; None for a connection that closed without a byte.

        Raises:
            ProxyError: refused. OSError: the client is gone.
        """
        services, host = self._services, self._client.host
        if not services.access.client_allowed(host, "native"):
            raise ClientNotAllowed(f"{host} is not in allow_from")
        if services.budget.exhausted(host, monotonic()) and host not in services.instances.hosts:
            raise Overloaded("too many failed attempts from this address")
        services.engine.register(self._stream.socket.fileno())
        services.newcomers.enter(self, self._stream.socket)
        timer = Timeout.start_new(services.settings.auth_timeout)
        try:
            return self._prove(refusal)
        except Timeout as fired:
            if fired is not timer:
                raise
            raise HandshakeTimeout("not authenticated within auth_timeout") from None
        finally:
            timer.close()
            services.newcomers.leave(self)

    def _prove(self, refusal: ProxyError | None) -> Guest | None:
        services = self._services
        certificate = NO_CERTIFICATE
        if services.identity is not None:
            self._start_tls()
            certificate = services.identity.certificate
        self._can_be_told = True
        if refusal is not None:
            raise refusal
        handshake = self._handshake = ServerHandshake(
            services.access.secrets_of,
            services.instances.channel_keys.get,
            nonce=os.urandom(32),
            certificate=certificate,
        )
        silent = True
        while handshake.peer is None:
            data = receive(services.engine, self._stream)
            if not data:
                if silent and services.identity is None:
                    services.counters.probes += 1
                    return None
                raise PeerError("the client closed before it was authenticated")
            silent = False
            answer = handshake.receive(data)
            if answer:
                send_all(services.engine, self._stream, answer)
        if not services.access.instance_allowed(handshake.peer.instance, self._client.host):
            raise BadCredentials("unknown instance or wrong secret")
        services.instances.fences.check(handshake.peer.instance, handshake.peer.run_id)
        return Guest(self._number, self._stream, self._client, handshake)

    def _start_tls(self) -> None:
        identity = self._services.identity
        assert identity is not None
        stream = self._stream = TlsStream(self._stream.socket, identity.context, server_side=True)
        try:
            while not stream.handshake():
                self._services.engine.wait(stream.socket.fileno())
        except ConnectionError:
            raise
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror or "closed"
            raise PeerError(f"no TLS: {reason}; the native listener speaks TLS (listen_tls)") from None

    def refuse(self, error: ProxyError) -> None:
        """Say why. A wrong secret costs an address its budget, and time when that is used up."""
        services, host = self._services, self._client.host
        if isinstance(error, BadCredentials):
            services.budget.failed(host, monotonic())
            if services.budget.exhausted(host, monotonic()):
                gevent.sleep(SLOW_ANSWER)
        if self._can_be_told:
            farewell(services.engine, self._stream, native.error_frame(error))
