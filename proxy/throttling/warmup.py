"""Warm-up: a throttle's limit of messages a day, which follows the calendar. Which day it is, is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from proxy.throttling.throttle import Limit

DAY_SECONDS = 86_400


class Warmup(Protocol):
    """`figures`: messages a day, from `first_day` on (days since 1970-01-01, UTC)."""

    @property
    def figures(self) -> Sequence[int]: ...
    @property
    def first_day(self) -> int: ...


def number_of(warmup: Warmup, day: int) -> int:
    """Which of its days this is, from 1; 0: it is over. Before the first one its figure holds already: an address that
    nobody knows yet does not send more on the eve of its warm-up."""
    passed = max(0, day - warmup.first_day)
    return passed + 1 if passed < len(warmup.figures) else 0


def limit_on(warmup: Warmup | None, day: int) -> tuple[Limit, ...]:
    """What it adds to the limits of messages."""
    number = number_of(warmup, day) if warmup is not None else 0
    return (Limit(warmup.figures[number - 1], DAY_SECONDS),) if warmup is not None and number else ()
