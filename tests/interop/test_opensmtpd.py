"""OpenSMTPD, which knows no proxy, through listen_redirect in mode smtp.

It is not installed but unpacked (tests/fetch_smtp_sink.sh). Its paths and its users are compiled in, so it runs in a
mount namespace in which these exist, and in a network namespace whose rules redirect what it sends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests import clients, peers
from tests.mx import Message, Mx
from tests.peers import MESSAGE, Daemon
from tests.program import Proxy
from tests.waiting import wait_for

UNPACKED = peers.ROOT / ".cache" / "opensmtpd"
USER = 64321
NAME = "mta.example"
SOURCE = "192.0.2.1"
RECEIVERS = ("198.51.100.7", "198.51.100.8")
LISTENS = ("127.0.0.1", 2500)
MESSAGES = 5
CONFIG = f"""\
listen on {LISTENS[0]} port {LISTENS[1]} hostname {NAME}
action "out" relay helo {NAME} src {SOURCE}
match from any for any action "out"
"""
#: Run with its directory and the unpacked package.
START = """\
set -e
for file in passwd group; do cp /etc/$file "$1/$file"; done
for user in opensmtpd:{user} opensmtpq:{queue}; do
    echo "${{user%:*}}:x:${{user#*:}}:${{user#*:}}::/nonexistent:/bin/false" >>"$1/passwd"
    echo "${{user%:*}}:x:${{user#*:}}:" >>"$1/group"
done
for file in passwd group; do mount --bind "$1/$file" /etc/$file; done
for directory in /run /var/spool /var/lib /usr/libexec; do mount -t tmpfs tmpfs $directory; done
mkdir -m 711 /var/spool/smtpd
mkdir -p /var/lib/opensmtpd/empty
cp -r "$2/usr/libexec/opensmtpd" /usr/libexec
exec "$2/usr/sbin/smtpd" -dF -f "$1/smtpd.conf"
"""
PROXY = f"""\
mode smtp
source mail1 {{
    ip {SOURCE}
    ehlo {NAME}
}}
listen_redirect 127.0.0.1:2525
allow_from 127.0.0.0/8, 192.0.2.0/24
source_ip {SOURCE}
allow_destination 198.51.100.0/24
""" + "".join(
    f"throttle t{number} {{\n    destination {host}\n    max_concurrent_connections 1\n    wait 60s\n}}\n"
    for number, host in enumerate(RECEIVERS)
)


@contextmanager
def running() -> Iterator[Daemon]:
    """In the network namespace of this thread."""
    smtpd = UNPACKED / "usr" / "sbin" / "smtpd"
    if not smtpd.exists():
        peers.missing("OpenSMTPD is not there: run tests/fetch_smtp_sink.sh")
    with peers.directory() as directory:
        (directory / "smtpd.conf").write_text(CONFIG)
        (directory / "smtpd.conf").chmod(0o600)
        start = directory / "start"
        start.write_text(START.format(user=USER, queue=USER + 1))
        own_mounts = (peers.program("unshare"), "--mount", "--propagation", "private")
        with Daemon(*own_mounts, "sh", start, directory, UNPACKED, listens=LISTENS) as daemon:
            yield daemon


def network(whose: str = f"skuid {USER}") -> None:
    """Two receivers and the source; what `whose` sockets send is redirected."""
    ip, nft = peers.program("ip"), peers.program("nft")
    assert peers.run(ip, "link", "set", "lo", "up").returncode == 0
    for address in (*RECEIVERS, SOURCE):
        assert peers.run(ip, "address", "add", f"{address}/32", "dev", "lo").returncode == 0
    rules = peers.snippet("postfix.nft", {"skuid postfix": whose})
    done = peers.run(nft, "-f", "-", stdin=rules.encode())
    assert done.returncode == 0, done.stderr


def arrived(mx: Mx) -> int:
    return sum(message.accepted for message in mx.messages)


def content(message: Message) -> bytes:
    """Without the one header that OpenSMTPD must add."""
    return re.sub(rb"\AReceived: [^\n]*\n(?:[ \t][^\n]*\n)*", b"", message.content)


def test_mode_smtp() -> None:
    """Messages of an OpenSMTPD that was told nothing: one connection to each receiver, one handshake, under limits."""
    peers.in_network_namespace(messages_for_two_receivers)


def messages_for_two_receivers() -> None:
    network()
    with (
        Mx(host=RECEIVERS[0], port=25, starttls=True) as first,
        Mx(host=RECEIVERS[1], port=25, starttls=True) as other,
        Proxy(PROXY),
        running() as smtpd,
    ):
        for number in range(MESSAGES):
            for host in RECEIVERS:
                code, text = clients.send(clients.dial(LISTENS), MESSAGE, f"{number}@[{host}]")
                assert code == 250, text
        wait_for(lambda: arrived(first) == arrived(other) == MESSAGES, 60.0, smtpd.output)
    for mx in (first, other):
        assert [content(message) == MESSAGE for message in mx.messages] == [True] * MESSAGES
        assert all(message.encrypted and message.peer[0] == SOURCE for message in mx.messages)
        assert mx.handshakes == mx.connects == 1
