"""Why a connection that waited did not get in: the sentence, the throttle's name, and when to come back."""

from __future__ import annotations

from proxy.errors import Throttled
from proxy.throttling.flows import Flow, Path, Throttle, Ticket
from proxy.throttling.throttle import SECOND

#: When nobody can know when a place comes free, or a pause ends.
PLACE_RETRY = 10.0
PAUSE_RETRY = 60.0
#: What the pace of a line says is taken for true between these.
SOONEST_RETRY = 1.0


def refusal(ticket: Ticket, now: int) -> Throttled:
    """The error for a ticket whose time is up."""
    blocker = ticket.blocker
    if isinstance(blocker, Flow):
        return _held_back(blocker, now)
    throttle = blocker or ticket.throttles[0]
    name, what = throttle.key.name, throttle.key
    if throttle.closed_until:
        return _paused(throttle, now)
    if throttle.full() or not throttle.counts:
        used = f"{throttle.used} of {throttle.cap} connections are in use"
        seconds = _seconds_to_place(throttle, now)
        return Throttled(f"throttle {what}: {used}; try again in {seconds:.0f} s", name, seconds)
    seconds = _seconds_to_slot(throttle, now)
    return Throttled(f"throttle {what}: next connection in {seconds:.1f} s", name, seconds)


def message_refusal(path: Path, now: int) -> Throttled:
    """The error for a message that got no slot in time: come back when those who wait have had one each."""
    slot, throttle = path.earliest(now)
    throttle = throttle or path.throttles[0]
    if throttle.closed_until:
        return _paused(throttle, now)
    waiting = len(throttle.slots.queue) if throttle.slots is not None else 0
    longest = max([window.interval for window in throttle.windows], default=0)
    seconds = max(0, slot - now + longest * max(0, waiting - 1)) / SECOND
    name, what = throttle.key.name, throttle.key
    return Throttled(f"throttle {what}: next message in {seconds:.1f} s", name, seconds)


def _paused(throttle: Throttle, now: int) -> Throttled:
    """By one of its `backoff` rules, or by hand."""
    seconds = max(0, throttle.closed_until - now) / SECOND
    why = f"throttle {throttle.key}: paused {throttle.closed_by}; try again in {seconds:.0f} s"
    return Throttled(why, throttle.key.name, seconds)


def _held_back(flow: Flow, now: int) -> Throttled:
    throttle = flow.path.throttles[0]
    name, what = throttle.key.name, throttle.key
    if flow.paused:
        return Throttled(f"throttle {what} is paused by this instance", name, PAUSE_RETRY)
    slowest = max(each.interval for path in flow.path.throttles for each in path.windows) if _limited(flow) else 0
    seconds = _seconds_to_slot(throttle, now) + flow.fine * slowest / SECOND
    reason = f"{flow.fine} messages were sent without a permit; try again in {seconds:.1f} s"
    return Throttled(f"throttle {what}: {reason}", name, seconds)


def _seconds_to_place(throttle: Throttle, now: int) -> float:
    """When those who wait now will have had their turns, as far as the line's pace tells."""
    outlook = throttle.line.outlook(now) if throttle.line is not None else None
    return PLACE_RETRY if outlook is None else min(max(SOONEST_RETRY, outlook / SECOND), PAUSE_RETRY)


def _limited(flow: Flow) -> bool:
    return any(throttle.windows for throttle in flow.path.throttles)


def _seconds_to_slot(throttle: Throttle, now: int) -> float:
    return max(0.0, (throttle.earliest(now) - now) / SECOND)
