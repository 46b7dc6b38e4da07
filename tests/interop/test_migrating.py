"""docs/migrating.md: the old program, then this one, each on the configuration that stands there, and the same MTA.

Everything runs in a network of its own that has the documented addresses, so nothing in the configurations is replaced
but the secret that a start refuses. Receivers in documentation networks are allowed by a flag.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import clients, documents, peers
from tests.interop import test_postfix
from tests.interop.test_snippets import kumomta_bytes
from tests.peers import MESSAGE, Daemon
from tests.program import SECRET, Proxy
from tests.sinks import Sink, closed_port
from tests.waiting import wait_for

pytestmark = pytest.mark.either_form("configurations of other programs")

PAGE = "docs/migrating.md"
MTA, MX = "10.0.0.5", "198.51.100.7"
SOURCES = ("192.0.2.1", "192.0.2.2")
Sender = Callable[[], None]


def blocks(heading: str) -> list[str]:
    return documents.blocks(documents.section(PAGE, heading))


def network() -> None:
    ip = peers.program("ip")
    assert peers.run(ip, "link", "set", "lo", "up").returncode == 0
    for address in ("10.0.0.1", MTA, *SOURCES, MX, "198.51.100.8"):
        assert peers.run(ip, "address", "add", f"{address}/32", "dev", "lo").returncode == 0


def new(text: str, *flags: str) -> Proxy:
    """This program on a documented configuration."""
    return Proxy(text, base="", flags=("--allow-destination=198.51.100.0/24", "--drain-timeout=2s", *flags))


@contextlib.contextmanager
def old_haproxy(path: Path, text: str, listens: tuple[str, int]) -> Iterator[Daemon]:
    (path / "haproxy.cfg").write_text(text)
    with Daemon(peers.program("haproxy"), "-db", "-f", path / "haproxy.cfg", listens=listens) as daemon:
        yield daemon


def arrived(sink: Sink, *sources: str) -> None:
    """The message once for each source, byte for byte; the sink is empty then."""
    wait_for(lambda: len(sink.messages) >= len(sources))
    assert [message.peer[0] for message in sink.messages] == list(sources)
    assert {message.content for message in sink.messages} == {MESSAGE}
    sink.messages.clear()


# -- HAProxy


def by_header(door: tuple[str, int], header: bytes) -> bytes:
    """The first bytes of what is answered to a PROXY header, b"" if the connection just closes."""
    with clients.dial(door, MTA) as sock:
        sock.sendall(header)
        return clients.exactly(sock, 200)


def connecting(source: str) -> bool:
    """Whether a socket with this address waits for the answer to its SYN, in this network."""
    local = socket.inet_aton(source)[::-1].hex().upper()
    lines = [line.split() for line in Path("/proc/thread-self/net/tcp").read_text().splitlines()]
    return any(fields[1].startswith(local) and fields[3] == "02" for fields in lines)


def test_from_haproxy_with_usesrc(tmp_path: Path) -> None:
    peers.in_network_namespace(lambda: from_haproxy_with_usesrc(tmp_path))


def from_haproxy_with_usesrc(tmp_path: Path) -> None:
    network()
    before, after = blocks("HAProxy that binds the address in the header")
    door = ("10.0.0.1", 2525)

    def send() -> None:
        for source in SOURCES:
            for header in (clients.v1, clients.v2):
                with clients.dial(door, MTA) as sock:
                    sock.sendall(header(source, (MX, 25)))
                    assert clients.send(sock, MESSAGE)[0] == 250

    four = (SOURCES[0], SOURCES[0], SOURCES[1], SOURCES[1])
    with Sink(MX, port=25) as sink, closed_port("198.51.100.8") as (host, _):
        refused = clients.v2(SOURCES[0], (host, 25))
        with old_haproxy(tmp_path, before, door):
            send()
            arrived(sink, *four)
            assert by_header(door, refused) == b"", "it closes without a byte"
            with clients.dial(door, MTA) as sock:  # an address that nobody has: it is bound all the same, in vain
                sock.sendall(clients.v2("192.0.2.9", (MX, 25)))
                wait_for(lambda: connecting("192.0.2.9"), what="a SYN from there")
        with new(after) as proxy:
            send()
            arrived(sink, *four)
            assert by_header(door, refused).startswith(b"421 4.4.1 ")
            absent = by_header(door, clients.v2("192.0.2.9", (MX, 25)))
            assert b"192.0.2.9" in absent, "named"
            proxy.wait_line(r"refused.*192\.0\.2\.9")


def test_from_haproxy_behind_a_redirection(tmp_path: Path) -> None:
    test_postfix.needed()
    peers.in_network_namespace(lambda: from_haproxy_behind_a_redirection(tmp_path))


def from_haproxy_behind_a_redirection(tmp_path: Path) -> None:
    test_postfix.network()
    ip = peers.program("ip")
    assert peers.run(ip, "address", "add", f"{MTA}/32", "dev", "lo").returncode == 0
    for host in (MX, "198.51.100.8"):  # it comes from the machine's address, as it would through a network card
        route = ("route", "replace", "local", host, "dev", "lo", "table", "local", "scope", "host", "src", MTA)
        assert peers.run(ip, *route).returncode == 0
    before, after = blocks("HAProxy behind a redirection")
    with Sink(MX, port=25) as first, Sink("198.51.100.8", port=25) as second:
        for start in (lambda: old_haproxy(tmp_path, before, ("127.0.0.1", 2525)), lambda: new(after)):
            with start(), test_postfix.running() as (hand_in, log):
                assert test_postfix.to_each(hand_in, log, (first, second)) == [SOURCES[0]] * 2
            first.messages.clear()
            second.messages.clear()


def test_from_haproxy_on_a_router(tmp_path: Path) -> None:
    peers.in_network_namespace(lambda: from_haproxy_on_a_router(tmp_path))


def from_haproxy_on_a_router(tmp_path: Path) -> None:
    """This namespace is the router, with the receiver on it; the MTA has one of its own behind eth0."""
    before_rules, before, after_rules, after = blocks("HAProxy on a router")
    ip, mta = peers.program("ip"), f"gp{os.getpid()}-mta"

    def do(*words: str) -> None:
        done = peers.run(ip, *words)
        assert done.returncode == 0, (words, done.stderr)

    def shell(script: str) -> None:
        done = peers.run("sh", "-euc", script)
        assert done.returncode == 0, done.stderr

    (tmp_path / "message.eml").write_bytes(MESSAGE)
    do("netns", "add", mta)
    try:
        do("link", "set", "lo", "up")
        for address in (SOURCES[0], MX):
            do("address", "add", f"{address}/32", "dev", "lo")
        do("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", mta)
        do("address", "add", "10.0.0.1/24", "dev", "eth0")
        do("link", "set", "eth0", "up")
        for words in (
            ("address", "add", f"{MTA}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("route", "add", "default", "via", "10.0.0.1"),
        ):
            do("-n", mta, *words)
        inside = (ip, "netns", "exec", mta, peers.program("curl"), "--silent", "--show-error", "--max-time", "20")
        what = ("--mail-from", "from@example.com", "--mail-rcpt", "to@example.net", "--upload-file")
        with Sink(MX, port=25) as sink:

            def send() -> None:
                done = peers.run(*inside, *what, tmp_path / "message.eml", f"smtp://{MX}/mta.example")
                assert done.returncode == 0, done.stderr
                arrived(sink, SOURCES[0])

            shell(before_rules)
            with old_haproxy(tmp_path, before, ("0.0.0.0", 2525)):
                send()
            shell("ip rule del fwmark 25; ip route flush table 100; nft delete table ip greenarrow_before")
            shell(after_rules)
            with new(after) as proxy:
                send()
                proxy.wait_line(rf"^connection .*protocol=redirect client={MTA}:.* source={SOURCES[0]} ")
    finally:
        do("netns", "del", mta)


# -- KumoMTA's proxy-server


def test_from_kumomtas_proxy_server() -> None:
    """Not beside the old program, which cannot be had: what its clients send, and what they are answered."""
    peers.in_network_namespace(from_kumomtas_proxy_server)


def from_kumomtas_proxy_server() -> None:
    network()
    before, after = blocks("KumoMTA's proxy-server")
    host, _, port = before.split()[-1].rpartition(":")
    door = (host, int(port))
    with Sink(MX, port=25) as sink, new(after):
        for source in SOURCES:
            with kumomta_bytes().connect("socks5", door, source, (MX, 25)) as sock:
                assert clients.send(sock, MESSAGE)[0] == 250
        arrived(sink, *SOURCES)
        with pytest.raises(OSError, match=r"BIND refused: 2 \(not allowed\)"):
            kumomta_bytes().connect("socks5", door, "192.0.2.9", (MX, 25))
        with pytest.raises(OSError, match=r"CONNECT refused: 5 \(connection refused\)"):
            kumomta_bytes().connect("socks5", door, SOURCES[0], ("198.51.100.8", 25))


def test_from_kumomtas_proxy_server_with_an_address_that_is_not_there() -> None:
    """1 at BIND, as there."""
    peers.in_network_namespace(an_address_that_is_not_there)


def an_address_that_is_not_there() -> None:
    network()
    _, after = blocks("KumoMTA's proxy-server")
    assert peers.run(peers.program("ip"), "address", "del", "192.0.2.2/32", "dev", "lo").returncode == 0
    with new(after), pytest.raises(OSError, match=r"BIND refused: 1 \(source address is not on the proxy"):
        kumomta_bytes().connect("socks5", ("10.0.0.1", 5000), SOURCES[1], (MX, 25))


# -- SOCKS servers


def curl(path: Path, *doors: str) -> Sender:
    """Sends the message through each door with curl, from the MTA's address."""
    (path / "message.eml").write_bytes(MESSAGE)

    def send() -> None:
        for door in doors:
            done = peers.run(
                *(peers.program("curl"), "--silent", "--show-error", "--max-time", "30", "--interface", MTA),
                *("--socks5", door, "--mail-from", "from@example.com", "--mail-rcpt", "to@example.net"),
                *("--upload-file", path / "message.eml", f"smtp://{MX}/mta.example"),
            )
            assert done.returncode == 0, done.stderr

    return send


def test_from_dante(tmp_path: Path) -> None:
    peers.in_network_namespace(lambda: from_dante(tmp_path))


def from_dante(tmp_path: Path) -> None:
    network()
    before, after = blocks("Dante")
    send = curl(tmp_path, *(f"{source}:1080" for source in SOURCES))
    file = tmp_path / "danted.conf"
    file.write_text(before)
    with Sink(MX, port=25) as sink:
        with Daemon(
            *(peers.program("danted"), "-f", file, "-p", tmp_path / "pid"), listens=(SOURCES[1], 1080)
        ) as daemon:
            send()
            arrived(sink, *SOURCES)
        assert "error" not in daemon.output.lower()
        with new(after):
            send()
            arrived(sink, *SOURCES)


def test_from_3proxy(tmp_path: Path) -> None:
    """Beside the old program where there is one: Debian 12 has none."""
    peers.in_network_namespace(lambda: from_3proxy(tmp_path))


def from_3proxy(tmp_path: Path) -> None:
    network()
    before, after = blocks("3proxy")
    services = [line.split() for line in before.splitlines() if line.startswith("socks ")]
    doors = [f"{ip.removeprefix('-i')}:{port.removeprefix('-p')}" for _, ip, port, _ in services]
    sources = [source.removeprefix("-e") for *_, source in services]
    send, program = curl(tmp_path, *doors), shutil.which("3proxy")
    with Sink(MX, port=25) as sink:
        if program is not None:
            (tmp_path / "3proxy.cfg").write_text(before)
            with Daemon(program, tmp_path / "3proxy.cfg", listens=("10.0.0.1", 1082)):
                send()
                arrived(sink, *sources)
        with new(after):
            send()
            arrived(sink, *sources)


# -- Postfix alone


def test_from_postfix_with_bind_addresses() -> None:
    test_postfix.needed()
    peers.in_network_namespace(from_postfix_with_bind_addresses)


def from_postfix_with_bind_addresses() -> None:
    test_postfix.network()
    nft = peers.program("nft")
    main, master, after = blocks("Postfix with smtp_bind_address")
    assert "example.org = mail2:" in main
    main = main.replace("example.org = mail2:", "example.org = mail2:[198.51.100.8]")
    with Sink(MX, port=25) as first, Sink("198.51.100.8", port=25) as second:

        def send() -> None:
            with test_postfix.running(more=main, master=master) as (hand_in, log):
                hand_in(f"to@[{MX}]")
                hand_in("to@example.org")
                for recipient in (f"to@[{MX}]", "to@example.org"):
                    test_postfix.logged(log, rf"to=<{re.escape(recipient)}>.* status=sent")
            assert [message.peer[0] for message in (*first.messages, *second.messages)] == list(SOURCES)
            assert {test_postfix.content(message) for message in (*first.messages, *second.messages)} == {MESSAGE}
            first.messages.clear()
            second.messages.clear()

        assert peers.run(nft, "flush", "ruleset").returncode == 0
        send()
        rules = peers.snippet("postfix.nft", {"skuid postfix": f"skuid {test_postfix.OWNER}"})
        assert peers.run(nft, "-f", "-", stdin=rules.encode()).returncode == 0
        with new(after) as proxy:
            send()
            lines = proxy.matching(r"^connection .*protocol=redirect.* outcome=")
            assert sorted(source for source in SOURCES for line in lines if f" source={source} " in line) == [*SOURCES]


# -- the vendor's


def test_from_the_vendors_proxy() -> None:
    """Its file, as it stands in its documentation, but for the secret."""
    peers.in_network_namespace(from_the_vendors_proxy)


def from_the_vendors_proxy() -> None:
    from greenarrow_proxy_client import Session

    network()
    (text,) = blocks("The vendor's GreenArrow Proxy")
    assert text.count("0" * 32) == 1
    with (
        Sink(MX, port=25) as sink,
        new(text.replace("0" * 32, SECRET)),
        Session(("10.0.0.1", 807), SECRET, "server-a") as session,
    ):
        for source in SOURCES:
            with session.smtp([(MX, 25)], "mta.example", source_ip=source, tls="none") as smtp:
                assert smtp.sendmail("from@example.com", ["to@example.net"], MESSAGE) == {}
        arrived(sink, *SOURCES)


def test_the_page_names_what_was_not_run() -> None:
    """A program that is there by now should be run."""
    text = (documents.ROOT / PAGE).read_text()
    for name, program in (("KumoMTA's proxy-server", "proxy-server"), ("3proxy", "3proxy")):
        assert f"| [{name}" in text
        if not any(os.access(f"{folder}/{program}", os.X_OK) for folder in ("/usr/bin", "/usr/sbin", "/usr/local/bin")):
            (row,) = [line for line in text.splitlines() if line.startswith(f"| [{name}")]
            assert "**none**" in row
