"""What the control room may ask the program: an interface, which `server.steering` implements.

Nothing here knows a command; `looks` and `changes` say which question each is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Generic, NamedTuple, Protocol, TypeVar

from proxy.config.in_force import Row
from proxy.model import Endpoint
from proxy.status.rows import ConnectionRow, EventRow, LoginRow, OverrideRow, Status
from proxy.throttling.overrides import Override

_Found = TypeVar("_Found")


class Heard(NamedTuple, Generic[_Found]):
    """What all processes together have answered; `silent`: the numbers of those that have not, so that theirs is
    missing."""

    found: _Found
    silent: Sequence[int] = ()


class House(Protocol):
    """None of these changes what it looks at, but those that say so."""

    def view(self) -> Status:
        """The whole view, as the status page has it; may wait."""

    def config(self) -> Sequence[Row]:
        """What is in force, as it was written."""

    def events(self) -> Heard[list[EventRow]]:
        """What was logged lately, the newest last, without the lines about single connections."""

    def connections(self) -> Heard[list[ConnectionRow]]:
        """Clients' connections as they stand, the oldest first."""

    def logins(self) -> Heard[list[LoginRow]]:
        """Who has proven a name with which secret, the last one first."""

    def overrides(self) -> list[OverrideRow]:
        """What was set by hand for a time."""

    def trace(self, wanted: Mapping[str, str], seconds: float) -> Iterator[list[str]]:
        """The steps of connections, as they happen; waits for them."""

    def explain(self, source: str | None, destination: Endpoint, instance: str) -> list[tuple[str, str]]:
        """What would happen to such a connection now, subject by subject; may wait."""

    def changed(self) -> None:
        """The view is to be made anew."""

    def reload(self) -> list[str]:
        """Read the configuration anew; every mistake, none: it is in force. May wait."""

    def drop_cached(self, source: str) -> Heard[int]:
        """Close held-open connections that leave from an address; how many."""

    def close(self, number: int) -> Heard[bool]:
        """End a client's connection; False: there is none of this number."""

    def log_verbose(self, wanted: Mapping[str, str], seconds: float, because: str) -> Heard[None]:
        """Write the steps of connections into the log, for a time."""

    def log_less(self) -> Heard[int]:
        """End all of these; how many there were."""

    def is_throttle(self, name: str) -> bool:
        """Whether there is a throttle of this name, an instance's or a block; may wait."""

    def set_by_hand(self, override: Override, seconds: float) -> None:
        """Pause a throttle, or lower its limits, for so long."""

    def end_by_hand(self, name: str, source: str) -> int:
        """End the pauses of a throttle; how many there were."""

    def end_override(self, id: str) -> bool:
        """End one of what was set by hand; False: there is none of this id."""

    def end_backoff(self, name: str) -> int | None:
        """End the back-offs of a throttle block, of how many throttles; None: there is no such block."""

    def stop(self) -> None:
        """Begin the drain."""

    def spare(self) -> AbstractContextManager[None]:
        """Lends held-back descriptors."""
