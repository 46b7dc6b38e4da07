"""Two instances, one receiver, random deaths of all three kinds of connection: nothing lost, doubled, mixed or leaked.

The senders' books are compared with the receiver's: what a sender was told 250 for is there once, and whole; what it
was told a failure for is not, so sending it again makes no second copy.
"""

from __future__ import annotations

import random
import threading
import time

import pytest

from tests.mx import Mx, close, half_close, reset, say, trickle, twice, usual
from tests.program import Proxy
from tests.sharing import FAILURES, accepted, arrived, cached, instances, send
from tests.waiting import wait_for

#: A reset takes away what was said before and not yet read, the 250 to a message perhaps: only where nothing was.
GENTLE_DEATHS = (close, half_close, say(b"421 4.3.2 bye\r\n", close))
DEATHS = (*GENTLE_DEATHS, reset)
STEPS = ("greeting", "ehlo", "mail", "rcpt", "data", "body", "dot", "rset", "quit")
LIMIT = "throttle few {\n    destination 127.0.0.0/8\n    max_concurrent_connections 3\n    wait 20s\n}\n"
SETTINGS = (
    "listen_tls no\n",
    "listen_tls no\nreuse_connections_max_idle 1s\n",
    "listen_tls no\nreuse_connections_max_messages 7\n",
    "listen_tls no\nreuse_connections_max_cached 1\n",
    "listen_tls no\nreuse_connections_max_age 2s\n",
    "listen_tls no\n" + LIMIT,
)
SECONDS = 8.0
KEYS = 3


def sizes(number):
    return (300, 5_000, 60_000)[number % 3]


def fails(number):
    """How session `number` of the receiver dies; half of them do not."""
    dice = random.Random(number)
    if dice.random() < 0.5:
        return {"rset": trickle} if dice.random() < 0.2 else {}
    step = dice.choice(STEPS)
    # After two answers to DATA or to the final dot no sender can know whether the message was accepted.
    deaths = DEATHS if step in ("data", "dot") else (*DEATHS, twice)
    return {step: [usual] * dice.randrange(6) + [dice.choice(deaths)]}


class Sender(threading.Thread):
    """One greenlet's worth of an MTA: a message after the other, each until it is accepted."""

    def __init__(self, sessions, mx, first, stop, tls):
        super().__init__(daemon=True)
        self.sessions, self.mx, self.stop, self.tls = sessions, mx, stop, tls
        self.numbers = iter(range(first, first + 1_000_000))
        self.sent = []
        self.failures = 0
        self.reused = 0
        self.error = None

    def run(self):
        try:
            while not self.stop.is_set():
                self.deliver(next(self.numbers))
        except BaseException as error:
            self.error = error

    def deliver(self, number):
        for attempt in range(200):
            session = self.sessions[(number + attempt) % 2]
            try:
                smtp = send(
                    session, self.mx, number, size=sizes(number), tenant=str(number % KEYS), tls=self.tls, timeout=10
                )
            except FAILURES:
                self.failures += 1
                continue
            self.reused += smtp.opened.reused
            self.sent.append(number)
            return
        raise AssertionError(f"message {number} does not go")


def soak(seconds, tls, dies):
    """Run, and compare the books; figures for the caller's bounds."""
    stop = threading.Event()
    with (
        Mx(fails if dies else None, starttls=True) as mx,
        Proxy(SETTINGS[0]) as proxy,
        instances(proxy, "server-a", "server-b", max_idle_channels=8) as pair,
    ):
        assert all(session.wait_until_up(30) for session in pair)
        before = proxy.fds()
        senders = [Sender(pair, mx, 1_000_000 * which, stop, tls) for which in range(4)]
        for sender in senders:
            sender.start()
        ends, dice = time.monotonic() + seconds, random.Random(1)
        while time.monotonic() < ends and not any(sender.error for sender in senders):
            time.sleep(0.3)
            if not dies:
                continue
            running = [session for session in mx.sessions[-20:] if session.ended is None]
            if running:
                dice.choice(running).act(dice.choice(GENTLE_DEATHS))
            if dice.random() < 0.3:
                proxy.hup(dice.choice(SETTINGS))
        stop.set()
        for sender in senders:
            sender.join(60)
        assert not any(sender.is_alive() for sender in senders)
        assert [sender.error for sender in senders] == [None] * len(senders)
        sent = [number for sender in senders for number in sender.sent]
        arrived(mx, dict.fromkeys(sent, 1), size=sizes)
        proxy.hup("reuse_connections no\nlisten_tls no\n")
        cached(proxy, 0)
        wait_for(lambda: mx.running == 0, what="the receiver has no session left")
        for session in pair:
            session.close()
        wait_for(lambda: not proxy.open_connections("native"), what="no client is left")
        wait_for(lambda: proxy.fds() <= before, what="no descriptor is left")
        assert accepted(mx, sizes).total() == len(sent)
        return mx, len(sent), sum(sender.reused for sender in senders), sum(sender.failures for sender in senders)


def check_deaths(seconds):
    mx, sent, reused, failures = soak(seconds, "required", dies=True)
    assert failures > 0
    assert reused > 0
    assert mx.connects <= sent - reused + failures, "one for each attempt at most, the library's second one included"
    print(f"{sent} messages, {mx.connects} connects, {reused} on shared connections, {failures} failures")


def check_saving(seconds):
    """Without deaths: a connect and a handshake for each key and sender, and few for those that came too early."""
    mx, sent, reused, failures = soak(seconds, "required", dies=False)
    print(f"{sent} messages, {mx.connects} connects, {mx.handshakes} handshakes, {reused} on shared connections")
    assert failures == 0
    assert mx.handshakes == mx.connects
    assert mx.connects <= sent / 10


def test_nothing_is_lost_doubled_mixed_or_leaked():
    check_deaths(SECONDS)


def test_connects_and_handshakes_fall():
    check_saving(3.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_doubled_mixed_or_leaked_for_long():
    check_deaths(300.0)
