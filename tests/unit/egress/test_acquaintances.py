"""What receivers said when they were last connected to."""

from __future__ import annotations

from proxy.egress.acquaintances import Acquaintances, Introduction
from proxy.model import Endpoint, TlsMode

ONE, OTHER, THIRD = (Endpoint(f"192.0.2.{number}", 25) for number in (1, 2, 3))
CLEAR, TLS = TlsMode.NONE, TlsMode.OPPORTUNISTIC


def test_the_last_word_counts_and_what_is_said_behind_tls_is_another():
    known = Acquaintances()
    assert known.known(ONE, TLS) is None
    known.met(ONE, TLS, "220 a", ("a", "SIZE 1"))
    known.met(ONE, TLS, "220 b", ("b", "SIZE 2"))
    assert known.known(ONE, TLS) == Introduction("220 b", ("b", "SIZE 2"))
    assert known.known(ONE, CLEAR) is None
    assert known.known(OTHER, TLS) is None


def test_who_was_met_longest_ago_is_forgotten_first():
    known = Acquaintances(most=2)
    for destination in (ONE, OTHER, ONE, THIRD):
        known.met(destination, CLEAR, "220", ("x",))
    assert len(known) == 2
    assert known.known(OTHER, CLEAR) is None
    assert known.known(ONE, CLEAR) is not None


def test_who_says_a_great_deal_is_not_remembered():
    known = Acquaintances()
    known.met(ONE, CLEAR, "220 x", ("y" * 5000,))
    assert len(known) == 0
