"""Limits that hold for all MTAs together, with real processes that are stopped, killed and restarted.

What the MTAs use is judged slot by slot (`tests.mta.check_uses`). Each path's mail is without end, so every slot that
may be used is.
"""

from __future__ import annotations

import contextlib
import signal
import time
from itertools import chain

import pytest

from tests.mta import SECOND, Mta, Paths, Use, check_uses, clock
from tests.program import Proxy
from tests.unit.throttling.oracle import Violation
from tests.waiting import wait_for

#: One fast limit; one with two throttles, strict and with a burst; a slow one, whose slots are 1.5 s apart.
PATHS: Paths = {
    "fast": [("fast", 100, 1, 1)],
    "both": [("minute", 1200, 60, 1), ("address", 40, 1, 5)],
    "slow": [("slow", 40, 60, 1)],
}
PLAIN = "listen_tls no\n"


@contextlib.contextmanager
def mtas(proxy, *names, paths=PATHS, **options):
    """MTA processes that have begun to send; all that they used is judged at the end."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Mta(proxy, name, paths, **options)) for name in names]
        wait_for(lambda: all(each.uses for each in processes), 30, "all of them send")
        yield processes
    check_uses(chain.from_iterable(each.uses for each in processes), paths)


def more(*processes, count=20, path=None):
    """Until each has used some more permits."""
    begin = clock()
    used = lambda each: sum(use.at >= begin and path in (None, use.path) for use in list(each.uses))  # noqa: E731
    wait_for(lambda: all(used(each) >= count for each in processes), 30, "they go on sending")


def over_in(seconds):
    """A moment of `clock`."""
    return clock() + int(seconds * SECOND)


def pause_until(moment):
    wait_for(lambda: clock() >= moment, 60)


def test_all_instances_together_keep_the_limits_and_nobody_starves():
    """Under load, with reloads in between, each goes on.

    How equal the shares are is judged where time is virtual (`test_shares_are_equal_within_every_second`). What a real
    MTA uses depends on when the machine lets it run: a permit that it is too late for is lost, and who loses many gets
    fewer.
    """
    with Proxy() as proxy, mtas(proxy, "a", "b", "c", tls=True) as processes:
        more(*processes)
        for number in range(3):
            proxy.hup(f"throttle_enforce {'yes' if number % 2 else 'no'}\n")
            for path in ("fast", "both"):
                more(*processes, count=20, path=path)
        more(*processes, count=2, path="slow")


@pytest.mark.parametrize("seconds", [0.3, 1.5, pytest.param(10, marks=pytest.mark.slow)])
def test_an_mta_that_was_stopped_uses_no_stale_permit(seconds):
    with Proxy(PLAIN) as proxy, mtas(proxy, "a", "b") as (stopped, other):
        for _ in range(3 if seconds < 5 else 1):
            stopped.signal(signal.SIGSTOP)
            pause_until(over_in(seconds))
            stopped.signal(signal.SIGCONT)
            more(stopped, other)  # whatever was at hand when it was stopped: `check_uses` looks at each permit's time


@pytest.mark.parametrize("down", [0.02, 2.0])
def test_the_proxy_is_killed_and_comes_back(down):
    """Overspend none: the new proxy knows nothing, and begins as late as the old one may have left its limits."""
    with Proxy(PLAIN, exit_code=-signal.SIGKILL) as first:
        address = first.native
        with mtas(first, "a", "b") as processes:
            more(*processes)
            first.signal(signal.SIGKILL)
            first.wait_exit()
            killed = clock()
            time.sleep(down)
            with Proxy(f"{PLAIN}listen {address[0]}:{address[1]}\n"):
                more(*processes)
                wait_for(
                    lambda: sum(u.at > killed and u.path == "slow" for p in processes for u in list(p.uses)) > 1, 20
                )


@pytest.mark.parametrize("seconds", [0.05, 0.7, pytest.param(7, marks=pytest.mark.slow)])
def test_the_proxy_stalls(seconds):
    """A blip within d changes nothing, one past it voids permits and releases no burst, a long one ends sessions."""
    with Proxy(PLAIN) as proxy, mtas(proxy, "a", "b") as processes:
        for _ in range(3):
            proxy.signal(signal.SIGSTOP)
            pause_until(over_in(seconds))
            proxy.signal(signal.SIGCONT)
            more(*processes)


def test_the_same_name_twice():
    """The new run has the name; the old one stays out, so that two clones do not throw each other out for ever."""
    with Proxy(PLAIN) as proxy, mtas(proxy, "a") as (old,):
        with mtas(proxy, "a") as (new,):
            wait_for(lambda: "rejected name_in_use" in old.words, what="the old run is refused")
            begin = over_in(1)  # what it had at hand was good for so long
            more(new, count=60)
            assert not old.used(since=begin)
            assert "down" not in new.words[new.words.index("up") :]
        check_uses([*old.uses, *new.uses], PATHS)


def test_a_killed_mta_takes_nothing_with_it():
    with Proxy(PLAIN) as proxy, mtas(proxy, "a", "b") as (dying, other):
        dying.kill()
        proxy.wait_line(r"session is over.*instance=a|session is over.*reason=lost")
        begin = clock()
        more(other, count=60, path="fast")
        span = (clock() - begin) / SECOND
        assert sum(use.at >= begin and use.path == "fast" for use in other.uses) > 40 * span, "it has all of the limit"


def test_the_judge_can_fail():
    """A slot used twice, a slot that comes too early, a permit used too late: each is found."""
    paths: Paths = {"p": [("t", 10, 1, 1)]}

    def use(slot, at=None):
        return Use("p", slot if at is None else at, slot, slot + 1000, slot + SECOND // 10)

    good = [use(number * SECOND // 10) for number in range(30)]
    check_uses(good, paths)
    for bad in (good[5], use(good[5].at + SECOND // 20), use(31 * SECOND // 10, at=33 * SECOND // 10)):
        with pytest.raises(Violation):
            check_uses([*good, bad], paths)
