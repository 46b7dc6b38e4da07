"""Connections of several proxies under one limit, by the receiver's count: each from its accept until it closes."""

from __future__ import annotations

from tests.e2e.cluster.house import House
from tests.engines import VALKEY_9, engine
from tests.waiting import wait_for

PLACES = 5
LIMIT = f"max_concurrent_connections {PLACES}"


def test_all_proxies_together_have_no_more_connections_than_places() -> None:
    """More want one than there are, at both; what one does not use the other may have, but for the one that nobody is
    without."""
    with engine(VALKEY_9) as store, House(store.url(), limits=LIMIT, rule=None) as house:
        with house.mail(threads=6, each=3):
            house.more(60, 0)
            house.more(60, 1)
            wait_for(lambda: house.mx.open == PLACES, 30, "both together have all of them")
        with house.mail(1, threads=6, each=3):
            wait_for(lambda: house.mx.open == PLACES - 1, 30, "one proxy has all that it can have")
        assert house.witness.most <= PLACES


def test_without_the_store_each_has_its_share_of_the_places() -> None:
    with engine(VALKEY_9) as store, House(store.url(), limits=LIMIT, rule=None) as house, house.mail(threads=6, each=3):
        house.more(60)
        store.kill()
        house.wait_alone()
        wait_for(lambda: house.mx.open <= PLACES // 2 * 2, 30, "each has its share")
        so_far, house.witness.most = house.witness.most, 0
        house.more(60, 0)
        house.more(60, 1)
        alone, house.witness.most = house.witness.most, 0
        store.start()
        house.wait_together()
        house.more(60, 0)
        house.more(60, 1)
        assert so_far <= PLACES
        assert alone <= PLACES // 2 * 2
        assert house.witness.most <= PLACES


def test_a_proxy_that_dies_frees_its_places_and_none_too_early() -> None:
    with engine(VALKEY_9) as store, House(store.url(), limits=LIMIT, rule=None) as house, house.mail(threads=6, each=3):
        house.more(60)
        house.kill(0)
        house.more(60, 1)
        house.start_again(0)
        house.more(60, 0)
        assert house.witness.most <= PLACES
