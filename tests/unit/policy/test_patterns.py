"""Patterns that replies are held against: their three forms, mistakes with their place, and hostile replies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.policy.patterns import LONGEST_PATTERN, LONGEST_TEXT, BadPattern, Pattern, said

YAHOO = "421 4.7.0 [TSS04] Messages from 192.0.2.1 temporarily deferred due to unexpected volume"


def fits(pattern: str, reply: str) -> bool:
    return Pattern(pattern).matches(said(reply))


@pytest.mark.parametrize(
    ("pattern", "reply", "does"),
    [
        ("421", YAHOO, True),
        ("421", "451 4.7.0 not 421", False),
        ("4.7.", YAHOO, True),
        ("4.7", YAHOO, True),
        ("4.7.0", YAHOO, True),
        ("4.", YAHOO, True),
        ("4.7.1", "450 4.7.1 <a@example.com>: greylisted", True),
        ("4.7.1", "450 4.7.12 no", False),
        ("4.7.", "450 4.70.1 no", False),
        ("5.7.1", "550 #5.7.1 Your access has been rejected", True),
        ("4.7.", "450 no enhanced code, but 4.7.1 in the text", False),
        ("4.7.", "450 4.7.1.2 is an address", False),
        ("TSS04", YAHOO, True),
        ("tss0[45]", YAHOO, True),
        ("TSS05", YAHOO, False),
        ("5.7.1 .*blocked", "550 5.7.1 Your IP is Blocked by us", True),
        ("5.7.1 .*blocked", "550 5.7.1 welcome", False),
        ("^550 .*blocked$", "550 you are\nblocked", True),
        ("rate that", "421 4.7.28 Our system has detected an unusual rate\n4.7.28 that is too high", True),
        ("420", "421 4", False),
        ("straße", "550 5.7.1 STRASSE", False),
        ("straße", "550 5.7.1 Straße", True),
    ],
)
def test_the_forms_of_a_pattern(pattern: str, reply: str, does: bool) -> None:
    assert fits(pattern, reply) is does


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("5.7.1 (", "character 7: missing )"),
        ("(a)(b", "character 4: missing )"),
        ("(a(b)", "character 1: missing )"),
        ("ab)", "character 3: unexpected )"),
        ("a*|*", "character 4: no argument for repetition operator: *"),
        ("x**", "character 3: bad repetition operator: **"),
        ("no \\y here", "character 4: invalid escape sequence: \\y"),
        ("a(?=b)", "character 2: invalid perl operator: (?="),
        ("(a)\\1", "character 4: invalid escape sequence: \\1"),
        ("x[z-a]", "character 2: invalid character class range: z-a"),
        ("((a{100}){100}){100}", "invalid repetition size"),
        ("", "empty"),
        ("a*", "fits every reply"),
        ("x" * (LONGEST_PATTERN + 1), "longer than"),
    ],
)
def test_a_mistake_is_told_with_its_place(text: str, where: str) -> None:
    with pytest.raises(BadPattern) as caught:
        Pattern(text)
    assert where in str(caught.value)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)+$", "(.*a){12}b", "(x+x+)+y", "^(([a-z])+.)+[A-Z]([a-z])+$", "(?:[ab]*a[ab]{90}c)"]
)
def test_a_hostile_reply_holds_nobody(pattern: str) -> None:
    """Each of these takes an engine that backtracks longer than the universe is old: that it ends is the test."""
    for text in ("a" * 5000 + "!", "x" * 5000, "ab" * 2500, "aaab" * 1250):
        Pattern(pattern).matches(said(f"450 {text}"))


def test_what_is_looked_at_of_a_reply_is_bounded() -> None:
    assert len(said("450 " + "é" * 100_000).text) == LONGEST_TEXT
    assert not fits("needle", "450 " + "x" * LONGEST_TEXT + "needle")


@given(st.text(max_size=60), st.text(max_size=200))
def test_nothing_that_is_written_or_said_breaks_it(pattern: str, reply: str) -> None:
    try:
        made = Pattern(pattern)
    except BadPattern:
        return
    made.matches(said(reply))
