"""What the words of a change come to, and which of them are refused before anything is done."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.control.changes import change
from proxy.control.commands import Answer
from proxy.control.house import Heard
from proxy.errors import Mistake
from proxy.throttling.overrides import Override
from proxy.throttling.throttle import Limit


class House:
    """Knows the throttle `one`, of which nothing is set by hand, and no connection; remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.silent: list[int] = []

    def is_throttle(self, name: str) -> bool:
        return name == "one"

    def set_by_hand(self, override: Override, seconds: float) -> None:
        self.told.append((override, seconds))

    def log_verbose(self, wanted: dict[str, str], seconds: float, because: str) -> Heard[None]:
        self.told.append((wanted, seconds, because))
        return Heard(None, self.silent)

    def end_by_hand(self, name: str, source: str) -> int:
        return 0

    def end_override(self, id: str) -> bool:
        return False

    def end_backoff(self, name: str) -> int | None:
        return None

    def close(self, number: int) -> Heard[bool]:
        return Heard(False, self.silent)


def say(house: Any, line: str) -> Answer:
    words = line.split()
    return change((words[0], words[1]), words[2:], house, "why")


@pytest.mark.parametrize(
    ("line", "override", "seconds"),
    [
        ("pause throttle one", Override("one", "", True, 0, (), 0, "why"), 3600.0),
        ("pause throttle one 2001:DB8:0::1 for 7d", Override("one", "2001:db8::1", True, 0, (), 0, "why"), 604800.0),
        ("limit throttle one connections=5 for 1m", Override("one", "", False, 5, (), 0, "why"), 60.0),
        (
            "limit throttle one rate=500/hr rate=9/min rate=8/min",
            Override("one", "", False, 0, (Limit(8, 60), Limit(500, 3600)), 0, "why"),
            3600.0,
        ),
    ],
)
def test_what_is_set_by_hand(line: str, override: Override, seconds: float) -> None:
    house = House()
    assert say(house, line).ok
    assert house.told == [(override, seconds)]


def test_steps_are_logged_for_ten_minutes_or_as_is_said() -> None:
    house = House()
    assert say(house, "log verbose").ok
    assert say(house, "log verbose instance=mta1 for 1d").ok
    assert house.told == [({}, 600.0, "why"), ({"instance": "mta1"}, 86400.0, "why")]


@pytest.mark.parametrize(
    "line",
    [
        "pause throttle two",
        "pause throttle one mta1",
        "pause throttle one for 8d",
        "pause throttle one for 0s",
        "pause throttle one connections=5",
        "limit throttle one",
        "limit throttle one 192.0.2.1",
        "limit throttle one connections=0",
        "limit throttle one connections=many",
        "limit throttle one rate=fast",
        "limit throttle one places=5",
        "limit throttle connections=5",
        "log verbose for 2d",
        "log verbose colour=red",
        "log verbose off now",
        "close connection -1",
        "close connection ²",
    ],
)
def test_what_cannot_be_understood_changes_nothing(line: str) -> None:
    house = House()
    with pytest.raises(Mistake) as caught:
        say(house, line)
    assert caught.value.code == "bad_command"
    assert not house.told


@pytest.mark.parametrize("line", ["resume throttle one", "end override 3", "backoff end one", "close connection 17"])
def test_what_is_not_there_is_told(line: str) -> None:
    answer = say(House(), line)
    assert (answer.ok, answer.code) == (False, "failed")
