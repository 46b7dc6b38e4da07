"""What a connection needs to be served, in one frozen bundle.

A reload makes a new bundle and leaves the old one to the connections that began with it. The parts that live as long as
the program (engine, counters, gauges, crew) are the same object in each; those that follow from the settings are new.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy.access import Access
from proxy.crew import Crew
from proxy.relay import Engine
from proxy.settings import Settings
from proxy.stats import Counters


class Gauges:
    """What goes up and down. `outgoing`: sockets towards receivers that serve a client, or are set up for one."""

    __slots__ = ("outgoing",)

    def __init__(self) -> None:
        self.outgoing = 0


@dataclass(frozen=True, slots=True)
class Services:
    """Wired by `server`, read by everything that serves a connection.

    Args:
        host_name: this proxy's name in what it says as an SMTP server.
    """

    settings: Settings
    access: Access
    engine: Engine
    counters: Counters
    gauges: Gauges
    crew: Crew
    host_name: str
