"""Who looks at steps, and that nobody does for longer than was said: `log verbose` and `trace`."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from types import SimpleNamespace
from typing import Any

import gevent
import pytest

from proxy.control import watching
from proxy.control.watching import Watching, trace
from proxy.log import lines as log
from proxy.log import steps
from proxy.model import Endpoint
from proxy.stats import Standing

LONG = 3600.0


@pytest.fixture(autouse=True)
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test begins so whatever became of the one before it, and ends so."""
    monkeypatch.setattr(steps, "on", False)
    monkeypatch.setattr(steps, "_watches", [])
    yield
    assert not steps.on
    assert not steps._watches


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `watching` has logged, and nobody else."""
    lines: list[str] = []
    own = SimpleNamespace(
        Event=log.Event,
        INFO=log.INFO,
        step=lambda standing, text: lines.append(text),
        note=lambda event, level, text, **fields: lines.append(f"{text} {fields}"),
    )
    monkeypatch.setattr(watching, "log", own)
    return lines


@pytest.fixture
def it() -> Iterator[Watching]:
    it = Watching()
    yield it
    it.end()


def tell(text: str, instance: str = "mta1") -> None:
    client, destination = Endpoint("192.0.2.9", 4321), Endpoint("198.51.100.7", 25)
    steps.tell(Standing(7, instance, "socks5", client, "192.0.2.1", destination, "connect", monotonic()), text)


def test_it_is_logged_until_the_time_is_over(it: Watching, logged: list[str]) -> None:
    it.begin({"instance": "mta1"}, 0.01, "why")
    tell("one")
    tell("other", instance="mta2")
    with gevent.Timeout(30):
        while steps.on:
            gevent.sleep(0.001)
    assert logged == ["one", "log verbose is over {'instance': 'mta1'}"]
    assert it.verbose == []
    assert it.end() == 0


def test_one_that_was_ended_by_hand_does_not_end_again(it: Watching, logged: list[str]) -> None:
    it.begin({}, 0.01, "")
    it.begin({}, LONG, "")
    first, second = [each.id for each in it.verbose]
    assert it.end(first) == 1
    assert it.end(first) == 0
    gevent.sleep(0.02)
    assert not logged, "its timer is gone"
    assert [each.id for each in it.verbose] == [second]
    tell("one")
    assert logged == ["one"]
    assert it.end() == 1


def test_a_trace_shows_steps_harmlessly_and_ends_when_nobody_asks_for_more() -> None:
    seen = trace({"destination": "198.51.100.7"}, LONG)
    gevent.spawn(tell, "said \x1b[2J\nand \u202e more")
    (line,) = next(seen)
    assert line.isprintable()
    assert line.startswith("7 mta1 192.0.2.9:4321 192.0.2.1 -> 198.51.100.7:25 +0.0")
    assert line.endswith(r"said \x1b[2J\nand \u202e more")
    assert steps.on
    seen.close()  # type: ignore[attr-defined]


def test_a_trace_is_over_when_its_time_is() -> None:
    with gevent.Timeout(30):
        assert not any(trace({}, 0.005))


def test_a_trace_without_steps_says_now_and_then_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_HEARTBEAT", 0.001)
    seen: Any = trace({}, LONG)
    with gevent.Timeout(30):
        assert [next(seen), next(seen)] == [[], []]
    seen.close()


def test_steps_that_are_not_taken_are_counted_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_MOST_WAITING", 3)
    seen: Any = trace({}, LONG)
    gevent.spawn(lambda: [tell(str(number)) for number in range(10)])
    lines = next(seen)
    assert [line.rpartition(" ")[2] for line in lines[:-1]] == ["0", "1", "2"]
    assert lines[-1] == "7 steps left out: they are not taken fast enough"
    seen.close()
