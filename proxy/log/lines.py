"""What is logged and how it looks: the closed vocabulary of events, the closing line, text and JSON, set-up.

Every line is one of `Event`; docs/operations.md describes each. Text from a peer is escaped and cut, a secret is never
passed in. Two ways lead out: `note` for what happens now and then (through the standard `logging`, coloured on a
terminal), and `connection` for the one line of each ended connection, which is on the hot path. Writing never blocks:
see `writer`. Deciding what is worth a line does not belong here, nor does counting.
"""

from __future__ import annotations

import atexit
import enum
import errno as _errno
import logging
import os
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from logging import DEBUG, ERROR, INFO, WARNING
from typing import Any, NamedTuple, Protocol

import colorlog
import msgspec

from proxy.errors import (
    BadCredentials,
    ClientNotAllowed,
    Overloaded,
    PeerError,
    ProxyError,
    Refused,
    SourceMissing,
    UpstreamError,
)
from proxy.log import steps
from proxy.log.writer import Writer
from proxy.model import Ending, Endpoint, TlsSeen, owner_of
from proxy.stats import Fate, Limiter, Outcomes, Standing

__all__ = [
    "DEBUG",
    "ERROR",
    "INFO",
    "WARNING",
    "Event",
    "connection",
    "flush",
    "internal_error",
    "lines_lost",
    "name_sources",
    "note",
    "printable",
    "recent",
    "reconfigure",
    "refused",
    "setup",
    "status",
    "step",
    "word",
]


class Event(enum.StrEnum):
    """The closed vocabulary: the first word of a text line, the field `event` of a JSON line."""

    START = "start"
    LISTEN = "listen"
    RELOAD = "reload"
    RELOAD_FAILED = "reload_failed"
    CONFIG = "config"
    ADDRESS = "address"
    DNS = "dns"
    DRAIN = "drain"
    STOP = "stop"
    CONTROL = "control"
    STATUS = "status"
    STEP = "step"
    CONNECTION = "connection"
    MESSAGE = "message"
    REFUSED = "refused"
    FAILED = "failed"
    SUPPRESSED = "suppressed"
    ACCEPT = "accept"
    SESSION = "session"
    THROTTLE = "throttle"
    TLS = "tls"
    SYSTEMD = "systemd"
    LOST = "lost"
    LIBRARY = "library"
    INTERNAL = "internal"


class LogSettings(Protocol):
    """The part of `config.Settings` that this room reads."""

    @property
    def log_verbose(self) -> bool: ...
    @property
    def log_format(self) -> str: ...
    @property
    def log_connections(self) -> str: ...


#: The longest text taken from a field, and the longest message; characters.
FIELD_LIMIT = 200
MESSAGE_LIMIT = 1000

#: What is remembered for who asks: not what comes with each connection, or every few seconds.
_OFTEN = frozenset((Event.STATUS, Event.STEP, Event.CONNECTION, Event.MESSAGE, Event.REFUSED, Event.FAILED))
_MOST_RECENT = 200


class Recent(NamedTuple):
    """A line as it is remembered; `at` on the monotonic clock."""

    time: str
    at: float
    level: str
    event: Event
    text: str


#: Lines that look like the closing line, with the message last.
_ABOUT_CONNECTIONS = frozenset((Event.REFUSED, Event.FAILED, Event.MESSAGE, Event.STEP))
_PLAIN_WORD = re.compile(r"[A-Za-z0-9._:/@\[\]+,-]{1,200}")


def printable(text: str, limit: int = FIELD_LIMIT) -> str:
    """`text` on one line and harmless on a terminal: what is not printable is escaped, what is too long is cut.

    Unicode's invisible direction marks and surrogates are not printable either.
    """
    cut = text if len(text) <= limit else text[:limit] + "..."
    if cut.isprintable():
        return cut
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)


@lru_cache(maxsize=4096)
def word(text: str) -> str:
    """`text` as the value of `key=value`: bare where possible, `-` when empty, else quoted with JSON's escapes."""
    if _PLAIN_WORD.fullmatch(text):
        return text
    return _quoted(text, FIELD_LIMIT) if text else "-"


def _quoted(text: str, limit: int) -> str:
    return '"' + printable(text.replace("\\", "\\\\").replace('"', '\\"'), limit) + '"'


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else word(str(value))


_MILLISECONDS = tuple(f".{number:03d}Z" for number in range(1000))


class _Clock:
    """Timestamps in UTC with milliseconds; the part down to the second is made once a second."""

    second = -1
    text = ""

    def stamp(self) -> str:
        now = time.time()
        second = int(now)
        if second != self.second:
            self.second = second
            self.text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return self.text + _MILLISECONDS[int((now - second) * 1000)]


_clock = _Clock()

_COLOURS = {"DEBUG": "thin_white", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold_red"}
#: syslog(3) priorities as sd-daemon(3) wants them in front of a line; the journal removes them.
_PRIORITY = {DEBUG: "<7>", WARNING: "<4>", ERROR: "<3>", logging.CRITICAL: "<2>"}


class _TextFormatter(colorlog.ColoredFormatter):
    """`[time ][LEVEL ]event: message key=value ...`, two kinds of lines excepted.

    Status lines carry their documented text and nothing else. Those about a connection look like the closing line, with
    the message in the last place: it may hold a receiver's words, which must not pass for our figures.
    """

    def __init__(self, writer: Writer) -> None:
        super().__init__("%(log_color)s%(line)s", log_colors=_COLOURS, no_color=not writer.is_terminal)
        self._journal = writer.is_journal

    def format(self, record: logging.LogRecord) -> str:
        event, message, fields = _parts(record)
        figures = "".join(f" {key}={_figure(value)}" for key, value in fields.items())
        if event in _ABOUT_CONNECTIONS:
            line = f"{event}{figures} message={_quoted(message, MESSAGE_LIMIT)}"
        else:
            text = printable(message, MESSAGE_LIMIT)
            line = text + figures if event is Event.STATUS else f"{event}: {text}{figures}"
        if record.levelno != INFO:
            line = f"{record.levelname} {line}"
        record.line = line if self._journal else f"{_clock.stamp()} {line}"
        prefix = _PRIORITY.get(record.levelno, "") if self._journal else ""
        return prefix + self.formatMessage(record)


class _JSONFormatter(logging.Formatter):
    """One object a line: time, level, event, message, and the fields."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._journal = writer.is_journal

    def format(self, record: logging.LogRecord) -> str:
        event, message, fields = _parts(record)
        entry: dict[str, Any] = {} if self._journal else {"time": _clock.stamp()}
        entry |= {"level": record.levelname.lower(), "event": event.value, "message": printable(message, MESSAGE_LIMIT)}
        entry |= {key: _plain(value) for key, value in fields.items()}
        prefix = _PRIORITY.get(record.levelno, "") if self._journal else ""
        return prefix + msgspec.json.encode(entry).decode()


def _plain(value: object) -> object:
    return value if isinstance(value, int | float | None) else printable(str(value))


def _parts(record: logging.LogRecord) -> tuple[Event, str, dict[str, object]]:
    """Event, message (not yet escaped) and fields of a record; a library's record has neither event nor fields."""
    event: Event = getattr(record, "event", Event.LIBRARY)
    fields: dict[str, object] = dict(getattr(record, "fields", {}))
    if record.exc_info and record.exc_info[1] is not None:
        fields |= _where(record.exc_info[1])
    return event, record.getMessage(), fields


def _where(error: BaseException) -> dict[str, object]:
    """A traceback in one line: type, text, and file:line from the inside out."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-8:])
    at = ",".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in frames)
    return {"error": f"{type(error).__name__}: {error}", "at": at}


class _Handler(logging.Handler):
    """Sends records of the standard `logging` to one of the two writers."""

    def __init__(self, writer: Writer, formatter: logging.Formatter) -> None:
        super().__init__()
        self.writer = writer
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.writer.put(self.format(record))


_logger = logging.getLogger("greenarrow_proxy")
_out: Writer | None = None
_err: Writer | None = None
_json = False
_stamped = True
_connections = "all"
_verbose = steps.Watch(lambda standing, text: step(standing, text), {})
_recent: deque[Recent] = deque(maxlen=_MOST_RECENT)
_limiter = Limiter()


def _nameless(address: str) -> str:
    return ""


#: Address → the name that a `source` block gives it, or "".
_name_of_source: Callable[[str], str] = _nameless
#: A missing source address: told once a minute for each, since every connection from it fails.
_sources = Limiter(lines=1)
_slowed = Limiter(lines=1)


def setup(settings: LogSettings, environ: Mapping[str, str] | None = None, stdout: int = 1, stderr: int = 2) -> None:
    """Take over the two inherited outputs; before this no line is written anywhere.

    When both are the same pipe, file or socket they share one writer, so that no line is cut in two by another.
    """
    global _out, _err
    environ = os.environ if environ is None else environ
    if _out is None:
        atexit.register(flush, 1.0)
    for writer in {_out, _err}:
        if writer is not None:
            writer.close()
    _out = Writer(stdout, environ, partial(_lost_line, 0))
    _err = Writer(stderr, environ, partial(_lost_line, 1))
    if _err.identity == _out.identity:
        _err.close()
        _err = _out
    # A log handler that fails must not print a traceback to the stream that it failed on.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    reconfigure(settings)


def reconfigure(settings: LogSettings) -> None:
    """Apply new settings (reload); queued lines stay."""
    global _json, _stamped, _connections
    assert _out is not None, "log.setup comes first"
    assert _err is not None
    _json = settings.log_format == "json"
    _connections = settings.log_connections
    _stamped = not _out.is_journal
    make = _JSONFormatter if _json else _TextFormatter
    quiet, loud = _Handler(_out, make(_out)), _Handler(_err, make(_err))
    quiet.addFilter(lambda record: record.levelno < WARNING)
    loud.setLevel(WARNING)
    _logger.handlers = [quiet, loud]
    _logger.propagate = False
    _logger.setLevel(DEBUG if settings.log_verbose else INFO)
    steps.end(_verbose)
    if settings.log_verbose:
        steps.begin(_verbose)
    logging.getLogger().handlers = [quiet, loud]
    logging.getLogger().setLevel(WARNING)


def recent() -> list[Recent]:
    """The last lines, the newest last, without those about single connections."""
    return list(_recent)


def flush(timeout: float) -> None:
    """Write what waits, blocking up to `timeout` seconds for each output; at the end of the program only."""
    for writer in {_out, _err}:
        if writer is not None:
            writer.flush(timeout)


def lines_lost() -> int:
    """Lines that could not be written since the start."""
    return sum(writer.lost_total for writer in {_out, _err} if writer is not None)


def note(event: Event, level: int, message: str, **fields: object) -> None:
    """Write one line.

    Args:
        event: what kind of thing happened.
        level: DEBUG, INFO, WARNING or ERROR; the latter two go to stderr.
        message: an English sentence; control characters in it are escaped.
        fields: figures and names, in this order; never a secret.
    """
    if name := _name_of_source(str(fields.get("source") or "")):
        fields = dict(_beside(fields, "source", "source_name", name))
    if event not in _OFTEN and level > DEBUG:
        figures = "".join(f" {key}={_figure(value)}" for key, value in fields.items())
        text = printable(message, MESSAGE_LIMIT) + figures
        _recent.append(Recent(_clock.stamp(), time.monotonic(), logging.getLevelName(level), event, text))
    if _logger.isEnabledFor(level):
        _logger.log(level, "%s", message, extra={"event": event, "fields": fields})


def name_sources(name_of: Callable[[str], str]) -> None:
    """From now on lines that name a source address have its name, too, where `name_of` knows one."""
    global _name_of_source
    _name_of_source = name_of


def _beside(fields: Mapping[str, object], left: str, key: str, value: object) -> Iterator[tuple[str, object]]:
    for each in fields.items():
        yield each
        if each[0] == left:
            yield key, value


def step(standing: Standing, text: str) -> None:
    """A connection has come so far: the line of `log_verbose`."""
    note(
        Event.STEP,
        INFO,
        text,
        id=standing.number,
        instance=standing.instance,
        protocol=standing.protocol,
        client=standing.client,
        source=standing.source,
        destination=standing.destination or "",
        seconds=time.monotonic() - standing.started,
    )


def internal_error(message: str, error: BaseException) -> None:
    """An error that is a mistake in this program: one line with the places it came through."""
    note(Event.INTERNAL, ERROR, message, **_where(error))


def status(lines: Iterable[str]) -> None:
    """Write the documented status lines (`stats.Snapshot.lines`), and what the limiter has left out meanwhile."""
    for line in lines:
        note(Event.STATUS, INFO, line)
    _tell_suppressed(time.monotonic())


def connection(
    id: int,
    instance: str,
    protocol: str,
    client: Endpoint,
    source: str,
    destination: Endpoint | None,
    reused: bool,
    tls: str,
    bytes_up: int,
    bytes_down: int,
    seconds: float,
    outcome: Ending,
    messages: Outcomes | None = None,
    reply: str = "",
    seen: TlsSeen | None = None,
) -> None:
    """The closing line of a connection that was relayed. Hot path: a few microseconds, no `logging`.

    Args:
        id: names the connection in all lines of this run.
        instance: the name it proved or that its address stands for, or "".
        protocol: native, socks5 or proxy_protocol.
        source: the local address it left from.
        reused: served by a connection that was held open.
        tls: TLS version towards the receiver, "" when the proxy did none. seen: more about it.
        bytes_up: client to receiver; `bytes_down` the other way.
        seconds: from accept (native: OPEN) to the end.
        messages: what became of them; None: the dialogue was not seen.
        reply: the receiver's last refusal, as it said it; "": none was seen.
    """
    if _out is None or _connections == "none" or (_connections == "errors" and outcome.is_clean):
        return
    if _json:
        entry: dict[str, object] = {"time": _clock.stamp()} if _stamped else {}
        entry |= {"level": "info", "event": "connection", "id": id, "instance": printable(instance)}
        entry |= {"protocol": protocol, "client": str(client), "source": source}
        if name := _name_of_source(source):
            entry["source_name"] = name
        entry["destination"] = str(destination or "")
        entry |= {"reused": reused, "tls": tls, "up": bytes_up, "down": bytes_down}
        entry |= {"seconds": round(seconds, 3), "outcome": outcome}
        if messages is not None:
            entry |= {"messages": messages.messages, "accepted": messages.accepted, "deferred": messages.deferred}
            entry |= {"rejected": messages.rejected, "waited": round(messages.waited, 3)}
        if reply:
            entry["reply"] = printable(reply)
        if seen is not None:
            entry |= {"cipher": seen.cipher, "certificate": seen.certificate, "key": seen.key}
            entry |= {"subject": printable(seen.subject), "resumed": seen.resumed}
        _out.put(msgspec.json.encode(entry).decode())
        return
    stamp = _clock.stamp() + " " if _stamped else ""
    leaving = f"source={source or '-'}" + (f" source_name={name}" if (name := _name_of_source(source)) else "")
    said = "" if messages is None else _outcomes(messages)
    if reply:
        said += f" reply={_quoted(reply, FIELD_LIMIT)}"
    if seen is not None:
        said += (
            f" cipher={seen.cipher} certificate={seen.certificate} key={word(seen.key)} subject={word(seen.subject)}"
            f" resumed={'yes' if seen.resumed else 'no'}"
        )
    _out.put(
        f"{stamp}connection id={id} instance={word(instance)} protocol={protocol} client={client} "
        f"{leaving} destination={destination or '-'} reused={'yes' if reused else 'no'} tls={tls or '-'} "
        f"up={bytes_up} down={bytes_down} seconds={seconds:.3f} outcome={outcome}{said}"
    )


def message(
    id: int, instance: str, source: str, destination: Endpoint, local: Endpoint | None, tls: str, fate: Fate
) -> None:
    """The line of one message, for `log_messages`.

    Args:
        id: of its connection's line. instance, source, destination, tls: as in `connection`.
        local: of the connection to the receiver that carried it; said only if one did.
    """
    note(
        Event.MESSAGE,
        INFO,
        fate.reply,
        id=id,
        instance=instance,
        source=source,
        destination=destination,
        local=local or "" if fate.carried else "",
        tls=tls if fate.carried else "",
        sender=fate.sender,
        recipients=",".join(fate.recipients),
        rcpts=fate.rcpts,
        size=fate.size,
    )


def _outcomes(messages: Outcomes) -> str:
    return (
        f" messages={messages.messages} accepted={messages.accepted} deferred={messages.deferred} "
        f"rejected={messages.rejected} waited={messages.waited:.3f}"
    )


#: What anybody can cause at will: these lines are limited.
_CHEAP = (ClientNotAllowed, BadCredentials, Overloaded, PeerError)


def refused(
    id: int,
    instance: str,
    protocol: str,
    client: Endpoint,
    source: str,
    destination: Endpoint | None,
    seconds: float,
    error: ProxyError,
) -> None:
    """The one line of a connection that never got to its relay, whoever was the reason.

    `refused` when we said no, `failed` when the network or the receiver did. A no that only its administrator can turn
    into a yes is a warning, and so is a source address that this machine does not have, once a minute. Lines that cost
    a stranger nothing to cause are limited per address.
    """
    now = time.monotonic()
    _tell_suppressed(now)
    if _connections == "none" or (isinstance(error, _CHEAP) and not _limiter.admit(owner_of(client.host), now)):
        return
    if isinstance(error, SourceMissing):
        source = error.source
        if not _sources.admit(source, now):
            return
    fields: dict[str, object] = {"id": id, "instance": instance, "protocol": protocol, "client": client}
    fields |= {"source": source, "destination": destination or "", "seconds": round(seconds, 3), "reason": error.code}
    for_administrators = (isinstance(error, Refused) and not error.retry) or isinstance(error, SourceMissing)
    event, level = Event.REFUSED, WARNING if for_administrators else INFO
    if isinstance(error, UpstreamError):
        event = Event.FAILED
        fields |= {"step": error.step, "errno": _errno.errorcode.get(error.errno, "-")}
        if error.smtp_reply is not None:
            fields["reply"] = error.smtp_reply
        if error.tls_result:
            fields["tls_result"] = error.tls_result
    note(event, level, str(error), **fields)


def slowed(host: str) -> None:
    """An address has given too many wrong secrets; told once a minute for each address, and each /64."""
    now = time.monotonic()
    _slowed.expired(now)
    if _slowed.admit(owner_of(host), now):
        note(Event.REFUSED, WARNING, "too many wrong secrets: answers to further ones are slowed", client=host)


def _tell_suppressed(now: float) -> None:
    for key, count in _limiter.expired(now):
        note(Event.SUPPRESSED, WARNING, "lines about refused connections left out", client=key, lines=count)
    for key, count in _sources.expired(now):
        note(Event.SUPPRESSED, WARNING, "lines about a missing source address left out", source=key, lines=count)


def _lost_line(handler: int, lost: int, total: int) -> str:
    """The line that tells a loss; made here, written by the writer that lost (0: stdout, 1: stderr)."""
    message = f"{lost} lines lost, {total} since the start: the log output is not read fast enough"
    record = _logger.makeRecord(_logger.name, WARNING, "", 0, message, (), None, extra={"event": Event.LOST})
    return _logger.handlers[handler].format(record)
