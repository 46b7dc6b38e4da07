"""Mode smtp: a client that says all it has to say and closes its sending side gets every reply, wherever it is then."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest

from tests import clients
from tests import independent_client as mta
from tests.clients import proxied, read_all
from tests.e2e.doors.test_through import agent
from tests.e2e.smtp.test_mode import SMTP, SOURCE
from tests.independent_client import channel
from tests.mx import Mx, late
from tests.program import Proxy
from tests.sharing import cached
from tests.waiting import wait_for

MAIL = b"MAIL FROM:<a@example.com>\r\n"
GROUP = b"EHLO client.example\r\n" + MAIL + b"RCPT TO:<b@example.net>\r\nDATA\r\n"
DIALOGUE = GROUP + b"Subject: all at once\r\n\r\n.\r\nQUIT\r\n"
REPLIES = [220, 250, 250, 250, 354, 250, 221]
#: The rate's first slot is a second away.
RATE = "throttle t {\n    max_delivery_rate 1/s\n    wait 30s\n}\n"
NEVER = "throttle t {\n    max_delivery_rate 1/hr\n    wait 1h\n}\n"


def codes(data: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"^(\d{3}) ", data, re.MULTILINE)]


@pytest.fixture(params=["itself", "agent"])
def door(request: pytest.FixtureRequest) -> Iterator[tuple[Proxy, Proxy]]:
    """The program whose PROXY door is used, and the one that takes part in the dialogue."""
    with Proxy(SMTP) as proxy:
        if request.param == "itself":
            yield proxy, proxy
        else:
            with agent(proxy.native, more="mode smtp\nvia_tls no\n") as front:
                yield front, proxy


@pytest.mark.parametrize("step", ["greeting", "ehlo", "starttls", "mail", "dot"])
def test_while_the_receiver_takes_its_time(door: tuple[Proxy, Proxy], step: str) -> None:
    front, proxy = door
    gate, reached = threading.Event(), threading.Event()

    def behave(session, reply):
        reached.set()
        late(gate)(session, reply)

    with Mx({step: behave}, starttls=True) as mx, proxied(front.proxy_protocol, mx.endpoint, SOURCE) as sock:
        sock.sendall(DIALOGUE)
        assert reached.wait(30)
        sock.shutdown(socket.SHUT_WR)
        front.status(), proxy.status()  # both have looked at their sockets
        gate.set()
        assert codes(read_all(sock)) == REPLIES
        assert [message.content for message in mx.messages] == [b"Subject: all at once\r\n\r\n"]


def test_in_one_segment_with_its_request(door: tuple[Proxy, Proxy]) -> None:
    front, _ = door
    with Mx(starttls=True) as mx, clients.dial(front.proxy_protocol) as sock:
        sock.send(clients.v2(SOURCE, mx.endpoint) + DIALOGUE, socket.MSG_MORE)
        sock.shutdown(socket.SHUT_WR)
        assert codes(read_all(sock)) == REPLIES
        assert len(mx.messages) == 1


@pytest.mark.parametrize("via", [False, True], ids=["itself", "agent"])
def test_while_its_mail_waits_for_a_slot(via: bool) -> None:
    with Mx() as mx, Proxy(SMTP + RATE) as proxy, agent(proxy.native, more="mode smtp\nvia_tls no\n") as front:
        with proxied((front if via else proxy).proxy_protocol, mx.endpoint, SOURCE) as sock:
            sock.sendall(DIALOGUE)
            sock.shutdown(socket.SHUT_WR)
            assert codes(read_all(sock)) == REPLIES
        assert len(mx.messages) == 1


def test_behind_tls() -> None:
    """What is left of the message and the end are encrypted, so only reading tells of them."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with Mx() as mx, Proxy(SMTP + RATE + "mode_smtp_starttls yes\n") as proxy:
        smtp = clients.Smtp(proxied(proxy.proxy_protocol, mx.endpoint, SOURCE))
        smtp.ehlo()
        smtp._host = "proxy.example"
        assert smtp.starttls(context=context)[0] == 220
        assert isinstance(smtp.sock, ssl.SSLSocket)
        smtp.sock.sendall(DIALOGUE)
        smtp.sock.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            smtp.sock.unwrap()  # close_notify; without it the rest could have been cut off by anybody
        smtp.sock.settimeout(30)
        socket.socket.shutdown(smtp.sock, socket.SHUT_WR)
        heard = b""
        with contextlib.suppress(ssl.SSLZeroReturnError):
            while more := smtp.sock.recv(65536):
                heard += more
        assert codes(heard) == REPLIES[1:]
        smtp.close()
        assert len(mx.messages) == 1


@pytest.mark.parametrize("via", [False, True], ids=["itself", "agent"])
@pytest.mark.parametrize("said", [MAIL, MAIL + b"RCPT TO:<b@example.net>\r\nDATA\r\n"], ids=["mail", "group"])
def test_a_mail_of_which_nothing_can_come_keeps_no_turn(via: bool, said: bytes) -> None:
    """Who has died looks the same: its turn is given up, and whoever is still there is told."""
    with Mx() as mx, Proxy(SMTP + NEVER) as proxy, agent(proxy.native, more="mode smtp\nvia_tls no\n") as front:
        with proxied((front if via else proxy).proxy_protocol, mx.endpoint, SOURCE) as sock:
            sock.sendall(b"EHLO client.example\r\n" + said)
            sock.shutdown(socket.SHUT_WR)
            assert codes(read_all(sock)) == [220, 250, 421]
        proxy.wait_line(r"^connection .*outcome=kept messages=0 ")
        cached(proxy, 1, mx)


def test_on_a_native_channel_while_its_mail_waits_for_a_slot() -> None:
    with Mx() as mx, Proxy(RATE) as proxy, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name="client.example", source=SOURCE)
        peer.data(DIALOGUE.removeprefix(b"EHLO client.example\r\n").removesuffix(b"QUIT\r\n"))
        peer.say(mta.EOF)
        heard = b""
        while (frame := peer.hear())[0] == mta.DATA:
            heard += frame[1]
        assert codes(heard) == [250, 250, 354, 250]
        assert len(mx.messages) == 1


@pytest.mark.parametrize("mode", ["tcp", "smtp"])
def test_while_its_place_is_waited_for(mode: str) -> None:
    """In mode tcp, too: a client that has said more than its request is believed to wait."""
    block = "throttle t {\n    max_concurrent_connections 1\n    wait 30s\n}\n"
    with Mx() as mx, Proxy(SMTP.replace("mode smtp", f"mode {mode}") + block) as proxy:
        with proxied(proxy.proxy_protocol, mx.endpoint, SOURCE) as first:
            busy = clients.Smtp(first)
            busy.ehlo()
            busy.mail("a@example.com")
            sock = proxied(proxy.proxy_protocol, mx.endpoint, SOURCE)
            sock.sendall(DIALOGUE)
            sock.shutdown(socket.SHUT_WR)
            wait_for(lambda: proxy.open_connections("proxy_protocol") == 2, what="the second one waits")
            busy.quit()
            with sock:
                assert codes(read_all(sock)) == REPLIES
        assert len(mx.messages) == 1


def test_a_client_that_waits_for_a_slot_and_is_reset(door: tuple[Proxy, Proxy]) -> None:
    front, proxy = door
    proxy.hup(SMTP + NEVER)
    with Mx() as mx:
        sock = proxied(front.proxy_protocol, mx.endpoint, SOURCE)
        sock.sendall(DIALOGUE)
        wait_for(lambda: mx.sessions and mx.sessions[0].commands, what="EHLO is said")
        clients.reset(sock)
        proxy.wait_line(r"^connection .*outcome=client_reset messages=0")
        assert not mx.messages
