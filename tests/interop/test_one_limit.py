"""What it is all for: two Exims and an MTA in Python, one receiver with STARTTLS, one limit; judged by the receiver.

The Exims know nothing of the proxy but their transport's `socks_proxy`; the MTA in Python uses the library. They are
behind one proxy, or behind two that keep the limit by one store.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from greenarrow_proxy_client import Session
from tests import peers
from tests.engines import VALKEY_9, engine
from tests.interop.test_exim import Exim, snippet, user  # noqa: F401 (a fixture)
from tests.mx import Mx
from tests.mx import Session as Connection
from tests.peers import MESSAGE
from tests.program import SECRET, Proxy

NAME = "mail1.example.com"
SOURCE = "127.0.0.5"
RATE = 600  # a minute
PLACES = 2
#: On a busy machine the receiver, which counts, closes late: a place waits for it.
CONFIG = f"""\
mode smtp
throttle_close_timeout 1h
default_source_ip {SOURCE}
smtp_tls required
source mail1 {{
    ip {SOURCE}
    ehlo {NAME}
}}
throttle one_receiver {{
    max_concurrent_connections {PLACES}
    max_delivery_rate {RATE}/min
    wait 40s
}}
""" + "".join(f"instance {name} {{\n    share_with all\n}}\n" for name in ("exim-1", "exim-2", "python"))


def exim(proxy: Proxy, mx: Mx, name: str, number: int, directory: Path) -> None:
    """One process for each message, as from a shell."""
    transport = snippet(proxy.socks5).replace("server-a", name)
    program = Exim(directory, transport, mx.endpoint, f"  helo_data = {NAME}\n  hosts_try_fastopen =\n")
    for each in range(number):
        program.send(f"{each}@{name}.example")
    assert program.queue() == 0, program.main_log.read_text()


def python(proxy: Proxy, mx: Mx, name: str, number: int, directory: Path) -> None:
    with Session(proxy.native, SECRET, name) as session:
        for each in range(number):
            with session.smtp([mx.endpoint], NAME, source_ip=SOURCE, tls="required") as smtp:
                assert smtp.sendmail(f"{each}@{name}.example", ["to@example.net"], MESSAGE) == {}


Send = Callable[[Proxy, Mx, str, int, Path], None]
SENDERS: dict[str, Send] = {"exim-1": exim, "exim-2": exim, "python": python}


class Witness:
    """What a receiver sees.

    Attributes:
        times: of each MAIL. most: connections at one time.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.most = 0

    def mail(self, session: Connection, reply: bytes) -> None:
        self.times.append(time.monotonic())
        self.most = max(self.most, session.mx.open)
        session.send(reply)

    def busiest(self, seconds: float) -> int:
        times = sorted(self.times)
        return max(bisect_left(times, at + seconds) - number for number, at in enumerate(times))

    def pace(self) -> float:
        """Messages a second, from the first to the last."""
        return (len(self.times) - 1) / (max(self.times) - min(self.times))


def judge(each: int, account: str, *configs: str) -> None:
    """Args: configs: of the proxies; the senders are spread over them."""
    witness = Witness()
    failures: list[BaseException] = []

    def run(send: Send, name: str, proxy: Proxy) -> None:
        try:
            with peers.directory(account) as directory:
                send(proxy, mx, name, each, directory)
        except BaseException as error:
            failures.append(error)

    with Mx({"mail": witness.mail}, starttls=True) as mx, ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(config)) for config in configs or (CONFIG,)]
        threads = [
            threading.Thread(target=run, args=(send, name, proxies[number % len(proxies)]))
            for number, (name, send) in enumerate(SENDERS.items())
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        senders = Counter(bytes(message.mail).partition(b"<")[2].partition(b">")[0].decode() for message in mx.messages)
        assert senders == {f"{number}@{name}.example": 1 for name in SENDERS for number in range(each)}
        assert all(message.accepted and message.encrypted for message in mx.messages)
        assert {message.content.rstrip() for message in mx.messages} == {MESSAGE.rstrip()}
        assert witness.most <= PLACES
        if len(proxies) == 1:
            # One carries 100 messages at most (reuse_connections_max_messages).
            assert mx.handshakes == mx.connects <= 2 * PLACES + 3 * each // 50
        # Exactly so where the proxy writes MAIL (unit/throttling/test_late_slots.py); here with a second's margin.
        assert witness.busiest(59) <= RATE
        # And evenly: few messages tell of a rate, too.
        assert witness.pace() <= RATE / 60 * 1.05


def test_three_mtas_under_one_limit(user: str) -> None:  # noqa: F811
    judge(8, user)


@pytest.mark.slow
def test_a_thousand_messages_under_one_limit(user: str) -> None:  # noqa: F811
    judge(334, user)


def test_three_mtas_behind_two_proxies_under_one_limit(user: str) -> None:  # noqa: F811
    with engine(VALKEY_9) as store:
        config = CONFIG.replace("    wait 40s\n", "    wait 40s\n    per nothing\n    scope cluster\n")
        config += f"throttle_store {store.url()}\nthrottle_store_members 2\n"
        judge(8, user, config, config)
