"""`source vmta* { … }`: one block for many names. The star is a number; each number has one address of each family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from proxy.model import Breathe
from proxy.settings import Network, SourceSettings

STAR = "*"


def expand(block: SourceSettings, breathe: Breathe) -> Iterator[SourceSettings]:
    """The block itself, or one for each of its addresses; each family is counted from 1, in the order as written."""
    breathe()
    if STAR not in block.name or not block.ip:
        yield block
        return
    families: dict[int, list[Network]] = {}
    for network in block.ip:
        breathe()
        families.setdefault(network.version, []).append(network)
    for number in range(max(map(len, families.values()), default=0)):
        breathe()
        ip = tuple(networks[number] for networks in families.values() if number < len(networks))
        yield replace(block, name=block.name.replace(STAR, str(number + 1)), ip=ip, block=block.name)
