"""Waiting for a condition, with a deadline: the tests' only way to let time pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(
    predicate: Callable[[], T],
    timeout: float = 30.0,
    what: str = "",
    pause: Callable[[float], object] = time.sleep,
) -> T:
    """Ask until the answer is true, and return it.

    Args:
        timeout: seconds; generous, it is only used up when the test fails, and a starved machine must not reach it.
        what: for the message; by default the predicate's name.
        pause: how to wait a moment; under gevent pass `gevent.sleep`, so that the loop runs.

    Raises:
        AssertionError: not within the timeout.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or predicate}"
        pause(0.002)
