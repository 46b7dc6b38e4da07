"""Mode smtp when `max_concurrent_connections` is used up: nobody is refused before MAIL, and nobody holds a place."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests import clients
from tests.clients import Smtp, address, bind_request, connect_request, dial, exactly, login, proxied, socks5
from tests.e2e.doors.test_through import agent
from tests.e2e.smtp.test_mode import GOOD, NAME, SMTP, SOURCE, deliver
from tests.mx import Mx
from tests.program import Proxy
from tests.sinks import closed_port

#: One place for two receivers: one of them is known when the other has it.
ONE = "throttle one {\n    max_concurrent_connections 1\n    per nothing\n    wait %s\n}\n"
GROUP = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"


@pytest.fixture(params=["itself", "agent"])
def door(request: pytest.FixtureRequest) -> Iterator[tuple[Proxy, Proxy]]:
    """The program whose doors are used, and the one that has the place."""
    with Proxy(SMTP + ONE % "30s") as proxy:
        if request.param == "itself":
            yield proxy, proxy
        else:
            with agent(proxy.native, more="mode smtp\nvia_tls no\n") as front:
                yield front, proxy


def dialled(proxy: Proxy, mx: Mx, name: str = NAME) -> Smtp:
    """A client behind its EHLO."""
    smtp = Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE))
    assert smtp.greeting[0] == 220
    assert smtp.ehlo(name)[0] == 250
    return smtp


def busy(proxy: Proxy, mx: Mx) -> Smtp:
    """A client that has the place, in the middle of a message."""
    smtp = dialled(proxy, mx)
    assert smtp.mail("first@example.com")[0] == 250
    return smtp


def test_it_is_greeted_as_the_receiver_would_and_waits_at_mail(door: tuple[Proxy, Proxy]) -> None:
    front, proxy = door
    with Mx(starttls=True) as mx:
        first = busy(front, mx)
        second = dialled(front, mx)
        assert second.greeting == first.greeting
        assert second.ehlo_resp == first.ehlo_resp
        assert (second.docmd("NOOP")[0], mx.connects) == (250, 1)
        second.sock.sendall(GROUP)
        assert first.docmd("RSET")[0] == 250
        assert [second.getreply()[0] for _ in range(3)] == GOOD[:3]
        second.sock.sendall(b"x\r\n.\r\n")
        assert second.getreply()[0] == 250
        assert deliver(first) == GOOD
        first.quit()
        second.quit()
        assert (mx.connects, mx.handshakes, len(mx.messages)) == (1, 1, 2), "it was handed on"
        proxy.wait_line(r"^connection .* messages=1 accepted=1 deferred=0 rejected=0 ")


def test_not_in_time_is_said_to_the_message_alone(door: tuple[Proxy, Proxy]) -> None:
    front, proxy = door
    proxy.hup(SMTP + ONE % "200ms")
    with Mx() as mx:
        first = busy(front, mx)
        second = dialled(front, mx)
        for _ in range(2):
            second.sock.sendall(GROUP)
            replies = [second.getreply() for _ in range(3)]
            assert [code for code, _ in replies] == [451, 503, 503]
            assert re.fullmatch(rb"4\.7\.1 throttle one: again in \d+ s", replies[0][1])
        first.quit()
        assert deliver(second) == GOOD
        second.quit()
        line = proxy.wait_line(r"^connection .* deferred=2 .*").string
        assert "messages=1 accepted=1 deferred=2 rejected=0" in line


def test_a_receiver_that_nobody_knows(door: tuple[Proxy, Proxy]) -> None:
    """What it may offer is not known; a message that needs what it does not offer is put off, and never refused."""
    front, _ = door
    with Mx() as mx, Mx(host="127.0.0.2", extensions=("PIPELINING", "8BITMIME")) as other:
        first = busy(front, mx)
        second = dialled(front, other)
        assert second.greeting[1].endswith(b"ESMTP")
        assert set(second.esmtp_features) == {"8bitmime", "smtputf8"}
        first.quit()
        assert deliver(second) == GOOD
        assert second.mail("a@example.com", ["BODY=8BITMIME"])[0] == 250
        second.quit()
        first = busy(front, mx)
        third = dialled(front, other)
        assert set(third.esmtp_features) == {"pipelining", "8bitmime"}, "it is known now"
        first.close()
        third.quit()


def test_a_need_that_the_receiver_does_not_fill_is_put_off() -> None:
    with (
        Proxy(SMTP + ONE % "30s") as proxy,
        Mx() as mx,
        Mx(host="127.0.0.2", extensions=("8BITMIME",)) as other,
    ):
        first = busy(proxy, mx)
        second = dialled(proxy, other)
        first.quit()
        assert second.mail("a@example.com", ["SMTPUTF8"])[0] == 421
        second.close()
        assert not [command for session in other.sessions for command in session.commands if b"SMTPUTF8" in command]


def test_the_socks_reply_tells_the_source_and_no_port() -> None:
    with Proxy(SMTP + ONE % "30s") as proxy, Mx() as mx:
        first = busy(proxy, mx)
        descriptors = proxy.fds()
        with dial(proxy.socks5) as sock:
            sock.sendall(clients.WITH_PASSWORD)
            assert exactly(sock, 2) == b"\x05\x02"
            sock.sendall(login())
            assert exactly(sock, 2) == b"\x01\x00"
            sock.sendall(bind_request(SOURCE))
            assert exactly(sock, 10)[1] == 0
            sock.sendall(connect_request(mx.endpoint))
            assert exactly(sock, 10) == b"\x05\x00\x00" + address(SOURCE, 0)
            assert exactly(sock, 4) == b"220 "
            assert proxy.fds() == descriptors + 1, "what was bound is closed"
        first.quit()


def test_whoever_sends_nothing_costs_nothing(door: tuple[Proxy, Proxy]) -> None:
    front, proxy = door
    with Mx() as mx:
        first = busy(front, mx)
        for _ in range(3):
            dialled(front, mx).quit()
            proxied(front.proxy_protocol, mx.endpoint, SOURCE).close()
        first.quit()
        assert mx.connects == 1
    proxy.hup("reuse_connections no\n" + SMTP + ONE % "30s")
    proxy.wait_line(r"^connection .*outcome=client_closed messages=0")
    front.wait_idle()


def test_another_name_than_that_of_the_connection_that_was_kept() -> None:
    """It goes back unharmed; for the other name there is no place, since somebody takes it."""
    with Proxy(SMTP + ONE % "30s") as proxy, Mx() as mx:
        dialled(proxy, mx).quit()
        other = Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE))
        assert other.ehlo("other.example")[0] == 250
        assert deliver(other) == GOOD
        other.quit()
        assert [session.commands[0] for session in mx.sessions] == [b"EHLO client.example", b"EHLO other.example"]


def test_a_receiver_that_cannot_be_reached_is_known_at_mail() -> None:
    with Proxy(SMTP + ONE % "30s") as proxy, Mx() as mx, closed_port() as nobody:
        first = busy(proxy, mx)
        smtp = Smtp(socks5(proxy.socks5, nobody, SOURCE))
        assert smtp.ehlo()[0] == 250
        first.quit()
        code, text = smtp.mail("a@example.com")
        assert (code, b"Connection refused" in text) == (421, True)
        smtp.close()


def test_tls_that_is_required_and_fails_is_421_at_mail() -> None:
    with Proxy(SMTP + "smtp_tls required\n" + ONE % "30s") as proxy, Mx(starttls=True) as mx, Mx() as clear:
        first = busy(proxy, mx)
        smtp = Smtp(socks5(proxy.socks5, clear.endpoint, SOURCE))
        assert smtp.docmd("EHLO", NAME)[0] == 250
        first.quit()
        assert smtp.docmd("MAIL", "FROM:<a@example.com>")[0] == 421
        smtp.close()
        assert not clear.messages
