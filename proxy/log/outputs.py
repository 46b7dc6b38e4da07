"""Where lines go: the two inherited outputs, the settings in force, the last lines remembered, `note` and `step`.

`note` writes what happens now and then, through the standard `logging`. Writing never blocks: see `writer`. The lines
that have a shape of their own are in `lines`, which looks at `out`, `is_json`, `is_stamped` and `connections` here.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from logging import DEBUG, INFO, WARNING
from typing import NamedTuple, Protocol

from proxy.log import steps
from proxy.log.events import OFTEN, Event
from proxy.log.formats import Handler, JSONFormatter, TextFormatter, clock
from proxy.log.spelling import MESSAGE_LIMIT, figure, printable
from proxy.log.writer import Writer
from proxy.stats import Standing

#: Lines that are remembered for who asks.
MOST_RECENT = 200


class LogSettings(Protocol):
    """The part of `config.Settings` that this room reads."""

    @property
    def log_verbose(self) -> bool: ...
    @property
    def log_format(self) -> str: ...
    @property
    def log_connections(self) -> str: ...


class Recent(NamedTuple):
    """A line as it is remembered; `at` on the monotonic clock."""

    time: str
    at: float
    level: str
    event: Event
    text: str


_logger = logging.getLogger("greenarrow_proxy")
out: Writer | None = None
_err: Writer | None = None
is_json = False
is_stamped = True
connections = "all"
_verbose = steps.Watch(lambda standing, text: step(standing, text), {})
_recent: deque[Recent] = deque(maxlen=MOST_RECENT)


def _nameless(address: str) -> str:
    return ""


#: Address → the name that a `source` block gives it, or "".
name_of_source: Callable[[str], str] = _nameless


def setup(settings: LogSettings, environ: Mapping[str, str] | None = None, stdout: int = 1, stderr: int = 2) -> None:
    """Take over the two inherited outputs; before this no line is written anywhere.

    When both are the same pipe, file or socket they share one writer, so that no line is cut in two by another.
    """
    global out, _err
    environ = os.environ if environ is None else environ
    if out is None:
        atexit.register(flush, 1.0)
    for writer in {out, _err}:
        if writer is not None:
            writer.close()
    out = Writer(stdout, environ, partial(_lost_line, 0))
    _err = Writer(stderr, environ, partial(_lost_line, 1))
    if _err.identity == out.identity:
        _err.close()
        _err = out
    # A log handler that fails must not print a traceback to the stream that it failed on.
    logging.raiseExceptions = False
    logging.captureWarnings(True)
    reconfigure(settings)


def share(shared: bool = True) -> None:
    """Other processes of the program write to the same outputs from now on, or do so no more; see `writer`."""
    for writer in {out, _err}:
        if writer is not None:
            writer.share(shared)


def reconfigure(settings: LogSettings) -> None:
    """Apply new settings (reload); queued lines stay."""
    global is_json, is_stamped, connections
    assert out is not None, "log.setup comes first"
    assert _err is not None
    is_json = settings.log_format == "json"
    connections = settings.log_connections
    is_stamped = not out.is_journal
    make = JSONFormatter if is_json else TextFormatter
    quiet, loud = Handler(out, make(out)), Handler(_err, make(_err))
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
    for writer in {out, _err}:
        if writer is not None:
            writer.flush(timeout)


def lines_lost() -> int:
    """Lines that could not be written since the start."""
    return sum(writer.lost_total for writer in {out, _err} if writer is not None)


def name_sources(name_of: Callable[[str], str]) -> None:
    """From now on lines that name a source address have its name, too, where `name_of` knows one."""
    global name_of_source
    name_of_source = name_of


def note(event: Event, level: int, message: str, **fields: object) -> None:
    """Write one line.

    Args:
        event: what kind of thing happened.
        level: DEBUG, INFO, WARNING or ERROR; the latter two go to stderr.
        message: an English sentence; control characters in it are escaped.
        fields: figures and names, in this order; never a secret.
    """
    if name := name_of_source(str(fields.get("source") or "")):
        fields = dict(_beside(fields, "source", "source_name", name))
    if event not in OFTEN and level > DEBUG:
        figures = "".join(f" {key}={figure(value)}" for key, value in fields.items())
        text = printable(message, MESSAGE_LIMIT) + figures
        _recent.append(Recent(clock.stamp(), time.monotonic(), logging.getLevelName(level), event, text))
    if _logger.isEnabledFor(level):
        _logger.log(level, "%s", message, extra={"event": event, "fields": fields})


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


def _lost_line(handler: int, lost: int, total: int) -> str:
    """The line that tells a loss; made here, written by the writer that lost (0: stdout, 1: stderr)."""
    message = f"{lost} lines lost, {total} since the start: the log output is not read fast enough"
    record = _logger.makeRecord(_logger.name, WARNING, "", 0, message, (), None, extra={"event": Event.LOST})
    return _logger.handlers[handler].format(record)
