"""A whole Postfix, which knows no proxy, behind HAProxy: both ways of docs/clients.md.

It is not installed but unpacked (tests/fetch_smtp_sink.sh), and runs on a configuration and a queue of its own; its
master wants root.
"""

import os
import re
import shutil
from contextlib import contextmanager

import pytest

from tests import clients, peers
from tests.interop.test_haproxy import SOURCE, haproxy
from tests.mx import Mx
from tests.peers import MESSAGE, Daemon
from tests.program import Proxy
from tests.sinks import Sink, closed_port
from tests.waiting import wait_for

#: Stand-ins for the user and the group that a package would make.
OWNER, GROUP = "mail", "operator"
MAIN = """\
compatibility_level = 3.6
mail_owner = {owner}
setgid_group = {group}
default_privs = nobody
queue_directory = {directory}/queue
data_directory = {directory}/data
meta_directory = {directory}/etc
daemon_directory = {postfix}/lib/postfix/sbin
command_directory = {postfix}/sbin
shlib_directory = {postfix}/lib/postfix
import_environment = MAIL_CONFIG POSTLOG_SERVICE POSTLOG_HOSTNAME LD_LIBRARY_PATH={postfix}/lib/postfix LC_ALL=C
export_environment = MAIL_CONFIG LD_LIBRARY_PATH={postfix}/lib/postfix LC_ALL=C
maillog_file = {directory}/log
maillog_file_prefixes = /
myhostname = mta.example
mydestination =
alias_maps =
inet_protocols = ipv4
inet_interfaces = loopback-only
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
smtp_host_lookup = native
relayhost = {relayhost}
"""
MASTER = """\
{host}:{port} inet n - n - - smtpd
postlog unix-dgram n - n - 1 postlogd
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
proxymap unix - - n - - proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
error unix - - n - - error
retry unix - - n - - error
anvil unix - - n - 1 anvil
tlsmgr unix - - n 1000? 1 tlsmgr
scache unix - - n - 1 scache
"""
QUEUES = ("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "private", "saved", "trace")


def needed():
    """Skips the test where Postfix cannot run."""
    peers.postfix("postfix")
    if os.getuid():
        pytest.skip("Postfix' master wants root, and this user is not")


@pytest.fixture(autouse=True)
def _postfix():
    needed()


@contextmanager
def running(relayhost="", more="", endpoint=None, master=""):
    """Yields a function that hands in one message for a recipient, and the log's path.

    Args:
        more, master: further lines of main.cf and master.cf.
        endpoint: where it listens; None: somewhere.
    """
    host = endpoint[0] if endpoint else peers.address()
    port = endpoint[1] if endpoint else peers.free_port(host)
    with peers.directory() as directory:
        for name in ("etc", "data", *(f"queue/{queue}" for queue in (*QUEUES, "maildrop", "public", "pid"))):
            (directory / name).mkdir(parents=True)
            if name not in ("etc", "queue/pid"):
                shutil.chown(directory / name, OWNER)
        for name in ("maildrop", "public"):
            shutil.chown(directory / "queue" / name, group=GROUP)
        values = {"directory": directory, "postfix": peers.POSTFIX, "owner": OWNER, "group": GROUP}
        (directory / "etc" / "main.cf").write_text(MAIN.format(relayhost=relayhost, **values) + more)
        (directory / "etc" / "master.cf").write_text(MASTER.format(host=host, port=port) + master)
        program = peers.POSTFIX / "lib" / "postfix" / "sbin" / "master"

        def hand_in(recipient="to@example.net"):
            code, text = clients.send(clients.dial((host, port)), MESSAGE, recipient)
            assert code == 250, text

        with Daemon(program, "-c", directory / "etc", "-d", listens=(host, port)):
            yield hand_in, directory / "log"


def content(message):
    """Without the one header that Postfix must add."""
    return re.sub(rb"\AReceived: [^\n]*\n(?:[ \t][^\n]*\n)*", b"", message.content)


def logged(log, pattern):
    try:
        wait_for(lambda: log.exists() and re.search(pattern, log.read_text()), 20.0, f"Postfix logs {pattern}")
    except AssertionError:
        print(log.read_text() if log.exists() else "no log")
        raise


def test_to_one_receiver(proxy, sink, tmp_path):
    """haproxy.cfg and relayhost."""
    with (
        haproxy(tmp_path, proxy.proxy_protocol, sink.endpoint) as front,
        running(f"[{front[0]}]:{front[1]}") as (hand_in, log),
    ):
        hand_in()
        logged(log, r"to=<to@example.net>.* dsn=2.0.0, status=sent \(250 2.0.0 kept as 1\)")
    assert [(content(message) == MESSAGE, message.peer[0]) for message in sink.messages] == [(True, SOURCE)]


def test_a_refusal_defers(proxy, tmp_path):
    """The reason is in Postfix' own log."""
    with (
        closed_port() as nobody,
        haproxy(tmp_path, proxy.proxy_protocol, nobody) as front,
        running(f"[{front[0]}]:{front[1]}") as (hand_in, log),
    ):
        hand_in()
        logged(log, r"to=<to@example.net>.* status=deferred \(.*refused to talk to me: 421 4.* Connection refused\)")


def test_to_every_mx(tmp_path):
    """postfix.nft and haproxy-redirect.cfg: two receivers by their addresses, each reached at its own port 25."""
    peers.in_network_namespace(lambda: to_every_mx_through_haproxy(tmp_path))


def test_to_every_mx_without_haproxy():
    """postfix.nft and listen_redirect: the same, on IPv6 too, from the address that Postfix is bound to."""
    peers.in_network_namespace(to_every_mx_by_redirection)


def test_mode_smtp():
    """Five messages of a Postfix that was told nothing: one connection, one handshake, under limits."""
    peers.in_network_namespace(mode_smtp)


def mode_smtp():
    network()
    text = """\
mode smtp
source mail1 {
    ip 192.0.2.1
    ehlo mta.example
}
throttle one {
    max_concurrent_connections 1
    wait 60s
}
listen_redirect 127.0.0.1:2525
allow_from 127.0.0.0/8, 192.0.2.0/24
source_ip 192.0.2.1
allow_destination 198.51.100.0/24
"""
    with (
        Mx(host="198.51.100.7", port=25, starttls=True) as mx,
        Proxy(text),
        running(more="smtp_bind_address = 192.0.2.1\n") as (hand_in, log),
    ):
        for _ in range(5):
            hand_in("to@[198.51.100.7]")
        wait_for(lambda: log.exists() and log.read_text().count("status=sent") == 5, 60.0, "five are sent")
        assert [content(message) == MESSAGE for message in mx.messages] == [True] * 5
        assert all(message.encrypted and message.peer[0] == "192.0.2.1" for message in mx.messages)
        assert mx.handshakes == mx.connects == 1


def network():
    ip, nft = peers.program("ip"), peers.program("nft")
    assert peers.run(ip, "link", "set", "lo", "up").returncode == 0
    for address in ("198.51.100.7", "198.51.100.8", "192.0.2.1", "192.0.2.2"):
        assert peers.run(ip, "address", "add", f"{address}/32", "dev", "lo").returncode == 0
    for address in ("2001:db8:7::25", "2001:db8:1::1"):
        assert peers.run(ip, "address", "add", f"{address}/128", "dev", "lo", "nodad").returncode == 0
    rules = peers.snippet("postfix.nft", {"skuid postfix": f"skuid {OWNER}"})
    for _ in range(2):
        done = peers.run(nft, "-f", "-", stdin=rules.encode())
        assert done.returncode == 0, done.stderr


def to_each(hand_in, log, sinks):
    """One message to each receiver; the addresses that they came from."""
    for sink in sinks:
        host = sink.endpoint[0]
        hand_in(f"to@[{'IPv6:' if ':' in host else ''}{host}]")
        logged(log, rf"relay={re.escape(host)}\[.*\]:25, .* status=sent")
        assert [content(message) == MESSAGE for message in sink.messages] == [True]
    return [sink.messages[0].peer[0] for sink in sinks]


def to_every_mx_through_haproxy(tmp_path):
    network()
    file = tmp_path / "haproxy.cfg"
    with (
        Sink("198.51.100.7", port=25) as first,
        Sink("198.51.100.8", port=25) as other,
        Proxy("source_ip 192.0.2.1\nallow_destination 198.51.100.0/24\n") as proxy,
    ):
        door = f"{proxy.proxy_protocol[0]}:{proxy.proxy_protocol[1]}"
        file.write_text(peers.snippet("haproxy-redirect.cfg", {"10.0.0.1:808": door}))
        with (
            Daemon(peers.program("haproxy"), "-db", "-f", file, listens=("127.0.0.1", 2525)),
            running() as (hand_in, log),
        ):
            assert to_each(hand_in, log, (first, other)) == ["192.0.2.1"] * 2


def to_every_mx_by_redirection():
    network()
    text = """\
listen_redirect 127.0.0.1:2525, "[::1]:2525"
allow_from 127.0.0.0/8, ::1, 192.0.2.0/24, 2001:db8::/32
source_ip 192.0.2.1, 192.0.2.2, 2001:db8:1::1
default_source_ip 192.0.2.2, 2001:db8:1::1
allow_destination 198.51.100.0/24, 2001:db8:7::/64
"""
    with (
        Sink("198.51.100.7", port=25) as first,
        Sink("198.51.100.8", port=25) as other,
        Sink("2001:db8:7::25", port=25) as six,
        Proxy(text),
        running(more="inet_protocols = all\nsmtp_bind_address = 192.0.2.1\n") as (hand_in, log),
    ):
        assert to_each(hand_in, log, (first, other, six)) == ["192.0.2.1", "192.0.2.1", "2001:db8:1::1"]
