"""What the tabulator makes of a line at the prompt of `ctl`."""

from __future__ import annotations

import pytest

from proxy.control.commands import COMMANDS
from proxy.control.interactive import completions


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("rel", ["reload "]),
        ("show thr", ["throttles "]),
        ("show c", ["connections ", "cached ", "config "]),
        ("close ", ["connection "]),
        ("show connections inst", ["instance="]),
        ("trace instance=a f", ["for "]),
        ("explain 192.0.2.1 192.0.2.2 i", ["instance="]),
        ("show nothing ", []),
        ("nothing", []),
        ("q", ["quit "]),
        ("show quit", []),
    ],
)
def test_what_a_word_may_become(line, found) -> None:
    assert completions(line) == found


def test_an_empty_line_may_become_every_command() -> None:
    assert {word.strip() for word in completions("")} == {command.words[0] for command in COMMANDS} | {"quit", "exit"}
