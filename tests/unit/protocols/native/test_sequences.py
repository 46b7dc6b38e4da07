"""The vectors with time in them: what our library and our throttle manager do is what docs/protocol.md says."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from proxy.doors.native import control_frames
from proxy.protocols.native import frames as native
from proxy.protocols.native import session_messages as s
from proxy.throttling.lease import Demand, Lease
from proxy.throttling.manager import Manager
from proxy.throttling.throttle import SECOND, Key

VECTORS = json.loads((Path(__file__).resolve().parents[3] / "vectors/native.json").read_text())
INCARNATION = 0x0543B19C


def message(data: str, table: native.Table) -> Any:
    decoder = native.FrameDecoder()
    decoder.receive(bytes.fromhex(data))
    frame = decoder.next_frame()
    assert frame is not None
    return native.decode(frame, table)


class Client:
    """The library's side of one path, with a clock that the vector moves."""

    def __init__(self) -> None:
        self.lease = Lease()
        self.demand = Demand()

    def receive(self, at: int, data: str) -> None:
        heard = message(data, native.SESSION_FROM_PROXY)
        for record in heard.records:
            assert record.id == 7
            if isinstance(heard, s.Limit):
                self.lease.slack_us = record.slack_us
            else:
                spans = record.n, record.first_offset_us, record.step_us
                self.lease.granted(*spans, heard.ping_t, heard.hold_us, at * 1000, at * 1000, record.use_by)

    def permits(self, at: int) -> list[list[int]]:
        lease, now, found = deepcopy(self.lease), at * 1000, []
        lease.at_hand(now)
        while (permit := lease.take(lease.next_at(0) or 0)) is not None:
            found.append([permit.not_before // 1000, permit.use_by // 1000])
        return found

    def ready(self, at: int, want: int) -> tuple[int | None, str | None]:
        lease, now = self.lease, at * 1000
        lease.at_hand(now)
        due = self.demand.due_at(want, lease.got, now, lease.voided)
        if due is None:
            return None, None
        if due == now:
            self.demand.sent(want, lease.got, now, lease.voided)
        got, lapsed = lease.got % 2**32, lease.voided % 2**32
        return due // 1000, native.encode(s.Demand(INCARNATION, [s.Want(7, want, got, 0, 0, 0, lapsed)])).hex()


@pytest.mark.parametrize("vector", VECTORS["sequences"], ids=lambda vector: vector["name"])
def test_sequence(vector: dict[str, Any]) -> None:
    client = Client()
    for number, step in enumerate(vector["steps"]):
        at = step["at_us"]
        if "receive" in step:
            client.receive(at, step["receive"])
        elif "permits" in step:
            assert client.permits(at) == step["permits"], number
        else:
            assert client.ready(at, step["ready"]) == (step["due_us"], step["demand"]), number


class Proxy:
    """The manager's side of one session, as `control` speaks for it."""

    def __init__(self) -> None:
        self.start = 200_000 * SECOND
        self.manager = Manager(INCARNATION, 0)
        self.session = self.manager.hello("server-a", bytes(16), "192.0.2.9", 1.0, self.start)
        self.manager.pong(self.session, self.start // 1000, 0, self.start)
        self.session.ping_due = None

    def hear(self, at: int, data: str) -> list[str]:
        heard, manager, session, now = (
            message(data, native.SESSION_FROM_CLIENT),
            self.manager,
            self.session,
            self.at(at),
        )
        said: list[bytes] = []
        if isinstance(heard, s.Ping):
            manager.ping(session, heard.t, now)
        for path in heard.paths if isinstance(heard, s.Reg) else ():
            try:
                parts = [(Key(path.source_ip, each.name), control_frames.part_of(each)) for each in path.throttles]
                manager.register(session, path.id, parts, now)
            except ValueError as error:
                said += control_frames.refusals({path.id: str(error)}, INCARNATION)
        for want in heard.records if isinstance(heard, s.Demand) else ():
            manager.demand(session, want.id, want.want, want.got_cum, 0, 0, 0, now)
        for run in heard.records if isinstance(heard, s.Return) else ():
            manager.give_back(session, run.id, run.first, run.n, now)
        output = manager.take(session, now)._replace(ping=None)
        said += control_frames.urgent_frames(output, INCARNATION) + control_frames.frames(output, INCARNATION)
        return [frame.hex() for frame in said]

    def at(self, at_us: int) -> int:
        return self.start + at_us * 1000


@pytest.mark.parametrize("vector", VECTORS["dialogues"], ids=lambda vector: vector["name"])
def test_dialogue(vector: dict[str, Any]) -> None:
    proxy = Proxy()
    said: list[tuple[int, str]] = []
    for step in vector["steps"]:
        if "client" in step:
            said += [(step["at_us"], each) for each in proxy.hear(step["at_us"], step["client"])]
    expected = [(step["at_us"], canonical(step["proxy"])) for step in vector["steps"] if "proxy" in step]
    assert said == expected


def canonical(data: str) -> str:
    """With all fields that have defaults, as our encoder writes it."""
    return native.encode(message(data, native.SESSION_FROM_PROXY)).hex()
