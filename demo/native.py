"""The part of the demonstration that needs the native protocol: sharing of connections, and a common limit."""

from __future__ import annotations

import threading
import time

from demo.program import PATIENCE, SECRET, Proxy, say
from demo.receiver import MX_ADDRESS, Arrival, Mailbox
from demo.ways import message
from proxy.client import Limits, ProxyFailure, Session

NAMES = ("server-d", "server-e")
SOURCE = "127.0.0.14"
EHLO = "mail14.example"
SIZE = 20_000
A_MINUTE = 600
MESSAGES = 30


def check_sharing(proxy: Proxy, mailbox: Mailbox, mx_port: int) -> list[str]:
    """Two MTAs with our library: the second carries on with the connection, TLS included, that the first has set up.

    Both say the same name in EHLO, that of the source address: connections are shared only where the receiver cannot
    see a difference.
    """
    native = proxy.address("native")
    content = {name: message(f"shared@{name}.example", name, SIZE) for name in NAMES}
    reused = []
    for name in NAMES:
        with Session(native, SECRET, name) as session:
            began = time.monotonic()
            smtp = session.smtp([(MX_ADDRESS, mx_port)], EHLO, source_ip=SOURCE, tls="required")
            smtp.sendmail(f"sender@{name}.example", ["user@receiver.example"], content[name])
            reused.append(smtp.opened.reused)
            version = smtp.opened.tls.version if smtp.opened.tls else "no TLS"
            smtp.release(wait=True)
            verb = "took over" if reused[-1] else "set up"
            spent = (time.monotonic() - began) * 1000
            say(f"  {name}: {verb} a connection with {version}, and sent, in {spent:.1f} ms")
            proxy.wait_until_cached(1)
    arrivals = [mailbox.arrived.pop(f"shared@{name}.example", None) for name in NAMES]
    return _shared(reused, [a for a in arrivals if a is not None], list(content.values()))


def _shared(reused: list[bool], arrivals: list[Arrival], content: list[bytes]) -> list[str]:
    """What is wrong with the two messages."""
    if len(arrivals) != 2:
        return ["a message over the shared connection did not arrive"]
    wrong = []
    if reused != [False, True] or len({(a.client, a.port) for a in arrivals}) != 1:
        wrong.append(f"not shared: the MX saw ports {[a.port for a in arrivals]}")
    if any(a.client != SOURCE or not a.tls for a in arrivals):
        wrong.append(f"the shared connection did not leave from {SOURCE} with TLS")
    if [a.content for a in arrivals] != content:
        wrong.append("a message over the shared connection was changed on the way")
    return wrong


class Pusher(threading.Thread):
    """An MTA that sends as fast as its permits come, until `MESSAGES` are sent by all together."""

    def __init__(self, proxy: Proxy, name: str, mx_port: int, sent: dict[str, int]) -> None:
        super().__init__(name=name)
        self.error = ""
        self._native = proxy.address("native")
        self._mx_port = mx_port
        self._sent = sent

    def run(self) -> None:
        try:
            with Session(self._native, SECRET, self.name) as session:
                self._push(session)
        except (OSError, ProxyFailure) as error:
            self.error = f"{self.name}: {error}"

    def _push(self, session: Session) -> None:
        throttle = session.throttle(SOURCE, Limits("receiver.example", rates=[(A_MINUTE, 60)]))
        throttle.backlog(ram=MESSAGES)
        mx = [(MX_ADDRESS, self._mx_port)]
        with session.smtp(mx, EHLO, source_ip=SOURCE, tls="none", throttles=[throttle]) as smtp:
            while sum(self._sent.values()) < MESSAGES:
                smtp.permit = throttle.acquire(PATIENCE)
                name = f"throttled{self._sent[self.name]}@{self.name}.example"
                smtp.sendmail("sender@mail14.example", ["user@receiver.example"], message(name, self.name, 300))
                self._sent[self.name] += 1


def check_throttle(proxy: Proxy, mailbox: Mailbox, mx_port: int) -> list[str]:
    """Two MTAs under one limit: together they keep it, and neither gets much less than its half."""
    sent = dict.fromkeys(NAMES, 0)
    pushers = [Pusher(proxy, name, mx_port, sent) for name in NAMES]
    began = time.monotonic()
    for pusher in pushers:
        pusher.start()
    for pusher in pushers:
        pusher.join()
    spent = time.monotonic() - began
    total = sum(sent.values())
    shares = ", ".join(f"{count} by {name}" for name, count in sent.items())
    say(f"  {A_MINUTE} a minute for both together: {total} messages in {spent:.1f} s: {shares}")
    arrived = [name for name in mailbox.arrived if name.startswith("throttled")]
    for name in arrived:
        del mailbox.arrived[name]
    wrong = [pusher.error for pusher in pushers if pusher.error]
    if not len(arrived) == total >= MESSAGES:
        wrong.append(f"{len(arrived)} of {total} messages under the limit arrived")
    # A permit may be used a little later than it was meant for, so the last ones may come close together.
    if spent < (total - 1) * 60 / A_MINUTE - 0.6:
        wrong.append(f"{total} messages in {spent:.1f} s are more than {A_MINUTE} a minute")
    if min(sent.values()) < MESSAGES // 3:
        wrong.append(f"unfair: {shares}")
    return wrong
