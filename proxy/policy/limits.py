"""Which `throttle` blocks hold for a connection, and what counts by itself under each: the blocks of one `Settings`.

A block asks up to three questions: who asks (`instance`), from where (`source`), to which receiver (`domain`, `mx`,
`destination`: any of these will do). A connection may fit several blocks, and all of them hold.

Thousands of blocks cost no more than a few. What blocks ask is interned: of each question only the different answers
are kept, each with a number, in tables by exact name, by the end of a name and by length of prefix. A connection has a
handful of numbers for each question (one for each different list that it stands in), and for these, or for the few
combinations that occur, the blocks are looked up.

Pure: what names stand for is a `Directory`'s, which changes with DNS; nothing is remembered here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from ipaddress import ip_address
from typing import NamedTuple, Protocol

from proxy.model import UNNAMED, Breathe, Names, hold_breath
from proxy.settings import Network, SourceSettings, ThrottleSettings

#: The answer of who does not ask.
_ANY = 0


class Hit(NamedTuple):
    """A block that holds, and what counts by itself there: `source` and `receiver` are "" where all are together."""

    block: str
    source: str
    receiver: str


class Directory(Protocol):
    """What is known of an address."""

    def hosts(self, address: str) -> tuple[str, ...]:
        """The MX hosts that have it, the first one standing for all."""

    def domains(self, address: str) -> tuple[str, ...]:
        """The recipient domains that it is an MX of."""


class Nothing:
    """The directory of who looks nothing up."""

    def hosts(self, address: str) -> tuple[str, ...]:
        return ()

    def domains(self, address: str) -> tuple[str, ...]:
        return ()


class Limits:
    """All blocks, ready to be matched; false without any.

    Args:
        sources: what names stand for in a block's `source`.

    Attributes:
        blocks: by name.
        by_instance: whether any asks for the instance; if none does, who it is changes no verdict.
        steps: look-ups so far.
    """

    def __init__(
        self,
        blocks: Iterable[ThrottleSettings],
        sources: Iterable[SourceSettings] = (),
        directory: Directory | None = None,
        breathe: Breathe = hold_breath,
    ) -> None:
        self.blocks: dict[str, ThrottleSettings] = {}
        self.steps = 0
        self._directory = directory or Nothing()
        self._sources, self._instances, self._receivers = _Question(), _Question(), _Receivers()
        self._order: list[ThrottleSettings] = []
        self._groups: dict[int, dict[tuple[int, int], list[int]]] = {}
        named = _addresses_by_name(sources, breathe)
        for block in blocks:
            breathe()
            self.blocks[block.name] = block
            self._add(block, named, breathe)
        self.by_instance = bool(self._instances.exact)

    def __bool__(self) -> bool:
        return bool(self._order)

    def match(self, instance: str, source: str, destination: str, names: Names = UNNAMED) -> tuple[Hit, ...]:
        """The blocks that hold for a connection, in the order in which they stand in the file.

        Args:
            source, destination: addresses in canonical form.
            names: what the client says of its receiver; it can only add to what is known otherwise.
        """
        hosts = self._directory.hosts(destination)
        known = (*hosts, names.mx) if names.mx else hosts
        domains = self._directory.domains(destination)
        receivers = {
            _ANY,
            *self._receivers.of(destination, known, (*domains, names.domain) if names.domain else domains),
        }
        leaving, asking = {_ANY, *self._sources.of_address(source)}, {_ANY, *self._instances.of_name(instance)}
        found: list[int] = []
        for receiver in receivers:
            group = self._groups.get(receiver, {})
            if len(group) <= len(leaving) * len(asking):
                numbers = (each for (leave, ask), each in group.items() if leave in leaving and ask in asking)
                self.steps += len(group)
            else:
                numbers = (group.get((leave, ask), []) for leave in leaving for ask in asking)
                self.steps += len(leaving) * len(asking)
            for each in numbers:
                found += each
        self.steps += len(receivers) + len(leaving) + len(asking)
        host = known[0] if known else ""
        return tuple([_hit(self._order[number], source, destination, host) for number in sorted(found)])

    def _add(self, block: ThrottleSettings, named: Mapping[str, list[Network]], breathe: Breathe) -> None:
        leaving: list[Network] = []
        for source in block.source:
            leaving += named.get(source, ()) if isinstance(source, str) else (source,)
            breathe()
        leave = self._sources.number(leaving, breathe, asked=bool(block.source))
        ask = self._instances.number(block.instance, breathe)
        receiver = self._receivers.number(
            (*(f"@{domain}" for domain in block.domain), *block.mx, *block.destination), breathe
        )
        self._receivers.enter(receiver, block, breathe)
        self._groups.setdefault(receiver, {}).setdefault((leave, ask), []).append(len(self._order))
        self._order.append(block)


def _hit(block: ThrottleSettings, source: str, destination: str, host: str) -> Hit:
    """Receivers are told apart by the host's name where the block speaks of names."""
    receiver = ""
    if "receiver" in block.per:
        receiver = (host if block.mx or block.domain else "") or destination
    return Hit(block.name, source if "source" in block.per else "", receiver)


def _addresses_by_name(sources: Iterable[SourceSettings], breathe: Breathe) -> dict[str, list[Network]]:
    """A block with a star stands for all that it has made."""
    named: dict[str, list[Network]] = {}
    for source in sources:
        breathe()
        for name in (source.name, source.block) if source.block else (source.name,):
            named.setdefault(name, []).extend(source.ip)
    return named


class _Question:
    """One question's different answers, each a set of networks or names with a number.

    Attributes:
        exact: name → the numbers of the sets that have it.
    """

    def __init__(self) -> None:
        self.exact: dict[str, list[int]] = {}
        self._numbers: dict[Hashable, int] = {}
        self._prefixes: dict[int, dict[int, dict[int, list[int]]]] = {4: {}, 6: {}}  # version, shift, prefix

    def number(self, answer: Iterable[Network | str], breathe: Breathe, asked: bool = False) -> int:
        """The answer's number; it is entered if it is a new one, but see `_Receivers`.

        Args:
            asked: a set without anything in it is an answer, too, which nothing fits.
        """
        members = frozenset(answer)
        if not members and not asked:
            return _ANY
        number = self._numbers.get(members)
        if number is None:
            number = self._numbers[members] = len(self._numbers) + 1
            self._enter_new(number, members, breathe)
        return number

    def of_name(self, name: str) -> list[int]:
        return self.exact.get(name, [])

    def of_address(self, address: str) -> Iterator[int]:
        """The sets that it lies in; one may come more than once."""
        if not (self._prefixes[4] or self._prefixes[6]):
            return
        ip = ip_address(address)
        value = int(ip)
        for shift, prefixes in self._prefixes[ip.version].items():
            yield from prefixes.get(value >> shift, ())

    def _enter_new(self, number: int, members: frozenset[Network | str], breathe: Breathe) -> None:
        for member in members:
            breathe()
            if isinstance(member, str):
                self.exact.setdefault(member, []).append(number)
            else:
                self._enter_network(number, member)

    def _enter_network(self, number: int, network: Network) -> None:
        shift = network.max_prefixlen - network.prefixlen
        level = self._prefixes[network.version].setdefault(shift, {})
        level.setdefault(int(network.network_address) >> shift, []).append(number)


class _Receivers(_Question):
    """The receivers' question: domains, hosts by name or by the end of it, addresses."""

    def __init__(self) -> None:
        super().__init__()
        self._hosts: dict[str, list[int]] = {}
        self._ends: dict[str, list[int]] = {}
        self._entered: set[int] = {_ANY}

    def enter(self, number: int, block: ThrottleSettings, breathe: Breathe) -> None:
        """What the block says is `number`."""
        if number in self._entered:
            return
        self._entered.add(number)
        for domain in block.domain:
            breathe()
            self.exact.setdefault(domain, []).append(number)
        for host in block.mx:
            breathe()
            table, key = (self._ends, host[2:]) if host.startswith("*.") else (self._hosts, host)
            table.setdefault(key, []).append(number)
        for network in block.destination:
            breathe()
            self._enter_network(number, network)

    def of(self, address: str, hosts: Iterable[str], domains: Iterable[str]) -> Iterator[int]:
        yield from self.of_address(address)
        for domain in domains:
            yield from self.of_name(domain)
        for host in hosts:
            yield from self._hosts.get(host, ())
            end = host
            while self._ends and "." in end:
                end = end.partition(".")[2]
                yield from self._ends.get(end, ())

    def _enter_new(self, number: int, members: frozenset[Network | str], breathe: Breathe) -> None:
        """Done by `enter`, which can tell a domain from a host."""
