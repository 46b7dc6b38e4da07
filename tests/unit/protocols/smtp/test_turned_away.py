"""A message whose MAIL was refused by us on a channel: every command of it is answered once, however it is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocols.smtp.replies import NO_MAIL, OK
from proxy.protocols.smtp.tracker import MAX_COMMAND_LINE
from proxy.protocols.smtp.turned_away import TurnedAway, Unanswerable

NOT_NOW = b"451 4.7.1 not now\r\n"
MAIL = b"MAIL FROM:<a@example.com>\r\n"
GROUP = MAIL + b"RCPT TO:<b@example.net>\r\nnoop\r\nBDAT 9 LAST\r\nQUIT\r\nabcRCPT TO:<c@example.net>\r\nDATA\r\n"
ANSWERS = NOT_NOW + NO_MAIL + OK + NO_MAIL + NO_MAIL + NO_MAIL


@given(st.sets(st.integers(1, len(GROUP) - 1)))
def test_each_command_has_one_answer_however_it_is_cut(cuts):
    message, said = TurnedAway(NOT_NOW), b""
    edges = [0, *sorted(cuts), len(GROUP)]
    for start, end in pairwise(edges):
        answers, rest = message.take(GROUP[start:end])
        assert not rest
        said += answers
    assert said == ANSWERS
    assert not message.over
    assert not message.in_line


@pytest.mark.parametrize("behind", [b"RSET\r\nRCPT", MAIL, b"QUIT\r\n", b"EHLO me\r\n", b"\r\n", b"AUTH PLAIN x\r\n"])
def test_what_is_no_part_of_it_is_the_receivers_again(behind):
    message = TurnedAway(NOT_NOW)
    assert message.take(MAIL + b"RCPT TO:<b>\r\n" + behind) == (NOT_NOW + NO_MAIL, behind)
    assert message.over


def test_a_command_that_has_come_in_part_is_remembered():
    message = TurnedAway(NOT_NOW)
    assert message.take(MAIL + b"RSE") == (NOT_NOW, b"")
    assert message.in_line
    assert message.take(b"T\r\n") == (b"", b"RSET\r\n")


@pytest.mark.parametrize(
    "behind",
    [
        b"DATA\r\nMAIL FROM:<text>\r\n",
        b"BDAT\r\n",
        b"BDAT much\r\n",
        b"RCPT TO:<b>\nRCPT TO:<c>\r\n",
        b"RCPT TO:<b\0>\r\n",
        b"RCPT TO:<b>\rRCPT",
        b"x" * (MAX_COMMAND_LINE + 1),
    ],
)
def test_what_can_be_read_in_two_ways_has_no_answer(behind):
    with pytest.raises(Unanswerable):
        TurnedAway(NOT_NOW).take(MAIL + behind)
