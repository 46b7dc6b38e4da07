"""What sessions leave behind is gone when they are: no circles of references, which only the garbage collector finds.

It costs a session's processor time over again (5 % of it are saved by having it look at little), and what is set apart
from it is never found (`server.process.Collector`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import clients, independent_client
from tests.mx import Mx, close
from tests.program import Proxy
from tests.sinks import closed_port
from tests.waiting import wait_for

WATCHER = Path(__file__).with_name("circles.py")
SOURCE = "127.0.0.5"
MESSAGE = b"Subject: hello\r\n\r\nHello.\r\n"
SESSIONS = 5


class Watched:
    """A proxy, and what the collector finds in it."""

    def __init__(self, proxy: Proxy, link: socket.socket) -> None:
        self.proxy = proxy
        self._link = link

    def wait_empty(self) -> None:
        wait_for(lambda: not self.proxy.open_connections(), 30, "no client is connected")

    def found(self) -> dict[str, int]:
        """Since the last time."""
        self.wait_empty()
        self._link.sendall(b"?")
        answer = b""
        while not answer.endswith(b"\n"):
            answer += self._link.recv(1 << 16)
        found: dict[str, int] = json.loads(answer)
        return found


@contextlib.contextmanager
def watched(more: str) -> Iterator[Watched]:
    here, there = socket.socketpair()
    environ = {"CIRCLES_FD": str(there.fileno())}
    with here, there, Proxy(more, environ=environ, pass_fds=(there.fileno(),), program=WATCHER) as proxy:
        here.settimeout(60)
        yield Watched(proxy, here)


def mail_by_socks5(proxy: Proxy, mx: Mx) -> None:
    with clients.socks5(proxy.socks5, mx.endpoint, SOURCE) as sock:
        assert clients.send(sock, MESSAGE)[0] == 250


def mail_by_proxy_protocol(proxy: Proxy, mx: Mx) -> None:
    with clients.proxied(proxy.proxy_protocol, mx.endpoint, SOURCE) as sock:
        assert clients.send(sock, MESSAGE)[0] == 250


def hear_all(peer: independent_client.Peer) -> None:
    """A reply of several lines."""
    while b"\r\n250 " not in peer.hear_until(b"\r\n"):
        pass


def native(tls: str = "none", reuse: bool = True) -> Callable[[Proxy, Mx], None]:
    def mail(proxy: Proxy, mx: Mx) -> None:
        with independent_client.channel(proxy.native, tls=False) as peer:
            for _ in range(2):
                peer.opened(mx.endpoint, ehlo_name="client.example", reuse=reuse, tls=tls)
                peer.data(b"EHLO client.example\r\n")
                hear_all(peer)
                independent_client.deliver(peer, MESSAGE)
                peer.finish(keep=reuse, messages=1)

    return mail


def resets(proxy: Proxy, mx: Mx) -> None:
    sock = clients.socks5(proxy.socks5, mx.endpoint, SOURCE)
    clients.exactly(sock, 4)
    clients.reset(sock)
    sock.close()


def refused(proxy: Proxy, mx: Mx) -> None:
    with closed_port() as dead, pytest.raises(clients.Refused):
        clients.socks5(proxy.socks5, dead, SOURCE)


def wrong_secret(proxy: Proxy, mx: Mx) -> None:
    with pytest.raises(clients.Refused):
        clients.socks5(proxy.socks5, mx.endpoint, SOURCE, password="x" * 32)


def too_many(proxy: Proxy, mx: Mx) -> None:
    """One is served, the other is told."""
    with clients.socks5(proxy.socks5, mx.endpoint, SOURCE), pytest.raises(clients.Refused):
        clients.socks5(proxy.socks5, mx.endpoint, SOURCE)


def too_many_channels(proxy: Proxy, mx: Mx) -> None:
    with clients.socks5(proxy.socks5, mx.endpoint, SOURCE), pytest.raises(independent_client.Told):
        independent_client.channel(proxy.native, tls=False)


def no_place(proxy: Proxy, mx: Mx) -> None:
    """One has the only place, the other waits for it in vain."""
    with clients.socks5(proxy.socks5, mx.endpoint, SOURCE), pytest.raises(clients.Refused):
        clients.socks5(proxy.socks5, mx.endpoint, SOURCE)


def no_place_for_a_mail(proxy: Proxy, mx: Mx) -> None:
    """The same: it is told at MAIL."""
    with clients.socks5(proxy.socks5, mx.endpoint, SOURCE) as first:
        smtp = clients.Smtp(first)
        smtp.ehlo()
        assert smtp.mail("a@example.com")[0] == 250
        with clients.socks5(proxy.socks5, mx.endpoint, SOURCE) as second:
            late = clients.Smtp(second)
            late.ehlo()
            assert late.mail("a@example.com")[0] == 451


def channel_resets(proxy: Proxy, mx: Mx) -> None:
    peer = independent_client.channel(proxy.native, tls=False)
    peer.opened(mx.endpoint)
    peer.hear_until(b"\r\n")
    clients.reset(peer.sock)
    peer.sock.close()


def channel_breaks_its_protocol(proxy: Proxy, mx: Mx) -> None:
    """In an SMTP session, in a dialogue of ours, and between them."""
    for dialogue in (False, True, None):
        with independent_client.channel(proxy.native, tls=False) as peer:
            if dialogue is not None:
                peer.opened(mx.endpoint, dialogue=dialogue)
            peer.say(independent_client.HELLO)
            independent_client.error_of(peer)


def session_of_throttles(proxy: Proxy, mx: Mx) -> None:
    """It says goodbye, is replaced by another of its name, breaks its protocol, is reset."""
    for end in ("close", "nonsense", "reset"):
        peer = independent_client.session(proxy.native, tls=False, run_id=os.urandom(16))
        if end == "nonsense":
            peer.say(independent_client.OPEN)
            independent_client.error_of(peer)
        if end == "reset":
            clients.reset(peer.sock)
        peer.sock.close()
    first = independent_client.session(proxy.native, tls=False, run_id=os.urandom(16))
    second = independent_client.session(proxy.native, tls=False, run_id=os.urandom(16))
    independent_client.error_of(first)
    first.sock.close()
    second.sock.close()


TCP = "mode tcp\nlisten_tls no\n"
SMTP = f"mode smtp\nlisten_tls no\nsource here {{\n    ip {SOURCE}\n    ehlo client.example\n}}\n"
ONE = "throttle one {\n    max_concurrent_connections 1\n    wait 100ms\n}\n"

#: Settings, what a client does, a receiver's script.
CASES: dict[str, tuple[str, Callable[[Proxy, Mx], None], dict]] = {
    "tcp, SOCKS5": (TCP, mail_by_socks5, {}),
    "tcp, PROXY": (TCP, mail_by_proxy_protocol, {}),
    "tcp, a reset": (TCP, resets, {}),
    "tcp, refused": (TCP, refused, {}),
    "tcp, a wrong secret": (TCP, wrong_secret, {}),
    "smtp": (SMTP, mail_by_socks5, {}),
    "smtp, alone": (SMTP + "reuse_connections no\n", mail_by_socks5, {}),
    "smtp, PROXY": (SMTP, mail_by_proxy_protocol, {}),
    "smtp, a reset": (SMTP, resets, {}),
    "smtp, refused": (SMTP, refused, {}),
    "native, reused": (TCP, native(), {}),
    "native, alone": (TCP, native(reuse=False), {}),
    "smtp, STARTTLS": (SMTP, mail_by_socks5, {}),
    "tcp, too many": (TCP + "max_connections 1\n", too_many, {}),
    "tcp, no place": (TCP + ONE, no_place, {}),
    "smtp, no place": (SMTP + ONE, no_place_for_a_mail, {}),
    "native, too many": (TCP + "max_connections 1\n", too_many_channels, {}),
    "native, a reset": (TCP, channel_resets, {}),
    "native, nonsense": (TCP, channel_breaks_its_protocol, {}),
    "native, sessions": (TCP, session_of_throttles, {}),
    "native, STARTTLS breaks": (TCP, native("opportunistic"), {"tls": close}),
    "native, STARTTLS": (TCP, native("opportunistic"), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_sessions_leave_no_circles(name: str) -> None:
    more, session, script = CASES[name]
    with Mx(script, starttls="STARTTLS" in name) as mx, watched(more) as run:
        session(run.proxy, mx)  # what is made once
        run.found()
        for _ in range(SESSIONS):
            session(run.proxy, mx)
            run.wait_empty()
        found = run.found()
    assert not found, json.dumps(found, indent=1)
