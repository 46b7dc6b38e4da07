"""The processes of the program as rows: who they are (`colleagues`), and what each costs and has open (`parts`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from proxy.policy.trouble import LATELY
from proxy.status.colleagues import MASTER, WORKER, Member
from proxy.status.parts import Part
from proxy.status.rows import WorkerRow

#: Who has said nothing for so long does not answer; seconds. Each says something every second.
SILENT = 5.0


def worker_rows(members: Iterable[Member], part: Part, now: float, uptime: float) -> list[WorkerRow]:
    """By number; of one process its only row.

    Args:
        part: of all of them. now: on the monotonic clock. uptime: of the program.
    """
    rows = [_row(each, now) for each in members]
    if not rows:
        rows = [WorkerRow(each.number, MASTER, each.pid, each.version, uptime) for each in part.processes]
    by_pid = {each.pid: each for each in part.processes}
    for row in rows:
        process = by_pid.get(row.pid)
        if process is not None:
            row.open_connections, row.cpu, row.memory = process.open_connections, process.cpu, process.resident
            row.descriptors, row.most_descriptors = process.descriptors, process.most_descriptors
    return rows


def _row(member: Member, now: float) -> WorkerRow:
    row = WorkerRow(member.number, member.role, member.pid, member.version, max(0.0, now - member.since))
    row.restarts, row.died = member.restarts, member.died
    if member.deaths:
        row.died_ago = max(0.0, now - member.deaths[-1])
        row.died_lately = sum(1 for at in member.deaths if now - at < LATELY)
    if member.role != MASTER and member.pid:
        row.silent = max(0.0, now - member.heard_at)
    return row


def silent(rows: Sequence[WorkerRow]) -> Iterator[WorkerRow]:
    """Those that do not answer."""
    return (row for row in rows if row.silent >= SILENT)


def missing(rows: Sequence[WorkerRow]) -> Iterator[WorkerRow]:
    """Those that have died, and no other has taken their place yet."""
    return (row for row in rows if row.role == WORKER and not row.pid)
