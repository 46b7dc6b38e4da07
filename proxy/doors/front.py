"""The data path: one accepted connection from its first byte to its closing log line, whatever protocol it speaks.

`serve` runs in a pooled greenlet and reads top to bottom: greet (the handshake, under one deadline), connect (access
rules, bind, connect), answer, hand over to the relay. From then on the connection has no greenlet; `Visit.ended` is
called when it is over. What goes wrong on the way is one `ProxyError`, told to the client in its own protocol and
logged as one line.
"""

from __future__ import annotations

import contextlib
from _socket import SHUT_RDWR
from collections.abc import Callable
from contextlib import AbstractContextManager
from ssl import CERT_NONE
from time import monotonic
from typing import Any

from gevent import sleep

from proxy.doors.carriage import Carriage
from proxy.doors.failures import wrong_secret
from proxy.doors.presence import HALF_CLOSED, while_client_stays
from proxy.doors.secure import begin_tls, first_bytes
from proxy.doors.smtp import visit as smtp
from proxy.doors.smtp.books import Facts
from proxy.doors.smtp.direct import egress_for
from proxy.doors.smtp.egress import Line
from proxy.doors.through import Through
from proxy.egress import upstream
from proxy.egress.via import Via
from proxy.errors import (
    BadCredentials,
    ClientNotAllowed,
    HandshakeTimeout,
    Overloaded,
    PeerError,
    ProxyError,
)
from proxy.log import lines as log
from proxy.log import steps
from proxy.model import (
    Accepted,
    BindSource,
    Connect,
    Ending,
    Endpoint,
    Event,
    Handshake,
    HealthCheck,
    Login,
    Route,
)
from proxy.net import redirect
from proxy.net.alarm import Alarm
from proxy.net.conversation import farewell, receive, send_all, watch_over
from proxy.net.relay import GONE, UNSURE, RawSocket, keep_alive
from proxy.net.tls import PlainStream, Stream, TlsStream
from proxy.net.turns import TurnOver
from proxy.policy.access import place_within
from proxy.policy.certificates import client_names
from proxy.protocols.proxy_protocol import ProxyProtocol
from proxy.protocols.recognise import SILENT, wrong_door
from proxy.protocols.redirect import Redirected
from proxy.protocols.smtp.dialogue import refusal
from proxy.protocols.socks5 import Socks5
from proxy.services import Door, HostedChannel, HostedDialogue, Services, note_failure, numbers
from proxy.stats import Standing
from proxy.throttling.flows import Places

_READ_SIZE = 4096
#: Seconds between a SOCKS reply and a greeting that is at hand, since its connection was parked. A receiver's own takes
#: a round trip, and there are libraries (socks of npm, as Nodemailer uses it) that lose what they read in one go with
#: the reply.
_GREETING_AFTER = 0.02
_YES = Accepted()


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


_HANDSHAKES: dict[str, Callable[[Visit], Handshake]] = {
    "socks5": _socks5,
    "proxy_protocol": _proxy_protocol,
    "redirect": _redirected,
}


def serve(
    services: Services, door: Door, sock: RawSocket, address: tuple[Any, ...], refusal: ProxyError | None = None
) -> None:
    """Serve one accepted connection; returns when it is relayed or over. Never raises.

    Args:
        refusal: the proxy is full or shuts down: do the handshake, then say this instead of connecting.
    """
    visit = Visit(services, door, sock, address)
    try:
        if not services.access.client_allowed(visit.client.host, door.protocol):
            visit.failed(ClientNotAllowed(f"{visit.client.host} is not in allow_from"))
            return
        visit.run(refusal)
    except ProxyError as error:
        visit.failed(error)
        visit.tell(error)
    except OSError:
        services.counters.refused.count("client_gone")
    except Exception as error:
        visit.broken(error)
    finally:
        visit.leave()


class Visit:
    """One connection's record: what it asked for, what it holds, and what its log line says."""

    __slots__ = (
        *("services", "door", "socket", "client", "handshake"),
        *(
            "number",
            "started",
            "instance",
            "source",
            "source_name",
            "destination",
            "upstream",
            "relayed",
            "missed",
            "place",
            "end",
            "reply",
            "state",
            "hosted",
            "stream",
        ),
    )

    def __init__(self, services: Services, door: Door, sock: RawSocket, address: tuple[Any, ...]) -> None:
        self.services = services
        self.door = door
        self.socket = sock
        self.client = Endpoint(address[0], address[1])
        self.handshake: Handshake | None = None
        self.number = next(numbers)
        self.started = monotonic()
        self.instance = ""
        self.source = ""
        self.source_name: str | None = None  # that the client asked for instead of an address
        self.destination: Endpoint | None = None
        self.upstream: RawSocket | None = None
        self.relayed = False
        self.missed = False  # whether an event of the client may have gone by that nobody acted upon
        self.place: Places | None = None
        self.reply = ""  # the receiver's greeting, if it was a refusal
        self.end: Endpoint | None = None  # of the outgoing connection, where `Gauges.ends` wants to know
        self.state = "request"  # for operators
        self.hosted: HostedChannel | HostedDialogue | None = None  # who carries the bytes, if not the engine
        self.stream: TlsStream | None = None  # None: the socket itself
        services.instances.connections[self] = None
        door.open_connections += 1
        services.counters.accepted.count(door.protocol)

    # ---------------------------------------------------------------- top to bottom

    def run(self, refusal: ProxyError | None) -> None:
        """Handshake, connect, answer, hand over.

        Raises:
            ProxyError: to be told to the client.
            OSError: the client is gone.
        """
        request = self._greet()
        handshake = self.handshake
        if request is None or handshake is None:
            self.services.counters.probes += 1
            self._now("request", "gone without a request")
            return
        self.services.newcomers.leave(self)
        self.destination = request.route.destination
        self._now("request", "asks for its receiver")
        if refusal is not None:
            raise refusal
        self.services.engine.watch(self.socket.fileno(), self._miss)
        if self.services.via is not None:
            self._go_through(self.services.via, handshake, request.route)
            return
        source, destination = self._check_route(request.route)
        modes = self.services.modes
        if modes.any_smtp and modes.is_smtp(self.instance, self.door.configured, destination):
            self._mediate(handshake, source, destination)
        elif self.stream is None:
            self._hand_over(handshake, self._connect(source, destination))
        else:
            self._connect(source, destination)
            self._carry(handshake, self.stream)

    def _go_through(self, via: Via, handshake: Handshake, route: Route) -> None:
        """The same through another proxy, from the rules to the closing line.

        Raises:
            ProxyError: refused or failed. OSError: the client is gone.
        """
        services = self.services
        destination = self.destination = route.destination
        instance = self.instance = self.instance or self._instance_of_address()
        dialled = upstream.local_endpoint(self.socket).host
        wanted = route.source or self._named_source(destination)
        source = wanted or services.access.default_source(instance, destination, dialled)
        self.source = source or ""
        judged = source if services.access.has_source_lists(instance) else None
        services.access.check_route(instance, judged, destination)
        modes = services.modes
        dialogue = modes.any_smtp and modes.is_smtp(instance, self.door.configured, destination)
        within = self._answer_within()
        through = Through(services, via, self.socket, instance, route, source, dialogue, within)
        self._now("connect", "asks the other proxy")
        channel, opened = through.open(handshake.trailing, self._has_said_more if self.stream is not None else None)
        self.source = opened.local.host
        self.handshake = None

        def answered() -> None:
            local = opened.local.endpoint if handshake.tells_local else None
            self._write(handshake.send(Accepted(local)))

        services.gauges.outgoing += 1
        services.counters.fresh += 1
        self.hosted = through
        self._now("relay", f"goes through the other proxy, from {opened.local.endpoint}")
        try:
            ending = through.carry(channel, self._stream, handshake.trailing, answered)
        except BaseException:
            services.gauges.outgoing -= 1
            raise
        services.engine.close(self.socket, reset=not ending.is_clean)
        self.relayed = True
        self.ended(ending, through.up, through.down)

    def _greet(self) -> Connect | None:
        """TLS if the door has it, and read until the request is there; None for a health check. One deadline covers all
        of it."""
        services = self.services
        watch_over(services.engine, self.socket)
        services.newcomers.enter(self, self.socket, self.client.host)
        alarm = services.engine.alarms.start(services.settings.auth_timeout)
        first = b""
        handshake: Handshake | None = None
        try:
            if self.door.secure and not self._begin_tls():
                return None
            handshake = self.handshake = _HANDSHAKES[self.door.protocol](self)
            while True:
                event = handshake.next_event()
                if event is None:
                    data = self._read()
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
                    self._write(handshake.send(self._verdict(event)))
        except Alarm as fired:
            if fired is not alarm:
                raise
            begun = first or self.stream is not None
            raise HandshakeTimeout("the handshake was not finished within auth_timeout" if begun else SILENT) from None
        except PeerError as error:
            hint = wrong_door(first, handshake.protocol) if handshake is not None else ""
            if not hint:
                raise
            raise PeerError(f"{error}{hint}") from None
        finally:
            alarm.cancel()

    def _begin_tls(self) -> bool:
        """Whether TLS stands; False: the client closed without a byte. Its certificate says which instance it is.

        Raises:
            PeerError: it speaks something else. ClientNotAllowed: it has no certificate, and nothing else to show.
        """
        services, host = self.services, self.client.host
        context = services.door_context
        assert context is not None
        first = first_bytes(services.engine, self.socket)
        if not first:
            return False
        directive = f"listen_{self.door.protocol}_tls"
        if self.door.protocol == "proxy_protocol":
            directive += "; the header belongs inside of TLS"
        stream = begin_tls(services.engine, self.socket, context, host, first, directive)
        self.stream, self.missed = stream, True
        names = client_names(stream.tls.getpeercert())
        if names:
            self.instance = services.access.instance_of_certificate(names, host)
        elif context.verify_mode is not CERT_NONE and not self._may_log_in:
            raise ClientNotAllowed(f"{host} has shown no certificate, which tls_client_ca_file asks for")
        return True

    @property
    def _may_log_in(self) -> bool:
        """Whether a client can show a password at this door."""
        return self.door.protocol == "socks5" and self.services.settings.socks5_auth == "required"

    def _verdict(self, event: Event) -> Accepted:
        """Decide on what comes before the request.

        Raises:
            ProxyError: no.
        """
        services = self.services
        if event.__class__ is Login:
            self.instance = self._authenticate(event)
        elif event.__class__ is BindSource:
            source = self.source = event.source
            instance = self.instance or self._instance_of_address()
            if services.via is None or services.access.has_source_lists(instance):
                services.access.check_source(instance, source)
            if services.via is None:
                # Bound now, since only here can the client be told that the source is wrong; the connect uses it.
                self._bind(source)
            return Accepted(Endpoint(source, 0))
        return _YES

    def _authenticate(self, login: Login) -> str:
        """The instance's name. Wrong secrets cost an address its budget, and time when that is used up.

        A right one is never slowed: behind one NAT address there may be a good instance beside a bad one.

        Raises:
            BadCredentials: no.
        """
        services, host = self.services, self.client.host
        instance, self.source_name = services.access.names_of(login.instance)
        try:
            self.instance = services.access.authenticate(login._replace(instance=instance), host)
            self._now("request", "has proven its name")
            return self.instance
        except BadCredentials:
            self.instance = instance  # what it claims to be: for the log line
            wrong_secret(services, self, self.socket, host)
            raise

    def _check_route(self, route: Route) -> tuple[str, Endpoint]:
        """Source and destination, chosen and allowed.

        Raises:
            ProxyError: refused.
        """
        services = self.services
        destination = self.destination = route.destination
        instance = self.instance = self.instance or self._instance_of_address()
        try:
            wanted = route.source or self._named_source(destination)
            source = upstream.source_for(services.access, instance, self.socket, wanted, destination)
        except Overloaded:
            services.keeper.shed(1)
            raise
        self.source = source
        services.access.check_route(instance, source, destination)
        ends = services.gauges.ends
        if ends is not None and self.client in ends:
            raise PeerError(
                "a connection of the proxy itself was redirected to it: the rule must match the MTA's user only"
            )
        return source, destination

    def _named_source(self, destination: Endpoint) -> str | None:
        """The address of the source that the client has named, if it has.

        Raises:
            SourceNotAllowed, FamilyMismatch: there is none.
        """
        name = self.source_name
        return None if name is None else self.services.access.source_named(name, destination)

    def _connect(self, source: str, destination: Endpoint) -> int:
        """Connect; the events of upstream that the relay has to act upon.

        Raises:
            ProxyError: refused or failed.
        """
        services = self.services
        settings = services.settings
        asked_at = monotonic()
        if services.admission.manager.blocks:
            self._now("place", "wants a place under the throttles")
            self._take_place(self.instance, source, destination)
        self._now("connect", "connects")
        sock = self.upstream or self._bind(source)
        left = asked_at + self._answer_within() - monotonic()
        timeout = min(settings.connect_timeout, upstream.LONGEST_CONNECT, left)
        begun = None if services.gauges.ends is None else self._note_end
        with self._while_client_stays(HALF_CLOSED):
            return upstream.connect(services.engine, sock, source, destination, timeout, begun)

    def _note_end(self, sock: RawSocket) -> None:
        ends = self.services.gauges.ends
        if ends is not None:
            self.end = upstream.local_endpoint(sock)
            ends.add(self.end)

    def _forget_end(self) -> None:
        ends = self.services.gauges.ends
        if ends is not None and self.end is not None:
            ends.discard(self.end)

    def _take_place(self, instance: str, source: str, destination: Endpoint) -> None:
        """Wait for a place under the proxy's own throttles; a client that goes away meanwhile gives up its turn.

        Raises:
            Throttled: not in time. OSError: the client is gone.
        """
        services = self.services
        owner = instance or self.client.host
        weight = services.access.weight_of(instance)
        seconds = place_within(self._answer_within())
        with self._while_client_stays(0.0):
            self.place = services.admission.enter(owner, weight, source, destination.host, (), seconds)

    def _answer_within(self) -> float:
        return self.services.access.answer_within(self.instance, self.door.protocol)

    def _while_client_stays(self, half_closed: float) -> AbstractContextManager[None]:
        """See `presence`.

        Raises:
            OSError: the client is gone.
        """
        early = self.handshake.trailing if self.handshake is not None else b""
        more = None if self.stream is None else self._has_said_more
        return while_client_stays(
            self.services.engine, self.socket, early, half_closed, noted=self._miss, missed=self.missed, more=more
        )

    def _has_said_more(self) -> bool:
        """Whether anything came behind the request; what did is the handshake's now. Does not wait."""
        assert self.stream is not None
        try:
            data = self.stream.recv(_READ_SIZE)
        except (OSError, TurnOver):
            return False
        if data and self.handshake is not None:
            self.handshake.receive(data)
        return bool(data)

    def _bind(self, source: str) -> RawSocket:
        try:
            sock = self.upstream = upstream.bind(source)
        except Overloaded:
            self.services.keeper.shed(1)
            raise
        self.services.gauges.outgoing += 1
        return sock

    def _hand_over(self, handshake: Handshake, upstream_events: int) -> None:
        """Say yes and let the relay take both sockets."""
        services, client, receiver = self.services, self.socket, self.upstream
        assert receiver is not None
        reply = Accepted(upstream.local_endpoint(receiver)) if handshake.tells_local else _YES
        answer = handshake.send(reply)
        if answer and self._write(answer):
            upstream_events = GONE  # while we waited, edges of both sides went by
        early = handshake.trailing
        self._now("relay", "connected: relayed from now on")
        self.relayed = True
        self.handshake = None
        del self.socket, self.upstream  # this record lives as long as the relay, and there may be many
        services.counters.fresh += 1
        timeout = services.settings.idle_timeout
        services.engine.join(client, receiver, self, timeout, early, True, self.missed, upstream_events)

    def _carry(self, handshake: Handshake, client: TlsStream) -> None:
        """Say yes and carry the bytes, since the relay takes raw sockets only; up to the closing line.

        Raises:
            OSError: the client is gone.
        """
        services, receiver = self.services, self.upstream
        assert receiver is not None
        reply = Accepted(upstream.local_endpoint(receiver)) if handshake.tells_local else _YES
        answer, early = handshake.send(reply), handshake.trailing
        self.handshake = None
        services.counters.fresh += 1
        keep_alive(receiver, services.settings.idle_timeout)
        carriage = Carriage(services, self.instance)
        self.hosted = carriage
        self._now("relay", f"is carried, from {upstream.local_endpoint(receiver)}")
        ending = carriage.run(
            client, PlainStream(receiver), early, lambda: send_all(services.engine, client, answer), self.heard
        )
        if ending is Ending.CLIENT_RESET and carriage.delivered:
            ending = Ending.UPSTREAM_CLOSED  # it closed, and our close_notify was not read: that looks like a reset
        self.upstream = None
        self.relayed = True
        services.engine.close(self.socket, reset=not ending.is_clean)
        services.engine.close(receiver, reset=not ending.is_clean)
        self.ended(ending, carriage.up, carriage.down)

    def _mediate(self, handshake: Handshake, source: str, destination: Endpoint) -> None:
        """Mode smtp: have a connection, say yes, and take part in the dialogue until it is over.

        Raises:
            ProxyError: refused or failed.
            OSError: the client is gone.
        """
        services, instance = self.services, self.instance
        terms = services.modes.terms(instance, self.client.host, source, destination)
        bound, self.upstream = self.upstream, None
        if bound is not None:
            services.gauges.outgoing -= 1  # it is counted by who has it
        owner, weight = instance or self.client.host, services.access.weight_of(instance)
        egress = egress_for(services, terms, owner, weight, bound, self._answer_within())
        self.source = source
        self._now("connect", "wants a connection, held open or new")
        try:
            with self._while_client_stays(HALF_CLOSED):
                first = egress.connect()
        finally:
            egress.close()
        try:
            answer = handshake.send(Accepted(first.local) if handshake.tells_local else _YES)
            self._write(answer)
            if answer and first.greeting is not None:
                sleep(_GREETING_AFTER)
        except BaseException:
            if isinstance(first, Line):
                egress.drop(first, False)
            raise
        self.handshake = None
        if self.stream is not None:
            terms = terms._replace(offer_starttls=False)
        facts = Facts(self.number, self.client, terms, self.started)
        visit = smtp.Visit(services, self.door, self._stream, facts, egress, first)
        self.hosted = visit
        visit.serve(handshake.trailing)
        if visit.resets:
            services.engine.close(self.socket, True)

    # ---------------------------------------------------------------- ends

    def heard(self, data: bytes) -> None:
        """The receiver's first bytes, which may be a refusal; called from the hub."""
        self.reply += data.decode("utf-8", "backslashreplace")
        said = refusal(self.reply)
        if said:
            self.services.admission.replied(self.place, f"{said[:3]} {said[4:]}", settle_later=True)

    def ended(self, ending: Ending, up: int, down: int) -> None:
        """The relay is over; called from the hub, must not wait."""
        services = self.services
        reply = refusal(self.reply) if self.reply else ""
        ending = ending.after(reply)
        services.troubles.over(self.source, self.destination, reply, not reply and down > 0, monotonic())
        counters = services.counters
        counters.bytes_up += up
        counters.bytes_down += down
        counters.ended.count(ending)
        services.gauges.outgoing -= 1
        self._forget_end()
        if self.place is not None:
            services.admission.leave(self.place)
        self.door.open_connections -= 1
        del services.instances.connections[self]
        self._now("over", f"over: {ending}, {up} bytes up, {down} bytes down {reply}".rstrip())
        log.connection(
            self.number,
            self.instance,
            self.door.protocol,
            self.client,
            self.source,
            self.destination,
            False,
            "",
            up,
            down,
            monotonic() - self.started,
            ending,
            reply=reply,
        )

    def leave(self) -> None:
        """What `serve` does last: nothing if the relay has the sockets, else close them."""
        if self.relayed:
            return
        engine = self.services.engine
        self.services.newcomers.leave(self)
        self.services.slowed.leave(self)
        engine.close(self.socket)
        if self.upstream is not None:
            self.services.keeper.close_early(PlainStream(self.upstream), self.place)
            self.services.gauges.outgoing -= 1
            self._forget_end()
        elif self.place is not None:
            self.services.admission.leave(self.place)
        self.door.open_connections -= 1
        del self.services.instances.connections[self]

    # ---------------------------------------------------------------- for operators

    def _now(self, state: str, text: str) -> None:
        self.state = state
        if steps.on:
            steps.tell(self.standing(), text)

    def standing(self) -> Standing:
        """See `services.HostedConnection`."""
        state = self.hosted.doing if isinstance(self.hosted, smtp.Visit) else self.state
        ends = self.source, self.destination
        return Standing(self.number, self.instance, self.door.protocol, self.client, *ends, state, self.started)

    def cut(self, ending: Ending) -> None:
        """See `services.HostedConnection`. Who is not served yet sees the end of the file, and is given up for gone."""
        if self.hosted is not None:
            self.hosted.cut(ending)
        elif not self.services.engine.abort(self, ending):
            with contextlib.suppress(OSError, AttributeError):  # closed, or the engine's, while it was looked for
                self.socket.shutdown(SHUT_RDWR)

    def failed(self, error: ProxyError) -> None:
        """Count and log an outcome that is not a relay."""
        self._now("over", f"over: {error}")
        note_failure(
            self.services,
            self.door,
            self.number,
            self.instance,
            self.client,
            self.source,
            self.destination,
            self.started,
            error,
        )

    def broken(self, error: Exception) -> None:
        """An exception that is a bug of ours: costs this connection only."""
        self.services.counters.internal_errors += 1
        log.internal_error(f"connection {self.number} of {self.client}", error)

    def tell(self, error: ProxyError) -> None:
        """Tell the client why, in its own protocol."""
        if self.handshake is not None:
            farewell(self.services.engine, self._stream, self.handshake.send(error))
        elif self.door.secure and self.hosted is None:  # TLS did not come to be, or not to much
            farewell(self.services.engine, self._stream, b"")

    # ---------------------------------------------------------------- small things

    @property
    def _stream(self) -> Stream:
        """The client's."""
        return self.stream if self.stream is not None else PlainStream(self.socket)

    def _instance_of_address(self) -> str:
        return self.services.access.instance_of_address(self.client.host)

    def _miss(self, _events: int) -> None:
        self.missed = True

    def _read(self) -> bytes:
        """The client's next bytes; b"" at the end of the file.

        Waits before it reads, unless events went by: the socket is registered anyway, and one way in is simpler than
        two. It saves nothing where the first bytes come with the connection (on loopback, 19 times in 20).
        """
        if self.stream is not None:
            return receive(self.services.engine, self.stream, _READ_SIZE)
        while True:
            if not self.missed and self._wait() & UNSURE:
                self.missed = True  # no other event will tell of the end
            try:
                data = self.socket.recv(_READ_SIZE)
            except BlockingIOError:
                self.missed = False
                continue
            if len(data) == _READ_SIZE:
                self.missed = True
            return data

    def _write(self, data: bytes) -> bool:
        """Send all of it; whether that took a wait."""
        if self.stream is not None:
            send_all(self.services.engine, self.stream, data)
            return True
        waited = False
        while data:
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                self._wait()
                waited = self.missed = True
        return waited

    def _wait(self) -> int:
        return self.services.engine.wait(self.socket.fileno())
