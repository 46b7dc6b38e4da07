"""A master dies and a replica that has not heard of the last slots takes its place."""

from __future__ import annotations

import pytest

from tests.e2e.cluster.house import House
from tests.engines import KINDS, VALKEY_9, Watched, shards, watched


def hear_nothing_more(group: Watched) -> None:
    """The replicas stay as they are, and the master goes on: their word to it is wrong from now on, and it need not ask
    any of them before it writes."""
    for server in group.servers:
        server.client.config_set("min-replicas-to-write", 0)
    for replica in group.replicas:
        replica.client.config_set("masterauth", "wrong")
    group.master.client.execute_command("CLIENT", "KILL", "TYPE", "replica")


@pytest.mark.parametrize("kind", [VALKEY_9, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[:2])])
def test_a_replica_that_lags_becomes_master(kind: str) -> None:
    with watched(kind) as group, House(group.url) as house, house.mail():
        house.more(20)
        hear_nothing_more(group)
        house.more(40)
        assert house.proxies[0].page()["store"]["master"] == group.master.where
        group.master.kill()
        house.wait_alone()
        house.more(20)
        house.wait_together()
        assert house.proxies[0].page()["store"]["master"] in [each.where for each in group.replicas]
        house.more(40)


def test_a_cluster_of_which_one_server_dies() -> None:
    """What lives there goes on with shares; it is one throttle here, so one server has all of it."""
    with shards(VALKEY_9) as cluster, House(cluster.url) as house, house.mail():
        house.more(30)
        for node in cluster.nodes:
            node.kill()
        house.wait_alone()
        house.more(20)
