"""What the control socket may ask and tell the program: `control.house.House`, wired."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from time import monotonic
from typing import TypeVar

from proxy.config.in_force import Row
from proxy.control import watching
from proxy.control.explain import Rules, explained
from proxy.egress import upstream
from proxy.egress.admission import clock_ns
from proxy.log import outputs
from proxy.model import Ending, Endpoint
from proxy.net.addresses import own_addresses
from proxy.net.turns import Breather, rest
from proxy.policy.limits import Limits
from proxy.services import Door, HostedConnection, Services
from proxy.stats import Standing
from proxy.status.http import StatusDoor
from proxy.status.rows import ConnectionRow, EventRow, LoginRow, OverrideRow, Status
from proxy.throttling.overrides import Override, told
from proxy.throttling.throttle import SECOND

#: Looks at many things of one caller, where others take turns.
_KEY = "control"
_Thing = TypeVar("_Thing")
_STANDARD = frozenset(("socks5", "proxy_protocol", "redirect"))


class Steering:
    """Implements `control.house.House`.

    Args:
        services: those of the moment. status: whose view it is. doors: those that listen.
        reload, stop, spare: see `House`.

    Attributes:
        in_force: the configuration, as it was written; limits: its throttle blocks. Set by whoever puts one in force.
    """

    def __init__(
        self,
        services: Callable[[], Services],
        status: StatusDoor,
        doors: Callable[[], Iterable[Door]],
        reload: Callable[[], list[str]],
        stop: Callable[[], object],
        spare: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.in_force: Sequence[Row] = ()
        self.limits = Limits(())
        self.reload = reload
        self.spare = spare
        self._services = services
        self._status = status
        self._doors = doors
        self._stop = stop
        self._watching = watching.Watching()

    # ---------------------------------------------------------------- looking

    def view(self) -> Status:
        return self._status.view()

    def config(self) -> Sequence[Row]:
        return self.in_force

    def events(self) -> list[EventRow]:
        now = monotonic()
        return [EventRow(line.time, now - line.at, line.level, line.event, line.text) for line in outputs.recent()]

    def connections(self) -> list[ConnectionRow]:
        now = monotonic()
        standing = sorted((each for _, each in self._standing()), key=lambda each: each.started)
        return [_row(each, now) for each in _in_turns(standing)]

    def logins(self) -> list[LoginRow]:
        services = self._services()
        found = services.instances.logins.known(services.access.secrets_of, monotonic())
        return [
            LoginRow(each.instance, each.host, str(each.secret or "gone"), each.latest, each.logins, each.ago)
            for each in found
        ]

    def overrides(self) -> list[OverrideRow]:
        now, now_ns = monotonic(), clock_ns()
        verbose = [
            OverrideRow(each.id, f"log verbose {_filters(each.wanted)}".rstrip(), each.ends_at - now, each.because)
            for each in self._watching.verbose
        ]
        throttles = [
            OverrideRow(str(number), told(each), (each.until - now_ns) / SECOND, each.because)
            for number, each in self._services().admission.manager.overrides.items()
        ]
        return throttles + verbose

    def trace(self, wanted: Mapping[str, str], seconds: float) -> Iterator[list[str]]:
        return watching.trace(wanted, seconds)

    def explain(self, source: str | None, destination: Endpoint, instance: str) -> list[tuple[str, str]]:
        services = self._services()
        standard = [door.configured for door in self._doors() if door.protocol in _STANDARD]
        here, choose = own_addresses().__contains__, upstream.system_source
        by_hand = services.admission.manager.overrides
        rules = Rules(services.access, services.modes, self.limits, standard, here, choose, by_hand)
        return explained(rules, self.view(), source, destination, instance)

    # ---------------------------------------------------------------- steering

    def changed(self) -> None:
        self._status.changed()

    def drop_cached(self, source: str) -> int:
        return self._services().keeper.forsake(source)

    def close(self, number: int) -> bool:
        for connection, standing in self._standing():
            if standing.number == number:
                connection.cut(Ending.CLOSED_BY_OPERATOR)
                return True
        return False

    def _standing(self) -> Iterator[tuple[HostedConnection, Standing]]:
        """All in turns, but those that have ended meanwhile."""
        connections = self._services().instances.connections
        for connection in _in_turns(list(connections)):
            if connection in connections and (standing := connection.standing()) is not None:
                yield connection, standing

    def log_verbose(self, wanted: Mapping[str, str], seconds: float, because: str) -> None:
        self._watching.begin(wanted, seconds, because)

    def log_less(self) -> int:
        return self._watching.end()

    def is_throttle(self, name: str) -> bool:
        manager = self._services().admission.manager
        if manager.blocks.has(name):
            return True
        for some in manager.names():
            if name in some:
                return True
            rest(_KEY)
        return False

    def set_by_hand(self, override: Override, seconds: float) -> None:
        self._services().admission.set_by_hand(override, seconds)

    def end_by_hand(self, name: str, source: str) -> int:
        def fits(_: int, each: Override) -> bool:
            return each.pause and (each.name, each.source) == (name, source)

        return self._services().admission.end_by_hand(fits)

    def end_override(self, id: str) -> bool:
        if self._watching.end(id):
            return True
        return bool(self._services().admission.end_by_hand(lambda number, _: str(number) == id))

    def end_backoff(self, name: str) -> int | None:
        return self._services().admission.end_backoff(name)

    def stop(self) -> None:
        self._stop()


def _in_turns(things: Sequence[_Thing]) -> Iterator[_Thing]:
    breathe = Breather(_KEY)
    for thing in things:
        breathe()
        yield thing


def _filters(wanted: Mapping[str, str]) -> str:
    return " ".join(f"{column}={value}" for column, value in wanted.items())


def _row(standing: Standing, now: float) -> ConnectionRow:
    return ConnectionRow(
        id=standing.number,
        state=standing.state,
        age=now - standing.started,
        instance=standing.instance,
        protocol=standing.protocol,
        client=str(standing.client),
        source=standing.source,
        destination=str(standing.destination or ""),
    )
