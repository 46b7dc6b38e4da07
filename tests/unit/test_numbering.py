"""Numbers of connections, of one process and of several."""

from __future__ import annotations

import pytest

from proxy.numbering import LEFT_OUT, Numbers, step_for


def counting_as(*how: int) -> Numbers:
    numbers = Numbers()
    numbers.count_as(*how)
    return numbers


def taken(numbers: Numbers, count: int) -> list[int]:
    return [numbers.take() for _ in range(count)]


def test_one_process_counts_from_1() -> None:
    numbers = Numbers()
    assert taken(numbers, 3) == [1, 2, 3]
    assert numbers.last == 3


@pytest.mark.parametrize(("workers", "step"), [(0, 1), (1, 10), (9, 10), (10, 100), (99, 100), (100, 1000)])
def test_the_step_has_room_for_all_and_the_master(workers: int, step: int) -> None:
    assert step_for(workers) == step
    assert step == 1 or step > workers


def test_the_last_digits_say_which_process_it_was() -> None:
    assert taken(counting_as(0, 10), 3) == [10, 20, 30]
    assert taken(counting_as(1, 10), 3) == [11, 21, 31]
    assert taken(counting_as(9, 10), 2) == [19, 29]


@pytest.mark.parametrize("above", [1, 9, 10, 4271, 99_999])
@pytest.mark.parametrize("process", [0, 1, 9])
def test_who_takes_the_place_of_another_begins_well_above_it(process: int, above: int) -> None:
    numbers = counting_as(process, 10, above)
    first = numbers.take()
    assert first % 10 == process
    assert above + LEFT_OUT * 10 < first <= above + LEFT_OUT * 10 + 10


def test_no_two_processes_give_out_the_same_number() -> None:
    given: list[int] = []
    for process in range(12):
        given += taken(counting_as(process, step_for(11)), 1000)
    assert len(set(given)) == len(given)
