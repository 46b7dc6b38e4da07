"""Containers for very many things: each does what a plain dict or list would do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.throttling.many import PIECES, Pieces, Rota

OPERATIONS = st.lists(st.tuples(st.sampled_from(["set", "del", "pop", "get"]), st.integers(0, 60)))


@given(OPERATIONS)
def test_pieces_are_a_dict(operations: list[tuple[str, int]]) -> None:
    pieces: Pieces[int, int] = Pieces()
    plain: dict[int, int] = {}
    for number, (operation, key) in enumerate(operations):
        if operation == "set":
            pieces[key] = plain[key] = number
        elif operation == "pop":
            assert pieces.pop(key, None) == plain.pop(key, None)
        elif operation == "del" and key in pieces:
            del pieces[key], plain[key]
        assert pieces.get(key) == plain.get(key)
        assert (key in pieces) is (key in plain)
        assert (len(pieces), bool(pieces), dict(pieces)) == (len(plain), bool(plain), plain)


def test_no_piece_has_most_of_it() -> None:
    pieces: Pieces[object, None] = Pieces()
    for index in range(PIECES * 1_000):
        pieces["192.0.2.1", f"rule-{index}"] = None
    assert max(map(len, pieces.pieces)) < 2_000


def test_a_rota_keeps_the_order_and_each_once() -> None:
    rota: Rota[str] = Rota()
    for each in "abacb":
        rota.add(each)
    assert (len(rota), rota.next()) == (3, "a")
    rota.add("a")  # behind the others now
    assert [rota.next() for _ in range(len(rota))] == ["b", "c", "a"]
    assert not rota
