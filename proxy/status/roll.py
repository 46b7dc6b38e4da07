"""The master's book about the processes: who they are, what each has said last, and what the dead had counted.

Pure; who implements `Colleagues` keeps one, and enters what happens. What has been counted is counted: when a worker is
gone, its counters stay in the sums, and what it had open does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import nlargest

from msgspec import structs

from proxy.policy.trouble import MOST
from proxy.stats import MAX_NAMES, OTHER
from proxy.status.colleagues import LEAVING, MASTER, WORKER, Member
from proxy.status.parts import Counted, Details, FailingPart, Part, PeerPart, PoolPart, ProcessPart, merge

#: Times of deaths that are remembered of each number.
_MOST_DEATHS = 16


class Roll:
    """All of them by number.

    Args:
        pid, version: of the master, which keeps this. now: when it was started.
    """

    def __init__(self, pid: int, version: str, now: float) -> None:
        self._members = {0: Member(0, MASTER, pid, version, now)}
        self._parts: dict[int, Part] = {}
        self._gone = Part()

    def begun(self, who: int, pid: int, version: str, now: float, role: str = WORKER) -> None:
        """A process was started, perhaps in the place of one that died; its time to say something begins."""
        before = self._members.get(who) or Member(who, role, pid, version, now)
        self._members[who] = before._replace(role=role, pid=pid, version=version, since=now, heard_at=now)

    def leaves(self, who: int) -> None:
        """It takes nothing new from now on."""
        self._members[who] = self._members[who]._replace(role=LEAVING)

    def heard(self, who: int, part: Part, now: float) -> None:
        """It has said this; one without details leaves the details as they were. Of who is gone nothing is heard."""
        member = self._members.get(who)
        if member is None or not member.pid:
            return
        before = self._parts.get(who)
        if part.details is None and before is not None:
            part = structs.replace(part, details=before.details)
        self._parts[who] = structs.replace(part, processes=_as_one_process(who, member.pid, part.processes))
        self._members[who] = member._replace(heard_at=now)

    def died(self, who: int, why: str, now: float) -> None:
        """It has died, and another will take its place; `why`: in words."""
        self._count_in(who)
        member = self._members[who]
        deaths = (*member.deaths, now)[-_MOST_DEATHS:]
        self._members[who] = member._replace(pid=0, restarts=member.restarts + 1, died=why, deaths=deaths)

    def ended(self, who: int) -> None:
        """It has ended, and nothing takes its place."""
        self._count_in(who)
        self._members.pop(who, None)

    def _count_in(self, who: int) -> None:
        part = self._parts.pop(who, None)
        if part is not None:
            self._gone = _bounded(merge([self._gone, remains(part)]))

    def members(self) -> list[Member]:
        """See `Colleagues`."""
        return [self._members[who] for who in sorted(self._members)]

    def heard_at(self, who: int) -> float:
        """When it has said something last."""
        return self._members[who].heard_at

    def parts(self) -> list[Part]:
        """See `Colleagues`."""
        return [*(self._parts[who] for who in sorted(self._parts)), self._gone]

    def highest(self) -> int:
        """The highest number of a connection that any has told of; see `numbering`."""
        return merge(self.parts()).highest


def _as_one_process(who: int, pid: int, processes: list[ProcessPart]) -> list[ProcessPart]:
    """One that was replaced has workers of its own, and is one row with them."""
    if not processes:
        return []
    one = structs.replace(min(processes, key=lambda each: each.number), number=who, pid=pid)
    for name in ("cpu", "resident", "virtual", "descriptors", "most_descriptors", "open_connections"):
        setattr(one, name, sum(getattr(each, name) for each in processes))
    return [one]


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
