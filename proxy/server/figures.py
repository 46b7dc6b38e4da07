"""The figures of the moment, collected from whoever has them: what the status lines, the page and the metrics show."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.egress.clock import clock_ns
from proxy.log import outputs
from proxy.numbering import numbers
from proxy.server.listeners import Doors
from proxy.server.vitals import Vitals
from proxy.services import Door, Services
from proxy.spans import SPANS
from proxy.stats import ManagerFigures, Snapshot, sum_flows
from proxy.status.gather import Gauged, counted
from proxy.status.parts import DoorPart, Part


def part_of(services: Services, doors: Doors, vitals: Vitals) -> Part:
    """What this process knows, without the details; quick."""
    instances, newcomers = services.instances, services.newcomers
    gauged = Gauged(
        active=services.gauges.outgoing,
        newcomers=len(newcomers),
        newcomers_dropped=newcomers.dropped,
        channels=len(instances.channels),
        dialogues=len(instances.dialogues),
        highest=numbers.last,
    )
    part = counted(services.counters, SPANS, services.keeper.pool, gauged)
    part.cached = services.keeper.cached
    part.open = doors.open_connections()
    part.doors = _doors(doors, {id(door) for door in doors.listening()})
    process = vitals.look(part.open)
    part.processes = [process]
    part.cpu, part.lost = process.cpu, outputs.lines_lost()
    return part


def _doors(doors: Iterable[Door], listening: set[int]) -> dict[str, DoorPart]:
    """Those that are open, and the closed ones with connections; of two at one address the connections are together."""
    found: dict[str, DoorPart] = {}
    for door in doors:
        address, closing = str(door.endpoint), id(door) not in listening
        key = f"{address} {door.protocol}"
        one = DoorPart(address, door.protocol, door.open_connections, closing)
        if (other := found.get(key)) is not None:
            open_connections = one.open_connections + other.open_connections
            one = DoorPart(address, door.protocol, open_connections, closing and other.closing)
        found[key] = one
    return found


def snapshot(part: Part, manager: ManagerFigures | None) -> Snapshot:
    """What the status lines say of all processes."""
    listeners = tuple((door.address, door.open_connections) for door in part.doors.values())
    return Snapshot(listeners=listeners, manager=manager, active=part.active, cached=part.cached)


def manager_of(services: Services) -> ManagerFigures | None:
    """None: there is no native listener."""
    if not services.settings.listen:
        return None
    sessions = tuple(f for session in services.instances.sessions if (f := session.figures()) is not None)
    return ManagerFigures(
        incarnation=f"{services.incarnation:08x}",
        throttles=services.admission.manager.active_throttles(clock_ns()),
        sessions=sessions,
        forward=sum_flows(session.forward for session in sessions),
        back=sum_flows(session.back for session in sessions),
    )
