"""The certificates that receivers are shown where they ask for one: the global one, and those of `source` blocks.

A start, a reload and a check all read them here, so they say the same of a file that is of no use.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import NamedTuple

from proxy.model import Breathe
from proxy.net import contexts, identities
from proxy.settings import Settings


class Pair(NamedTuple):
    """Two files, and where they are named.

    Args:
        directive, value: as `config.origins` knows the place. addresses: that they are shown from; empty: from any.
    """

    directive: str
    value: Hashable
    certificate: str
    key: str
    addresses: tuple[str, ...] = ()

    def load(self) -> contexts.ClientIdentity:
        """
        Raises:
            identities.UnfitIdentity: a file is of no use.
        """
        return identities.load_client_identity(self.certificate, self.key)

    def sentence(self, error: identities.UnfitIdentity) -> str:
        """What is wrong, for people who know the directive already."""
        return f"{self.value}: {error.directive}: {error}" if self.value else str(error)


def pairs(settings: Settings, breathe: Breathe) -> Iterator[Pair]:
    """All that are named, those of the same block once."""
    certificate, key = settings.tls_client_certificate_file, settings.tls_client_private_key_file
    if certificate is not None and key is not None:
        yield Pair("tls_client_certificate_file", None, certificate, key)
    blocks: dict[str, Pair] = {}
    for block in settings.source:
        breathe()
        certificate, key = block.tls_client_certificate_file, block.tls_client_private_key_file
        if certificate is not None and key is not None:
            name = block.block or block.name
            known = blocks.get(name, Pair("source", name, certificate, key))
            addresses = tuple(str(network.network_address) for network in block.ip)
            blocks[name] = known._replace(addresses=known.addresses + addresses)
    yield from blocks.values()


class Shown:
    """What is shown, by the address that is left from."""

    def __init__(self) -> None:
        self._default: contexts.ClientIdentity | None = None
        self._by_source: dict[str, contexts.ClientIdentity] = {}

    def add(self, pair: Pair, identity: contexts.ClientIdentity) -> None:
        """Show this one there."""
        if not pair.addresses:
            self._default = identity
        self._by_source.update(dict.fromkeys(pair.addresses, identity))

    def of(self, source: str) -> contexts.ClientIdentity | None:
        """What is shown from there; None: nothing."""
        return self._by_source.get(source, self._default)
