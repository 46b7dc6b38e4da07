"""The status listener: HTTP for operators. `/`, `/status.json`, `/metrics`, `/healthz`; nothing can be changed here.

A connection carries one request, has one deadline over all of it, and may send a few kilobytes; of too many at a time
the oldest is cut off. The view is built in steps with others in between, once a second at most, however often it is
asked for, and so is the page that shows it: one rendering serves all who ask, packed once for those who take gzip.
gevent's WSGI handler parses and answers; what it would print or log is left out. Under which names it may be asked is
`status.host`'s, listening `server`'s.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from time import monotonic
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs

import msgspec
from gevent import Timeout, socket
from gevent.lock import RLock
from gevent.pywsgi import WSGIHandler, WSGIServer

from proxy import __version__
from proxy.egress.clock import clock_ns
from proxy.errors import ClientNotAllowed, PeerError, ProxyError
from proxy.form import core_name
from proxy.log import lines as log
from proxy.model import Endpoint, canonical_ip
from proxy.net.addresses import own_addresses
from proxy.net.newcomers import Newcomers
from proxy.net.relay import RawSocket, engine_name
from proxy.net.turns import rest
from proxy.numbering import numbers
from proxy.policy.directory import Book
from proxy.protocols.recognise import wrong_door
from proxy.services import Door, Services
from proxy.spans import SPANS
from proxy.stats import ManagerFigures, StoreFigures
from proxy.status import gather, host, looks, metrics
from proxy.status import page as status_page
from proxy.status.colleagues import Member
from proxy.status.parts import Part, merge
from proxy.status.rows import Program, Status
from proxy.status.store import Pace
from proxy.status.throttles import Meter
from proxy.status.timeline import Timeline
from proxy.status.view import Sources, overview, survey

#: Says nothing that anybody might not know, and is asked by load balancers under any name.
_HEALTH = "/healthz"
#: One deadline over reading a request, building the answer and writing it.
_SECONDS = 15.0
_MOST_CONNECTIONS = 64
#: Bytes of request line, headers and body together.
_LONGEST_REQUEST = 16_384
#: Bytes that are looked at to say what a client speaks who is wrong here.
_ENOUGH_TO_KNOW = 64
#: Throttles, each with its instances, that are written as JSON in one step.
_THROTTLES_AT_ONCE = 50
#: A view that is younger is shown again.
_FRESH = 1.0
#: Forms of one view that are kept: page and JSON, packed or not, and the page for some who look for something.
_MOST_FORMS = 16
_GZIP = 16 + zlib.MAX_WBITS

_HTML, _JSON, _TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
_HEADERS = [
    ("Cache-Control", "no-store"),
    ("Connection", "close"),
    ("Content-Security-Policy", looks.POLICY),
    ("X-Content-Type-Options", "nosniff"),
]
#: All of the status together is one, where others take turns.
_KEY = "status"
_Built = TypeVar("_Built")


class ReloadFailure(NamedTuple):
    """The last reload was refused. `since`: of the first in a row, monotonic; `why`: its first mistake."""

    since: float
    why: str


class InForce(NamedTuple):
    """The configuration in force. `digest` tells it from others; `since`: UTC."""

    digest: str
    since: datetime


class House(NamedTuple):
    """What the status room may ask the program.

    Args:
        services: those of the moment. part: what this process knows at the moment, without details. manager: its
            figures; None: there is no native listener.
        total: what all processes know, by their last word. others: what the others know now; may wait. members: the
            processes, if there are several.
        limit: `max_connections` in force. draining: whether a stop has begun.
        in_force: which configuration is, and since when.
        reload_failure: None: the configuration in force is that of the last reload.
        spare: gives descriptors that are held back for work that must not fail for want of one.
        book: what the domains of throttle blocks mean. store: of the throttles that several proxies share; None: none
            is configured.
    """

    services: Callable[[], Services]
    part: Callable[[], Part]
    total: Callable[[], Part]
    manager: Callable[[], ManagerFigures | None]
    limit: Callable[[], int]
    draining: Callable[[], bool]
    in_force: Callable[[], InForce]
    reload_failure: Callable[[], ReloadFailure | None]
    spare: Callable[[], AbstractContextManager[None]]
    book: Book = Book()
    store: Callable[[], StoreFigures | None] = lambda: None
    others: Callable[[], Sequence[Part]] = lambda: ()
    members: Callable[[], Sequence[Member]] = lambda: ()


class Form(NamedTuple):
    """What a view is shown as. `wanted`: what is looked for; `packed`: as gzip."""

    path: str
    wanted: str
    packed: bool


class Answer(NamedTuple):
    """One HTTP answer."""

    status: str
    kind: str
    body: bytes
    more: tuple[tuple[str, str], ...] = ()


class StatusDoor:
    """Serves the accepted connections of the status listener."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._started = monotonic()
        self._open = Newcomers(_MOST_CONNECTIONS)
        self._meter = Meter()
        self._pace = Pace()
        self._timeline = Timeline(self._started, SPANS.turn.bounds)
        self._building = RLock()
        self._view: tuple[float, Status] | None = None
        self._shown: dict[Form, tuple[Status, Answer]] = {}
        # Never started: it only holds what the handler asks for. The listener is not its own.
        self._wsgi = WSGIServer(("127.0.0.1", 0), self._respond, log=None, error_log=None)
        self._wsgi.environ |= {"SERVER_NAME": "greenarrow_proxy", "SERVER_PORT": "0"}

    def admit(self, door: Door, sock: RawSocket, address: tuple[Any, ...]) -> bool:
        """Serve one accepted connection in a greenlet of its own; does not wait. False: as `Crew.run`."""
        return self._house.services().crew.run(self._serve, door, sock, address)

    def _serve(self, door: Door, raw: RawSocket, address: tuple[Any, ...]) -> None:
        sock = socket.socket(raw.family, raw.type, raw.proto, fileno=raw.detach())
        door.open_connections += 1
        try:
            if self._allowed(address):
                self._open.enter(sock, sock, address[0])
                self._talk(sock, address)
        except OSError:
            pass  # the client is gone
        except Exception as error:
            self._house.services().counters.internal_errors += 1
            log.internal_error("status request", error)
        finally:
            self._open.leave(sock)
            sock.close()
            door.open_connections -= 1
            with self._house.spare():
                pass  # the descriptor may have been one that was held back: it is again

    def _allowed(self, address: tuple[Any, ...]) -> bool:
        """Whether this address may read the status; a no is counted and logged, and nothing is read or said."""
        client = _client(address)
        if self._house.services().access.client_allowed(client.host, "status"):
            return True
        self._refuse(client, ClientNotAllowed(f"{client.host} is not in listen_status_allow_from"))
        return False

    def _refuse(self, client: Endpoint, error: ProxyError) -> None:
        """Count and log a no."""
        self._house.services().counters.refused.count(error.code)
        log.refused(numbers.take(), "", "status", client, "", None, 0.0, error)

    def _talk(self, sock: Any, address: tuple[Any, ...]) -> None:
        file = sock.makefile("rb", -1)
        timer = Timeout.start_new(_SECONDS)
        try:
            if hint := wrong_door(sock.recv(_ENOUGH_TO_KNOW, socket.MSG_PEEK), "HTTP"):
                error = PeerError(f"not HTTP{hint}")
                self._refuse(_client(address), error)
                sock.sendall(_not_http(error))
                sock.shutdown(socket.SHUT_WR)
                return
            _Handler(sock, address, self._wsgi, _Bounded(file, _LONGEST_REQUEST)).handle_one_connection()
        except Timeout as fired:
            if fired is not timer:
                raise
        finally:
            timer.close()
            file.close()

    # ---------------------------------------------------------------- answers

    def _respond(self, environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]) -> Any:
        """The WSGI application."""
        method = environ["REQUEST_METHOD"]
        path = environ["PATH_INFO"]
        answer = (None if path == _HEALTH else self._misdirected(environ)) or self._answer(method, path, environ)
        rest(_KEY)  # many may have waited for the same answer
        headers = [("Content-Type", answer.kind), ("Content-Length", str(len(answer.body))), *answer.more, *_HEADERS]
        start_response(answer.status, headers)
        return [b"" if method == "HEAD" else answer.body]

    def _misdirected(self, environ: dict[str, Any]) -> Answer | None:
        """The no to a request that asks under a name which may be somebody else's."""
        services = self._house.services()
        try:
            names = services.settings.listen_status_name
            host.check(environ.get("HTTP_HOST", ""), services.host_name, more=names)
        except host.HostNotAllowed as error:
            self._refuse(_client((environ["REMOTE_ADDR"], int(environ["REMOTE_PORT"]))), error)
            return Answer("421 Misdirected Request", _TEXT, f"{error}\n".encode())
        return None

    def _answer(self, method: str, path: str, environ: dict[str, Any]) -> Answer:
        page = self._pages().get(path)
        if page is None:
            return Answer("404 Not Found", _TEXT, b"not found\n")
        if method not in ("GET", "HEAD"):
            return Answer("405 Method Not Allowed", _TEXT, b"read only\n", (("Allow", "GET, HEAD"),))
        return page(environ)

    def _pages(self) -> dict[str, Callable[[dict[str, Any]], Answer]]:
        return {
            "/": lambda environ: self._page(_wanted(environ["QUERY_STRING"]), _takes_gzip(environ)),
            "/status.json": lambda environ: self._json(_takes_gzip(environ)),
            "/metrics": lambda environ: self._metrics(),
            _HEALTH: lambda environ: self._health(),
        }

    def _page(self, wanted: str, packed: bool) -> Answer:
        return self._show(Form("/", wanted, packed), _HTML, lambda view: status_page.pieces(view, wanted))

    def _json(self, packed: bool) -> Answer:
        return self._show(Form("/status.json", "", packed), _JSON, _json_pieces)

    def _show(self, form: Form, kind: str, pieces: Callable[[Status], Iterable[str | bytes]]) -> Answer:
        """The view in one form; made once for each view. May wait."""
        with self._building:
            view = self.view()
            shown = self._shown.pop(form, None)
            if shown is None or shown[0] is not view:
                seen = self._search(view, form.wanted) if form.wanted else view
                made: list[bytes] = []
                packer = zlib.compressobj(wbits=_GZIP) if form.packed else None
                for piece in pieces(seen):
                    data = piece.encode() if isinstance(piece, str) else piece
                    made.append(packer.compress(data) if packer else data)
                    rest(_KEY)
                if packer:
                    made.append(packer.flush())
                more = (("Vary", "Accept-Encoding"), *[("Content-Encoding", "gzip")] * form.packed)
                shown = view, Answer("200 OK", kind, b"".join(made), more)
            self._shown[form] = shown
            if len(self._shown) > _MOST_FORMS:
                del self._shown[next(iter(self._shown))]
            return shown[1]

    def _metrics(self) -> Answer:
        sources, now = self._sources()
        view = self._look(overview(sources, now))
        return Answer("200 OK", metrics.CONTENT_TYPE, metrics.render(view, sources.part))

    def _health(self) -> Answer:
        if self._house.draining():
            return Answer("503 Service Unavailable", _TEXT, b"draining\n")
        return Answer("200 OK", _TEXT, b"ok\n")

    # ---------------------------------------------------------------- the view

    def view(self) -> Status:
        """The whole view, at most `_FRESH` seconds old. May wait."""
        with self._building:
            if self._view is None or monotonic() - self._view[0] >= _FRESH:
                sources, now = self._sources()
                self._view = monotonic(), self._look(survey(sources, self._meter, now, clock_ns()))
                self._view[1].minutes = list(self._timeline.rows)
            return self._view[1]

    def _search(self, view: Status, wanted: str) -> Status:
        """The same with other throttles, if more are known than are listed."""
        if not view.throttles_left_out:
            return view
        sources, now = self._sources()
        found = self._look(survey(sources, self._meter, now, clock_ns(), wanted=wanted))
        found.minutes = view.minutes
        return found

    def tick(self) -> None:
        """To be called several times a minute, whether anybody looks or not. Does not wait."""
        part = self._house.total()
        self._timeline.look(monotonic(), part.total("ended"), part.total("failed"), part.spans["turn"].counts)

    def changed(self) -> None:
        """Somebody has steered: the next look is a new one."""
        self._view = None

    def _look(self, steps: Generator[None, None, _Built]) -> _Built:
        """Go all the way, and let others run between the steps."""
        while True:
            try:
                next(steps)
            except StopIteration as done:
                result: _Built = done.value
                return result
            rest(_KEY)

    def _sources(self) -> tuple[Sources, float]:
        """What there is to look at; may wait."""
        house, now = self._house, monotonic()
        services, in_force = house.services(), house.in_force()
        program = Program(
            version=__version__,
            incarnation=f"{services.incarnation:08x}",
            uptime=now - self._started,
            relay=engine_name(),
            core=core_name(),
            draining=house.draining(),
            enforce=services.settings.throttle_enforce,
            configuration=in_force.digest,
            configured=in_force.since.isoformat(timespec="seconds"),
        )
        if (failure := house.reload_failure()) is not None:
            program.old_configuration = now - failure.since
            program.reload_mistake = failure.why
        sources = Sources(
            program,
            self._part(now),
            house.limit(),
            house.manager(),
            services.admission.manager,
            own_addresses().__contains__,
            services.host_name,
            datetime.now(UTC).isoformat(timespec="seconds"),
            house.book,
            services.settings.throttle,
            services.access.name_of_source,
            house.store(),
            self._pace,
            house.members(),
        )
        return sources, now

    def _part(self, now: float) -> Part:
        """Of all processes."""
        house, services = self._house, self._house.services()
        part, connections = house.part(), list(services.instances.connections)
        standing = (each.standing() for each in connections)
        part.details = self._look(gather.details(services.keeper.pool, services.troubles, standing, now))
        return merge([part, *house.others()])


def _wanted(query: str) -> str:
    """What `?q=` looks for; "": nothing."""
    # WSGI gives bytes as Latin-1; what is no UTF-8 finds nothing, and does no harm.
    found = parse_qs(query, errors="replace")
    return found.get("q", [""])[0].strip()[: status_page.LONGEST_QUERY]


def _takes_gzip(environ: dict[str, Any]) -> bool:
    """Whether `Accept-Encoding` has gzip in it, and not with weight 0 (RFC 9110, 12.5.3)."""
    weights = {}
    for part in environ.get("HTTP_ACCEPT_ENCODING", "").lower().split(","):
        name, _, weight = part.partition(";")
        weights[name.strip()] = weight.replace(" ", "").rstrip("0.") != "q="
    return bool(weights.get("gzip", weights.get("*", False)))


def _not_http(error: PeerError) -> bytes:
    body = f"{error}\n".encode()
    head = "HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n"
    return head.format(_TEXT, len(body)).encode() + body


def _json_pieces(view: Status) -> Iterator[bytes]:
    """The view as JSON: the throttles some at a time, since there may be thousands of rows in them."""
    head = msgspec.json.encode(msgspec.structs.replace(view, throttles=[]))
    before, _, after = head.partition(b'"throttles":[]')
    yield before + b'"throttles":['
    for at in range(0, len(view.throttles), _THROTTLES_AT_ONCE):
        some = msgspec.json.encode(view.throttles[at : at + _THROTTLES_AT_ONCE])
        yield (b"," if at else b"") + some[1:-1]
    yield b"]" + after + b"\n"


def _client(address: tuple[Any, ...]) -> Endpoint:
    return Endpoint(canonical_ip(address[0].partition("%")[0]), address[1])


class _TooLong(ValueError):
    """The request is longer than anybody's who reads a status."""


class _Bounded:
    """What is read from the client, up to a number of bytes. As much of a file as the handler uses."""

    def __init__(self, file: Any, limit: int) -> None:
        self._file = file
        self._left = limit

    @property
    def closed(self) -> bool:
        return bool(self._file.closed)

    def readline(self, size: int = -1) -> bytes:
        """Raises: `_TooLong`, OSError."""
        return self._count(self._file.readline(min(size, self._left + 1) if size >= 0 else self._left + 1))

    def read(self, size: int = -1) -> bytes:
        """Raises: `_TooLong`, OSError."""
        return self._count(self._file.read(min(size, self._left + 1) if size >= 0 else self._left + 1))

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise _TooLong
        return data


class _Handler(WSGIHandler):  # type: ignore[misc]
    """gevent's, for one request, silent, and without a way for an error to get out or to be printed."""

    def handle_one_connection(self) -> None:
        """One request, one answer. The socket and the file are the caller's to close.

        Raises:
            OSError: the client is gone. Timeout, GreenletExit: as they come.
        """
        answer = self.handle_one_request()
        if isinstance(answer, tuple):
            self.socket.sendall(answer[1])
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)  # so that the answer arrives even if something is left unread

    def log_request(self) -> None:
        pass

    def _handle_client_error(self, error: object) -> tuple[str, bytes]:
        return "400", b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

    def handle_error(self, kind: type[BaseException], error: BaseException, traceback: object) -> None:
        """While the answer was built, sent, or what is left of the request was read."""
        if not isinstance(error, Exception):
            raise error
        self.close_connection = True
        if isinstance(error, OSError | _TooLong):
            return
        log.internal_error("status request", error)
        self._send_error_response_if_possible(500)
