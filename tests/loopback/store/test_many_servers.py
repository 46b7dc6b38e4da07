"""Sentinels and clusters: the master dies, is named anew, is moved by hand; slots move, servers die and come back."""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import pytest

from proxy.store.calls import Call, Fate
from proxy.store.slots import slot_of
from tests import engines
from tests.loopback.store.conftest import TRACE, Caller, Connect, connected
from tests.loopback.store.fake import Fake, bulk
from tests.waiting import wait_for

kinds = pytest.mark.parametrize("kind", engines.KINDS)


# ------------------------------------------------------------------ Sentinel


@kinds
def test_a_master_that_dies_is_followed_to_the_next(kind: str, connect: Connect) -> None:
    with engines.watched(kind, "pass@word") as group:
        caller = Caller(connected(connect(group.url)), b"failover")
        first = caller.until(Fate.ANSWERED)
        assert list(caller.store.view().servers) == [group.master.where]
        group.master.kill()
        assert caller.call().fate in (Fate.LOST, Fate.UNSENT)
        second = caller.until(Fate.ANSWERED)
        assert second.identity != first.identity
        (where,) = caller.store.view().servers
        assert where in [each.where for each in group.replicas]
        (promoted,) = (each for each in group.replicas if each.where == where)
        caller.check_what_is_left(promoted.client.lrange("failover", 0, -1))


@pytest.fixture(scope="module")
def group() -> Iterator[engines.Watched]:
    with engines.watched(engines.VALKEY_9) as group:
        yield group


def test_sentinels_that_are_gone_or_silent_cost_nothing_as_long_as_most_are_there(
    group: engines.Watched, connect: Connect
) -> None:
    url = group.url.replace("redis+sentinel://", "redis+sentinel://127.0.0.1:1,")
    group.sentinels[0].freeze()
    try:
        store = connected(connect(url))
        caller = Caller(store, b"two left")
        assert caller.until(Fate.ANSWERED)
        assert store._sentinels is not None
        kept = {host for host, _ in store._sentinels._links}
        assert kept == {each.host for each in group.sentinels[1:]}, "who does not answer is asked anew"
    finally:
        group.sentinels[0].thaw()


def test_a_master_whose_sentinels_are_not_the_majority_is_let_go(group: engines.Watched, connect: Connect) -> None:
    """Whoever is on the other side may have named another one, with all that it grants."""
    store = connected(connect(group.url))
    caller = Caller(store, b"cut off")
    caller.until(Fate.ANSWERED)
    for each in group.sentinels[:2]:
        each.freeze()
    try:
        wait_for(lambda: "NOQUORUM" in str(store.view().trouble), 60, "it is told", gevent.sleep)
        assert caller.call().fate is Fate.UNSENT
        group.sentinels[2].freeze()
        wait_for(lambda: "no answer within" in str(store.view().trouble), 60, "it is told", gevent.sleep)
        assert caller.call().fate is Fate.UNSENT
    finally:
        for each in group.sentinels:
            each.thaw()
    caller.until(Fate.ANSWERED)


def sentinel(master: str, epoch: int) -> Fake:
    """One that names this one, of this epoch."""
    host, port = master.split(":")

    def answer(words: list[bytes], sock: object) -> bytes:
        if words[1] == b"MASTER":
            return b"*4\r\n" + b"".join(map(bulk, (b"name", b"m", b"config-epoch", b"%d" % epoch)))
        return b"*2\r\n" + bulk(host.encode()) + bulk(port.encode())

    return Fake(SENTINEL=answer)


def test_the_newest_word_of_sentinels_counts(connect: Connect) -> None:
    """One that is cut off from the others still names the old master, which may still be there, too."""
    with Fake() as old, Fake() as new, sentinel(old.where, 3) as behind, sentinel(new.where, 4) as ahead:
        for order in ((behind, ahead), (ahead, behind)):
            store = connected(connect(f"redis+sentinel://{','.join(each.where for each in order)}/m"))
            assert list(store.view().servers) == [new.where]


def test_a_sentinel_that_says_no_epoch_is_believed_if_it_is_the_only_one(connect: Connect) -> None:
    with Fake() as master, sentinel(master.where, 1) as one:
        named = one.answers["SENTINEL"]
        one.answers["SENTINEL"] = lambda words, sock: (
            b"-ERR unknown\r\n" if words[1] == b"MASTER" else named(words, sock)
        )
        assert list(connected(connect(f"redis+sentinel://{one.where}/m")).view().servers) == [master.where]


@pytest.mark.parametrize(
    "answer",
    [b"*0\r\n", b"*2\r\n:1\r\n:2\r\n", b"*2\r\n$0\r\n\r\n$4\r\n6379\r\n", b"*2\r\n$1\r\nh\r\n$1\r\n0\r\n", b"+OK\r\n"],
)
def test_a_sentinel_that_talks_nonsense(connect: Connect, answer: bytes) -> None:
    with Fake(SENTINEL=answer) as fake:
        store = connect(f"redis+sentinel://{fake.where}/m")
        wait_for(lambda: store.view().trouble, 30, "it is told", gevent.sleep)
        assert "without an address" in str(store.view().trouble)


def test_a_service_that_they_do_not_know(group: engines.Watched, connect: Connect) -> None:
    store = connect(group.url.replace("mymaster", "yours"))
    wait_for(lambda: store.view().trouble, 30, "it is told", gevent.sleep)
    assert "it knows no service yours" in str(store.view().trouble)


def test_a_replica_is_no_store(group: engines.Watched, connect: Connect) -> None:
    replica = next(
        each for each in (group.master, *group.replicas) if each.client.info("replication")["role"] == "slave"
    )
    store = connect(replica.url())
    wait_for(lambda: store.view().trouble, 30, "it is told", gevent.sleep)
    trouble = store.view().trouble
    assert trouble is not None
    assert trouble.step == "role"
    assert "it is a replica" in trouble.reason
    assert store.view().counts.connects == 0


def test_a_failover_by_hand(connect: Connect) -> None:
    """The old master lives, as a replica now: what is written there is refused or never comes there, and not lost."""
    with engines.watched(engines.VALKEY_8) as group:
        caller = Caller(connected(connect(group.url)), b"by hand")
        first = caller.until(Fate.ANSWERED).identity
        old = group.master.where
        group.sentinels[0].client.execute_command("SENTINEL FAILOVER", engines.SERVICE)

        def moved() -> bool:
            caller.call()
            return list(caller.store.view().servers) not in ([], [old])

        wait_for(moved, 60, "the next one is found", gevent.sleep)
        assert caller.until(Fate.ANSWERED).identity != first


def test_a_master_that_becomes_a_replica_behind_our_back(connect: Connect) -> None:
    """Nobody ends our connection: READONLY, or the next look at it, tells."""
    with engines.engine(engines.VALKEY_9) as one, engines.engine(engines.VALKEY_9) as other:
        caller = Caller(connected(connect(one.url())), b"demoted")
        first = caller.until(Fate.ANSWERED).identity
        one.client.replicaof(other.host, other.port)
        refused = caller.call()
        assert refused.fate in (Fate.REFUSED, Fate.LOST)
        assert "READONLY" in str(refused.trouble)
        assert not caller.store.view().connected, "it is let go"
        one.client.replicaof("NO", "ONE")
        assert caller.until(Fate.ANSWERED).identity != first


def test_a_mastership_that_changes_and_comes_back_is_another_identity(connect: Connect) -> None:
    """Between two looks at it, and on one connection: its data may be another one's now."""
    with engines.engine(engines.VALKEY_9) as one, engines.engine(engines.VALKEY_9) as other:
        store = connected(connect(one.url()))
        first = store.identity(b"k")
        admin = one.client
        admin.replicaof(other.host, other.port)
        wait_for(lambda: admin.info("replication")["master_link_status"] == "up", 30, "it follows")
        admin.replicaof("NO", "ONE")
        wait_for(lambda: store.identity(b"k") not in ("", first), 30, "it is seen", gevent.sleep)


# ------------------------------------------------------------------ cluster


@pytest.fixture(scope="module", params=engines.KINDS)
def cluster(request: pytest.FixtureRequest) -> Iterator[engines.Shards]:
    with engines.shards(request.param) as cluster:
        yield cluster


def key_at(node: engines.Engine, cluster: engines.Shards, name: str) -> bytes:
    """A key that this one has."""
    keys = (b"{ga:%b:%d}" % (name.encode(), number) for number in range(10_000))
    return next(key for key in keys if cluster.owner(slot_of(key)) is node)


def found(store_caller: Caller) -> Caller:
    store_caller.until(Fate.ANSWERED)
    return store_caller


def test_calls_go_to_whoever_has_the_key(cluster: engines.Shards, connect: Connect) -> None:
    store = connect(cluster.url)
    keys = [key_at(node, cluster, "whoever") for node in cluster.nodes]
    for key in keys:
        found(Caller(store, key))
    replies = store.call(TRACE, [Call((key,), (7,)) for key in keys * 3])
    assert [reply.fate for reply in replies] == [Fate.ANSWERED] * 9
    assert [reply.identity for reply in replies[:3]] == [store.identity(key) for key in keys]
    assert len({reply.identity for reply in replies}) == 3
    assert set(store.view().servers) == {node.where for node in cluster.nodes}
    assert store.is_cluster


def test_one_named_server_is_enough(cluster: engines.Shards, connect: Connect) -> None:
    store = connect(f"redis+cluster://127.0.0.1:1,{cluster.nodes[1].where}")
    for node in cluster.nodes:
        found(Caller(store, key_at(node, cluster, "enough")))


@pytest.mark.usefixtures("patient")
def test_a_slot_that_has_moved(cluster: engines.Shards, connect: Connect) -> None:
    source, to, third = cluster.nodes
    store = connect(cluster.url)
    key = key_at(source, cluster, "moved")
    caller = found(Caller(store, key))
    found(Caller(store, key_at(to, cluster, "there")))
    source.client.delete(key)
    cluster.move(slot_of(key), to)
    assert cluster.owner(slot_of(key)) is to
    told = source.client.info("errorstats").get("errorstat_MOVED", {"count": 0})["count"]
    assert caller.call().fate is Fate.ANSWERED
    assert to.client.lrange(key, 0, -1) == [b"%d" % (len(caller.fates) - 1)]
    assert caller.call().fate is Fate.ANSWERED
    assert source.client.info("errorstats")["errorstat_MOVED"]["count"] == told + 1, "we are told once"
    to.client.delete(key)
    cluster.move(slot_of(key), third)
    caller.until(Fate.ANSWERED)


def test_a_slot_that_is_moving(cluster: engines.Shards, connect: Connect) -> None:
    """Whoever has it knows no such key any more, and says ASK: the other one is asked for this once."""
    source, to, _ = cluster.nodes
    store = connect(cluster.url)
    key = key_at(source, cluster, "moving")
    found(Caller(store, key_at(to, cluster, "there too")))
    caller = found(Caller(store, key))
    before = caller.call().identity
    source.client.delete(key)
    cluster.move(slot_of(key), to, finish=False)
    replies = caller.calls(3)
    assert [reply.fate for reply in replies] == [Fate.ANSWERED] * 3
    assert replies[0].identity != before
    for node in (source, to):
        node.client.execute_command("CLUSTER SETSLOT", slot_of(key), "STABLE")


def test_keys_of_two_tags_in_one_call_are_refused(cluster: engines.Shards, connect: Connect) -> None:
    store = connect(cluster.url)
    found(Caller(store, b"{a}"))
    reply = store.call(TRACE, [Call((b"{a}", b"{b}"), (0,))])[0]
    assert reply.fate is Fate.REFUSED
    assert "CROSSSLOT" in str(reply.trouble)


def test_a_server_that_dies_takes_its_keys_with_it_and_no_others(connect: Connect) -> None:
    with engines.shards(engines.VALKEY_9) as cluster:
        store = connect(cluster.url)
        callers = [found(Caller(store, key_at(node, cluster, "dies"))) for node in cluster.nodes]
        dead = cluster.nodes[2]
        dead.kill()
        assert callers[2].call().fate in (Fate.LOST, Fate.UNSENT)
        assert store.identity(callers[2].key) == ""
        callers[0].until(Fate.ANSWERED)
        callers[1].until(Fate.ANSWERED)
        assert store.view().degraded_ns is not None
        dead.start()
        callers[2].until(Fate.ANSWERED)
        connected(store)


def test_a_replica_takes_over(connect: Connect) -> None:
    """Its data may be behind: it is another identity."""
    with engines.shards(engines.VALKEY_8, replicas=1) as cluster:
        first, replica = cluster.nodes[0], cluster.replicas[0]
        caller = found(Caller(connect(cluster.url), key_at(first, cluster, "over")))
        before = caller.call().identity
        assert before == caller.store.identity(caller.key)
        first.kill()
        assert caller.call().fate in (Fate.LOST, Fate.UNSENT)
        assert caller.until(Fate.ANSWERED).identity != before
        assert replica.where in caller.store.view().servers
        caller.check_what_is_left(replica.client.lrange(caller.key, 0, -1))


def test_a_cluster_under_the_address_of_one_server(cluster: engines.Shards, connect: Connect) -> None:
    store = connect(cluster.nodes[0].url())
    key = key_at(cluster.nodes[1], cluster, "wrong")
    connected(store)
    reply = store.call(TRACE, [Call((key,), (0,))])[0]
    assert reply.fate is Fate.REFUSED
    assert reply.trouble is not None


def test_one_server_under_the_address_of_a_cluster(connect: Connect) -> None:
    with engines.engine(engines.VALKEY_9) as server:
        store = connect(f"redis+cluster://{server.where}")
        caller = Caller(store, b"k")
        wait_for(lambda: "cluster support disabled" in str(caller.call().trouble), 30, "it is told", gevent.sleep)
        assert set(caller.fates.values()) == {Fate.UNSENT}
