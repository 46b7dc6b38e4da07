"""Upgrades in a row under the load of all doors: four zeros, and mail that is compared byte for byte.

`pytest -m slow -s tests/e2e/server/test_upgrade_drill.py` does twenty of them; CI does three.
"""

from __future__ import annotations

import contextlib
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest

from greenarrow_proxy_client import Limits, ProxyRefused, ProxyUnavailable, Session, ThrottleTimeout
from tests.clients import Refused, proxied, send, socks5, v1, v2
from tests.e2e.server.test_upgrade import lives, others_of
from tests.mx import Mx
from tests.program import SECRET, Proxy
from tests.unit.throttling.oracle import SECOND, Rule
from tests.waiting import wait_for
from tests.witness import Witness

FREE, LIMITED, NATIVE = "127.0.0.5", "127.0.0.6", "127.0.0.7"
SETTINGS = f"""\
workers 2
listen_tls no
listen_status 127.0.1.4:0
listen_socks5_tls 127.0.2.2:0
upgrade_timeout 60s
mode_smtp_starttls yes
smtp_tls opportunistic
instance shares {{
    mode smtp
}}
source shared {{
    ip {FREE}
    ehlo client.example
}}
throttle one {{
    source {LIMITED}
    max_concurrent_connections 2
    max_delivery_rate 40/s
    wait 60s
}}
"""
ANYBODY = ssl.create_default_context()
ANYBODY.check_hostname, ANYBODY.verify_mode = False, ssl.CERT_NONE


class Books:
    """What was sent, and what went wrong: `refused` at a door, `cut` afterwards."""

    def __init__(self) -> None:
        self.sent: Counter[bytes] = Counter()
        self.by: Counter[str] = Counter()
        self.refused: list[str] = []
        self.cut: list[str] = []
        self.ends = threading.Event()
        self._lock = threading.Lock()

    def note(self, who: str, message: bytes) -> None:
        with self._lock:
            self.sent[message] += 1
            self.by[who] += 1

    def wrong(self, error: Exception, who: str) -> None:
        refused = isinstance(error, ConnectionRefusedError | Refused)
        with self._lock:
            (self.refused if refused else self.cut).append(f"{who}: {type(error).__name__}: {error}")

    @property
    def all_well(self) -> bool:
        return not self.refused and not self.cut


def message(who: str, number: int, chance: random.Random) -> bytes:
    lines = [bytes(chance.choices(b".abc ", k=chance.randrange(70))) for _ in range(chance.randrange(1, 200))]
    return f"Subject: {who} {number}\r\n\r\n".encode() + b"".join(line + b"\r\n" for line in lines)


def forever(books: Books, who: str, deliver: Callable[[bytes], object]) -> None:
    """One client."""
    chance, number = random.Random(who), 0
    while not books.ends.is_set() and books.all_well:
        number += 1
        text = message(who, number, chance)
        try:
            deliver(text)
        except Exception as error:
            books.wrong(error, who)
            return
        books.note(who, text)


def by_socket(connect: Callable[[], object], text: bytes) -> None:
    with connect() as sock:  # type: ignore[attr-defined]
        reply = send(sock, text)
    assert reply[0] == 250, reply


def by_library(session: Session, throttle: object, mx: Mx, text: bytes) -> None:
    """As docs/library.md has it: what is refused for now is tried again; what has begun is not cut."""
    until = time.monotonic() + 60
    while True:
        try:
            smtp = session.smtp([mx.endpoint], "mta.example.org", source_ip=NATIVE, throttles=[throttle])  # type: ignore[list-item]
        except (ProxyRefused, ProxyUnavailable) as error:
            if not error.retry or time.monotonic() > until:
                raise
            time.sleep(0.05)
            continue
        try:
            smtp.permit = throttle.acquire(30)  # type: ignore[attr-defined]
        except (ThrottleTimeout, ProxyUnavailable):
            smtp.release()
            continue
        smtp.sendmail("from@example.com", ["to@example.net"], text)
        smtp.release()
        return


def of_before(proxy: Proxy) -> list[int]:
    """Processes that should have ended."""
    found = [pid for pid in others_of(proxy) if pid != proxy.pid]
    return found if proxy.pid == proxy._process.pid or not lives(proxy._process.pid) else [*found, proxy._process.pid]


def drill(upgrades: int) -> None:
    free, limited, books = Mx(starttls=True), Witness(), Books()
    with (
        free,
        Mx(limited.script) as narrow,
        Proxy(SETTINGS) as proxy,
        Session(proxy.native, SECRET, "native", tls=False) as session,
    ):
        plain = proxy.door("socks5", "127.0.1.2")
        throttle = session.throttle(NATIVE, Limits("n", rates=[(3600 * 30, 3600)], max_connections=2))
        ways: dict[str, Callable[[bytes], object]] = {
            "socks5": partial(by_socket, partial(socks5, plain, free.endpoint, FREE)),
            "socks5-tls": partial(
                by_socket, partial(socks5, proxy.door("socks5", "127.0.2.2"), free.endpoint, FREE, tls=ANYBODY)
            ),
            "proxy-v1": partial(by_socket, partial(proxied, proxy.proxy_protocol, free.endpoint, FREE, v1)),
            "proxy-v2": partial(by_socket, partial(proxied, proxy.proxy_protocol, free.endpoint, FREE, v2)),
            "shares": partial(by_socket, partial(socks5, plain, free.endpoint, FREE, user="shares")),
            "shares-2": partial(by_socket, partial(socks5, plain, free.endpoint, FREE, user="shares")),
            "limited": partial(by_socket, partial(socks5, plain, narrow.endpoint, LIMITED)),
            "limited-2": partial(by_socket, partial(socks5, plain, narrow.endpoint, LIMITED, user="shares")),
            "limited-3": partial(by_socket, partial(socks5, plain, narrow.endpoint, LIMITED, user="shares")),
            "library": partial(by_library, session, throttle, free),
        }
        clients = [threading.Thread(target=forever, args=(books, who, way)) for who, way in ways.items()]
        for client in clients:
            client.start()
        try:
            for _ in range(upgrades):
                so_far, old = Counter(books.by), proxy.upgrade()
                wait_for(
                    lambda so_far=so_far: not books.all_well or all(books.by[who] > so_far[who] + 1 for who in ways),  # type: ignore[misc]
                    90,
                    f"mail goes on through all doors: {books.by}",
                )
                wait_for(lambda old=old: not books.all_well or not lives(old), 90, "the old process ends")  # type: ignore[misc]
        finally:
            books.ends.set()
            for client in clients:
                client.join(90)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not of_before(proxy), 60)
        left = of_before(proxy)
        over = max(0, limited.most - 2)
        print(
            f"{upgrades} upgrades, {sum(books.sent.values())} messages {dict(books.by)}: refused {len(books.refused)}, "
            f"cut {len(books.cut)}, over the limit {over}, processes left over {len(left)}"
        )
        assert not books.refused
        assert not books.cut
        assert not left
        assert not over
        limited.check(Rule(40, 1, latest=SECOND // 10), wait_for_places=True)
        got = Counter(each.content for mx in (free, narrow) for each in mx.messages if each.accepted)
        assert got == books.sent
        assert proxy.matching("reused=yes"), "connections were shared"


def test_three_upgrades_under_the_load_of_all_doors() -> None:
    drill(3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_upgrades_under_the_load_of_all_doors() -> None:
    drill(20)
