"""smtp: reply parser, bring-up, RSET and QUIT. Expected bytes are from RFC 5321, 3207 and 9422, cited at each table."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import PeerError, Step, UpstreamError
from proxy.model import Discard, TlsMode
from proxy.protocols.smtp.dialogue import (
    MAX_REPLY,
    MAX_REPLY_LINE,
    Action,
    BadReply,
    ClientDialogue,
    Quit,
    Reply,
    ReplyParser,
    Rset,
    Then,
    mailmax,
    parse_capabilities,
    try_next_destination,
)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def parse(data: bytes, size: int | None = None, strict: bool = False) -> tuple[list[Reply], bool]:
    parser, replies = ReplyParser(strict), []
    for piece in pieces(data, size or max(len(data), 1)):
        parser.receive(piece)
        while (reply := parser.next_reply()) is not None:
            replies.append(reply)
    return replies, parser.unread


# RFC 5321 4.2.1 (multi-line example), 4.3.1, D.1; a code alone: 4.2.
REPLIES = [
    (b"250 OK\r\n", Reply(250, ("OK",))),
    (
        b"250-First line\r\n250-Second line\r\n250-234 Text beginning with numbers\r\n250 The last line\r\n",
        Reply(250, ("First line", "Second line", "234 Text beginning with numbers", "The last line")),
    ),
    (
        b"220 foo.com Simple Mail Transfer Service Ready\r\n",
        Reply(220, ("foo.com Simple Mail Transfer Service Ready",)),
    ),
    (b"250\r\n", Reply(250, ("",))),
    (b"250-\r\n250 \r\n", Reply(250, ("", ""))),
    (b"571 Delivery not authorized\r\n", Reply(571, ("Delivery not authorized",))),
    (b"250 caf\xe9 gr\xc3\xbc\xc3\x9fe\r\n", Reply(250, ("caf\\xe9 grüße",))),
    (b"250 " + b"x" * (MAX_REPLY_LINE - 6) + b"\r\n", Reply(250, ("x" * (MAX_REPLY_LINE - 6),))),
]


@pytest.mark.parametrize(("wire", "reply"), REPLIES)
@pytest.mark.parametrize("strict", [False, True])
def test_a_reply_is_read_whole_byte_by_byte_and_with_trailing_data(wire, reply, strict):
    assert parse(wire, strict=strict) == ([reply], False)
    assert parse(wire, 1, strict) == ([reply], False)
    assert parse(wire + b"22", strict=strict) == ([reply], True)
    assert parse(wire + wire, 7, strict) == ([reply, reply], False)
    assert parse(wire[:-1], strict=strict) == ([], True)


BAD_REPLIES = [
    b"hello\r\n",
    b"\r\n",
    b"25\r\n",
    b"150 no such class\r\n",
    b"600 no such class\r\n",
    b"2x0 OK\r\n",
    b"2500 OK\r\n",
    b"250_OK\r\n",
    b"\xb2\xb50 OK\r\n",
    b"250-one\r\n251 other\r\n",
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"\x16\x03\x01\x00\xa5\x01\n",
    b"250 " + b"x" * (MAX_REPLY_LINE - 5) + b"\r\n",
    b"x" * MAX_REPLY_LINE,
    b"250-x\r\n" * (MAX_REPLY // 7 + 1),
]


@pytest.mark.parametrize("wire", BAD_REPLIES)
def test_what_is_not_a_reply_is_an_error_however_it_is_cut(wire):
    for size in (None, 1, 7):
        with pytest.raises(BadReply):
            parse(wire, size)


@pytest.mark.parametrize("wire", [b"250 OK\n", b"250-a\n250 OK\r\n", b"250 a\rb\r\n", b"250 a\0b\r\n", b"250 a\r\r\n"])
def test_bare_newlines_are_tolerated_only_where_nothing_is_to_be_kept(wire):
    assert [reply.code for reply in parse(wire)[0]] == [250]
    assert parse(wire, 1) == parse(wire)
    for size in (None, 1):
        with pytest.raises(BadReply):
            parse(wire, size, strict=True)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.integers(1, 9), st.booleans())
def test_any_bytes_give_the_same_however_they_are_cut_and_never_another_error(data, size, strict):
    def outcome(cut):
        try:
            return parse(data, cut, strict)
        except BadReply:
            return "bad"

    assert outcome(size) == outcome(None)


class Receiver:
    """Plays a script of (what the dialogue must send, what the receiver answers) and keeps the last action."""

    def __init__(self, tls: TlsMode, size: int = 1 << 20) -> None:
        self.dialogue = ClientDialogue("mta.example.org", tls, "192.0.2.25:25")
        self.size = size
        self.action = self.dialogue.begin()

    def says(self, wire: bytes) -> Action:
        assert self.action.then is Then.READ
        for piece in pieces(wire, self.size):
            assert self.action.then is Then.READ
            self.action = self.dialogue.receive(piece)
        return self.action

    def fails(self, wire: bytes) -> UpstreamError:
        with pytest.raises(UpstreamError) as caught:
            self.says(wire)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("192.0.2.25:25 ")
        return caught.value


EHLO = Action(b"EHLO mta.example.org\r\n", Then.READ)
HELO = Action(b"HELO mta.example.org\r\n", Then.READ)
STARTTLS = Action(b"STARTTLS\r\n", Then.READ)
START_TLS = Action(b"", Then.START_TLS)
DONE = Action(b"", Then.DONE)
GREETING = b"220 mx.example.net ESMTP\r\n"
# RFC 3207 5: the example's EHLO reply.
HELLO_TLS = b"250-mail.imc.org offers a warm hug of welcome\r\n250-8BITMIME\r\n250-STARTTLS\r\n250 DSN\r\n"
HELLO = b"250-mx.example.net\r\n250-SIZE 1000\r\n250-limits MAILMAX=20 RCPTMAX=100\r\n250 pipelining\r\n"


@pytest.mark.parametrize("size", [1 << 20, 1])
def test_bring_up_in_clear(size):
    mx = Receiver(TlsMode.NONE, size)
    assert mx.says(GREETING) == EHLO
    assert mx.dialogue.step is Step.EHLO
    assert mx.says(HELLO) == DONE
    assert mx.dialogue.greeting == Reply(220, ("mx.example.net ESMTP",))
    assert mx.dialogue.capabilities == {"SIZE": "1000", "LIMITS": "MAILMAX=20 RCPTMAX=100", "PIPELINING": ""}
    assert mailmax(mx.dialogue.capabilities) == 20
    assert not mx.dialogue.encrypted


@pytest.mark.parametrize("size", [1 << 20, 1])
@pytest.mark.parametrize("mode", [TlsMode.OPPORTUNISTIC, TlsMode.REQUIRED])
def test_starttls_then_ehlo_again_and_only_the_second_one_counts(mode, size):
    mx = Receiver(mode, size)
    mx.says(GREETING)
    assert mx.says(HELLO_TLS) == STARTTLS
    assert mx.dialogue.step is Step.STARTTLS
    assert mx.says(b"220 Go ahead\r\n") == START_TLS
    assert (mx.dialogue.step, mx.dialogue.hello, mx.dialogue.capabilities) == (Step.TLS, None, {})
    mx.action = mx.dialogue.tls_started()
    assert mx.action == EHLO
    assert mx.says(HELLO) == DONE
    assert mx.dialogue.encrypted
    assert "STARTTLS" not in mx.dialogue.capabilities


@pytest.mark.parametrize("size", [1 << 20, 1])
def test_implicit_tls_comes_before_the_greeting(size):
    mx = Receiver(TlsMode.IMPLICIT, size)
    assert (mx.action, mx.dialogue.step) == (START_TLS, Step.TLS)
    mx.action = mx.dialogue.tls_started()
    assert (mx.action.then, mx.dialogue.step) == (Then.READ, Step.GREETING)
    assert mx.says(GREETING) == EHLO
    assert mx.says(HELLO_TLS) == DONE
    assert mx.dialogue.encrypted


def test_a_client_that_wants_no_tls_does_not_start_it():
    mx = Receiver(TlsMode.NONE)
    mx.says(GREETING)
    assert mx.says(HELLO_TLS) == DONE


@pytest.mark.parametrize("refusal", [b"454 TLS not available due to temporary reason\r\n", b"501 no parameters\r\n"])
def test_opportunistic_goes_on_in_clear_when_starttls_is_refused(refusal):
    mx = Receiver(TlsMode.OPPORTUNISTIC)
    mx.says(GREETING)
    mx.says(HELLO_TLS)
    assert mx.says(refusal) == DONE
    assert mx.dialogue.starttls_refusal.code == int(refusal[:3])
    assert (mx.dialogue.encrypted, "8BITMIME" in mx.dialogue.capabilities) == (False, True)


def test_opportunistic_goes_on_in_clear_when_starttls_is_not_offered():
    mx = Receiver(TlsMode.OPPORTUNISTIC)
    mx.says(GREETING)
    assert mx.says(HELLO) == DONE


def test_required_fails_when_starttls_is_not_offered():
    mx = Receiver(TlsMode.REQUIRED)
    mx.says(GREETING)
    error = mx.fails(HELLO)
    assert (error.step, error.smtp_reply) == (Step.STARTTLS, None)
    assert try_next_destination(error)


@pytest.mark.parametrize("mode", [TlsMode.NONE, TlsMode.OPPORTUNISTIC])
@pytest.mark.parametrize("refusal", [b"500 what?\r\n", b"502 Command not implemented\r\n"])
def test_a_server_without_ehlo_gets_helo(mode, refusal):
    mx = Receiver(mode)
    mx.says(GREETING)
    assert mx.says(refusal) == HELO
    assert mx.says(b"250 mx.example.net\r\n") == DONE
    assert mx.dialogue.capabilities == {}


def test_no_helo_where_tls_is_required_or_ehlo_was_known_before():
    mx = Receiver(TlsMode.REQUIRED)
    mx.says(GREETING)
    assert mx.fails(b"502 no\r\n").step is Step.EHLO
    mx = Receiver(TlsMode.OPPORTUNISTIC)
    mx.says(GREETING)
    mx.says(HELLO_TLS)
    mx.says(b"220 Go\r\n")
    mx.action = mx.dialogue.tls_started()
    assert mx.fails(b"502 no\r\n").step is Step.EHLO
    mx = Receiver(TlsMode.NONE)
    mx.says(GREETING)
    mx.says(b"502 no\r\n")
    assert mx.fails(b"502 no\r\n").step is Step.EHLO


# (bytes of each step, step of the failure, reply told, whether another destination may do better)
FAILURES = [
    ([b"421 4.3.2 try later\r\n"], Step.GREETING, "421 4.3.2 try later", True),
    ([b"450 4.7.1 greylisted\r\n"], Step.GREETING, "450 4.7.1 greylisted", True),
    ([b"554-no\r\n554 5.7.1 not from you\r\n"], Step.GREETING, "554 no\n5.7.1 not from you", False),
    ([b"250 odd greeting\r\n"], Step.GREETING, "250 odd greeting", True),
    ([b"HTTP/1.1 400 Bad Request\r\n"], Step.GREETING, None, True),
    ([GREETING + b"220 again\r\n"], Step.GREETING, None, True),
    ([b"554 no\r\n421 bye\r\n"], Step.GREETING, "554 no", False),
    ([GREETING, b"421 bye\r\n"], Step.EHLO, "421 bye", True),
    ([GREETING, b"550 5.7.1 bad name\r\n"], Step.EHLO, "550 5.7.1 bad name", False),
    ([GREETING, b"220 late second greeting\r\n"], Step.EHLO, "220 late second greeting", True),
    ([GREETING, HELLO + b"250 again\r\n"], Step.EHLO, None, True),
    ([GREETING, b"250-a\r\n220 b\r\n"], Step.EHLO, None, True),
    ([GREETING, HELLO_TLS, b"421 bye\r\n"], Step.STARTTLS, "421 bye", True),
    ([GREETING, HELLO_TLS, b"250 odd\r\n"], Step.STARTTLS, "250 odd", True),
    # RFC 3207 with the 2011 injection (CVE-2011-0411): plaintext right behind the 220.
    ([GREETING, HELLO_TLS, b"220 Go\r\n250-mx\r\n250 AUTH PLAIN\r\n"], Step.STARTTLS, None, True),
    ([GREETING, HELLO_TLS, b"220 Go\r\n\x16"], Step.STARTTLS, None, True),
    ([GREETING, HELLO_TLS, b"454 no\r\n250 x\r\n"], Step.STARTTLS, "454 no", True),
]


@pytest.mark.parametrize(("script", "step", "reply", "elsewhere"), FAILURES)
def test_each_failure_names_its_step_and_reply(script, step, reply, elsewhere):
    mx = Receiver(TlsMode.OPPORTUNISTIC)
    for wire in script[:-1]:
        mx.says(wire)
    error = mx.fails(script[-1])
    assert (error.step, error.smtp_reply, error.errno) == (step, reply, 0)
    assert try_next_destination(error) is elsewhere


def test_required_reports_a_refused_starttls():
    mx = Receiver(TlsMode.REQUIRED)
    mx.says(GREETING)
    mx.says(HELLO_TLS)
    error = mx.fails(b"454 4.7.0 later\r\n")
    assert (error.step, error.smtp_reply) == (Step.STARTTLS, "454 4.7.0 later")


def test_a_close_is_reported_with_the_step_that_waited():
    mx = Receiver(TlsMode.NONE)
    assert mx.dialogue.eof().step is Step.GREETING
    mx.says(GREETING)
    assert mx.dialogue.eof().step is Step.EHLO


@pytest.mark.parametrize("name", ["", "a b", "a\r\nRCPT TO:<x@y>", "mta\0", "bücher.example", "x" * 256])
def test_an_ehlo_name_that_could_be_a_command_is_the_clients_mistake(name):
    with pytest.raises(PeerError):
        ClientDialogue(name, TlsMode.NONE, "peer")


@settings(max_examples=150)
@given(st.sampled_from(list(TlsMode)), st.lists(st.binary(max_size=40) | st.sampled_from([GREETING, HELLO, HELLO_TLS])))
def test_no_receiver_can_cause_anything_but_an_upstream_error(mode, script):
    dialogue = ClientDialogue("mta.example.org", mode, "peer")
    action = dialogue.begin()
    for data in script:
        if action.then is Then.DONE:
            assert dialogue.hello is not None
            assert dialogue.encrypted or mode in (TlsMode.NONE, TlsMode.OPPORTUNISTIC)
            return
        try:
            action = dialogue.tls_started() if action.then is Then.START_TLS else dialogue.receive(data)
        except UpstreamError:
            return


# RFC 9422 4.1: MAILMAX has one to six digits, the first not 0; names are not case sensitive, unknown ones ignored.
@pytest.mark.parametrize(
    ("parameters", "limit"),
    [
        ("MAILMAX=5", 5),
        ("RCPTMAX=20 mailmax=999999 RCPTDOMAINMAX=1", 999999),
        ("MAILMAX=0", None),
        ("MAILMAX=05", None),
        ("MAILMAX=1000000", None),
        ("MAILMAX=", None),
        ("MAILMAX", None),
        ("MAILMAX=-1", None),
        ("MAILMAX=\u0665", None),
        ("XMAILMAX=5", None),
        ("", None),
    ],
)
def test_mailmax(parameters, limit):
    assert mailmax(parse_capabilities(Reply(250, ("mx", f"LIMITS {parameters}")))) == limit


def test_no_limits_announced():
    assert mailmax({}) is None


@pytest.mark.parametrize("size", [100, 1])
@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (b"250 OK\r\n", None),
        (b"250-a\r\n250 b\r\n", None),
        (b"250 OK\r\n250 OK\r\n", Discard.UNREAD),
        (b"250 OK\r\n2", Discard.UNREAD),
        (b"421 bye\r\n", Discard.SAID_421),
        (b"354 go\r\n", Discard.RSET_REFUSED),
        (b"251 OK\r\n", Discard.RSET_REFUSED),
        (b"500 what\r\n", Discard.RSET_REFUSED),
        (b"250 OK\n", Discard.PROTOCOL_ERROR),
        (b"OK\r\n", Discard.PROTOCOL_ERROR),
    ],
)
def test_rset_is_clean_only_with_exactly_one_250(wire, reason, size):
    rset = Rset()
    clean = [rset.receive(piece) for piece in pieces(wire, size)]
    assert rset.reason is reason
    assert clean[-1] is (reason is None)
    assert not rset.receive(b"250 more\r\n")


def test_rset_waits_for_the_whole_reply():
    rset = Rset()
    assert (rset.command, rset.receive(b"250-a\r\n"), rset.receive(b"250 b\r")) == (b"RSET\r\n", False, False)
    assert rset.receive(b"\n")
    assert rset.reason is None


@pytest.mark.parametrize("wire", [b"221 bye\r\n", b"500 what\r\n", b"garbage\r\n"])
def test_quit_waits_for_one_reply_whatever_it_is(wire):
    farewell = Quit()
    assert farewell.command == b"QUIT\r\n"
    assert [farewell.receive(piece) for piece in pieces(wire, 1)] == [False] * (len(wire) - 1) + [True]
