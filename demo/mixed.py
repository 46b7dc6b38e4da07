"""The part of the demonstration that needs mode smtp: an MTA that knows nothing of the proxy but SOCKS5, and one in
Python with its library, share one connection to a receiver.

The first sends the bytes that a KumoMTA sends. What is said comes from the receiver: which connection brought what.
"""

from __future__ import annotations

import socket
from contextlib import closing

from demo.program import SECRET, Address, Proxy, say
from demo.receiver import MX_ADDRESS, Mailbox
from demo.ways import OverSocket, message, socks5_login, socks5_request
from greenarrow_proxy_client import Session

SOURCE = "127.0.0.15"
NAME = "mail15.example"
KUMO, PYTHON = "server-g", "server-h"
SIZE = 20_000

CONFIGURATION = f"""\
source vmta15 {{
    ip {SOURCE}
    ehlo {NAME}
}}
instance {KUMO} {{
    mode smtp
    share_with pool
}}
instance {PYTHON} {{
    share_with pool
}}
"""


def like_kumomta(door: Address, mx_port: int, name: str) -> None:
    sock: socket.socket = socks5_login(door, KUMO)
    socks5_request(sock, 2, SOURCE, 0)
    socks5_request(sock, 1, MX_ADDRESS, mx_port)
    with OverSocket(sock) as smtp:
        smtp.ehlo(NAME)
        smtp.sendmail(f"sender@{KUMO}.example", ["user@receiver.example"], message(name, KUMO, SIZE))


def in_python(door: Address, mx_port: int, name: str) -> None:
    with closing(Session(door, SECRET, PYTHON)) as session:
        smtp = session.smtp([(MX_ADDRESS, mx_port)], NAME, source_ip=SOURCE, tls="opportunistic")
        smtp.sendmail(f"sender@{PYTHON}.example", ["user@receiver.example"], message(name, PYTHON, SIZE))
        smtp.release(wait=True)


def check_mixed(proxy: Proxy, mailbox: Mailbox, mx_port: int) -> list[str]:
    """Send in turns, and look where it came from; returns what is wrong."""
    turns = [(KUMO, like_kumomta, "socks5"), (PYTHON, in_python, "native")] * 2
    connections = []
    wrong = []
    for number, (sender, send, door) in enumerate(turns):
        name = f"mixed{number}@{sender}.example"
        send(proxy.address(door), mx_port, name)
        proxy.wait_for(rf"connection id=\d+ instance={sender} .* outcome=.*accepted=1 ", number // 2 + 1)
        arrival = mailbox.arrived.pop(name, None)
        if arrival is None or arrival.content != message(name, sender, SIZE):
            wrong.append(f"{name} did not arrive as it was sent")
            continue
        connections.append(arrival.port)
        say(f"  {name:<26} {door:<8} left from {arrival.client}:{arrival.port}, TLS: {'yes' if arrival.tls else 'NO'}")
        if not arrival.tls:
            wrong.append(f"{name} came in clear")
    if len(set(connections)) != 1:
        wrong.append(f"{KUMO} and {PYTHON} used {len(set(connections))} connections instead of one")
    else:
        say("  all over one connection and one TLS handshake")
    return wrong
