"""Permits of MTAs with the library, each at a proxy of its own, for a rule that is for all proxies together."""

from __future__ import annotations

from greenarrow_proxy_client import Limits
from tests.e2e.cluster.house import A_MINUTE, LATEST, House
from tests.e2e.throttling.senders import Sender, more, sending
from tests.engines import VALKEY_9, engine
from tests.unit.throttling.oracle import Rule
from tests.witness import now


def test_permits_of_two_proxies_are_for_one_limit_whatever_becomes_of_the_store() -> None:
    rule = Limits("rule", [(A_MINUTE, 60)], scope="cluster")
    with (
        engine(VALKEY_9) as store,
        House(store.url(), limits="max_concurrent_connections 100", rule=None) as house,
    ):
        senders = [
            Sender(proxy.native, house.mx, f"mta-{number}", rule, threads=8)
            for number, proxy in enumerate(house.proxies)
        ]
        with sending(house.witness, *senders):
            house.more(100)
            store.client.flushall()
            house.more(50)
            store.kill()
            house.wait_alone()
            for number in range(2):
                more(house.witness, 30, now(), f"mta-{number}")
            store.start()
            house.wait_together()
            house.more(100)
        slack = max(sender.slack for sender in senders)
        house.witness.check(Rule(A_MINUTE, 60, latest=LATEST + slack))
