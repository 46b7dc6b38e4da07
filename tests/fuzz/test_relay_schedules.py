"""A few random schedules against each engine; many of them, with the sanitizers, where time does not matter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gevent import get_hub

from proxy.net import relay
from tests.fuzz.relay_schedules import schedule
from tests.loopback.net.relays import ENGINES
from tests.peers import program


@pytest.mark.parametrize("kind", ENGINES, ids=lambda engine: engine.name)
def test_random_schedules(kind: type[relay.Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_hub(), "exception_stream", None)  # the faults are wanted
    for seed in range(1, 25):
        engine = kind()
        schedule(engine, seed, 600)
        engine.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_compiled_engine_with_sanitizers() -> None:
    program("gcc")
    script = Path(__file__).with_name("relay_schedules.py")
    subprocess.run([sys.executable, str(script), "--asan", "--rounds", "40", "--steps", "2000"], check=True)
