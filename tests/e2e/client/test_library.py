"""The client library through the real program to real receivers: what an MTA in Python gets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from greenarrow_proxy_client import ProxyRefused, ProxyRejected, ProxyUnavailable, Session
from tests.program import SECRET, Proxy
from tests.sinks import Raw, Sink
from tests.waiting import wait_for

MAIL = b"Subject: hello\r\n\r\nHello\r\n.leading dot\r\n"


@pytest.fixture(scope="module")
def sink():
    with Sink() as it:
        yield it


@pytest.fixture(scope="module", params=["yes", "no"], ids=["tls", "no-tls"])
def proxy(request):
    with Proxy(f"listen_tls {request.param}\n") as it:
        it.speaks_tls = request.param == "yes"
        yield it


def session_of(proxy, secret=SECRET, **options):
    return Session(proxy.native, secret, "server-a", tls=proxy.speaks_tls, **options)


@pytest.fixture
def session(proxy):
    with session_of(proxy) as it:
        yield it


def test_mail_arrives_from_the_source_asked_for(session, sink):
    del sink.messages[:]
    with session.smtp([sink.endpoint], "mta.example.com", source_ip="127.0.0.9") as smtp:
        assert smtp.opened.local.host == "127.0.0.9"
        assert smtp.has_extn("8bitmime")
        assert smtp.sendmail("a@example.com", ["b@example.net"], MAIL) == {}
    (message,) = sink.messages
    assert message.content == MAIL
    assert message.peer == (smtp.opened.local.host, smtp.opened.local.port)
    assert (message.mail_from, message.rcpt_tos) == ("a@example.com", ("b@example.net",))


def test_a_released_connection_serves_the_next(session, sink):
    def send(tenant: str = "reuse") -> tuple[bool, int, str]:
        smtp = session.smtp([sink.endpoint], "mta.example.com", source_ip="127.0.0.9", tenant=tenant)
        smtp.sendmail("a@example.com", ["b@example.net"], MAIL)
        return smtp.opened.reused, smtp.opened.local.port, smtp.release(wait=True)

    sent = [send()]
    assert (sent[0][0], sent[0][2]) == (False, "kept")

    def again() -> bool:
        sent.append(send())
        return sent[-1][0]

    wait_for(again, what="a shared connection: RSET to the receiver takes a moment")
    assert sent[-1][1] in [port for _, port, _ in sent[:-1]]
    assert send("somebody else")[0] is False


def test_a_message_larger_than_any_buffer(session, sink):
    body = b"Subject: large\r\n\r\n" + (b"x" * 998 + b"\r\n") * 8000
    with session.smtp([sink.endpoint], "mta.example.com") as smtp:
        smtp.sendmail("a@example.com", ["b@example.net"], body)
    assert sink.messages[-1].content == body


def test_raw_connection_with_half_close(session):
    def echo(sock: socket.socket) -> None:
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
        sock.sendall(data[::-1])
        sock.close()

    with Raw(echo) as raw, session.connect([raw.endpoint]) as stream:
        stream.sendall(b"abc" * 100_000)
        stream.shutdown(socket.SHUT_WR)
        with stream.makefile("rb") as file:
            assert file.read() == b"cba" * 100_000


def test_the_next_destination_is_tried(session, sink):
    with socket.create_server(("127.0.0.3", 0)) as closed:
        nobody = closed.getsockname()
    with session.smtp([nobody, sink.endpoint], "mta.example.com") as smtp:
        assert smtp.opened.destination.endpoint == sink.endpoint


def test_refusals_name_step_number_and_destination(session):
    with socket.create_server(("127.0.0.3", 0)) as closed:
        nobody = closed.getsockname()
    with pytest.raises(ProxyRefused) as caught:
        session.smtp([nobody], "mta.example.com")
    error = caught.value
    assert (error.step, error.errno, error.retry) == ("connect", 111, True)
    assert [attempt[:3] for attempt in error.attempts] == [(nobody, "connect", 111)]
    for options, code in (
        ({"source_ip": "192.0.2.1"}, "source_not_allowed"),
        ({"source_ip": "::1"}, "family_mismatch"),
    ):
        with pytest.raises(ProxyRefused) as caught:
            session.connect([nobody], **options)
        assert (caught.value.step, caught.value.code, caught.value.retry) == (None, code, False)
    with pytest.raises(ProxyRefused) as caught:
        session.connect([("10.255.255.1", 25)])
    assert caught.value.code == "destination_not_allowed"
    assert len(session._proxies.all[0].channels._idle) == 1, "one channel served them all"


def test_a_receiver_that_will_not(session):
    def busy(sock: socket.socket) -> None:
        sock.sendall(b"554 5.7.1 not you\r\n")
        sock.recv(100)
        sock.close()

    with Raw(busy) as raw, pytest.raises(ProxyRefused) as caught:
        session.smtp([raw.endpoint], "mta.example.com")
    assert (caught.value.step, caught.value.smtp_code) == ("greeting", 554)
    assert b"not you" in caught.value.smtp_reply


def test_a_receiver_that_vanishes_in_the_dialogue(session):
    def vanish(sock: socket.socket) -> None:
        sock.sendall(b"220 mx\r\n")
        sock.recv(100)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()

    with Raw(vanish) as raw:
        stream = session.connect([raw.endpoint])
        assert stream.recv(100) == b"220 mx\r\n"
        stream.sendall(b"NOOP\r\n")
        with pytest.raises(ConnectionResetError):
            stream.recv(100)
        stream.close()


def test_wrong_secret_and_wrong_transport(proxy):
    with session_of(proxy, "x" * 32) as session, pytest.raises(ProxyRejected) as caught:
        session.connect([("127.0.0.3", 25)])
    assert (caught.value.code, caught.value.retry) == ("bad_credentials", False)
    other = Session(proxy.native, SECRET, "server-a", tls=not proxy.speaks_tls, timeout=5)
    with other, pytest.raises((ProxyUnavailable, ProxyRejected)):
        other.connect([("127.0.0.3", 25)])


def test_a_restart_of_the_proxy_is_survived(sink):
    """Channels are lost with the old program; the next SMTP session finds the new one."""
    with Proxy("") as first:
        address = first.native
        session = Session(address, SECRET, "server-a")
        session.connect([sink.endpoint]).close()
    with session:
        with pytest.raises(ProxyUnavailable):
            session.connect([sink.endpoint])
        with Proxy(f"listen {address[0]}:{address[1]}\n"):
            began = time.monotonic()
            session.connect([sink.endpoint]).close()
            assert time.monotonic() - began < 10


@pytest.mark.parametrize("how", ["a send that times out", "a close in the middle"])
def test_a_receiver_that_takes_nothing_is_let_go_when_the_mta_gives_up(how):
    """More is under way than all kernels between take: a FIN would stand behind it for minutes."""
    gate = threading.Event()

    def serve(sock):
        sock.sendall(b"220 mx.example\r\n")
        gate.wait(60)

    with Proxy("throttle one {\n  max_concurrent_connections 1\n}\n") as proxy, Raw(serve, receive_buffer=4096) as mx:
        with Session(proxy.native, SECRET, "server-a") as session:
            stream = session.connect([mx.endpoint], source_ip="127.0.0.11", timeout=1.0)
            piece, sent = b"x" * 65536, 0
            with contextlib.suppress(TimeoutError):
                while sent < 64 * 2**20 and (how.startswith("a send") or sent < 8 * 2**20):
                    stream.sendall(piece)
                    sent += len(piece)
            stream.close()
            wait_for(lambda: "active=0" in proxy.status()[-1], what="the place is free")
        gate.set()
