"""What became of each message: domains, size, and the receiver's words; never a local part."""

import pytest

from proxy.protocols.smtp.fates import MOST_DOMAINS, FateTracker
from proxy.stats import Fate

C, S = "client", "server"


def fates(dialogue, size=None):
    told = []
    tracker = FateTracker(told.append)
    for side, data in dialogue:
        take = tracker.client_bytes if side is C else tracker.server_bytes
        for at in range(0, len(data), size or len(data)):
            take(data[at : at + (size or len(data))])
    return told


GROUP = (
    b"MAIL FROM:<a.secret@B.example> SIZE=3\r\nRCPT TO:<c@d.example>\r\nrcpt to:<e@d.example> NOTIFY=NEVER\r\nDATA\r\n"
)
GO = b"250 a\r\n250 b\r\n550 c\r\n354 go\r\n"


@pytest.mark.parametrize("size", [None, 1, 3])
def test_an_accepted_message(size):
    told = fates([(C, GROUP), (S, GO), (C, b"12345\r\n.\r\n"), (S, b"250-2.0.0\r\n250 queued as 7\r\n")], size)
    assert told == [Fate("b.example", ("d.example",), 2, 10, "250 queued as 7")]


@pytest.mark.parametrize("size", [None, 1])
def test_two_messages_of_which_the_second_is_pipelined_behind_the_first(size):
    both = [(C, GROUP), (S, GO), (C, b".\r\n" + GROUP.replace(b"B.ex", b"z.ex")), (S, b"250 one\r\n" + GO)]
    told = fates([*both, (C, b".\r\n"), (S, b"451 4.3.0 later\r\n")], size)
    assert [(fate.sender, fate.reply) for fate in told] == [("b.example", "250 one"), ("z.example", "451 4.3.0 later")]


def test_a_refused_mail_and_refused_data():
    assert fates([(C, GROUP), (S, b"452 full\r\n503 a\r\n503 b\r\n503 c\r\n")]) == [
        Fate("b.example", ("d.example",), 2, 0, "452 full")
    ]
    assert fates([(C, GROUP), (S, b"250 a\r\n550 b\r\n550 c\r\n554 no valid recipients\r\n")]) == [
        Fate("b.example", ("d.example",), 2, 0, "554 no valid recipients")
    ]


def test_what_was_reset_or_never_ended_has_no_fate():
    assert fates([(C, b"MAIL FROM:<>\r\nRSET\r\n"), (S, b"250 a\r\n250 b\r\n")]) == []
    assert fates([(C, GROUP), (S, GO), (C, b"half")]) == []


def test_it_is_bounded():
    rcpts = b"".join(b"RCPT TO:<x@%d.example>\r\n" % number for number in range(1000))
    told = fates(
        [
            (C, b"MAIL FROM:<>\r\n" + rcpts + b"DATA\r\n"),
            (S, b"250 a\r\n" * 1001 + b"354 go\r\n"),
            (C, b".\r\n"),
            (S, b"250 " + b"x" * 2000 + b"\r\n"),
        ]
    )
    assert (told[0].sender, told[0].rcpts, len(told[0].recipients)) == ("", 1000, MOST_DOMAINS)
    assert len(told[0].reply) == 400


SAID = b"MAIL FROM:<a.secret@B.example> SIZE=3\nRCPT TO:<c@d.example>\r\nrcpt to:<e@f.example>\r\nDATA\r\nrcpt x\r\n"


@pytest.mark.parametrize(
    ("said", "recipients", "rcpts"), [(SAID, ("d.example", "f.example"), 2), (SAID[: SAID.find(b"RCPT")], (), 0)]
)
def test_a_message_that_was_turned_away_is_no_receivers(said, recipients, rcpts):
    told = []
    tracker = FateTracker(told.append)
    tracker.turned_away(said, b"451 4.7.1 throttle t: again in 7 s\r\n")
    assert told == [Fate("b.example", recipients, rcpts, 0, "451 4.7.1 throttle t: again in 7 s", False)]
    assert (tracker.mails, tracker.verdict()) == (0, None)
