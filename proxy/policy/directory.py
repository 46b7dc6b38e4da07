"""What recipient domains mean at the moment: their MX hosts, and the addresses of these, as DNS says.

`look_up` is one look-up: it yields questions, is sent the replies, and returns an `Answer`. The `Book` says whom to
look up when, keeps the last good answers, and is the `Directory` of `policy.matching`. Names are resolved forward,
never by PTR. Pure: `egress.look_ups` asks; seconds of a monotonic clock are arguments.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal, NamedTuple

from proxy.model import Breathe, hold_breath

#: More than a receiver has in earnest; what an answer has beyond it is left out, and that is shown.
MOST_HOSTS, MOST_ADDRESSES = 30, 20
#: Seconds: an answer is good for its TTL within these bounds.
SHORTEST, LONGEST = 30.0, 3600.0
#: Seconds until the next attempt, doubled with each failure in a row.
_FIRST_RETRY, _LONGEST_RETRY = 30.0, 600.0

Kind = Literal["MX", "A", "AAAA", "TLSA"]


class Question(NamedTuple):
    name: str
    kind: Kind


class Reply(NamedTuple):
    """What became of one question, aliases followed.

    Args:
        records: addresses; of MX the hosts, best first, in canonical spelling, "" for the root; TLSA: its three
            numbers and the hexadecimal digits of its data.
        ttl: seconds, the shortest on the way.
        failure: in words; "" for an answer. That a name has nothing of the kind is an answer.
        secure: a server that we believe has checked all of it by DNSSEC.
        name: where the aliases lead to.
        nxdomain: it failed because there is no such name.
    """

    records: tuple[str, ...] = ()
    ttl: float = LONGEST
    failure: str = ""
    secure: bool = False
    name: str = ""
    nxdomain: bool = False


class Host(NamedTuple):
    """`addresses` is None where they could not be had."""

    name: str
    addresses: tuple[str, ...] | None


class Answer(NamedTuple):
    """What a look-up came to; `hosts` is None when it failed altogether. `doubt`: what failed, or was too much."""

    hosts: tuple[Host, ...] | None
    ttl: float
    doubt: str = ""


def look_up(domain: str) -> Generator[Question, Reply, Answer]:
    """MX, then A and AAAA of each host. A domain without MX is its own host (RFC 5321, 5.1), one with a null MX
    has none (RFC 7505)."""
    mx = yield Question(domain, "MX")
    if mx.failure:
        return Answer(None, SHORTEST, mx.failure)
    names = tuple(dict.fromkeys(name for name in mx.records if name)) if mx.records else (domain,)
    doubt = f"has {len(names)} MX hosts, {MOST_HOSTS} count" if len(names) > MOST_HOSTS else ""
    hosts, ttl = [], mx.ttl
    for name in names[:MOST_HOSTS]:
        found: list[str] = []
        failure = ""
        for kind in ("A", "AAAA"):
            reply = yield Question(name, kind)
            found += reply.records
            ttl, failure = min(ttl, reply.ttl), failure or reply.failure
        if len(found) > MOST_ADDRESSES:
            doubt = doubt or f"{name} has {len(found)} addresses, {MOST_ADDRESSES} count"
        doubt = failure or doubt
        hosts.append(Host(name, None if failure else tuple(found[:MOST_ADDRESSES])))
    return Answer(tuple(hosts), ttl, doubt)


@dataclass(slots=True)
class Entry:
    """One domain. `known`: host → addresses, of the last good answers; `doubt`: what the last look-up failed with."""

    domain: str
    known: dict[str, tuple[str, ...]] = field(default_factory=dict)
    answered: bool = False
    doubt: str = ""
    failures: int = 0
    due: float = 0.0


class Book:
    """All domains that are looked up, and whose an address is.

    Attributes:
        entries: by domain.
        unheard: domains of which nothing was heard yet, not even a failure.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.unheard: set[str] = set()
        self._order: list[tuple[float, str]] = []  # those whose time is not their entry's are of no account
        self._hosts: dict[str, dict[str, int]] = {}  # address → host → domains that name it
        self._domains: dict[str, dict[str, None]] = {}

    def hosts(self, address: str) -> tuple[str, ...]:
        return tuple(sorted(self._hosts.get(address, ())))

    def domains(self, address: str) -> tuple[str, ...]:
        return tuple(self._domains.get(address, ()))

    def hosts_of(self, address: str, domains: Iterable[str]) -> tuple[str, ...]:
        known = [self.entries[domain].known for domain in domains if domain in self.entries]
        return tuple(dict.fromkeys(host for hosts in known for host, has in hosts.items() if address in has))

    def want(self, domains: Iterable[str], now: float, breathe: Breathe = hold_breath) -> bool:
        """These from now on; new ones are due at once. Whether what is known has changed."""
        wanted = set(domains)
        changed = False
        for domain in [domain for domain in self.entries if domain not in wanted]:
            breathe()
            entry = self.entries.pop(domain)
            self.unheard.discard(domain)
            changed |= bool(entry.known)
            self._replace(entry, {})
        for domain in wanted:
            breathe()
            if domain not in self.entries:
                self.unheard.add(domain)
                self._schedule(self.entries.setdefault(domain, Entry(domain)), now)
        return changed

    def renew(self, now: float) -> None:
        """All are due: another server may know other things."""
        for entry in self.entries.values():
            self._schedule(entry, now)

    def next(self, now: float) -> str | None:
        """A domain that is due; it is not given again before its answer has come."""
        while self._order and self._order[0][0] <= now:
            due, domain = heappop(self._order)
            entry = self.entries.get(domain)
            if entry is not None and entry.due == due:
                entry.due = float("inf")
                return domain
        return None

    def idle(self, now: float) -> float | None:
        """Seconds until the next is due; None: none is."""
        return max(0.0, self._order[0][0] - now) if self._order else None

    def learn(self, domain: str, answer: Answer, now: float) -> bool:
        """Whether it changes what is known. What could not be had is as it was."""
        entry = self.entries.get(domain)
        if entry is None:  # nobody wants it any more
            return False
        self.unheard.discard(domain)
        entry.doubt = answer.doubt
        failed = answer.hosts is None or any(host.addresses is None for host in answer.hosts)
        entry.failures = entry.failures + 1 if failed else 0
        pause = min(_LONGEST_RETRY, _FIRST_RETRY * 2 ** min(entry.failures - 1, 10))
        self._schedule(entry, now + (pause if failed else min(LONGEST, max(SHORTEST, answer.ttl))))
        if answer.hosts is None:
            return False
        entry.answered = True
        old = entry.known
        fresh = {
            host.name: old.get(host.name, ()) if host.addresses is None else host.addresses for host in answer.hosts
        }
        if {name: set(each) for name, each in fresh.items()} == {name: set(each) for name, each in old.items()}:
            return False
        self._replace(entry, fresh)
        return True

    def _schedule(self, entry: Entry, due: float) -> None:
        entry.due = due
        heappush(self._order, (due, entry.domain))

    def _replace(self, entry: Entry, fresh: dict[str, tuple[str, ...]]) -> None:
        """The one place that moves an entry's addresses into the tables and out of them."""
        for host, address in _pairs(entry.known):
            count = self._hosts[address]
            count[host] -= 1
            if not count[host]:
                del count[host]
            self._domains[address].pop(entry.domain, None)
            if not count:
                del self._hosts[address], self._domains[address]
        entry.known = fresh
        for host, address in _pairs(fresh):
            count = self._hosts.setdefault(address, {})
            count[host] = count.get(host, 0) + 1
            self._domains.setdefault(address, {})[entry.domain] = None


def _pairs(known: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    for host, addresses in known.items():
        for address in dict.fromkeys(addresses):
            yield host, address
