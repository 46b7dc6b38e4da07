"""An agent: the program on the MTA's machine, which goes out through another proxy (`via`)."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from tests import clients
from tests.clients import dial, proxied, read_all, socks5, v1, was_reset
from tests.mx import Mx, say, stall
from tests.peers import MESSAGE
from tests.program import SECRET, Address, Proxy
from tests.sinks import Raw, Sink, closed_port, deaf_port, echo, greet
from tests.waiting import wait_for

SOURCE = "127.0.0.14"
#: The agent has no native listener, and no throttles.
AGENT = f"""\
listen_socks5 127.0.2.2:0
listen_proxy_protocol 127.0.2.3:0
allow_from 127.0.0.0/8, ::1/128
allow_destination 127.0.0.0/8, ::1/128
destination_port 1-65535
auth_shared_secret "{SECRET}"
via_secret "{SECRET}"
via_instance box-1
drain_timeout 2s
stats_interval 1h
"""


@contextlib.contextmanager
def agent(*proxies: Address, more: str = "", **options: object) -> Iterator[Proxy]:
    via = "via " + ", ".join(f"{host}:{port}" for host, port in proxies) + "\n"
    with Proxy(via + more, AGENT, **options) as program:  # type: ignore[arg-type]
        yield program


@pytest.fixture(params=["yes", "no"], ids=["tls", "clear"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Proxy, Proxy]]:
    with (
        Proxy(f"listen_tls {request.param}\n") as proxy,
        agent(proxy.native, more=f"via_tls {request.param}\n") as front,
    ):
        yield front, proxy


def test_mail_arrives_from_the_address_that_was_asked_for(pair: tuple[Proxy, Proxy]) -> None:
    front, proxy = pair
    with Sink() as mx:
        for _ in range(3):
            assert clients.send(socks5(front.socks5, mx.endpoint, SOURCE), MESSAGE)[0] == 250
            assert clients.send(proxied(front.proxy_protocol, mx.endpoint, SOURCE, v1), MESSAGE)[0] == 250
    assert [(message.content == MESSAGE, message.peer[0]) for message in mx.messages] == [(True, SOURCE)] * 6
    front.wait_line(
        rf"^connection .*instance=mta-1 protocol=socks5 .*source={SOURCE} .*outcome=(client|upstream)_closed"
    )
    proxy.wait_line(rf"^connection .*instance=box-1 protocol=native .*source={SOURCE} ")
    # One after another: a channel, or a second one where the first had not heard ENDED yet; they stay.
    line = rf"listener\({proxy.native[0]}:{proxy.native[1]}\): open_connections=[12]"
    assert [each for each in proxy.status() if re.fullmatch(line, each)]
    front.wait_idle()


def test_a_socks_client_is_told_the_real_local_address(pair: tuple[Proxy, Proxy]) -> None:
    front, _ = pair
    with Raw(greet) as mx, dial(front.socks5) as sock:
        sock.sendall(clients.WITH_PASSWORD)
        assert sock.recv(2) == b"\x05\x02"
        sock.sendall(clients.login())
        assert sock.recv(2) == b"\x01\x00"
        sock.sendall(clients.bind_request(SOURCE))
        assert sock.recv(10) == b"\x05\x00\x00" + clients.address(SOURCE, 0)
        sock.sendall(clients.connect_request(mx.endpoint))
        reply = clients.exactly(sock, 10)
        wait_for(lambda: mx.peers)
        assert reply == b"\x05\x00\x00" + clients.address(*mx.peers[0])


def test_much_both_ways_and_half_closes(pair: tuple[Proxy, Proxy]) -> None:
    front, _ = pair
    data = bytes(range(256)) * 20_000  # 5 MB: more than all buffers on the way
    with Raw(echo) as mx, socks5(front.socks5, mx.endpoint) as sock:
        sock.settimeout(30)
        received = bytearray()
        sent = 0
        sock.setblocking(False)
        while sent < len(data):
            with contextlib.suppress(BlockingIOError):
                sent += sock.send(data[sent : sent + 65536])
            with contextlib.suppress(BlockingIOError):
                received += sock.recv(65536)
        sock.setblocking(True)
        sock.shutdown(socket.SHUT_WR)
        received += read_all(sock)
    assert bytes(received) == data
    front.wait_line(r"outcome=client_closed")


@pytest.mark.parametrize("who", ["client", "receiver"])
def test_a_reset_travels_on(pair: tuple[Proxy, Proxy], who: str) -> None:
    front, proxy = pair
    seen = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"220 mx.example\r\n")
        if who == "client":
            if was_reset(sock):
                seen.set()
        elif seen.wait(30):
            clients.reset(sock)

    with Raw(serve) as mx, socks5(front.socks5, mx.endpoint) as sock:
        assert clients.exactly(sock, 16) == b"220 mx.example\r\n"
        if who == "client":
            clients.reset(sock)
            assert seen.wait(30)
        else:
            seen.set()
            assert was_reset(sock)
        front.wait_line(rf"outcome={'client' if who == 'client' else 'upstream'}_reset")
    front.wait_idle()
    proxy.wait_idle()


def test_what_the_proxy_refuses_is_refused_here(pair: tuple[Proxy, Proxy]) -> None:
    front, proxy = pair
    with closed_port() as nobody:
        with pytest.raises(clients.Refused) as refused:
            socks5(front.socks5, nobody)
        assert refused.value.args[0][1] == 5  # connection refused
        with dial(front.proxy_protocol) as sock:
            sock.sendall(v1(SOURCE, nobody))
            assert read_all(sock).startswith(b"421 4.4.1 ")
    with Raw(greet) as mx, pytest.raises(clients.Refused) as refused:
        socks5(front.socks5, mx.endpoint, "192.0.2.77")
    assert refused.value.args[0][1] == 2  # not allowed: it is not in the proxy's source_ip
    front.wait_line(r"^WARNING refused .*reason=source_not_allowed")
    front.wait_idle()
    wait_for(lambda: "active=0" in proxy.status()[-1])


def test_a_proxy_that_is_away_is_not_now_and_the_next_one_is_taken() -> None:
    with closed_port() as dead, Sink() as mx:
        with agent(dead) as front:
            with pytest.raises(clients.Refused) as refused:
                socks5(front.socks5, mx.endpoint)
            assert refused.value.args[0][1] == 1
            with dial(front.proxy_protocol) as sock:
                sock.sendall(v1(SOURCE, mx.endpoint))
                assert read_all(sock).startswith(b"421 4")
            assert front.wait_line(rf"^refused .*reason=via_unavailable .*via {dead[0]}:{dead[1]}: ")
        with Proxy() as proxy, agent(dead, proxy.native) as front:
            for _ in range(2):
                assert clients.send(socks5(front.socks5, mx.endpoint, SOURCE), MESSAGE)[0] == 250


def test_back_by_itself_when_the_proxy_is() -> None:
    with Sink() as mx, Proxy() as proxy, agent(proxy.native) as front:
        assert clients.send(socks5(front.socks5, mx.endpoint, SOURCE), MESSAGE)[0] == 250
        port = proxy.native[1]
        proxy.term()
        proxy.wait_exit()
        with pytest.raises(clients.Refused):
            socks5(front.socks5, mx.endpoint)
        with Proxy(f"listen 127.0.1.1:{port}\n"):
            assert clients.send(socks5(front.socks5, mx.endpoint, SOURCE), MESSAGE)[0] == 250


def test_a_wrong_secret_is_told_to_the_operator() -> None:
    with Proxy() as proxy, Sink() as mx, agent(proxy.native, more=f'via_secret "{"wrong" * 8}"\n') as front:
        with pytest.raises(clients.Refused):
            socks5(front.socks5, mx.endpoint)
        front.wait_line(r"it refuses us as box-1: .*unknown instance or wrong secret")


def test_a_client_that_goes_away_meanwhile_leaves_nothing_behind() -> None:
    with deaf_port() as silent, Proxy() as proxy, agent(proxy.native) as front:
        sock = dial(front.proxy_protocol)
        sock.sendall(v1(SOURCE, silent))
        wait_for(lambda: proxy.status()[-1].startswith("direct_remote_smtp") and "active=1" in proxy.status()[-1])
        clients.reset(sock)
        front.wait_idle()
        wait_for(lambda: "active=0" in proxy.status()[-1])


@pytest.mark.parametrize("answer_within", ["100ms", "700s"])
def test_the_other_proxy_has_the_time_that_the_client_has(answer_within: str) -> None:
    """By SOCKS it would be 50 s, and this test would end before; more than an OPEN may say is no error."""
    block = f"instance mta-1 {{\n    answer_within {answer_within}\n}}\n"
    with deaf_port() as silent, Raw(greet) as mx, Proxy() as proxy, agent(proxy.native, more=block) as front:
        if answer_within == "700s":
            with socks5(front.socks5, mx.endpoint, SOURCE) as sock:
                assert clients.exactly(sock, 3) == b"220"
        else:
            with pytest.raises(clients.Refused):
                socks5(front.socks5, silent, SOURCE)
            proxy.wait_line(r"instance=box-1 .*timed out")


def test_a_stop_of_the_agent_waits_for_what_is_open() -> None:
    with Raw(echo) as mx, Proxy() as proxy, agent(proxy.native, more="drain_timeout 20s\n") as front:
        with socks5(front.socks5, mx.endpoint) as sock:
            front.term()
            front.wait_line(r"^drain: ")
            sock.sendall(b"still here\r\n")
            assert clients.exactly(sock, 12) == b"still here\r\n"
        front.wait_exit()
        assert front.matching("reset_connections=0")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("via 127.0.1.1:807\n", "via_secret is required with it"),
        ("via_instance a\n", "has no effect without via"),
    ],
)
def test_what_cannot_be(text: str, says: str) -> None:
    base = "\n".join(line for line in AGENT.splitlines() if not line.startswith("via")) + "\n"
    with Proxy(text, base, ready=False, exit_code=78) as program:
        program.wait_exit()
        assert says in "\n".join(program.lines)


# -- mode smtp: the dialogue is the other proxy's --

NAME = "client.example"  # what tests.clients says in EHLO
SHARES = f"source here {{\n    ip {SOURCE}\n    ehlo {NAME}\n}}\n"


@pytest.fixture
def mediated() -> Iterator[tuple[Proxy, Proxy]]:
    block = "throttle slow {\n    max_concurrent_connections 1\n    wait 10s\n}\n"
    with Proxy(SHARES + block) as proxy, agent(proxy.native, more="mode smtp\n") as front:
        yield front, proxy


def test_messages_of_an_agent_share_one_connection_and_one_handshake(mediated: tuple[Proxy, Proxy]) -> None:
    front, _ = mediated
    with Mx(starttls=True) as mx:
        for number in range(4):
            door = (socks5, proxied)[number % 2]
            where = (front.socks5, front.proxy_protocol)[number % 2]
            sock = door(where, mx.endpoint, SOURCE)
            assert clients.send(sock, MESSAGE)[0] == 250
        assert (mx.connects, mx.handshakes) == (1, 1)
        assert [message.content == MESSAGE for message in mx.messages] == [True] * 4


def test_an_agents_mta_waits_at_mail_and_is_told_not_now() -> None:
    rate = "throttle slow {\n    max_delivery_rate 1/hr\n    wait 200ms\n}\n"
    # A limit begins as if its last slot had just been given out: the first one is an hour away.
    with Proxy(SHARES + rate) as proxy, agent(proxy.native, more="mode smtp\n") as front, Mx() as mx:
        smtp = clients.Smtp(socks5(front.socks5, mx.endpoint, SOURCE))
        smtp.ehlo(NAME)
        code, text = smtp.mail("from@example.com")
        assert (code, text[:5]) == (451, b"4.7.1")
        assert smtp.docmd("QUIT")[0] == 221
        smtp.close()
        assert b"slow" in text


def test_a_receiver_that_refuses_is_heard_through_an_agent(mediated: tuple[Proxy, Proxy]) -> None:
    front, _ = mediated
    with closed_port() as nobody, pytest.raises(clients.Refused) as refused:
        socks5(front.socks5, nobody)
    assert refused.value.args[0][1] == 5
    with Mx({"greeting": [say(b"554 5.7.1 go away\r\n")]}) as mx, socks5(front.socks5, mx.endpoint, SOURCE) as sock:
        assert read_all(sock).startswith(b"554 5.7.1 go away")
    front.wait_idle()


def test_a_client_of_an_agent_that_is_reset_in_the_middle_of_a_message(mediated: tuple[Proxy, Proxy]) -> None:
    front, proxy = mediated
    with Mx() as mx:
        sock = socks5(front.socks5, mx.endpoint, SOURCE)
        smtp = clients.Smtp(sock)
        smtp.ehlo(NAME)
        smtp.mail("a@example.com")
        smtp.rcpt("b@example.net")
        smtp.docmd("DATA")
        smtp.send(b"Subject: half\r\n\r\nof a mess")
        smtp.file.close()  # or the socket would stay open
        clients.reset(sock)
        front.wait_idle()
        wait_for(lambda: "active=0" in proxy.status()[-1])
        assert mx.messages == []
        # What is left works.
        assert clients.send(socks5(front.socks5, mx.endpoint, SOURCE), MESSAGE)[0] == 250


def test_an_agents_client_that_gives_up_on_a_receiver_that_takes_nothing(pair: tuple[Proxy, Proxy]) -> None:
    """More is under way than all kernels between take: the agent's FIN would stand behind it for minutes."""
    front, proxy = pair
    gate = threading.Event()

    def serve(sock: socket.socket) -> None:
        sock.sendall(b"220 mx.example\r\n")
        gate.wait(60)

    with Raw(serve, receive_buffer=4096) as mx:
        try:
            sock = socks5(front.socks5, mx.endpoint, SOURCE)
            sock.settimeout(1.0)
            with contextlib.suppress(TimeoutError):
                while True:
                    sock.sendall(bytes(65536))
            clients.reset(sock)
            proxy.wait_line(r"^connection .*protocol=native .*outcome=client_reset")
            wait_for(lambda: "active=0" in proxy.status()[-1], what="the place is free")
        finally:
            gate.set()


@pytest.mark.parametrize("mode", ["tcp", "smtp"])
def test_an_agent_that_is_killed_while_a_receiver_takes_nothing(mode: str) -> None:
    """Its FIN is not seen: see PROBE in docs/protocol.md."""
    with (
        Proxy(SHARES) as proxy,
        agent(proxy.native, more=f"mode {mode}\n", exit_code=-signal.SIGKILL) as front,
        Mx({"data": say(b"354 go on\r\n", stall)}) as mx,
        socks5(front.socks5, mx.endpoint, SOURCE) as sock,
    ):
        smtp = clients.Smtp(sock)
        smtp.ehlo(NAME)
        smtp.mail("a@example.com")
        smtp.rcpt("b@example.net")
        assert smtp.docmd("DATA")[0] == 354
        sock.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            while True:
                sock.sendall(bytes(65536))
        front.signal(signal.SIGKILL)
        proxy.wait_line(r"^connection .*protocol=native .*outcome=client_reset", 60)
        wait_for(lambda: "active=0" in proxy.status()[-1], what="the place is free")
