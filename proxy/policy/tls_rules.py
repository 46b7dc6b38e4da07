"""What the operator's `tls` blocks say of TLS with a receiver.

Of several blocks that fit a connection the first in the file holds, whole. What it asks for is joined with what the
client says by `egress.demands`, where DNS is asked for TLSA records as well.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from proxy.model import UNNAMED, Names
from proxy.policy.matching import Matcher
from proxy.settings import TlsLevel, TlsSettings


class TlsRule(NamedTuple):
    """What holds for one connection.

    Args:
        block: its name.
        level: None: the block does not say.
        names: of which the certificate has to carry one; empty: the block does not say.
        hosts: the MX hosts that the receiver is known as there, best first.
        minimum, ciphers: see `net.contexts.Profile`.
    """

    block: str
    level: TlsLevel | None
    names: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    minimum: str = ""
    ciphers: str = ""

    @property
    def dane(self) -> bool:
        """Whether DNS is to be asked."""
        return self.level in ("dane", "dane-only")


class TlsRules(Matcher[TlsSettings]):
    """All blocks, ready to be matched; false without any."""

    @cached_property
    def domains(self) -> frozenset[str]:
        """All that they name: what DNS says of them decides for whom blocks hold."""
        return frozenset(domain for block in self.blocks.values() for domain in block.domain)

    def match(self, instance: str, source: str, destination: str, names: Names = UNNAMED) -> TlsRule | None:
        """What holds for a connection; None: nothing is said of it.

        Args:
            source, destination: addresses in canonical form.
            names: what the client says of its receiver.
        """
        found = self.fitting(instance, source, destination, names)
        if not found:
            return None
        block = found[0]
        hosts = (names.mx,) if names.mx else self._hosts(block, destination)
        return TlsRule(block.name, block.level, block.names, hosts, block.min or "", block.ciphers or "")

    def _hosts(self, block: TlsSettings, destination: str) -> tuple[str, ...]:
        """Those of the block's own domains: another domain may point its MX at the same address, under its own name."""
        if block.domain:
            return self.directory.hosts_of(destination, block.domain)
        return self.directory.hosts(destination)
