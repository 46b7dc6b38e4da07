"""Which `throttle` blocks hold for a connection, and what counts by itself under each: the blocks of one `Settings`.

A connection may fit several blocks, and all of them hold. Which fit is `matching`'s.
"""

from __future__ import annotations

from typing import NamedTuple

from proxy.model import UNNAMED, Names
from proxy.policy.matching import Matcher
from proxy.settings import ThrottleSettings


class Hit(NamedTuple):
    """A block that holds, and what counts by itself there: `source` and `receiver` are "" where all are together."""

    block: str
    source: str
    receiver: str


class Limits(Matcher[ThrottleSettings]):
    """All blocks, ready to be matched; false without any."""

    def match(self, instance: str, source: str, destination: str, names: Names = UNNAMED) -> tuple[Hit, ...]:
        """The blocks that hold for a connection, in the order in which they stand in the file.

        Args:
            source, destination: addresses in canonical form.
            names: what the client says of its receiver; it can only add to what is known otherwise.
        """
        found = self.fitting(instance, source, destination, names)
        hosts = self.hosts(destination, names) if found else ()
        return tuple([_hit(block, source, destination, hosts[0] if hosts else "") for block in found])


def _hit(block: ThrottleSettings, source: str, destination: str, host: str) -> Hit:
    """Receivers are told apart by the host's name where the block speaks of names."""
    receiver = ""
    if "receiver" in block.per:
        receiver = (host if block.mx or block.domain else "") or destination
    return Hit(block.name, source if "source" in block.per else "", receiver)
