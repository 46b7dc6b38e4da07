"""Which day it is, for warm-ups: the calendar of the time zone that the operator has named."""

from __future__ import annotations

from datetime import UTC, date, datetime, tzinfo
from zoneinfo import ZoneInfo

_EPOCH = date(1970, 1, 1).toordinal()


def zone(name: str) -> tzinfo:
    """The time zone; UTC needs no file.

    Raises:
        ValueError: this machine knows none of that name.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (OSError, KeyError, ValueError):  # KeyError: ZoneInfoNotFoundError
        raise ValueError(f"this machine knows no time zone {name} (is tzdata installed?)") from None


def day_in(where: tzinfo, now: datetime | None = None) -> int:
    """The day, counted from 1970-01-01; `now`: the wall clock, with its own time zone."""
    return (now or datetime.now(UTC)).astimezone(where).date().toordinal() - _EPOCH
