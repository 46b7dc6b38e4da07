"""What the control socket may ask and tell the program: `control.house.House`, wired."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from time import monotonic

from proxy.config.in_force import Row
from proxy.control.explain import Rules, explained
from proxy.control.house import Heard
from proxy.egress import upstream
from proxy.egress.clock import clock_ns
from proxy.model import Endpoint
from proxy.net.addresses import own_addresses
from proxy.net.turns import rest
from proxy.policy.limits import Limits
from proxy.server.questions import Everywhere
from proxy.services import Door, Services
from proxy.status.http import StatusDoor
from proxy.status.rows import ConnectionRow, EventRow, LoginRow, OverrideRow, Status
from proxy.throttling.overrides import Override, told
from proxy.throttling.throttle import SECOND

#: Looks at many things of one caller, where others take turns.
_KEY = "control"
_STANDARD = frozenset(("socks5", "proxy_protocol", "redirect"))


class Steering:
    """Implements `control.house.House`.

    Args:
        services: those of the moment. everywhere: all processes. status: whose view it is. doors: those that listen.
        reload, stop, spare: see `House`.

    Attributes:
        in_force: the configuration, as it was written; limits: its throttle blocks. Set by whoever puts one in force.
    """

    def __init__(
        self,
        services: Callable[[], Services],
        everywhere: Everywhere,
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
        self._everywhere = everywhere
        self._status = status
        self._doors = doors
        self._stop = stop

    # ---------------------------------------------------------------- looking

    def view(self) -> Status:
        return self._status.view()

    def config(self) -> Sequence[Row]:
        return self.in_force

    def events(self) -> Heard[list[EventRow]]:
        now = monotonic()
        found, silent = self._everywhere.events()
        return Heard([EventRow(each.time, now - each.at, each.level, each.event, each.text) for each in found], silent)

    def connections(self) -> Heard[list[ConnectionRow]]:
        return self._everywhere.connections()

    def logins(self) -> Heard[list[LoginRow]]:
        logins, silent = self._everywhere.logins()
        found = logins.known(self._services().access.secrets_of, monotonic())
        rows = [
            LoginRow(each.instance, each.host, str(each.secret or "gone"), each.latest, each.logins, each.ago)
            for each in found
        ]
        return Heard(rows, silent)

    def overrides(self) -> list[OverrideRow]:
        now, now_ns = monotonic(), clock_ns()
        verbose = [
            OverrideRow(each.id, f"log verbose {_filters(each.wanted)}".rstrip(), each.ends_at - now, each.because)
            for each in self._everywhere.verbose
        ]
        throttles = [
            OverrideRow(str(number), told(each), (each.until - now_ns) / SECOND, each.because)
            for number, each in self._services().admission.manager.overrides.items()
        ]
        return throttles + verbose

    def trace(self, wanted: Mapping[str, str], seconds: float) -> Iterator[list[str]]:
        return self._everywhere.trace(wanted, seconds)

    def explain(self, source: str | None, destination: Endpoint, instance: str) -> list[tuple[str, str]]:
        services = self._services()
        standard = [door.configured for door in self._doors() if door.protocol in _STANDARD]
        here, choose = own_addresses().__contains__, upstream.system_source
        by_hand = services.admission.manager.overrides
        rules = Rules(
            services.access, services.modes, self.limits, standard, here, choose, by_hand, self._everywhere.holder
        )
        return explained(rules, self.view(), source, destination, instance)

    # ---------------------------------------------------------------- steering

    def changed(self) -> None:
        self._status.changed()

    def drop_cached(self, source: str) -> Heard[int]:
        return self._everywhere.drop_cached(source)

    def close(self, number: int) -> Heard[bool]:
        return self._everywhere.close(number)

    def log_verbose(self, wanted: Mapping[str, str], seconds: float, because: str) -> Heard[None]:
        return self._everywhere.log_verbose(wanted, seconds, because)

    def log_less(self) -> Heard[int]:
        return self._everywhere.log_less(None)

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
        if self._everywhere.log_less(id).found:
            return True
        return bool(self._services().admission.end_by_hand(lambda number, _: str(number) == id))

    def end_backoff(self, name: str) -> int | None:
        return self._services().admission.end_backoff(name)

    def stop(self) -> None:
        self._stop()


def _filters(wanted: Mapping[str, str]) -> str:
    return " ".join(f"{column}={value}" for column, value in wanted.items())
