"""Waits that are cut short when a probe is due, in the real hub."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest
from gevent.event import Event

from proxy.net import probing
from proxy.net.alarm import TimeIsUp
from proxy.net.probing import Prober
from proxy.net.relay import Engine
from proxy.policy import idleness


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    for module in (idleness, probing):
        monkeypatch.setattr(module, "PROBE_AFTER", 0.01)
    engine = Engine()
    yield engine
    assert not any(engine.alarms._buckets.values())
    engine.stop()


def test_a_wait_ends_for_the_next_probe(engine: Engine) -> None:
    probes: list[int] = []
    prober, never = Prober(engine, lambda: probes.append(1)), Event()
    for _ in range(4):
        prober.wait(7, never.wait)
    assert len(probes) == 3, "one is due behind each wait"


def test_a_wait_that_ends_by_itself_leaves_no_alarm(engine: Engine) -> None:
    Prober(engine, lambda: None).wait(7, lambda: None)


def test_another_alarm_goes_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idleness, "PROBE_AFTER", 60.0)
    alarm = engine.alarms.start(0.0)
    try:
        with pytest.raises(TimeIsUp) as caught:
            Prober(engine, lambda: None).wait(7, lambda: gevent.sleep(30))
        assert caught.value.alarm is alarm
    finally:
        alarm.cancel()


def test_a_probe_that_finds_the_client_gone_ends_the_wait(engine: Engine) -> None:
    def probe() -> None:
        raise ConnectionResetError

    prober = Prober(engine, probe)
    prober.wait(7, Event().wait)
    with pytest.raises(ConnectionResetError):
        prober.wait(7, Event().wait)
