"""Slots of a cluster: values of the specification, redirections, the map. https://valkey.io/topics/cluster-spec/"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import PeerError
from proxy.store.slots import SLOTS, Map, Redirect, redirect_of, slot_of
from proxy.store.wire import ErrorReply

A, B, C = ("192.0.2.1", 6379), ("192.0.2.2", 6379), ("store.example", 7000)


def crc16(data: bytes) -> int:
    """CRC-16/XMODEM as the specification has it, bit by bit."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1) ^ 0x1021 if crc & 0x8000 else crc << 1
    return crc & 0xFFFF


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (b"123456789", b"123456789"),
        (b"{user1000}.following", b"user1000"),
        (b"foo{}{bar}", b"foo{}{bar}"),
        (b"foo{{bar}}zap", b"{bar"),
        (b"foo{bar}{zap}", b"bar"),
        (b"foo{bar", b"foo{bar"),
        (b"foo}bar", b"foo}bar"),
        (b"", b""),
        (b"{ga:t:192.0.2.1}:w3600", b"ga:t:192.0.2.1"),
    ],
)
def test_what_of_a_key_counts(key: bytes, hashed: bytes) -> None:
    assert slot_of(key) == crc16(hashed) % SLOTS


def test_the_value_of_the_specification() -> None:
    assert crc16(b"123456789") == 0x31C3
    assert slot_of(b"123456789") == 0x31C3 % SLOTS


@given(st.binary())
def test_any_key_has_a_slot(key: bytes) -> None:
    assert 0 <= slot_of(key) < SLOTS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"MOVED 3999 127.0.0.1:6381", Redirect(3999, ("127.0.0.1", 6381), True)),
        (b"ASK 3999 127.0.0.1:6381", Redirect(3999, ("127.0.0.1", 6381), False)),
        (b"MOVED 0 :6381", Redirect(0, ("asked", 6381), True)),
        (b"MOVED 0 2001:db8::1:6381", Redirect(0, ("2001:db8::1", 6381), True)),
        (b"MOVED 0 store.example:7000", Redirect(0, C, True)),
        *((text, None) for text in (b"MOVED", b"MOVED 1", b"MOVED x 127.0.0.1:1", b"MOVED 16384 127.0.0.1:1")),
        *(
            (text, None)
            for text in (b"MOVED 1 127.0.0.1", b"MOVED 1 h:0", b"MOVED 1 h:70000", b"MOVEDX 1 h:1", b"ERR x")
        ),
        (b"MOVED 1 h:\xc2\xb2", None),
        (b"MOVED \xc2\xb2 h:1", None),
    ],
)
def test_redirections(text: bytes, expected: Redirect | None) -> None:
    assert redirect_of(ErrorReply(text), "asked") == expected


def test_what_is_no_error_is_no_redirection() -> None:
    assert redirect_of(b"MOVED 3999 127.0.0.1:6381", "asked") is None


def test_the_map() -> None:
    answer = [
        [0, 5460, [b"192.0.2.1", 6379, b"id", []], [b"192.0.2.9", 6379, b"replica"]],
        [5461, 10922, [b"192.0.2.2", 6379, b"id", [b"hostname", b"x"]]],
        [10923, 10923, [b"", 6380, b"id"]],
        [10924, 10924, [None, 6381, b"id"]],
        [10925, 10925, [b"?", 6382, b"id"]],
    ]
    found = Map.of(answer, "asked")
    assert (found[0], found[5460], found[5461], found[10922]) == (A, A, B, B)
    assert [found[slot] for slot in (10923, 10924, 10925)] == [("asked", port) for port in (6380, 6381, 6382)]
    assert found[10926] is None
    assert found.uncovered == SLOTS - 10926
    assert found.servers == [A, B, ("asked", 6380), ("asked", 6381), ("asked", 6382)]
    found.move(0, B)
    assert (found[0], found[1]) == (B, A)


@pytest.mark.parametrize(
    "answer",
    [
        *(None, 5, b"x", [[0]], [[0, 1]], [[0, 1, []]], [[0, 1, [b"h"]]], [[b"0", 1, [b"h", 1]]]),
        *([[0, 16384, [b"h", 1]]], [[2, 1, [b"h", 1]]], [[-1, 1, [b"h", 1]]], [[0, 1, [b"h", 0]]]),
        *([[0, 1, [b"h", b"1"]]], [[0, 1, [5, 1]]], [[0, 1, [b"\xff", 1]]], ErrorReply(b"ERR")),
    ],
)
def test_an_answer_that_is_no_map(answer: object) -> None:
    with pytest.raises(PeerError):
        Map.of(answer, "asked")


JSON = st.recursive(st.none() | st.integers() | st.binary(max_size=8), lambda inner: st.lists(inner, max_size=4))


@given(JSON)
def test_any_answer_is_a_map_or_an_error(answer: object) -> None:
    try:
        Map.of(answer, "asked")
    except PeerError:
        return
