"""What the master knows of the figures of its workers: the last part that each has said, and what the dead had counted.

Pure; who implements `Colleagues` keeps one. What has been counted is counted: when a worker is gone, its counters stay
in the sums, and what it had open does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import nlargest

from msgspec import structs

from proxy.policy.trouble import MOST
from proxy.stats import MAX_NAMES, OTHER
from proxy.status.parts import Counted, Details, FailingPart, Part, PeerPart, PoolPart, merge


class Roll:
    """The workers by number, and those that are gone, as one."""

    def __init__(self) -> None:
        self._parts: dict[int, Part] = {}
        self._gone = Part()

    def heard(self, who: int, part: Part) -> None:
        """It has said this; one without details leaves the details as they were."""
        before = self._parts.get(who)
        if part.details is None and before is not None:
            part = structs.replace(part, details=before.details)
        self._parts[who] = part

    def gone(self, who: int) -> None:
        """It is gone; also if it never said anything."""
        part = self._parts.pop(who, None)
        if part is not None:
            self._gone = _bounded(merge([self._gone, remains(part)]))

    def parts(self) -> list[Part]:
        """Of each, by number, and in the last place those that are gone."""
        return [*(self._parts[who] for who in sorted(self._parts)), self._gone]

    def highest(self) -> int:
        """The highest number of a connection that any has told of."""
        return merge(self.parts()).highest


def remains(part: Part) -> Part:
    """What stays of a process that is gone: all that only grows, and what it has seen go wrong."""
    details = part.details
    if details is not None:
        details = Details(receivers=details.receivers, sources=details.sources, refused=details.refused)
    return Part(
        counters=part.counters,
        spans=part.spans,
        pool=PoolPart(
            offered=part.pool.offered, hits=part.pool.hits, misses=part.pool.misses, discards=part.pool.discards
        ),
        cpu=part.cpu,
        lost=part.lost,
        newcomers_dropped=part.newcomers_dropped,
        highest=part.highest,
        details=details,
    )


# However many die, no more is remembered of them than of one.


def _bounded(part: Part) -> Part:
    details = part.details
    if details is not None:
        details = structs.replace(details, receivers=_latest(details.receivers), sources=_latest(details.sources))
    return structs.replace(part, counters=_few_names(part.counters), details=details)


def _latest(peers: Mapping[str, PeerPart]) -> dict[str, PeerPart]:
    names = nlargest(MOST, peers, key=lambda name: peers[name].last_at)
    return {name: _as_one(peers[name]) for name in names}


def _as_one(peer: PeerPart) -> PeerPart:
    if len(peer.failing) < 2:
        return peer
    since, until = min(each.since for each in peer.failing), max(each.until for each in peer.failing)
    together = FailingPart(since, until, sum(each.failures for each in peer.failing))
    return structs.replace(peer, failing=[together])


def _few_names(counters: Counted) -> Counted:
    """The first names of each table, which have been there longest; the others as `stats.Table` has them."""
    bounded: Counted = {}
    for name, value in counters.items():
        if isinstance(value, dict) and len(value) > MAX_NAMES:
            names = [each for each in value if each != OTHER][:MAX_NAMES]
            rest = sum(value.values()) - sum(value[each] for each in names)
            value = {each: value[each] for each in names} | {OTHER: rest}
        bounded[name] = value
    return bounded
