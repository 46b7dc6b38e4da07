"""Mail through each standard door arrives byte for byte, and a receiver that misbehaves is seen as it is."""

import random
import socket
import threading

import pytest

from tests import clients, mx
from tests.clients import DOORS, dial, exactly, read_all, was_reset
from tests.mx import Mx
from tests.program import Proxy
from tests.sinks import GREETING, Raw, Sink, echo
from tests.waiting import wait_for

SOURCE = "127.0.0.91"


@pytest.fixture(scope="module")
def proxy():
    with Proxy("idle_timeout 60s\n") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def sink():
    with Sink() as sink:
        yield sink


@pytest.fixture(params=DOORS)
def door(request, proxy):
    """(destination, source) → a socket on which the receiver speaks next."""
    return lambda destination, source=SOURCE: DOORS[request.param](proxy, destination, source)


def lines_of(total, seed):
    """A message of random bytes without CR and LF in lines of at most 998."""
    rng = random.Random(seed)
    table = bytes(byte if byte not in b"\r\n\x00" else 65 for byte in range(256))
    return b"\r\n".join(rng.randbytes(900).translate(table) for _ in range(total // 902)) + b"\r\n"


MESSAGES = {
    "empty": b"",
    "one_byte": b"x\r\n",
    "only_crlf": b"\r\n",
    "dots": b".\r\n..\r\n...x\r\n\r\n.\r\nSubject: .\r\n. \r\n",
    "eight_bit": bytes(range(128, 256)) + b"\r\n",
    "ten_megabytes": lines_of(10_000_000, 1),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_arrives_as_it_was(door, sink, name):
    before = len(sink.messages)
    assert clients.send(door(sink.endpoint), MESSAGES[name])[0] == 250
    (message,) = sink.messages[before:]
    assert message.content == MESSAGES[name]
    assert message.peer[0] == SOURCE


@pytest.mark.parametrize("name", ["empty", "one_byte", "dots"])
def test_a_pipelined_message_in_one_write(door, name):
    """RFC 2920, and bolder: the client waits for nothing but the greeting."""
    message = MESSAGES[name]
    dialogue = b"EHLO me\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
    with Mx(host="127.0.0.2") as receiver, door(receiver.endpoint) as sock:
        assert exactly(sock, 4) == b"220 "
        sock.sendall(dialogue + clients.stuffed(message) + b".\r\nQUIT\r\n")
        said = read_all(sock)
        assert said.endswith(b"250 2.0.0 queued as 0\r\n221 2.0.0 bye\r\n")
        assert receiver.messages[0].wire + b"\r\n" == (clients.stuffed(message) or b"\r\n")
        assert receiver.messages[0].peer[0] == SOURCE


def test_many_at_once(proxy, sink):
    """Three doors, sixteen clients, a source of its own for each."""
    failures = []
    before = len(sink.messages)

    def client(number):
        try:
            for message in range(4):
                door = list(DOORS.values())[(number + message) % len(DOORS)]
                content = lines_of(30_000, number * 100 + message)
                clients.send(
                    door(proxy, sink.endpoint, f"127.0.3.{number}"), content, f"{number}.{message}@example.net"
                )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    messages = sink.messages[before:]
    assert len(messages) == 64
    for message in messages:
        number, attempt = map(int, message.rcpt_tos[0].partition("@")[0].split("."))
        assert message.content == lines_of(30_000, number * 100 + attempt)
        assert message.peer[0] == f"127.0.3.{number}"


# -- how it ends is passed on as it was


def test_half_close_by_the_client(proxy, door):
    """The receiver sees the end of the file and can still answer."""
    seen = []

    def serve(sock):
        seen.append(read_all(sock))
        sock.sendall(b"the answer comes later")
        sock.shutdown(socket.SHUT_WR)

    with Raw(serve) as receiver, door(receiver.endpoint) as sock:
        sock.sendall(b"last words")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b"the answer comes later"
        assert seen == [b"last words"]
        proxy.wait_line(rf"^connection .*:{receiver.endpoint[1]} .* up=10 down=22 .*outcome=client_closed")


def test_half_close_by_the_receiver(proxy, door):
    seen = []

    def serve(sock):
        sock.sendall(b"421 bye\r\n")
        sock.shutdown(socket.SHUT_WR)
        seen.append(read_all(sock))

    with Raw(serve) as receiver, door(receiver.endpoint) as sock:
        assert read_all(sock) == b"421 bye\r\n"
        sock.sendall(b"QUIT\r\n" * 1000)
        sock.shutdown(socket.SHUT_WR)
        proxy.wait_line(rf"^connection .*:{receiver.endpoint[1]} .* up=6000 down=9 .*outcome=greeting_4xx")
        assert wait_for(lambda: seen, what="the receiver has read it all") == [b"QUIT\r\n" * 1000]


def test_a_reset_by_the_client(proxy, door):
    ends = []

    def serve(sock):
        sock.sendall(GREETING)
        ends.append(was_reset(sock))

    with Raw(serve) as receiver:
        sock = door(receiver.endpoint)
        assert exactly(sock, 8) == GREETING
        clients.reset(sock)
        wait_for(lambda: ends, what="the receiver's end")
        proxy.wait_line(rf"^connection .*:{receiver.endpoint[1]} .*outcome=client_reset")
    assert ends == [True]


def test_a_reset_by_the_receiver(proxy, door):
    with Mx({"ehlo": mx.reset}) as receiver, door(receiver.endpoint) as sock:
        sock.sendall(b"EHLO me\r\n")
        assert was_reset(sock)
        proxy.wait_line(rf"^connection .*:{receiver.endpoint[1]} .*outcome=upstream_reset")


# -- receivers that misbehave


@pytest.mark.parametrize(
    "greeting",
    [b"554 5.7.1 go away\r\n", b"421 4.3.2 busy\r\n", b"\x00\xff\x1b[31m\x07 garbage", b"220-a\r\n" * 9999, b""],
)
def test_a_strange_greeting_arrives_as_it_is(door, greeting):
    def serve(sock):
        sock.sendall(greeting)
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)

    with Raw(serve) as receiver, door(receiver.endpoint) as sock:
        assert read_all(sock) == greeting


def test_closed_in_the_middle_of_data(proxy, door):
    """The client must not see anything that could be taken for an acceptance."""
    with Mx({"body": mx.close}) as receiver, door(receiver.endpoint) as sock:
        assert exactly(sock, 4) == b"220 "
        sock.sendall(b"EHLO me\r\nMAIL FROM:<>\r\nRCPT TO:<a@example.net>\r\nDATA\r\n")
        said = b""
        while b"354" not in said:
            said += sock.recv(4096)
        try:
            sock.sendall(b"Subject: half\r\n")
            said = read_all(sock)
        except OSError:
            said = b""
        assert b"250" not in said
        sock.close()
        proxy.wait_line(rf"^connection .*:{receiver.endpoint[1]} .*outcome=upstream_(closed|reset)")


def test_a_receiver_that_reads_nothing_holds_only_its_own_client(proxy, door):
    """Back-pressure end to end: what the client cannot send stays with the client, not in our memory."""
    before = proxy.rss()
    with (
        Raw(receive_buffer=4096) as deaf,
        Raw(echo) as healthy,
        door(deaf.endpoint) as stuck,
        door(healthy.endpoint) as other,
    ):
        stuck.settimeout(0)
        sent = refusals = 0
        chunk = bytes(65536)
        while refusals < 20:
            try:
                sent += stuck.send(chunk)
                refusals = 0
            except BlockingIOError:
                refusals += 1
                other.sendall(b"?")
                assert exactly(other, 1) == b"?"
        assert sent < 32 * 1024 * 1024
        assert proxy.rss() - before < 4 * 1024 * 1024
        # The window opens again: nothing was lost.
        read = 0
        wait_for(lambda: deaf.sockets, what="the receiver")
        while read < sent:
            read += len(deaf.sockets[0].recv(1 << 20))
        assert read == sent
        other.shutdown(socket.SHUT_WR)
        assert read_all(other) == b""


def test_a_receiver_that_reads_nothing_and_a_client_that_gives_up(proxy):
    """The reset must reach the receiver although its window is closed."""
    with Raw(receive_buffer=4096) as deaf:
        sock = DOORS["socks5"](proxy, deaf.endpoint, SOURCE)
        sock.settimeout(0)
        try:
            while True:
                sock.send(bytes(65536))
        except BlockingIOError:
            clients.reset(sock)
        proxy.wait_line(rf"^connection .*:{deaf.endpoint[1]} .*outcome=client_reset")


def test_idle_timeout():
    """No byte for so long: both sides are reset, and the log says why."""
    with Proxy("idle_timeout 400ms\n") as proxy, Raw() as receiver, Raw(receive_buffer=4096) as deaf:
        silent = DOORS["socks5"](proxy, receiver.endpoint, SOURCE)
        stuck = DOORS["proxy_v2"](proxy, deaf.endpoint, SOURCE)
        stuck.settimeout(0)
        try:
            while True:
                stuck.send(bytes(65536))
        except BlockingIOError:
            stuck.settimeout(clients.TIMEOUT)
        with silent, stuck:
            assert was_reset(silent)
            assert was_reset(stuck)
            assert was_reset(receiver.sockets[0])
        proxy.wait_line(rf"^connection .*:{receiver.endpoint[1]} .*up=0 down=0 .*outcome=idle_timeout")
        proxy.wait_line(rf"^connection .*:{deaf.endpoint[1]} .*outcome=idle_timeout")


def test_the_proxys_answer_comes_before_the_receiver_speaks(proxy):
    """A SOCKS5 client that sends first (an SMTPS client, say) is served, too."""
    with Raw(echo) as receiver, DOORS["socks5"](proxy, receiver.endpoint, SOURCE) as sock:
        sock.sendall(b"\x16\x03\x01")
        assert exactly(sock, 3) == b"\x16\x03\x01"


def test_the_whole_state_goes_away(proxy):
    """After all of the above nothing is left over."""
    proxy.wait_idle()
    fds = proxy.fds()
    with Raw(lambda sock: sock.sendall(GREETING)) as receiver:
        for door in DOORS.values():
            with door(proxy, receiver.endpoint, SOURCE) as sock:
                assert exactly(sock, 8) == GREETING
    proxy.wait_idle()
    assert proxy.fds() == fds


def test_random_bytes_at_both_doors(proxy):
    rng = random.Random(5)
    for endpoint in (proxy.socks5, proxy.proxy_protocol) * 30:
        with dial(endpoint) as sock:
            try:
                sock.sendall(rng.randbytes(rng.choice((1, 3, 20, 600, 9000))))
                sock.shutdown(socket.SHUT_WR)
                read_all(sock)
            except ConnectionResetError:
                pass
    proxy.wait_idle()
