"""Which `throttle` blocks hold for a connection, and what counts by itself under each: the blocks of one `Settings`.

A connection may fit several blocks, and all of them hold. Which fit is `matching`'s. A block may have rules about what
receivers reply (`backoff`), too: a refusal on a connection is held against those of the blocks that hold for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from proxy.model import UNNAMED, Breathe, Names, hold_breath
from proxy.policy.matching import Directory, Matcher
from proxy.policy.patterns import Pattern, said
from proxy.settings import BackoffSettings, SourceSettings, ThrottleSettings


class Hit(NamedTuple):
    """A block that holds, and what counts by itself there: `source` and `receiver` are "" where all are together."""

    block: str
    source: str
    receiver: str


class Limits(Matcher[ThrottleSettings]):
    """All blocks, ready to be matched; false without any.

    Attributes:
        listeners: the rules about replies of the blocks that have any, with their patterns.
    """

    def __init__(
        self,
        blocks: Iterable[ThrottleSettings],
        sources: Iterable[SourceSettings] = (),
        directory: Directory | None = None,
        breathe: Breathe = hold_breath,
    ) -> None:
        super().__init__(blocks, sources, directory, breathe)
        self.listeners: dict[str, list[tuple[tuple[Pattern, ...], BackoffSettings]]] = {}
        for block in self.blocks.values():
            breathe()
            for rule in block.backoff:
                breathe()
                patterns = tuple([Pattern(text) for text in rule.on])
                self.listeners.setdefault(block.name, []).append((patterns, rule))

    def match(self, instance: str, source: str, destination: str, names: Names = UNNAMED) -> tuple[Hit, ...]:
        """The blocks that hold for a connection, in the order in which they stand in the file.

        Args:
            source, destination: addresses in canonical form.
            names: what the client says of its receiver; it can only add to what is known otherwise.
        """
        found = self.fitting(instance, source, destination, names)
        hosts = self.hosts(destination, names) if found else ()
        return tuple([_hit(block, source, destination, hosts[0] if hosts else "") for block in found])

    def struck(self, names: Iterable[str], reply: str) -> list[tuple[str, list[BackoffSettings]]]:
        """Those of these blocks that a reply concerns, and by which of their rules."""
        found, heard = [], said(reply)
        for name in names:
            listening = self.listeners.get(name, ())
            rules = [rule for patterns, rule in listening if any(pattern.matches(heard) for pattern in patterns)]
            if rules:
                found.append((name, rules))
        return found


def _hit(block: ThrottleSettings, source: str, destination: str, host: str) -> Hit:
    """Receivers are told apart by the host's name where the block speaks of names."""
    receiver = ""
    if "receiver" in block.per:
        receiver = (host if block.mx or block.domain else "") or destination
    return Hit(block.name, source if "source" in block.per else "", receiver)
