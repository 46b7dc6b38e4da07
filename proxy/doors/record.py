"""One connection of a standard door: what it asked for and holds, its client's bytes, and its books to their end.

What happens to it stands elsewhere: `request` (what it asks for), `route` (from where, to where, and the connect) and
`front`, which goes from one to the next. When the relay has its sockets, this record is all that is left of it.
"""

from __future__ import annotations

import contextlib
from _socket import SHUT_RDWR
from time import monotonic
from typing import Any, Final

from proxy.doors.presence import Presence
from proxy.doors.smtp import visit as smtp
from proxy.egress import upstream
from proxy.errors import ProxyError
from proxy.log import lines as log
from proxy.log import steps
from proxy.model import Ending, Endpoint, Handshake
from proxy.net.conversation import farewell, receive, send_all
from proxy.net.relay import ANY, HEARD, UNSURE, RawSocket
from proxy.net.tls import PlainStream, Stream, TlsStream
from proxy.net.turns import TurnOver
from proxy.numbering import numbers
from proxy.protocols.smtp.dialogue import refusal
from proxy.services import Door, HostedChannel, HostedDialogue, Services, note_failure
from proxy.stats import Standing
from proxy.throttling.flows import Places

_READ_SIZE: Final = 4096
#: A closed one, in the place of a client's that the relay has.
NO_SOCKET: Final = RawSocket()
NO_SOCKET.close()


class Visit:
    """One connection's record: what it asked for, what it holds, and what its log line says."""

    __slots__ = (
        *("services", "door", "socket", "client", "stream", "handshake", "number", "started"),
        *("instance", "source", "source_name", "destination", "upstream", "place", "end"),
        *("relayed", "hosted", "missed", "reply", "state"),
    )

    __deletable__ = ("socket", "upstream")  # mypyc wants to know

    def __init__(
        self, services: Services, door: Door, sock: RawSocket, address: tuple[Any, ...], number: int = 0
    ) -> None:
        """
        Args:
            number: that another process has given it, and counted it as accepted; 0: it is new.
        """
        self.services = services
        self.door = door
        self.socket = sock
        self.client = Endpoint(address[0], address[1])
        self.handshake: Handshake | None = None
        self.number = number or numbers.take()
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
        if not number:
            services.counters.accepted.count(door.protocol)

    # ---------------------------------------------------------------- the client's bytes

    @property
    def client_stream(self) -> Stream:
        """The client's bytes, in TLS where that was begun."""
        return self.stream if self.stream is not None else PlainStream(self.socket)

    def read(self) -> bytes:
        """The client's next bytes; b"" at the end of the file.

        Waits before it reads, unless events went by: the socket is registered anyway.
        """
        if self.stream is not None:
            return receive(self.services.engine, self.stream, _READ_SIZE)
        while True:
            if not self.missed and self._wait(HEARD) & UNSURE:
                self.missed = True  # no other event will tell of the end
            try:
                data = self.socket.recv(_READ_SIZE)
            except BlockingIOError:
                self.missed = False
                continue
            if len(data) == _READ_SIZE:
                self.missed = True
            return data

    def first_words(self) -> bytes | None:
        """What has come with the connection, before any event of it is seen; None: nothing yet, b"": its end.

        No event is missed by that: the first one is still to come, and tells what there is by then.
        """
        try:
            data = self.socket.recv(_READ_SIZE)
        except BlockingIOError:
            return None
        if len(data) == _READ_SIZE:
            self.missed = True
        return data

    def write(self, data: bytes) -> bool:
        """Send all of it; whether that took a wait."""
        if self.stream is not None:
            send_all(self.services.engine, self.stream, data)
            return True
        waited = False
        while data:
            try:
                sent = self.socket.send(data)
                data = data[sent:]
            except BlockingIOError:
                self._wait()
                waited = self.missed = True
        return waited

    def _wait(self, wanted: int = ANY) -> int:
        return self.services.engine.wait(self.socket.fileno(), wanted)

    def miss(self, events: int) -> None:
        """An event of the client that nobody acts upon now."""
        if events & HEARD:
            self.missed = True

    def while_client_stays(self, half_closed: float) -> Presence:
        """See `Presence`.

        Raises:
            OSError: the client is gone.
        """
        early = self.handshake.trailing if self.handshake is not None else b""
        more = None if self.stream is None else self.has_said_more
        return Presence(
            self.services.engine,
            self.socket,
            early,
            half_closed,
            noted=self.miss,
            missed=self.missed,
            more=more,
        )

    def has_said_more(self) -> bool:
        """Whether anything came behind the request; what did is the handshake's now. Does not wait."""
        assert self.stream is not None
        try:
            data = self.stream.recv(_READ_SIZE)
        except (OSError, TurnOver):
            return False
        if data and self.handshake is not None:
            self.handshake.receive(data)
        return bool(data)

    def instance_of_address(self) -> str:
        return self.services.access.instance_of_address(self.client.host)

    def answer_within(self) -> float:
        return self.services.access.answer_within(self.instance, self.door.protocol)

    # ---------------------------------------------------------------- ends

    def heard(self, data: bytes) -> None:
        """The receiver's first bytes, which may be a refusal; called from the hub."""
        self.reply += data.decode("utf-8", "backslashreplace")
        said = refusal(self.reply)
        if said:
            self.services.office.replied(self.place, f"{said[:3]} {said[4:]}", settle_later=True)

    def ended(self, ending: Ending, up: int, down: int) -> None:
        """The relay is over; called from the hub, must not wait."""
        services, now = self.services, monotonic()
        reply = ""
        if self.reply:
            reply = refusal(self.reply)
            ending = ending.after(reply)
        services.troubles.over(self.source, self.destination, reply, not reply and down > 0, now)
        seconds = now - self.started
        services.counters.over(ending, self.instance, self.source, up, down, seconds)
        services.gauges.outgoing -= 1
        self.forget_end()
        if self.place is not None:
            services.office.leave(self.place)
        self.door.open_connections -= 1
        del services.instances.connections[self]
        if steps.on:
            self.now("over", f"over: {ending}, {up} bytes up, {down} bytes down {reply}".rstrip())
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
            seconds,
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
            self.forget_end()
        elif self.place is not None:
            self.services.office.leave(self.place)
        self.door.open_connections -= 1
        del self.services.instances.connections[self]

    def note_end(self, sock: RawSocket) -> None:
        ends = self.services.gauges.ends
        if ends is not None:
            self.end = upstream.local_endpoint(sock)
            ends.add(self.end)

    def forget_end(self) -> None:
        ends = self.services.gauges.ends
        if ends is not None and self.end is not None:
            ends.discard(self.end)

    def failed(self, error: ProxyError) -> None:
        """Count and log an outcome that is not a relay."""
        self.now("over", f"over: {error}")
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
            farewell(self.services.engine, self.client_stream, self.handshake.send(error))
        elif self.door.secure and self.hosted is None:  # TLS did not come to be, or not to much
            farewell(self.services.engine, self.client_stream, b"")

    # ---------------------------------------------------------------- for operators

    def now(self, state: str, text: str) -> None:
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
            with contextlib.suppress(OSError):  # closed, or the engine's, while it was looked for
                self.socket.shutdown(SHUT_RDWR)
