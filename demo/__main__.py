"""A demonstration on one machine, and a check: several MTAs share one proxy, and each leaves from its own address.

Everything runs on loopback addresses: an MX on 127.0.0.2, the proxy on 127.0.0.3 to .5, sources 127.0.0.11 to .15.
The MX records who connected and what arrived; at the end both are compared with what was sent, byte by byte.
Exit code 0 only if all of it is right. Started by `make demo`.
"""

from __future__ import annotations

import argparse
import re
import smtplib
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import socks

from demo import mixed
from demo.program import CONFIGURATION, ROOT, SECRET, Address, Failure, Proxy, say
from demo.queues import NAMES, check_queues
from demo.receiver import MX_ADDRESS, Mailbox, mail_exchanger
from demo.ways import (
    Connect,
    OverSocket,
    like_a_script,
    like_greenarrow,
    like_kumomta,
    message,
    socks5_login,
    socks5_request,
)
from greenarrow_proxy_client import ProxyFailure

SIZES = (2_000, 20_000, 500_000)


@dataclass
class Sender:
    """One MTA: how it connects, where its mail must seem to come from, what it has sent."""

    name: str
    way: str
    protocol: str
    connect: Connect
    source: str
    sent: dict[str, bytes] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""

    def run(self, proxy: Address, mx_port: int) -> None:
        """Send a message of each size, each through a connection of its own; the body of a thread."""
        try:
            for size in SIZES:
                self._send(proxy, mx_port, size)
        except (OSError, smtplib.SMTPException, socks.ProxyError, Failure) as error:
            self.error = f"{type(error).__name__}: {error}"

    def _send(self, proxy: Address, mx_port: int, size: int) -> None:
        name = f"{size}@{self.name}.example"
        content = message(name, self.name, size)
        began = time.monotonic()
        smtp = OverSocket(self.connect(proxy, mx_port))
        with smtp:
            smtp.sendmail(f"sender@{self.name}.example", ["user@receiver.example"], content)
        self.sent[name] = content
        self.seconds[name] = time.monotonic() - began
        say(f"  {self.name}: {size:>7,} bytes sent in {self.seconds[name] * 1000:.1f} ms")


# ---------------------------------------------------------------- the story


def check(senders: list[Sender], mailbox: Mailbox) -> list[str]:
    """What is wrong with what arrived; and the account, a line a message."""
    wrong = []
    say("\nWhat the MX saw")
    say(f"  {'message':<26} {'way through the proxy':<34} {'left from':<12} {'time':>9}  content")
    for sender in senders:
        if sender.error:
            wrong.append(f"{sender.name}: {sender.error}")
        for name, content in sender.sent.items():
            arrival = mailbox.arrived.get(name)
            if arrival is None:
                wrong.append(f"{name} did not arrive")
                continue
            same = arrival.content == content
            if not same:
                wrong.append(f"{name} was changed on the way")
            if arrival.client != sender.source:
                wrong.append(f"{name} left from {arrival.client} instead of {sender.source}")
            verdict = f"{len(content):,} bytes, {'identical' if same else 'CHANGED'}"
            spent = f"{sender.seconds[name] * 1000:.1f} ms"
            say(f"  {name:<26} {sender.way:<34} {arrival.client:<12} {spent:>9}  {verdict}")
    expected = len(senders) * len(SIZES)
    if len(mailbox.arrived) != expected:
        wrong.append(f"{len(mailbox.arrived)} messages arrived instead of {expected}")
    return wrong


def check_refusal(proxy: Address) -> list[str]:
    """An address that is not in source_ip must be refused, before anything leaves."""
    with socks5_login(proxy, "server-a") as sock:
        reply = socks5_request(sock, 2, "127.0.0.66", 0)
    say(f"  server-a asks to leave from 127.0.0.66, which is not in source_ip: SOCKS reply {reply} (2: not allowed)")
    return [] if reply == 2 else [f"leaving from 127.0.0.66 was answered with {reply}"]


def demonstrate(program: list[str]) -> list[str]:
    """Run everything; returns what went wrong.

    Raises:
        Failure: it could not go on.
    """
    senders = [
        Sender("server-a", "SOCKS5, BIND + CONNECT (KumoMTA)", "socks5", like_kumomta, "127.0.0.11"),
        Sender("server-b", "PROXY v2 (GreenArrow and others)", "proxy_protocol", like_greenarrow, "127.0.0.12"),
        Sender("server-c", "SOCKS5, a library (any program)", "socks5", like_a_script, "127.0.0.13"),
    ]
    mailbox = Mailbox()
    with mail_exchanger(mailbox) as mx_port, tempfile.TemporaryDirectory() as directory:
        say(f"MX listens on {MX_ADDRESS}:{mx_port}. Starting the proxy ...")
        configuration = CONFIGURATION.format(secret=SECRET, port=mx_port, mx=MX_ADDRESS) + mixed.CONFIGURATION
        proxy = Proxy(program, configuration, Path(directory))
        try:
            doors = {protocol: proxy.address(protocol) for protocol in ("socks5", "proxy_protocol", "native")}
            listing = ", ".join(f"{host}:{port} ({protocol})" for protocol, (host, port) in doors.items())
            say(f"The proxy listens on {listing}. Three MTAs send at the same time:")
            threads = [threading.Thread(target=s.run, args=(doors[s.protocol], mx_port)) for s in senders]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wrong = check_refusal(doors["socks5"])
            say("\nThree MTAs (etc/clients/queue_sender.py) drain their queues from one address, within common limits:")
            wrong += check_queues(proxy, mailbox, mx_port, Path(directory))
            say("\nA KumoMTA, by its bytes (mode smtp), and a Python MTA (native protocol) send in turns:")
            wrong += mixed.check_mixed(proxy, mailbox, mx_port)
        finally:
            code = proxy.stop()
    wrong += check(senders, mailbox)
    wrong += check_log(senders, proxy.lines, code)
    return wrong


def check_log(senders: list[Sender], lines: list[str], code: int) -> list[str]:
    """The proxy's own account must agree: one closing line for each connection, with the right source."""
    wrong = [] if code == 0 else [f"the proxy ended with exit code {code}"]
    own = [line for line in lines if re.search(r"\b(connection|refused|failed) id=", line)]
    say("\nWhat the proxy logged")
    for line in own:
        say(f"  {line}")
    for sender in senders:
        count = sum(f" protocol={sender.protocol} " in line and f" source={sender.source} " in line for line in own)
        if count != len(SIZES):
            wrong.append(f"{count} closing lines about {sender.source} instead of {len(SIZES)}")
    shared = [line for line in own if " source=127.0.0.14 " in line and " tls=TLSv1" in line]
    missing = [name for name in NAMES if not any(f" instance={name} " in line for line in shared)]
    wrong += [f"no closing line about {name}" for name in missing]
    if not any(" reused=yes " in line for line in shared):
        wrong.append("no closing line that tells of a shared connection")
    if not any("reason=source_not_allowed" in line for line in own):
        wrong.append("no line about the refused source")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument(
        "--program", default=f"{sys.executable} {ROOT / 'greenarrow_proxy.py'}", help="the proxy to run"
    )
    program = parser.parse_args().program.split()
    began = time.monotonic()
    try:
        wrong = demonstrate(program)
    except (Failure, ProxyFailure) as failure:
        wrong = [str(failure)]
    if wrong:
        say("\nFAILED\n  " + "\n  ".join(wrong))
        return 1
    spent = time.monotonic() - began
    say(f"\nAll right: five source addresses, every byte as sent, one limit kept by three; {spent:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
