"""Mail through channels arrives byte for byte, and a warm channel costs nothing towards the proxy."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator

import pytest

from tests import independent_client as mta
from tests.clients import stuffed
from tests.independent_client import Peer, channel, deliver, session
from tests.mx import Mx, mute
from tests.program import Proxy
from tests.waiting import wait_for

EHLO = "mta.example.com"
LINE = b"All work and no play makes Jack a dull boy, eight bits: \xe4\xf6\xfc\r\n"
MESSAGES = {
    "nothing": b"",
    "one byte": b"x\r\n",
    "an empty line": b"\r\n",
    "dots": b".\r\n..\r\n...x\r\n. \r\nx.\r\n",
    "a NUL and 8 bits": bytes(byte for byte in range(256) if byte not in (10, 13)) + b"\r\n",
    "a line longer than a record": b"x" * 70_000 + b"\r\n",
    "10 MiB": LINE * (10 * 1024 * 1024 // len(LINE)),
}
FRONTS = {
    "tls and tls": ("", True, "required"),
    "tls and clear": ("", True, "none"),
    "clear and tls": ("listen_tls no\n", False, "required"),
    "clear and clear": ("listen_tls no\n", False, "none"),
}


@pytest.fixture(scope="module")
def mx() -> Iterator[Mx]:
    with Mx(starttls=True) as mx:
        yield mx


@pytest.mark.parametrize(("more", "tls", "mode"), FRONTS.values(), ids=FRONTS)
def test_every_byte_arrives(mx: Mx, more: str, tls: bool, mode: str) -> None:
    with Proxy(more) as proxy, channel(proxy.native, tls=tls) as peer:
        for message in MESSAGES.values():
            before = len(mx.messages)
            peer.opened(mx.endpoint, ehlo_name=EHLO, tls=mode)
            deliver(peer, stuffed(message))
            peer.finish(messages=1)
            assert mx.messages[before].wire + b"\r\n" == (stuffed(message) or b"\r\n")
            assert mx.messages[before].peer[0] == "127.0.0.5"
            assert mx.messages[before].encrypted == (mode == "required")


def test_a_pipelined_raw_session_in_odd_pieces(mx: Mx) -> None:
    """The receiver sees one stream, however it was cut into frames and records."""
    message = stuffed(MESSAGES["dots"]) + LINE * 500
    stream = b"EHLO raw\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.net>\r\nDATA\r\n"
    with Proxy() as proxy, channel(proxy.native) as peer:
        before = len(mx.messages)
        peer.opened(mx.endpoint)
        peer.data(stream)
        while b"354" not in peer.hear_until(b"\r\n"):
            pass
        rest = message + b".\r\nQUIT\r\n"
        for size in range(1, 400):
            if not rest:
                break
            peer.data(rest[: size * 7 % 997 + 1])
            rest = rest[size * 7 % 997 + 1 :]
        peer.say(mta.EOF)
        heard = b""
        while (item := peer.hear())[0] == mta.DATA:
            heard += item[1]
        assert item[0] == mta.EOF
        assert heard.endswith(b"221 2.0.0 bye\r\n")
        peer.finish()
        assert mx.messages[before].wire + b"\r\n" == message


def test_several_instances_at_once(mx: Mx) -> None:
    """Each with its own channels and addresses; nothing is mixed up."""
    failures: list[BaseException] = []
    with Proxy() as proxy:
        before = len(mx.messages)

        def work(number: int) -> None:
            try:
                with channel(proxy.native, instance=f"mta-{number}", run_id=bytes((number,)) * 16) as peer:
                    for turn in range(4):
                        peer.opened(mx.endpoint, source=f"127.0.1.{100 + number}", ehlo_name=EHLO, tls="opportunistic")
                        deliver(peer, b"%d %d\r\n" % (number, turn) + LINE * 2000)
                        peer.finish(messages=1)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not failures, failures
        proxy.wait_idle()
    messages = mx.messages[before:]
    assert sorted((message.peer[0], message.wire.partition(b"\r\n")[0].decode()) for message in messages) == sorted(
        (f"127.0.1.{100 + number}", f"{number} {turn}") for number in range(1, 9) for turn in range(4)
    )
    assert all(message.wire.partition(b"\r\n")[2] + b"\r\n" == LINE * 2000 for message in messages)


def test_a_warm_channel_costs_no_connection_no_tls_and_no_proof(mx: Mx) -> None:
    """Ten sessions on one channel: the kernel has accepted one connection, the proxy has authenticated once."""
    with Proxy() as proxy, channel(proxy.native) as peer:
        at = proxy.native
        for _ in range(10):
            peer.opened(mx.endpoint, ehlo_name=EHLO, tls="required")
            deliver(peer, b"x\r\n")
            peer.finish(messages=1)
        proxy.wait_line(r"^connection ")
        assert proxy.open_connections("native") == 1
        assert peer.sock.getpeername() == at
        clients = {re.search(r"client=(\S+)", line)[1] for line in proxy.matching(r"^connection .*protocol=native")}
        assert clients == {":".join(map(str, peer.sock.getsockname()))}
        assert len(proxy.matching(r"^connection ")) == 10


def test_a_shared_connection_costs_nothing_towards_the_receiver_either() -> None:
    """One instance opens it, another one goes on: one connect, one TLS handshake."""
    with Proxy() as proxy, Mx(starttls=True) as mx:
        request = {"ehlo_name": EHLO, "tls": "required", "reuse": True}
        for number in range(4):
            with channel(proxy.native, instance=f"mta-{number}", run_id=bytes((number,)) * 16) as peer:
                opened = peer.opened(mx.endpoint, **request)
                assert (opened[0], opened[3]) == (number > 0, number)
                assert opened[7][0] == "TLSv1.3"
                deliver(peer, b"%d\r\n" % number)
                assert peer.finish(keep=True, messages=1) == [True, "kept"]
                wait_for(lambda: proxy.status()[-1].endswith("cached=1)"))
        assert (mx.connects, mx.handshakes, len(mx.messages)) == (1, 1, 4)
        with channel(proxy.native) as peer:
            other = peer.opened(mx.endpoint, **request | {"tenant": "somebody"})
            assert other[0] is False


@pytest.mark.parametrize(
    ("said", "reasons"),
    [
        (b"MAIL FROM:<a@example.com>\r\n", {"kept"}),
        (b"QUIT\r\n", {"quit_seen", "peer_closed"}),  # whether the receiver's FIN is here yet
        (b"XYZZY\r\n", {"unknown_verb_seen"}),
        (b"EHLO again\r\n", {"hello_seen"}),
    ],
)
def test_what_is_not_clean_is_not_kept(said: bytes, reasons: set[str]) -> None:
    with Proxy() as proxy, Mx() as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name=EHLO, reuse=True)
        peer.data(said)
        peer.hear_until(b"\r\n")
        kept, reason = peer.finish(keep=True)
        assert reason in reasons
        assert kept == (reason == "kept")


def test_an_offer_with_a_reply_outstanding() -> None:
    with Proxy() as proxy, Mx({"noop": mute}) as mx, channel(proxy.native) as peer:
        peer.opened(mx.endpoint, ehlo_name=EHLO, reuse=True)
        peer.data(b"NOOP\r\n")
        wait_for(lambda: b"NOOP" in mx.sessions[0].commands)
        assert peer.finish(keep=True) == [False, "replies_outstanding"]


def test_mail_goes_on_over_one_flight_channels(mx: Mx) -> None:
    with Proxy() as proxy, session(proxy.native) as control:
        hashes = control.expect(mta.CERT)[1]
        for counter in range(1, 4):
            with Peer(proxy.native) as peer:
                assert peer.certificate in hashes
                before = len(mx.messages)
                peer.sock.sendall(peer.channel_auth(control.welcome, counter))
                peer.opened(mx.endpoint, ehlo_name=EHLO)
                deliver(peer, os.urandom(2000).replace(b"\r", b"").replace(b"\n", b"").replace(b".", b"") + b"\r\n")
                assert len(mx.messages) == before + 1
