"""Limits that change while three MTAs send without end, and a manager that is killed: no burst comes of it.

Under demand a burst is never more than empty, whatever changes. One that was full would be sixty messages at once.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from greenarrow_proxy_client import Limits
from tests.e2e.throttling.senders import Sender, more, passed, sending
from tests.mx import Mx
from tests.program import Proxy
from tests.unit.throttling.oracle import SECOND, Rule, check_windows
from tests.waiting import wait_for
from tests.witness import MARGIN, Witness, now

PLAIN = "listen_tls no\nlisten_status 127.0.0.1:0\n"
AMOUNT, BURST = 1200, 60
#: What the burst may have gained in moments in which no MTA was let run.
PAUSES = 10
#: After so many messages what a predecessor might have left is paid for, and would hide no burst.
SETTLED = 75


def limit(burst: int = BURST, seconds: int = 60) -> Limits:
    return Limits("rule", [(AMOUNT, seconds)], burst=burst)


def minute(name: str, amount: int, burst: int = 0, seconds: int = 60) -> Limits:
    return Limits(name, [(amount, seconds)], burst=burst)


def change_all(senders: list[Sender], to: Limits) -> None:
    for sender in senders:
        sender.change(to)


def grow(senders: list[Sender]) -> None:
    change_all(senders, limit())


def let_the_cautious_one_go(senders: list[Sender]) -> None:
    senders[0].stop()
    senders[0].session.close()


def change_the_length(senders: list[Sender], length: int = 61) -> None:
    change_all(senders, limit(seconds=length))
    wait_for(lambda: all(sender.path.effective[0][0] == [(AMOUNT, length)] for sender in senders))


def change_the_length_again_and_again(senders: list[Sender]) -> None:
    for number in range(12):
        change_the_length(senders, 61 - number % 2)


#: The burst that each says first, what happens then, and the length of the window in the end.
CHANGES: dict[str, tuple[tuple[int, int, int], Callable[[list[Sender]], None], int]] = {
    "a-burst-that-grows": ((1, 1, 1), grow, 60),
    "who-said-no-burst-leaves": ((1, BURST, BURST), let_the_cautious_one_go, 60),
    "another-length": ((BURST, BURST, BURST), change_the_length, 61),
    "another-length-twelve-times": ((BURST, BURST, BURST), change_the_length_again_and_again, 60),
}


def mtas(address: tuple[str, int], mx: Mx, bursts: tuple[int, ...]) -> list[Sender]:
    return [Sender(address, mx, name, limit(burst), threads=10) for name, burst in zip("abc", bursts, strict=True)]


def in_force(proxy: Proxy, length: int = 60) -> bool:
    """The limit with its burst, and of this length."""
    return [row["limits"] for row in proxy.throttles()] == [[{"amount": AMOUNT, "seconds": length, "burst": BURST}]]


def judge(witness: Witness, senders: list[Sender]) -> None:
    """As if there were hardly any burst."""
    slack = max(sender.slack for sender in senders)
    witness.check(Rule(AMOUNT + PAUSES - 1, 60, PAUSES, 250_000_000, slack))


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_lets_a_burst_through(change: str) -> None:
    bursts, act, length = CHANGES[change]
    witness = Witness()
    with Mx(witness.script) as mx, Proxy(PLAIN) as proxy:
        senders = mtas(proxy.native, mx, bursts)
        with sending(witness, *senders):
            more(witness, SETTLED, 0)
            act(senders)
            wait_for(lambda: in_force(proxy, length))
            more(witness, 20, now())
        judge(witness, senders)


def test_a_manager_that_is_killed_lets_no_burst_through() -> None:
    witness = Witness()
    with Mx(witness.script) as mx, Proxy(PLAIN, exit_code=-signal.SIGKILL) as first:
        address = first.native
        senders = mtas(address, mx, (BURST,) * 3)
        with sending(witness, *senders):
            more(witness, SETTLED, 0)
            first.signal(signal.SIGKILL)
            first.wait_exit()
            killed = now()
            with Proxy(f"{PLAIN}listen {address[0]}:{address[1]}\n"):
                more(witness, 20, killed)
                for sender in senders:
                    sender.stop()
        judge(witness, senders)


#: Names of throttles, the limits that each of three MTAs says first, and those to which they change, one after another.
MINUTES: dict[str, tuple[tuple[Limits, ...], list[Limits]]] = {
    "grows": ((minute("grows", 100, 1),) * 3, [minute("grows", 100, 50)]),
    "falls": ((minute("falls", 100, 50),) * 3, [minute("falls", 100, 1)]),
    "longer": ((minute("longer", 100, 50),) * 3, [minute("longer", 100, 50, 61)]),
    "leaves": ((minute("leaves", 100, 1), *(minute("leaves", 100, 50),) * 2), []),
    "slow": ((minute("slow", 4),) * 3, [minute("slow", 4, seconds=60 + number % 2) for number in range(1, 13)]),
}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_no_minute_sees_more_than_the_limit_whatever_changes() -> None:
    """A minute before the changes, one after them, and one after the manager was killed."""
    witness = Witness()
    with Mx(witness.script) as mx, Proxy(PLAIN, exit_code=-signal.SIGKILL) as first, ExitStack() as stack:
        address = first.native
        senders = {
            name: [
                Sender(address, mx, f"{name}-{mta}", limit, threads=4) for mta, limit in zip("abc", says, strict=True)
            ]
            for name, (says, _) in MINUTES.items()
        }
        every = [sender for each in senders.values() for sender in each]
        stack.enter_context(sending(witness, *every, within=90))
        passed(witness, 70)
        let_the_cautious_one_go(senders["leaves"])
        for step in range(12):
            for name, (_, changes) in MINUTES.items():
                if step < len(changes):
                    change_all(senders[name], changes[step])
            passed(witness, 72 + 2 * step)
        passed(witness, 160)
        first.signal(signal.SIGKILL)
        first.wait_exit()
        with Proxy(f"{PLAIN}listen {address[0]}:{address[1]}\n"):
            passed(witness, 230)
            for sender in every:
                sender.stop()
    for name, (says, _) in MINUTES.items():
        times = [mail.at for mail in witness.mails() if mail.sender.startswith(name)]
        check_windows(times, 60 * SECOND - MARGIN, says[0].rates[0][0])
        assert len(times) > says[0].rates[0][0], "and the limit is used"
