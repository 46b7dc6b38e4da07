"""The throttle store as a row: which engine, since when it answers or not, and the throttles that it holds.

What it does is counted where it is asked; here is only how that is shown. Works in steps, as `view` does.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from heapq import nsmallest
from itertools import islice
from typing import NamedTuple

from proxy.stats import LeasedFigures, StoreFigures
from proxy.status.rows import LeasedRow, Rate, StoreRow

#: Throttles that are listed: those that go on alone first, then those of which most was leased.
MOST_KEYS = 200
#: Looked at between two yields.
_STEP = 500
#: Seconds after which the calls of an earlier look are replaced.
_SAMPLE = 10.0


class _Sample(NamedTuple):
    at: float
    calls: int


class Pace:
    """How often the store is asked: compares its calls with those of the last look and the one before."""

    def __init__(self) -> None:
        self._older = self._newer = _Sample(-1.0, 0)

    def calls_a_second(self, calls: int, now: float) -> float | None:
        """Since an earlier look; None: there was none, or just now, or of another store."""
        fresh = _Sample(now, calls)
        if self._newer.at < 0 or calls < self._newer.calls:
            self._older = self._newer = fresh
            return None
        if now - self._newer.at >= _SAMPLE:
            self._older, self._newer = self._newer, fresh
        elapsed = now - self._older.at
        return (calls - self._older.calls) / elapsed if elapsed >= 1 else None


def store_row(
    store: StoreFigures, pace: Pace | None, now: float, name_of_source: Callable[[str], str]
) -> Generator[None, None, StoreRow]:
    """The row.

    Args:
        pace: of the looks before; None: this is the only one. now: seconds of its clock.
    """
    keys: list[LeasedFigures] = []
    rest = iter(store.leased)
    while step := list(islice(rest, _STEP)):
        keys = nsmallest(MOST_KEYS, [*keys, *step], key=_rank)
        yield
    return StoreRow(
        address=store.address,
        state="connected" if store.connected else "degraded",
        since=store.since,
        engine=store.engine,
        version=store.version,
        form=store.form,
        master=store.master,
        why=store.why,
        members=store.members,
        seen=store.seen,
        throttles=store.leased_count,
        calls=store.calls,
        calls_a_second=pace.calls_a_second(store.calls, now) if pace is not None else None,
        throttles_asked=store.keys,
        slots=store.slots,
        lost=store.lost,
        refused=store.refused,
        discarded=store.discarded,
        epochs=store.epochs,
        degraded=store.degraded,
        p50=store.p50,
        p99=store.p99,
        keys=[_leased_row(each, name_of_source) for each in keys],
        keys_left_out=max(0, store.leased_count - len(keys)),
    )


def _rank(key: LeasedFigures) -> tuple[bool, int, str, str, str]:
    return not key.alone, -key.leased, key.name, key.source, key.receiver


def _leased_row(key: LeasedFigures, name_of_source: Callable[[str], str]) -> LeasedRow:
    return LeasedRow(
        name=key.name,
        source=key.source,
        receiver=key.receiver,
        source_name=name_of_source(key.source),
        limits=_rates(key.limits),
        places=key.places or None,
        share=_rates(key.share),
        share_places=key.places_share if key.places else None,
        places_here=key.cap if key.places else None,
        leased=key.leased,
        unused=key.unused,
        users=key.users,
        state="alone" if key.alone else "local" if key.local else "leased",
    )


def _rates(limits: Iterable[tuple[int, int, int]]) -> list[Rate]:
    return [Rate(*limit) for limit in limits]
