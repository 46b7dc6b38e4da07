"""smtp_tracker: the verdict and the counts, for whole dialogues, for any cut into pieces, and against a reference.

Dialogues are from RFC 5321 (D.1, D.2), RFC 2920 (3.2), RFC 3207 (5), RFC 3030 (4); misbehaviours from docs on sharing.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from proxy.model import Discard
from proxy.protocols.smtp.dialogue import MAX_REPLY_LINE
from proxy.protocols.smtp.tracker import LONGEST_REFUSAL, MAX_COMMAND_LINE, Tracker

C, S = "client", "server"


def feed(tracker, dialogue, size: int | None = None):
    for side, data in dialogue:
        take = tracker.client_bytes if side is C else tracker.server_bytes
        for at in range(0, len(data), size or max(len(data), 1)):
            take(data[at : at + (size or len(data))])
    return tracker


def result(tracker) -> tuple[Discard | None, int, int]:
    return tracker.verdict(), tracker.mails, tracker.accepted


def outcomes(tracker) -> tuple[int, int, int]:
    return tracker.accepted, tracker.deferred, tracker.rejected


HARMFUL = {
    b"QUIT": Discard.QUIT,
    b"EHLO": Discard.HELLO,
    b"HELO": Discard.HELLO,
    b"AUTH": Discard.AUTH,
    b"STARTTLS": Discard.STARTTLS,
    b"BDAT": Discard.BDAT,
    b"XCLIENT": Discard.XCLIENT,
}


class Reference:
    """What `Tracker` claims, said as simply as possible: one byte at a time, the whole queue, the whole message."""

    def __init__(self):
        self.mails = self.accepted = self.deferred = self.rejected = self.chunk = 0
        self.mail_code = 0
        self.reasons = []
        self.queue = []  # what each outstanding reply answers
        self.line = self.reply = b""
        self.lines = []  # codes of an unfinished reply
        self.body = None  # message data so far, with the line end in front
        self.client_lost = self.server_lost = False

    def verdict(self):
        if self.reasons:
            return self.reasons[0]
        if self.body is not None:
            return Discard.IN_DATA
        return Discard.OUTSTANDING if self.queue or self.line or self.reply or self.lines else None

    def client_bytes(self, data):
        for at in range(len(data)):
            self.client_byte(data[at : at + 1])

    def server_bytes(self, data):
        for at in range(len(data)):
            self.server_byte(data[at : at + 1])

    def client_byte(self, byte):
        if self.client_lost:
            return
        if self.body is not None:
            self.body += byte
            self.look_at_body()
        elif self.chunk:
            self.chunk -= 1
        elif self.queue[-1:] in ([b"DATA"], [b"STARTTLS"]):
            self.lose_client()
        else:
            self.line += byte
            stripped = self.line.removesuffix(b"\n").removesuffix(b"\r") if self.line.endswith(b"\r\n") else self.line
            if b"\n" in stripped or b"\r" in stripped.removesuffix(b"\r" if stripped is self.line else b""):
                self.lose_client()
            elif stripped is not self.line:
                self.line = b""
                self.command(stripped)

    def look_at_body(self):
        ended = self.body.endswith(b"\r\n.\r\n")
        for dot in re.finditer(rb"(?<=[\r\n])\.(?=[\r\n])", self.body):
            around = self.body[max(dot.start() - 2, 0) : dot.start() + 3]
            if around not in (b"\r\n.\r\n", b"\r\n.\r"):
                self.reasons.append(Discard.LONE_DOT)
        if b"\0." in self.body or b".\0" in self.body:
            self.reasons.append(Discard.LONE_DOT)
        if ended:
            self.body = None
            self.queue.append(b"end of message")

    def command(self, line):
        if b"\0" in line:
            self.lose_client()
            return
        words = line.upper().split()
        verb = words[0] if words else b""
        self.queue.append(verb)
        self.mails += verb == b"MAIL"
        if verb in HARMFUL:
            self.reasons.append(HARMFUL[verb])
        elif verb not in (b"MAIL", b"RCPT", b"DATA", b"RSET", b"NOOP", b"VRFY", b"EXPN", b"HELP"):
            self.reasons.append(Discard.UNKNOWN_VERB)
        if verb == b"BDAT" and len(words) > 1 and re.fullmatch(rb"[0-9]{1,19}", words[1]):
            self.chunk = int(words[1])

    def server_byte(self, byte):
        if self.server_lost:
            return
        self.reply += byte
        if re.search(rb"\0|\r[^\n]|(?<!\r)\n", self.reply):
            self.lose_server()
        elif self.reply.endswith(b"\r\n"):
            self.reply_line()

    def reply_line(self):
        match = re.fullmatch(rb"([2-5][0-9][0-9])([ -].*)?\r\n", self.reply, re.DOTALL)
        self.reply = b""
        if match is None or self.lines not in ([], [match[1]]):
            self.lose_server()
            return
        self.lines = [match[1]]
        if not (match[2] or b"").startswith(b"-"):
            self.lines = []
            self.on_reply(int(match[1]))

    def on_reply(self, code):
        if code == 421:
            self.reasons.append(Discard.SAID_421)
        if not self.queue:
            self.reasons.append(Discard.PROTOCOL_ERROR)
            return
        asked = self.queue.pop(0)
        self.accepted += asked == b"end of message" and 200 <= code < 300
        self.mail_code = code if asked == b"MAIL" else self.mail_code
        if asked in (b"MAIL", b"end of message") or (asked == b"RCPT" and self.mail_code < 400):
            self.deferred += 400 <= code < 500
            self.rejected += code >= 500
        if asked in (b"DATA", b"STARTTLS") and code == 354:
            self.body = None if self.client_lost else b"\r\n"
        elif asked in (b"DATA", b"STARTTLS") and not self.client_lost and code < 400:
            self.lose_client()
        elif 300 <= code < 400:
            self.reasons.append(Discard.PROTOCOL_ERROR)

    def lose_client(self):
        self.reasons.append(Discard.PROTOCOL_ERROR)
        self.client_lost, self.line = True, b""

    def lose_server(self):
        self.reasons.append(Discard.PROTOCOL_ERROR)
        self.server_lost, self.reply = True, b""


# RFC 5321 D.1: a typical transaction.
PLAIN = [
    (C, b"MAIL FROM:<Smith@bar.com>\r\n"),
    (S, b"250 OK\r\n"),
    (C, b"RCPT TO:<Jones@foo.com>\r\n"),
    (S, b"250 OK\r\n"),
    (C, b"RCPT TO:<Green@foo.com>\r\n"),
    (S, b"550 No such user here\r\n"),
    (C, b"DATA\r\n"),
    (S, b"354 Start mail input; end with <CRLF>.<CRLF>\r\n"),
    (C, b"Blah blah blah...\r\n...etc. etc. etc.\r\n.\r\n"),
    (S, b"250 OK\r\n"),
]
# RFC 2920 3.2: pipelined; the second message goes out behind the dot of the first.
PIPELINED = [
    (C, b"MAIL FROM:<mrose@dbc.mtview.ca.us>\r\nRCPT TO:<ned@innosoft.com>\r\nRCPT TO:<dan@innosoft.com>\r\nDATA\r\n"),
    (S, b"250 sender <mrose@dbc.mtview.ca.us> OK\r\n250 recipient <ned@innosoft.com> OK\r\n"),
    (S, b'250-recipient\r\n250 <dan@innosoft.com> OK\r\n354 enter mail, end with line containing only "."\r\n'),
    (C, b"..stuffed\r\nbody\r\n.\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n"),
    (S, b"250 message sent\r\n250 ok\r\n250 ok\r\n354 go\r\n"),
    (C, b".\r\n"),
    (S, b"554 no message\r\n"),
]
# RFC 2920 3.2: every recipient is refused, DATA with them.
REJECTED = [
    (C, b"MAIL FROM:<mrose@dbc.mtview.ca.us>\r\nRCPT TO:<nsb@thumper.bellcore.com>\r\nDATA\r\n"),
    (S, b"250 ok\r\n550 remote mail to <nsb@thumper.bellcore.com> not allowed\r\n554 no valid recipients given\r\n"),
    (C, b"RSET\r\n"),
    (S, b"250 ok\r\n"),
]
CLEAN = [
    ([], 0, 0),
    (PLAIN, 1, 1),
    (PIPELINED, 2, 1),
    (REJECTED, 1, 0),
    (PLAIN + REJECTED + PIPELINED, 4, 2),
    ([(C, b"data \r\n"), (S, b"503 no\r\n"), (C, b"mail FROM:<>\r\n"), (S, b"250 ok\r\n")], 1, 0),
    ([(C, b"NOOP\r\nVRFY a\r\nEXPN b\r\nHELP\r\n"), (S, b"250 a\r\n252 b\r\n502 c\r\n214-d\r\n214 e\r\n")], 0, 0),
    # A receiver may answer 354 though all recipients were refused; the client then ends the message at once.
    ([(C, b"DATA\r\n"), (S, b"354\r\n"), (C, b".\r\n"), (S, b"554 nobody\r\n")], 0, 0),
    # Bare newlines that no dot is near are ugly and harmless.
    ([(C, b"DATA\r\n"), (S, b"354\r\n"), (C, b"a\nb\rc\n\n.d\r.e\r\n..\r\n.\r\n"), (S, b"250\r\n")], 0, 1),
]


@pytest.mark.parametrize(("dialogue", "mails", "accepted"), CLEAN)
@pytest.mark.parametrize("size", [None, 1, 2, 3, 5])
def test_a_finished_dialogue_is_clean(dialogue, mails, accepted, size):
    tracker, reference = feed(Tracker(), dialogue, size), feed(Reference(), dialogue)
    assert result(tracker) == result(reference) == (None, mails, accepted)
    assert outcomes(tracker) == outcomes(reference)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ((250, 250, 354, 250), (1, 0, 0)),
        ((451,), (0, 1, 0)),
        ((550,), (0, 0, 1)),
        ((450, 503, 503), (0, 1, 0)),  # what was pipelined behind it
        ((250, 450), (0, 1, 0)),
        ((250, 550), (0, 0, 1)),
        ((250, 250, 452), (0, 0, 0)),  # DATA itself decides about no message
        ((250, 250, 354, 421), (0, 1, 0)),
        ((250, 250, 354, 554), (0, 0, 1)),
    ],
)
def test_what_became_of_a_message(replies, expected):
    """Replies to MAIL, RCPT and the final dot, by class."""
    commands = [b"MAIL FROM:<a@b.example>\r\n", b"RCPT TO:<c@d.example>\r\n", b"DATA\r\n", b"x\r\n.\r\n"]
    dialogue = [(C, command) for command in commands]
    said = [step for each, code in zip(dialogue, replies, strict=False) for step in (each, (S, b"%d x\r\n" % code))]
    assert outcomes(feed(Tracker(), said)) == outcomes(feed(Reference(), said)) == expected


@pytest.mark.parametrize("size", [None, 1, 3])
def test_every_prefix_of_a_dialogue_but_a_reply_border_is_unclean(size):
    """The client that pipelined and left: whoever kept this connection would read every reply one command late."""
    tracker, borders = Tracker(), 0
    for side, data in PIPELINED:
        for at in range(len(data)):
            (tracker.client_bytes if side is C else tracker.server_bytes)(data[at : at + 1])
            borders += tracker.verdict() is None
            assert tracker.verdict() in (None, Discard.OUTSTANDING, Discard.IN_DATA)
    assert borders == 1


DATA = [(C, b"DATA\r\n"), (S, b"354 go\r\n")]
# (dialogue, reason): the misbehaviours that make a connection unfit for the next user.
UNCLEAN = [
    ([(C, b"MAIL FROM:<>\r\n")], Discard.OUTSTANDING),
    ([(C, b"NOOP\r\nNOOP\r\n"), (S, b"250 one\r\n")], Discard.OUTSTANDING),
    ([(C, b"NOOP\r\n"), (S, b"250-one\r\n")], Discard.OUTSTANDING),
    ([(C, b"NOOP\r\n"), (S, b"250 one\r")], Discard.OUTSTANDING),
    ([(C, b"NOOP\r\n"), (S, b"250 one\r\n2")], Discard.OUTSTANDING),
    ([(C, b"NOOP")], Discard.OUTSTANDING),
    ([(C, b"NOOP\r")], Discard.OUTSTANDING),
    ([(C, b"DATA\r\n")], Discard.OUTSTANDING),
    (DATA, Discard.IN_DATA),
    ([*DATA, (C, b"half a mess")], Discard.IN_DATA),
    ([*DATA, (C, b"body\r\n.\r")], Discard.IN_DATA),
    ([*DATA, (C, b"body\r\n..\r\n")], Discard.IN_DATA),
    ([*DATA, (C, b"body\r\n.\r\n")], Discard.OUTSTANDING),
    ([*DATA, (C, b"x\r\n.\r\n"), (S, b"421 bye\r\n")], Discard.SAID_421),
    ([(S, b"421 idle too long\r\n")], Discard.SAID_421),
    ([(C, b"NOOP\r\n"), (S, b"421-a\r\n421 b\r\n")], Discard.SAID_421),
    # Two replies for one command; a reply to nothing; one in the middle of a message.
    ([(C, b"NOOP\r\n"), (S, b"250 one\r\n250 two\r\n")], Discard.PROTOCOL_ERROR),
    ([(S, b"250 hello?\r\n")], Discard.PROTOCOL_ERROR),
    ([*DATA, (S, b"552 too much\r\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"MAIL FROM:<>\r\nDATA\r\n"), (S, b"250 a\r\n250 b\r\n")], Discard.PROTOCOL_ERROR),
    # 354 for something else, another 3xx or 2xx for DATA.
    ([(C, b"MAIL FROM:<>\r\n"), (S, b"354 go\r\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"NOOP\r\n"), (S, b"334 go\r\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"DATA\r\n"), (S, b"355 go\r\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"DATA\r\n"), (S, b"250 ok\r\n")], Discard.PROTOCOL_ERROR),
    # The client does not wait for the answer to DATA.
    ([(C, b"DATA\r\nbody\r\n.\r\n"), (S, b"354 go\r\n250 ok\r\n")], Discard.PROTOCOL_ERROR),
    # Not SMTP at all.
    ([(C, b"NOOP\r\n"), (S, b"what?\r\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"NOOP\r\n"), (S, b"250-a\r\n251 b\r\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"NOOP\r\n"), (S, b"250 bare\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"NOOP\r\n"), (S, b"250 nul\0\r\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"NOOP\nMAIL FROM:<>\r\n"), (S, b"250 a\r\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"NO\rOP\r\n"), (S, b"250 a\r\n")], Discard.PROTOCOL_ERROR),
    ([(C, b"x" * (MAX_COMMAND_LINE + 1))], Discard.PROTOCOL_ERROR),
    ([(C, b"NOOP\r\n"), (S, b"250 " + b"x" * MAX_REPLY_LINE)], Discard.PROTOCOL_ERROR),
    # Verbs.
    ([(C, b"QUIT\r\n"), (S, b"221 bye\r\n")], Discard.QUIT),
    ([(C, b"EHLO other.name\r\n"), (S, b"250 hi\r\n")], Discard.HELLO),
    ([(C, b"helo other.name\r\n"), (S, b"250 hi\r\n")], Discard.HELLO),
    ([(C, b"AUTH PLAIN\r\n"), (S, b"334 \r\n"), (C, b"AGEAYg==\r\n"), (S, b"235 ok\r\n")], Discard.AUTH),
    ([(C, b"STARTTLS\r\n"), (S, b"220 go\r\n"), (C, b"\x16\x03\x01\n\n"), (S, b"\x16\x03")], Discard.STARTTLS),
    ([(C, b"STARTTLS\r\n"), (S, b"454 no\r\n")], Discard.STARTTLS),
    ([(C, b"XCLIENT ADDR=192.0.2.1\r\n"), (S, b"220 hi\r\n")], Discard.XCLIENT),
    ([(C, b"BDAT 5 LAST\r\nMAIL\n"), (S, b"250 ok\r\n")], Discard.BDAT),
    ([(C, b"XFORWARD NAME=a\r\n"), (S, b"250 ok\r\n")], Discard.UNKNOWN_VERB),
    ([(C, b"LHLO a\r\n"), (S, b"250 ok\r\n")], Discard.UNKNOWN_VERB),
    ([(C, b"MAILFROM:<>\r\n"), (S, b"500 what\r\n")], Discard.UNKNOWN_VERB),
    ([(C, b"\r\n"), (S, b"500 what\r\n")], Discard.UNKNOWN_VERB),
]
# What some receivers take for the end of a message ("SMTP smuggling", 2023).
UNCLEAN += [
    ([*DATA, (C, b"body" + end + b"MAIL FROM:<x@y>\r\n.\r\n"), (S, b"250 ok\r\n")], Discard.LONE_DOT)
    for end in (
        b"\n.\n",
        b"\n.\r\n",
        b"\r\n.\n",
        b"\r.\r",
        b"\r.\n",
        b"\r.\r\n",
        b"\r\n.\rX",
        b"\n.\rX",
        b"\r\n.\r\r\n",
        b"\r\n\0.\r\n",
        b"\r\n.\0\r\n",
        b"\n\0.\n",
    )
]
# A receiver that takes it for the end of the line sees other commands.
UNCLEAN += [([(C, b"NOOP \0\r\n"), (S, b"250 ok\r\n")], Discard.PROTOCOL_ERROR)]


@pytest.mark.parametrize(("dialogue", "reason"), UNCLEAN)
@pytest.mark.parametrize("size", [None, 1, 2, 3, 5])
def test_misbehaviour_is_named(dialogue, reason, size):
    tracker = feed(Tracker(), dialogue, size)
    assert tracker.verdict() is reason
    if reason not in (Discard.OUTSTANDING, Discard.IN_DATA):
        # Nothing that follows makes it good again.
        assert feed(tracker, PLAIN, size).verdict() is reason


def test_the_longest_lines_are_still_read():
    dialogue = [
        (C, b"NOOP " + b"x" * (MAX_COMMAND_LINE - 5) + b"\r\n"),
        (S, b"250 " + b"x" * (MAX_REPLY_LINE - 4) + b"\r\n"),
    ]
    for size in (None, 1000):
        assert feed(Tracker(), dialogue, size).verdict() is None


def test_mail_commands_behind_a_chunk_are_counted_and_those_inside_are_not():
    dialogue = [
        (C, b"MAIL FROM:<>\r\nBDAT 12 LAST\r\nMAIL FROM:\r\nMAIL FROM:<>\r\n"),
        (S, b"250 a\r\n250 b\r\n250 c\r\n"),
    ]
    for size in (None, 1):
        assert feed(Tracker(), dialogue, size).mails == 2


def test_memory_is_bounded_whatever_comes():
    tracker = Tracker()
    for _ in range(50):
        tracker.client_bytes(b"y" * 1000)
        tracker.server_bytes(b"2" * 1000)
        assert len(tracker._line) <= MAX_COMMAND_LINE
        assert len(tracker._reply_line) <= MAX_REPLY_LINE
    tracker = feed(Tracker(), DATA)
    for _ in range(50):
        tracker.client_bytes(b"\r\n.." * 1000)
        assert len(tracker._tail) <= 4


NOOP = [(C, b"NOOP\r\n"), (S, b"250 ok\r\n")]


@pytest.mark.parametrize(
    ("dialogue", "at_rest"),
    [
        ([], True),
        (NOOP, True),
        # Not fit for another, and yet its receiver may be told QUIT (RFC 5321 section 4.1.1.10).
        ([(C, b"AUTH PLAIN xx\r\n"), (S, b"535 no\r\n")], True),
        ([(C, b"EHLO x\r\n"), (S, b"250 x\r\n")], True),
        ([(C, b"BDAT 3 LAST\r\nabc"), (S, b"250 ok\r\n")], True),
        ([(C, b"TURN\r\n"), (S, b"502 no\r\n")], True),
        ([*DATA, (C, b"\n.\n\r\n.\r\n"), (S, b"250 ok\r\n")], True),
        # In the middle of something.
        ([(C, b"NOOP\r\n")], False),
        ([(C, b"NO")], False),
        ([(C, b"NOOP\r\n"), (S, b"250-ok\r\n")], False),
        ([(C, b"NOOP\r\n"), (S, b"250 ok\r\n2")], False),
        ([(C, b"AUTH LOGIN\r\n"), (S, b"334 \r\n"), (C, b"eA==\r\n")], False),
        (DATA, False),
        ([*DATA, (C, b"text\r\n.\r\n")], False),
        ([(C, b"BDAT 3 LAST\r\nab"), (S, b"250 ok\r\n")], False),
        ([(C, b"STARTTLS\r\n"), (S, b"220 go\r\n")], False),
        # At its end, or not understood.
        ([(C, b"QUIT\r\n"), (S, b"221 bye\r\n")], False),
        ([(C, b"TURN\r\n"), (S, b"502 no\r\n"), (C, b"QUIT\r\n"), (S, b"221 bye\r\n")], False),
        ([(C, b"NOOP\r\n"), (S, b"421 bye\r\n")], False),
        ([(S, b"421 bye\r\n")], False),
        ([(C, b"NOOP\r\n"), (S, b"nonsense\r\n")], False),
        ([(C, b"NOOP\n\r\n"), (S, b"250 ok\r\n")], False),
    ],
)
def test_at_rest_is_when_quit_can_be_said(dialogue, at_rest):
    for size in (None, 1, 3):
        assert feed(Tracker(), dialogue, size).at_rest is at_rest


def test_errors_are_all_replies_5xx():
    """To whatever: receivers do not ask what for."""
    tracker = feed(
        Tracker(),
        [
            *((C, b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nRCPT TO:<e@f>\r\n"), (S, b"550 no\r\n503 no\r\n")),
            *((S, b"451 later\r\n"), (C, b"TURN\r\n"), (S, b"502-no\r\n502 no\r\n"), *NOOP),
        ],
    )
    assert (tracker.errors, tracker.rejected) == (3, 1)


COMMANDS = [
    b"MAIL FROM:<a@b>\r\n",
    b"RCPT TO:<c@d>\r\n",
    b"DATA\r\n",
    b"DATA\r\n",
    b"RSET\r\n",
    b"QUIT\r\n",
    b"STARTTLS\r\n",
    b"AUTH LOGIN\r\n",
    b"BDAT 3\r\n",
    b"BDAT 0 LAST\r\n",
    b"\r\n.\r\n",
    b".\r\n",
    b"..\r\n",
    b"\n.\r\n",
    b"text. \r\n",
    b"\r\n",
    b"\r",
    b"\n",
    b".",
    b"NO",
]
GOOD_REPLIES = [b"250 ok\r\n", b"354 go\r\n", b"550 no\r\n", b"250-a\r\n250 b\r\n"]
REPLIES = [b"220 go\r\n", b"421 bye\r\n", b"250-a\r\n", b"334 \r\n", b"25", b"\r\n", b"\n", b"250\r\n", b"\0"]
# Mostly good: else every dialogue would be lost after its second piece.
TALK = st.lists(
    st.tuples(
        st.just(C), st.sampled_from(COMMANDS[:5] * 8 + COMMANDS) | st.text("\r\n.D\0", max_size=6).map(str.encode)
    )
    | st.tuples(st.just(S), st.sampled_from(GOOD_REPLIES * 6 + REPLIES)),
    max_size=25,
)
# A message of nothing but what matters at its borders.
MESSAGE = st.lists(st.sampled_from([b"\r", b"\n", b".", b"\r\n", b"\r\n.", b"a", b"\0"]), max_size=14).map(b"".join)


def assert_same(dialogue, size):
    reference = feed(Reference(), dialogue)
    expected = result(reference), outcomes(reference)
    for tracker in (feed(Tracker(), dialogue), feed(Tracker(), dialogue, size)):
        assert (result(tracker), outcomes(tracker)) == expected


@settings(max_examples=600)
@given(TALK, st.integers(1, 9))
def test_any_talk_in_any_pieces_agrees_with_the_reference(dialogue, size):
    assert_same(dialogue, size)


@settings(max_examples=600)
@given(MESSAGE, st.integers(1, 9))
@example(b"\r\n.\r\r\n.\r\n", 3)
@example(b"\n.\r\n.\r\n", 4)
@example(b".\r\nNOOP\r\n.", 2)
def test_any_message_in_any_pieces_agrees_with_the_reference(body, size):
    assert_same([*DATA, (C, body)], size)
    assert_same([*DATA, (C, body + b"\r\n.\r\nNOOP\r\n"), (S, b"250 a\r\n250 b\r\n")], size)


# --- MAILs that may not pass yet ---


class Held:
    """Passes a client's bytes on as `transfer` does; each MAIL goes when nothing else is left to be passed."""

    def __init__(self):
        self.tracker = Tracker()
        self.tracker.mails_allowed = 0
        self.passed = b""
        self.stops = []

    def client_bytes(self, data):
        while True:
            left = self.tracker.client_bytes(data)
            self.passed += data[: len(data) - len(left)]
            if not left:
                return
            assert self.tracker.mails == self.tracker.mails_allowed
            self.stops.append((self.passed, left))
            assert self.tracker.client_bytes(left) == left or self.passed.endswith(b"\r"), "again, nothing has changed"
            self.tracker.mails_allowed += 1
            data = left

    def server_bytes(self, data):
        self.tracker.server_bytes(data)


@pytest.mark.parametrize(("dialogue", "mails", "accepted"), CLEAN)
@pytest.mark.parametrize("size", [None, 1, 2, 3, 5, 7])
def test_each_mail_stops_before_its_line_is_complete(dialogue, mails, accepted, size):
    held = feed(Held(), dialogue, size)
    assert result(held.tracker) == (None, mails, accepted)
    assert held.passed == b"".join(data for side, data in dialogue if side is C)
    assert len(held.stops) == mails
    for passed, left in held.stops:
        line = (passed.rpartition(b"\n")[2] + left).partition(b"\r\n")[0]
        assert line.upper().startswith(b"MAIL"), "it stops at a MAIL, and its end was not passed"
        if size is None:
            assert left.upper().startswith(b"MAIL"), "of one that came whole nothing was passed"


def test_what_is_pipelined_before_a_mail_is_passed_and_what_is_behind_is_not():
    tracker = Tracker()
    tracker.mails_allowed = 1
    group = b"RSET\r\nMAIL FROM:<a@a>\r\nRCPT TO:<b@b>\r\nRSET\r\n mail FROM:<c@c>\r\nRCPT TO:<d@d>\r\n"
    assert tracker.client_bytes(group) == b" mail FROM:<c@c>\r\nRCPT TO:<d@d>\r\n"
    assert tracker.mails == 1


def test_a_mail_behind_a_final_dot_stops_and_one_in_a_message_does_not():
    tracker = Tracker()
    tracker.mails_allowed = 1
    feed(tracker, [(C, b"MAIL FROM:<a@a>\r\nRCPT TO:<b@b>\r\nDATA\r\n"), (S, b"250\r\n250\r\n354\r\n")])
    assert tracker.client_bytes(b"MAIL FROM:<x>\r\n.\r\nMAIL FROM:<c@c>\r\n") == b"MAIL FROM:<c@c>\r\n"


# -- refusals that are told --------------------------------------------------------------------------------------------

REFUSED = [
    (C, b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nRCPT TO:<c@example.com>\r\n"),
    (S, b"250 2.1.0 ok\r\n450-4.7.1 greylisted,\r\n450 4.7.1 come \xff back\r\n550 no such user\r\n"),
    (C, b"DATA\r\n"),
    (S, b"354 go on\r\n"),
    (C, b"x\r\n.\r\n"),
    (S, b"421\r\n"),
]


@pytest.mark.parametrize("size", [None, 1, 7])
def test_each_refusal_of_a_command_is_told_whole_however_it_is_cut(size: int | None) -> None:
    told: list[str] = []
    feed(Tracker(told.append), REFUSED, size)
    assert told == ["450 4.7.1 greylisted,\n4.7.1 come \\xff back", "550 no such user", "421 "]


def test_what_a_receiver_says_unasked_is_told_to_nobody() -> None:
    told: list[str] = []
    feed(Tracker(told.append), [(S, b"421 4.4.2 idle for too long\r\n")])
    assert told == []


def test_a_refusal_without_end_is_told_in_part() -> None:
    told: list[str] = []
    feed(Tracker(told.append), [(C, b"NOOP\r\n"), (S, b"450-%b\r\n" % (b"x" * 80) * 100 + b"450 x\r\n")])
    assert [len(each) for each in told] == [LONGEST_REFUSAL]
