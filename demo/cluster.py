"""A demonstration on one machine, and a check: two proxies keep one limit together, and the store that holds it dies.

Three MTAs send through two proxies to one receiver, which may get ten messages a second of all of them together. The
limit lives in a Valkey (from PyPI). First all send; then only those of the second proxy; then the Valkey is killed in
the middle; then it comes back, empty. What is told comes from the receiver, which notes when each message began. Exit
code 0 only if no window of time, long or short, saw more than the limit. Started by `make demo-cluster`.
"""

from __future__ import annotations

import argparse
import smtplib
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from demo.engine import Valkey
from demo.program import PATIENCE, ROOT, SECRET, Address, Failure, Proxy, say
from demo.receiver import MX_ADDRESS, Mailbox, mail_exchanger
from demo.ways import OverSocket, message, socks5_login, socks5_request
from greenarrow_proxy_client import ProxyFailure, Session

A_MINUTE = 600
#: Seconds by which the receiver's program may note a message too late, on a busy machine.
SLACK = 0.5
#: Seconds that each part of the story takes.
PART = 4
#: Part of what the limit allows that is enough for "all of it is used", and for "a half is used".
ENOUGH = 0.8

CONFIGURATION = """\
listen_socks5 {host}:0
listen {native}:0
allow_from 127.0.0.0/8
auth_shared_secret "{secret}"
source_ip 127.0.0.11, 127.0.0.12, 127.0.0.13
destination_port {port}
allow_destination {mx}
mode smtp
control_socket {directory}/{name}.control
throttle_store redis://{store}/0
throttle_store_members 2
throttle everybody {{
    destination {mx}
    per nothing
    scope cluster
    max_delivery_rate {a_minute}/min
}}
"""


class Mail(NamedTuple):
    """`at`: seconds of the monotonic clock at which its MAIL came."""

    at: float
    sender: str


class Ledger(Mailbox):
    """A receiver that notes when each message began."""

    def __init__(self) -> None:
        super().__init__()
        self.mails: list[Mail] = []

    async def handle_MAIL(self, server: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        self.mails.append(Mail(time.monotonic(), address.partition("@")[2].removesuffix(".example")))
        envelope.mail_from = address
        return "250 2.1.0 sender ok"

    def counts(self, since: float, until: float) -> Counter[str]:
        """Messages of each sender in that time."""
        return Counter(mail.sender for mail in list(self.mails) if since <= mail.at < until)


class Mta:
    """One MTA: it has mail whenever it is told so, and sends it as fast as it may.

    Args:
        connect: makes an SMTP session through the proxy.
    """

    def __init__(self, name: str, proxy: str, connect: Callable[[ExitStack], smtplib.SMTP]) -> None:
        self.name = name
        self.proxy = proxy
        self.has_mail = threading.Event()
        self.errors: list[str] = []
        self._connect = connect
        self._over = False
        self._thread = threading.Thread(target=self._run)

    def start(self) -> None:
        self.has_mail.set()
        self._thread.start()

    def end(self) -> None:
        self._over = True
        self.has_mail.set()
        if self._thread.ident is not None:
            self._thread.join(PATIENCE)

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                smtp = self._connect(stack)
                content = message(f"{self.name}@cluster.example", self.name, 2_000)
                while self.has_mail.wait() and not self._over:
                    smtp.sendmail(f"sender@{self.name}.example", ["user@receiver.example"], content)
        except (OSError, smtplib.SMTPException, ProxyFailure) as error:
            self.errors.append(f"{self.name}: {type(error).__name__}: {error}")


def like_kumomta(door: Address, name: str, source: str, mx_port: int) -> Callable[[ExitStack], smtplib.SMTP]:
    """An MTA that knows nothing but SOCKS5."""

    def connect(stack: ExitStack) -> smtplib.SMTP:
        sock = socks5_login(door, name)
        socks5_request(sock, 2, source, 0)
        socks5_request(sock, 1, MX_ADDRESS, mx_port)
        return stack.enter_context(OverSocket(sock))

    return connect


def in_python(door: Address, name: str, source: str, mx_port: int) -> Callable[[ExitStack], smtplib.SMTP]:
    """A program with the proxy's library."""

    def connect(stack: ExitStack) -> smtplib.SMTP:
        session = stack.enter_context(closing(Session(door, SECRET, name)))
        made = session.smtp([(MX_ADDRESS, mx_port)], "mail13.example", source_ip=source, tls="opportunistic")
        stack.callback(made.close)
        smtp: smtplib.SMTP = made
        return smtp

    return connect


# ---------------------------------------------------------------- the story


class Story:
    """What happens, and what is seen of it.

    Attributes:
        wrong: what is not as it should be.
    """

    def __init__(self, program: list[str], ledger: Ledger, mtas: list[Mta], directory: Path) -> None:
        self.wrong: list[str] = []
        self._program = program
        self._ledger = ledger
        self._mtas = mtas
        self._directory = directory

    def watch(self, seconds: int = PART) -> float:
        """Tell each second what the receiver got; the messages of a second, those of the first one left out."""
        began = time.monotonic()
        for second in range(seconds):
            time.sleep(max(0.0, began + second + 1 - time.monotonic()))
            counts = self._ledger.counts(began + second, began + second + 1)
            parts = []
            for proxy in sorted({mta.proxy for mta in self._mtas}):
                own = [(mta.name, counts[mta.name]) for mta in self._mtas if mta.proxy == proxy]
                named = ", ".join(f"{name} {count}" for name, count in own)
                parts.append(f"{proxy}: {sum(count for _, count in own):>2} ({named})")
            say(f"  second {second + 1}: {counts.total():>2} of {A_MINUTE // 60}   {';  '.join(parts)}")
        settled = self._ledger.counts(began + 1, began + seconds)
        return settled.total() / (seconds - 1)

    def expect(self, seen: float, part: float, what: str) -> None:
        """So much of the limit was to be used, at least most of it."""
        if seen < ENOUGH * part * A_MINUTE / 60:
            self.wrong.append(f"{what}: {seen:.1f} a second")

    def ask(self, proxy: str, *words: str) -> list[str]:
        """What an operator sees who types this."""
        typed = ["ctl", "--socket", str(self._directory / f"{proxy}.control"), *words]
        done = subprocess.run([*self._program, *typed], capture_output=True, text=True, timeout=PATIENCE, check=False)
        return done.stdout.splitlines()

    def check_limit(self) -> None:
        """However a time is cut out, it holds no more than the limit: k messages take k - 1 intervals at the least."""
        times = sorted(mail.at for mail in self._ledger.mails)
        say(f"\nThe receiver got {len(times)} messages.")
        if (excess := excess_of(times)) is not None:
            self.wrong.append(excess)
        else:
            say(f"  In no window of time, long or short, were there more than {A_MINUTE} a minute allow.")


def excess_of(times: list[float]) -> str | None:
    """The first messages that came too close together, in words."""
    interval = 60 / A_MINUTE
    best, begin = times[0] if times else 0.0, 0
    for number, at in enumerate(times):
        place = at - number * interval
        if place < best - SLACK:
            count, spread = number - begin + 1, at - times[begin]
            return f"{count} messages in {spread:.2f} s are more than {A_MINUTE} a minute"
        if place > best:
            best, begin = place, number
    return None


def demonstrate(program: list[str]) -> list[str]:
    """Run everything; returns what went wrong.

    Raises:
        Failure: it could not go on.
    """
    ledger = Ledger()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = Valkey(directory)
        stack.callback(store.kill)
        store.start()
        mx_port = stack.enter_context(mail_exchanger(ledger))
        say("The receiver listens on {}:{}, the store, a Valkey, on {}:{}.".format(MX_ADDRESS, mx_port, *store.address))
        proxies = {}
        for name, host, native in (("proxy-1", "127.0.0.3", "127.0.0.5"), ("proxy-2", "127.0.0.4", "127.0.0.7")):
            (directory / name).mkdir()
            text = CONFIGURATION.format(
                host=host,
                native=native,
                secret=SECRET,
                port=mx_port,
                mx=MX_ADDRESS,
                store="{}:{}".format(*store.address),
                directory=directory,
                name=name,
                a_minute=A_MINUTE,
            )
            proxies[name] = Proxy(program, text, directory / name)
            stack.callback(proxies[name].stop)
        first, second = proxies.values()
        mtas = [
            Mta("server-a", "proxy-1", like_kumomta(first.address("socks5"), "server-a", "127.0.0.11", mx_port)),
            Mta("server-b", "proxy-2", like_kumomta(second.address("socks5"), "server-b", "127.0.0.12", mx_port)),
            Mta("server-c", "proxy-2", in_python(second.address("native"), "server-c", "127.0.0.13", mx_port)),
        ]
        story = Story(program, ledger, mtas, directory)
        for mta in mtas:
            stack.callback(mta.end)
            mta.start()
        _tell(story, store, proxies, mtas)
        for mta in mtas:
            mta.end()
        story.check_limit()
    wrong = story.wrong + [error for mta in mtas for error in mta.errors]
    for name, proxy in proxies.items():
        if (code := proxy.stop()) != 0:
            wrong.append(f"{name} ended with exit code {code}")
    return wrong


def _tell(story: Story, store: Valkey, proxies: dict[str, Proxy], mtas: list[Mta]) -> None:
    say(
        f"\n1. Three MTAs behind two proxies: {A_MINUTE} a minute, {A_MINUTE // 60} a second, for all of them together."
    )
    story.expect(story.watch(), 1, "two proxies together use too little of the limit")

    say("\n2. The MTA of proxy-1 has no mail: proxy-2 may have all of the limit.")
    mtas[0].has_mail.clear()
    story.expect(story.watch(), 1, "one proxy alone uses too little of the limit")

    say("\n3. All have mail again, and the store is killed: each proxy goes on with its half, and never with more.")
    mtas[0].has_mail.set()
    store.kill()
    story.expect(story.watch(), 1, "without the store the proxies use too little of the limit")
    for name, proxy in proxies.items():
        line = proxy.wait_for(r"WARNING store: .*does not answer.*").group()
        say(f"  {name} has logged:  {line}")
    say("  What its operator sees ('greenarrow_proxy ctl show trouble'):")
    trouble = story.ask("proxy-1", "show", "trouble")
    for line in trouble[1:]:
        say(f"    {' '.join(line.split())}")
    if not any(line.startswith("store_degraded") for line in trouble):
        story.wrong.append("proxy-1 does not say that its store is gone")

    say("\n4. The MTA of proxy-1 has no mail: proxy-2 stays at its half, for it cannot know. That is the price.")
    mtas[0].has_mail.clear()
    seen = story.watch()
    story.expect(seen, 0.5, "without the store one proxy uses too little of its half")
    if seen > 0.75 * A_MINUTE / 60:
        story.wrong.append(f"without the store one proxy took more than its half: {seen:.1f} a second")

    say("\n5. All have mail, and the store comes back, empty: nobody trusts an empty memory, so nothing is sent twice.")
    mtas[0].has_mail.set()
    store.start()
    for name, proxy in proxies.items():
        line = proxy.wait_for(r"store: .*answers again.*").group()
        say(f"  {name} has logged:  {line}")
    story.expect(story.watch(PART + 1), 1, "after the store has come back too little of the limit is used")
    if (trouble := story.ask("proxy-1", "show", "trouble")) != ["trouble: none"]:
        story.wrong.append(f"proxy-1 still has trouble: {trouble}")


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
    say(f"\nAll right: one limit for two proxies, with the store and without it; {time.monotonic() - began:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
