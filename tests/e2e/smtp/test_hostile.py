"""Mode smtp and peers that are hostile, broken or dying, on real sockets: what they get, and that nothing is held.

There is one place for all of them; behind each test a good client gets it, and in the end nothing is connected.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from tests import clients
from tests import independent_client as mta
from tests.certificates import NAME as CERTIFIED
from tests.certificates import authority
from tests.clients import Refused, Smtp, read_all, socks5
from tests.e2e.doors.test_through import agent
from tests.e2e.smtp.test_mode import GOOD, SMTP, SOURCE, deliver
from tests.independent_client import channel
from tests.mx import Mx, close, flood, half_close, mute, reset, say, trickle, usual
from tests.program import Proxy
from tests.sinks import Raw
from tests.waiting import wait_for

ONE = "throttle one {\n    max_concurrent_connections 1\n    per nothing\n    wait 20s\n}\n"
BYE = b"421 4.3.2 going down\r\n"
STEPS = ("greeting", "ehlo", "starttls", "tls", "mail", "rcpt", "data", "body", "dot")
GROUP = b"MAIL FROM:<1@example.com>\r\nRCPT TO:<to@example.net>\r\nDATA\r\n"


def codes(data: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"^(\d{3}) ", data, re.MULTILINE)]


@pytest.fixture(scope="module")
def module_proxy() -> Iterator[Proxy]:
    with Proxy(SMTP + ONE) as proxy:
        yield proxy


@pytest.fixture
def proxy(module_proxy: Proxy) -> Iterator[Proxy]:
    proxy = module_proxy
    yield proxy
    is_whole(proxy)


def is_whole(proxy: Proxy, door: Proxy | None = None, base: str = SMTP + ONE) -> None:
    """The place is free, and nobody is connected."""
    with Mx() as good:
        sock = socks5((door or proxy).socks5, good.endpoint, SOURCE)
        assert clients.send(sock, b"Subject: good\r\n\r\n")[0] == 250
        proxy.hup("reuse_connections no\n" + base)
        wait_for(lambda: "connections=0(active=0 cached=0)" in proxy.status()[-1], what="nothing goes out")
        proxy.hup(base)
    if door is None:
        proxy.wait_idle()
    else:
        door.wait_idle()


def session(door: tuple[str, int], mx: Mx) -> bytes:
    """A whole dialogue of somebody who waits for each reply as long as there is any; what it has heard."""
    heard = b""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(ConnectionResetError, BrokenPipeError, Refused))
        sock = stack.enter_context(socks5(door, mx.endpoint, SOURCE))
        file = stack.enter_context(sock.makefile("rb"))
        for said in (b"", b"EHLO client.example\r\n", GROUP, b"", b"", b"x\r\n.\r\n", b"QUIT\r\n"):
            sock.sendall(said)
            while (line := file.readline())[3:4] == b"-":
                pass
            heard += line
            if not line or line.startswith(b"421"):
                break
        heard += file.read()
    return heard


# --- the receiver dies ---


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "how", [say(BYE, close), close, reset, half_close], ids=["421", "closes", "resets", "half-closes"]
)
def test_a_receiver_that_ends_at_each_step(proxy: Proxy, step: str, how) -> None:
    """The client hears an SMTP reply or the end, never a success that was not said."""
    with Mx({step: how}, starttls=True) as mx:
        heard = codes(session(proxy.socks5, mx))
        if step == "tls":
            # Opportunistic: once more in clear. But not after what came with STARTTLS's reply, in front of TLS.
            in_front = [[220, 421]] if how.__name__ == "behave" else []
            assert heard in [[220, 250, *GOOD, 221], *in_front]
        elif step in ("greeting", "ehlo", "starttls"):
            assert heard in ([220, 421], [421], []), "[]: reset before the answer to CONNECT"
        else:
            before = {"mail": 0, "rcpt": 1, "data": 2, "body": 3, "dot": 3}[step]
            expected = [220, 250, *GOOD[:before], *([421] if how.__name__ == "behave" else [])]
            # A reset takes what was not sent yet with it.
            assert heard == (expected[: max(2, len(heard))] if how is reset else expected)
            assert not any(message.accepted for message in mx.messages)


@pytest.mark.parametrize("step", ["mail", "rcpt", "data", "dot"])
def test_a_receiver_in_single_bytes_and_a_client_in_single_bytes(proxy: Proxy, step: str) -> None:
    everything = dict.fromkeys(("greeting", "ehlo", "starttls", "mail", "rcpt", "data", "dot"), trickle)
    with Mx(everything, starttls=True) as mx, socks5(proxy.socks5, mx.endpoint, SOURCE) as sock:
        for byte in b"EHLO client.example\r\n" + GROUP + b"..x\r\n.\r\nQUIT\r\n":
            sock.sendall(bytes((byte,)))
        assert codes(read_all(sock)) == [220, 250, *GOOD, 221]
        assert [message.wire for message in mx.messages] == [b"..x"]


# --- two readings of one stream ---

#: What some receivers take for the end of a message.
ENDS = [
    b"\n.\n",
    b"\r\n.\n",
    b"\n.\r\n",
    b"\r.\r",
    b"\r\n.\r",
    b"\r.\r\n",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\n.\r\r\n",
]
EVIL = b"MAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.net>\r\nDATA\r\nevil\r\n"


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_a_message_within_a_message_stays_within_it(proxy: Proxy, end: bytes) -> None:
    """It passes as it is and is no command to us, and whoever comes next has another connection."""
    with Mx() as mx, socks5(proxy.socks5, mx.endpoint, SOURCE) as sock:
        smtp = Smtp(sock)
        smtp.ehlo()
        sock.sendall(GROUP)
        assert [smtp.getreply()[0] for _ in range(3)] == GOOD[:3]
        body = b"Subject: x\r\n\r\nfirst" + end + EVIL
        sock.sendall(body + b".\r\n")
        assert smtp.getreply()[0] == 250
        assert smtp.docmd("NOOP")[0] == 250
        smtp.quit()
        assert [message.wire + b"\r\n" for message in mx.messages] == [body]
        assert clients.send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"Subject: next\r\n\r\n")[0] == 250
        assert len(mx.messages) == 2
        assert mx.connects == 2


def test_a_receiver_that_is_taken_in_by_it_is_never_shared(proxy: Proxy) -> None:
    """Its second 250 answers nothing that was asked, and is said to nobody."""

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"220 lenient\r\n")
        with sock.makefile("rb") as file:
            message = False
            for line in file:
                if message:
                    message = line.rstrip(b"\r\n") != b"."
                    reply = b"" if message else b"250 2.0.0 taken\r\n"
                else:
                    message = line[:4].upper() == b"DATA"
                    reply = b"354 go\r\n" if message else b"250 2.0.0 ok\r\n"
                sock.sendall(reply)

    with Raw(serve) as mx, socks5(proxy.socks5, mx.endpoint, SOURCE) as sock:
        smtp = Smtp(sock)
        smtp.ehlo()
        sock.sendall(GROUP)
        assert [smtp.getreply()[0] for _ in range(3)] == GOOD[:3]
        sock.sendall(b"first\n.\n" + EVIL + b".\r\n")
        assert smtp.getreply()[0] == 250
        assert smtp.docmd("NOOP")[1] == b"2.0.0 OK", (
            "what the receiver says of the other message is not for this client"
        )
        smtp.quit()
        assert clients.send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")[0] == 250
        assert mx.connects == 2


@pytest.mark.parametrize(
    "reply", [b"250 ok\n250 two\r\n", b"250 ok\r\n354 go\r\n", b"250 ok\r250 two\r\n", b"250-ok\n354 go\r\n"], ids=repr
)
def test_a_reply_within_a_reply_makes_a_connection_nobody_elses(proxy: Proxy, reply: bytes) -> None:
    with Mx(lambda number: {} if number else {"mail": say(reply)}) as mx:
        smtp = Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE))
        smtp.ehlo()
        smtp.putcmd("MAIL FROM:<a@example.com>")
        assert clients.exactly(smtp.sock, len(reply)) == reply
        smtp.close()
        assert clients.send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")[0] == 250
        assert mx.connects == 2, "the next one has a connection of its own"


# --- too much of everything ---


@pytest.mark.parametrize("step", ["greeting", "ehlo", "mail", "dot"])
def test_a_reply_without_an_end(proxy: Proxy, step: str) -> None:
    """In front of a session it is no SMTP; later it passes, as fast as the client takes it."""
    with Mx({step: flood}) as mx:
        sock = socks5(proxy.socks5, mx.endpoint, SOURCE)
        with sock:
            before = proxy.rss()
            sock.sendall(b"EHLO client.example\r\n" + GROUP)
            if step in ("greeting", "ehlo"):
                assert codes(read_all(sock))[-1] == 421
            else:
                if step == "dot":
                    wait_for(lambda: mx.sessions and len(mx.sessions[0].commands) == 4)
                    sock.sendall(b"x\r\n.\r\n")
                assert len(clients.exactly(sock, 5_000_000)) == 5_000_000
                assert proxy.rss() - before < 4_000_000
                clients.reset(sock)


def test_http_before_the_greeting(proxy: Proxy) -> None:
    gate = threading.Event()

    def wait(session, reply):
        session.wait_for_gate(gate)
        session.send(reply)

    with Mx({"greeting": wait}) as mx, socks5(proxy.socks5, mx.endpoint, SOURCE) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        gate.set()
        assert codes(read_all(sock))[-1] == 421
        assert mx.sessions[0].commands in ([], [b"QUIT"])


# --- TLS at once ---


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority().configure_trust(context)
    return context


def test_implicit_tls_on_any_port_is_between_client_and_receiver(proxy: Proxy) -> None:
    """Who speaks TLS at once is not greeted first: there is no dialogue for us to take part in."""
    with Mx(implicit_tls=True) as mx, socks5(proxy.socks5, mx.endpoint, SOURCE) as plain:
        with trusting().wrap_socket(plain, server_hostname=CERTIFIED) as sock:
            assert clients.send(sock, b"Subject: x\r\n\r\n")[0] == 250
        assert mx.messages[0].encrypted
        line = proxy.wait_line(rf"^connection .*destination=127\.0\.0\.1:{mx.port} .*").string
        assert "reused=no" in line
        assert "tls=-" in line


def test_tls_behind_a_greeting_is_garbage(proxy: Proxy) -> None:
    with Mx() as mx, socks5(proxy.socks5, mx.endpoint, SOURCE) as sock:
        assert clients.exactly(sock, 4) == b"220 "
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 100)
        assert codes(b"220 " + read_all(sock))[-1] == 421
        assert not mx.messages


def test_requiretls_although_hidden(proxy: Proxy) -> None:
    """RFC 8689: it must not go where TLS is not verified. Who asks all the same hears that it is not offered."""
    with Mx(starttls=True, extensions=("PIPELINING", "REQUIRETLS")) as mx:
        smtp = Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE))
        smtp.ehlo()
        assert not smtp.has_extn("requiretls")
        assert smtp.mail("a@example.com", ["REQUIRETLS"])[0] == 555
        assert deliver(smtp) == GOOD
        smtp.quit()
        assert not [command for command in mx.sessions[0].commands if b"REQUIRETLS" in command.upper()]


# --- agents and their proxies ---


@pytest.mark.parametrize("step", ["greeting", "ehlo", "mail", "data", "dot"])
def test_the_proxy_of_an_agent_is_killed_at_each_step(step: str) -> None:
    """Its clients see their connections end; when there is a proxy again, all is well."""
    reached = threading.Event()

    def behave(session, reply):
        reached.set()
        mute(session, reply)

    with Mx({step: behave}) as mx, contextlib.ExitStack() as stack:
        proxy = stack.enter_context(Proxy(SMTP + ONE, exit_code=-signal.SIGKILL))
        front = stack.enter_context(agent(proxy.native, more="mode smtp\nvia_tls no\n"))
        sock = stack.enter_context(socks5(front.socks5, mx.endpoint, SOURCE))
        sock.sendall(b"EHLO client.example\r\n" + GROUP)
        if step == "dot":
            wait_for(lambda: mx.sessions and b"DATA" in mx.sessions[0].commands)
            sock.sendall(b"x\r\n.\r\n")
        assert reached.wait(30)
        proxy.signal(signal.SIGKILL)
        proxy.wait_exit()
        heard = b""
        with contextlib.suppress(ConnectionResetError):
            heard = read_all(sock)
        assert codes(heard).count(250) <= 3
        front.wait_line(r"^connection .*outcome=upstream_reset")
        front.wait_idle()
        with pytest.raises(Refused):
            socks5(front.socks5, mx.endpoint, SOURCE)


@pytest.mark.parametrize("junk", [b"\xff" * 64, mta.frame(mta.ENDED, b"\x92\xc2\xa0"), b"\0\0\0\0\x13"], ids=repr)
@pytest.mark.parametrize("when", ["idle", "at an errand"])
def test_an_agent_that_breaks_its_protocol(junk: bytes, when: str) -> None:
    with Proxy(SMTP.replace("listen_tls no\n", "") + ONE) as proxy:
        with Mx({"greeting": usual if when == "idle" else mute}) as mx, channel(proxy.native) as peer:
            peer.opened(mx.endpoint, source=SOURCE, dialogue=True)
            if when == "idle":
                peer.data(b"EHLO client.example\r\n")
                peer.hear_until(b"SMTPUTF8\r\n")
            peer.sock.sendall(junk)
            with pytest.raises(mta.Told, match="bad_protocol"):
                peer.hear()
            assert peer.closed()
            proxy.wait_line(r"^connection .*outcome=protocol_error")
        is_whole(proxy, base=SMTP.replace("listen_tls no\n", "") + ONE)
