"""Mode smtp on the real program: real sockets, misbehaving receivers and clients, and the books."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import ssl
import threading

import pytest

from tests import clients, sharing
from tests.clients import (
    DOORS,
    Smtp,
    address,
    bind_request,
    connect_request,
    dial,
    exactly,
    login,
    read_all,
    reset,
    send,
    stuffed,
)
from tests.independent_client import channel
from tests.mx import Mx, close, late, mute, say, usual
from tests.program import Proxy
from tests.sharing import cached
from tests.waiting import wait_for

NAME = "client.example"  # what tests.clients.Smtp says
SOURCE = "127.0.0.5"
SMTP = f"""\
mode smtp
listen_tls no
source here {{
    ip {SOURCE}
    ehlo {NAME}
}}
"""


_opened: list[socket.socket] = []


def close_all():
    while _opened:
        _opened.pop().close()


@pytest.fixture(autouse=True)
def _close_what_was_opened():
    yield
    close_all()


def socks5(door, destination, source, **options):
    """As in `tests.clients`; closed with the test."""
    _opened.append(clients.socks5(door, destination, source, **options))
    return _opened[-1]


@pytest.fixture(scope="module")
def module_proxy():
    with Proxy(SMTP) as proxy:
        yield proxy


@pytest.fixture
def proxy(module_proxy):
    """One program for all tests of this file that do not need settings of their own; nothing is left behind in it."""
    yield module_proxy
    close_all()
    sharing.drop_cached(module_proxy, SMTP)
    module_proxy.wait_idle()


@pytest.fixture
def mx():
    with Mx(starttls=True) as mx:
        yield mx


def client(proxy, mx, source=SOURCE):
    """A client behind its EHLO."""
    smtp = Smtp(socks5(proxy.socks5, mx.endpoint, source))
    _opened.append(smtp)
    assert smtp.greeting[0] == 220
    assert smtp.ehlo()[0] == 250
    return smtp


def deliver(smtp, number=1, recipient="to@example.net"):
    """One message; the codes."""
    codes = [smtp.mail(f"{number}@example.com")[0], smtp.rcpt(recipient)[0], smtp.docmd("DATA")[0]]
    if codes[-1] == 354:
        smtp.sock.sendall(stuffed(b"Subject: %d\r\n\r\n" % number) + b".\r\n")
        codes.append(smtp.getreply()[0])
    return codes


GOOD = [250, 250, 354, 250]


# --- sharing ---


@pytest.mark.parametrize("door", DOORS)
def test_a_message_through_each_door_and_its_connection_for_the_next(proxy, mx, door):
    since = len(proxy.lines)
    assert send(DOORS[door](proxy, mx.endpoint, SOURCE), b"Subject: one\r\n\r\n.dot\r\n")[0] == 250
    cached(proxy, 1, mx)
    assert send(DOORS[door](proxy, mx.endpoint, SOURCE), b"Subject: two\r\n\r\n")[0] == 250
    assert (mx.connects, mx.handshakes) == (1, 1)
    assert [message.content for message in mx.messages] == [b"Subject: one\r\n\r\n.dot\r\n", b"Subject: two\r\n\r\n"]
    assert all(message.encrypted and message.peer[0] == SOURCE for message in mx.messages)
    line = proxy.wait_line(r"^connection .*reused=yes.*", since=since).string
    assert "tls=TLSv1.3" in line
    assert "outcome=kept messages=1 accepted=1 deferred=0 rejected=0 waited=0.0" in line


def test_the_socks_reply_of_a_kept_connection_tells_its_real_address(proxy, mx):
    send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")
    cached(proxy, 1, mx)
    sock = dial(proxy.socks5)
    sock.sendall(b"\x05\x01\x02")
    assert exactly(sock, 2) == b"\x05\x02"
    sock.sendall(login())
    assert exactly(sock, 2) == b"\x01\x00"
    sock.sendall(bind_request(SOURCE))
    assert exactly(sock, 10)[1] == 0
    sock.sendall(connect_request(mx.endpoint))
    assert exactly(sock, 10) == b"\x05\x00\x00" + address(*mx.sessions[0].peer)
    sock.close()


def test_another_name_has_a_connection_of_its_own_and_the_kept_one_stays(proxy, mx):
    send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")
    cached(proxy, 1, mx)
    smtp = Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE))
    assert smtp.ehlo("other.example")[0] == 250
    assert deliver(smtp) == GOOD
    smtp.quit()
    cached(proxy, 1, mx)
    assert [session.commands[0] for session in mx.sessions] == [b"EHLO client.example", b"EHLO other.example"]
    wait_for(lambda: mx.sessions[1].ended == "quit", what="QUIT is said to what nobody else may have")
    send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")
    assert mx.connects == 2


def test_a_source_without_a_name_is_not_shared(proxy, mx):
    for _ in range(2):
        send(socks5(proxy.socks5, mx.endpoint, "127.0.0.9"), b"x\r\n")
    assert mx.connects == 2


def test_instances_share_only_within_a_group(mx):
    groups = "".join(f"instance {name} {{\n    share_with {group}\n}}\n" for name, group in ("ax", "bx", "cy"))
    groups = "instance a {\n    share_with x\n}\ninstance b {\n    share_with x\n}\ninstance c {\n}\n"
    with Proxy(SMTP + groups) as proxy:
        for name, connects in (("a", 1), ("b", 1), ("c", 2), ("d", 3), ("c", 3)):
            send(socks5(proxy.socks5, mx.endpoint, SOURCE, user=name), b"x\r\n")
            assert mx.connects == connects, name
            cached(proxy, connects, mx)


def test_a_native_client_and_one_of_mode_smtp_share(mx):
    group = "instance mta-1 {\n    share_with x\n}\ninstance python {\n    share_with x\n}\n"
    with Proxy(SMTP + group) as proxy, sharing.instances(proxy, "python") as (python,):
        send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")
        cached(proxy, 1, mx)
        options = {"source_ip": SOURCE, "tls": "opportunistic"}
        smtp = python.smtp([mx.endpoint], NAME, **options)
        smtp.sendmail("1@example.com", ["to@example.net"], b"x\r\n")
        smtp.release(wait=True)
        cached(proxy, 1, mx)
        send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")
        assert (mx.connects, mx.handshakes, len(mx.messages)) == (1, 1, 3)


def test_a_silent_client_lets_others_have_its_connection_and_goes_on_later(proxy, mx):
    first = client(proxy, mx)
    assert deliver(first, 1) == GOOD
    cached(proxy, 1, mx)
    assert deliver(client(proxy, mx), 2) == GOOD
    assert mx.connects == 1
    assert deliver(first, 3) == GOOD
    assert first.docmd("NOOP")[0] == 250
    assert first.quit()[0] == 221
    assert len(mx.messages) == 3


def test_a_client_that_ends_without_quit(proxy, mx):
    smtp = client(proxy, mx)
    assert deliver(smtp) == GOOD
    smtp.close()
    cached(proxy, 1, mx)
    smtp = client(proxy, mx)
    smtp.mail("a@example.com")
    smtp.file.close()
    reset(smtp.sock)
    cached(proxy, 1, mx)
    assert mx.connects == 1


def test_a_client_that_ends_in_data_leaves_no_message(proxy):
    since = len(proxy.lines)
    with Mx() as mx:
        smtp = client(proxy, mx)
        assert [smtp.mail("a@example.com")[0], smtp.rcpt("b@example.com")[0], smtp.docmd("DATA")[0]] == GOOD[:3]
        smtp.sock.sendall(b"half a mess")
        smtp.close()
        wait_for(lambda: mx.sessions[0].ended is not None)
        assert "Reset" in mx.sessions[0].ended
        assert not mx.messages
    proxy.wait_line(r"^connection .*outcome=client_closed messages=1 accepted=0", since=since)


# --- receivers ---


def test_a_greeting_that_is_late_and_in_two_lines(proxy):
    gate = threading.Event()

    def slow(session, reply):
        session.send(b"220-wait\r\n")
        late(gate)(session, b"220 now\r\n")

    with Mx({"greeting": slow}) as mx:
        sock = socks5(proxy.socks5, mx.endpoint, SOURCE)  # is told that the connection stands
        gate.set()
        assert send(sock, b"x\r\n")[0] == 250


def test_a_greeting_of_5xx_passes_as_it_is(proxy):
    with Mx({"greeting": say(b"554-5.7.1 not\r\n554 you\r\n", close)}) as mx:
        assert read_all(socks5(proxy.socks5, mx.endpoint, SOURCE)) == b"554-5.7.1 not\r\n554 you\r\n"


def test_no_greeting_is_a_421(proxy):
    with Mx({"greeting": close}) as mx:
        assert read_all(socks5(proxy.socks5, mx.endpoint, SOURCE)).startswith(b"421 4.4.1 ")


def test_a_receiver_that_dies_while_kept_and_one_that_says_421_to_the_first_mail(proxy):
    script = [{"mail": [usual, say(b"421 4.3.2 bye\r\n", close)]}, {}]
    with Mx(lambda number: script[min(number, 1)]) as mx:
        send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")
        cached(proxy, 1, mx)
        assert send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"y\r\n")[0] == 250
        assert [message.session for message in mx.messages] == [0, 1]
        proxy.wait_line(r"^connection .*reused=yes.* messages=1 accepted=1 deferred=0 ")


def test_tls_that_fails_is_done_without_or_ends_it():
    with Mx({"tls": close}, starttls=True) as mx:
        with Proxy(SMTP) as proxy:
            assert send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")[0] == 250
            assert not mx.messages[0].encrypted
        with Proxy(SMTP + "smtp_tls required\n") as proxy:
            smtp = Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE))
            assert smtp.docmd("EHLO", NAME)[0] == 421
            assert read_all(smtp.sock) == b""
        assert len(mx.messages) == 1


def test_keywords_that_are_hidden(proxy):
    offers = ("PIPELINING", "SIZE 100", "CHUNKING", "AUTH PLAIN", "PIPE_CONNECT", "8BITMIME", "XCLIENT NAME", "VRFY")
    with Mx(starttls=True, extensions=offers) as mx:
        smtp = client(proxy, mx)
        assert set(smtp.esmtp_features) == {"pipelining", "size", "8bitmime"}
        assert smtp.docmd("STARTTLS")[0] == 502
        assert smtp.docmd("BDAT", "0 LAST")[0] == 503
        assert deliver(smtp) == GOOD


def test_a_mail_that_is_pipelined_behind_our_451(mx):
    block = "throttle t {\n    max_delivery_rate 1/hr\n    wait 0s\n}\n"
    with Proxy(SMTP + block) as proxy:
        smtp = client(proxy, mx)
        group = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
        smtp.sock.sendall(group)
        first = [smtp.getreply() for _ in range(3)]
        assert [code for code, _ in first] == [451, 503, 503], "a start begins in debt"
        assert first[0][1].startswith(b"4.7.1 throttle t: again in ")
        assert smtp.docmd("RSET")[0] == 250
        assert smtp.quit()[0] == 221
        line = proxy.wait_line(r"^connection .*outcome=.*").string
        assert "messages=0 accepted=0 deferred=1 rejected=0" in line


# --- limits ---


def test_two_places_serve_five_clients_that_stay_connected(mx):
    # On a busy machine the receiver, which counts, closes late: a place waits for it.
    block = "throttle_close_timeout 1h\nthrottle t {\n    max_concurrent_connections 2\n    wait 30s\n}\n"
    groups = "".join(f"instance m{number} {{\n    share_with x\n}}\n" for number in range(5))
    with Proxy(SMTP + block + groups) as proxy:
        results: dict[int, list[list[int]]] = {}
        peak = [0]

        def sender(number):
            smtp = Smtp(socks5(proxy.socks5, mx.endpoint, SOURCE, user=f"m{number}"))
            smtp.ehlo()
            results[number] = []
            for serial in range(20):
                results[number].append(deliver(smtp, 100 * number + serial))
                peak[0] = max(peak[0], mx.running)
            smtp.quit()

        threads = [threading.Thread(target=sender, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert results == {number: [GOOD] * 20 for number in range(5)}
        assert peak[0] <= 2
        assert sorted(int(message.mail[11:].partition(b"@")[0]) for message in mx.messages) == [
            100 * number + serial for number in range(5) for serial in range(20)
        ]
        assert mx.connects <= 20, "most messages went over connections that were there"


def test_the_rate_counts_messages_and_not_connections(mx):
    block = "throttle t {\n    max_delivery_rate 1/s\n    wait 20s\n}\n"
    with Proxy(SMTP + block) as proxy:
        smtp = client(proxy, mx)
        assert [deliver(smtp, number) for number in range(3)] == [GOOD] * 3
        for _ in range(5):
            client(proxy, mx).quit()  # connections without a message cost nothing of it
        smtp.quit()
        line = proxy.wait_line(r"^connection .* messages=3 .*waited=(\d+\.\d+)")
        assert float(line[1]) > 1.0, "two of them had to wait"


def test_a_message_that_waits_for_its_slot_holds_no_place_that_others_want(mx):
    """One block has the place, another the rate: whoever waits under the second must not block the first."""
    blocks = """\
throttle slow {
    destination 127.0.0.1
    max_delivery_rate 1/hr
    wait 15s
}
throttle places {
    max_concurrent_connections 1
    wait 15s
}
"""
    with Mx(host="127.0.0.2") as other, Proxy(SMTP + blocks) as proxy:
        smtp = client(proxy, mx)
        smtp.putcmd("MAIL FROM:<a@example.com>")
        assert send(socks5(proxy.socks5, other.endpoint, SOURCE), b"x\r\n")[0] == 250
        assert smtp.getreply()[0] == 451


def test_who_waits_at_mail_and_goes_away_leaves_its_turn(mx):
    block = "throttle t {\n    max_delivery_rate 1/hr\n    wait 60s\n}\n"
    with Proxy(SMTP + block) as proxy:
        smtp = client(proxy, mx)
        smtp.putcmd("MAIL FROM:<a@example.com>")
        sharing.wait_for(lambda: proxy.open_connections("socks5") == 1)
        smtp.close()
        proxy.wait_line(r"^connection .*outcome=kept messages=0")
        cached(proxy, 1, mx)


# --- bad clients ---


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
        b"\xff" * 1_000_000,
        b"EHLO client.example\r\n" * 10_000,
        b"NOOP\r\n" * 200_000,
    ],
    ids=["http", "garbage", "ehlo", "noop"],
)
def test_junk_gets_a_reply_of_smtp_and_is_closed(proxy, mx, junk):
    sock = socks5(proxy.socks5, mx.endpoint, SOURCE)
    sender = threading.Thread(target=_send_all, args=(sock, junk))
    sender.start()
    data = b""
    with contextlib.suppress(ConnectionResetError):
        data = read_all(sock)
    sender.join(30)
    assert data.startswith(b"220 ")
    assert b"\r\n421 4.7.0 " in data or len(data) > 1000
    assert not mx.messages
    proxy.wait_line(r"^connection ")


def _send_all(sock, data):
    with contextlib.suppress(OSError):
        sock.sendall(data)


def test_a_megabyte_before_the_greeting_is_not_kept_in_memory():
    with Proxy(SMTP) as proxy, Mx({"greeting": mute}) as mx:
        sock = socks5(proxy.socks5, mx.endpoint, SOURCE)
        before = proxy.rss()
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while sock.send(b"NOOP\r\n" * 10_000):
                pass
        assert proxy.rss() - before < 2_000_000
        reset(sock)
        proxy.wait_line(r"^connection .*outcome=client_reset")


# --- STARTTLS with the client ---


def test_starttls_towards_the_mta():
    with Proxy(SMTP + "mode_smtp_starttls yes\n") as proxy, Mx() as mx:
        smtp = client(proxy, mx)
        smtp._host = "proxy.example"
        assert smtp.has_extn("starttls")
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        assert smtp.starttls(context=context)[0] == 220
        assert smtp.ehlo()[0] == 250
        assert not smtp.has_extn("starttls")
        assert deliver(smtp) == GOOD
        assert smtp.quit()[0] == 221


# --- the program ---


def test_a_stop_tells_idle_clients_and_lets_a_message_finish(mx):
    with Proxy(SMTP + "drain_timeout 20s\n") as proxy:
        idle, busy = client(proxy, mx), client(proxy, mx)
        busy.mail("1@example.com")
        busy.rcpt("b@example.com")
        busy.docmd("DATA")
        proxy.signal(signal.SIGTERM)
        assert idle.getreply()[0] == 421
        busy.sock.sendall(b"x\r\n.\r\n")
        assert busy.getreply()[0] == 250
        assert busy.getreply()[0] == 421
    assert len(mx.messages) == 1


def test_who_had_dialled_before_a_stop_is_told_at_once(mx):
    with Proxy(SMTP + "drain_timeout 20s\n") as proxy:
        busy = client(proxy, mx)
        busy.mail("1@example.com")  # so that the drain waits
        with dial(proxy.proxy_protocol) as late:
            wait_for(lambda: proxy.open_connections() == 2)
            proxy.signal(signal.SIGTERM)
            proxy.wait_line("^drain: ")
            late.sendall(clients.v1(SOURCE, mx.endpoint))
            greeting, goodbye = read_all(late).splitlines()
            assert (greeting[:4], goodbye[:4]) == (b"220 ", b"421 ")
        busy.sock.close()
    assert not mx.messages


def test_a_reload_changes_the_mode_for_new_connections(mx):
    with Proxy("mode tcp\nlisten_tls no\n") as proxy:
        before = socks5(proxy.socks5, mx.endpoint, SOURCE)
        proxy.hup(SMTP)
        smtp = client(proxy, mx)
        assert not smtp.has_extn("starttls"), "mode smtp"
        old = Smtp(before)
        old.ehlo()
        assert old.has_extn("starttls"), "as it was when it began"
        old.quit()
        smtp.quit()


def test_a_reload_that_forbids_the_source_holds_for_the_next_message_of_an_idle_client(mx):
    with Proxy(SMTP) as proxy:
        smtp = client(proxy, mx)
        assert deliver(smtp) == GOOD
        cached(proxy, 1, mx)  # the client has been silent for a while
        proxy.hup(SMTP + "source_ip 127.0.0.7\n")
        code, text = smtp.mail("a@example.com")
        assert (code, b"is not in source_ip" in text) == (421, True)
        proxy.wait_line(r"^WARNING refused .*reason=source_not_allowed")
        assert len(mx.messages) == 1


def test_half_a_dialogue_in_single_bytes(proxy, mx):
    sock = socks5(proxy.socks5, mx.endpoint, SOURCE)
    for byte in b"EHLO client.example\r\nMAIL FROM:<1@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n":
        sock.sendall(bytes((byte,)))
    file = sock.makefile("rb")
    while not file.readline().startswith(b"354"):
        pass
    for byte in b"x\r\n.\r\nQUIT\r\n":
        sock.sendall(bytes((byte,)))
    assert [line[:3] for line in file] == [b"250", b"221"]
    assert mx.messages[0].wire == b"x"


def test_one_line_a_message_where_it_is_wanted(mx):
    with Proxy(SMTP + "log_messages yes\n") as proxy, sharing.instances(proxy, "python") as (python,):
        send(socks5(proxy.socks5, mx.endpoint, SOURCE), b"x\r\n")
        sharing.send(python, mx, 1)
        lines = [proxy.wait_line(rf"^message .*instance={name} .*").string for name in ("mta-1", "python")]
        assert "sender=example.com recipients=example.net rcpts=1 " in lines[0]
        assert lines[0].endswith('size=6 message="250 2.0.0 queued as 0"')
        assert f"local={mx.sessions[0].peer[0]}:{mx.sessions[0].peer[1]} tls=TLSv1.3 " in lines[0]
        assert "to@" not in "".join(lines)
        proxy.wait_line(r"^connection .*protocol=native.* messages=1 accepted=1 deferred=0 rejected=0 waited=0.000$")


def test_a_message_that_we_put_off_ourselves_has_its_line_too(mx):
    """Of no receiver; on a native channel, too."""
    block = "throttle t {\n    max_delivery_rate 1/hr\n    wait 0s\n}\n"
    text = SMTP.replace("listen_tls no\n", "") + "log_messages yes\n" + block
    with Proxy(text) as proxy, channel(proxy.native) as peer:
        smtp = client(proxy, mx)
        smtp.sock.sendall(b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n")
        assert [smtp.getreply()[0] for _ in range(3)] == [451, 503, 503]
        smtp.quit()
        peer.opened(mx.endpoint, ehlo_name=NAME, source=SOURCE)
        peer.data(b"MAIL FROM:<a@native.example>\r\nRCPT TO:<b@example.net>\r\n")
        assert peer.hear_until(b"no message was begun\r\n").startswith(b"451 4.7.1 ")
        for sender in ("example.com", "native.example"):
            line = proxy.wait_line(rf"^message .*sender={sender} .*").string
            assert re.search(r' local=(-|"")? ?tls=', line), line
            assert "recipients=example.net rcpts=1 size=0" in line
            assert 'message="451 4.7.1 throttle t: again in ' in line
