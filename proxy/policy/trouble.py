"""What has gone wrong lately with each receiver and source address, and which requests were refused: bounded tables.

A receiver or a source is entered when something goes wrong, and keeps its record until others that fail later need the
room; so what goes well costs one look into a dict. It is *failing* while nothing has gone well since: a receiver that
answers 550 to some and takes mail from others is not. Time is an argument, in seconds. What is worth an operator's
attention is decided by `status.trouble`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from proxy.errors import ProxyError, SourceMissing, Step, UpstreamError
from proxy.model import Endpoint

#: Seconds that "lately" means, and the steps in which it moves on.
LATELY = 300
_STEP = 30
_SLOTS = LATELY // _STEP

#: Records that are kept, of receivers and of sources. Many times what is shown.
MOST = 500

Name = TypeVar("Name", bound=Hashable)


def slot_of(now: float) -> int:
    """Number of the half minute; the same for all who share a clock."""
    return int(now // _STEP)


def lately(slots: Mapping[int, int], now: float) -> int:
    """How many of what is counted by slots were in the last five minutes."""
    newest = slot_of(now)
    return sum(count for slot, count in slots.items() if newest - _SLOTS < slot <= newest)


class Recent:
    """How often something happened in the last five minutes, to half a minute."""

    __slots__ = ("_counts", "_last")

    def __init__(self) -> None:
        self._counts = [0] * _SLOTS
        self._last = 0  # number of the newest slot

    def add(self, now: float, count: int = 1) -> None:
        self._turn(now)
        self._counts[self._last % _SLOTS] += count

    def total(self, now: float) -> int:
        self._turn(now)
        return sum(self._counts)

    def slots(self, now: float) -> dict[int, int]:
        """The same by number of the half minute."""
        self._turn(now)
        oldest = max(0, self._last - _SLOTS + 1)
        numbers = range(oldest, self._last + 1)
        return {number: count for number in numbers if (count := self._counts[number % _SLOTS])}

    def _turn(self, now: float) -> None:
        slot = slot_of(now)
        if slot == self._last:
            return
        for passed in range(max(self._last, slot - _SLOTS) + 1, slot + 1):
            self._counts[passed % _SLOTS] = 0
        self._last = max(slot, self._last)


class Record:
    """Of one receiver or source.

    Attributes:
        opened: connections that have ended since this record began.
        failed: connections that did not come to be, by step.
        deferred, rejected: replies 4xx and 5xx, to greeting, MAIL, RCPT and message.
        recent: all of these together.
        failing_since: when the first of them came after something went well; None: something has gone well since.
        in_a_row: how many came since then.
        good_at: when something went well last; 0: not since the record began.
        last, last_at: the reason or reply of the last one, and when.
    """

    __slots__ = (
        *("deferred", "failed", "failing_since", "good_at", "in_a_row", "last", "last_at", "opened", "recent"),
        "rejected",
    )

    def __init__(self) -> None:
        self.opened = 0
        self.failed: dict[str, int] = {}
        self.deferred = 0
        self.rejected = 0
        self.recent = Recent()
        self.failing_since: float | None = None
        self.in_a_row = 0
        self.good_at = 0.0
        self.last = ""
        self.last_at = 0.0

    def note(self, text: str, count: int, now: float) -> None:
        self.recent.add(now, count)
        self.in_a_row += count
        if self.failing_since is None:
            self.failing_since = now
        self.last, self.last_at = text, now


class Table(dict[Name, Record], Generic[Name]):
    """Records by name, in the order of the last thing that went wrong."""

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self._most = most

    def record(self, name: Name) -> Record:
        """Of this one, for something that went wrong now."""
        record = self.pop(name, None)
        if record is None:
            record = Record()
            if len(self) >= self._most:
                del self[next(iter(self))]
        self[name] = record
        return record

    def expect(self, names: Iterable[Name]) -> None:
        """Something goes wrong with these in another process: from now on it is known here, too, what goes well with
        them. As long as there is room."""
        for name in names:
            if len(self) < self._most and name not in self:
                self[name] = Record()


class Refusals:
    """Of one kind of request."""

    __slots__ = ("last", "last_at", "recent", "since")

    def __init__(self) -> None:
        self.recent = Recent()
        self.since = 0.0  # the first one without a pause of `LATELY`
        self.last = ""
        self.last_at = -float(LATELY)


class Troubles:
    """All of it.

    Attributes:
        receivers, sources: their records.
        gone: source addresses that were on this machine and are no more → since when.
        refused: by the error's code, a closed vocabulary; accepts that failed among them.
    """

    def __init__(self, most: int = MOST) -> None:
        self.receivers: Table[Endpoint] = Table(most)
        self.sources: Table[str] = Table(most)
        self.gone: dict[str, float] = {}
        self.refused: dict[str, Refusals] = {}
        self._most = most

    def failed(self, source: str, destination: Endpoint | None, error: UpstreamError, now: float) -> None:
        """A connection did not come to be. A throttle's no is nobody's trouble, and a source that may not be used is
        not the receiver's."""
        if error.step is Step.THROTTLE:
            return
        if isinstance(error, SourceMissing):
            source = error.source
        said = error.smtp_reply
        text = said.splitlines()[-1] if said else str(error)
        records = [self.sources.record(source)] if source else []
        if destination is not None and error.step is not Step.BIND:
            records.append(self.receivers.record(destination))
        for record in records:
            record.failed[error.step] = record.failed.get(error.step, 0) + 1
            if said:
                _count_reply(record, said)
            record.note(text, 1, now)

    def over(
        self,
        source: str,
        destination: Endpoint | None,
        reply: str,
        good: bool,
        now: float,
        deferred: int = 0,
        rejected: int = 0,
    ) -> None:
        """A connection to a receiver has ended.

        Args:
            reply: the last refusal that was seen, "": none.
            good: it took a message, or where the dialogue is not seen, said something that was no refusal.
            deferred, rejected: replies 4xx and 5xx; none of both with a reply: that was the greeting.
        """
        if not reply and not (self.receivers or self.sources):
            return
        self._over(self.sources, source, reply, good, now, deferred, rejected)
        if destination is not None:
            self._over(self.receivers, destination, reply, good, now, deferred, rejected)

    def _over(
        self, table: Table[Name], name: Name, reply: str, good: bool, now: float, deferred: int, rejected: int
    ) -> None:
        record = table.record(name) if reply else table.get(name)
        if record is None:
            return
        record.opened += 1
        record.deferred += deferred
        record.rejected += rejected
        if reply:
            if not deferred + rejected:
                _count_reply(record, reply)
            record.note(reply, max(1, deferred + rejected), now)
        if good:
            record.failing_since, record.in_a_row, record.good_at = None, 0, now

    def refuse(self, error: ProxyError, now: float) -> None:
        """A request was refused."""
        self._note(error.code, str(error), now)

    def accept_failed(self, why: str, now: float) -> None:
        """A listener could not accept; told among what was refused."""
        self._note("accept_errors", why, now)

    def _note(self, code: str, why: str, now: float) -> None:
        refusals = self.refused.get(code)
        if refusals is None:
            refusals = self.refused[code] = Refusals()
        if now - refusals.last_at >= LATELY:
            refusals.since = now
        refusals.recent.add(now)
        refusals.last, refusals.last_at = why, now

    def source_gone(self, host: str, now: float) -> None:
        """It is not on this machine any more."""
        if len(self.gone) >= self._most:
            del self.gone[next(iter(self.gone))]
        self.gone[host] = now

    def source_came(self, host: str) -> None:
        self.gone.pop(host, None)


def _count_reply(record: Record, reply: str) -> None:
    if reply[0] == "4":
        record.deferred += 1
    else:
        record.rejected += 1
