"""How a record of the standard `logging` becomes a line: text or JSON, with the time or, in the journal, a priority.

Our own records carry an event and fields, a library's neither. The closing line of a connection is not made here: see
`lines`.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from logging import DEBUG, ERROR, INFO, WARNING
from typing import Any

import colorlog
import msgspec

from proxy.log.events import ABOUT_CONNECTIONS, Event
from proxy.log.spelling import MESSAGE_LIMIT, figure, printable, quoted
from proxy.log.writer import Writer

_MILLISECONDS = tuple(f".{number:03d}Z" for number in range(1000))


class Clock:
    """Timestamps in UTC with milliseconds; the part down to the second is made once a second."""

    second = -1
    text = ""

    def stamp(self) -> str:
        """The present, RFC 3339."""
        now = time.time()
        second = int(now)
        if second != self.second:
            self.second = second
            self.text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return self.text + _MILLISECONDS[int((now - second) * 1000)]


clock = Clock()
_COLOURS = {"DEBUG": "thin_white", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold_red"}
#: syslog(3) priorities as sd-daemon(3) wants them in front of a line; the journal removes them.
_PRIORITY = {DEBUG: "<7>", WARNING: "<4>", ERROR: "<3>", logging.CRITICAL: "<2>"}


class TextFormatter(colorlog.ColoredFormatter):
    """`[time ][LEVEL ]event: message key=value ...`, two kinds of lines excepted.

    Status lines carry their documented text and nothing else. Those about a connection look like the closing line, with
    the message in the last place: it may hold a receiver's words, which must not pass for our figures.
    """

    def __init__(self, writer: Writer) -> None:
        super().__init__("%(log_color)s%(line)s", log_colors=_COLOURS, no_color=not writer.is_terminal)
        self._journal = writer.is_journal

    def format(self, record: logging.LogRecord) -> str:
        event, message, fields = _parts(record)
        figures = "".join(f" {key}={figure(value)}" for key, value in fields.items())
        if event in ABOUT_CONNECTIONS:
            line = f"{event}{figures} message={quoted(message, MESSAGE_LIMIT)}"
        else:
            text = printable(message, MESSAGE_LIMIT)
            line = text if event is Event.STATUS else f"{event}: {text}{figures}"
        if record.levelno != INFO:
            line = f"{record.levelname} {line}"
        record.line = line if self._journal else f"{clock.stamp()} {line}"
        prefix = _PRIORITY.get(record.levelno, "") if self._journal else ""
        return prefix + self.formatMessage(record)


class JSONFormatter(logging.Formatter):
    """One object a line: time, level, event, message, and the fields."""

    def __init__(self, writer: Writer) -> None:
        super().__init__()
        self._journal = writer.is_journal

    def format(self, record: logging.LogRecord) -> str:
        event, message, fields = _parts(record)
        entry: dict[str, Any] = {} if self._journal else {"time": clock.stamp()}
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
        fields |= where(record.exc_info[1])
    return event, record.getMessage(), fields


def where(error: BaseException) -> dict[str, object]:
    """A traceback in one line: type, text, and file:line from the inside out."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-8:])
    at = ",".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in frames)
    return {"error": f"{type(error).__name__}: {error}", "at": at}


class Handler(logging.Handler):
    """Sends records of the standard `logging` to one of the two writers."""

    def __init__(self, writer: Writer, formatter: logging.Formatter) -> None:
        super().__init__()
        self.writer = writer
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        self.writer.put(self.format(record))
