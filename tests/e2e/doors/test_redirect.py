"""The redirect door: what the kernel sends us instead of the receiver, on a real nftables in a network of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests import clients, peers
from tests.peers import MESSAGE
from tests.program import Proxy
from tests.sinks import Sink
from tests.waiting import wait_for

FIRST, OTHER, SIX = "198.51.100.7", "198.51.100.8", "2001:db8:7::25"
BOUND, LOCAL, LOCAL_SIX = "192.0.2.1", "192.0.2.9", "2001:db8:1::9"
# To an address of this machine, which the receivers have here, one connects from that address.
CONFIG = f"""\
listen_redirect 127.0.0.1:2525, [::1]:2525
allow_from 127.0.0.0/8, ::1, 192.0.2.0/24, 2001:db8:1::/64, 198.51.100.0/24, 2001:db8:7::/64
source_ip {BOUND}, 192.0.2.2, 2001:db8:1::1
default_source_ip 192.0.2.2, 2001:db8:1::1
allow_destination 198.51.100.0/24, 2001:db8:7::/64
"""
#: Sends one message as somebody else than root; what it prints is the reply, or the greeting that was no greeting.
SENDER = """
import encodings.idna, os, smtplib, sys  # all before it may no longer read our files
os.setuid(int(sys.argv[1]))
source = (sys.argv[3], 0) if len(sys.argv) > 3 else None
smtp = smtplib.SMTP(local_hostname="mta.example", timeout=30, source_address=source)
code, text = smtp.connect(sys.argv[2], 25)
if code == 220:
    smtp.sendmail("from@example.com", ["to@example.net"], sys.stdin.buffer.read())
    smtp.quit()
print(code, text.decode())
"""
MTA = 1234


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.getuid():
        pytest.skip("a network namespace wants root, and this user is not")


def network(*rules: str) -> None:
    """Addresses on loopback and the snippet's rules, applied twice as an operator may."""
    ip, nft = peers.program("ip"), peers.program("nft")
    assert peers.run(ip, "link", "set", "lo", "up").returncode == 0
    for address in (FIRST, OTHER, BOUND, "192.0.2.2", LOCAL):
        assert peers.run(ip, "address", "add", f"{address}/32", "dev", "lo").returncode == 0
    for address in (SIX, "2001:db8:1::1", LOCAL_SIX):
        assert peers.run(ip, "address", "add", f"{address}/128", "dev", "lo", "nodad").returncode == 0
    for rule in rules * 2:
        done = peers.run(nft, "-f", "-", stdin=rule.encode())
        assert done.returncode == 0, done.stderr


def snippet(skuid: str = str(MTA)) -> str:
    return peers.snippet("postfix.nft", {"skuid postfix": f"skuid {skuid}"})


def send(receiver: str, *source: str) -> str:
    command = [sys.executable, "-c", SENDER, str(MTA), receiver, *source]
    done = subprocess.run(command, input=MESSAGE, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


def arrived(sink: Sink) -> list[tuple[bool, str]]:
    return [(message.content == MESSAGE, message.peer[0]) for message in sink.messages]


def test_each_receiver_is_reached_and_the_source_is_chosen() -> None:
    def body() -> None:
        network(snippet())
        with Sink(FIRST, port=25) as first, Sink(OTHER, port=25) as other, Sink(SIX, port=25) as six, Proxy(CONFIG):
            send(FIRST)
            send(OTHER, BOUND)  # Postfix' smtp_bind_address: it is in source_ip
            send(SIX)
            send(SIX, LOCAL_SIX)  # an address of the machine, but not one to leave from
            assert arrived(first) == [(True, "192.0.2.2")]
            assert arrived(other) == [(True, BOUND)]
            assert arrived(six) == [(True, "2001:db8:1::1")] * 2

    peers.in_network_namespace(body)


def test_what_is_refused_is_a_421() -> None:
    def body() -> None:
        network(snippet())
        with Proxy(CONFIG + "deny_destination 198.51.100.8/32\n") as proxy:
            assert send(FIRST).startswith("421 4.4.1 ")
            assert "Connection refused" in send(FIRST)
            assert send(OTHER).startswith("421 4.7.1 ")
            # Nobody redirected this one.
            with clients.dial(("127.0.0.1", 2525)) as sock:
                assert sock.recv(512).startswith(b"421 4.5.0 ")
                assert sock.recv(512) == b""
            assert proxy.wait_line(r"protocol=redirect .*this connection was not redirected")

    peers.in_network_namespace(body)


@pytest.mark.parametrize("mode", ["tcp", "smtp"])
def test_a_rule_that_redirects_the_proxy_itself_is_no_endless_loop(mode: str) -> None:
    def body() -> None:
        network(snippet().replace(f"meta skuid {MTA} ", ""))
        with Proxy(CONFIG + f"mode {mode}\n") as proxy:
            reply = send(FIRST)
            assert reply.startswith("421 4.5.0 ")
            assert "must match the MTA's user only" in reply
            wait_for(lambda: len(proxy.matching("connection ")) >= 1, 30)
            assert len(proxy.matching("^refused .*redirected to it")) == 1

    peers.in_network_namespace(body)


def test_a_monitor_that_connects_and_leaves() -> None:
    """It costs nothing that stays."""

    def body() -> None:
        network()
        with Proxy(CONFIG) as proxy:
            for _ in range(5):
                socket.create_connection(("127.0.0.1", 2525)).close()
            proxy.wait_idle()

    peers.in_network_namespace(body)
