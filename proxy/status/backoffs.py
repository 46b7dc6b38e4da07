"""The part of the view that says which throttle blocks back off, to what, until when, and which reply did it.

Works in steps, as `view` does, and looks only.
"""

from __future__ import annotations

from collections.abc import Generator

from proxy.status.rows import BackoffRow
from proxy.throttling.backoff import Backoffs, Cause, act
from proxy.throttling.throttle import SECOND, Key

MOST_BACKOFFS = 100
#: Rows that are made between two yields.
_STEP = 50


def backoff_rows(backoffs: Backoffs, now: int) -> Generator[None, None, tuple[list[BackoffRow], int]]:
    """The latest first, and how many throttles are left out; `now`: nanoseconds of the manager's clock."""
    active = list(backoffs.active())
    yield
    rows: list[BackoffRow] = []
    shown = 0
    for key, slowdown in reversed(active):
        if len(rows) >= MOST_BACKOFFS:
            break
        shown += 1
        rows += [_row(key, cause, now) for cause in slowdown.causes]
        if shown % _STEP == 0:
            yield
    return rows, len(active) - shown


def state_of(backoffs: Backoffs, key: Key, now: int) -> tuple[str, float]:
    """Of one throttle, as a row has it: the state, and for how many seconds; "": none."""
    slowdown = backoffs.of(key)
    if slowdown is None:
        return "", 0.0
    return max((_state(cause, now) for cause in slowdown.causes), key=lambda each: (each[0] == "paused", each[1]))


def _state(cause: Cause, now: int) -> tuple[str, float]:
    left = (cause.backoff.until - now) / SECOND
    if left <= 0:
        return "rising", 0.0
    return "paused" if cause.rule.pause else "backoff", left


def _row(key: Key, cause: Cause, now: int) -> BackoffRow:
    state, seconds = _state(cause, now)
    return BackoffRow(
        name=key.name,
        source=key.source,
        receiver=key.receiver,
        state=state,
        seconds=seconds,
        to=act(cause.rule),
        reply=cause.reply,
        instance=cause.instance,
    )
