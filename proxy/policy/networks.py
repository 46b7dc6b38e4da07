"""Addresses and networks: in which network an address is, and what else it may be on the way.

Looking up costs the same however many networks there are. A translator or a tunnel makes of some IPv6 addresses IPv4
addresses that a rule may deny: `forms` has them all. Which networks mean what is `access`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from itertools import repeat

from proxy.model import Breathe, canonical_ip, hold_breath
from proxy.settings import Network

Address = IPv4Address | IPv6Address
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052 section 2.1
_NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")  # RFC 8215
_6TO4 = IPv6Network("2002::/16")  # RFC 3056 section 2
_V4_COMPATIBLE = IPv6Network("::/96")  # RFC 4291 section 2.5.5.1
_SIIT = IPv6Network("::ffff:0:0:0/96")  # RFC 2765 section 2.1, "IPv4-translated"
_TEREDO = IPv6Network("2001::/32")  # RFC 4380 section 2.6
_TRANSLATED = (_NAT64, _NAT64_LOCAL, _6TO4, _SIIT, _TEREDO)
#: RFC 5214 section 6.1: the interface identifier of a private and of a public IPv4 address, in any network.
_ISATAP = (b"\0\0\x5e\xfe", b"\2\0\x5e\xfe")
#: RFC 6052 section 2.2: the bytes of the IPv4 address for prefixes of 48, 56, 64 and 96 bits.
_NAT64_LAYOUTS = ((6, 7, 9, 10), (7, 9, 10, 11), (9, 10, 11, 12), (12, 13, 14, 15))


class Networks:
    """Networks to look an address up in, at the cost of one dict look-up for each prefix length that occurs.

    Args:
        names: what each network stands for; of equal networks the first one's counts.
    """

    def __init__(
        self, networks: Iterable[Network], names: Iterable[str] = repeat(""), breathe: Breathe = hold_breath
    ) -> None:
        found: dict[tuple[int, int], dict[int, str]] = {}
        for network, name in zip(networks, names, strict=False):
            breathe()
            prefix = int(network.network_address) >> network.max_prefixlen - network.prefixlen
            found.setdefault((network.version, network.prefixlen), {}).setdefault(prefix, name)
        self._levels: dict[int, list[tuple[int, int, dict[int, str]]]] = {4: [], 6: []}
        for (version, length), prefixes in sorted(found.items(), reverse=True):
            self._levels[version].append((length, (32 if version == 4 else 128) - length, prefixes))

    def __bool__(self) -> bool:
        return any(self._levels.values())

    def __contains__(self, address: Address) -> bool:
        return self.longest_match(address) >= 0

    def longest_match(self, address: Address) -> int:
        """The length of the longest prefix that contains the address, or -1."""
        value = int(address)
        for length, shift, prefixes in self._levels[address.version]:
            if value >> shift in prefixes:
                return length
        return -1

    def name_of(self, address: Address) -> str:
        """What the longest prefix that contains the address stands for, or ""."""
        value = int(address)
        for _, shift, prefixes in self._levels[address.version]:
            if (name := prefixes.get(value >> shift)) is not None:
                return name
        return ""


def parse(ip: str) -> Address:
    """The address of any spelling of it; an IPv4 address in IPv6 is the IPv4 address."""
    return ip_address(canonical_ip(ip))


def is_translated(network: Network) -> bool:
    """Whether the operator names a range of a translator or tunnel as such: then he means what lies behind it, too."""
    return isinstance(network, IPv6Network) and any(network.subnet_of(range_) for range_ in _TRANSLATED)


def forms(address: Address) -> list[Address]:
    """The address, and the IPv4 addresses that a translator or tunnel on the way could make of it."""
    found: list[Address] = [address]
    if address.version == 4:
        return found
    packed = address.packed
    if packed[8:12] in _ISATAP:
        found.append(IPv4Address(packed[12:]))
    if address in _NAT64 or address in _SIIT or (address in _V4_COMPATIBLE and int(address) > 1):
        found.append(IPv4Address(packed[12:]))
    elif address in _6TO4:
        found.append(IPv4Address(packed[2:6]))
    elif address in _TEREDO:  # the server, and the client with all its bits turned round
        found += [IPv4Address(packed[4:8]), IPv4Address(bytes(byte ^ 0xFF for byte in packed[12:]))]
    elif address in _NAT64_LOCAL:
        # The prefix in use is the network's secret: each reading counts, but for those that read its zeros.
        readings = (bytes(packed[index] for index in layout) for layout in _NAT64_LAYOUTS)
        found.extend(IPv4Address(reading) for reading in readings if reading[0])
    return found
