"""The figures of the moment, collected from whoever has them: what the status lines, the page and the metrics show."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.egress.admission import clock_ns
from proxy.services import Door, Services
from proxy.stats import ManagerFigures, Snapshot, sum_flows


def snapshot(services: Services, doors: Iterable[Door]) -> Snapshot:
    """All of them.

    Args:
        doors: those that are open, and the closed ones with connections.
    """
    return Snapshot(
        listeners=tuple((door.endpoint, door.open_connections) for door in doors),
        manager=_manager(services) if services.settings.listen else None,
        active=services.gauges.outgoing,
        cached=services.keeper.cached,
    )


def _manager(services: Services) -> ManagerFigures:
    sessions = tuple(f for session in services.instances.sessions if (f := session.figures()) is not None)
    return ManagerFigures(
        incarnation=f"{services.incarnation:08x}",
        throttles=services.admission.manager.active_throttles(clock_ns()),
        sessions=sessions,
        forward=sum_flows(session.forward for session in sessions),
        back=sum_flows(session.back for session in sessions),
    )
