"""The last hour in minutes: differences of totals, and what a minute without a look becomes."""

from __future__ import annotations

from proxy.status.rows import MinuteRow
from proxy.status.timeline import MOST, Timeline

BOUNDS = (0.001, 0.1)


def test_a_minute_is_the_difference_of_its_ends():
    line = Timeline(100.0, BOUNDS)
    line.look(159.9, 1000, 1000, [9, 9, 9])
    assert list(line.rows) == []
    line.look(160.0, 120, 6, [8, 0, 0])
    line.look(220.0, 120, 6, [8, 2, 0])
    line.look(280.0, 120, 6, [8, 2, 0])
    line.look(340.0, 120, 6, [9, 2, 1])
    assert list(line.rows) == [
        MinuteRow(2.0, 0.1, 0.001),
        MinuteRow(0.0, 0.0, 0.1),
        MinuteRow(0.0, 0.0, 0.0),
        MinuteRow(0.0, 0.0, 0.1),
    ]


def test_a_minute_that_nobody_looked_in_is_part_of_the_next():
    line = Timeline(0.0, BOUNDS)
    line.look(120.0, 240, 0, [0, 0, 0])
    assert list(line.rows) == [MinuteRow(2.0, 0.0, 0.0)]


def test_an_hour_is_kept():
    line, turns = Timeline(0.0, BOUNDS), [0, 0, 0]
    for minute in range(1, MOST + 6):
        turns[0] += 1  # the same list goes on: what was seen of it is remembered by value
        line.look(60.0 * minute, 60 * minute * minute, 0, turns)
    assert len(line.rows) == MOST
    assert [row.ended for row in line.rows] == [2.0 * minute - 1 for minute in range(6, MOST + 6)]
    assert {row.turn for row in line.rows} == {0.001}
