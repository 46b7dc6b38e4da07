"""The slowing down of the proxy's own throttles by what receivers reply: what each has been told, and until when.

Which replies concern a block is decided by `Rules` (in `policy.limits`). A rule of a block that is struck, or struck
once too often within its time, begins a `limits.Backoff`; one that goes on is begun anew. Several may be on at the same
throttle: the least that any of them leaves holds. What is limited by it is `blocks`'s.

Kept by key, not by throttle: an idle throttle may be forgotten, a back-off not before its end. Nothing is stored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from proxy.stats import Limiter
from proxy.throttling.limits import Backoff, BackoffRule, Effective
from proxy.throttling.registry import Notice, Remark
from proxy.throttling.throttle import SECOND, TICK, Key, Limit
from proxy.throttling.wheel import Wheel

#: Keys of which something is remembered; beyond that those go that were told something the longest time ago.
MOST_KEYS = 65_536
#: Percent of each limit that come back first.
_AFTER_A_PAUSE = 10
#: Characters of a reply that are kept, to be shown.
_LONGEST_REPLY = 200


class Rate(Protocol):
    """`amount` replies, or messages, in `seconds` seconds."""

    @property
    def amount(self) -> int: ...
    @property
    def seconds(self) -> int: ...


class Rule(Hashable, Protocol):
    """One `backoff` rule of a block, equal to itself after a reload.

    `on`: the patterns, as they are written. `over`: more replies than that; None: the first does it. `percent` of each
    limit, or `rate`, or `pause`. Seconds.
    """

    @property
    def on(self) -> Sequence[str]: ...
    @property
    def over(self) -> Rate | None: ...
    @property
    def percent(self) -> int: ...
    @property
    def rate(self) -> Rate | None: ...
    @property
    def pause(self) -> bool: ...
    @property
    def return_after(self) -> float: ...


class Cause(NamedTuple):
    """A back-off that is on, and why.

    Args:
        reply: the last one that began it, or began it anew. instance: who got it.
    """

    rule: Rule
    backoff: Backoff
    reply: str
    instance: str


class Slowdown:
    """Of one key.

    Attributes:
        ended: why it has been ended before its time; "": it was not.
    """

    __slots__ = ("_causes", "_struck", "ended")

    def __init__(self) -> None:
        self.ended = ""
        self._causes: dict[Rule, Cause] = {}
        self._struck: dict[Rule, deque[int]] = {}

    @property
    def on(self) -> bool:
        """Whether any back-off is."""
        return bool(self._causes)

    @property
    def causes(self) -> Sequence[Cause]:
        """In the order in which they began."""
        return list(self._causes.values())

    @property
    def rules(self) -> frozenset[Rule]:
        """Those that are on."""
        return frozenset(self._causes)

    @property
    def struck(self) -> Sequence[tuple[Rule, list[int]]]:
        """When replies came that fit a rule which lets some pass."""
        return [(rule, list(times)) for rule, times in self._struck.items()]

    def adopt(self, cause: Cause) -> None:
        self._causes[cause.rule] = cause

    def adopt_struck(self, rule: Rule, times: Iterable[int]) -> None:
        if rule.over is not None:
            self._struck.setdefault(rule, deque(maxlen=rule.over.amount + 1)).extend(times)

    def strike(self, rule: Rule, reply: str, instance: str, now: int) -> bool:
        """A reply that fits; whether it slows down, or slows down for longer."""
        if rule.over is not None and not self._too_many(rule, rule.over, now):
            return False
        self._causes[rule] = Cause(rule, Backoff(terms_of(rule), now), reply, instance)
        return True

    def _too_many(self, rule: Rule, over: Rate, now: int) -> bool:
        times = self._struck.get(rule)
        if times is None:
            times = self._struck[rule] = deque(maxlen=over.amount + 1)
        times.append(now)
        if len(times) <= over.amount or now - times[0] >= over.seconds * SECOND:
            return False
        del self._struck[rule]  # each of them counts once
        return True

    def end(self, why: str) -> None:
        """Let all be over, and forget what has been counted."""
        self.ended = why if self._causes else self.ended
        self._causes.clear()
        self._struck.clear()

    def settle(self, now: int) -> None:
        """Forget those that are over."""
        for rule in [each for each, cause in self._causes.items() if cause.backoff.over(now)]:
            del self._causes[rule]

    def apply(self, full: Effective, now: int, messages: bool) -> Effective:
        """The least of what each leaves; `messages`: these limits are for them, and a rule's `rate` is meant."""
        limits = {limit.seconds: limit for limit in full.limits}
        places = full.places
        for cause in self._causes.values():
            backoff = cause.backoff if messages or cause.backoff.rule.rate is None else None
            slowed = backoff.apply(full, now) if backoff is not None else full
            for limit in slowed.limits:
                known = limits.get(limit.seconds, limit)
                limits[limit.seconds] = limit if limit.amount < known.amount else known
            places = min(places, slowed.places) if places else 0
        return Effective(tuple(limits[seconds] for seconds in sorted(limits)), places)

    def closed_until(self, now: int) -> int:
        """When the last pause ends; 0: there is none."""
        ends = [cause.backoff.until for cause in self._causes.values() if cause.rule.pause]
        return max([end for end in ends if end > now], default=0)

    def next_change(self, now: int) -> int:
        """When a limit changes next."""
        return min(cause.backoff.next_change(now) for cause in self._causes.values())


class Backoffs:
    """Of all blocks.

    Attributes:
        wheel: keys by the time of their next change.
        begun: how many throttles have begun to slow down so far. remarks: for the log.
    """

    def __init__(self) -> None:
        self.wheel: Wheel[Key] = Wheel(TICK)
        self.begun = 0
        self.remarks: list[Remark] = []
        self._slowdowns: dict[Key, Slowdown] = {}
        self._told = Limiter()

    def everything(self) -> list[tuple[Key, Slowdown]]:
        """Of all keys of which anything is remembered, the longest ago first."""
        return list(self._slowdowns.items())

    def adopt(self, key: Key, slowdown: Slowdown, now: int) -> None:
        """What another manager had, after those that were adopted before."""
        self._slowdowns[key] = slowdown
        if slowdown.on:
            self.wheel.arm(key, slowdown.next_change(now))
        elif slowdown.ended:
            self.wheel.arm(key, now)

    def __len__(self) -> int:
        """Throttles that are slowed down now."""
        return sum(1 for _ in self.active())

    def of(self, key: Key) -> Slowdown | None:
        """What slows a throttle down now."""
        slowdown = self._slowdowns.get(key)
        return slowdown if slowdown is not None and slowdown.on else None

    def active(self) -> Iterator[tuple[Key, Slowdown]]:
        """All that are slowed down now."""
        return ((key, slowdown) for key, slowdown in self._slowdowns.items() if slowdown.on)

    @property
    def latest(self) -> tuple[Key, Slowdown] | None:
        """The one that was told something last, of those that are slowed down."""
        on = (key for key in reversed(self._slowdowns) if self._slowdowns[key].on)
        key = next(on, None)
        return None if key is None else (key, self._slowdowns[key])

    def strike(self, key: Key, rules: Iterable[Rule], reply: str, instance: str, now: int) -> list[Key]:
        """A reply under this throttle that fits these; the throttles whose limits have changed by that."""
        slowdown, changed = self._slowdowns.pop(key, None), []
        if slowdown is None:
            slowdown = Slowdown()
            if len(self._slowdowns) >= MOST_KEYS:
                changed.append(oldest := next(iter(self._slowdowns)))
                self._forget(oldest)
        self._slowdowns[key] = slowdown
        before, reply = slowdown.rules, reply[:_LONGEST_REPLY].encode("utf-8", "backslashreplace").decode()
        struck = [each for each in rules if slowdown.strike(each, reply, instance, now)]
        if not struck:
            return changed
        slowdown.ended = ""
        self.wheel.arm(key, slowdown.next_change(now))
        self.begun += not before
        fresh = [each for each in struck if each not in before]
        if fresh:
            what = " and ".join(dict.fromkeys(act(each) for each in fresh))
            longest = max(each.return_after for each in fresh)
            self._tell(Remark(Notice.BACKOFF, instance, f"{key}: {what}, for {longest:g} s", reply), key, now)
        return [*changed, key]

    def expire(self, now: int, most: int) -> list[Key]:
        """Throttles whose limits change now, as their back-off ends or they come back."""
        due = self.wheel.expire(now, most)
        for key in due:
            slowdown = self._slowdowns[key]
            slowdown.settle(now)
            if slowdown.on:
                self.wheel.arm(key, slowdown.next_change(now))
            else:
                why = slowdown.ended or "has its own limits again"
                self._tell(Remark(Notice.BACKOFF, "", f"{key} {why}", calm=True), key, now)
                self._forget(key)
        return due

    def end(self, names: Iterable[str], why: str, now: int) -> int:
        """End those of all throttles of these blocks, of how many; see to it by `expire`."""
        wanted, count = set(names), 0
        for key, slowdown in self._slowdowns.items():
            if key.name in wanted:
                if slowdown.on:  # else there is nothing to come back from, and nothing to tell
                    count += 1
                    self.wheel.arm(key, now)
                slowdown.end(why)
        return count

    def _tell(self, remark: Remark, key: Key, now: int) -> None:
        """Some of each block in a minute: it may have a throttle for each receiver."""
        self._told.expired(now / SECOND)
        if self._told.admit(f"{key.name} {remark.calm}", now / SECOND):
            self.remarks.append(remark)

    def _forget(self, key: Key) -> None:
        del self._slowdowns[key]
        self.wheel.disarm(key)


def act(rule: Rule) -> str:
    """`25 % of each limit`; what a rule comes to, in words."""
    if rule.pause:
        return "paused"
    if rule.rate is not None:
        return f"{rule.rate.amount} messages in {rule.rate.seconds} s"
    return f"{rule.percent} % of each limit"


def terms_of(rule: Rule) -> BackoffRule:
    rate = Limit(rule.rate.amount, rule.rate.seconds) if rule.rate is not None else None
    percent = _AFTER_A_PAUSE if rule.pause else 100 if rate is not None else rule.percent
    return BackoffRule(percent, rate, int(rule.return_after * SECOND))
