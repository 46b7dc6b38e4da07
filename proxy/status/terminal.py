"""`--status`: asks a running proxy for its `/status.json` and prints it as tables.

A plain blocking socket with one deadline; what comes back is bounded, checked against the shapes of `status_rows`, and
made harmless for a terminal. It needs no secret: the listener's allow list decides.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from proxy.errors import ConfigError, UsageError
from proxy.log.spelling import printable
from proxy.model import Endpoint, canonical_ip
from proxy.settings import Settings
from proxy.stats import duration, whole_seconds
from proxy.status.rows import (
    InstanceRow,
    LeasedRow,
    PeerRow,
    SessionRow,
    SourceRow,
    Status,
    StoreRow,
    ThrottleRow,
    WorkerRow,
)
from proxy.status.spelled import (
    ago,
    backoff_state,
    between,
    block_doubt,
    block_limits,
    called,
    failures_text,
    held_by,
    holds_for,
    instance_state,
    leased_share,
    limits_text,
    means,
    mebibytes,
    next_slot,
    percent,
    places_text,
    presence,
    queues_text,
    store_calls,
    store_engine,
    store_members,
    store_state,
    throttle_state,
    trouble_text,
    worker_death,
    worker_state,
)

EX_OK, EX_UNAVAILABLE = 0, 69
_SECONDS = 20.0
_LONGEST_ANSWER = 64 * 1024 * 1024
#: A listener on every address is asked on this one.
_NEAREST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class NoStatus(Exception):
    """Why there is no status to show, as one line."""


def target(address: str, load: Callable[[], Settings]) -> Endpoint:
    """Whom to ask.

    Args:
        address: IP:PORT as in the configuration, localhost:PORT, or a port of this machine; empty: what the
            configuration says.
        load: reads the configuration.

    Raises:
        UsageError: not an address. ConfigError: the configuration is wrong, or has no status listener.
    """
    if address:
        host, _, port = address.rpartition(":")
        if host in ("", "localhost"):
            host = _NEAREST["0.0.0.0"]
        try:
            host = canonical_ip(host.removeprefix("[").removesuffix("]"))
        except ValueError:
            port = ""
        if not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
            raise UsageError("--status: not IP:PORT, [IPv6]:PORT, localhost:PORT or PORT", "command line")
        return Endpoint(host, int(port))
    endpoint = load().listen_status
    if endpoint is None:
        raise ConfigError("listen_status: not configured, so there is nobody to ask; or give --status an address")
    if endpoint.port == 0:
        raise ConfigError("listen_status: port 0 tells nobody where to ask; give --status the address")
    return Endpoint(_NEAREST.get(endpoint.host, endpoint.host), endpoint.port)


def run(to: Endpoint, say: Callable[[str], None], complain: Callable[[str], None], as_json: bool = False) -> int:
    """Ask, and print; `as_json`: on one line, as far as it is understood. Returns: the exit code."""
    try:
        status = fetch(to)
    except NoStatus as error:
        complain(f"greenarrow_proxy: {to}: {error}")
        return EX_UNAVAILABLE
    say(msgspec.json.encode(status).decode() if as_json else "\n".join(lines(status)))
    return EX_OK


def fetch(to: Endpoint) -> Status:
    """The view of the proxy that has its status listener at `to`.

    Raises:
        NoStatus: nobody there, not allowed, or not a status listener of ours.
    """
    try:
        answer = _ask(to)
    except TimeoutError:
        raise NoStatus("no answer in time") from None
    except (ConnectionResetError, BrokenPipeError):
        answer = b""
    except OSError as error:
        raise NoStatus(error.strerror or type(error).__name__) from None
    if not answer:
        raise NoStatus("closed without an answer; is this address in listen_status_allow_from?")
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1."):
        raise NoStatus("this is no status listener: it does not speak HTTP")
    if words[1] != b"200":
        raise NoStatus(f"answered {printable(b' '.join(words[1:]).decode('latin-1'), 60)}")
    try:
        return msgspec.json.decode(body, type=Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise NoStatus("this is no status of this program, or of a version too far from this one") from None


def _ask(to: Endpoint) -> bytes:
    """The whole answer.

    Raises:
        OSError: as it comes.
    """
    ends = time.monotonic() + _SECONDS
    with socket.create_connection(to, timeout=_SECONDS) as sock:
        sock.sendall(f"GET /status.json HTTP/1.0\r\nHost: {to}\r\n\r\n".encode())
        answer = bytearray()
        while len(answer) <= _LONGEST_ANSWER:
            sock.settimeout(max(0.001, ends - time.monotonic()))
            data = sock.recv(65536)
            if not data:
                break
            answer += data
    return bytes(answer)


# --- tables ---

_THROTTLE_HEAD = (
    *("THROTTLE", "SOURCE / INSTANCE", "LIMITS", "HOW", "STATE", "#PLACES", "#WAIT", "#SHARE", "#DEMAND"),
    *("HELD BY", "#NEXT", "#USE"),
)
_LEASED_HEAD = (
    *("IN THE STORE", "SOURCE", "LIMITS OF ALL", "STATE", "WITHOUT IT", "#PLACES HERE", "#LEASED", "#UNUSED"),
    "#PROXIES",
)
_WORKER_HEAD = (
    *("PROCESS", "ROLE", "STATE", "#CONNECTIONS", "#CPU", "#MEMORY", "#DESCRIPTORS", "#RESTARTS", "#UP", "#PID"),
    *("VERSION", "LAST DEATH"),
)
_LONGEST_TROUBLE = 400
_LONGEST_NAMES = 3000
_PEER_HEAD = ("FAILING FOR", "#5 MIN", "#AGO", "FAILED", "#4XX", "#5XX", "#CONNECTIONS", "LAST")
_SOURCE_HEAD = ("SOURCE", "HERE", "#DELIVERED", "#DEFERRED", "#REJECTED", *_PEER_HEAD)
_SESSION_HEAD = ("SESSION", "ADDRESS", "#CONNECTED", "#PING", "#AGO", "#RAM", "#BOUNCE", "#DISK", "#FORWARD", "#BACK")


def lines(status: Status) -> Iterator[str]:
    """The whole output."""
    program, connections, manager, pool = status.program, status.connections, status.manager, status.pool
    draining = ", DRAINING" if program.draining else ""
    yield (
        _safe(f"greenarrow_proxy {program.version} ({program.incarnation}), up {whole_seconds(program.uptime)}")
        + draining
        + _safe(f", on {status.host} at {status.generated_at}" * bool(status.host))
    )
    yield from (f"TROUBLE: {printable(trouble_text(row), _LONGEST_TROUBLE)}" for row in status.trouble)
    yield (
        f"clients {connections.open} of {connections.limit}; receivers {connections.active} active, "
        f"{connections.cached} cached; reuse {percent(pool.reuse_ratio) or '-'}"
    )
    yield ""
    rows = [(row.address, row.protocol, row.open_connections, "closing" * row.closing) for row in status.listeners]
    yield from _table(("LISTENER", "PROTOCOL", "#CONNECTIONS", ""), rows)
    if len(status.workers) > 1:
        yield ""
        yield from _table(_WORKER_HEAD, map(_worker, status.workers))
    yield ""
    yield from _table(_THROTTLE_HEAD, _throttles(status.throttles))
    if status.throttles_left_out:
        yield f"and {status.throttles_left_out} more throttles"
    if status.store is not None:
        yield ""
        yield from _store(status.store)
    if status.backoffs:
        yield ""
        yield from _backoffs(status)
    if status.blocks:
        yield ""
        yield from _names(status)
    yield ""
    yield from _table(("RECEIVER", *_PEER_HEAD), ((row.name, *_peer(row)) for row in status.receivers))
    if status.receivers_left_out:
        yield f"and {status.receivers_left_out} more receivers"
    yield ""
    yield from _table(_SOURCE_HEAD, map(_source, status.sources))
    if status.sources_left_out:
        yield f"and {status.sources_left_out} more sources"
    yield ""
    yield from _table(_SESSION_HEAD, map(_session, status.sessions))
    if status.sessions_left_out:
        yield f"and {status.sessions_left_out} more sessions"
    if manager.without_permit:
        yield f"{manager.without_permit} messages were sent without a permit"


def _store(row: StoreRow) -> Iterator[str]:
    said = (store_state(row), store_engine(row), store_members(row), store_calls(row))
    yield "STORE " + printable(f"{row.address}: {'; '.join(said)}", _LONGEST_TROUBLE)
    yield from _table(_LEASED_HEAD, map(_leased, row.keys))
    if row.keys_left_out:
        yield f"and {row.keys_left_out} more throttles in the store"


def _backoffs(status: Status) -> Iterator[str]:
    for row in status.backoffs:
        words = f"{row.name} for {between(row)}: {backoff_state(row)}; {row.instance} was told: {row.reply}"
        yield "BACK-OFF OF " + printable(words, _LONGEST_TROUBLE)
    if status.backoffs_left_out:
        yield f"and {status.backoffs_left_out} more throttles that back off"


def _names(status: Status) -> Iterator[str]:
    """Addresses stand at the end: there may be many of them."""
    for row in status.blocks:
        doubt = block_doubt(row)
        words = f"{row.name}: {block_limits(row)}; {holds_for(row)}"
        if row.named:
            words += f"; its names mean now {means(row)} ({row.hosts} MX hosts)" + f", not known: {doubt}" * bool(doubt)
        yield "BLOCK " + printable(words, _LONGEST_NAMES)
    if status.blocks_left_out:
        yield f"and {status.blocks_left_out} more blocks"


def _throttles(rows: Iterable[ThrottleRow]) -> Iterator[tuple[object, ...]]:
    for row in rows:
        limits = limits_text(row.limits, row.places)
        yield (
            *(row.name, between(row), limits, row.reconciled, throttle_state(row), places_text(row.used, row.places)),
            *(row.waiting, "", row.demand, held_by(row)),
            *(next_slot(row), percent(row.rate_use)),
        )
        for each in row.instances:
            yield _instance(each)
        if row.instances_left_out:
            yield ("", f"and {row.instances_left_out} more", *[""] * 10)


def _instance(row: InstanceRow) -> tuple[object, ...]:
    said = limits_text(row.limits, row.places) if row.mode else ""
    share = "" if row.share is None else row.share
    state = instance_state(row)
    return ("", "  " + row.name, said, row.mode, state, row.used, row.waiting, share, row.demand, "", "", "")


def _leased(row: LeasedRow) -> tuple[object, ...]:
    here = "" if row.places_here is None else row.places_here
    return (
        *(row.name, between(row), limits_text(row.limits, row.places), row.state, leased_share(row)),
        *(here, row.leased, row.unused, row.users or "?"),
    )


def _peer(row: PeerRow) -> tuple[object, ...]:
    last_ago = ago(row.last_ago) if row.last else ""
    return ago(row.failing), row.recent, last_ago, failures_text(row), row.deferred, row.rejected, row.opened, row.last


def _source(row: SourceRow) -> tuple[object, ...]:
    messages = row.messages_accepted, row.messages_deferred, row.messages_rejected
    return called(row.name, row.source_name), presence(row), *messages, *_peer(row)


def _worker(row: WorkerRow) -> tuple[object, ...]:
    return (
        *(row.number, row.role, worker_state(row), row.open_connections, whole_seconds(row.cpu)),
        *(mebibytes(row.memory), row.descriptors, row.restarts, whole_seconds(row.up), row.pid),
        *(row.version, worker_death(row)),
    )


def _session(row: SessionRow) -> tuple[object, ...]:
    return (
        *(row.name, row.address, whole_seconds(row.connected), duration(row.ping), whole_seconds(row.ping_age)),
        *(row.ram, row.bounce, row.disk, queues_text(row.forward), queues_text(row.back)),
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> Iterator[str]:
    """Columns as wide as they need; a name in `head` that begins with # is that of a column of figures."""
    right = [name.startswith("#") for name in head]
    cells = [[name.removeprefix("#") for name in head], *([_safe(str(cell)) for cell in row] for row in rows)]
    if len(cells) == 1:
        yield f"{cells[0][0]}: none"
        return
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        columns = zip(row, widths, right, strict=True)
        yield "  ".join(text.rjust(width) if figure else text.ljust(width) for text, width, figure in columns).rstrip()


def _safe(text: str) -> str:
    return printable(text, 100)
