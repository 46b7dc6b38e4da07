"""Which rows the words behind `show` choose."""

from __future__ import annotations

import pytest
from msgspec import Struct

from proxy.control.filters import chosen, columns, for_a_time
from proxy.errors import Mistake


class Row(Struct):
    name: str
    destination: str
    age: float
    here: bool = True


ROWS = [Row("a", "192.0.2.1:25", 5.0), Row("b", "[2001:db8::1]:25", 50.0, False), Row("a", "192.0.2.2:2525", 500.0)]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], [0, 1, 2]),
        (["a"], [0, 2]),
        (["a", "192.0.2.2:2525"], [2]),
        (["name=b"], [1]),
        (["destination=192.0.2.1"], [0]),
        (["destination=192.0.2.1:25"], [0]),
        (["destination=2001:db8::1"], [1]),
        (["destination=[2001:db8::1]:25"], [1]),
        (["destination=192.0.2"], []),
        (["older=50s"], [1, 2]),
        (["older=1m", "a"], [2]),
        (["here=no"], [1]),
        (["name="], []),
    ],
)
def test_the_rows_that_fit_all_words(words, found) -> None:
    assert chosen(ROWS, words, ("name", "destination"), "age") == [ROWS[number] for number in found]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a", "b", "c"], "one word too many"),
        (["colour=red"], "there are name, destination, age, here"),
        (["older=soon"], "a duration"),
    ],
)
def test_what_cannot_be_understood(words, told) -> None:
    with pytest.raises(Mistake, match=told) as mistake:
        chosen(ROWS, words, ("name", "destination"), "age")
    assert mistake.value.code == "bad_command"


def test_a_table_without_ages() -> None:
    with pytest.raises(Mistake, match="has an age"):
        chosen(ROWS, ["older=1s"], ())


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a=1", "for", "10m"], (["a=1"], 600.0)),
        (["for", "2h"], ([], 7200.0)),
        (["for", "1h", "30m"], None),
        (["a=1"], (["a=1"], 60.0)),
        (["for"], None),
        (["for", "0s"], None),
        (["for", "3h"], None),
        (["for", "ever"], None),
    ],
)
def test_for_a_time(words, found) -> None:
    if found is None:
        with pytest.raises(Mistake, match="for "):
            for_a_time(words, 60.0, 7200.0)
    else:
        assert for_a_time(words, 60.0, 7200.0) == found


def test_columns() -> None:
    assert columns(["a=1", "b=x=y"], ("a", "b")) == {"a": "1", "b": "x=y"}
    for word in ("c=1", "a"):
        with pytest.raises(Mistake, match="a=, b="):
            columns([word], ("a", "b"))
