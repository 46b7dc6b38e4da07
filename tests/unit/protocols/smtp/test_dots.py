"""The search for the end of a message, in Python and in C: both find what a plain reading of each byte finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.protocols.smtp import dots

Scan = Callable[[bytes], int]
SCANS = [dots.scan] if dots.fastest is dots.scan else [dots.scan, dots.fastest]


def plainly(data: bytes) -> int:
    """Byte by byte, as the document of `dots.scan` says it."""
    lone = 0
    for at, byte in enumerate(data):
        if byte != ord("."):
            continue
        before, behind = data[max(at - 2, 0) : at], data[at + 1 : at + 3]
        if before == b"\r\n" and behind == b"\r\n":
            return 2 * (at - 2) + lone
        if before == b"\r\n" and behind == b"\r":
            continue  # it may still become the end
        beside_nul = before[-1:] == b"\0" or behind[:1] == b"\0"
        if beside_nul or (before[-1:] in (b"\r", b"\n") and behind[:1] in (b"\r", b"\n")):
            lone = 1
    return -2 + lone


@pytest.mark.parametrize("scan", SCANS)
def test_every_short_text_of_what_matters(scan: Scan) -> None:
    for size in range(8):
        for letters in itertools.product(b"\r\n.\0" if size < 7 else b"\r\n.", repeat=size):
            data = bytes(letters)
            assert scan(data) == plainly(data), data


@pytest.mark.parametrize("scan", SCANS)
@settings(max_examples=400)
@given(data=st.lists(st.sampled_from([b"\r\n", b".", b"\r", b"\n", b"\0", b"x", b"..", b"\r\n.\r\n"]), max_size=40))
@example(data=[b"a line\r\n"] * 300 + [b".\r\n"])
def test_longer_ones(scan: Scan, data: list[bytes]) -> None:
    text = b"".join(data)
    assert scan(text) == plainly(text)


@pytest.mark.parametrize("scan", SCANS)
def test_a_view_of_no_bytes_object_is_none_of_its_business(scan: Scan) -> None:
    assert scan(b"") == -2
    with pytest.raises((TypeError, AttributeError)):
        scan(None)  # type: ignore[arg-type]
