"""A throttle as a row: its limits, who holds and wants what under it, how much of its rate is used, and its rank.

Which throttles are listed is decided in `view`. Looks only; where there may be many things it yields, as `view` does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from heapq import nlargest
from typing import NamedTuple

from proxy.stats import whole_seconds
from proxy.status.backoffs import state_of
from proxy.status.rows import InstanceRow, Rate, ThrottleRow
from proxy.throttling.flows import Stake, Throttle
from proxy.throttling.limits import Mode, Part
from proxy.throttling.manager import Manager
from proxy.throttling.overrides import NO_RATE, Override, told
from proxy.throttling.throttle import SECOND, Limit

MOST_INSTANCES = 20
#: Things looked at between two yields: well under a millisecond.
STEP = 500
#: A sample of a throttle's slots is replaced when it is older.
SAMPLE = 60 * SECOND
LONGEST_REASON = 300
Asked = dict[Throttle, dict[str, int]]


class _Sample(NamedTuple):
    at: int
    taken: int


class Meter:
    """How much of a rate is used: compares the slots given out with those of the last look and the one before.

    Remembers the throttles of the last look only.
    """

    def __init__(self) -> None:
        self._last: dict[Throttle, tuple[_Sample, _Sample]] = {}
        self._next: dict[Throttle, tuple[_Sample, _Sample]] = {}

    def use(self, throttle: Throttle, now: int) -> float | None:
        """Share of the slots since one or two `SAMPLE`s (or the first look) that were given out; None: unknown."""
        if not throttle.windows:
            return None
        fresh = _Sample(now, throttle.taken)
        older, newer = self._last.get(throttle, (fresh, fresh))
        if now - newer.at >= SAMPLE:
            older, newer = newer, fresh
        self._next[throttle] = older, newer
        elapsed = now - older.at
        if elapsed < SECOND:
            return None
        slowest = max(window.interval for window in throttle.windows)
        return min(1.0, (throttle.taken - older.taken) * slowest / elapsed)

    def turn(self) -> None:
        """A look is over."""
        self._last, self._next = self._next, {}

    def aside(self) -> Meter:
        """For a look at some throttles only, which is not to be remembered."""
        meter = Meter()
        meter._last = self._last
        return meter


def asked_of(manager: Manager) -> Generator[None, None, Asked]:
    """Messages that wait in the proxy, by throttle and instance."""
    asked: Asked = {}
    for number, (name, throttles, count) in enumerate(manager.waiting_messages(), 1):
        for throttle in throttles if count else ():
            names = asked.setdefault(throttle, {})
            names[name] = names.get(name, 0) + count
        if number % STEP == 0:
            yield
    return asked


def rank(throttle: Throttle, now: int) -> tuple[float, ...]:
    """Smaller comes first: connections that wait, messages that wait, places used, then debt. Of equals, the first
    by name, so that the page does not jump."""
    waiting = throttle.line.size if throttle.line is not None else 0
    queued = len(throttle.slots.queue) if throttle.slots is not None else 0
    use = throttle.used / throttle.cap if throttle.cap else 0.0
    return -waiting, -queued, -use, -throttle.used, throttle.debt_until() <= now, -throttle.taken


def throttle_row(
    throttle: Throttle, asked: Mapping[str, int], manager: Manager, meter: Meter, now: int
) -> Generator[None, None, ThrottleRow]:
    """One throttle as it is now.

    Args:
        asked: messages that wait in the proxy for it, by instance. now: of the manager's clock.
    """
    terms = throttle.terms
    stakes = list(terms.stakes) if terms is not None else []
    instances = _holders(throttle)
    for name, count in asked.items():
        instances.setdefault(name, InstanceRow(name)).demand += count
    for stake in stakes:
        yield from _add_part(instances, stake, manager)
    for flow, share in (terms.advice or {}).items() if terms is not None else ():
        if (row := instances.get(flow.receiver.name)) is not None:
            row.share = (row.share or 0) + share
    shown = nlargest(MOST_INSTANCES, instances.values(), key=lambda row: (row.waiting, row.demand, row.used))
    day = days = 0
    if throttle.counts:
        state, backoff = state_of(manager.blocks.backoffs, throttle.key, now)
        day, days = manager.blocks.warmup_of(throttle)
    else:
        state, backoff = _state(throttle, stakes, now)
    how = _reconciled([stake.part for stake in stakes]) if terms is not None else "throttle block"
    by_hand = list(manager.overrides.of(throttle.key)) if manager.overrides else []
    if any(each.pause for each in by_hand):
        state = "paused"
    return ThrottleRow(
        source=throttle.key.source,
        name=throttle.key.name + (" (connections)" if throttle.connections else ""),
        kind="proxy" if terms is None else "instances",
        reconciled="; ".join([how, *(_by_hand(each, now) for each in by_hand)]),
        limits=_rates(window.limit for window in throttle.windows if window.limit != NO_RATE),
        places=throttle.cap or None,
        state=state,
        backoff=backoff,
        used=throttle.used,
        waiting=sum(row.waiting for row in instances.values()),
        demand=sum(row.demand for row in instances.values()),
        next_slot=max(0, throttle.earliest(now) - now - 999) / SECOND if throttle.windows else None,
        taken=throttle.taken,
        place_use=throttle.used / throttle.cap if throttle.cap else None,
        rate_use=meter.use(throttle, now),
        instances=sorted(shown, key=lambda row: row.name),
        instances_left_out=len(instances) - len(shown),
        receiver=throttle.key.receiver,
        shadow=throttle.shadow is not None,
        would_wait=throttle.shadow.waited if throttle.shadow is not None else 0,
        would_refuse=throttle.shadow.refused if throttle.shadow is not None else 0,
        warmup_day=day,
        warmup_days=days,
    )


def _by_hand(override: Override, now: int) -> str:
    because = f" ({override.because[:LONGEST_REASON]})" if override.because else ""
    return f"{told(override)}, for {whole_seconds((override.until - now) / SECOND)} more{because}"


def _holders(throttle: Throttle) -> dict[str, InstanceRow]:
    """Who holds places or stands in the line."""
    rows = {name: InstanceRow(name, used=used) for name, used in (throttle.held or {}).items()}
    for name, (waiting, _) in throttle.line.waiting().items() if throttle.line is not None else ():
        rows.setdefault(name, InstanceRow(name)).waiting = waiting
    return rows


def _add_part(rows: dict[str, InstanceRow], stake: Stake, manager: Manager) -> Iterator[None]:
    """What an instance said, and what its flows want."""
    row = rows.setdefault(stake.name, InstanceRow(stake.name))
    part = stake.part
    row.limits, row.places = _rates(part.limits), part.places or None
    row.mode, row.paused = str(part.mode), part.paused
    row.connected = len(stake) > 0 and stake.name in manager.sessions
    for number, flow in enumerate(list(stake), 1):
        row.demand += max(0, flow.want - flow.fine)
        row.waiting += len(flow.gated or ())
        if number % STEP == 0:
            yield


def _state(throttle: Throttle, stakes: list[Stake], now: int) -> tuple[str, float]:
    backoff = throttle.terms.backoff if throttle.terms is not None else None
    if stakes and all(stake.part.paused for stake in stakes):
        return "paused", 0.0
    if backoff is None:
        return "", 0.0
    return ("backoff", (backoff.until - now) / SECOND) if backoff.until > now else ("rising", 0.0)


def _reconciled(parts: list[Part]) -> str:
    """How `limits.reconcile` made one set of limits of these."""
    active = [part for part in parts if not part.paused]
    sums = sum(1 for part in active if part.mode is Mode.SUM)
    paused = f", {len(parts) - len(active)} paused" if len(parts) > len(active) else ""
    if len(active) < 2:
        return ("one instance" if active else "no instance") + paused
    if 0 < sums < len(active):
        return f"lower of sum ({sums}) and average ({len(active) - sums})" + paused
    return f"{'sum' if sums else 'average'} of {len(active)}" + paused


def _rates(limits: Iterable[Limit]) -> list[Rate]:
    return [Rate(*limit) for limit in limits]
