"""The engine's protocol: bytes of the specification, however a network delivers them, and whatever a peer makes up.

Examples are those of https://valkey.io/topics/protocol/ (RESP2 and RESP3).
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.store.wire import (
    MOST_BYTES,
    NOTHING,
    ErrorReply,
    MalformedReply,
    Push,
    Replies,
    command,
    script_call,
)

ONE = (b"*1\r\n" * 8) + b":1\r\n"


def all_of(*chunks: bytes) -> list[Any]:
    """Every reply that comes of these bytes."""
    replies, found = Replies(), []
    for chunk in chunks:
        replies.feed(chunk)
        while (reply := replies.next()) is not NOTHING:
            found.append(reply)
    return found


def plain(reply: Any) -> Any:
    """For comparing: a push by its items."""
    return ("push", reply.items) if isinstance(reply, Push) else reply


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"+OK\r\n", b"OK"),
        (b"+\r\n", b""),
        (b"-ERR unknown command 'asdf'\r\n", ErrorReply(b"ERR unknown command 'asdf'")),
        (b":0\r\n", 0),
        (b":-1000\r\n", -1000),
        (b":+5\r\n", 5),
        (b":9223372036854775807\r\n", 2**63 - 1),
        (b"$5\r\nhello\r\n", b"hello"),
        (b"$0\r\n\r\n", b""),
        (b"$2\r\n\r\n\r\n", b"\r\n"),
        (b"$-1\r\n", None),
        (b"*0\r\n", []),
        (b"*-1\r\n", None),
        (b"*2\r\n$5\r\nhello\r\n$5\r\nworld\r\n", [b"hello", b"world"]),
        (b"*5\r\n:1\r\n:2\r\n:3\r\n:4\r\n$5\r\nhello\r\n", [1, 2, 3, 4, b"hello"]),
        (b"*2\r\n*3\r\n:1\r\n:2\r\n:3\r\n*2\r\n+Hello\r\n-World\r\n", [[1, 2, 3], [b"Hello", ErrorReply(b"World")]]),
        (b"*3\r\n$5\r\nhello\r\n$-1\r\n$5\r\nworld\r\n", [b"hello", None, b"world"]),
        (b"*2\r\n*0\r\n*1\r\n*0\r\n", [[], [[]]]),
        (b"_\r\n", None),
        (b"#t\r\n", True),
        (b"#f\r\n", False),
        (b",1.23\r\n", b"1.23"),
        (b"(3492890328409238509324850943850943825024385\r\n", b"3492890328409238509324850943850943825024385"),
        (b"!21\r\nSYNTAX invalid syntax\r\n", ErrorReply(b"SYNTAX invalid syntax")),
        (b"=15\r\ntxt:Some string\r\n", b"Some string"),
        (b"%2\r\n+first\r\n:1\r\n+second\r\n:2\r\n", [(b"first", 1), (b"second", 2)]),
        (b"~2\r\n+a\r\n+b\r\n", [b"a", b"b"]),
        (b"|1\r\n+key-popularity\r\n%1\r\n$1\r\na\r\n,0.19\r\n*1\r\n:2\r\n", [2]),
        (b"*2\r\n|1\r\n+ttl\r\n:3600\r\n:1\r\n:2\r\n", [1, 2]),
        (b">2\r\n+pubsub\r\n:1\r\n", ("push", [b"pubsub", 1])),
        (ONE, [[[[[[[[1]]]]]]]]),
    ],
)
def test_a_reply_however_it_comes(data: bytes, reply: Any) -> None:
    assert [plain(each) for each in all_of(data)] == [reply]
    assert [plain(each) for each in all_of(*(data[at : at + 1] for at in range(len(data))))] == [reply]
    assert [plain(each) for each in all_of(data + b"+next\r\n" + data[:-1])] == [reply, b"next"]


@pytest.mark.parametrize(
    "data",
    [
        *(b"\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"220 mx ESMTP\r\n", b"\x15\x03\x01\r\n"),
        *(b":\r\n", b":1a\r\n", b":--1\r\n", b":\xb2\r\n", b": 1\r\n", b":" + b"1" * 20 + b"\r\n"),
        *(b"#x\r\n", b"$\r\n", b"$x\r\n", b"$3\r\nabcde", b"*x\r\n", b"*\r\n", b"$1_0\r\n"),
        *(b"+" + b"x" * 5000, b"x" * 5000),
        *(b"$1048577\r\n", b"*65536\r\n", b"*100000000\r\n", b"*4294967295\r\n", b"%32768\r\n", b"~9999999999\r\n"),
        *(b"*1\r\n" + ONE, b"*1\r\n" * 100000, b"*1\r\n>1\r\n:1\r\n"),
        *(b"*2000\r\n" + b"$1000\r\n" + b"x" * 1000 + b"\r\n", b"*40000\r\n*40000\r\n"),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_reply_ends_the_connection(data: bytes) -> None:
    with pytest.raises(MalformedReply) as caught:
        all_of(data + b"$1000\r\n%b\r\n" % (b"x" * 1000) * 2000)
    assert "x" * 10 not in str(caught.value)


def test_what_a_peer_only_announces_costs_nothing() -> None:
    """hiredis takes 763 MB for the first of these."""
    tracemalloc.start()
    for data in (b"*65000\r\n", b"$1048576\r\n", b"~65000\r\n", b"%32000\r\n"):
        assert all_of(data) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_many_replies_one_behind_the_other_are_each_within_bounds() -> None:
    replies, size, number = Replies(), 100_000, 30
    assert size * number > MOST_BYTES
    found = 0
    for _ in range(number):
        replies.feed(b"$%d\r\n%b\r\n" % (size, b"x" * size))
        while replies.next() is not NOTHING:
            found += 1
    assert found == number


def test_commands() -> None:
    assert command(b"PING") == b"*1\r\n$4\r\nPING\r\n"
    assert command(b"SELECT", 3) == b"*2\r\n$6\r\nSELECT\r\n$1\r\n3\r\n"
    assert command(b"A", b"", -12) == b"*3\r\n$1\r\nA\r\n$0\r\n\r\n$3\r\n-12\r\n"
    expected = command(b"EVALSHA", b"abc", b"2", b"k1", b"k2", b"7", b"x")
    assert script_call(b"abc", [b"k1", b"k2"], [7, b"x"]) == expected


# ------------------------------------------------------------------ made up


def encoded(value: Any) -> bytes:
    """The bytes of a value, by the specification and not by ours."""
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    return b"*%d\r\n%b" % (len(value), b"".join(map(encoded, value)))


VALUES = st.recursive(
    st.none() | st.integers(-(2**63), 2**63 - 1) | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=20,
)


def depth(value: Any) -> int:
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(st.lists(VALUES.filter(lambda value: depth(value) <= 8), max_size=5), st.data())
def test_whatever_is_sent_arrives_cut_anywhere(values: list[Any], data: st.DataObject) -> None:
    whole = b"".join(map(encoded, values))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    chunks = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert all_of(*chunks) == values


PIECES = st.sampled_from(
    [b"\r\n", b"*", b"$", b":", b"-", b"+", b"%", b">", b"|", b"_", b"#t", b"1", b"-1", b"99", b"3"]
)


@given(st.lists(PIECES | st.binary(max_size=20), max_size=60), st.integers(1, 30))
def test_whatever_comes_is_replies_or_an_error_and_the_same_however_it_is_cut(pieces: list[bytes], size: int) -> None:
    data = b"".join(pieces)

    def outcome(*chunks: bytes) -> tuple[list[Any], bool]:
        replies, found = Replies(), []
        try:
            for chunk in chunks:
                replies.feed(chunk)
                while (reply := replies.next()) is not NOTHING:
                    found.append(plain(reply))
        except MalformedReply:
            return found, True
        return found, False

    assert outcome(data) == outcome(*(data[at : at + size] for at in range(0, len(data), size)))
