"""Names for the addresses that mail leaves from: the `source` blocks of one configuration.

Which addresses a name stands for, which name an address has, and what is said in EHLO there. Whether an instance may
leave from an address is `access`'s; nothing is allowed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle

from proxy.errors import FamilyMismatch, SourceNotAllowed
from proxy.model import Breathe, Endpoint, canonical_ip, hold_breath
from proxy.settings import Network, SourceSettings

#: Between an instance's name and that of a source, where a client has one word for both.
MARK = "+"
#: In an EHLO name: the address it is said at.
IP = "{ip}"


class Sources:
    """The names in force."""

    def __init__(self, blocks: Iterable[SourceSettings], breathe: Breathe = hold_breath) -> None:
        self._names: dict[str, str] = {}
        self._known: dict[str, tuple[str, ...]] = {}
        self._turns: dict[tuple[str, bool], Iterator[str]] = {}  # of those that were asked for
        for block in blocks:
            known = []
            for network in block.ip:
                breathe()
                address = str(network.network_address)
                self._names[address] = block.name
                known.append(address)
            self._known[block.name] = tuple(known)

    def __bool__(self) -> bool:
        return bool(self._known)

    def name_of(self, address: str) -> str:
        """The name of an address in canonical form, or ""."""
        return self._names.get(address, "")

    def addresses(self, name: str) -> Sequence[str]:
        """All that this name stands for; empty: no block has it."""
        return self._known.get(name, ())

    def address(self, name: str, destination: Endpoint) -> str:
        """The address that this name stands for, of the destination's family; several take turns.

        Raises:
            SourceNotAllowed: no block has the name. FamilyMismatch: it has no address of that family.
        """
        turns = self._turns.get((name, destination.is_ipv6)) or self._take_turns(name, destination.is_ipv6)
        if turns is not None:
            return next(turns)
        if name not in self._known:
            raise _unknown(name)
        raise FamilyMismatch(f"source {name} and {destination} are not of the same address family")

    def _take_turns(self, name: str, ipv6: bool) -> Iterator[str] | None:
        addresses = [address for address in self._known.get(name, ()) if (":" in address) == ipv6]
        if not addresses:
            return None
        turns = self._turns[name, ipv6] = cycle(addresses)
        return turns


def address_or_unknown(source: str) -> str:
    """What is no name of a source: an address.

    Raises:
        SourceNotAllowed: neither, but a name that no block has.
    """
    try:
        return canonical_ip(source)
    except ValueError:
        raise _unknown(source) from None


def _unknown(name: str) -> SourceNotAllowed:
    return SourceNotAllowed(f"source {name} is not known: no source block has this name")


def split_user(user: str) -> tuple[str, str | None]:
    """`instance+vmta7` → the instance's name and the source's; None: there is none."""
    instance, mark, source = user.rpartition(MARK)
    return (instance, source) if mark and source else (user, None)


def ehlo_names(blocks: Iterable[SourceSettings], breathe: Breathe = hold_breath) -> dict[str, str]:
    """Address → what is said in EHLO when leaving from it."""
    names: dict[str, str] = {}
    for block in blocks:
        for network in block.ip if block.ehlo else ():
            breathe()
            names[str(network.network_address)] = _at(block.ehlo or "", network)
    return names


def _at(ehlo: str, network: Network) -> str:
    """IPv6 addresses are written out: a label has no two hyphens in a row at will, nor one at its end."""
    address = network.network_address
    return ehlo.replace(IP, address.exploded.replace(":", "-").replace(".", "-"))
