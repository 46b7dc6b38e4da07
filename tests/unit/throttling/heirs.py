"""A manager exchanged for another one, as by an upgrade: what the one leaves goes through bytes into the other."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.throttling.blocks import Rules
from proxy.throttling.estate import Estate, Reader
from proxy.throttling.flows import Places
from proxy.throttling.manager import Manager


def read(chunks: Iterable[bytes]) -> Estate:
    reader = Reader()
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def heir_of(manager: Manager, now: int, rules: Rules | None = None) -> tuple[Manager, dict[int, Places]]:
    """Another manager that goes on where this one is, which is frozen from now on; and the places by its numbers."""
    manager.freeze(now)
    heir = Manager(0, now, manager.enforce, rules)
    held = heir.adopt(read(manager.gather(now)), now)
    for chunk in manager.meanwhile():
        heir.adopt_meanwhile(chunk, held, now)
    return heir, held
