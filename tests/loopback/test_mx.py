"""The misbehaving server itself, seen by `smtplib` and by plain sockets: a test tool that lies would hide mistakes."""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
import threading

import pytest

from tests.certificates import NAME, authority
from tests.mx import Mx, close, flood, garbage, half_close, late, mute, reset, say, stall, trickle, twice, usual
from tests.waiting import wait_for

BODY = b".dot first\r\nbare\nand\rodd\r\n..\r\nlast"


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context


def dial(mx: Mx, source: str = "127.0.0.9") -> socket.socket:
    sock = socket.create_connection(mx.endpoint, timeout=30, source_address=(source, 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while piece := sock.recv(65536):
        data += piece
    return data


def read_until(sock: socket.socket, mark: bytes) -> bytes:
    data = b""
    while not data.endswith(mark):
        piece = sock.recv(65536)
        assert piece, f"closed after {data!r}"
        data += piece
    return data


def test_a_message_is_recorded_byte_for_byte_with_its_sender():
    with Mx() as mx, dial(mx) as sock:
        read_until(sock, b"\n")
        sock.sendall(b"EHLO me\r\n")
        assert b"STARTTLS" not in read_until(sock, b"SMTPUTF8\r\n")
        sock.sendall(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nRCPT TO:<e@f>\r\nDATA\r\n")
        read_until(sock, b"<CR><LF>.<CR><LF>\r\n")
        sock.sendall(b".")
        for piece in (BODY[:3], BODY[3:] + b"\r\n.", b"\r\nQUIT\r\n"):
            sock.sendall(piece)
        assert read_all(sock) == b"250 2.0.0 queued as 0\r\n221 2.0.0 bye\r\n"
        wait_for(lambda: mx.sessions[0].ended)
    message = mx.messages[0]
    assert message.wire == b"." + BODY
    assert message.content == b".dot first\r\nbare\nand\rodd\r\n.\r\nlast\r\n"
    assert (message.peer[0], message.session, message.accepted, message.encrypted) == ("127.0.0.9", 0, True, False)
    assert (message.mail, message.rcpts) == (b"MAIL FROM:<a@b>", (b"RCPT TO:<c@d>", b"RCPT TO:<e@f>"))
    assert mx.sessions[0].commands[0] == b"EHLO me"
    assert (mx.connects, mx.handshakes, mx.running, mx.sessions[0].ended) == (1, 0, 0, "quit")


def test_an_empty_message():
    with Mx() as mx, dial(mx) as sock:
        sock.sendall(b"MAIL FROM:<>\r\nRCPT TO:<c@d>\r\nDATA\r\n.\r\nQUIT\r\n")
        read_all(sock)
    assert mx.messages[0].wire == b""


@pytest.mark.parametrize("implicit", [False, True])
def test_tls(implicit):
    with Mx(starttls=True, implicit_tls=implicit) as mx:
        if implicit:
            with client_context().wrap_socket(dial(mx), server_hostname=NAME) as sock:
                assert read_until(sock, b"\n").startswith(b"220 ")
        else:
            with smtplib.SMTP(*mx.endpoint, timeout=30) as client:
                client.ehlo()
                client.starttls(context=client_context())
                client.ehlo()
                assert not client.has_extn("starttls")
                client.sendmail("a@b", ["c@d"], b"hello\r\n")
        wait_for(lambda: mx.sessions[0].ended)
        assert mx.handshakes == 1
        assert mx.sessions[0].server_name == (NAME if implicit else None)  # an address is not sent as SNI
        assert all(message.encrypted for message in mx.messages)


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        ("expired", "expired"),
        ("wrong_name", "match"),
        ("unknown_ca", "local issuer"),
        ("self_signed", "self-signed|self signed"),
    ],
)
def test_bad_certificates_are_bad_in_their_own_way(certificate, words):
    with Mx(implicit_tls=True, certificate=certificate) as mx, dial(mx) as raw:
        with pytest.raises(ssl.SSLCertVerificationError, match=words):
            client_context().wrap_socket(raw, server_hostname=NAME)
        wait_for(lambda: mx.sessions[0].ended)
        assert mx.handshakes == 0


# (script, what is sent after the greeting, everything that is received)
SAID = [
    ({"greeting": say(b"421 no\r\n", close)}, b"", b"421 no\r\n"),
    ({"noop": twice}, b"NOOP\r\nQUIT\r\n", b"250 2.0.0 ok\r\n250 2.0.0 ok\r\n221 2.0.0 bye\r\n"),
    ({"noop": trickle}, b"NOOP\r\nQUIT\r\n", b"250 2.0.0 ok\r\n221 2.0.0 bye\r\n"),
    ({"noop": [usual, mute]}, b"NOOP\r\nNOOP\r\nQUIT\r\n", b"250 2.0.0 ok\r\n221 2.0.0 bye\r\n"),
    ({"noop": close}, b"NOOP\r\n", b""),
    ({"noop": garbage}, b"NOOP\r\nQUIT\r\n", b"\x00\xff\xfe\x1b[31mgarbage\x07\r\n221 2.0.0 bye\r\n"),
    ({}, b"XYZZY\r\nDATA\r\nQUIT\r\n", b"502 5.5.2 not recognised\r\n503 5.5.1 no recipient\r\n221 2.0.0 bye\r\n"),
    ({"starttls": say(b"220 go\r\n250 INJECTED\r\n"), "tls": close}, b"STARTTLS\r\n", b"220 go\r\n250 INJECTED\r\n"),
    ({"data": say(b"451 later\r\n")}, b"DATA\r\nQUIT\r\n", b"451 later\r\n221 2.0.0 bye\r\n"),
    ({"quit": say(b"421 what\r\n", close)}, b"QUIT\r\n", b"421 what\r\n"),
]


@pytest.mark.parametrize(("script", "sent", "received"), SAID)
def test_a_script_is_followed(script, sent, received):
    with Mx(script, starttls=True) as mx, dial(mx) as sock:
        sock.sendall(sent)
        greeting = b"" if "greeting" in script else b"220 mx.example.net ESMTP\r\n"
        assert read_all(sock) == greeting + received


def test_a_script_by_session_number():
    with Mx(lambda number: {"greeting": say(b"421 %d\r\n" % number, close)}) as mx:
        for number in range(2):
            with dial(mx) as sock:
                assert read_all(sock) == b"421 %d\r\n" % number


@pytest.mark.parametrize("step", ["noop", "body"])
def test_reset(step):
    with Mx({step: reset}) as mx, dial(mx) as sock:
        sock.sendall(b"MAIL FROM:<>\r\nRCPT TO:<c@d>\r\nDATA\r\nhalf a line" if step == "body" else b"NOOP\r\n")
        with pytest.raises(ConnectionResetError):
            read_all(sock)
        wait_for(lambda: mx.sessions[0].ended == "reset")
        assert mx.messages == []


def test_a_half_close_goes_on_reading():
    with Mx({"noop": half_close}) as mx, dial(mx) as sock:
        sock.sendall(b"NOOP\r\n")
        read_all(sock)
        sock.sendall(b"still there?\r\n")
        sock.shutdown(socket.SHUT_WR)
        wait_for(lambda: mx.sessions[0].ended)
        assert mx.sessions[0].rest == b"still there?\r\n"


def test_a_late_reply_and_words_out_of_turn():
    gate = threading.Event()
    with Mx({"noop": late(gate)}) as mx, dial(mx) as sock:
        read_until(sock, b"\n")
        sock.sendall(b"NOOP\r\n")
        wait_for(lambda: mx.sessions[0].commands)
        gate.set()
        assert read_until(sock, b"\n") == b"250 2.0.0 ok\r\n"
        mx.sessions[0].act(say(b"421 idle\r\n", close))
        assert read_all(sock) == b"421 idle\r\n"


def test_out_of_turn_inside_tls():
    with Mx(implicit_tls=True) as mx, dial(mx) as raw:
        sock = client_context().wrap_socket(raw, server_hostname=NAME)
        read_until(sock, b"\n")
        mx.sessions[0].act(say(b"421 idle\r\n", close))
        assert read_until(sock, b"\n") == b"421 idle\r\n"
        sock.close()


def test_an_idle_session_is_told_and_closed():
    with Mx(idle_timeout=0.01) as mx, dial(mx) as sock:
        assert read_all(sock).endswith(b"421 4.4.2 idle too long\r\n")


@pytest.mark.parametrize("implicit_tls", [False, True])
@pytest.mark.parametrize("script", [{"noop": stall}, {"noop": flood}, {"greeting": stall}, {}])
def test_leaving_ends_what_hangs(script, implicit_tls):
    with contextlib.ExitStack() as stack:
        with Mx(script, implicit_tls=implicit_tls) as mx:
            sock = stack.enter_context(dial(mx))
            if not implicit_tls:  # else the handshake never comes
                sock.sendall(b"NOOP\r\n")
            wait_for(lambda: mx.sessions)
        assert mx.running == 0
        assert mx.sessions[0].ended in ("stopped", "closed", "eof")
