"""A few random schedules against each engine; many of them, with sanitizers, are in tests/sanitized."""

from __future__ import annotations

import pytest
from gevent import get_hub

from proxy.net import relay
from tests.fuzz.relay_schedules import schedule
from tests.loopback.net.relays import ENGINES


@pytest.mark.parametrize("kind", ENGINES, ids=lambda engine: engine.name)
def test_random_schedules(kind: type[relay.Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_hub(), "exception_stream", None)  # the faults are wanted
    for seed in range(1, 25):
        engine = kind()
        schedule(engine, seed, 600)
        engine.stop()
