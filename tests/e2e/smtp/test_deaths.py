"""Mode smtp while clients, receivers and their connections die at random, and the books of both ends."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests import clients
from tests.mx import Mx, close, garbage, half_close, reset, say, twice, usual
from tests.program import Proxy
from tests.sharing import arrived, body
from tests.waiting import wait_for

NAME = "mta.example.com"
SOURCE = "127.0.0.5"
PLACES = 3
SETTINGS = f"""\
mode smtp
listen_tls no
source here {{
    ip {SOURCE}
    ehlo {NAME}
}}
instance a {{
    share_with x
}}
instance b {{
    share_with x
}}
throttle t {{
    max_concurrent_connections {PLACES}
    wait 30s
}}
"""
DEATHS = (close, reset, half_close, say(b"421 4.3.2 bye\r\n", close), garbage, twice)
STEPS = ("greeting", "ehlo", "mail", "rcpt", "data", "body", "dot", "rset")


class Sender:
    """One MTA: sends its numbers one after the other until each is accepted, as well as it can.

    Attributes:
        accepted: numbers whose 250 it has seen. unknown: how often it sent a whole message and saw no reply.
    """

    def __init__(self, proxy: Proxy, mx: Mx, instance: str, numbers: range, seed: int) -> None:
        self.accepted: set[int] = set()
        self.unknown: Counter[int] = Counter()
        self.strange: list[bytes] = []
        self._proxy = proxy
        self._mx = mx
        self._instance = instance
        self._numbers = numbers
        self._random = random.Random(seed)

    def run(self) -> None:
        left = list(self._numbers)
        while left:
            with contextlib.suppress(OSError, clients.Refused):
                sock = clients.socks5(self._proxy.socks5, self._mx.endpoint, SOURCE, user=self._instance)
                with sock, sock.makefile("rb") as file:
                    self._session(sock, file, left)

    def _session(self, sock: socket.socket, file, left: list[int]) -> None:
        if not self._reply(file).startswith(b"220"):
            return
        if not self._ask(sock, file, b"EHLO %s\r\n" % NAME.encode()).startswith(b"250"):
            return
        for _ in range(self._random.randint(1, 6)):
            if not left or not self._message(sock, file, left):
                return
        if self._random.random() < 0.7:
            self._ask(sock, file, b"QUIT\r\n")

    def _message(self, sock: socket.socket, file, left: list[int]) -> bool:
        """One message; whether the connection is still good."""
        number = left[0]
        group = [b"mail FROM:<%d@example.com>\r\n" % number, b"rcpt TO:<to@example.net>\r\n", b"DATA\r\n"]
        death = self._random.random()
        if death < 0.05:  # vanishes behind its MAIL
            sock.sendall(group[0])
            return False
        if self._random.random() < 0.5:
            sock.sendall(b"".join(group))
            replies = [self._reply(file) for _ in group]
        else:
            replies = [self._ask(sock, file, command) for command in group]
        if not replies[-1].startswith(b"354"):
            return all(replies) and self._ask(sock, file, b"RSET\r\n").startswith(b"250")
        wire = clients.stuffed(body(number))
        if death < 0.1:
            sock.sendall(wire[: len(wire) // 2])
            if death < 0.07:
                clients.reset(sock)
            return False
        self.unknown[number] += 1
        reply = self._ask(sock, file, wire + b".\r\n")
        if not reply:
            return False
        self.unknown[number] -= 1
        if reply.startswith(b"250"):
            self.accepted.add(number)
            left.pop(0)
        return reply[:1] in b"245"

    def _ask(self, sock: socket.socket, file, command: bytes) -> bytes:
        sock.sendall(command)
        return self._reply(file)

    def _reply(self, file) -> bytes:
        """The last line of a reply; b"" when there is none, or it is garbage."""
        while True:
            line = file.readline()
            if not line[:3].isdigit():
                return b""
            if line[3:4] != b"-":
                return line


def established(mx: Mx) -> set[str]:
    """The proxy's connections to a receiver, as the kernel knows them: their local ends."""
    remote, local = f":{mx.port:04X}", "0500007F:"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = (line.split() for line in lines)
    return {row[1] for row in rows if row[1].startswith(local) and row[2].endswith(remote) and row[3] == "01"}


def soak(messages: int, seed: int) -> None:
    chance = random.Random(seed)

    def script(number: int) -> dict[str, object]:
        if number == 0 or chance.random() < 0.6:
            return {}
        step = chance.choice(STEPS)
        # After two answers to DATA or to the final dot no sender can know whether the message was accepted.
        deaths = [death for death in DEATHS if death is not twice or step in ("rcpt", "rset")]
        return {step: [usual] * chance.randint(0, 3) + [chance.choice(deaths)]}

    with Mx(script) as mx, Proxy(SETTINGS) as proxy:
        with clients.socks5(proxy.socks5, mx.endpoint, SOURCE, user="a"):
            wait_for(lambda: len(established(mx)) == 1, what="they can be seen")
        senders = [
            Sender(proxy, mx, "ab"[number % 2], range(number * messages, (number + 1) * messages), seed + number)
            for number in range(6)
        ]
        threads = [threading.Thread(target=sender.run) for sender in senders]
        for thread in threads:
            thread.start()
        most, before = 0, set()
        while any(thread.is_alive() for thread in threads):
            now = established(mx)
            most = max(most, len(now & before))  # those of both lists existed at one time, the kernel's list did not
            before = now
        assert most <= PLACES
        unknown = sum((sender.unknown for sender in senders), Counter())
        counts = Counter(
            int(message.mail.partition(b"<")[2].partition(b"@")[0]) for message in mx.messages if message.accepted
        )
        told = set().union(*(sender.accepted for sender in senders))
        assert told == set(range(6 * messages)), "each message was accepted in the end"
        too_often = {number: count for number, count in counts.items() if count > 1 + unknown[number]}
        assert not too_often, "accepted more often than a client could not know"
        arrived(mx, {number: counts[number] for number in counts})  # byte for byte
        proxy.hup("reuse_connections no\n" + SETTINGS)
        proxy.wait_idle()
        wait_for(lambda: not established(mx), what="no connection is left")


def test_random_deaths_and_the_books():
    soak(int(os.environ.get("SMTP_SOAK_MESSAGES", "25")), 11)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_ten_thousand_messages_and_random_deaths(seed):
    soak(300, seed)
