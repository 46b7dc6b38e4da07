"""What the control socket asks of very many things is done in turns with all else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from proxy.model import Ending, Endpoint
from proxy.net import turns
from proxy.server.here import Here
from proxy.stats import Standing
from proxy.status.parts import Part


class Connection:
    def __init__(self, number: int) -> None:
        self.number, self.endings = number, list[Ending]()

    def standing(self) -> Standing:
        client = Endpoint("127.0.0.1", self.number)
        return Standing(self.number, "", "socks5", client, "127.0.0.5", None, "request", float(self.number))

    def cut(self, ending: Ending) -> None:
        self.endings.append(ending)


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
    monkeypatch.setattr(turns, "TURN_SECONDS", 0.0)  # each piece of work is a whole turn
    return [Connection(number) for number in range(1, 101)]


def of(connections: dict[Connection, None]) -> Here:
    services: Any = SimpleNamespace(instances=SimpleNamespace(connections=connections))
    return Here(lambda: services, Part)


def rounds_of(work: Any) -> int:
    before = turns.turns().rounds
    work()
    return turns.turns().rounds - before


def test_connections_are_listed_in_turns(crowd: list[Connection]) -> None:
    it = of(dict.fromkeys(reversed(crowd)))
    assert [row.id for row in it.connections()] == list(range(1, 101))
    assert rounds_of(it.connections) >= 100


def test_one_is_looked_for_in_turns_and_never_cut_when_it_has_ended_meanwhile(crowd: list[Connection]) -> None:
    connections = dict.fromkeys(crowd)
    it = of(connections)
    last = crowd[-1]
    assert rounds_of(lambda: it.close(100)) >= 99
    assert last.endings == [Ending.CLOSED_BY_OPERATOR]
    first = crowd[0]
    first.standing = lambda: connections.pop(last) or Connection.standing(first)  # type: ignore[method-assign]
    assert not it.close(100)
    assert len(last.endings) == 1
