"""The client library against a proxy that is played by threads."""

from __future__ import annotations

import smtplib
import socket
import struct
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from greenarrow_proxy_client import ProxyRefused, ProxyRejected, ProxyUnavailable, Session
from greenarrow_proxy_client import control as control_module
from greenarrow_proxy_client.channel import Channel, State
from greenarrow_proxy_client.link import Link
from proxy.errors import Draining, NameInUse, Step
from proxy.protocols.native import frames as native
from proxy.protocols.native import messages as m
from proxy.protocols.native import session_messages as s
from tests.loopback.client.fake_proxy import DESTINATION, INCARNATION, SECRET, Dead, FakeProxy, Receiver, opened
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[3]
MAIL = b"Subject: hello\r\n\r\nHello\r\n"
EOF = native.encode(m.Eof())
PROBE = native.encode(m.Probe())
RESET = native.encode(m.Aborted("upstream_failed", 104, "connection reset by peer"))
CHANNEL = m.Kind.CHANNEL


@pytest.fixture(params=[True, False], ids=["tls", "no-tls"])
def proxy(request):
    with FakeProxy(tls=request.param) as fake:
        yield fake


@pytest.fixture
def tls_proxy():
    with FakeProxy() as fake:
        yield fake


def session_of(proxy: FakeProxy, **options: object) -> Session:
    return Session(proxy.address, SECRET, "server-a", tls=proxy.context is not None, **options)


@pytest.fixture
def session(proxy):
    with session_of(proxy) as it:
        yield it


def control_of(session: Session) -> control_module.Control:
    return session._proxies.all[0].control


def idle(session: Session) -> list[Channel]:
    return session._proxies.all[0].channels._idle


def ready(session: Session, proxy: FakeProxy) -> None:
    """The session is up and has heard of the certificate."""
    assert session.wait_until_up(30)
    wait_for(lambda: control_of(session).one_flight(proxy.certificate) or proxy.context is None)


def send_one(session: Session, **options: object) -> smtplib.SMTP:
    smtp = session.smtp([DESTINATION], "mta.example.com", **options)
    assert smtp.sendmail("a@example.com", ["b@example.net"], MAIL) == {}
    return smtp


# --- SMTP sessions ---


def test_mail_through_the_proxy(proxy, session):
    receiver = Receiver()
    proxy.receivers.append(receiver)
    smtp = session.smtp(
        [DESTINATION, ("2001:db8::25", 25)],
        "mta.example.com",
        source_ip="192.0.2.1",
        tls="required",
        tls_server_name="mx.example.net",
        tls_verify=True,
        tenant="t",
        deadline=20,
    )
    assert smtp.opened.greeting == b"220 mx.example.net ESMTP"
    assert smtp.has_extn("size")
    assert smtp.esmtp_features == {"size": "1000000", "8bitmime": "", "auth": " PLAIN"}
    assert smtp.sendmail("a@example.com", ["b@example.net"], MAIL) == {}
    assert smtp.release(wait=True) == "kept"
    assert receiver.messages == [MAIL]
    assert receiver.lines[0] == b"mail FROM:<a@example.com> size=25"
    assert proxy.opens == [
        m.Open(
            "192.0.2.1",
            [m.Address(*DESTINATION), m.Address("2001:db8::25", 25)],
            "mta.example.com",
            m.TlsMode.REQUIRED,
            "mx.example.net",
            True,
            True,
            [],
            20_000,
            tenant="t",
            probes=True,
        )
    ]
    assert proxy.ends == [m.End(True, 1)]


def test_release_offers_and_close_and_quit_do_not(proxy, session):
    send_one(session).release(wait=True)
    send_one(session).close()
    send_one(session).quit()
    wait_for(lambda: len(proxy.ends) == 3)
    assert proxy.ends == [m.End(True, 1), m.End(False, 0), m.End(False, 1, True)]


def test_quit_is_left_to_the_proxy(proxy, session):
    """Nothing of it goes to the receiver here, nor is anything waited for; a second time there is nothing to leave."""
    receiver = Receiver()
    proxy.receivers.append(receiver)
    smtp = send_one(session)
    assert smtp.quit()[0] == 221
    wait_for(lambda: proxy.ends == [m.End(False, 1, True)])
    assert b"QUIT" not in [line.upper() for line in receiver.lines]
    with pytest.raises(smtplib.SMTPServerDisconnected):
        smtp.quit()


def test_context_manager_releases_on_success_only(proxy, session):
    with session.smtp([DESTINATION], "mta.example.com") as smtp:
        smtp.sendmail("a@example.com", ["b@example.net"], MAIL)
    with pytest.raises(ZeroDivisionError), session.smtp([DESTINATION], "mta.example.com"):
        raise ZeroDivisionError
    with session.smtp([DESTINATION], "mta.example.com", reuse=False):
        pass
    wait_for(lambda: len(proxy.ends) == 3)
    assert proxy.ends == [m.End(True, 1), m.End(False, 0), m.End(False, 0, True)]


def test_a_released_connection_is_of_no_more_use(proxy, session):
    smtp = send_one(session)
    smtp.release()
    with pytest.raises(smtplib.SMTPServerDisconnected):
        smtp.noop()
    smtp.close()
    assert smtp.release() == ""
    assert len(proxy.ends) <= 1


def test_what_would_go_past_the_proxy_is_not_there(session):
    smtp = session.smtp([DESTINATION], "mta.example.com")
    with pytest.raises(smtplib.SMTPNotSupportedError):
        smtp.connect("mx.example.net")
    with pytest.raises(smtplib.SMTPNotSupportedError):
        smtp.starttls()
    smtp.close()


def test_a_large_message(proxy, session):
    receiver = Receiver()
    proxy.receivers.append(receiver)
    body = b"Subject: large\r\n\r\n" + b"0123456789abcdef" * 4 * 1024 * 8 + b"\r\n"
    assert len(body) > 3 * native.MAX_PAYLOAD
    smtp = session.smtp([DESTINATION], "mta.example.com")
    smtp.sendmail("a@example.com", ["b@example.net"], body)
    smtp.close()
    assert receiver.messages == [body]


def test_a_receiver_that_says_no(proxy, session):
    proxy.receivers.append(Receiver({"RCPT": native.encode_data(b"550 5.1.1 no such user\r\n")}))
    smtp = session.smtp([DESTINATION], "mta.example.com")
    with pytest.raises(smtplib.SMTPRecipientsRefused):
        smtp.sendmail("a@example.com", ["b@example.net"], MAIL)
    assert smtp.release(wait=True) == "kept"
    assert proxy.ends == [m.End(True, 0)]


# --- raw connections ---


def test_raw_connection(proxy, session):
    with session.connect([DESTINATION], source_ip="192.0.2.1") as stream:
        assert stream.getpeername() == DESTINATION
        assert stream.getsockname() == ("192.0.2.1", 40112)
        stream.sendall(b"NOOP\r\nNOOP\r\n")
        assert stream.recv(3) == b"250"
        buffer = bytearray(5)
        assert stream.recv_into(buffer) == 5
        assert bytes(buffer) == b" ok\r\n"
        with stream.makefile("rb") as file:
            assert file.readline() == b"250 ok\r\n"
        stream.shutdown(socket.SHUT_WR)
        assert stream.recv(1) == b""
        assert stream.recv(1) == b""
    assert proxy.opens[0].ehlo_name is None
    assert proxy.opens[0].tls is m.TlsMode.NONE
    with pytest.raises(OSError, match="closed"):
        stream.sendall(b"x")


def test_a_reset_is_told_with_its_number(proxy, session):
    proxy.receivers.append(Receiver({"NOOP": RESET}))
    stream = session.connect([DESTINATION])
    stream.sendall(b"NOOP\r\n")
    for _ in range(2):
        with pytest.raises(ConnectionResetError, match="connection reset by peer") as caught:
            stream.recv(1)
        assert caught.value.errno == 104
    stream.close()
    session.connect([DESTINATION]).close()
    assert len(proxy.channels) == 1, "the channel outlives it"


def test_probes_say_nothing(proxy, session):
    proxy.receivers.append(Receiver({"NOOP": PROBE + native.encode_data(b"250 ") + PROBE * 2}))
    stream = session.connect([DESTINATION])
    stream.sendall(b"NOOP\r\nRSET\r\n")
    assert stream.recv(4) == b"250 "
    assert stream.recv(8) == b"250 ok\r\n"
    proxy.channels[0].send(PROBE)
    assert stream.release(wait=True) == "kept"
    session.connect([DESTINATION]).close()
    assert len(proxy.channels) == 1


def test_probes_give_the_proxy_no_more_time(proxy, session):
    proxy.receivers.append(Receiver({"NOOP": b""}))
    stream = session.connect([DESTINATION], timeout=0.1)
    stream.sendall(b"NOOP\r\n")
    over, probes = threading.Event(), []

    def probe():
        while len(probes) < 2000 and not over.wait(0.005):
            probes.append(1)
            proxy.channels[0].send(PROBE)

    thread = threading.Thread(target=probe)
    thread.start()
    with pytest.raises(TimeoutError):
        stream.recv(1)
    over.set()
    thread.join(30)
    assert 0 < len(probes) < 2000
    stream.close()


def test_a_time_out_leaves_the_channel_whole(proxy, session):
    proxy.receivers.append(Receiver({"NOOP": b""}))
    stream = session.connect([DESTINATION], timeout=0.01)
    stream.sendall(b"NOOP\r\n")
    with pytest.raises(TimeoutError):
        stream.recv(1)
    stream.settimeout(30)
    assert stream.gettimeout() == 30
    stream.sendall(b"RSET\r\n")
    assert stream.recv(3) == b"250"
    stream.close()


def test_one_thread_reads_while_another_writes(proxy, session):
    lines = 3000
    stream = session.connect([DESTINATION])
    writer = threading.Thread(target=lambda: [stream.sendall(b"NOOP\r\n" * 10) for _ in range(lines // 10)])
    writer.start()
    got = b""
    while len(got) < lines * 8:
        got += stream.recv(65536)
    writer.join()
    assert got == b"250 ok\r\n" * lines
    stream.close()


# --- channels ---


def test_an_idle_channel_is_used_again(proxy, session):
    for _ in range(3):
        send_one(session).release()
    assert len(proxy.channels) == 1
    assert len(proxy.opens) == 3


def test_concurrent_sessions_have_a_channel_each(proxy, session):
    one, two = send_one(session), send_one(session)
    assert len(proxy.channels) == 2
    two.release()
    one.release()
    send_one(session).close()
    assert len(proxy.channels) == 2


def test_what_comes_late_does_not_reach_the_next_session(proxy, session):
    """Bytes, EOF and ABORTED that cross END belong to the session that is over."""
    late = native.encode_data(b"421 bye\r\n") + EOF + RESET
    proxy.receivers.append(Receiver({"NOOP": late}))
    stream = session.connect([DESTINATION])
    stream.sendall(b"NOOP\r\n")
    stream.close()
    stream = session.connect([DESTINATION])
    stream.sendall(b"NOOP\r\n")
    assert stream.recv(100) == b"250 ok\r\n"
    assert len(proxy.channels) == 1
    stream.close()


def test_a_channel_that_died_while_idle_is_replaced(proxy, session):
    send_one(session).release(wait=True)
    for channel in proxy.channels:
        channel.close()
    send_one(session).release()
    assert len(proxy.channels) == 2


def test_a_channel_that_was_told_to_go_away_is_not_used_again(proxy, session):
    proxy.answers.append(lambda request: native.encode(m.Goaway(60_000, "drain")) + native.encode(opened()))
    stream = session.connect([DESTINATION])
    stream.close()
    session.connect([DESTINATION]).close()
    assert len(proxy.channels) == 2


def test_surplus_channels_are_closed_after_their_end_has_arrived(proxy):
    with session_of(proxy, max_idle_channels=1) as session:
        streams = [session.connect([DESTINATION]) for _ in range(3)]
        for stream in streams:
            stream.release()
        wait_for(lambda: len(proxy.ends) == 3)
        assert len(idle(session)) == 1


def test_a_channel_is_not_closed_before_its_end_has_arrived(proxy, monkeypatch):
    """A close with unread bytes is a reset, and a reset may overtake END."""
    states = []
    close = Channel.close
    monkeypatch.setattr(Channel, "close", lambda channel: [states.append(channel.state), close(channel)])
    with session_of(proxy, max_idle_channels=0) as session:
        session.connect([DESTINATION]).release()
    with session_of(proxy) as session:
        session.connect([DESTINATION]).release()
    assert states == [State.IDLE, State.IDLE]


def test_old_idle_channels_are_closed(proxy, session):
    one, two = session.connect([DESTINATION]), session.connect([DESTINATION])
    one.close()
    idle(session)[0].used_at -= 301
    two.close()
    assert len(idle(session)) == 1


def test_no_proxy():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = nobody.getsockname()
    with Session(address, SECRET, "server-a") as session:
        with pytest.raises(ProxyUnavailable, match=r"proxy 127\.0\.0\.1:\d+: .*refused") as caught:
            session.connect([DESTINATION])
        assert caught.value.retry
        assert caught.value.errno == 111


def test_a_proxy_that_closes_instead_of_answering(proxy, session):
    proxy.answers.append(lambda request: None)
    with pytest.raises(ProxyUnavailable, match="closed the channel"):
        session.connect([DESTINATION])


def test_a_proxy_that_does_not_answer(proxy, session, monkeypatch):
    monkeypatch.setattr("greenarrow_proxy_client.channel._GRACE", 0.0)
    proxy.answers.append(lambda request: b"")
    with pytest.raises(ProxyUnavailable, match="timed out"):
        session.connect([DESTINATION], deadline=0.05)
    assert idle(session) == []


@pytest.mark.parametrize(
    "nonsense",
    [
        native.encode_data(b"x"),
        native.encode(m.Ended(False, "not_offered")),
        native.encode(s.Ping(1, 1)),
        struct.pack(">IB", 70_000, 0x11),
        native.frame_bytes(0x11, b"\xc1"),
    ],
)
def test_a_proxy_that_breaks_the_protocol(proxy, session, nonsense):
    proxy.answers.append(lambda request: nonsense)
    with pytest.raises(ProxyUnavailable):
        session.connect([DESTINATION])
    session.connect([DESTINATION]).close()
    assert len(proxy.channels) == 2


# --- refusals ---


def test_a_refusal_says_everything(proxy, session):
    address = m.Address(*DESTINATION)
    proxy.answers.append(
        m.Failed(
            Step.GREETING,
            "upstream_failed",
            "greeting 421",
            smtp_reply=b"421 4.3.2 busy",
            retry=True,
            retry_after_ms=2500,
            attempts=[
                m.Attempt(address, Step.CONNECT, 111, None, "connection refused"),
                m.Attempt(address, Step.GREETING, 0, b"421 4.3.2 busy", "greeting 421"),
            ],
        )
    )
    with pytest.raises(ProxyRefused, match="greeting 421") as caught:
        session.smtp([DESTINATION], "mta.example.com")
    error = caught.value
    assert (error.step, error.code, error.retry, error.retry_after) == ("greeting", "upstream_failed", True, 2.5)
    assert (error.errno, error.smtp_code, error.smtp_reply) == (0, 421, b"421 4.3.2 busy")
    assert error.attempts == [
        (DESTINATION, "connect", 111, b"", "connection refused", ""),
        (DESTINATION, "greeting", 0, b"421 4.3.2 busy", "greeting 421", ""),
    ]
    assert isinstance(error, OSError)
    proxy.answers.append(m.Failed(None, "destination_not_allowed", "10.0.0.1 is private"))
    with pytest.raises(ProxyRefused) as caught:
        session.connect([DESTINATION])
    assert (caught.value.step, caught.value.retry, caught.value.throttle) == (None, False, None)
    session.connect([DESTINATION]).close()
    assert len(proxy.channels) == 1, "a refusal leaves the channel in order"


@pytest.mark.parametrize("destination", [("mx.example.net", 25), ("198.51.100.7", 0), ("198.51.100.7", 70000)])
def test_only_addresses(session, destination):
    with pytest.raises(ValueError, match=r"."):
        session.connect([destination])


@pytest.mark.parametrize(
    ("ehlo_name", "options"),
    [("a b", {}), ("a\n", {}), ("", {}), ("x", {"tls": "always"}), ("x", {"deadline": 0}), ("x", {"source_ip": "me"})],
)
def test_values_that_the_protocol_does_not_allow_are_found_here(proxy, session, ehlo_name, options):
    with pytest.raises(ValueError, match=r"."):
        session.smtp([DESTINATION], ehlo_name, **options)
    assert proxy.opens == []


@pytest.mark.parametrize("name", ["", "n" * 65, "a\n", "\x7f"])
def test_instance_names(name):
    with pytest.raises(ValueError, match="instance name"):
        Session(("127.0.0.1", 1), SECRET, name)


# --- shared connections that died ---


@pytest.mark.parametrize(
    "last_words",
    [[EOF], [RESET], [native.encode_data(b"421 idle too long\r\n"), EOF], [native.encode_data(b"25"), EOF]],
    ids=["closed", "reset", "421", "half a reply"],
)
def test_a_shared_connection_that_died_is_replaced_once(proxy, session, last_words):
    dead, fresh = Dead(*last_words), Receiver()
    proxy.answers += [opened(reused=True), opened()]
    proxy.receivers += [dead, fresh]
    smtp = session.smtp([DESTINATION], "mta.example.com")
    assert smtp.opened.reused
    assert smtp.sendmail("a@example.com", ["b@example.net"], MAIL) == {}
    assert not smtp.opened.reused
    smtp.quit()
    assert fresh.messages == [MAIL]
    assert [line.split(b" ")[0].upper() for line in fresh.lines] == [b"MAIL", b"RCPT", b"DATA"]
    assert [(request.reuse, request.fresh) for request in proxy.opens] == [(True, False), (True, True)]
    assert len(proxy.channels) == 1


def test_not_a_second_time(proxy, session):
    proxy.answers += [opened(reused=True), opened(reused=True)]
    proxy.receivers += [Dead(EOF), Dead(EOF)]
    smtp = session.smtp([DESTINATION], "mta.example.com")
    with pytest.raises(smtplib.SMTPServerDisconnected):
        smtp.mail("a@example.com")
    assert len(proxy.opens) == 2


def test_not_after_the_first_reply(proxy, session):
    proxy.answers.append(opened(reused=True))
    proxy.receivers.append(Receiver({"RCPT": EOF}))
    smtp = session.smtp([DESTINATION], "mta.example.com")
    with pytest.raises(smtplib.SMTPServerDisconnected):
        smtp.sendmail("a@example.com", ["b@example.net"], MAIL)
    assert len(proxy.opens) == 1


@pytest.mark.parametrize(
    "pipelined",
    [b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nbdat 5 LAST\r\nHello", b"DATA\r\nHello\r\n.\r\n"],
)
def test_never_when_the_dead_one_may_have_taken_the_message(proxy, session, pipelined):
    proxy.answers.append(opened(reused=True))
    proxy.receivers.append(Dead(EOF))
    smtp = session.smtp([DESTINATION], "mta.example.com")
    smtp.send(pipelined)
    with pytest.raises(smtplib.SMTPServerDisconnected):
        smtp.getreply()
    assert len(proxy.opens) == 1


def test_not_when_more_was_said_than_is_remembered(proxy, session):
    proxy.answers.append(opened(reused=True))
    proxy.receivers.append(Dead(EOF))
    smtp = session.smtp([DESTINATION], "mta.example.com")
    smtp.send(b"NOOP\r\n" * 20_000)
    with pytest.raises(smtplib.SMTPServerDisconnected):
        smtp.getreply()
    assert len(proxy.opens) == 1


def test_a_fresh_connection_is_not_replaced(proxy, session):
    proxy.receivers.append(Dead(EOF))
    smtp = session.smtp([DESTINATION], "mta.example.com")
    with pytest.raises(smtplib.SMTPServerDisconnected):
        smtp.mail("a@example.com")
    assert len(proxy.opens) == 1


def test_a_first_reply_in_pieces_with_a_time_out_between(proxy, session):
    proxy.answers.append(opened(reused=True))
    proxy.receivers.append(
        Receiver({"NOOP": native.encode_data(b"2") + native.encode_data(b"50 o"), "RSET": native.encode_data(b"k\r\n")})
    )
    smtp = session.smtp([DESTINATION], "mta.example.com")
    stream = smtp.sock
    stream.settimeout(0.05)
    stream.sendall(b"NOOP\r\n")
    with pytest.raises(TimeoutError):
        stream.recv(100)
    stream.settimeout(30)
    stream.sendall(b"RSET\r\n")
    assert stream.recv(100) == b"250 ok\r\n"
    assert len(proxy.opens) == 1
    smtp.close()


# --- authentication ---


def test_channels_of_a_live_session_authenticate_in_one_flight(tls_proxy):
    with session_of(tls_proxy) as session:
        ready(session, tls_proxy)
        streams = [session.connect([DESTINATION]) for _ in range(3)]
        assert [entry for entry in tls_proxy.entered if entry[0] is CHANNEL] == [(CHANNEL, True)] * 3
        assert len(set(tls_proxy.runs)) == 1
        for stream in streams:
            stream.close()


def test_a_certificate_that_the_session_did_not_announce_is_not_trusted(tls_proxy):
    """An interceptor would show one; so may the proxy between a reload and its CERT."""
    with session_of(tls_proxy) as session:
        ready(session, tls_proxy)
        tls_proxy.new_certificate()
        session.connect([DESTINATION]).close()
        assert tls_proxy.entered[-1] == (CHANNEL, False)
        for conn in tls_proxy.sessions:
            conn.send(native.encode(s.Cert(INCARNATION, [tls_proxy.certificate])))
        wait_for(lambda: control_of(session).one_flight(tls_proxy.certificate))
        idle(session).pop().close()
        session.connect([DESTINATION]).close()
        assert tls_proxy.entered[-1] == (CHANNEL, True)


def test_without_cert_every_channel_authenticates_in_full():
    with FakeProxy(announce=False) as proxy, session_of(proxy) as session:
        assert session.wait_until_up(30)
        session.connect([DESTINATION]).close()
        assert proxy.entered[-1] == (CHANNEL, False)


def test_a_cert_of_another_incarnation_is_dropped():
    with FakeProxy(announce=False) as proxy:
        proxy.welcome_session = lambda conn: conn.send(
            native.encode(s.Cert(INCARNATION + 1, [proxy.certificate])), native.encode(s.Ping(INCARNATION, 5))
        )
        with session_of(proxy) as session:
            wait_for(lambda: any(isinstance(message, s.Pong) for message in proxy.session_messages))
            assert control_of(session).one_flight(proxy.certificate) is None


def test_without_tls_every_channel_authenticates_in_full():
    with FakeProxy(tls=False) as proxy, session_of(proxy) as session:
        assert session.wait_until_up(30)
        session.connect([DESTINATION]).close()
        assert proxy.entered[-1] == (CHANNEL, False)


def test_a_stale_key_costs_a_second_connection(tls_proxy):
    with session_of(tls_proxy) as session:
        ready(session, tls_proxy)
        tls_proxy.keys.clear()
        session.connect([DESTINATION]).close()
        assert tls_proxy.entered[-1] == (CHANNEL, False)
        assert len(tls_proxy.opens) == 1


def test_counters_are_never_used_twice(tls_proxy):
    with session_of(tls_proxy) as session:
        ready(session, tls_proxy)
        frames = [control_of(session).one_flight(tls_proxy.certificate) for _ in range(50)]
        assert len(set(frames)) == 50


@pytest.mark.parametrize("kind", ["secret", "certificate"])
def test_an_impostor(kind):
    """Does not know the secret; or passes the frames on, behind a certificate of its own."""
    with FakeProxy() as proxy:
        if kind == "secret":
            proxy.secrets = [b"x" * 32]
        else:
            genuine = proxy.certificate
            proxy.new_certificate()
            proxy.certificate = genuine
        with session_of(proxy) as session:
            with pytest.raises(ProxyRejected) as caught:
                session.connect([DESTINATION])
            assert (caught.value.code, caught.value.retry) == ("bad_credentials", False)
            wait_for(lambda: session.rejected)
            assert proxy.opens == []


def test_a_proxy_that_welcomes_without_proof(monkeypatch):
    monkeypatch.setattr("tests.loopback.client.fake_proxy.ServerHandshake", _NoProof)
    with FakeProxy() as proxy, session_of(proxy) as session:
        with pytest.raises(ProxyUnavailable, match="does not know the secret"):
            session.connect([DESTINATION])
        assert not session.wait_until_up(0)
        assert proxy.opens == []


class _NoProof:
    def __init__(self, *_: object, **__: object) -> None:
        self.peer = None
        self.decoder = native.FrameDecoder()
        self._frames = 0

    def receive(self, data: bytes) -> bytes:
        self._frames += 1
        if self._frames == 1:
            return native.encode(m.Challenge(1, bytes(32)))
        return native.encode(m.Welcome(bytes(32), 1))


def test_tls_does_not_fall_back():
    with FakeProxy(tls=False) as proxy, Session(proxy.address, SECRET, "server-a", timeout=2) as session:
        with pytest.raises(ProxyUnavailable):
            session.connect([DESTINATION])
        assert proxy.entered == []


# --- the session ---


def test_pings_go_both_ways(proxy):
    proxy.welcome_session = lambda conn: conn.send(native.encode(s.Ping(INCARNATION, 12345)))
    with session_of(proxy) as session:
        wait_for(lambda: session.round_trip > 0)
        assert session.round_trip < 5
        wait_for(lambda: any(isinstance(message, s.Pong) for message in proxy.session_messages))
        pong = next(message for message in proxy.session_messages if isinstance(message, s.Pong))
        assert (pong.incarnation, pong.t) == (INCARNATION, 12345)


def test_pings_are_repeated(proxy, monkeypatch):
    monkeypatch.setattr(control_module, "PING_EVERY", 0.01)
    with session_of(proxy):
        wait_for(lambda: sum(isinstance(message, s.Ping) for message in proxy.session_messages) > 3)
    times = [message.t for message in proxy.session_messages if isinstance(message, s.Ping)]
    assert all(a < b for a, b in pairwise(times))


def test_the_session_comes_back_with_the_same_run_id(proxy, session):
    ready(session, proxy)
    proxy.drop_all()
    wait_for(lambda: len(proxy.sessions) == 2)
    ready(session, proxy)
    assert len(set(proxy.runs)) == 1


def test_a_proxy_that_does_not_answer_pings_is_left(proxy, monkeypatch):
    monkeypatch.setattr(control_module, "PING_EVERY", 0.01)
    monkeypatch.setattr(control_module, "DEAD_AFTER", 0.05)
    proxy.answers_pings = False
    with session_of(proxy):
        wait_for(lambda: len(proxy.sessions) >= 2)


def test_running_smtp_sessions_do_not_notice_the_loss_of_the_session(proxy, session):
    ready(session, proxy)
    stream = session.connect([DESTINATION])
    for conn in proxy.sessions:
        conn.close()
    wait_for(lambda: len(proxy.sessions) == 2)
    stream.sendall(b"NOOP\r\n")
    assert stream.recv(100) == b"250 ok\r\n"
    stream.close()


def test_name_in_use_is_for_good(proxy):
    proxy.refuse = NameInUse("name in use by 192.0.2.99")
    with session_of(proxy) as session:
        rejected = wait_for(lambda: session.rejected)
        assert (rejected.code, rejected.retry) == ("name_in_use", False)
        assert "192.0.2.99" in str(rejected)
        control_of(session)._thread.join(30)
        assert not control_of(session)._thread.is_alive()
        proxy.refuse = None
        with pytest.raises(ProxyRejected, match=r"192\.0\.2\.99"):
            session.connect([DESTINATION])
        assert proxy.entered == []


def test_draining_is_tried_again(proxy):
    proxy.refuse = Draining("shutting down")
    with session_of(proxy) as session:
        assert wait_for(lambda: session.rejected).code == "draining"
        proxy.refuse = None
        assert session.wait_until_up(30)
        assert session.rejected is None


def test_close_says_bye_and_leaves_smtp_sessions_alone(proxy):
    session = session_of(proxy)
    ready(session, proxy)
    stream = session.connect([DESTINATION])
    session.close()
    session.close()
    wait_for(lambda: proxy.session_messages[-1:] == [s.Bye(INCARNATION)])
    stream.sendall(b"NOOP\r\n")
    assert stream.recv(100) == b"250 ok\r\n"
    stream.close()
    assert idle(session) == []
    with pytest.raises(ProxyUnavailable, match="session is closed"):
        session.connect([DESTINATION])


def test_bye_is_not_overtaken_by_the_close(proxy, monkeypatch):
    """What the proxy sent and nobody read would make the close a reset."""
    links = []
    close = Link.close
    monkeypatch.setattr(Link, "close", lambda link: [links.append(list(proxy.session_messages[-1:])), close(link)])
    session = session_of(proxy)
    ready(session, proxy)
    session.close()
    assert links[0] == [s.Bye(INCARNATION)]


def test_close_while_the_proxy_is_away():
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = nobody.getsockname()
    session = Session(address, SECRET, "server-a")
    session.close()
    assert not control_of(session)._thread.is_alive()


class Ear:
    def __init__(self) -> None:
        self.heard: list[object] = []

    def connected(self, welcome: m.Welcome) -> None:
        self.heard.append("up")

    def received(self, message: m.Message, at_us: int) -> None:
        self.heard.append((message, at_us))

    def disconnected(self) -> None:
        self.heard.append("down")


def test_listeners_hear_the_dialogue_and_can_speak(proxy):
    before = control_module.clock_us()
    grant = s.Grant(INCARNATION, 1, 2, [s.SlotGrant(7, 1, 0, 0)])
    proxy.welcome_session = lambda conn: conn.send(native.encode(grant))
    with session_of(proxy) as session:
        ready(session, proxy)
        ear = Ear()
        session._proxies.listen(ear)
        assert ear.heard[0] == "up"
        demand = s.Demand(INCARNATION, [s.Want(7, 1, 0)])
        assert session._proxies.send(demand)
        wait_for(lambda: demand in proxy.session_messages)
        proxy.drop_all()
        heard = wait_for(lambda: next((each for each in ear.heard if isinstance(each, tuple)), None))
        assert heard[0] == grant
        assert before <= heard[1] <= control_module.clock_us()
        wait_for(lambda: [each for each in ear.heard if isinstance(each, str)] == ["up", "down", "up"])
    assert ear.heard[-1] == "down"
    assert not session._proxies.send(demand)


def test_many_threads_speak_in_the_session(proxy, session):
    ready(session, proxy)
    demands = [s.Demand(INCARNATION, [s.Want(id, 1, 0)] * 3000) for id in range(4)]
    results: list[bool] = []

    def speak(demand: s.Demand) -> None:
        results.extend(session._proxies.send(demand) for _ in range(30))

    threads = [threading.Thread(target=speak, args=(demand,)) for demand in demands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 120
    wait_for(lambda: sum(isinstance(message, s.Demand) for message in proxy.session_messages) == 120)
    assert len(proxy.sessions) == 1


def test_under_gevents_monkey_patching():
    """In a process of its own: many SMTP sessions at once, in greenlets."""
    program = """
from gevent import monkey
monkey.patch_all()
import gevent
from greenarrow_proxy_client import Session
from tests.loopback.client.fake_proxy import SECRET, DESTINATION, FakeProxy
from tests.waiting import wait_for
with FakeProxy() as proxy, Session(proxy.address, SECRET, "server-a") as session:
    assert session.wait_until_up(30)
    def send(number):
        with session.smtp([DESTINATION], "mta.example.com") as smtp:
            gevent.sleep(0)
            assert smtp.sendmail("a@example.com", ["b@example.net"], b"Hello\\r\\n") == {}
    jobs = [gevent.spawn(send, number) for number in range(20)]
    gevent.joinall(jobs, timeout=30, raise_error=True)
    assert all(job.successful() for job in jobs)
    wait_for(lambda: len(proxy.ends) == 20)
    print(len(proxy.ends))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("20", "", 0)
