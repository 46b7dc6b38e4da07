"""Lines that a pipe would not take as one piece."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.log.fitting import fitting

MOST = 300


@given(st.text(st.characters(exclude_characters="\n"), max_size=100))
def test_what_fits_stays_as_it_is(line: str) -> None:
    data = line.encode("utf-8", "backslashreplace")
    assert fitting(line, len(data)) == data


@given(st.text(min_size=MOST + 1, max_size=4 * MOST))
def test_text_is_cut_to_the_length_at_a_character(line: str) -> None:
    cut = fitting("refused " + line, MOST)
    assert len(cut) <= MOST
    text = cut.decode()
    assert text.endswith(("...", '..."'))


@pytest.mark.parametrize("fill", ["x", "é", "\\\\", '\\"', "\\\\\\\\"])
@pytest.mark.parametrize("at", range(4))
def test_an_open_quote_is_closed(fill: str, at: int) -> None:
    line = f"failed id=1{'0' * at} reason=x message={chr(34)}{fill * MOST}{chr(34)}"
    cut = fitting(line, MOST).decode()
    assert len(cut.encode()) <= MOST
    word = cut[cut.index('"') :]
    assert json.loads(word).endswith("...")  # an escape was not cut in two, so that the quote ends where it does


@given(
    st.dictionaries(st.sampled_from("abcd"), st.text(max_size=MOST), min_size=1),
    st.sampled_from(("", "<3>", "<7>")),
)
def test_json_stays_json(fields: dict[str, str], priority: str) -> None:
    entry = {"event": "failed", "id": 17} | fields
    cut = fitting(priority + msgspec.json.encode(entry).decode(), MOST).decode()
    assert len(cut.encode()) <= MOST
    assert cut.startswith(priority)
    kept = json.loads(cut.removeprefix(priority))
    assert list(kept) == list(entry)
    assert kept["id"] == 17
    for key, value in fields.items():
        assert kept[key] == value or (kept[key].endswith("...") and value.startswith(kept[key][:-3]))


def test_the_longest_text_is_cut_first() -> None:
    entry = {"event": "failed", "reason": "r" * 20, "message": "m" * 400}
    kept = json.loads(fitting(msgspec.json.encode(entry).decode(), MOST))
    assert kept["reason"] == "r" * 20
    assert len(kept["message"]) > 200


def test_json_of_figures_only_is_cut_as_text() -> None:
    line = json.dumps({f"figure{number}": number for number in range(100)})
    assert len(fitting(line, MOST)) <= MOST
    assert len(fitting("{" * 400, MOST)) <= MOST
