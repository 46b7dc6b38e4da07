"""Where each value of the configuration was written: file and line, the command line, or a variable.

Messages want that place; nothing else does. No directive's meaning is known here.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from proxy.config.values import Kind
from proxy.errors import ConfigError
from proxy.model import Breathe, hold_breath, let_go


class Given(NamedTuple):
    """One value as it was written, and where; `file` tells other sources too, and then there is no `line`."""

    text: str
    file: str
    line: int = 0

    def mistake(self, message: str) -> ConfigError:
        """What is wrong here."""
        return ConfigError(message, self.file, self.line)


class Origins:
    """The places of all values.

    A directive's values are read again when the first of them is looked for, and then never more: there may be as many
    findings as values.

    Args:
        given: directive → its values, in order; kind of block → the blocks' names.
        kinds: directive → the form of its values; what is not in it stands for itself.
        fallback: the place of what stands nowhere.
    """

    def __init__(
        self,
        given: Mapping[str, list[Given]],
        kinds: Mapping[str, Kind],
        fallback: Given,
        breathe: Breathe = hold_breath,
    ) -> None:
        self._given = given
        self._kinds = kinds
        self._fallback = fallback
        self._breathe = breathe
        self._found: dict[str, dict[Hashable, Given]] = {}

    def of(self, directive: str) -> Sequence[Given]:
        """The directive's values as they were written; none: it stands nowhere."""
        return self._given.get(directive, ())

    def place(self, directive: str, value: Hashable = None) -> Given:
        """Where a value of the directive stands, the last time if it does more than once; None: any value of it."""
        given = self.of(directive)
        if value is not None:
            if directive not in self._found:
                self._found[directive] = self._index(directive)
            if value in self._found[directive]:
                return self._found[directive][value]
        return given[-1] if given else self._fallback

    def let_go(self, breathe: Breathe) -> None:
        """Forget all places; they are not asked for any more."""
        for index in self._found.values():
            things = list(index)
            index.clear()
            let_go(things, breathe)
        for given in self._given.values():
            let_go(given, breathe)

    def _index(self, directive: str) -> dict[Hashable, Given]:
        kind = self._kinds.get(directive)
        index: dict[Hashable, Given] = {}
        for one in self.of(directive):
            try:
                index |= dict.fromkeys(kind.values(one.text) if kind else (one.text,), one)
            except ValueError:
                continue  # a mistake of its own
            self._breathe()
        return index
