"""What `--check-config` says of a store: nothing of one that is fit, and one sentence for each thing that is not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.config.store import parse_store
from proxy.net.identities import StoreTls, store_tls
from proxy.net.relay import Engine
from proxy.store import dial
from proxy.store.probe import COMMANDS, Found, probe
from tests import engines
from tests.loopback.store.conftest import clock_ns

LUA = Path(dial.__file__).with_name("lease.lua")
DOCS = Path(__file__).parents[3] / "docs" / "configuration.md"
#: An ACL user's rights, word by word as the documents have them.
RIGHTS = re.findall(r"^ACL SETUSER proxy on >PASSWORD (.*)$", DOCS.read_text(), flags=re.MULTILINE)[0].split()


@pytest.fixture
def ask(engine: Engine):
    def ask(url: str, tls: StoreTls | None = None, **changes: str) -> list[Found]:
        settings = parse_store(url)
        assert settings is not None
        found = probe(engine, dataclasses.replace(settings, **changes), tls, clock_ns)  # type: ignore[arg-type]
        assert all("se cret:" not in each.message for each in found)
        return found

    return ask


def only(found: list[Found]) -> tuple[bool, str]:
    """The one thing that there is to say."""
    ((error, message),) = found
    return error, message


def test_one_that_is_fit_and_keeps_nothing_of_it(server: engines.Engine, ask) -> None:
    assert ask(server.url()) == []
    assert ask(server.url(database=5)) == []
    assert server.client.keys("*") == []


def test_the_rights_in_the_documents_are_enough_and_each_is_needed(server: engines.Engine, ask) -> None:
    """For a cluster `cluster|slots` and `asking` as well; SELECT, PING and a name can be done without, or elsewhere."""
    admin = server.client

    def with_rights(*rights: str) -> list[Found]:
        admin.execute_command("ACL DELUSER proxy")
        admin.execute_command("ACL SETUSER", "proxy", "on", ">pw", *rights)
        return ask(server.url("proxy", "pw", 3))

    assert with_rights(*RIGHTS) == []
    spare = {"+client|setname", "+cluster|slots", "+asking", "+ping"}
    for right in set(RIGHTS) - spare:
        found = with_rights(*(each for each in RIGHTS if each != right))
        assert found, f"{right} is not needed"
        assert all(each.error for each in found)
        assert all("ACL SETUSER" in each.message for each in found), found


def test_it_tries_each_command_that_the_script_uses() -> None:
    used = set(re.findall(r"redis\.p?call\('(\w+)'", LUA.read_text()))
    assert used <= set(COMMANDS)
    assert {f"+{name.lower()}" for name in COMMANDS} <= set(RIGHTS)


@pytest.mark.parametrize(
    ("url", "changes", "error", "words"),
    [
        ("redis://127.0.0.1:1", {}, False, "127.0.0.1:1: Connection refused: nobody listens there"),
        ("redis://nowhere.invalid", {}, False, "nowhere.invalid:6379: "),
        ("unix:///nowhere", {}, False, "/nowhere: No such file or directory"),
        ("redis://WHERE", {}, True, "NOAUTH Authentication required: it wants a password"),
        ("redis://:x@WHERE", {}, True, "user or password is another one there"),
        ("redis://:se%20cret%3A@WHERE/99", {}, True, "it has fewer databases"),
        ("redis+cluster://:se%20cret%3A@WHERE", {}, True, "it is no cluster"),
        ("redis+sentinel://:se%20cret%3A@WHERE/m", {}, True, "it is no Sentinel"),
    ],
)
def test_one_that_is_not(server: engines.Engine, ask, url, changes, error, words) -> None:
    found = ask(url.replace("WHERE", server.where), **changes)
    assert found[-1].error == error
    assert words in found[-1].message
    assert len({each.message for each in found}) == len(found)


def test_one_that_answers_nothing(server: engines.Engine, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "WITHIN", 0.3)
    server.freeze()
    try:
        assert only(ask(server.url())) == (
            False,
            f"{server.where}: no answer within 0.3 s: does it want TLS (rediss://), or is another program there?",
        )
    finally:
        server.thaw()


def test_one_that_forgets_when_its_memory_is_full(server: engines.Engine, ask) -> None:
    admin = server.client
    admin.config_set("maxmemory", "1gb")
    assert ask(server.url()) == []
    admin.config_set("maxmemory-policy", "volatile-ttl")
    try:
        error, message = only(ask(server.url()))
        assert error
        assert "with maxmemory-policy volatile-ttl it forgets limits" in message
    finally:
        admin.config_set("maxmemory-policy", "noeviction")
        admin.config_set("maxmemory", 0)


def test_tls(ask) -> None:
    with engines.engine(engines.REDIS_7, tls=True) as server:
        assert ask(server.url(), store_tls(str(server.path / "ca.pem"), None, None)) == []
        error, message = only(ask(server.url(), store_tls(None, None, None)))
        assert error
        assert "throttle_store_tls_ca_file says whose certificates are" in message
        assert "rediss://" in only(ask(server.url().replace("rediss", "redis")))[1]


@pytest.fixture(scope="module")
def group() -> Iterator[engines.Watched]:
    with engines.watched(engines.VALKEY_8, "pw") as group:
        yield group


def test_sentinels(group: engines.Watched, ask) -> None:
    assert ask(group.url) == []
    group.master.client.config_set("min-replicas-to-write", 0)
    assert only(ask(group.url))[1].startswith(f"{group.master.where}: min-replicas-to-write 1 there keeps a master")
    group.master.client.config_set("min-replicas-to-write", 1)
    error, message = ask(group.url.replace("mymaster", "yours"))[-1]
    assert error
    assert "it knows no service yours" in message
    assert "name its master" in only(ask(group.replicas[0].url()))[1]
    assert "it is a Sentinel" in only(ask(f"redis://{group.sentinels[0].where}"))[1]
    group.sentinels[1].kill()
    assert only(ask(group.url))[0] is False
    assert only(ask(group.url))[1].startswith(f"{group.sentinels[1].where}: Connection refused")


def test_sentinels_with_a_password_of_their_own(group: engines.Watched, ask) -> None:
    for each in (group.sentinels[0], group.sentinels[2]):
        each.client.execute_command("ACL SETUSER default >theirs resetpass >theirs")
    url = group.url.replace(f"{group.sentinels[1].where},", "")
    assert "NOAUTH" in ask(url)[-1].message
    assert ask(url, sentinel_password="theirs") == []


def test_a_cluster(ask) -> None:
    with engines.shards(engines.VALKEY_9) as cluster:
        assert ask(cluster.url) == []
        assert only(ask(cluster.nodes[0].url()))[1].endswith("it is one node of a cluster: write redis+cluster://")
        cluster.nodes[0].client.execute_command("CLUSTER DELSLOTS", 0, 1, 2)
        one = f"redis+cluster://{cluster.nodes[0].where}"
        assert "3 of its 16384 slots are on no server" in only(ask(one))[1]
        cluster.nodes[1].client.config_set("maxmemory", "1gb")
        cluster.nodes[1].client.config_set("maxmemory-policy", "allkeys-lru")
        assert [cluster.nodes[1].where in each.message for each in ask(one)] == [False, True]
