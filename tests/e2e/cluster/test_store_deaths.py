"""Whatever dies or lies, several proxies together pass no more than the limit, and go on: judged by the receiver.

The rows of what can fail stand in docs/cluster.md. What takes a second in one of these tests is a condition that is
waited for; how much mail came meanwhile decides nothing, for a busy machine sends less.
"""

from __future__ import annotations

import threading

import pytest

from tests.e2e.cluster.house import House
from tests.engines import KINDS, REDIS_7, VALKEY_9, engine
from tests.link import Link
from tests.program import Proxy
from tests.waiting import wait_for


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_is_killed_and_comes_back_empty(kind: str) -> None:
    with engine(kind) as store, House(store.url()) as house, house.mail():
        house.more(30)
        store.kill()
        house.wait_alone()
        house.more(20, 0)
        house.more(20, 1)
        store.start()
        house.wait_together()
        house.more(40)


def test_a_proxy_is_killed_and_comes_back() -> None:
    with engine(VALKEY_9) as store, House(store.url()) as house, house.mail():
        house.more(20)
        house.kill(0)
        house.more(40, 1)
        house.start_again(0)
        house.more(20, 0)


def test_engine_and_proxy_are_killed_together() -> None:
    with engine(VALKEY_9) as store, House(store.url()) as house, house.mail():
        house.more(20)
        store.kill()
        house.kill(0)
        house.more(20, 1)
        house.start_again(0)  # it has never heard of the store, and has no share before it has
        store.start()
        house.wait_together()
        house.more(20, 0)
        house.more(20, 1)


def test_all_is_forgotten_while_nobody_is_disconnected() -> None:
    with engine(VALKEY_9) as store, House(store.url()) as house, house.mail():
        for _ in range(3):
            house.more(15)
            store.client.flushall()
        house.more(30)


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1.0])
def test_the_engine_stands_still(seconds: float) -> None:
    """What was asked for meanwhile is answered late, and means nothing any more."""
    with engine(REDIS_7) as store, House(store.url()) as house, house.mail():
        for _ in range(3):
            house.more(15)
            store.client.execute_command("DEBUG", "SLEEP", seconds)
        house.more(30)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [2, 5])
def test_the_engine_pauses_its_clients(seconds: int) -> None:
    with engine(VALKEY_9) as store, House(store.url()) as house, house.mail():
        for _ in range(3):
            house.more(30)
            store.client.client_pause(seconds * 1000)
            house.wait_alone()
            house.more(10)
            house.wait_together()
        house.more(40)


def test_an_old_memory_comes_back() -> None:
    """As after a crash with the last RDB, written long before it."""
    with engine(VALKEY_9, "dbfilename old.rdb") as store, House(store.url()) as house, house.mail():
        house.more(10)
        store.client.save()
        house.more(60)
        store.kill()
        store.start()
        assert store.client.dbsize() > 0, "it knows what was, and not what came after"
        house.wait_together()
        house.more(40)


def test_the_proxies_believe_that_they_are_more_than_they_are() -> None:
    with engine(VALKEY_9) as store, House(store.url(), members=3) as house, house.mail():
        house.more(20)
        store.kill()
        house.wait_alone()
        house.more(20)
        store.start()
        house.wait_together()
        house.more(20)


def test_one_that_believes_to_be_alone_and_is_not_is_told_so() -> None:
    """With the store all is well; an empty one could not know that there is another, so nothing more is promised."""
    with engine(VALKEY_9) as store, House(store.url(), members=1) as house, house.mail():
        house.more(60)
        for proxy in house.proxies:
            wait_for(lambda proxy=proxy: "store_members" in kinds(proxy), 30, "the trouble is told")


def kinds(proxy: Proxy) -> list[str]:
    return [row["kind"] for row in proxy.page()["trouble"]]


def test_a_reply_is_lost_after_it_was_carried_out() -> None:
    with engine(VALKEY_9) as store, Link((store.host, store.port)) as link:
        behind = store.url().replace(store.where, "{}:{}".format(*link.endpoint))
        with House(behind, store.url()) as house, house.mail():
            for number in range(1, 6):
                house.more(10)
                link.lose_replies()
                wait_for(lambda number=number: link.lost == number, 30, "a reply is lost")
            house.wait_together()
            house.more(30)


def test_one_proxy_is_parted_from_the_engine_while_mail_goes_on() -> None:
    with engine(VALKEY_9) as store, Link((store.host, store.port)) as link:
        behind = store.url().replace(store.where, "{}:{}".format(*link.endpoint))
        with House(behind, store.url()) as house, house.mail():
            house.more(20)
            link.part()
            house.wait_state("degraded", 0)
            house.more(20, 0)
            house.more(20, 1)
            link.thaw()
            house.wait_together()
            house.more(40)


def test_three_proxies_and_an_engine_that_comes_and_goes() -> None:
    with engine(VALKEY_9) as store, House(store.url(), proxies=3) as house, house.mail():
        over = threading.Event()

        def come_and_go() -> None:
            while not over.wait(0.4):
                store.freeze()
                over.wait(0.4)
                store.thaw()

        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            for number in range(3):
                house.more(8, number)
        finally:
            over.set()
            thread.join(30)
        house.wait_together()
        house.more(20)
