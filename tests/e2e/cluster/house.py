"""Several proxies that keep one limit by one store, MTAs behind each, and a receiver that keeps its own times.

    with engine(VALKEY_9) as store, House(store.url()) as house, house.mail():
        store.kill()
        house.more(50)
    # on leaving, the receiver's evidence is judged: no window, long or short, saw more than the limit

MTAs send without end and through everything: who loses its connection comes again. What they send is MAIL and RSET, as
fast as they are let, so that there is always more to send than may be sent.
"""

from __future__ import annotations

import contextlib
import signal
import smtplib
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Any

from greenarrow_proxy_client import ProxyFailure, Session
from tests.clients import Refused, Smtp, socks5
from tests.e2e.throttling.senders import more
from tests.mx import Mx
from tests.program import SECRET, Proxy
from tests.unit.throttling.oracle import SECOND, Rule
from tests.waiting import wait_for
from tests.witness import Witness, now

#: The first proxy sends from here, the next ones from the addresses after it.
SOURCE = "127.0.0.5"
NAME = "mta.example.com"
#: Messages a minute over all proxies: fast enough for a short test, and long enough a window to be strict.
A_MINUTE = 3000
#: How much later than its slot a message may go, at most: a call, and a slot of a block; see docs/throttling.md.
LATEST = 15 * SECOND // 100
RULE = Rule(A_MINUTE, 60, latest=LATEST)


class House:
    """A context manager; on leaving it judges.

    Args:
        urls: the store, or as each proxy sees it.
        proxies: how many. members: what each believes, P.
        limits, per, scope: of the block. rule: what holds at the receiver; None: nothing is judged.
        more: further lines of the configuration. script: see `Witness`.

    Attributes:
        witness: the receiver's evidence.
        proxies: the programs; one that was started anew is another object in the same place.
    """

    def __init__(
        self,
        *urls: str,
        proxies: int = 2,
        members: int | None = None,
        limits: str = f"max_delivery_rate {A_MINUTE}/min",
        rule: Rule | None = RULE,
        per: str = "nothing",
        scope: str = "cluster",
        more: str = "",
        **script: Any,
    ) -> None:
        self.witness = Witness(**script)
        self.mx = Mx(self.witness.script)
        self.proxies: list[Proxy] = []
        self._rule = rule
        self._stack = ExitStack()
        believed = proxies if members is None else members
        self._configurations = [
            # What a proxy is known by in the store is its machine and where it listens, or with port 0 this socket.
            f"control_socket @house-{uuid.uuid4()}\nlisten_tls no\nlisten_status 127.0.0.1:0\nmode smtp\n{more}"
            f'throttle_store "{urls[number % len(urls)]}"\n'
            f"throttle_store_members {believed}\n"
            f"throttle shared {{\n    per {per}\n    scope {scope}\n    wait 5s\n    {limits}\n}}\n"
            for number in range(proxies)
        ]

    def __enter__(self) -> House:
        with ExitStack() as stack:
            stack.enter_context(self.mx)
            for configuration in self._configurations:
                self.proxies.append(stack.enter_context(Proxy(configuration)))
            self.wait_together()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
        if error[0] is None and self._rule is not None:
            self.witness.check(self._rule)

    # -- mail

    @contextlib.contextmanager
    def mail(self, *proxies: int, threads: int = 8, each: int = 0) -> Iterator[None]:
        """An MTA sends through each of these proxies, all if none is named; all have begun.

        Args:
            threads, each: see `Mta`. So many that all slots which are given out ahead are in somebody's hands.
        """
        numbers = proxies or tuple(range(len(self.proxies)))
        with ExitStack() as stack:
            mtas = [self._mta(number, threads, each) for number in numbers]
            begin = now()
            for mta in mtas:
                stack.enter_context(mta)
            begun = {mta.name for mta in mtas}
            wait_for(lambda: begun <= set(self.witness.counts(begin)), 30, "all of them send")
            yield
            for mta in mtas:
                mta.stop()

    def _mta(self, number: int, threads: int, each: int) -> Mta:
        """One behind this proxy: by the library where the number is even, else one that knows SOCKS5 only."""
        kind, name = (_in_python if number % 2 == 0 else _by_socks5), f"mta-{number}"
        return Mta(name, lambda stack, who: kind(self.proxies[number], self.mx, number, who, stack), threads, each)

    def more(self, count: int, *mtas: int) -> None:
        """Until the receiver has seen so many more messages, of these MTAs together (all, if none is named)."""
        more(self.witness, count, now(), *(f"mta-{number}" for number in mtas))

    # -- proxies

    def wait_state(self, state: str, *proxies: int) -> None:
        """Until these, all if none is named, say so of their store."""
        for number in proxies or range(len(self.proxies)):
            proxy = self.proxies[number]
            wait_for(
                lambda proxy=proxy: (proxy.page()["store"] or {}).get("state") == state,  # type: ignore[misc]
                20,
                f"the store of proxy {number} is {state}",
            )

    def wait_alone(self) -> None:
        """Until all have seen that the store is gone."""
        self.wait_state("degraded")

    def wait_together(self) -> None:
        """Until all have the store."""
        self.wait_state("connected")

    def kill(self, number: int) -> None:
        """SIGKILL."""
        proxy = self.proxies[number]
        proxy.exit_code = -signal.SIGKILL
        proxy.signal(signal.SIGKILL)
        proxy.wait_exit()

    def start_again(self, number: int) -> None:
        """With the same configuration."""
        self.proxies[number] = self._stack.enter_context(Proxy(self._configurations[number]))


Connect = Callable[[ExitStack, str], smtplib.SMTP]


class Mta:
    """Sends without end from `name`@example.com, each thread on a connection of its own; a context manager.

    Args:
        connect: makes an SMTP session through a proxy, which may be gone, as the instance that it is given.
        each: messages on a connection; 0: all.
    """

    def __init__(self, name: str, connect: Connect, threads: int, each: int) -> None:
        self.name = name
        self._each = each
        self._connect = connect
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(f"{name}-{at}",)) for at in range(threads)]

    def __enter__(self) -> Mta:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join(30)

    def stop(self) -> None:
        """After the message that it is at."""
        self._over.set()

    def _run(self, instance: str) -> None:
        while not self._over.is_set():
            try:
                with ExitStack() as stack:
                    smtp = self._connect(stack, instance)
                    sent = 0
                    while not self._over.is_set() and not 0 < self._each <= sent:
                        sent += 1
                        smtp.mail(f"{self.name}@example.com")  # a 451 is an answer, too
                        smtp.rset()
                    smtp.quit()  # who leaves without a word is reset, and a receiver notices that when it likes
            except (ProxyFailure, Refused, smtplib.SMTPException, OSError):
                self._over.wait(0.02)


def source_of(number: int) -> str:
    """Where the mail of this proxy leaves from."""
    return str(ip_address(SOURCE) + number)


def _in_python(proxy: Proxy, mx: Mx, number: int, who: str, stack: ExitStack) -> smtplib.SMTP:
    session = stack.enter_context(Session(proxy.native, SECRET, who, tls=False, timeout=5))
    source = source_of(number)
    smtp: smtplib.SMTP = session.smtp([mx.endpoint], NAME, source_ip=source, reuse=False, tls="none")
    stack.callback(smtp.close)
    return smtp


def _by_socks5(proxy: Proxy, mx: Mx, number: int, who: str, stack: ExitStack) -> smtplib.SMTP:
    sock = socks5(proxy.socks5, mx.endpoint, source_of(number), user=who)
    smtp = Smtp(stack.enter_context(sock))
    stack.callback(smtp.close)
    smtp.ehlo()
    return smtp
