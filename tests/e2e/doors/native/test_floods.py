"""Peers that do not wait and do not stop, at the doors of the program: what they get, and that others are served."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

import pytest

from tests.certificates import server_context
from tests.clients import exactly, socks5
from tests.independent_client import (
    DATA,
    END,
    FAILED,
    OPEN,
    Peer,
    channel,
    error_of,
    frame,
    pack,
    session,
)
from tests.program import Proxy
from tests.sinks import Sink
from tests.tls_records import KeyLog

REFUSED = ("10.0.0.25", 25)  # private
_PING, _PONG, _REG, _LIMIT = 0x20, 0x21, 0x23, 0x2A


@pytest.fixture(scope="module")
def proxy():
    with Proxy("listen_status 127.0.1.4:0\n") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def sink():
    with Sink() as sink:
        yield sink


def _open(*destination: object) -> bytes:
    return frame(OPEN, pack(["127.0.0.5", [destination], None, "none", None, False, False, [], 10_000]))


def test_opens_behind_each_other_are_a_protocol_error(proxy: Proxy) -> None:
    with channel(proxy.native) as peer:
        peer.sock.sendall(_open(*REFUSED) * 3)
        assert error_of(peer) == "bad_protocol"


def test_anything_while_an_open_is_served_is_a_protocol_error(proxy: Proxy, sink: Sink) -> None:
    with channel(proxy.native) as peer:
        peer.sock.sendall(_open(*sink.endpoint) + frame(DATA, b"EHLO too-early\r\n"))
        assert error_of(peer) == "bad_protocol"


def test_an_open_behind_end_is_served(proxy: Proxy, sink: Sink) -> None:
    """The one that need not wait: protocol.md, section 7."""
    with channel(proxy.native) as peer:
        peer.opened(sink.endpoint)
        peer.sock.sendall(frame(END, pack([False, 0])) + _open(*REFUSED))
        while (heard := peer.hear())[0] != FAILED:
            pass
        assert heard[1][1] == "destination_not_allowed"


def test_who_waits_for_each_refusal_gets_each(proxy: Proxy) -> None:
    with channel(proxy.native) as peer:
        for _ in range(7):
            assert peer.failed(REFUSED)[1] == "destination_not_allowed"


def test_bytes_in_the_smallest_frames_arrive(proxy: Proxy) -> None:
    """All of them, in order, and in far fewer pieces than frames."""
    payload = bytes(range(256)) * 200
    pieces: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, channel(proxy.native, tls=True) as peer:
        peer.opened(listener.getsockname())
        receiver, _ = listener.accept()

        def read() -> None:
            while sum(map(len, pieces)) < len(payload):
                pieces.append(receiver.recv(65536))

        reader = threading.Thread(target=read)
        reader.start()
        peer.sock.sendall(b"".join(frame(DATA, payload[at : at + 1]) for at in range(len(payload))))
        reader.join(30)
        receiver.close()
    assert b"".join(pieces) == payload
    assert len(pieces) < len(payload) // 50


def test_pings_by_the_thousand_leave_the_session_alive(proxy: Proxy) -> None:
    with session(proxy.native) as peer:
        incarnation = peer.welcome[1]
        peer.sock.sendall(frame(_PING, pack([incarnation, 1])) * 5400 + frame(_PING, pack([incarnation, 2])))
        while not ((heard := peer.hear())[0] == _PONG and heard[1][1] == 2):
            pass


def test_a_stranger_who_says_nothing_in_tls_is_sent_away(proxy: Proxy) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    mark = len(proxy.lines)
    with KeyLog(context) as log, context.wrap_socket(socket.create_connection(proxy.native, 30)) as sock:
        flood = log.records(sock, "CLIENT").key_updates(5000)
        with socket.socket(fileno=sock.detach()) as raw:
            raw.settimeout(30)
            raw.sendall(flood)
            proxy.wait_line("too much TLS without a byte of content", since=mark)


@pytest.mark.parametrize("cached", [False, True])
def test_a_receiver_that_says_nothing_in_tls_costs_its_own_client_only(proxy: Proxy, cached: bool) -> None:
    context = server_context("valid")
    context.num_tickets = 0
    flooded = threading.Event()
    mark = len(proxy.lines)
    with KeyLog(context) as log, socket.create_server(("127.0.0.1", 0)) as listener:

        def receive() -> None:
            sock, _ = listener.accept()
            for said in (b"220 mx\r\n", b"250-mx\r\n250 STARTTLS\r\n", b"220 go\r\n"):
                sock.sendall(said)
                if not said.startswith(b"220 go"):
                    sock.recv(4096)
            secure = context.wrap_socket(sock, server_side=True)
            records = log.records(secure, "SERVER")
            secure.recv(4096)
            with socket.socket(fileno=secure.detach()) as raw:
                if cached:
                    raw.sendall(records.data(b"250 mx\r\n"))
                    raw.recv(4096)
                    raw.sendall(records.data(b"250 ok\r\n"))
                raw.settimeout(30)
                with contextlib.suppress(OSError):
                    raw.sendall(records.tickets(100_000))
                    while raw.recv(4096):
                        pass
                flooded.set()

        thread = threading.Thread(target=receive)
        thread.start()
        with channel(proxy.native) as peer:
            asked = {"ehlo_name": "mta.example", "tls": "required", "reuse": True}
            if cached:
                peer.opened(listener.getsockname(), **asked)
                peer.finish(keep=True)
            else:
                assert peer.failed(listener.getsockname(), **asked)[:2] == ["ehlo", "upstream_failed"]
            assert flooded.wait(30), proxy.lines[mark:]
            thread.join(30)


def test_forty_readers_of_a_page_have_it_from_one_rendering(proxy: Proxy) -> None:
    """The same view for all: what it says of its age does not differ."""
    with session(proxy.native, instance="many") as peer:
        incarnation = peer.welcome[1]
        for at in range(0, 500, 250):
            paths = [[id, "127.0.0.5", [[f"throttle-{id}", [[3600, 3600]]]]] for id in range(at, at + 250)]
            peer.say(_REG, incarnation, paths)
        told = 0
        while told < 500:
            kind, fields = peer.hear()
            told += len(fields[1]) if kind == _LIMIT else 0
        readers = [socket.create_connection(proxy.door("status"), 30) for _ in range(40)]
        pages = []
        for reader in readers:
            reader.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        for reader in readers:
            with reader:
                pages.append(b"".join(iter(lambda reader=reader: reader.recv(65536), b"")).partition(b"\r\n\r\n")[2])
    assert all(page.endswith(b"</html>\n") for page in pages)
    assert b"throttle-499" in pages[0] or b"more are not shown" in pages[0]
    assert len(set(pages)) <= 3


def test_others_are_served_meanwhile(proxy: Proxy, sink: Sink) -> None:
    """Somebody who opens a connection while three channels send frames of a byte for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peers: list[Peer] = []
        over = threading.Event()

        def flood(peer: Peer) -> None:
            data = frame(DATA, b"x") * 5000
            with contextlib.suppress(OSError):
                while not over.is_set():
                    peer.sock.sendall(data)

        def drain(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):
                while sock.recv(65536):
                    pass

        threads = []
        for _ in range(3):
            peers.append(channel(proxy.native))
            peers[-1].opened(listener.getsockname())
            threads.append(threading.Thread(target=drain, args=(listener.accept()[0],)))
        threads += [threading.Thread(target=flood, args=(peer,)) for peer in peers]
        for thread in threads:
            thread.start()
        for _ in range(5):
            with socks5(proxy.socks5, sink.endpoint) as sock:
                assert exactly(sock, 3) == b"220"
        over.set()
        for thread in threads[3:]:
            thread.join(30)
        for peer in peers:
            peer.sock.close()
        for thread in threads[:3]:
            thread.join(30)
