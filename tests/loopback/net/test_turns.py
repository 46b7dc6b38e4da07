"""Resting: who else runs meanwhile, in which order turns come, and how many of them in a round of the loop."""

from __future__ import annotations

import os

import gevent
import pytest
from gevent import get_hub

from proxy.net.turns import rest, turns
from proxy.policy.turns import MOST_A_ROUND


def test_a_turn_for_others_is_one_for_sockets_too() -> None:
    """Whoever has much to do and lets others run between two steps keeps a socket waiting for two steps at most."""
    hub = get_hub()
    seen: list[bool] = []
    read_end, write_end = os.pipe()
    watcher = hub.loop.io(read_end, 1)
    watcher.start(lambda: (seen.append(True), watcher.stop()))
    try:
        for _ in range(3):
            rest()
        assert not seen
        os.write(write_end, b"!")
        for _ in range(3):
            rest()
        assert seen
    finally:
        watcher.close()
        os.close(read_end)
        os.close(write_end)


def test_a_crowd_in_the_line_gets_a_few_turns_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many have more to do, what is done between two looks at the sockets has a bound."""
    monkeypatch.setattr("proxy.net.turns.ROUND_SECONDS", 60.0)
    line, seen = turns(), []

    def work(number: int) -> None:
        for _ in range(3):
            rest(number)
            seen.append(line.rounds)

    gevent.joinall([gevent.spawn(work, number) for number in range(5 * MOST_A_ROUND)])
    assert len(seen) == 15 * MOST_A_ROUND
    assert max(seen.count(round) for round in set(seen)) == MOST_A_ROUND


def test_one_long_turn_ends_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.net.turns.ROUND_SECONDS", 0.0)
    line, seen = turns(), []
    work = [gevent.spawn(lambda key=number: (rest(key), seen.append(line.rounds))) for number in range(5)]
    gevent.joinall(work)
    assert len(set(seen)) == 5


def test_keys_take_turns() -> None:
    """Five of one key rest before one of another."""
    order: list[str] = []

    def work(key: str) -> None:
        rest(key)
        order.append(key)

    gevent.joinall([gevent.spawn(work, key) for key in ("a", "a", "a", "a", "a", "b")])
    assert order == ["a", "b", "a", "a", "a", "a"]


def test_other_wake_ups_are_only_hints() -> None:
    done: list[str] = []
    greenlet = gevent.spawn(lambda: (rest(), done.append("rested")))
    blocker = [gevent.spawn(rest, number) for number in range(3 * MOST_A_ROUND)]
    gevent.sleep(0)
    assert len(turns()) == 1 + len(blocker)
    get_hub().loop.run_callback(greenlet.switch)
    get_hub().loop.run_callback(lambda: done.append("hint"))
    gevent.joinall([greenlet, *blocker])
    assert done == ["hint", "rested"]
    assert len(turns()) == 0


def test_who_is_called_off_leaves_the_line() -> None:
    """A deadline that passes while one rests."""
    greenlet = gevent.spawn(rest)
    gevent.sleep(0)
    assert len(turns()) == 1
    greenlet.kill()
    assert len(turns()) == 0
    rest()  # and the line works on
