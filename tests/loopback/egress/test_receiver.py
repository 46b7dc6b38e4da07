"""The SMTP rooms on real sockets: bring-up in every TLS mode, RSET, QUIT, and `smtplib` watched by the tracker."""

from __future__ import annotations

import smtplib
import socket
import ssl

import pytest

from proxy.errors import Step, UpstreamError
from proxy.model import Discard, TlsMode
from proxy.protocols.smtp.dialogue import ClientDialogue, Quit, Rset, Then, mailmax
from proxy.protocols.smtp.tracker import Tracker
from tests.certificates import NAME, authority
from tests.mx import EXTENSIONS, Mx, close, garbage, say, trickle, twice


def bring_up(mx: Mx, mode: TlsMode) -> tuple[ClientDialogue, socket.socket]:
    """What `receiver` does, with blocking sockets."""
    sock = socket.create_connection(mx.endpoint, timeout=30)
    try:
        dialogue = ClientDialogue("mta.example.org", mode, "mx")
        action = dialogue.begin()
        while action.then is not Then.DONE:
            sock.sendall(action.send)
            if action.then is Then.START_TLS:
                context = ssl.create_default_context()
                authority().configure_trust(context)
                sock = context.wrap_socket(sock, server_hostname=NAME)
                action = dialogue.tls_started()
            elif data := sock.recv(65536):
                action = dialogue.receive(data)
            else:
                raise dialogue.eof()
    except BaseException:
        sock.close()
        raise
    return dialogue, sock


@pytest.mark.parametrize("script", [{}, {"greeting": trickle, "ehlo": trickle, "starttls": trickle}])
@pytest.mark.parametrize("mode", list(TlsMode))
def test_bring_up_rset_and_quit(mode, script):
    extensions = (*EXTENSIONS, "LIMITS MAILMAX=7")
    with Mx(script, starttls=True, implicit_tls=mode is TlsMode.IMPLICIT, extensions=extensions) as mx:
        dialogue, sock = bring_up(mx, mode)
        with sock:
            assert dialogue.encrypted is (mode is not TlsMode.NONE)
            assert mx.handshakes == dialogue.encrypted
            assert mailmax(dialogue.capabilities) == 7
            for last in (Rset(), Quit()):
                sock.sendall(last.command)
                assert last.receive(sock.recv(65536))
        hellos = 2 if mode in (TlsMode.OPPORTUNISTIC, TlsMode.REQUIRED) else 1
        assert mx.sessions[0].commands.count(b"EHLO mta.example.org") == hellos


@pytest.mark.parametrize(
    ("script", "step", "reply"),
    [
        ({"greeting": close}, Step.GREETING, None),
        ({"greeting": garbage}, Step.GREETING, None),
        ({"greeting": twice}, Step.GREETING, None),
        ({"greeting": say(b"554 no\r\n", close)}, Step.GREETING, "554 no"),
        ({"ehlo": say(b"421 bye\r\n", close)}, Step.EHLO, "421 bye"),
        ({"starttls": say(b"454 later\r\n")}, Step.STARTTLS, "454 later"),
        ({"starttls": say(b"220 go\r\n250 INJECTED\r\n")}, Step.STARTTLS, None),
        ({"starttls": close}, Step.STARTTLS, None),
        ({"ehlo": [say(b"250-a\r\n250 STARTTLS\r\n"), close]}, Step.EHLO, None),
    ],
)
def test_a_failure_is_reported_with_its_step(script, step, reply):
    with Mx(script, starttls=True) as mx:
        with pytest.raises(UpstreamError) as caught:
            bring_up(mx, TlsMode.REQUIRED)
        assert (caught.value.step, caught.value.smtp_reply) == (step, reply)


class WatchedFile:
    """The file that `smtplib` reads replies from, with a tracker in front."""

    def __init__(self, file, tracker):
        self.file, self.tracker = file, tracker

    def readline(self, limit=-1):
        line = self.file.readline(limit)
        self.tracker.server_bytes(line)
        return line

    def close(self):
        self.file.close()


class WatchedSMTP(smtplib.SMTP):
    """`smtplib`, watched from behind its EHLO."""

    def __init__(self, mx: Mx) -> None:
        super().__init__(timeout=10)
        self.tracker = Tracker()
        self.watched = False
        self.connect(*mx.endpoint)
        self.ehlo()
        self.file = WatchedFile(self.file or self.sock.makefile("rb"), self.tracker)
        self.watched = True

    def send(self, data):
        if self.watched:
            self.tracker.client_bytes(data.encode("ascii") if isinstance(data, str) else data)
        super().send(data)


BODY = b".stuffed\r\n.\r\n" + b"A line of text.\r\n" * 3000


def test_messages_of_a_real_client_leave_the_connection_clean():
    with Mx({"dot": [say(b"451 later\r\n")], "rcpt": [say(b"550 who?\r\n")]}) as mx, WatchedSMTP(mx) as client:
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            client.sendmail("a@b", ["c@d"], BODY)
        assert client.tracker.verdict() is None
        with pytest.raises(smtplib.SMTPDataError):
            client.sendmail("a@b", ["c@d"], BODY)
        client.sendmail("a@b", ["c@d", "e@f"], BODY)
        assert (client.tracker.verdict(), client.tracker.mails, client.tracker.accepted) == (None, 3, 1)
        client.quit()
        assert client.tracker.verdict() is Discard.QUIT
    assert [message.content for message in mx.messages] == [BODY, BODY]
    assert [message.accepted for message in mx.messages] == [False, True]


@pytest.mark.parametrize(
    ("step", "behaviour", "reason"),
    [
        ("mail", say(b"421 bye\r\n", close), Discard.SAID_421),
        ("dot", say(b"421 bye\r\n", close), Discard.SAID_421),
        ("rcpt", close, Discard.OUTSTANDING),
        ("data", garbage, Discard.PROTOCOL_ERROR),
        ("data", say(b"250 go?\r\n"), Discard.PROTOCOL_ERROR),
    ],
)
def test_what_a_real_receiver_breaks_is_not_kept(step, behaviour, reason):
    with Mx({step: behaviour}) as mx, WatchedSMTP(mx) as client:
        with pytest.raises(smtplib.SMTPException):
            client.sendmail("a@b", ["c@d"], BODY)
        assert client.tracker.verdict() is reason
        client.close()
