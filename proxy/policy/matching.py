"""Which blocks of a kind hold for a connection: the questions that `throttle` and `tls` blocks ask, and their answers.

A block asks up to three questions: who asks (`instance`), from where (`source`), to which receiver (`domain`, `mx`,
`destination`: any of these will do). A connection may fit several blocks.

Thousands of blocks cost no more than a few. What blocks ask is interned: of each question only the different answers
are kept, each with a number, in tables by exact name, by the end of a name and by length of prefix. What a table has is
a *bundle*, the answers with that name or prefix: one as a rule, thousands where so many different lists overlap. A
connection has a handful of bundles for each question. Each combination of them is looked up from the side that has the
fewest blocks, and what took more than a few steps all the same is remembered.

Pure: what names stand for is a `Directory`'s, which changes with DNS. What is remembered depends on the blocks alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from itertools import product
from typing import Any, Generic, Protocol, TypeVar

from proxy.model import UNNAMED, Breathe, Names, hold_breath, let_go
from proxy.settings import Network, SourceSettings

#: The answer of who does not ask.
_ANY = 0
#: Steps of a search that are not worth remembering what they found.
_A_FEW = 16
#: Blocks, in all that is remembered together; more, and it is forgotten.
_MOST_REMEMBERED = 1_000_000


_Member = TypeVar("_Member", str, int)


class Block(Protocol):
    """What all such blocks ask; an empty answer is any."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> tuple[Network | str, ...]: ...
    @property
    def instance(self) -> tuple[str, ...]: ...
    @property
    def domain(self) -> tuple[str, ...]: ...
    @property
    def mx(self) -> tuple[str, ...]: ...
    @property
    def destination(self) -> tuple[Network, ...]: ...


B = TypeVar("B", bound=Block)


class Directory(Protocol):
    """What is known of an address."""

    def hosts(self, address: str) -> tuple[str, ...]:
        """The MX hosts that have it, the first one standing for all."""

    def domains(self, address: str) -> tuple[str, ...]:
        """The recipient domains that it is an MX of."""

    def hosts_of(self, address: str, domains: Iterable[str]) -> tuple[str, ...]:
        """The MX hosts of these domains that have it, best first."""


class Nothing:
    """The directory of who looks nothing up."""

    def hosts(self, address: str) -> tuple[str, ...]:
        return ()

    def domains(self, address: str) -> tuple[str, ...]:
        return ()

    def hosts_of(self, address: str, domains: Iterable[str]) -> tuple[str, ...]:
        return ()


class Matcher(Generic[B]):
    """All blocks, ready to be matched; false without any.

    Args:
        sources: what names stand for in a block's `source`.

    Attributes:
        blocks: by name.
        by_instance: whether any asks for the instance; if none does, who it is changes no verdict.
        directory: what is known of addresses.
        steps: look-ups so far.
    """

    def __init__(
        self,
        blocks: Iterable[B],
        sources: Iterable[SourceSettings] = (),
        directory: Directory | None = None,
        breathe: Breathe = hold_breath,
    ) -> None:
        self.blocks: dict[str, B] = {}
        self.steps = 0
        self.directory = directory or Nothing()
        self._sources, self._instances, self._receivers = _Question(), _Question(), _Receivers()
        self._order: list[B] = []
        self._answers: list[tuple[int, int, int]] = []  # of each block, to the three questions
        self._same: dict[frozenset[int], frozenset[int]] = {}
        self._found: dict[tuple[frozenset[int], ...], list[int]] = {}
        self._remembered = 0
        named = _addresses_by_name(sources, breathe)
        for block in blocks:
            breathe()
            self.blocks[block.name] = block
            self._add(block, named, breathe)
        self.by_instance = bool(self._instances.exact)
        self.by_name = any(block.domain or block.mx for block in self.blocks.values())

    def __bool__(self) -> bool:
        return bool(self._order)

    def fitting(self, instance: str, source: str, destination: str, names: Names = UNNAMED) -> list[B]:
        """The blocks that hold for a connection, in the order in which they stand in the file.

        Args:
            source, destination: addresses in canonical form.
            names: what the client says of its receiver; it can only add to what is known otherwise.
        """
        known = self.hosts(destination, names)
        domains = self.directory.domains(destination)
        receivers = self._receivers.of(destination, known, (*domains, names.domain) if names.domain else domains)
        numbers: set[int] = set()
        for bundles in product(
            self._receivers.with_any(receivers),
            self._sources.with_any(self._sources.of_address(source)),
            self._instances.with_any(self._instances.of_name(instance)),
        ):
            numbers.update(self._under(bundles))
        return [self._order[number] for number in sorted(numbers)]

    def hosts(self, destination: str, names: Names) -> tuple[str, ...]:
        """The MX hosts that the receiver is known as."""
        hosts = self.directory.hosts(destination)
        return (*hosts, names.mx) if names.mx else hosts

    def let_go(self, breathe: Breathe) -> None:
        """Nobody asks any more. In pieces: what 10,000 blocks had is 20 ms to free in one go."""
        for question in (self._receivers, self._sources, self._instances):
            question.let_go(breathe)
        for found in (self._same, self._found, self.blocks):
            _empty(found, breathe)
        let_go(self._answers, breathe)
        let_go(self._order, breathe)

    def _under(self, bundles: tuple[_Bundle, _Bundle, _Bundle]) -> Sequence[int]:
        """The blocks whose answer to each of the three questions is in its bundle."""
        for bundle in bundles:
            if not bundle.answers:  # equal ones get the same object, so that comparing them costs nothing
                answers = frozenset(bundle.numbers)
                bundle.settle(self._same.setdefault(answers, answers))
        key = bundles[0].answers, bundles[1].answers, bundles[2].answers
        self.steps += 1
        if self._found and (known := self._found.get(key)) is not None:
            return known
        before = self.steps
        found = self._search(bundles)
        if self.steps - before > _A_FEW:
            self._remember(key, found)
        return found

    def _search(self, bundles: tuple[_Bundle, _Bundle, _Bundle]) -> list[int]:
        receivers, leaving, asking = (bundle.answers for bundle in bundles)
        found: list[int] = []
        for number in min(bundles, key=_weight).blocks():
            self.steps += 1
            receiver, leave, ask = self._answers[number]
            if receiver in receivers and leave in leaving and ask in asking:
                found.append(number)
        return found

    def _remember(self, key: tuple[frozenset[int], ...], found: list[int]) -> None:
        self._remembered += 1 + len(found)
        if self._remembered > _MOST_REMEMBERED:
            self._found.clear()
            self._remembered = 1 + len(found)
        self._found[key] = found

    def _add(self, block: B, named: Mapping[str, list[Network]], breathe: Breathe) -> None:
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
        answers = receiver, leave, ask
        for question, answer in zip((self._receivers, self._sources, self._instances), answers, strict=True):
            question.blocks.setdefault(answer, []).append(len(self._order))
        self._answers.append(answers)
        self._order.append(block)


def _addresses_by_name(sources: Iterable[SourceSettings], breathe: Breathe) -> dict[str, list[Network]]:
    """A block with a star stands for all that it has made."""
    named: dict[str, list[Network]] = {}
    for source in sources:
        breathe()
        for name in (source.name, source.block) if source.block else (source.name,):
            named.setdefault(name, []).extend(source.ip)
    return named


def _empty(table: dict[Any, Any], breathe: Breathe) -> None:
    while table:
        table.popitem()
        breathe()


class _Bundle:
    """The answers to a question that have one name, or one prefix.

    Args:
        blocks: answer → the blocks that have it.
        first: the number of the first one.

    Attributes:
        numbers: of the answers. answers: the same, once all blocks are there (`settle`). weight: how many blocks have
            any of them.
    """

    __slots__ = ("_blocks", "answers", "numbers", "weight")

    def __init__(self, blocks: Mapping[int, Sequence[int]], first: int) -> None:
        self._blocks = blocks  # and not the question, which has this bundle: circles stay in memory
        self.numbers = [first]
        self.answers: frozenset[int] = frozenset()
        self.weight = 0

    def add(self, number: int) -> None:
        if self.numbers[-1] != number:  # a list may have one member twice
            self.numbers.append(number)

    def settle(self, answers: frozenset[int]) -> None:
        self.answers = answers
        self.weight = sum([len(self._blocks.get(answer, ())) for answer in self.numbers])

    def blocks(self) -> Iterator[int]:
        for answer in self.numbers:
            yield from self._blocks.get(answer, ())


def _weight(bundle: _Bundle) -> int:
    return bundle.weight


class _Question:
    """One question's different answers, each a set of networks or names with a number.

    Attributes:
        exact: name → the sets that have it. blocks: a set's number → the blocks whose answer it is.
    """

    def __init__(self) -> None:
        self.exact: dict[str, _Bundle] = {}
        self.blocks: dict[int, list[int]] = {}
        self._any = _Bundle(self.blocks, _ANY)
        self._numbers: dict[Hashable, int] = {}
        self._prefixes: dict[int, dict[int, dict[int, _Bundle]]] = {4: {}, 6: {}}  # version, shift, prefix

    def number(self, answer: Iterable[Network | str], breathe: Breathe, asked: bool = False) -> int:
        """The answer's number; it is entered if it is a new one, but see `_Receivers`.

        Args:
            asked: a set without anything in it is an answer, too, which nothing fits.
        """
        found: set[Network | str] = set()
        for member in answer:
            breathe()
            found.add(member)
        members = frozenset(found)
        if not members and not asked:
            return _ANY
        number = self._numbers.get(members)
        if number is None:
            number = self._numbers[members] = len(self._numbers) + 1
            self._enter_new(number, members, breathe)
        return number

    def with_any(self, bundles: Iterable[_Bundle]) -> list[_Bundle]:
        """Each once, and the answer of who does not ask."""
        return list(dict.fromkeys((self._any, *bundles)))

    def let_go(self, breathe: Breathe) -> None:
        levels = [level for shifts in self._prefixes.values() for level in shifts.values()]
        tables: list[dict[Any, Any]] = [self.exact, self.blocks, self._numbers, *levels]
        for table in tables:
            _empty(table, breathe)

    def of_name(self, name: str) -> Iterator[_Bundle]:
        if (bundle := self.exact.get(name)) is not None:
            yield bundle

    def of_address(self, address: str) -> Iterator[_Bundle]:
        """The sets that it lies in, those of each prefix; one set may be in several."""
        if not (self._prefixes[4] or self._prefixes[6]):
            return
        ip = ip_address(address)
        value = int(ip)
        for shift, prefixes in self._prefixes[ip.version].items():
            if (bundle := prefixes.get(value >> shift)) is not None:
                yield bundle

    def _enter_new(self, number: int, members: frozenset[Network | str], breathe: Breathe) -> None:
        for member in members:
            breathe()
            if isinstance(member, str):
                self._put(self.exact, member, number)
            else:
                self._enter_network(number, member)

    def _enter_network(self, number: int, network: Network) -> None:
        shift = network.max_prefixlen - network.prefixlen
        level = self._prefixes[network.version].setdefault(shift, {})
        self._put(level, int(network.network_address) >> shift, number)

    def _put(self, table: dict[_Member, _Bundle], member: _Member, number: int) -> None:
        bundle = table.get(member)
        if bundle is None:
            table[member] = _Bundle(self.blocks, number)
        else:
            bundle.add(number)


class _Receivers(_Question):
    """The receivers' question: domains, hosts by name or by the end of it, addresses."""

    def __init__(self) -> None:
        super().__init__()
        self._hosts: dict[str, _Bundle] = {}
        self._ends: dict[str, _Bundle] = {}
        self._entered: set[int] = {_ANY}

    def enter(self, number: int, block: Block, breathe: Breathe) -> None:
        """What the block says is `number`."""
        if number in self._entered:
            return
        self._entered.add(number)
        for domain in block.domain:
            breathe()
            self._put(self.exact, domain, number)
        for host in block.mx:
            breathe()
            table, key = (self._ends, host[2:]) if host.startswith("*.") else (self._hosts, host)
            self._put(table, key, number)
        for network in block.destination:
            breathe()
            self._enter_network(number, network)

    def let_go(self, breathe: Breathe) -> None:
        super().let_go(breathe)
        _empty(self._hosts, breathe)
        _empty(self._ends, breathe)
        self._entered.clear()

    def of(self, address: str, hosts: Iterable[str], domains: Iterable[str]) -> Iterator[_Bundle]:
        yield from self.of_address(address)
        for domain in domains:
            yield from self.of_name(domain)
        for host in hosts:
            if (bundle := self._hosts.get(host)) is not None:
                yield bundle
            end = host
            while self._ends and "." in end:
                end = end.partition(".")[2]
                if (bundle := self._ends.get(end)) is not None:
                    yield bundle

    def _enter_new(self, number: int, members: frozenset[Network | str], breathe: Breathe) -> None:
        """Done by `enter`, which can tell a domain from a host."""
