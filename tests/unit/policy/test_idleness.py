"""Idleness, on a clock of its own."""

from __future__ import annotations

from types import SimpleNamespace

from proxy.model import Ending
from proxy.policy.idleness import Idleness, Standstill

PATIENCE = SimpleNamespace(idle_timeout=100.0, half_close_timeout=10.0)


def test_idle_counts_from_the_last_byte() -> None:
    idleness = Idleness()
    assert [idleness.over(5, False, PATIENCE, now) for now in (1000.0, 1099.9)] == [None, None]
    assert [idleness.over(6, False, PATIENCE, now) for now in (1099.9, 1199.8)] == [None, None]
    assert idleness.over(6, False, PATIENCE, 1199.9) is Ending.IDLE_TIMEOUT


def test_what_one_side_has_closed_ends_sooner_counted_from_the_close() -> None:
    idleness = Idleness()
    assert [idleness.over(5, False, PATIENCE, now) for now in (1000.0, 1050.0)] == [None, None]
    assert [idleness.over(5, True, PATIENCE, now) for now in (1051.0, 1060.9)] == [None, None]
    assert [idleness.over(6, True, PATIENCE, now) for now in (1061.0, 1070.9)] == [None, None]
    assert idleness.over(6, True, PATIENCE, 1071.0) is Ending.HALF_CLOSE_TIMEOUT


def test_the_shorter_of_both_holds() -> None:
    idleness = Idleness()
    patience = SimpleNamespace(idle_timeout=10.0, half_close_timeout=100.0)
    assert idleness.over(0, True, patience, 0.0) is None
    assert idleness.over(0, True, patience, 10.0) is Ending.IDLE_TIMEOUT


def test_who_is_busy_is_not_idle() -> None:
    idleness = Idleness()
    assert [idleness.over(0, False, PATIENCE, now, busy=True) for now in (0.0, 500.0)] == [None, None]
    assert [idleness.over(0, False, PATIENCE, now) for now in (599.9, 600.0)] == [None, Ending.IDLE_TIMEOUT]


def test_who_stands_still_is_probed_at_an_even_pace() -> None:
    standstill = Standstill()
    assert [standstill.due_in(7, now) for now in (100.0, 101.5, 104.0)] == [5.0, 3.5, 1.0]
    assert [standstill.due_in(7, now) for now in (105.0, 105.0, 109.0, 110.0)] == [0.0, 5.0, 1.0, 0.0]
    assert [standstill.due_in(7, now) for now in (118.0, 118.0)] == [0.0, 5.0], "one that is late is not made up for"


def test_whose_bytes_move_is_not_probed() -> None:
    standstill = Standstill()
    assert [standstill.due_in(moved, 100.0 + 4.5 * moved) for moved in range(20)] == [5.0] * 20
    assert [standstill.due_in(19, now) for now in (186.0, 190.5)] == [4.5, 0.0]
    assert standstill.due_in(20, 195.5) == 5.0
